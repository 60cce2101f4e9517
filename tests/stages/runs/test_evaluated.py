"""What a trainer measured at its end is what `evaluate` uses, to the same bits; what is not known
of a model is measured."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import forked
from helpers.command import environment, run_here
from helpers.sessions import opened
from safetensors.torch import load_file, save_file

from doremi_train import files
from doremi_train.model import folders
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import comm, engine
from doremi_train.stages import evaluate, prepare
from doremi_train.stages.runs import evaluated


@pytest.fixture(scope="module")
def trained(module_fresh: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run that was evaluated, in a store of its own."""
    overrides = [*module_fresh, f"run_dir={tmp_path_factory.mktemp('trained') / 'run'}"]
    outcome = run_here(*overrides, "stage=evaluate", "main.comparisons=[baseline]")
    assert outcome.code == 0, outcome
    return [*overrides, "main.comparisons=[baseline]"]


@pytest.fixture
def copied(trained: list[str], tmp_path: Path) -> list[str]:
    """The same in a copy, store and all, which a test may spoil."""
    at = {name: Path(value) for name, _, value in (one.partition("=") for one in trained)}
    shutil.copytree(at["store"], tmp_path / "store", symlinks=True)
    shutil.copytree(at["run_dir"], tmp_path / "run", symlinks=True)
    for link in filter(Path.is_symlink, at["run_dir"].iterdir()):
        there = link.resolve()
        own = tmp_path / "store" / "runs" / there.name
        files.link(tmp_path / "run" / link.name, own if own.exists() else there)
    return [*trained, f"store={tmp_path / 'store'}", f"run_dir={tmp_path / 'run'}"]


def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The model folders that are loaded from now on."""
    seen, load = [], folders.load

    def counted(folder: Path, *of: Any) -> Any:
        seen.append(folder)
        return load(folder, *of)

    monkeypatch.setattr(folders, "load", counted)
    return seen


@pytest.mark.slow
def test_what_the_trainer_measured_is_what_the_saved_model_gives_to_the_same_bits(
    trained: list[str],
) -> None:
    with opened(*trained) as session:
        store = prepare.run(session)
        for name in ("reference", "proxy", "main"):
            model = session.run_dir / name / "model"
            weights = folders.folder_fingerprint(model)
            told = evaluated._by_trainer(session, store, model, weights)
            assert told == files.read_json(model.parent / "result.json")["evaluation"]
            (now,) = evaluated._measure(session, store, model, ["validation"]).values()
            assert told == now
            assert evaluated.figures(session, store, model) == now


def test_no_model_is_loaded_again(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = loads(monkeypatch)
    with opened(*trained) as session:
        before = (session.run_dir / "evaluation.json").read_bytes()
        assert "training_loss" in evaluate.run(session)["reference"]
        assert (session.run_dir / "evaluation.json").read_bytes() == before and not seen


def test_a_run_of_an_older_version_is_measured_and_then_known(
    copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = loads(monkeypatch)
    for run in ("first", "again"):
        with opened(*copied) as session:
            before = (session.run_dir / "evaluation.json").read_bytes()
            if run == "first":
                result = session.run_dir / "main" / "result.json"
                older = files.read_json(result)
                del older["model"]
                files.write_json(result, older)
                (result.parent / "checksums.json").unlink()
            evaluate.run(session)
            assert (session.run_dir / "evaluation.json").read_bytes() == before
            assert [folder.parent.resolve() for folder in seen] == [
                (session.run_dir / "main").resolve()
            ]


def test_other_weights_and_another_evaluation_are_measured_anew(
    copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(*copied) as session:
        store, model = prepare.run(session), session.run_dir / "main" / "model"
        before = evaluated.figures(session, store, model)
        seen = loads(monkeypatch)
        tensors = load_file(model / "model.safetensors")
        changed = {name: tensor * 1.5 for name, tensor in tensors.items()}
        save_file(changed, model / "model.safetensors", {"format": "pt"})
        after = evaluated.figures(session, store, model)
        assert after["mean_loss"] != before["mean_loss"] and len(seen) == 1
    other = [f"run_dir={session.run_dir.parent / 'other'}", "evaluation.sequences=2"]
    with opened(*copied, *other) as session:
        found = evaluated.figures(session, prepare.run(session), model.parent.resolve() / "model")
        assert {domain["tokens"] for domain in found["domains"].values()} == {2 * 32}
        assert len(seen) == 2


def watched() -> None:
    """In this process, that a model which is measured is never whole but in a forward."""
    really = engine.frozen

    def frozen(*of: Any) -> LanguageModel:
        def look(model: torch.nn.Module, *_: Any) -> None:
            assert all(map(comm.in_parts, model.parameters()))

        model = really(*of)
        look(model)
        model.register_forward_hook(look)
        print("in parts")
        return model

    engine.frozen = frozen


@pytest.mark.acceptance
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_two_processes_measure_anew_what_one_did(strategy: str, copied: list[str]) -> None:
    with opened(*copied) as session:
        run_dir = session.run_dir
    before = files.read_json(run_dir / "evaluation.json")
    for name in ("main", "reference"):
        result = files.read_json(run_dir / name / "result.json")
        del result["model"]
        files.write_json(run_dir / name / "result.json", result)
        (run_dir / name / "checksums.json").unlink()
    shutil.rmtree(run_dir.parent / "store" / "metrics")
    overrides = [*copied, "stage=evaluate", f"engine={strategy}"]
    both = forked.ranks(2, overrides, environment(), before=watched)
    code, out, err = forked.ended(both, 120)
    assert code == 0 and out.count("in parts") == 2 * 2, (out, err)
    after = files.read_json(run_dir / "evaluation.json")
    assert len([*(run_dir.parent / "store" / "metrics").iterdir()]) == 3  # one of training text
    for name, figures in before.items():
        for domain, found in figures["domains"].items():
            again = after[name]["domains"][domain]
            assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)

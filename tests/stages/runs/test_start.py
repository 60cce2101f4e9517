"""Runs that begin with the weights of a folder: continued pretraining, mid-training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Outcome, run_here
from helpers.pretrained import smol
from safetensors.torch import load_file

STEPS = 12


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def ran(*overrides: str) -> Outcome:
    outcome = run_here(*overrides)
    assert outcome.code == 0, outcome
    return outcome


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def first(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run of its own, on natural."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    ran(*tiny, f"run_dir={run_dir}", "mixture=natural", "main.comparisons=[]", "stage=main")
    return (run_dir / "main" / "model").resolve()


@pytest.fixture(scope="module")
def onward(first: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline from there, of which all models have the tokeniser and the shape."""
    run_dir = tmp_path_factory.mktemp("runs") / "onward"
    shapes = [o for o in tiny if not o.startswith(("model.", "data.vocabulary"))]
    ran(*shapes, f"run_dir={run_dir}", f"start.model={first}", "training.learning_rate=0.001")
    return run_dir


@pytest.mark.slow
def test_every_model_begins_with_the_weights(first: Path, onward: Path) -> None:
    for name in ("reference", "proxy", "main", "uniform"):
        assert "started_from" in read(onward / name / "recipe.json")["model"], name
        moved = weights(onward / name / "model")
        for key, before in weights(first).items():
            apart = (moved[key] - before).norm() / before.norm()
            assert apart > 0, (name, key)
            if before.ndim == 2:  # of another seed they are 1.4 apart
                assert apart < 0.5, (name, key)
    figures = read(onward / "evaluation.json")
    assert figures["start"]["mean_loss"] > figures["main"]["mean_loss"]


def test_a_step_of_no_length_leaves_them_as_they_were(
    first: Path, tiny: list[str], tmp_path: Path
) -> None:
    still = ("training.learning_rate=1e-30", "training.end_learning_rate=1e-30", "stage=main")
    ran(
        *tiny, f"run_dir={tmp_path / 'run'}", f"start.model={first}", "mixture=natural",
        "main.comparisons=[]", "training.steps=2", *still,
    )  # fmt: skip
    kept = weights(tmp_path / "run" / "main" / "model")
    assert all(torch.equal(kept[key], before) for key, before in weights(first).items())


def test_the_report_says_what_it_costs(onward: Path) -> None:
    figures = read(onward / "evaluation.json")
    lost = {
        name
        for name, found in figures["main"]["domains"].items()
        if found["loss"] > 1.01 * figures["start"]["domains"][name]["loss"]
    }
    said = [one for one in read(onward / "findings.json") if one["kind"] == "forgotten"]
    assert {name for one in said for name in one["domains"]} == lost
    assert "start" in (onward / "report.html").read_text()


def test_it_goes_on_from_what_it_made(onward: Path, tiny: list[str], tmp_path: Path) -> None:
    """Its saved model is a model folder like any other, also to begin with and as a shape."""
    model = onward / "main" / "model"
    same = (*tiny, "mixture=natural", "main.comparisons=[]", "training.steps=2", "stage=main")
    ran(*same, f"run_dir={tmp_path / 'again'}", f"start.main={model}")
    shape = [o for o in same if not o.startswith("model.")]
    ran(
        *shape,
        f"run_dir={tmp_path / 'shape'}",
        f"data.tokenizer={model}",
        "model.config=null",
        f"model.path={model}",
    )
    assert "started_from" not in read(tmp_path / "shape" / "main" / "recipe.json")["model"]


MISTAKES = {
    "start.model=nowhere": "start.model=nowhere: no such folder",
    "main.model=tiny": "start.main=FOLDER",
    "data.tokenizer=OTHER": "has another tokeniser than the data; give data.tokenizer=",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, first: Path, tiny: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    text = (first / "tokenizer.json").read_text()
    other.write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    given = mistake.replace("OTHER", str(other))
    outcome = run_here(
        *tiny, f"run_dir={tmp_path / 'run'}", f"start.model={first}", "stage=reference", given
    )
    assert outcome.code == 2 and MISTAKES[mistake] in outcome.err, outcome
    assert "Traceback" not in outcome.err


def test_an_adapter_is_refused_be_its_base_beside_it_or_not(
    first: Path, tiny: list[str], tmp_path: Path
) -> None:
    """transformers would read the one through the other, and we the base alone."""
    for beside in (False, True):
        folder = tmp_path / f"adapter-{beside}"
        shutil.copytree(first, folder)
        if not beside:
            for name in ("config.json", "model.safetensors"):
                (folder / name).unlink()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        outcome = run_here(
            *tiny, f"run_dir={tmp_path / 'run'}", f"start.model={folder}", "stage=reference"
        )
        assert outcome.code == 2 and "merge_and_unload" in outcome.err, outcome
        assert "Traceback" not in outcome.err


@pytest.mark.acceptance
def test_a_small_real_model_goes_on(corpus: Path, tmp_path: Path) -> None:
    """SmolLM2 of 135M parameters on three small domains, with a mixture that adapts."""
    folder, run_dir = smol(tmp_path / "smol"), tmp_path / "run"
    ran(
        "experiment=continue", f"start.model={folder}", f"data.root={corpus}", "mixture=odm",
        f"run_dir={run_dir}", "training.steps=2", "training.batch_size=3",
        "training.sequence_length=32", "evaluation.sequences=2", "main.comparisons=[]",
    )  # fmt: skip
    figures = read(run_dir / "evaluation.json")
    assert figures["start"]["mean_loss"] < 6  # a model that knows nothing has 10.8
    assert abs(figures["main"]["mean_loss"] - figures["start"]["mean_loss"]) < 2

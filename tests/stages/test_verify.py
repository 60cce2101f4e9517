"""What is damaged in a store is found: by a sample where it is used, in full by stage=verify."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import forked
from helpers.command import environment, run_here

from doremi_train.stages.runs import measuring
from doremi_train.storage import seal


@pytest.fixture(scope="module")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a store of its own, and in it two trained models."""
    run_dir = tmp_path_factory.mktemp("runs") / "default"
    assert run_here(*command(tiny, run_dir)).code == 0
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


def command(tiny: list[str], run_dir: Path) -> list[str]:
    own = [o for o in tiny if not o.startswith("store=")]
    return [*own, f"run_dir={run_dir}", "mixture=natural", "main.comparisons=[uniform]"]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "main/model/model.safetensors": lambda path: flip(path, 3000),
    "main/metrics.jsonl": cut,
    "main/result.json": lambda path: path.write_text(path.read_text().replace("1", "2", 1)),
    "uniform/model/config.json": lambda path: path.unlink(),
    "main/checksums.json": cut,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_named_and_computed_again(name: str, copy: Path, tiny: list[str]) -> None:
    weights = (copy / "main" / "model" / "model.safetensors").read_bytes()
    DAMAGE[name](copy / name)
    (copy / "finished.json").unlink()  # as of a command that is another in something
    again = run_here(*command(tiny, copy))
    file = name.partition("/")[2]
    assert again.code == 0 and f"{file} " in again.out and "computed again" in again.out, again
    assert (copy / "main" / "model" / "model.safetensors").read_bytes() == weights
    assert run_here("stage=verify", f"store={copy / 'store'}").code == 0


@pytest.mark.slow
def test_what_no_sample_sees_is_found_in_full(
    copy: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    verify = ("stage=verify", f"store={copy / 'store'}")
    sound = run_here(*verify)
    assert sound.code == 0 and "are as they were written" in sound.out, sound
    assert not (tmp_path / "runs").exists()
    model = copy / "main" / "model" / "model.safetensors"
    sampled = seal.sample_of(model)
    flip(model, (model.stat().st_size - seal.BLOCK) // (seal.BLOCKS - 1) + seal.BLOCK + 9)
    assert seal.sample_of(model) == sampled
    shard = next((copy / "prepare" / "train" / "rich").glob("*.tar"))
    flip(shard, shard.stat().st_size * 5 // 9)
    found = run_here(*verify)
    assert found.code == 1 and "Traceback" not in found.err, found
    assert "model.safetensors has another content" in found.out and "verify: delete" in found.out
    assert "2 of " in found.err
    shutil.rmtree((copy / "prepare").resolve())  # as it is told to
    assert run_here(*command(tiny, copy)).code == 0
    assert run_here(*verify).code == 0


@pytest.mark.slow
def test_a_zeroed_shard_is_named(copy: Path, tiny: list[str]) -> None:
    for shard in (copy / "prepare" / "train").glob("*/*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    shutil.rmtree((copy / "main").resolve())
    again = run_here(*command(tiny, copy))
    assert again.code == 2 and ".tar has another content than was written; delete" in again.err
    shutil.rmtree((copy / "prepare").resolve())
    assert run_here(*command(tiny, copy)).code == 0


@pytest.mark.acceptance
def test_two_commands_at_once_on_a_damaged_store(
    copy: Path, tiny: list[str], tmp_path: Path
) -> None:
    """One of them computes it again, and the other waits."""
    cut(copy / "main" / "model" / "model.safetensors")
    store, given = f"store={copy / 'store'}", command(tiny, copy)
    started = [
        forked.ranks(1, [*given, store, "stage=main", f"run_dir={tmp_path / name}"], environment())
        for name in ("one", "two")
    ]
    done = [forked.ended(processes, 300) for processes in started]
    assert [code for code, *_ in done] == [0, 0], done
    assert sum("it is computed again" in out for _, out, _ in done) == 1, done
    assert run_here("stage=verify", store).code == 0


SPOILED = {
    "main/status.json": 0,  # decides no number, and is written anew
    "main/recipe.json": 0,
    "prepare/status.json": 0,
    "prepare/manifest.json": 2,
    "config.yaml": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b"", bytes(80), b"[]", b"[" * 100_000], ids=["empty", "zeros", "list", "deep"]
)
@pytest.mark.parametrize("name", SPOILED)
def test_what_says_how_a_run_stands_may_be_damaged(
    name: str, content: bytes, copy: Path, tiny: list[str]
) -> None:
    (copy / name).write_bytes(content)
    again = run_here(*command(tiny, copy), "stage=main")
    assert again.code == SPOILED[name] and "Traceback" not in again.err, again
    if again.code:
        assert str((copy / name).resolve().name) in again.err and "delete" in again.err


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    found = run_here("stage=verify", f"store={tmp_path / 'none'}")
    assert found.code == 2 and "store=" in found.err, found


@pytest.mark.parametrize("damage", [*"ab", "text"])
def test_a_measured_figure_that_changed_is_measured_again(damage: str, tmp_path: Path) -> None:
    session: Any = SimpleNamespace(store=tmp_path)
    model = tmp_path / "runs" / "run-1" / "model"
    measuring.keep(session, model, {"text": {"target_loss": 1.25}})
    assert measuring.kept(session, model, "text") == {"target_loss": 1.25}
    (path,) = (tmp_path / "metrics").iterdir()
    said = json.loads(path.read_text())
    path.write_text(
        {
            "a": json.dumps(said | {"target_loss": 1.26}),
            "b": path.read_text()[:-5],
            "text": "[1]",
        }[damage]
    )
    assert measuring.kept(session, model, "text") is None

"""A finished command says again what it said, and only where nothing that it rests on changed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import environment, run_here

from doremi_train.console import Sheet
from doremi_train.storage import finished

SAID: list[str | Sheet] = ["first", Sheet("title", ["a", "b"], [["1", "2"]], [0]), "last"]


@pytest.fixture
def done(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a finished run with a store beside it."""
    run = tmp_path / "store" / "runs" / "language_model-1"
    for path in (run / "result.json", run / "model" / "model.safetensors", run / "status.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    for name in ("run/evaluation.json", "run/report.html", "data/plain/train.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "run" / "main").symlink_to(run)
    plain = {
        "stage": "pipeline",
        "run_dir": str(tmp_path / "run"),
        "store": str(tmp_path / "store"),
        "remote": None,
        "seed": 0,
        "tracking": {"backend": "none"},
        "data": {"domains": {"plain": {"train": [f"{tmp_path}/data/*/train.jsonl"]}}},
    }
    finished.keep(plain, SAID)
    (tmp_path / "run" / "report").mkdir()
    (tmp_path / "run" / "report" / "status.json").write_text("1")  # of a stage asked for later
    return plain


def test_it_says_what_was_said(done: dict[str, Any], tmp_path: Path) -> None:
    assert finished.said(done) == SAID
    assert finished.said(done | {"stage": "report"}) == SAID
    (tmp_path / "run" / "main" / "status.json").write_text("another time")
    (tmp_path / "store" / "runs" / "other").mkdir()  # another run's
    assert finished.said(done) == SAID


CHANGES: dict[str, Callable[[Path], object]] = {
    "a result": lambda at: (at / "run/evaluation.json").write_text("22"),
    "the page": lambda at: (at / "run/report.html").unlink(),
    "a finding of another stage": lambda at: (at / "run/headroom.json").write_text("1"),
    "the weights": lambda at: os.utime(at / "run/main/model/model.safetensors", (1, 1)),
    "the run": lambda at: shutil.rmtree(at / "store/runs"),
    "a text": lambda at: (at / "data/plain/train.jsonl").write_text("more"),
    "one text more": lambda at: (at / "data/plain/train-2.jsonl").write_text("1"),
    "what was kept": lambda at: (at / "run/finished.json").write_text('{"said": 1}'),
    "its end": lambda at: (at / "run/finished.json").write_text('{"rests_on": "'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_looked_at_anew(change: str, done: dict[str, Any], tmp_path: Path) -> None:
    CHANGES[change](tmp_path)
    assert finished.said(done) is None


def test_another_configuration_is_another_command(done: dict[str, Any], tmp_path: Path) -> None:
    assert finished.said(done | {"seed": 1}) is None
    assert finished.said(done | {"run_dir": str(tmp_path)}) is None
    assert finished.said(done | {"run_dir": None}) is None
    assert finished.said(done | {"store": str(tmp_path)}) is None


@pytest.mark.parametrize(
    "more",
    [
        {"remote": "elsewhere"},
        {"tracking": {"backend": "wandb"}},
        {"data": {"files": ["https://host/a.jsonl"]}},
        {"data": {"files": ["pipe:cat a.jsonl"]}},
        {"data": {"root": "/"}},
    ],
)
def test_what_asks_others_is_never_kept(
    more: dict[str, Any], done: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run" / "finished.json").unlink()
    finished.keep(done | more, SAID)
    assert not (tmp_path / "run" / "finished.json").exists()
    assert finished.said(done | more) is None


@pytest.mark.slow
def test_the_command_says_again_what_it_said_and_imports_no_torch(
    tiny: list[str], tmp_path: Path
) -> None:
    asked = [*tiny, f"run_dir={tmp_path}", "mixture=natural", "main.comparisons=[]"]
    first = run_here(*asked)
    assert first.code == 0, first
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    code = (
        "import sys; from doremi_train.__main__ import main; main(); "
        "print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    for stage in ("report", "pipeline"):
        again = subprocess.run(
            [sys.executable, "-c", code, *asked, f"stage={stage}"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 0, again
        told, *rest, imported = again.stdout.splitlines()
        assert "finished before" in told and imported == "[]"
        assert rest and first.out.splitlines()[-len(rest) :] == rest
        assert '"finished"' in (tmp_path / stage / "status.json").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    (tmp_path / "report.html").unlink()
    repaired = run_here(*asked, "stage=report")
    assert repaired.code == 0 and "finished before" not in repaired.out
    assert (tmp_path / "report.html").exists()

"""The extra `select` is for commands that select: others neither need numba nor wait for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import TINY, environment
from helpers.corpus import documents, write_jsonl

TOLD = """
import sys
from doremi_train.__main__ import main
main()
print("numba:", "numba" in sys.modules)
"""
# Several commands, since importing is most of what a process costs.
WITHOUT = """
import json, sys
sys.modules["numba"] = None
from helpers.command import run_here
print(json.dumps([run_here(*command) for command in json.loads(sys.argv[1])]))
"""
STAGES = ("prepare", "select", "vocabulary")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for number, domain in enumerate(("one", "two")):
        write_jsonl(root / domain / "train.jsonl", documents(number, "abcdefgh", 50, 40_000))
    return root


def run(code: str, *given: str) -> str:
    """What a process of its own prints that runs `code`."""
    env = environment() | {
        "PYTHONPATH": f"{Path(__file__).parents[2]}:{environment()['PYTHONPATH']}"
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.slow
def test_a_run_without_a_selection_imports_no_numba(corpus: Path, tmp_path: Path) -> None:
    given = (f"data.root={corpus}", f"run_dir={tmp_path / 'run'}", *TINY, "stage=prepare")
    assert "numba: False" in run(TOLD, *given)


@pytest.mark.slow
def test_without_numba_a_selection_is_one_message_before_any_work_and_others_run(
    corpus: Path, tmp_path: Path
) -> None:
    common = (f"data.root={corpus}", *TINY)
    target = f"selection.targets={{t: [{corpus}/one/train.jsonl]}}"
    commands = [
        [*common, f"run_dir={tmp_path / stage}", f"stage={stage}", "selection=ngram", target]
        for stage in STAGES
    ]
    commands.append([*common, f"run_dir={tmp_path / 'plain'}", "stage=prepare"])
    *selections, plain = json.loads(run(WITHOUT, json.dumps(commands)))
    for stage, (code, _, error) in zip(STAGES, selections, strict=True):
        assert code == 2, error
        assert "selection: needs numba; pip install 'doremi-train[select]'" in error
        assert "Traceback" not in error
        assert not list((tmp_path / stage).glob(f"{stage}*"))
    assert plain[0] == 0, plain

"""The extra `select` is for commands that select: others neither need numba nor wait for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import TINY, environment
from helpers.corpus import documents, write_jsonl

WITHOUT = "import sys\nsys.modules['numba'] = None\n"
COMMAND = "from doremi_train.__main__ import main\nmain()\n"
TOLD = "import atexit, sys\natexit.register(lambda: print('numba:', 'numba' in sys.modules))\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for number, domain in enumerate(("one", "two")):
        write_jsonl(root / domain / "train.jsonl", documents(number, "abcdefgh", 50, 40_000))
    return root


def run(code: str, corpus: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which runs `code` before it."""
    given = (f"data.root={corpus}", f"run_dir={run_dir}", *TINY, *more)
    return subprocess.run(
        [sys.executable, "-c", code + COMMAND, *given],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_run_without_a_selection_imports_no_numba(corpus: Path, tmp_path: Path) -> None:
    done = run(TOLD, corpus, tmp_path / "run", "stage=prepare")
    assert done.returncode == 0 and "numba: False" in done.stdout, done


def test_a_run_without_a_selection_needs_no_numba(corpus: Path, tmp_path: Path) -> None:
    done = run(WITHOUT, corpus, tmp_path / "run", "stage=prepare")
    assert done.returncode == 0, done


@pytest.mark.parametrize("stage", ["prepare", "select", "vocabulary"])
def test_a_selection_without_numba_is_one_message_before_any_work(
    stage: str, corpus: Path, tmp_path: Path
) -> None:
    target = f"selection.targets={{t: [{corpus}/one/train.jsonl]}}"
    done = run(WITHOUT, corpus, tmp_path / "run", f"stage={stage}", "selection=ngram", target)
    assert done.returncode == 2, done
    assert "selection: needs numba; pip install 'doremi-train[select]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob(f"{stage}*"))

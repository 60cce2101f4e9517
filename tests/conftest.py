"""A small corpus of generated text, overrides that make a whole pipeline take seconds, and two ways to run the command.

`command` runs it inside this process: fast, for most tests. `doremi` starts real processes (forked from one that has
imported what they need): for signals, collectives, working directories and everything else that a process owns.
"""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest

from doremi_train import __main__
from doremi_train.storage import runs

ROOT = Path(__file__).parents[1]

TINY = (
    "data.vocabulary_size=300",
    "model.config.num_hidden_layers=2",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_attention_heads=2",
    "training.sequence_length=32",
    "training.batch_size=8",
    "training.steps=12",
    "training.log_every=4",
    "training.threads=1",
    "evaluation.sequences=4",
    "evaluation.every=6",
)


class Outcome(NamedTuple):
    """What a command left behind for its caller."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def words(seed: int, letters: str, vocabulary: int) -> Iterator[str]:
    """Endless words over `letters`, frequent ones first (Zipf): every seed a language of its own."""
    random_ = random.Random(seed)
    known = ["".join(random_.choices(letters, k=random_.randint(2, 8))) for _ in range(vocabulary)]
    weights = [1 / (rank + 1) for rank in range(vocabulary)]
    while True:
        yield from random_.choices(known, weights, k=1000)


def documents(seed: int, letters: str, vocabulary: int, characters: int) -> Iterator[str]:
    """Documents of about 60 words until there are `characters` of them."""
    stream = words(seed, letters, vocabulary)
    while characters > 0:
        text = " ".join(next(stream) for _ in range(60))
        characters -= len(text)
        yield text


def write_jsonl(path: Path, texts: Iterator[str] | list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of 200, 100 and 50 kB: few words, many words, and digits."""
    root = tmp_path_factory.mktemp("corpus")
    write_jsonl(root / "plain" / "train.jsonl", documents(1, "abcdefgh", 50, 200_000))
    write_jsonl(root / "rich" / "train.jsonl", documents(2, "abcdefghijklmnopqrstuvwxyz", 3000, 100_000))
    write_jsonl(root / "digits" / "train.jsonl", documents(3, "0123456789", 200, 50_000))
    return root


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests, as by users' runs: the corpus is prepared once, and equal models are trained once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def tiny(corpus: Path, store: Path) -> list[str]:
    """Overrides of a whole pipeline on the small corpus, in a shared store."""
    return [f"data.root={corpus}", f"store={store}", *TINY]


# More steps than the other tests take, so that a signal finds the run at work; a checkpoint every 7 of them.
LONG = ("training.steps=60", "training.checkpoint_every=7", "evaluation.every=20")


@pytest.fixture
def fresh(tiny: list[str], store: Path, tmp_path: Path) -> list[str]:
    """Overrides with a store of its own, where only the data is there already."""
    assert run_here(*tiny, f"run_dir={tmp_path / 'first'}", "stage=prepare").code == 0
    own = tmp_path / "store"
    own.mkdir()
    (own / "data").symlink_to(store / "data")
    return [*tiny, f"store={own}"]


@pytest.fixture
def prepared(fresh: list[str]) -> list[str]:
    """The same, of a longer run."""
    return [*fresh, *LONG]


@pytest.fixture(scope="session")
def uninterrupted(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    outcome = run_here(*tiny, *LONG, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]")
    assert outcome.code == 0, outcome
    return run_dir


@pytest.fixture(scope="session")
def command() -> Command:
    """`command(*overrides)` runs the command in this process. Errors that are not the user's are raised."""
    return run_here


@pytest.fixture(scope="session")
def doremi() -> Command:
    """`doremi(*overrides, processes=1, cwd=…)` runs the command in processes of its own, to its end."""

    def run(*overrides: str, processes: int = 1, timeout: float = 900, cwd: Path | None = None) -> Outcome:
        return Outcome(*forked.ended(forked.ranks(processes, overrides, environment(), cwd), timeout))

    return run


def run_here(*overrides: str) -> Outcome:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    arguments, sys.argv = sys.argv, ["doremi-train", *overrides]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            __main__.main()
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv, runs.stop.requested = arguments, False
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())  # type: ignore[call-overload]


def start(*overrides: str, processes: int = 1) -> Any:
    """The command as one process, or as several under torchrun with gloo; not waited for."""
    if processes == 1:
        return forked.ranks(1, overrides, environment())[0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return subprocess.Popen(
        [*launch, "doremi_train", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """Of a process that runs the command on this checkout: one thread, no GPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}

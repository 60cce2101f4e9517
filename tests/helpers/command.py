"""Overrides that make a whole pipeline, of the paper's form, take seconds, and two ways to run the
command.

`run_here` runs it inside this process: fast, for most tests. `start` starts real processes (forked
from one that has imported what they need): for signals, collectives, working directories and
everything else that a process owns.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra._internal.hydra import Hydra

from doremi_train import __main__
from doremi_train.storage import runs
from helpers import forked

ROOT = Path(__file__).parents[2]

TINY = (
    "mixture=doremi",
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

# More steps than the other tests take, so that a signal finds the run at work; a checkpoint every 7
# of them.
LONG = ("training.steps=60", "training.checkpoint_every=7", "evaluation.every=20")


class Outcome(NamedTuple):
    """What a command left behind for its caller."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def run_here(*overrides: str) -> Outcome:
    # Hydra composes all a first time to read hydra.mode alone, which is half of what a mistake
    # costs; of ours some experiments set it.
    sweeps = any("hydra.mode" in override or "experiment" in override for override in overrides)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    arguments, sys.argv = sys.argv, ["doremi-train", *overrides]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            if not sweeps:
                patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
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
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
    ]
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

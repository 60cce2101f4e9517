"""What parts share: DoReMi's 280m or a small stand-in, and rounds that fit into the time left."""

import argparse
import contextlib
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import common, step
from benchmarks.gpu.record import Record
from benchmarks.step import Setting, Size, Steps

Seconds = dict[str, list[float]]  # of a step of every side, one a round

MODEL = "280m"
VOCABULARY = 1 << 15  # the model is called for one of 256k
_REHEARSED = Size(256, 4, 16)


@contextlib.contextmanager
def setting(record: Record, batch: int = 16, vocabulary: int = VOCABULARY) -> Iterator[Setting]:
    """280m in bf16 with sequences of 1024, `batch` of them a step; in a rehearsal nano with a few
    short ones. Trainers say nothing meanwhile."""
    size = Size(vocabulary, batch, 1024)
    if record.rehearse:
        size = _REHEARSED._replace(vocabulary=vocabulary >> 7)
    given = argparse.Namespace(
        **size._asdict(),
        precision="bf16",
        threads=1,
        device="cpu" if record.rehearse else "auto",
    )
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        of = step.setting("nano" if record.rehearse else MODEL, given, Path(folder))
        # One layer compiles sooner.
        yield of._replace(config={**of.config, "num_hidden_layers": 1}) if record.rehearse else of


def batched(of: Setting, batch: int) -> Setting:
    """The same with another batch."""
    return of._replace(training=replace(of.training, batch_size=batch))


def alternate(
    sides: Mapping[str, Steps], device: torch.device, seconds: float, most: int = 8
) -> Seconds:
    """Seconds a step of every side, in turns of several steps on a GPU, which is to be asked ahead.
    After a turn to warm up there are as many rounds as `seconds` allow, but one at least."""
    each = 5 if device.type == "cuda" else 1
    turns = {name: step.turn(device, steps, each) for name, steps in sides.items()}
    return rounds(turns, seconds, most, each)


def rounds(
    turns: Mapping[str, Callable[[], object]], seconds: float, most: int = 12, each: int = 1
) -> Seconds:
    """The same of any turns, each of so many steps."""
    ends, names = time.monotonic() + seconds, list(turns)
    times: Seconds = {name: [] for name in names}
    longest = 0.0
    for number in range(most):
        began = time.monotonic()
        if number and began + longest > ends:
            break
        in_turn = names[number % len(names) :] + names[: number % len(names)]
        taken = common.alternate({n: turns[n] for n in in_turn}, 1, warm_up=int(number == 0))
        for name, (took,) in taken.items():
            times[name].append(took / each)
        # The first one has warmed up too.
        longest = max(longest, (time.monotonic() - began) / (1 + (number == 0)))
    return times


def median(times: Seconds) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def fits(device: torch.device, function: Callable[[], None]) -> bool:
    """Whether the memory is enough for it; if not, what it took is given back."""
    try:
        function()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    empty(device)
    return False


def empty(device: torch.device) -> None:
    """Give back the memory of what nobody needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def gigabytes(device: torch.device) -> float | None:
    """The most memory taken since it was last asked; None on a CPU."""
    if device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return most

"""Steps of 280m in bf16 with sequences of 1024: the batch that is fastest, then a plain step, a
proxy's with a live reference and with cached losses, and the shortest loop written by hand."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import common, step
from benchmarks.gpu import sized
from benchmarks.gpu.record import Record, at_least, at_most, main
from benchmarks.step import Setting, Steps

BATCH = "fastest batch"  # the figure that later parts read
_SEARCH = 60.0  # seconds
_BATCHES = (8, 16, 32, 64, 128, 256)
_WORTH = 1.02  # a batch twice as large is to be faster by this
_GOAL_OF_UTILISATION = at_least(0.5)
GOALS = {"live": at_most(1.36), "cached": at_most(1.03), "plain": at_most(1.03)}


def measure(record: Record) -> None:
    with sized.setting(record) as of:
        of = sized.batched(of, search(record, of))
        proxies = {"plain": step.plain, "live": step.live, "cached": step.cached}
        found = compare(record, of, proxies, {"live": "plain", "cached": "plain"})
        if found:
            describe(record, of, found)
        compare(
            record,
            of,
            {"plain": step.plain, "handwritten": step.handwritten},
            {"plain": "handwritten"},
        )


def search(record: Record, of: Setting) -> int:
    """The smallest batch of which one twice as large is no faster, or would not fit."""
    device, ends = of.place.device, time.monotonic() + min(_SEARCH, record.left() / 2)
    best, fastest = 0, 0.0
    for batch in (2, 4) if record.rehearse else _BATCHES:
        if best and time.monotonic() > ends:
            break
        speed, taken = _tried(sized.batched(of, batch), device)
        if speed is None:
            break
        record.figure(f"plain step, batch of {batch}", speed, "tokens/s")
        _memory(record, f"… memory, batch of {batch}", taken)
        if speed < fastest * _WORTH:
            break
        best, fastest = batch, speed
        if taken and 2e9 * taken > torch.cuda.get_device_properties(device).total_memory:
            break
    if not best:
        raise MemoryError(f"a batch of {_BATCHES[0]} does not fit")
    record.figure(BATCH, best, "sequences")
    return best


def _tried(of: Setting, device: torch.device) -> tuple[float | None, float | None]:
    """(tokens a second, gigabytes) of a plain step; the first None where it does not fit."""
    seconds: list[float] = []

    def work() -> None:
        with contextlib.closing(step.plain(of, f"plain-{of.training.batch_size}")) as steps:
            found = sized.alternate({"plain": steps}, device, 5.0, 3)
            seconds.extend(found["plain"])

    sized.gigabytes(device)
    if not sized.fits(device, work):
        return None, None
    taken = sized.gigabytes(device)
    sized.empty(device)
    return tokens(of) / statistics.median(seconds), taken


def compare(
    record: Record,
    of: Setting,
    sides: Mapping[str, Callable[[Setting], Steps]],
    pairs: Mapping[str, str],
) -> sized.Seconds:
    """Write the ratios of `pairs`, above to below, of sides that take turns; returns what these
    took, or nothing where they do not fit."""
    device, found = of.place.device, sized.Seconds()

    def work() -> None:
        with contextlib.ExitStack() as stack:
            steps = {
                name: stack.enter_context(contextlib.closing(make(of)))
                for name, make in sides.items()
            }
            found.update(sized.alternate(steps, device, record.left() / 3))

    fit = sized.fits(device, work)
    sized.empty(device)
    for above, below in pairs.items():
        name = f"{above} over {below}"
        if fit:
            record.figure(name, common.ratio(found[above], found[below]), goal=GOALS[above])
        else:
            record.not_measured(name, "does not fit into memory", GOALS[above])
    return found if fit else {}


def describe(record: Record, of: Setting, found: sized.Seconds, label: str = "") -> None:
    """Write the speed of all sides, and what part of the card's peak a plain step makes use of."""
    seconds = sized.median(found)
    for side, taken in seconds.items():
        record.figure(f"{label}{side} step", tokens(of) / taken, "tokens/s")
    described = step.described(of, seconds)
    record.figure(f"{label}model FLOPs", described["model_flops_per_second"] / 1e12, "TFLOP/s")
    name = f"{label}model FLOPs utilisation"
    if "model_flops_utilisation" in described:
        record.figure(name, described["model_flops_utilisation"], goal=_GOAL_OF_UTILISATION)
    else:
        record.not_measured(name, "no peak of this machine is known", _GOAL_OF_UTILISATION)


def _memory(record: Record, name: str, gigabytes: float | None) -> None:
    if gigabytes is None:
        record.not_measured(name, "is a GPU's")
    else:
        record.figure(name, gigabytes, "GB")


def tokens(of: Setting) -> int:
    return of.training.batch_size * of.training.sequence_length


if __name__ == "__main__":
    main("steps", measure)

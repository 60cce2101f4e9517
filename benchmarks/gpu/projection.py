"""Output projection fused with the loss beside plain logits: the two alone, and a step of 280m, by
vocabulary; the model has its name from the largest of them."""

import argparse
import contextlib
import statistics

from benchmarks import common, memory, step
from benchmarks.gpu import sized, steps
from benchmarks.gpu.record import Record, main

VOCABULARIES = (1 << 15, 1 << 17, 1 << 18)
_WIDTH = 768


def measure(record: Record) -> None:
    for vocabulary in VOCABULARIES:
        alone(record, vocabulary)
        whole(record, vocabulary)


def alone(record: Record, vocabulary: int) -> None:
    """Projection, loss and their backward, of 16 sequences."""
    tokens, name = 16 * 1024, f"{vocabulary >> 10}k, alone"
    if record.rehearse:
        tokens, vocabulary = 64, vocabulary >> 7
    device = "cpu" if record.rehearse else "auto"
    given = argparse.Namespace(
        precision="bf16", rounds=3 if record.rehearse else 9, clock="wall", device=device
    )
    times = common.Times()
    if not sized.fits(
        record.device, lambda: times.update(memory.times_of(tokens, _WIDTH, vocabulary, given))
    ):
        record.not_measured(f"{name}: fused over plain", "does not fit into memory")
        return
    sized.empty(record.device)
    for side, seconds in times.items():
        record.figure(f"{name}: {side}", 1e3 * statistics.median(seconds), "ms")
    gain = common.ratio(times["fused"], times["plain"])
    record.figure(f"{name}: fused over plain", gain)


def whole(record: Record, vocabulary: int) -> None:
    """A step of the model, and the most memory that it takes beyond what stays."""
    name, found = f"{vocabulary >> 10}k, a step", sized.Seconds()
    with sized.setting(record, vocabulary=vocabulary) as of:
        device, peaks = of.place.device, dict[str, float]()

        def work() -> None:
            with contextlib.ExitStack() as stack:
                sides = {
                    side: stack.enter_context(contextlib.closing(step.plain(at, side)))
                    for side, at in (("fused", of), ("plain", of._replace(fused=False)))
                }
                found.update(sized.alternate(sides, device, record.left() / 8, 6))
                peaks.update({side: memory.peak_of(its, device) for side, its in sides.items()})

        if not sized.fits(device, work):
            record.not_measured(f"{name}: fused over plain", "does not fit into memory")
            return
        sized.empty(device)
        record.figure(f"{name}: fused over plain", common.ratio(found["fused"], found["plain"]))
        record.figure(f"{name}: memory, fused over plain", peaks["fused"] / peaks["plain"])
        if vocabulary == VOCABULARIES[-1]:
            steps.describe(record, of, {"plain": found["fused"]}, f"{vocabulary >> 10}k, fused, ")


if __name__ == "__main__":
    main("projection", measure)

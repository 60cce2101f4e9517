"""Steps of GREATS on 280m, with sketches and exact, over an ordinary step on all candidates, of
which half are picked."""

import contextlib

from benchmarks import common, greats, memory, step
from benchmarks.gpu import sized, steps
from benchmarks.gpu.record import Record, at_most, main
from benchmarks.step import Setting

GOALS = {"sketched": at_most(1.0), "exact": at_most(1.2)}
_CANDIDATES = 32


def measure(record: Record) -> None:
    with sized.setting(record, _CANDIDATES) as of:
        for side in GOALS:
            beside_plain(record, of, side)
            sized.empty(record.device)


def beside_plain(record: Record, of: Setting, side: str) -> None:
    """Write what one way of picking costs over ordinary training that takes turns with it."""
    found, peaks = sized.Seconds(), dict[str, float]()

    def work() -> None:
        with contextlib.ExitStack() as stack:
            both = {
                name: stack.enter_context(contextlib.closing(greats.SIDES[name](of)))
                for name in ("plain", side)
            }
            # The first turn, whose every step has a gradient of the validation loss, warms up.
            turns = {name: step.turn(record.device, its, greats.TURN) for name, its in both.items()}
            found.update(sized.rounds(turns, record.left() / 4, 6, each=greats.TURN))
            peaks.update({name: memory.peak_of(its, record.device) for name, its in both.items()})

    name = f"{side} over plain on candidates"
    if not sized.fits(record.device, work):
        record.not_measured(name, "does not fit into memory", GOALS[side])
        return
    record.figure(name, common.ratio(found[side], found["plain"]), goal=GOALS[side])
    record.figure(f"{side}: memory over plain", peaks[side] / peaks["plain"])
    speed = steps.tokens(of) / sized.median(found)[side]
    record.figure(f"{side} step", speed, "candidate tokens/s")


if __name__ == "__main__":
    main("picks", measure)

"""Steps of 280m under torch.compile: what compiling takes, and what it gains, of a plain step and
of a proxy's; a live reference is not compiled, as in training."""

import contextlib
import time
from collections.abc import Callable

from benchmarks import common, step
from benchmarks.gpu import sized, steps
from benchmarks.gpu.record import Record, main
from benchmarks.step import Setting, Steps

_ROUNDS = 8


def measure(record: Record) -> None:
    batch = record.known("steps", steps.BATCH) or 16
    with sized.setting(record, batch) as of, contextlib.ExitStack() as stack:
        compiling = of._replace(place=of.place._replace(compile=True))

        def begun(make: Callable[[Setting], Steps], label: str) -> Steps:
            """Steps whose first one is done, and with it the compiling."""
            began = time.monotonic()
            made = stack.enter_context(contextlib.closing(make(compiling)))
            next(made)
            sized.wait(of.place.device)
            name = f"{label}: built, compiled, first step done"
            record.figure(name, time.monotonic() - began, "s")
            return made

        compiled = begun(lambda at: step.plain(at, "compiled"), "plain")
        sides = {
            "compiled": compiled,
            "plain": stack.enter_context(contextlib.closing(step.plain(of))),
        }
        found = sized.alternate(sides, of.place.device, record.left() / 4, _ROUNDS)
        gain = common.ratio(found["compiled"], found["plain"])
        record.figure("plain: compiled over not compiled", gain)
        steps.describe(record, of, {"plain": found["compiled"]}, "compiled, ")
        for name, make in {"live": step.live, "cached": step.cached}.items():
            pair = {"plain": compiled, name: begun(make, name)}
            found = sized.alternate(pair, of.place.device, record.left() / 3, _ROUNDS)
            ratio = common.ratio(found[name], found["plain"])
            record.figure(f"{name} over plain, compiled", ratio, goal=steps.GOALS[name])
            speed = steps.tokens(of) / sized.median(found)[name]
            record.figure(f"{name} step, compiled", speed, "tokens/s")


if __name__ == "__main__":
    main("compiled", measure)

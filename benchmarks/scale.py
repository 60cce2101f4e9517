"""What a model takes of each process's host memory when it is divided (gloo, FSDP2): while it is
built, whole on every process as until 2026-11-30, and by shapes that each process fills with its
own part; as a frozen reference, whole and divided, with a forward; and with --grow while it is
built and trained, of several sizes on one, two and four processes.

Peaks are the kernel's (VmHWM), beyond what a process had when its libraries were loaded and it had
met the others, and in all; `today` is the older way.
"""

import argparse
import multiprocessing
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common, growth
from doremi_train.model import configs, folders, language_model
from doremi_train.model.language_model import LanguageModel
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import comm, engine, place
from doremi_train.parallel.engine import Engine
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.reports import charts

MEGA = 1e6


class Peaks(NamedTuple):
    """Of one process, in bytes, and the seconds that it took."""

    before: int
    most: int
    seconds: float

    @property
    def beyond(self) -> int:
        return self.most - self.before


def measure(given: argparse.Namespace) -> common.Result:
    if given.grow:
        return grown(given)
    config = llama(int(MEGA * (given.parameters or (2 if given.quick else 200))))
    rounds = [
        {side: peaks(side, config, given.processes) for side in SIDES} for _ in range(given.rounds)
    ]
    ratios = {
        "building_sum_over_today": _ratio(rounds, lambda of: sum(one.beyond for one in of)),
        "building_sum_over_today_with_libraries": _ratio(
            rounds, lambda of: sum(one.most for one in of)
        ),
        "building_fullest_over_todays_fullest": _ratio(
            rounds, lambda of: max(one.beyond for one in of)
        ),
        "building_fullest_over_emptiest": common.ratio(
            [float(max(one.most for one in of["building, now"])) for of in rounds],
            [float(min(one.most for one in of["building, now"])) for of in rounds],
        ),
    }
    ratios["reference_divided_over_whole"] = common.ratio(
        *(
            [float(max(one.beyond for one in of[f"reference, {how}"])) for of in rounds]
            for how in ("divided", "whole")
        )
    )
    parameters = configs.parameters(config)[0]
    common.table(
        f"a llama of {parameters / MEGA:.0f} M parameters, {given.processes} processes: megabytes",
        ("", "process", "before", "most", "beyond", "seconds"),
        [
            (
                side,
                rank,
                *(f"{size / MEGA:.0f}" for size in (one.before, one.most, one.beyond)),
                one.seconds,
            )
            for side in SIDES
            for rank, one in enumerate(rounds[0][side])
        ],
    )
    figures = {
        "parameters": parameters,
        "processes": given.processes,
        "peaks": [{side: [*map(list, of[side])] for side in SIDES} for of in rounds],
    }
    return common.Result(ratios, figures)


def _ratio(rounds: list[dict[str, list[Peaks]]], of: Callable[[list[Peaks]], int]) -> common.Ratio:
    now, today = (
        [float(of(each[f"building, {side}"])) for each in rounds] for side in ("now", "today")
    )
    return common.ratio(now, today)


# ── Growth ──────────────────────────────────────────────────────────────────────────

PROCESSES = (1, 2, 4)


def grown(given: argparse.Namespace) -> common.Result:
    """The fullest process by number of processes and size."""
    counts, sizes = ((2,), (2,)) if given.quick else (PROCESSES, (25, 50, 100, 200))
    found: dict[str, dict[str, list[float]]] = {}
    for size in sizes:
        config = llama(int(MEGA * size))
        label = f"{configs.parameters(config)[0] / MEGA:.0f} M parameters"
        for count in counts:
            for part, side in (("building", "building, now"), ("training", "training")):
                fullest = max(one.beyond for one in peaks(side, config, count)) / MEGA
                found.setdefault(part, {}).setdefault(label, []).append(fullest)
    for part, of in found.items():
        common.table(
            f"the fullest process while {part}: megabytes beyond its libraries",
            ("", *(f"{count} processes" for count in counts)),
            [(label, *(f"{value:.0f}" for value in values)) for label, values in of.items()],
        )
        if given.pictures:
            given.pictures.mkdir(parents=True, exist_ok=True)
            (given.pictures / f"growth-memory-{part}.svg").write_text(picture(part, counts, of))
    return common.Result({}, {"processes": counts, **found})


def picture(part: str, counts: Sequence[int], of: Mapping[str, list[float]]) -> str:
    curves = {label: charts.Curve(counts, [values]) for label, values in of.items()}
    drawn = charts.lines(
        f"Memory of the fullest process while {part}",
        "processes",
        "MB beyond its libraries",
        curves,
        settings=True,
        logarithmic=True,
        powers=True,
    )
    return growth.drawn(drawn)


def llama(parameters: int) -> dict[str, Any]:
    """The config of a llama of about so many parameters."""
    hidden = 0
    while True:
        hidden += 64
        shape = {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 11 * hidden // 4,
            "num_hidden_layers": max(1, round(hidden / 93)),
            "num_attention_heads": hidden // 64,
        }
        options = configs.ModelOptions(config=shape)
        config = configs.resolve(options, vocabulary=32 * hidden, end=0, length=128)
        if configs.parameters(config)[0] >= parameters:
            return config


# ── What is done ────────────────────────────────────────────────────────────────────

LENGTH = 32  # tokens of the one sequence of a step


def today(config: dict[str, Any]) -> LanguageModel:
    """The whole model, tried by itself, on every process."""
    torch.manual_seed(0)
    inner = configs.constructed(config).float()
    if language_model.sees_ahead(inner):
        raise AssertionError("a llama sees what it is to predict")
    language_model.try_training(inner)
    return LanguageModel(inner)


def now(config: dict[str, Any]) -> LanguageModel:
    return folders.shaped(config, 0)


def built(at: place.Place, model: LanguageModel) -> Engine:
    return engine.build(at, model, OptimizerOptions())


def train(at: place.Place, config: dict[str, Any]) -> None:
    """Two steps, of which the first makes the optimiser's state."""
    of = built(at, now(config))
    for _ in range(2):
        with of.accumulating(last=True):
            of.backward(of.model(tokens(config)).sum())
        of.step(1e-4)


def look(at: place.Place, config: dict[str, Any], divided: bool) -> None:
    """Two forwards of a reference."""
    model = engine.frozen(at, now(config), divided)
    with torch.no_grad():
        for _ in range(2):
            model(tokens(config))


def tokens(config: dict[str, Any]) -> torch.Tensor:
    return torch.arange(LENGTH + 1)[None] % config["vocab_size"]


SIDES: dict[str, Callable[[place.Place, dict[str, Any]], object]] = {
    "building, today": lambda at, config: built(at, today(config)),
    "building, now": lambda at, config: built(at, now(config)),
    "reference, whole": lambda at, config: look(at, config, divided=False),
    "reference, divided": lambda at, config: look(at, config, divided=True),
}
GROWING = {"building, now": SIDES["building, now"], "training": train}


# ── Processes ───────────────────────────────────────────────────────────────────────


def peaks(side: str, config: dict[str, Any], processes: int) -> list[Peaks]:
    """Of every process of a fresh start, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    started = [
        context.Process(target=_process, args=(rank, processes, port, side, config, found))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"{side}: exit codes {[process.exitcode for process in started]}")
    return [Peaks(*one) for _, one in sorted(found.get() for _ in started)]


def _process(
    rank: int, processes: int, port: int, side: str, config: dict[str, Any], found: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    at = place.start(EngineOptions(device="cpu", strategy="fsdp2"), "fp32", timeout=600)
    do = (SIDES | GROWING)[side]
    do(at, llama(1))  # all load the same libraries
    comm.barrier()
    before, began = _forget_peak(), time.perf_counter()
    kept = do(at, config)
    seconds = time.perf_counter() - began
    most = _status("VmHWM")
    del kept
    comm.barrier()
    comm.leave()
    found.put((rank, (before, most, seconds)))


def _forget_peak() -> int:
    """Resident bytes, with which the kernel's peak begins anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    said = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert said is not None
    return 1024 * int(said[1])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parameters", type=float, help="millions; default: 200, quick: 2")
    parser.add_argument("--processes", type=int, default=4, help="default: 4")
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--grow", action="store_true", help="measure growth instead")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw growth-memory-NAME.svg there"
    )


if __name__ == "__main__":
    common.main("scale", __doc__, measure, options)

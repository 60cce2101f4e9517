"""How time grows with the number of domains, processes, sequences, entries of the vocabulary and
documents to select from: what each part takes at every size, and the power p of size^p that fits
its last sizes (0: constant, 1: in proportion).

All on one thread. Times are the processor's, so that others on the machine matter less. Processes
are simulated. Memory is the peak of what numpy and Python allocate; of selections, which are
commands of their own, all that the process held. `benchmarks.memory` has that of torch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks import common
from benchmarks.loader import wide_store
from doremi_train.command import child
from doremi_train.config import conf_dir, load
from doremi_train.data.batches import read
from doremi_train.data.sampler import Sampler
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import doremi
from doremi_train.model.projection import Projection
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.parallel.place import start
from doremi_train.parallel.world import World
from doremi_train.reports import charts
from doremi_train.stages import plan
from doremi_train.stages.options import Config
from doremi_train.stages.planning import warnings
from doremi_train.stages.session import Session

BATCH, LENGTH = 64, 128  # sequences of a batch, tokens of a sequence
SEED = 0
STEP = 1_000_000  # far into a run

Parts = Mapping[str, Callable[[], object]]


class Axis(NamedTuple):
    """What grows, the sizes tried, and what is measured at a size."""

    label: str
    sizes: tuple[int, ...]
    parts: Callable[[int, Path], Parts]


def domains(count: int, folder: Path) -> Parts:
    """Parts on a store of `count` domains: one tiny shard each, described and not written."""
    store_folder = wide_store(folder / f"{count}", count, 1, linked=False)
    store = TokenStore.open(store_folder)
    weights = np.full(count, 1 / count)
    sampler = Sampler(np.full(count, 1000), store.domains, BATCH, SEED)
    drawn = [np.zeros(count, np.int64)]
    steps = iter(range(10**9))

    def draw() -> None:
        drawn[0] = sampler.draw(next(steps), weights, drawn[0]).counts

    options = doremi.Options()
    losses, domain = torch.rand(BATCH, LENGTH), torch.arange(BATCH) % count
    stats = doremi.observe(losses, losses / 2, domain, count, options)
    states = [doremi.init(count, 100, options)]

    def update() -> None:
        states[0] = doremi.update(states[0], stats, options)

    session = plain_session(folder / f"{count}")
    return {
        "draw a batch": draw,
        "observe losses": lambda: doremi.observe(losses, losses / 2, domain, count, options),
        "update α": update,
        "seek": lambda: sampler.counts_before(STEP, weights),
        "open the store": lambda: TokenStore.open(store_folder),
        "plan": lambda: warnings.warnings(
            session, plan._domains(session, store, None, small_runs=True), proxies=True
        ),
    }


def processes(count: int, folder: Path) -> Parts:
    """Parts of one of `count` processes; the global batch is 8 · `count` sequences of 8 domains."""
    path = folder / "read"
    store = TokenStore.open(path) if path.exists() else common.token_store(path, 8, 1 << 17, 1000)
    batch, weights, drawn, steps = (
        8 * count,
        np.full(8, 1 / 8),
        [np.zeros(8, np.int64)],
        iter(range(10**9)),
    )
    sampler = Sampler(store.sequences("train", LENGTH), store.domains, batch, SEED)

    def draw() -> None:
        drawn[0] = sampler.draw(next(steps), weights, drawn[0]).counts

    whole = sampler.draw(0, weights, drawn[0])
    rows = World(count // 2, count).rows(batch, None)[0]
    domain, sequence, options = whole.domain[rows], whole.sequence[rows], doremi.Options()
    losses, ids = torch.rand(len(domain), LENGTH), torch.from_numpy(domain)
    stats = doremi.observe(losses, losses / 2, ids, 8, options)
    state = doremi.init(8, 100, options)
    return {
        "draw the global batch": draw,
        "read own sequences": lambda: read(store, "train", domain, sequence, LENGTH),
        "observe own losses": lambda: doremi.observe(losses, losses / 2, ids, 8, options),
        "update α": lambda: doremi.update(state, stats, options),
    }


def sequences(count: int, folder: Path) -> Parts:
    """Parts on 8 domains of `count` sequences each."""
    names, weights = tuple(f"{k}" for k in range(8)), np.full(8, 1 / 8)
    sampler = Sampler(np.full(8, count), names, BATCH, SEED)
    drawn, steps = [np.zeros(8, np.int64)], iter(range(10**9))

    def draw() -> None:
        drawn[0] = sampler.draw(next(steps), weights, drawn[0]).counts

    return {
        "draw a batch": draw,
        "seek": lambda: sampler.counts_before(STEP, weights),
        "make the sampler": lambda: Sampler(np.full(8, count), names, BATCH, SEED),
    }


def vocabulary(count: int, folder: Path) -> Parts:
    """Loss and gradients of 128 tokens of a hidden size of 64."""
    head = nn.Linear(64, count, bias=False)
    projection = Projection(head)
    hidden, targets = torch.randn(LENGTH, 64, requires_grad=True), torch.randint(count, (LENGTH,))

    def fused() -> None:
        projection(hidden, targets, logits=1 << 20).sum().backward()

    return {"loss and gradients": fused}


DOCUMENTS = (10**4, 10**5, 10**6, 10**7)
WORDS = 8  # of a document: so short, as only their number counts here
TOGETHER, FILE = 10**4, 10**5  # documents that come as parts of a long one; documents of a file


def documents(
    sizes: tuple[int, ...], folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and bytes of commands that select a tenth of so many documents, and that choose
    another tenth of them."""
    times: dict[str, list[float]] = {"select": [], "choose again": []}
    memory: dict[str, list[float]] = {"select": [], "choose again": []}
    vocabulary, zipf = np.array([f"w{n}" for n in range(5000)]), 1 / np.arange(1, 5001)
    for size in sizes:
        home = folder / f"{size}"
        for file in range(-(-size // FILE)):
            random, path = (
                np.random.default_rng(file),
                home / "raw" / "d" / f"train-{file:05d}.jsonl",
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as out:
                for _ in range(min(size, FILE) // TOGETHER):
                    words = vocabulary[random.choice(5000, TOGETHER * WORDS, p=zipf / zipf.sum())]
                    out.write(json.dumps({"text": " ".join(words.tolist())}) + "\n")
        (home / "target.jsonl").write_text(
            json.dumps({"text": " ".join(vocabulary[100:200])}) + "\n"
        )
        for seed, part in enumerate(times):
            seconds_, peak_ = command(
                "stage=select", "selection=ngram",
                f"selection.targets={{t: [{home / 'target.jsonl'}]}}",
                f"data.root={home / 'raw'}", f"selection.chunk={WORDS}",
                f"selection.documents={size // 10}",
                "selection.workers=1", f"seed={seed}", f"store={home / 'store'}",
                f"run_dir={home / part}",
            )  # fmt: skip
            times[part].append(seconds_)
            memory[part].append(peak_)
        shutil.rmtree(home)
    return times, memory


def command(*overrides: str) -> tuple[float, float]:
    """Processor seconds and peak bytes of a command."""
    started = subprocess.Popen(
        [sys.executable, "-m", "doremi_train", *overrides], stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(started.pid, 0)
    if status:
        sys.exit(
            f"doremi-train {' '.join(overrides)}: ended with {os.waitstatus_to_exitcode(status)}"
        )
    return used.ru_utime + used.ru_stime, 1024.0 * used.ru_maxrss


def plain_session(folder: Path, *overrides: str) -> Session:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = hydra.compose("config", overrides=[f"run_dir={folder}", *overrides])
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    place = start(EngineOptions(device="cpu"), "fp32", timeout=60)
    return Session(load(Config, plain), plain, place, child)


AXES = {
    "domains": Axis("domains", (8, 32, 128, 512, 2048, 10_000), domains),
    "processes": Axis("processes, 8 sequences each", (1, 4, 16, 64, 256, 1024), processes),
    "sequences": Axis("sequences in a domain", (10**3, 10**5, 10**7, 10**9), sequences),
    "vocabulary": Axis(
        "entries of the vocabulary", (1 << 10, 1 << 12, 1 << 14, 1 << 17), vocabulary
    ),
}


def seconds(part: Callable[[], object], enough: float) -> float:
    """Seconds of one call: the least of several turns, each long enough for the clock, since others
    only ever add to it."""
    calls, took = 1, 0.0
    while True:
        began = time.process_time()
        for _ in range(calls):
            part()
        took = time.process_time() - began
        if took > enough / 4 or calls >= 1 << 12:
            break
        calls *= 2
    turns = [took]
    while sum(turns) < enough:
        began = time.process_time()
        for _ in range(calls):
            part()
        turns.append(time.process_time() - began)
    return min(turns) / calls


def peak(part: Callable[[], object]) -> int:
    """Bytes of numpy's and Python's allocations while it runs."""
    tracemalloc.start()
    part()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak_bytes


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """p of size^p through the last three sizes, by least squares."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(np.maximum(values[-3:], 1e-12)), 1)[0])


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, axis in AXES.items():
            if given.only not in (None, name):
                continue
            sizes = axis.sizes[:: 2 if given.quick else 1]
            times: dict[str, list[float]] = {}
            memory: dict[str, list[float]] = {}
            for size in sizes:
                for part, function in axis.parts(size, Path(folder)).items():
                    times.setdefault(part, []).append(
                        seconds(function, 0.02 if given.quick else 0.2)
                    )
                    memory.setdefault(part, []).append(peak(function))
            figures[name] = shown(axis.label, name, sizes, times, memory, given.pictures)
        if given.only in (None, "documents"):
            sizes = DOCUMENTS[: 2 if given.quick else None]
            figures["documents"] = shown(
                "documents", "documents", sizes, *documents(sizes, Path(folder)), given.pictures
            )
    return common.Result({}, figures)


def shown(
    label: str,
    name: str,
    sizes: tuple[int, ...],
    times: Mapping[str, list[float]],
    memory: Mapping[str, list[float]],
    pictures: Path | None,
) -> dict[str, Any]:
    """The figures of an axis, as a table and a picture too."""
    figures = {
        part: {
            "sizes": sizes,
            "seconds": times[part],
            "exponent": exponent(sizes, times[part]),
            "peak_bytes": memory[part],
            "exponent_of_memory": exponent(sizes, memory[part]),
        }
        for part in times
    }
    common.table(
        f"{label}: µs at every size and the power of size; KB at the largest, and their power",
        ("part", *(f"{size:,}" for size in sizes), "power", "KB", "power"),
        [
            (
                part,
                *(f"{1e6 * value:,.0f}" for value in times[part]),
                f"{values['exponent']:.2f}",
                f"{memory[part][-1] / 1e3:,.0f}",
                f"{values['exponent_of_memory']:.2f}",
            )
            for part, values in figures.items()
        ],
    )
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / f"growth-{name}.svg").write_text(picture(label, figures))
    return figures


def picture(label: str, figures: Mapping[str, Any]) -> str:
    """Time over size on logarithmic scales, as a file of its own."""
    curves = {
        part: charts.Curve(values["sizes"], [[1e6 * value for value in values["seconds"]]])
        for part, values in figures.items()
    }
    return drawn(
        charts.lines(
            f"Time with {label}", label, "µs", curves, settings=True, logarithmic=True, powers=True
        )
    )


def drawn(chart: str) -> str:
    """A chart as a file of its own: with the colours that elsewhere a page gives."""
    style = (
        "<style>:root{--ink:#1f2328;--soft:#59636e;--line:#d1d9e0}"
        "@media(prefers-color-scheme:dark){:root{--ink:#f0f6fc;--soft:#9198a1;--line:#3d444d}}"
        "</style>"
    )
    head, _, rest = chart.partition(">")
    return f"{head}>{style}{rest}"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw growth-NAME.svg there"
    )
    parser.add_argument("--only", choices=[*AXES, "documents"], help="one of them alone")


if __name__ == "__main__":
    common.main("growth", __doc__, measure, options)

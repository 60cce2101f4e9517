"""What every benchmark shares: sides measured in turn, ratios with an interval, a table, a JSON
file.

The sides of a comparison alternate in one process, and a ratio is the median over rounds of what
was measured within one round: load from elsewhere, which comes and goes, then strikes all sides
alike.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models

from doremi_train.data.tokens import shards, tokenizer, writing

Times = dict[str, list[float]]  # seconds of every side, one a round


class Ratio(NamedTuple):
    """The median of paired ratios, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Result(NamedTuple):
    """What a benchmark found. `figures` are whatever else is worth keeping, as plain JSON."""

    ratios: dict[str, Ratio]
    figures: dict[str, Any]


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds that each side takes in each round. Every round begins with another side.

    A side that returns a float has measured its own seconds.
    """
    names = list(sides)
    times: Times = {name: [] for name in names}
    for round_ in range(-warm_up, rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            own = sides[name]()
            seconds = own if isinstance(own, float) else clock() - began
            if round_ >= 0:
                times[name].append(seconds)
    return times


def ratio(above: list[float], below: list[float]) -> Ratio:
    """Ratio of two sides of the same rounds. The interval is the order statistics around the
    median, whatever the distribution; with fewer than six rounds it is the range, and covers less
    than 95 %."""
    paired = sorted(a / b for a, b in zip(above, below, strict=True))
    n, tail, left_out = len(paired), 0.5 ** len(paired), 0
    while tail + math.comb(n, left_out + 1) * 0.5**n <= 0.025:
        left_out += 1
        tail += math.comb(n, left_out) * 0.5**n
    return Ratio(statistics.median(paired), paired[left_out], paired[-1 - left_out])


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def token_store(
    folder: Path,
    domains: int,
    tokens: int,
    vocabulary: int,
    member_tokens: int = 1 << 20,
    members_per_shard: int = 64,
    graded: bool = False,
) -> shards.TokenStore:
    """A finished store of random tokens: as many in each domain for training, a hundredth for
    validation. `graded`: domain k has the first 1 / (k + 1) of the vocabulary alone, so that there
    is something to learn, and not the same in all."""
    words = Tokenizer(models.WordLevel({str(n): n for n in range(vocabulary)}, unk_token="0"))
    writer = writing.ShardWriter(
        folder, shards.token_dtype(vocabulary), member_tokens, members_per_shard
    )
    random = np.random.default_rng(0)
    for domain in range(domains):
        for split, size in (("train", tokens), ("validation", max(tokens // 100, 10_000))):
            for start in range(0, size, 1 << 16):
                highest = vocabulary // (domain + 1) if graded else vocabulary
                piece = random.integers(1, highest, min(1 << 16, size - start))
                writer.append((split, f"domain-{domain:05d}"), piece, True, None)
    writer.finish()
    (folder / "tokenizer.json").write_text(tokenizer.serialise(words))
    writing.write_manifest(writer.written(), words, 0, 0, 0, {})
    return shards.TokenStore.open(folder)


def hardware() -> str:
    """The processor, its cores, and the accelerator if torch sees one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = f"{cores} cores of {named[0] if named else platform.machine()}"
    import torch

    return (
        f"{processor}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else processor
    )


def commit() -> str:
    """Commit of this checkout, with a + where files differ from it; empty outside of one, and
    where there is no git."""
    with contextlib.suppress(FileNotFoundError):
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        return told.stdout.strip()
    return ""


def table(title: str, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Print it. Numbers are shown with three digits."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for n, column in enumerate(columns):
        shown.add_column(column, justify="right" if n else "left", no_wrap=True)
    for row in rows:
        shown.add_row(
            *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row)
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(shown)


def main(
    name: str,
    about: str,
    measure: Callable[[argparse.Namespace], Result],
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """The command line of a benchmark: `--quick`, `--json FILE`, and its own `options`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help="at a reduced size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options(parser)
    given = parser.parse_args()
    began = time.perf_counter()
    result = measure(given)
    if result.ratios:
        table(
            name,
            ("ratio", "median", "95 % interval"),
            [(k, r.median, f"{r.low:.3g} … {r.high:.3g}") for k, r in result.ratios.items()],
        )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": name,
            "hardware": hardware(),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "torch": importlib.metadata.version("torch"),
            "quick": given.quick,
            "seconds": time.perf_counter() - began,
            "ratios": {key: r.median for key, r in result.ratios.items()},
            "intervals": {key: [r.low, r.high] for key, r in result.ratios.items()},
            "figures": result.figures,
        }
        given.json.write_text(json.dumps(content, indent=1) + "\n")

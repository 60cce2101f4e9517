"""How fast batches come: tokens with domain ids, in process and read ahead by a thread, over a bare
gather from memory maps and over other libraries' loaders on the same tokens; and what seeking,
opening and waiting take.

The other libraries live in an environment of their own, whose interpreter `--peers` names.
All sides deliver int64 tokens (B, T + 1) and domain ids (B,), drawn evenly from 8 domains.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common
from doremi_train.data.batches import Batch, Batches, read
from doremi_train.data.sampler import Sampler
from doremi_train.data.tokens.shards import INDEX, OPEN_MAPS, SPLITS, TokenStore
from doremi_train.files import write_json

DOMAINS, BATCH, LENGTH, VOCABULARY = 8, 64, 1024, 50_000
FAR = 1_000_000_000  # a step to seek to
RATE = 1_000_000  # tokens a second that a fast consumer takes


# ── The sides ───────────────────────────────────────────────────────────────────────


def in_process(store: TokenStore) -> Iterator[object]:
    """The draw of a step and its tokens, on this thread."""
    sampler, weights = (
        Sampler(store.sequences("train", LENGTH), store.domains, BATCH, 0),
        even(store),
    )
    counts = np.zeros(len(weights), np.int64)
    for step in range(FAR):
        draw = sampler.draw(step, weights, counts)
        counts = draw.counts
        yield read(store, "train", draw.domain, draw.sequence, LENGTH)


def read_ahead(store: TokenStore, length: int = LENGTH) -> Generator[Batch, None, None]:
    """Batches as the trainer gets them: a thread reads one ahead."""
    weights, counts = torch.from_numpy(even(store)), np.zeros(len(store.domains), np.int64)
    with Batches(store, length, BATCH, [slice(0, BATCH)], 0) as batches:
        for step in range(FAR):
            batch = batches.get(step, weights, counts)
            counts = batch.draw.counts
            yield batch


def memmap_gather(store: TokenStore) -> Iterator[object]:
    """Windows of one array a domain at random places: no index, no epochs, no bounds, nothing to
    resume."""
    length = int(store.sequences("train", LENGTH).min())
    maps = [
        np.memmap(path, np.uint16, "r").view(np.ndarray)
        for path in sorted(store.path.glob("train/*/00000.tar"))
    ]
    random = np.random.default_rng(0)
    while True:
        domain = random.integers(len(maps), size=BATCH)
        start = random.integers(length - 1, size=BATCH) * LENGTH
        tokens = np.empty((BATCH, LENGTH + 1), np.int64)
        for row, (k, at) in enumerate(zip(domain.tolist(), start.tolist(), strict=True)):
            tokens[row] = maps[k][at : at + LENGTH + 1]
        yield torch.from_numpy(tokens), torch.from_numpy(domain)


def even(store: TokenStore) -> NDArray[np.float64]:
    return np.full(len(store.domains), 1 / len(store.domains))


def turn(batches: Iterator[object], count: int) -> Callable[[], None]:
    def take() -> None:
        for _ in range(count):
            next(batches)

    return take


class Peers:
    """The other libraries' loaders, served by a process of their own environment."""

    def __init__(self, interpreter: str, store: TokenStore, folder: Path) -> None:
        for k, domain in enumerate(store.domains):
            sequences = np.arange(store.sequences("train", LENGTH)[k])
            tokens = store.gather("train", np.full_like(sequences, k), sequences, LENGTH).astype(
                np.uint16
            )
            (folder / domain).mkdir(parents=True)
            np.save(folder / domain / "tokens.npy", tokens)
        script = Path(__file__).parent / "peers" / "loaders.py"
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [interpreter, str(script), str(folder), str(BATCH)],
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        first = json.loads(self._answer())
        self.names: list[str] = first["peers"]
        self.missing: dict[str, str] = first["missing"]

    def turn(self, name: str, workers: int, count: int) -> Callable[[], float]:
        def take() -> float:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{name} {workers} {count}\n")
            self._process.stdin.flush()
            return float(self._answer())

        return take

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(
                "--peers: the process ended; its last "
                f"words:\n{Path(self._log.name).read_text()[-2000:]}"
            )
        return line


# ── What is not a ratio ─────────────────────────────────────────────────────────────


def seek(store: TokenStore) -> float:
    """Seconds from nothing but the store's sizes to the sequences of a step far away."""
    sizes = store.sequences("train", LENGTH)
    weights = np.random.default_rng(0).dirichlet(np.ones(len(sizes)))
    began = time.perf_counter()
    sampler = Sampler(sizes, store.domains, BATCH, 0)
    sampler.draw(FAR, weights, sampler.counts_before(FAR, weights))
    return time.perf_counter() - began


def wide_store(folder: Path, domains: int, shards: int, linked: bool = True) -> Path:
    """A finished store of that many domains with that many tiny shards each: one real domain's,
    linked again and again, or only described."""
    store = common.token_store(
        folder / "one", 1, shards << 16, 1000, member_tokens=1 << 16, members_per_shard=1
    )
    path = folder / "wide"
    manifest = json.loads((store.path / "manifest.json").read_text())
    described = manifest["domains"][store.domains[0]]
    names = [f"domain-{k:05d}" for k in range(domains)]
    manifest["domains"] = {
        name: {split: {**described[split], "folder": f"{split}/{name}"} for split in SPLITS}
        for name in names
    }
    index, parts = np.load(store.path / "index.npy"), []
    for stream, split in enumerate(SPLITS):
        rows = index[index["stream"] == stream]
        part = np.tile(rows, domains).astype(INDEX)
        part["stream"] = np.repeat(np.arange(domains) + stream * domains, len(rows))
        parts.append(part)
        for name in names if linked else []:
            (path / split / name).mkdir(parents=True)
            for shard in (store.path / described[split]["folder"]).iterdir():
                (path / split / name / shard.name).symlink_to(shard)
    path.mkdir(exist_ok=True)
    with (path / "index.npy").open("wb") as file:
        np.save(file, np.concatenate(parts))
    manifest["index_sha256"] = hashlib.sha256((path / "index.npy").read_bytes()).hexdigest()
    write_json(path / "manifest.json", manifest)
    (path / "tokenizer.json").write_text((store.path / "tokenizer.json").read_text())
    return path


def opening(path: Path) -> dict[str, float]:
    """Seconds to open a store and take a batch, and more batches from all over it."""
    began = time.perf_counter()
    store = TokenStore.open(path)
    batches = read_ahead(store, 8)
    next(batches)
    first = time.perf_counter() - began
    for _ in range(40):
        next(batches)
    maps = sum(line.endswith(".tar") for line in Path("/proc/self/maps").read_text().splitlines())
    return {
        "domains": len(store.domains),
        "shards": sum(
            store.manifest["domains"][domain]["train"]["shards"] for domain in store.domains
        ),
        "seconds_to_first_batch": first,
        "seconds_a_batch_after": (time.perf_counter() - began - first) / 40,
        "open_maps": maps,
        "most_open_maps": OPEN_MAPS,
    }


def anonymous_memory(path: Path) -> float:
    """MB of this process when it has read as many tokens as the store has. Pages of files are the
    system's."""
    store = TokenStore.open(path)
    take = turn(read_ahead(store), int(store.sizes("train").sum()) // (BATCH * LENGTH))
    take()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


def proportions(store: TokenStore, steps: int) -> dict[str, float]:
    """The largest distance, in sequences, between what was drawn of any domain and its share, over
    all steps."""
    weights = np.random.default_rng(1).dirichlet(np.ones(len(store.domains)))
    sampler = Sampler(store.sequences("train", LENGTH), store.domains, BATCH, 0)
    counts, drawn, worst = np.zeros(len(weights), np.int64), np.zeros(len(weights), np.int64), 0.0
    for step in range(steps):
        draw = sampler.draw(step, weights, counts)
        counts = draw.counts
        drawn += np.bincount(draw.domain, minlength=len(weights))
        worst = max(worst, float(np.abs(drawn - (step + 1) * BATCH * weights).max()))
    return {"steps": steps, "largest_error_in_sequences": worst}


def waiting(store: TokenStore, steps: int) -> dict[str, float]:
    """A consumer that computes (torch, on this thread) for as long as a step of `RATE` tokens a
    second takes."""
    batches, matrix, waits = read_ahead(store), torch.randn(256, 256), []
    next(batches)
    for _ in range(steps):
        until = time.perf_counter() + BATCH * LENGTH / RATE
        while time.perf_counter() < until:
            matrix = torch.tanh(matrix @ matrix)
        began = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - began)
    step = BATCH * LENGTH / RATE
    return {
        "steps": steps,
        "step_ms": 1e3 * step,
        "median_ms": 1e3 * statistics.median(waits),
        "largest_ms": 1e3 * max(waits),
    }


# ── Measuring ───────────────────────────────────────────────────────────────────────


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(1)
    rounds, each = (5, 20) if given.quick else (11, 20)  # so many batches are less than an epoch
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        store = common.token_store(folder / "store", DOMAINS, 1 << 21, VOCABULARY)
        ahead = stack.enter_context(contextlib.closing(read_ahead(store)))
        sides: dict[str, Callable[[], object]] = {
            "in_process": turn(in_process(store), each),
            "one_worker": turn(ahead, each),
            "memmap_gather": turn(memmap_gather(store), each),
        }
        peers: list[str] = []
        if given.peers:
            others = stack.enter_context(
                contextlib.closing(Peers(given.peers, store, folder / "peers"))
            )
            peers = others.names
            for name, why in others.missing.items():
                print(f"{name}: not measured ({why})")
            for name in peers:
                sides |= {
                    name: others.turn(name, 0, each),
                    f"{name} worker": others.turn(name, 1, each),
                }
        else:
            print(
                "the other libraries are not measured: --peers names the interpreter of an "
                "environment that has them"
            )
        times = common.alternate(sides, rounds, warm_up=1)
        sizes = 1 << 22, 1 << 25
        sized = [
            (n, common.token_store(folder / f"{n}", DOMAINS, n // DOMAINS, VOCABULARY).path)
            for n in sizes
        ]
        figures: dict[str, Any] = {
            "million_tokens_per_second": {
                side: each * BATCH * LENGTH / statistics.median(seconds) / 1e6
                for side, seconds in times.items()
            },
            "seek": {"ms": 1e3 * min(seek(store) for _ in range(5))},
            "start_up": common.fresh(opening, wide_store(folder, 1000, 10 if given.quick else 100)),
            "memory_mb": {
                f"{size >> 20}M tokens": common.fresh(anonymous_memory, path)
                for size, path in sized
            },
            "proportions": proportions(store, 1000 if given.quick else 20_000),
            "waiting": waiting(store, 30 if given.quick else 300),
        }
    common.table(
        f"{BATCH} sequences of {LENGTH} tokens a batch, {DOMAINS} domains",
        ("side", "M tokens/s"),
        list(figures["million_tokens_per_second"].items()),
    )
    common.table(
        "beside it",
        ("what", "found"),
        [
            (f"{what} {key}", value)
            for what in list(figures)[1:]
            for key, value in figures[what].items()
        ],
    )
    ratios = {"of_memmap_gather": common.ratio(times["memmap_gather"], times["in_process"])}
    for name in peers:
        ratios[f"over_{name}"] = common.ratio(times[name], times["in_process"])
        ratios[f"over_{name}_one_worker"] = common.ratio(
            times[f"{name} worker"], times["one_worker"]
        )
    return common.Result(ratios, figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers", metavar="PYTHON", help="interpreter of the environment with the other libraries"
    )


if __name__ == "__main__":
    common.main("loader", __doc__, measure, options)

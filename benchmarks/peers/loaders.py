"""Other libraries' loaders on the tokens that `benchmarks.loader` laid out, each as its
documentation says it is fast.

Run by the interpreter of an environment that has them (`.ci/run` makes one), in a folder with a
tokens.npy (sequences, T + 1) for every domain. Says in one line which it has, then answers each
line `NAME WORKERS BATCHES` with the seconds that so many batches took: int64 tokens (B, T + 1) and
domain ids (B,), as a model takes them, drawn evenly from the domains.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

Batch = tuple[torch.Tensor, torch.Tensor]
FOLDER, BATCH = Path(sys.argv[1]), int(sys.argv[2])
DOMAINS = sorted(path.name for path in FOLDER.iterdir() if (path / "tokens.npy").exists())
EVEN = [1 / len(DOMAINS)] * len(DOMAINS)


def tokens(domain: str) -> np.ndarray:
    return np.load(FOLDER / domain / "tokens.npy", mmap_mode="r")


def collate(rows: list[tuple[np.ndarray, int]]) -> Batch:
    return torch.from_numpy(np.stack([row for row, _ in rows]).astype(np.int64)), torch.tensor(
        [d for _, d in rows]
    )


def webdataset(workers: int) -> Iterable[Batch]:
    import webdataset as wds

    def decoded(sample: dict[str, bytes]) -> tuple[np.ndarray, int]:
        return np.frombuffer(sample["tokens"], np.uint16), int(sample["domain"])

    parts = []
    for n, domain in enumerate(DOMAINS):
        path = FOLDER / domain / "webdataset.tar"
        if not path.exists():
            with wds.TarWriter(str(path)) as writer:
                for i, row in enumerate(tokens(domain)):
                    writer.write(
                        {"__key__": f"{i:08d}", "tokens": row.tobytes(), "domain": str(n).encode()}
                    )
        parts.append(wds.WebDataset([str(path)], shardshuffle=False, resampled=True).map(decoded))

    class Mixed(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(wds.RandomMix(parts, EVEN))

    return DataLoader(
        Mixed(), BATCH, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )


def mosaicml_streaming(workers: int) -> Iterable[Batch]:
    from streaming import MDSWriter, Stream, StreamingDataset

    streams = []
    for n, domain in enumerate(DOMAINS):
        out = FOLDER / domain / "mosaicml"
        if not out.exists():
            with MDSWriter(
                out=str(out), columns={"tokens": "ndarray:uint16", "domain": "int"}
            ) as writer:
                for row in tokens(domain):
                    writer.write({"tokens": np.array(row), "domain": n})
        streams.append(Stream(local=str(out), proportion=EVEN[n]))
    dataset = StreamingDataset(streams=streams, batch_size=BATCH, shuffle=True)
    return DataLoader(
        dataset,
        BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=lambda rows: collate([(row["tokens"], row["domain"]) for row in rows]),
    )


def litdata(workers: int) -> Iterable[Batch]:
    from litdata import (
        CombinedStreamingDataset,
        StreamingDataLoader,
        StreamingDataset,
        TokensLoader,
        optimize,
    )

    class Domain(StreamingDataset):
        number = 0

        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index), self.number

    def together(rows: list[tuple[torch.Tensor, int]]) -> Batch:
        return torch.stack([row for row, _ in rows]).long(), torch.tensor([d for _, d in rows])

    parts = []
    for n, domain in enumerate(DOMAINS):
        out, length = FOLDER / domain / "litdata", tokens(domain).shape[1]
        if not out.exists():
            optimize(
                fn=_whole,
                inputs=[str(FOLDER / domain / "tokens.npy")],
                output_dir=str(out),
                chunk_size=1000 * length,
                item_loader=TokensLoader(),
                num_workers=1,
                start_method="fork",
            )
        part = Domain(str(out), item_loader=TokensLoader(block_size=length), shuffle=True)
        part.number = n
        parts.append(part)
    mixed = CombinedStreamingDataset(parts, weights=EVEN, iterate_over_all=False)
    return StreamingDataLoader(
        mixed,
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=together,
        persistent_workers=workers > 0,
    )


def _whole(path: str) -> Iterator[torch.Tensor]:
    for row in np.load(path):
        yield torch.from_numpy(row)


def datasets(workers: int) -> Iterable[Batch]:
    from datasets import Dataset, Features, List, Value, interleave_datasets

    parts = []
    for n, domain in enumerate(DOMAINS):
        values = tokens(domain)
        features = Features(
            {"tokens": List(Value("uint16"), length=values.shape[1]), "domain": Value("int64")}
        )
        out = FOLDER / domain / "datasets"
        if not out.exists():
            rows = {"tokens": list(values), "domain": [n] * len(values)}
            Dataset.from_dict(rows, features=features).save_to_disk(str(out))
        parts.append(Dataset.load_from_disk(str(out)).shuffle(seed=0))
    mixed = interleave_datasets(parts, probabilities=EVEN, seed=0).with_format("numpy")

    class Batches:
        """Whole batches by index: the fastest way to read a map-style dataset."""

        def __getitem__(self, rows: list[int]) -> Batch:
            batch = mixed[rows]
            return torch.from_numpy(np.asarray(batch["tokens"]).astype(np.int64)), torch.from_numpy(
                batch["domain"]
            )

    order = [list(range(i, i + BATCH)) for i in range(0, len(mixed) - BATCH + 1, BATCH)]
    return DataLoader(
        Batches(),  # type: ignore[arg-type]
        batch_size=None,
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


PEERS: dict[str, Callable[[int], Iterable[Batch]]] = {
    "webdataset": webdataset,
    "mosaicml_streaming": mosaicml_streaming,
    "litdata": litdata,
    "datasets": datasets,
}


def endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from loader


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer
    running: dict[tuple[str, int], Iterator[Batch]] = {}
    missing: dict[str, str] = {}
    for name, peer in PEERS.items():
        try:
            for workers in (0, 1):
                running[name, workers] = endless(peer(workers))
                batch, domain = next(running[name, workers])
                assert (
                    batch.shape == (BATCH, tokens(DOMAINS[0]).shape[1])
                    and batch.dtype == torch.int64
                )
                assert domain.shape == (BATCH,) and len(set(domain.tolist())) > 1
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
            with contextlib.suppress(KeyError):
                del running[name, 0]
    answers.write(
        json.dumps({"peers": [name for name in PEERS if name not in missing], "missing": missing})
        + "\n"
    )
    for line in sys.stdin:
        asked, processes, count = line.split()
        loader = running[asked, int(processes)]
        began = time.perf_counter()
        for _ in range(int(count)):
            next(loader)
        answers.write(f"{time.perf_counter() - began}\n")


if __name__ == "__main__":
    main()

"""Fine clusters become domains: sums over all documents, and the sidecar.

G given domains, F fine clusters, K domains.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from doremi_train.files import replacing
from doremi_train.methods import clusters
from doremi_train.selection.regroup.task import Task

SIDECAR = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("domain", pa.string()),  # that was made
        ("given", pa.string()),
        ("cluster", pa.int32()),
        ("quality", pa.float32()),
        ("tokens", pa.int64()),
        ("selected", pa.bool_()),
    ]
)


def tables(work: list[Task], *columns: str) -> Iterator[tuple[Task, pa.Table]]:
    """(task, some columns of a row group) in the order of sources and rows."""
    for task in work:
        with pq.ParquetFile(task.parts, read_dictionary=["given"]) as parquet:
            for group in range(parquet.num_row_groups):
                yield task, parquet.read_row_group(group, list(columns))


def bad_lines(work: list[Task]) -> int:
    """How many lines were skipped in all."""
    return sum(int(pq.read_metadata(task.parts).metadata[b"bad_lines"]) for task in work)


def sums(work: list[Task], fine: int) -> dict[str, NDArray[np.int64]]:
    """Documents and words (F + 1, 2) of each fine cluster in every given domain, and last of
    documents without one."""
    found: dict[str, NDArray[np.int64]] = {}
    for _, table in tables(work, "given", "cluster", "tokens"):
        cluster, tokens = table["cluster"].to_numpy(), table["tokens"].to_numpy()
        for given, rows in by_given(table).items():
            counts = found.setdefault(given, np.zeros((fine + 1, 2), np.int64))
            np.add.at(counts[:, 0], cluster[rows], 1)
            np.add.at(counts[:, 1], cluster[rows], tokens[rows])
    return dict(sorted(found.items()))


def by_given(table: pa.Table) -> dict[str, NDArray[np.int64]]:
    """Row numbers of each given domain of a table."""
    encoded = table["given"].unify_dictionaries().combine_chunks()
    codes = encoded.indices.to_numpy()
    return {
        name: np.flatnonzero(codes == code)
        for code, name in enumerate(encoded.dictionary.to_pylist())
    }


@dataclass(frozen=True)
class Domains:
    """What was found: what a later run needs beside the model to give documents to it."""

    names: list[str]  # (K,)
    of: list[int]  # (F,) domain of each fine cluster
    rest: dict[str, int]  # of each group, its domain for documents of which no word is known
    levels: int = 1
    cuts: list[list[float]] = field(default_factory=list)  # (K, levels − 1)
    encoder: str | None = None  # by which vectors are made; None: by words

    @property
    def all_names(self) -> list[str]:
        """(K · levels,) a domain's levels stand together, the lowest first."""
        if self.levels == 1:
            return self.names
        return [f"{name}-level{n}" for name in self.names for n in range(1, self.levels + 1)]

    def label(
        self, cluster: NDArray[np.int32], quality: NDArray[np.float32], rest: int
    ) -> NDArray[np.int64]:
        """(N,) numbers in `all_names`."""
        domain = np.append(np.array(self.of, np.int64), rest)[cluster]  # −1 is the last
        if self.levels == 1:
            return domain
        cuts = np.array(self.cuts, np.float32)
        return domain * self.levels + (quality[:, None] >= cuts[domain]).sum(1)


def level_cuts(work: list[Task], domains: Domains, levels: int) -> list[list[float]]:
    """(K, levels − 1) likeness to good text with which each domain's levels begin."""
    met: list[list[tuple[NDArray, NDArray]]] = [[] for _ in domains.names]
    for task, table in tables(work, "given", "cluster", "tokens", "quality"):
        cluster, tokens = table["cluster"].to_numpy(), table["tokens"].to_numpy()
        quality = table["quality"].to_numpy()
        for given, rows in by_given(table).items():
            domain = domains.label(cluster[rows], quality[rows], domains.rest[task.group(given)])
            for k in np.unique(domain):
                own = rows[domain == k]
                met[k].append((quality[own], tokens[own].astype(np.int32)))
    found = []
    for parts in met:
        scores, sizes = (np.concatenate(side) for side in zip(*parts, strict=True))
        found.append([float(cut) for cut in clusters.cuts(scores, sizes, levels)])
    return found


def write_sidecar(
    path: Path, work: list[Task], shards: list[str], domains: Domains, metadata: dict[str, str]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Write the domain of every document. What is returned is of every given domain (K · levels,
    2), documents and words of each that was made; and the words of these in every fine cluster, and
    in none (K · levels, F + 1)."""
    names, found = domains.all_names, dict[str, NDArray[np.int64]]()
    words = np.zeros((len(names), len(domains.of) + 1), np.int64)
    schema = SIDECAR.with_metadata(metadata)
    with replacing(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        columns = ("row", "end", "given", "cluster", "quality", "tokens")
        for task, table in tables(work, *columns):
            cluster, tokens = table["cluster"].to_numpy(), table["tokens"].to_numpy()
            quality = table["quality"].to_numpy()
            label = np.zeros(len(table), np.int64)
            for given, rows in by_given(table).items():
                rest = domains.rest[task.group(given)]
                label[rows] = domains.label(cluster[rows], quality[rows], rest)
                counts = found.setdefault(given, np.zeros((len(names), 2), np.int64))
                np.add.at(counts[:, 0], label[rows], 1)
                np.add.at(counts[:, 1], label[rows], tokens[rows])
            np.add.at(words, (label, cluster), tokens)
            n = len(table)
            writer.write_table(
                pa.Table.from_arrays(
                    [
                        pa.repeat(pa.scalar(shards[task.number]), n),
                        table["row"],
                        pa.array(np.zeros(n, np.int64)),
                        table["end"],
                        pa.DictionaryArray.from_arrays(label, names).cast(pa.string()),
                        table["given"].cast(pa.string()),
                        table["cluster"],
                        table["quality"],
                        table["tokens"],
                        pa.array(np.ones(n, bool)),
                    ],
                    schema=schema,
                )
            )
        present = sum(found.values(), np.zeros((len(names), 2), np.int64))[:, 0] > 0
        listed = sorted(name for name, there in zip(names, present, strict=True) if there)
        writer.add_key_value_metadata({"domains": json.dumps(listed)})
    return dict(sorted(found.items())), words

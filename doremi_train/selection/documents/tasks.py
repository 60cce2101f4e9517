"""Work on one source, to be done anywhere and any number of times: what it writes is a function of
its input alone.

A task whose output exists is done. Outputs appear whole or not at all, so a worker may be killed at
any time.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.options import DataOptions
from doremi_train.files import replacing, write_bytes
from doremi_train.methods import ngram
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.parts import Batch, batches
from doremi_train.selection.documents.registry import METHODS
from doremi_train.selection.documents.scorers import (
    BUCKETS,
    Arrays,
    Scorer,
    Targets,
    token_ids,
    whole,
)
from doremi_train.selection.options import SelectionOptions

ROWS = 2**16  # of a row group
ELIGIBLE, SHORT, COPY, BENCHMARK = range(4)


@dataclass(frozen=True)
class Task:
    folder: Path  # of the scores
    number: int  # of the source
    source: Source
    data: DataOptions
    options: SelectionOptions

    @property
    def counts(self) -> Path:
        return self.folder / "counts" / f"{self.number:05d}.npz"

    @property
    def scores(self) -> Path:
        return self.folder / "scores" / f"{self.number:05d}.parquet"

    @property
    def scorer(self) -> Scorer:
        return METHODS[self.options.method](self.options)

    def batches(self, bad: BadLines) -> Iterator[Batch]:
        return batches(
            self.source, self.data, bad, None if self.options.exact else self.options.chunk
        )


def count(task: Task) -> None:
    """What the method has to know of the corpus, of this source: sums, and the words' n-grams for
    the diagnostics."""
    if task.counts.exists():
        return
    scorer, bad = task.scorer, BadLines(task.data)
    sums, counted = scorer.sums(), np.zeros(BUCKETS, np.int64)
    told = scorer.words(sums) is not None
    for batch in task.batches(bad):
        scorer.observe(batch, sums)
        if not told:
            kernels.count(batch.tokens.hashes, batch.bounds, counted)
    words = scorer.words(sums)
    write_arrays(
        task.counts,
        {**sums, "words": counted if words is None else words, "bad_lines": np.array(bad.count)},
    )


def score(task: Task) -> None:
    """The scores of all parts of this source."""
    if task.scores.exists():
        return
    scorer, model = task.scorer, load_model(task.folder)
    names = [str(name) for name in model["names"]]
    bad = BadLines(task.data)
    with (
        replacing(task.scores) as aside,
        pq.ParquetWriter(aside, schema(names), compression="zstd") as writer,
    ):
        waiting: list[pa.RecordBatch] = []
        for batch in task.batches(bad):
            waiting.append(_scored(batch, scorer, model, names, task))
            if sum(map(len, waiting)) >= ROWS:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting = []
        writer.write_table(pa.Table.from_batches(waiting, schema(names)))


def schema(names: list[str]) -> pa.Schema:
    """The columns of a file of scores: a row for every part."""
    return pa.schema(
        [
            ("row", pa.int64()),  # of the document in its source
            ("start", pa.int64()),  # of the part in the document: bytes of its UTF-8, or tokens
            ("end", pa.int64()),
            ("domain", pa.string()),
            ("id", pa.uint64()),
            ("tokens", pa.int64()),
            ("refused", pa.int8()),
            *((name, pa.float64()) for name in names),
        ]
    )


def _scored(
    batch: Batch, scorer: Scorer, model: Arrays, names: list[str], task: Task
) -> pa.RecordBatch:
    scores, tokens = scorer.score(batch, model), scorer.tokens(batch)
    ids = np.empty(len(batch.start), np.uint64)
    kernels.identify(batch.tokens.hashes, batch.bounds, ids)
    # (B,) of each document.
    origin = batch.start[np.searchsorted(batch.document, np.arange(len(batch.documents)))]
    origin = (origin - np.array([document.base for document in batch.documents]))[batch.document]
    row = np.array([document.row for document in batch.documents])[batch.document]
    domain = pa.DictionaryArray.from_arrays(
        batch.document, [document.domain for document in batch.documents]
    )
    columns = [row, batch.start - origin, batch.end - origin, domain.cast(pa.string()), ids, tokens]
    columns.append(_refused(batch, tokens, task))
    return pa.RecordBatch.from_arrays(
        [pa.array(c) for c in (*columns, *scores.T)], schema=schema(names)
    )


def _refused(batch: Batch, tokens: NDArray[np.int64], task: Task) -> NDArray[np.int8]:
    """(P,) ELIGIBLE, or why a part is not."""
    options = task.options
    kind = "words" if batch.text is not None else "ids"
    targets, benchmarks = (
        kernels.overlap(batch.tokens.hashes, batch.bounds, known(task.folder, f"{what}_{kind}"))
        for what in ("targets", "benchmarks")
    )
    runs = np.maximum(np.diff(batch.bounds) - kernels.SHINGLE + 1, 1)
    least = max(options.min_tokens, 100 if options.exact else 1)
    refused = np.where(tokens < least, SHORT, ELIGIBLE)
    if options.overlap is not None:
        refused[targets >= options.overlap * runs] = COPY
    refused[benchmarks > 0] = BENCHMARK
    return refused.astype(np.int8)


# ── What the driver hands to its workers ──────────────────────────────────────────


def _runs(documents: list[bytes], tokenizer: str | None) -> Arrays:
    """All runs of tokens of documents, by words and by ids."""
    text = whole(documents)
    runs = {"words": kernels.known(text.tokens.hashes, text.bounds).runs}
    if tokenizer is not None:
        ids = token_ids(tokenizer, text)
        hashes = ngram.mixed(np.concatenate(ids).astype(np.uint64))
        runs["ids"] = kernels.known(hashes, np.cumsum([0, *map(len, ids)])).runs
    return runs


def summed(tasks: list[Task]) -> Arrays:
    """The sums over all sources."""
    total, scorer = read_arrays(tasks[0].counts), tasks[0].scorer
    for task in tasks[1:]:
        other = read_arrays(task.counts)
        both = {name: total[name] + other[name] for name in ("words", "bad_lines")}
        total = (
            scorer.together(
                *({name: side[name] for name in scorer.sums()} for side in (total, other))
            )
            | both
        )
    return total


def fit(options: SelectionOptions, columns: Targets, sums: Arrays, forbidden: Targets) -> Arrays:
    """The content of `model.npz`: the names of the columns, the method's model, and the runs of
    tokens that a part must not share with documents of the kinds in `forbidden`."""
    model = {
        "names": np.array(list(columns)),
        **METHODS[options.method](options).fit(columns, sums),
    }
    for what, documents in forbidden.items():
        model |= {
            f"{what}_{kind}": runs for kind, runs in _runs(documents, options.tokenizer).items()
        }
    return model


def words(batch: Batch) -> NDArray[np.int64]:
    """(BUCKETS,) how often its words and pairs fall into each bucket."""
    counts = np.zeros(BUCKETS, np.int64)
    kernels.count(batch.tokens.hashes, batch.bounds, counts)
    return counts


@lru_cache(8)
def known(folder: Path, name: str) -> kernels.Known:
    """The runs of a name in the model, ready to look into; none where the model has none."""
    return kernels.sieved(load_model(folder).get(name, np.empty(0, np.uint64)))


@lru_cache(2)
def load_model(folder: Path) -> Arrays:
    return read_arrays(folder / "model.npz")


def write_arrays(path: Path, arrays: Arrays) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def read_arrays(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)

"""The fine cluster of every document.

P documents of a batch, m buckets of words, G groups that are clustered by themselves, F fine
clusters, D dimensions.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.data.corpus.opening import BadLines
from doremi_train.files import replacing
from doremi_train.methods import clusters
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.parts import Batch, batched
from doremi_train.selection.documents.tasks import ROWS, read_arrays, write_arrays
from doremi_train.selection.regroup.features import encoded, tallied, vectors
from doremi_train.selection.regroup.task import Task

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the document in its source
        ("end", pa.int64()),  # bytes of its UTF-8
        ("given", pa.string()),  # its domain so far
        ("tokens", pa.int64()),  # words
        ("cluster", pa.int32()),  # fine; −1: no word of it is known
        ("quality", pa.float32()),  # log-ratio of its n-grams, good text against the corpus
    ]
)


class Model(NamedTuple):
    groups: list[str]
    weights: NDArray[np.float32]  # (G, m) of words
    centres: NDArray[np.int16]  # (F, D)
    owner: NDArray[np.int64]  # (F,) their group
    good: NDArray[np.float32]  # (GRAMS, 1) log-ratio of each n-gram, or none


@lru_cache(1)
def load_model(folder: Path) -> Model:
    arrays = read_arrays(folder / "model.npz")
    return Model(
        [str(name) for name in arrays["groups"]],
        *(arrays[name] for name in ("weights", "centres", "owner", "good")),
    )


def save_model(folder: Path, model: Model) -> None:
    write_arrays(folder / "model.npz", model._asdict() | {"groups": np.array(model.groups, str)})


def assign(task: Task) -> None:
    """The fine cluster, and the likeness to good text, of every document of this source."""
    if task.parts.exists():
        return
    model, bad = load_model(task.folder), BadLines(task.data)
    with replacing(task.parts) as aside, pq.ParquetWriter(aside, SCHEMA, compression="zstd") as out:
        waiting: list[pa.RecordBatch] = []
        last: dict[str, NDArray] | None = None  # a giant document may go on in the next batch
        for batch in batched(task.documents(bad), None):
            columns = _whole_documents(_assigned(batch, task, model), last)
            last = {name: column[-1:] for name, column in columns.items()}
            waiting.append(_rows({name: column[:-1] for name, column in columns.items()}))
            if sum(map(len, waiting)) >= ROWS:
                out.write_table(pa.Table.from_batches(waiting))
                waiting = []
        if last is not None:
            waiting.append(_rows(last))
        out.write_table(pa.Table.from_batches(waiting, SCHEMA))
        out.add_key_value_metadata({"bad_lines": str(bad.count)})


def _rows(columns: dict[str, NDArray]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA
    )


def _assigned(batch: Batch, task: Task, model: Model) -> dict[str, NDArray]:
    """The columns of a batch, a row for each document or piece of one, and `begins`."""
    buckets, counts, first = tallied(batch)
    groups = [task.group(document.domain) for document in batch.documents]
    cluster = np.full(len(groups), -1, np.int64)
    by_encoder = encoded(batch, task.options.encoder)
    for group in sorted(set(groups)):
        if group not in model.groups:
            raise UserError(
                f"regroup.model={task.options.model}: knows no domain {group!r}; it was made "
                f"within {', '.join(model.groups)}; leave that domain out, or find domains anew"
            )
        number = model.groups.index(group)
        rows = np.array([name == group for name in groups])
        found = by_encoder
        if task.options.encoder is None:
            found = vectors(buckets, counts, first, model.weights[number], model.centres.shape[1])
        own = np.flatnonzero(model.owner == number)
        known = rows & found.any(1)
        cluster[known] = own[clusters.nearest(found[known], model.centres[own])[0]]
    tokens = np.diff(batch.bounds)
    quality = np.zeros(len(groups))
    if len(model.good):
        scores = np.zeros((len(groups), 1))
        kernels.score(batch.tokens.hashes, batch.bounds, model.good, scores)
        quality = scores[:, 0] / np.maximum(2 * tokens - 1, 1)
    return {
        "row": np.array([document.row for document in batch.documents], np.int64),
        "end": np.array([d.base + len(d.content) for d in batch.documents], np.int64),
        "given": np.array([document.domain for document in batch.documents], object),
        "tokens": tokens,
        "cluster": cluster,
        "quality": quality,
        "begins": np.array([document.base == 0 for document in batch.documents]),
    }


def _whole_documents(
    columns: dict[str, NDArray], last: dict[str, NDArray] | None
) -> dict[str, NDArray]:
    """A row for each document, of which the `last` of the batch before may have gone on: it has the
    cluster and the quality of how it begins."""
    if last is not None:
        columns = {name: np.concatenate([last[name], columns[name]]) for name in columns}
    starts = np.flatnonzero(columns["begins"])
    if len(starts) == len(columns["row"]):
        return columns
    whole = {name: column[starts] for name, column in columns.items()}
    whole["tokens"] = np.add.reduceat(columns["tokens"], starts)
    whole["end"] = columns["end"][np.append(starts[1:], len(columns["row"])) - 1]
    return whole

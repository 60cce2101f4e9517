"""Work on one source, as in `selection.documents.tasks`: what it writes is a function of its input
alone, and a task whose output exists is done.

P documents of a batch, m buckets of words, G groups that are clustered by themselves, F fine
clusters, D dimensions.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.options import DataOptions
from doremi_train.files import replacing
from doremi_train.methods import clusters, ngram
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.baselines import embedded
from doremi_train.selection.documents.parts import Batch, Document, batched, documents
from doremi_train.selection.documents.scorers import UNSEEN
from doremi_train.selection.documents.tasks import ROWS, read_arrays, write_arrays
from doremi_train.selection.regroup.options import RegroupOptions

BUCKETS = 2**17  # m, of words
GRAMS = 2**15  # of 1- and 2-grams, for levels
SHOWN = 2000  # bytes of a text that names and the page look at
READ = 8192  # bytes of a text that an encoder is given, which cuts it by its tokens
LOOKED_AT = 10_000  # of the sample, for names and the page

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


@dataclass(frozen=True)
class Task:
    folder: Path
    number: int  # of the source
    source: Source
    data: DataOptions
    options: RegroupOptions

    @property
    def draws(self) -> Path:
        return self.folder / "draws" / f"{self.number:05d}.npz"

    @property
    def sample(self) -> Path:
        return self.folder / "sample" / f"{self.number:05d}.npz"

    @property
    def parts(self) -> Path:
        return self.folder / "parts" / f"{self.number:05d}.parquet"

    def documents(self, bad: BadLines) -> Iterator[Document]:
        """Every document, those for validation too; a giant one in pieces."""
        for document in documents(self.source, self.data, bad, whole=False, every=True):
            if not isinstance(document.content, bytes):
                raise UserError(
                    f"stage=regroup: {self.source.url} holds tokens, not text; give text"
                )
            yield document

    def group(self, domain: str) -> str:
        """The name of what is clustered by itself: all, or each given domain."""
        return domain if self.options.within == "domain" else ""


def draw_of(text: bytes, seed: int) -> int:
    """A number as good as random, by the text and the seed alone."""
    digest = hashlib.blake2b(text, digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little")


def smallest(draws: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The smallest different ones, sorted."""
    return np.unique(draws)[:count]


class Drawing(NamedTuple):
    """What the first look at the sources needs beside the task: every text's draw is by the
    seed."""

    task: Task
    seed: int


def draw(drawing: Drawing) -> None:
    """The smallest draws of this source's documents, by group."""
    task, seed = drawing
    if task.draws.exists():
        return
    bad, most = BadLines(task.data), task.options.sample
    met: dict[str, list[int]] = {}
    kept: dict[str, NDArray[np.uint64]] = {}
    for document in task.documents(bad):
        if document.base:
            continue
        group = task.group(document.domain)
        waiting = met.setdefault(group, [])
        waiting.append(draw_of(document.content, seed))  # type: ignore[arg-type]
        if len(waiting) >= most:
            kept[group] = _with(kept.get(group), waiting, most)
            waiting.clear()
    for group, waiting in met.items():
        kept[group] = _with(kept.get(group), waiting, most)
    write_arrays(
        task.draws,
        {f"of {group}": draws for group, draws in sorted(kept.items())}
        | {"bad_lines": np.array(bad.count)},
    )


def _with(kept: NDArray[np.uint64] | None, more: list[int], most: int) -> NDArray[np.uint64]:
    both = [np.empty(0, np.uint64) if kept is None else kept, np.array(more, np.uint64)]
    return smallest(np.concatenate(both), most)


def drawn(tasks: list[Task]) -> dict[str, NDArray[np.uint64]]:
    """The draws that make the sample of every group, sorted."""
    kept: dict[str, NDArray[np.uint64]] = {}
    for task in tasks:
        for name, draws in read_arrays(task.draws).items():
            if name.startswith("of "):
                kept[name[3:]] = smallest(
                    np.concatenate([kept.get(name[3:], draws[:0]), draws]), task.options.sample
                )
    most = max(tasks[0].options.sample // max(len(kept), 1), 1)
    return {group: draws[:most] for group, draws in sorted(kept.items())}


def write_draws(folder: Path, drawn: dict[str, NDArray[np.uint64]]) -> None:
    """Hand the sample's draws to the workers."""
    write_arrays(folder / "draws.npz", {f"of {group}": draws for group, draws in drawn.items()})


class Sample(NamedTuple):
    """Different documents, N, in the order of their draws."""

    draw: NDArray[np.uint64]  # (N,)
    group: NDArray[Any]  # (N,) names
    buckets: NDArray[np.int32]  # (n,) of their distinct words, one document after the other
    counts: NDArray[np.int32]  # (n,)
    first: NDArray[np.int64]  # (N + 1,)
    tokens: NDArray[np.int64]  # (N,) words
    text: NDArray[np.uint8]  # how those that are looked at begin
    text_first: NDArray[np.int64]  # (N + 1,) in `text`
    encoded: NDArray[np.int16]  # (N, D) by the encoder; (N, 0) where there is none

    def shown(self, number: int) -> str:
        """How a document begins; "" of one that is not looked at."""
        content = self.text[self.text_first[number] : self.text_first[number + 1]]
        return content.tobytes().decode(errors="ignore")


def gather(drawing: Drawing) -> None:
    """The documents of the sample that are in this source, as counts of words."""
    task, seed = drawing
    if task.sample.exists():
        return
    wanted, looked_at = _wanted(task.folder)
    left = {group: set(draws) for group, draws in wanted.items()}
    grams = np.zeros(GRAMS, np.int64)
    found: list[tuple[int, str, bool]] = []  # draw, group, whether it is met for the first time

    def chosen() -> Iterator[Document]:
        for document in task.documents(BadLines(task.data)):
            group = task.group(document.domain)
            if document.base or group not in wanted:
                continue
            number = draw_of(document.content, seed)  # type: ignore[arg-type]
            if number in wanted[group]:
                found.append((number, group, number in left[group]))
                left[group].discard(number)
                yield document

    met, rows = 0, []
    for batch in batched(chosen(), None):
        here = found[met : met + len(batch.documents)]
        met += len(here)
        buckets, counts, first = tallied(batch)
        vectors_of = encoded(batch, task.options.encoder)
        if task.options.good:  # of every copy: so their sum is the same in any division into files
            kernels.count(batch.tokens.hashes, batch.bounds, grams)
        for p, (number, group, new) in enumerate(here):
            if not new:
                continue
            own = slice(first[p], first[p + 1])
            shown = number <= looked_at[group]
            rows.append(
                (
                    number,
                    group,
                    buckets[own].copy(),
                    counts[own].copy(),
                    int(batch.bounds[p + 1] - batch.bounds[p]),
                    batch.part(p)[:SHOWN] if shown else b"",
                    vectors_of[p],
                )
            )
    rows.sort(key=lambda row: row[:2])
    text, text_first = kernels.joined([row[5] for row in rows])
    write_arrays(
        task.sample,
        {
            "draw": np.array([row[0] for row in rows], np.uint64),
            "group": np.array([row[1] for row in rows], str),
            "buckets": np.concatenate([*(row[2] for row in rows), np.empty(0, np.int32)]),
            "counts": np.concatenate([*(row[3] for row in rows), np.empty(0, np.int32)]),
            "first": np.cumsum([0, *(len(row[2]) for row in rows)]),
            "tokens": np.array([row[4] for row in rows], np.int64),
            "text": text,
            "text_first": text_first,
            "grams": grams,
            # An encoder tells its dimensions with the first text.
            "encoded": np.stack([row[6] for row in rows]) if rows else np.empty((0, 0), np.int16),
        },
    )


@lru_cache(2)
def _wanted(folder: Path) -> tuple[dict[str, frozenset[int]], dict[str, int]]:
    """(the draws of each group's sample; the largest of those that are looked at)."""
    arrays = read_arrays(folder / "draws.npz")
    groups = {name[3:]: draws for name, draws in arrays.items()}
    most = max(LOOKED_AT // max(len(groups), 1), 1)
    return (
        {group: frozenset(draws.tolist()) for group, draws in groups.items()},
        {group: int(draws[:most][-1]) for group, draws in groups.items()},
    )


def gathered(tasks: list[Task]) -> tuple[Sample, NDArray[np.int64]]:
    """(the sample, each text once; how often each 1- and 2-gram is in it, copies counted)."""
    grams = np.zeros(GRAMS, np.int64)
    each: list[dict[str, NDArray]] = []
    for task in tasks:
        each.append(read_arrays(task.sample))
        grams += each[-1].pop("grams")
    draw = np.concatenate([arrays["draw"] for arrays in each])
    group = np.concatenate([arrays["group"] for arrays in each])
    order = np.lexsort((draw, group))
    new = np.ones(len(order), bool)
    new[1:] = (draw[order][1:] != draw[order][:-1]) | (group[order][1:] != group[order][:-1])
    kept = order[new]

    def ragged(name: str, first: str) -> tuple[NDArray, NDArray[np.int64]]:
        starts, base = [], 0
        for arrays in each:
            starts.append(arrays[first] + base)
            base += len(arrays[name])
        values = np.concatenate([arrays[name] for arrays in each])
        begin = np.concatenate([start[:-1] for start in starts])[kept]
        length = np.concatenate([np.diff(start) for start in starts])[kept]
        ends = np.cumsum(length)
        places = np.repeat(begin - (ends - length), length) + np.arange(length.sum())
        return values[places], np.concatenate([[0], ends])

    buckets, first = ragged("buckets", "first")
    counts, _ = ragged("counts", "first")
    text, text_first = ragged("text", "text_first")
    tokens = np.concatenate([arrays["tokens"] for arrays in each])[kept]
    by_encoder = np.concatenate([a["encoded"] for a in each if len(a["draw"])])[kept]
    parts = (draw[kept], group[kept], buckets, counts, first, tokens, text, text_first, by_encoder)
    return Sample(*parts), grams


def tallied(batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """(buckets and counts (n,) of the distinct words of each document, its first (P + 1,))."""
    hashes, bounds = batch.tokens.hashes, batch.bounds
    buckets, counts = np.empty(len(hashes), np.int32), np.empty(len(hashes), np.int32)
    first = np.empty(len(bounds), np.int64)
    n = kernels.tally(hashes, bounds, _seen(), buckets, counts, first)
    return buckets[:n], counts[:n], first


@lru_cache(1)
def _seen() -> NDArray[np.int64]:
    return np.zeros(BUCKETS, np.int64)


def vectors(
    buckets: NDArray[np.int32],
    counts: NDArray[np.int32],
    first: NDArray[np.int64],
    weights: NDArray[np.float32],
    dimensions: int,
) -> NDArray[np.int16]:
    """(P, D) of documents by their counts of words, and the words' weights (m,)."""
    out = np.empty((len(first) - 1, dimensions), np.int16)
    kernels.project(buckets, counts, first, weights, float(clusters.UNIT), out)
    return out


def encoded(batch: Batch, encoder: str | None) -> NDArray[np.int16]:
    """(P, D) vectors of a batch by a sentence encoder; (P, 0) without one. Each text by itself and
    on one thread, so that the others of its batch, and the cores, change no bit."""
    if encoder is None:
        return np.empty((len(batch.start), 0), np.int16)
    import torch

    texts = [batch.part(p)[:READ] for p in range(len(batch.start))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return clusters.quantized(embedded(texts, encoder, "regroup.encoder", together=1))
    finally:
        torch.set_num_threads(threads)


# ── Every document's cluster ──────────────────────────────────────────────────────


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


def good_ratios(
    documents: list[bytes], grams: NDArray[np.int64], known: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(GRAMS, 1) log-ratio of each n-gram, good text against the sample's counts (GRAMS,). Raises
    UserError where no more words of it are `known` (m,) of the sample than chance makes so."""
    counts, words = np.zeros(GRAMS, np.int64), np.zeros(BUCKETS, np.int64)
    for batch in batched((Document(row, 0, "", t) for row, t in enumerate(documents)), None):
        kernels.count(batch.tokens.hashes, batch.bounds, counts)
        buckets, times, _ = tallied(batch)
        np.add.at(words, buckets, times)
    chance = float(known.mean())  # two words fall into one bucket
    if words[known].sum() <= min(2 * chance, (1 + chance) / 2) * words.sum():
        raise UserError(
            "regroup.good: shares no word with the corpus, so that nothing is more like it than "
            "the rest; give good text of the corpus' languages"
        )
    return ngram.log_ratio(counts, grams, 0.0, UNSEEN / int(counts.sum())).astype(np.float32)[
        :, None
    ]

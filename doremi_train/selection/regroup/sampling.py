"""A sample of different texts: those of the smallest hash, so that it does not matter how documents
were divided, nor who looked at them.

N documents of the sample, n distinct words in them, D dimensions.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_train.data.corpus.opening import BadLines
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.parts import Document, batched
from doremi_train.selection.documents.tasks import read_arrays, write_arrays
from doremi_train.selection.regroup.features import GRAMS, encoded, tallied
from doremi_train.selection.regroup.task import Task

SHOWN = 2000  # bytes of a text that names and the page look at
LOOKED_AT = 10_000  # of the sample, for names and the page


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

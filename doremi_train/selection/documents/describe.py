"""A second look at the text, once the choice is made: its words, examples, and the chosen text
itself as shards."""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from doremi_train.config import UserError
from doremi_train.data.corpus.opening import BadLines
from doremi_train.data.tokens.shards import domain_folder
from doremi_train.files import read_json, replacing, write_json
from doremi_train.methods import ngram
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.choose import Sampler, numbered
from doremi_train.selection.documents.scorers import BUCKETS
from doremi_train.selection.documents.tasks import ELIGIBLE, Task

EXAMPLES = 3
SHOWN = 300  # bytes of an example


@dataclass(frozen=True)
class Look:
    """One source and one target's choice."""

    task: Task
    folder: Path  # of the choice
    shard: str
    first: int  # number of its first part in the corpus
    half: Sampler  # the choice by half the target: the other half judges it
    half_cut: ngram.Cut

    @property
    def path(self) -> Path:
        return self.folder / "looks" / f"{self.task.number:05d}.json"


def look(at: Look) -> None:
    """Count the words of what half the target chose, take examples, and write the chosen text."""
    if at.path.exists():
        return
    counts = np.zeros(BUCKETS, np.int64)
    examples: dict[str, list[tuple[int, str]]] = {"chosen": [], "refused": []}
    groups, position = _rows(at), 0
    rows: dict[str, np.ndarray] = {"id": np.empty(0)}
    with contextlib.ExitStack() as stack:
        write = _writer(at, stack)
        for batch in at.task.batches(BadLines(at.task.data)):
            while position == len(rows["id"]):
                rows, position = next(groups), 0
            here = {
                name: column[position : position + len(batch.start)]
                for name, column in rows.items()
            }
            position += len(batch.start)
            for p in np.flatnonzero(here["half"]):
                kernels.count(batch.tokens.hashes, batch.bounds[p : p + 2], counts)
            if batch.text is None:
                continue
            for name, mask in (
                ("chosen", here["selected"]),
                ("refused", ~here["selected"] & here["eligible"]),
            ):
                for p in np.flatnonzero(mask)[np.argsort(here["draw"][mask])[:EXAMPLES]]:
                    text = batch.part(p)[:SHOWN].decode(errors="ignore")
                    examples[name].append((int(here["draw"][p]), text))
                examples[name] = sorted(examples[name])[:EXAMPLES]
            for p in np.flatnonzero(here["selected"]):
                write(
                    batch.documents[batch.document[p]].domain,
                    int(here["id"][p]),
                    batch.part(p).decode(),
                )
    write_json(at.path, {"words": counts.tolist(), "examples": examples})


def _rows(at: Look) -> Iterator[dict[str, np.ndarray]]:
    """What is known of every part of this source, in order: row groups, each of which is of whole
    batches."""
    chosen = pq.read_table(
        at.folder / "sidecar.parquet", columns=["selected"], filters=[("shard", "==", at.shard)]
    )
    selected, position = chosen["selected"].to_numpy(), 0
    copies = np.load(at.half.scores.copies, mmap_mode="r")
    with pq.ParquetFile(at.task.scores, read_dictionary=["domain"]) as scores:
        for group in range(scores.num_row_groups):
            table = numbered(scores.read_row_group(group), copies, at.first + position)
            order, groups, _ = at.half.sortable(table)
            yield {
                "selected": selected[position : position + len(table)],
                "half": order > at.half_cut.prefix[groups],
                "eligible": table["refused"].to_numpy() == ELIGIBLE,
                "id": table["id"].to_numpy(),
                # As good as random, and the same everywhere.
                "draw": ngram.mixed(table["id"].to_numpy()),
            }
            position += len(table)


# ── The chosen text as shards, a folder for each domain: a data.root ──────────────

Write = Callable[[str, int, str], None]  # domain, id, text


def _writer(at: Look, stack: contextlib.ExitStack) -> Write:
    form = at.task.options.write
    if form == "none":
        return lambda domain, number, text: None
    files: dict[str, Any] = {}

    def write(domain: str, number: int, text: str) -> None:
        if domain not in files:
            ending = "tar" if form == "webdataset" else form
            path = (
                at.folder
                / "shards"
                / domain_folder(domain)
                / f"train-{at.task.number:05d}.{ending}"
            )
            files[domain] = stack.enter_context(FORMATS[form](stack.enter_context(replacing(path))))
        files[domain](f"{number:016x}", text)

    return write


@contextlib.contextmanager
def _jsonl(path: Path) -> Any:
    with path.open("wb") as raw, zstandard.ZstdCompressor(9).stream_writer(raw) as stream:
        yield lambda number, text: stream.write(orjson.dumps({"id": number, "text": text}) + b"\n")


@contextlib.contextmanager
def _parquet(path: Path) -> Any:
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    waiting: list[dict[str, str]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def write(number: str, text: str) -> None:
            waiting.append({"id": number, "text": text})
            if len(waiting) == 1000:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting.clear()

        yield write
        writer.write_table(pa.Table.from_pylist(waiting, schema))


@contextlib.contextmanager
def _webdataset(path: Path) -> Any:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        written = 0

        def write(number: str, text: str) -> None:
            nonlocal written
            member = tarfile.TarInfo(f"{written:08d}-{number}.txt")
            written += 1
            content = text.encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        yield write


FORMATS: dict[str, Callable[[Path], Any]] = {
    "jsonl.zst": _jsonl,
    "parquet": _parquet,
    "webdataset": _webdataset,
}
"""Chosen text in a file of a format:

>>> import tempfile
>>> from pathlib import Path
>>> import pyarrow.parquet as pq
>>> from doremi_train.selection.documents.describe import FORMATS
>>> path = Path(tempfile.mkdtemp(), "chosen.parquet")
>>> with FORMATS["parquet"](path) as write:
...     write("0-7", "a document")
>>> pq.read_table(path).to_pylist()
[{'id': '0-7', 'text': 'a document'}]
"""


def together(looks: list[Look]) -> dict[str, Any]:
    """The looks at all sources as one."""
    words = np.zeros(BUCKETS, np.int64)
    examples: dict[str, list[list[Any]]] = {"chosen": [], "refused": []}
    for at in looks:
        content = read_json(at.path)
        words += np.array(content["words"])
        for name, texts in examples.items():
            examples[name] = sorted(texts + content["examples"][name])[:EXAMPLES]
    return {
        "words": words,
        "examples": {name: [text for _, text in texts] for name, texts in examples.items()},
    }


def require_text(task: Task) -> None:
    """Raises UserError where text is to be written and there is none."""
    if task.options.write != "none" and task.source.url.endswith(".bin"):
        raise UserError(
            f"selection.write={task.options.write}: {task.source.url} holds tokens, not text; "
            "write none"
        )

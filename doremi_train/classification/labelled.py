"""Texts with labels, from files of `.jsonl` (also `.zst`, `.gz`), `.parquet` or `.csv`: small
enough for memory.

N examples.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from doremi_train.config import UserError, fingerprint, listed
from doremi_train.storage.steady import one_line
from doremi_train.storage.urls import filesystem, reaching

ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".csv")


@dataclass(frozen=True)
class Examples:
    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: NDArray[np.int64]) -> "Examples":
        return Examples(
            [self.texts[i] for i in rows.tolist()], [self.labels[i] for i in rows.tolist()]
        )

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.texts, self.labels])


def find(root: str, name: str) -> str | None:
    """The one file NAME.* in the folder or URL `root`. Raises UserError where there are several."""
    with reaching(root, "classify.root"):
        fs, inside = filesystem(root, "classify.root")
        endings = [
            ending for ending in ENDINGS if fs.isfile(f"{inside.rstrip('/')}/{name}{ending}")
        ]
    if len(endings) > 1:
        raise UserError(
            f"classify.root={root}: {' and '.join(name + ending for ending in endings)} are there; "
            "keep one"
        )
    return f"{root.rstrip('/')}/{name}{endings[0]}" if endings else None


def read(path: str, text_key: str, label_key: str) -> Examples:
    """The examples of a file. A label is text or a whole number, which counts as its digits.

    Raises UserError naming file and row for whatever is not such an example, and for a file without
    any.
    """
    with reaching(path, "classify.root"):
        fs, inside = filesystem(path, "classify.root")
        content = fs.cat_file(inside)
    try:
        rows = (
            _parquet(content)
            if path.endswith(".parquet")
            else _csv(content)
            if path.endswith(".csv")
            else None
        )
        rows = _jsonl(content, path) if rows is None else rows
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read as {path.rpartition('.')[2]} ({one_line(error)}); mend it"
        ) from None
    if not rows:
        raise UserError(
            f"{path}: has no example; give at least one with {text_key} and {label_key}"
        )
    pairs = [_example(row, number, path, text_key, label_key) for number, row in enumerate(rows, 1)]
    return Examples([text for text, _ in pairs], [label for _, label in pairs])


def _example(row: Any, number: int, path: str, text_key: str, label_key: str) -> tuple[str, str]:
    fields = row if isinstance(row, dict) else {}
    for option, key in (("classify.text_key", text_key), ("classify.label_key", label_key)):
        if key not in fields:
            raise UserError(
                f"{option}={key!r}: no such key in {path}, row {number}; the keys there: "
                f"{listed(fields)}; set {option} to the right one"
            )
    text, label = fields[text_key], fields[label_key]
    if not isinstance(text, str):
        raise UserError(f"{path}, row {number}: {text_key} must be text, not {text!r}")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UserError(
            f"{path}, row {number}: {label_key} must be text or a whole number, not {label!r}"
        )
    return text, str(label)


def _parquet(content: bytes) -> list[Any]:
    return pa.parquet.read_table(io.BytesIO(content)).to_pylist()


def _csv(content: bytes) -> list[Any]:
    """Rows of a file with a header; every field is text."""
    names = pa.csv.open_csv(io.BytesIO(content)).schema.names
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
    )
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    return pa.csv.read_csv(
        io.BytesIO(content), convert_options=convert, parse_options=parse
    ).to_pylist()


def _jsonl(content: bytes, path: str) -> list[Any]:
    codec = {"zst": "zstd", "gz": "gzip"}.get(path.rpartition(".")[2])
    if codec:
        content = pa.CompressedInputStream(io.BytesIO(content), codec).read()
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            rows += [orjson.loads(line)] if line.strip() else []
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: broken JSON line: {one_line(error)}") from None
    return rows


def classes(real: Examples, others: dict[str, Examples]) -> list[str]:
    """The labels, sorted: those of the real examples. Raises UserError where other examples have
    one that they lack."""
    known = sorted(set(real.labels))
    if len(known) < 2:
        raise UserError(
            f"the real examples: all their labels are {known[0]!r}; a classifier needs examples of "
            "two at least"
        )
    for name, examples in others.items():
        for label in sorted(set(examples.labels) - set(known)):
            raise UserError(
                f"{examples.labels.count(label)} {name} examples are labelled {label!r}, which no "
                "real example is, so nothing could judge them; real labels are "
                f"{', '.join(known[:20])}; add real examples of it, or leave these out"
            )
    return known


def numbered(labels: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
    """Places (N,) of the labels among the known ones."""
    place = {label: number for number, label in enumerate(known)}
    return np.array([place[label] for label in labels], np.int64)


def split(
    numbers: NDArray[np.int64], part: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that stay, and rows (about `part` of every label) that are held out; a label's last
    example stays."""
    generator = np.random.Generator(np.random.PCG64(seed))
    held: list[int] = []
    for label in np.unique(numbers):
        rows = generator.permutation(np.flatnonzero(numbers == label))
        held += rows[: min(round(part * len(rows)), len(rows) - 1)].tolist()
    out = np.array(sorted(held), np.int64)
    return np.setdiff1d(np.arange(len(numbers)), out), out


def folds(count: int, number: int, seed: int) -> NDArray[np.int64]:
    """Folds (N,) of the examples, of equal sizes."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(np.arange(count) % number)

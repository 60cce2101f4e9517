"""A user's table, CSV (also with tabs or semicolons) or parquet, as text: what is a number is asked
of single columns, so that a message names line and column.

N rows, C columns.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from doremi_train.config import UserError

Floats = NDArray[np.float64]

_MISSING = {"", "nan", "na", "n/a", "null", "none", "-"}


class Table(NamedTuple):
    """A file as text."""

    path: str
    columns: list[str]
    rows: list[list[str]]
    lines: list[int]  # of the file, for messages

    def numbers(self, names: Sequence[str], key: str, missing: bool) -> Floats:
        """(N, C) of these columns. Raises UserError naming line and column of what is no number;
        what is `missing` is nan, or refused."""
        values = np.empty((len(self.rows), len(names)))
        for place, name in enumerate(names):
            column = self.columns.index(name)
            for index, row in enumerate(self.rows):
                value = number(row[column])
                if value is None or not (missing or np.isfinite(value)):
                    raise UserError(
                        f"{key}={self.path}: line {self.lines[index]}, column {name!r} is "
                        f"{row[column]!r}, and no number; mend it, or say which columns count with "
                        "fit.weights and fit.metrics"
                    )
                values[index, place] = value
        return values

    def numeric(self) -> list[str]:
        """The columns in which most cells that hold something hold a number."""
        found = []
        for column, name in enumerate(self.columns):
            cells = [number(row[column]) for row in self.rows]
            numbers = sum(cell is not None and np.isfinite(cell) for cell in cells)
            if numbers > sum(cell is None for cell in cells):
                found.append(name)
        return found


def number(cell: str) -> float | None:
    """What a cell holds; nan where nothing, None where it is no number."""
    if cell.strip().lower() in _MISSING:
        return np.nan
    try:
        return float(cell)
    except ValueError:
        return None


def read(path: str, key: str) -> Table:
    """The table of a file, given as `key`. Raises UserError for what is no table, or has no row."""
    where = f"{key}={path}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    if content[:4] == b"PAR1":
        columns, rows = _parquet(content, where)
        lines = list(range(1, len(rows) + 1))
    else:
        columns, rows, lines = _separated(content, where)
    if len(set(columns)) < len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise UserError(f"{where}: two columns are named {twice[0]!r}; rename one")
    if not rows:
        raise UserError(f"{where}: has no row of a run below the line of names")
    return Table(path, columns, rows, lines)


def _parquet(content: bytes, where: str) -> tuple[list[str], list[list[str]]]:
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except pyarrow.ArrowException as error:
        raise UserError(f"{where}: not a parquet file that can be read ({error})") from None
    cells = [
        ["" if cell is None else str(cell) for cell in column.to_pylist()]
        for column in table.columns
    ]
    return table.column_names, [list(row) for row in zip(*cells, strict=True)]


def _separated(content: bytes, where: str) -> tuple[list[str], list[list[str]], list[int]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error}); write it as CSV in UTF-8") from None
    head = text.partition("\n")[0]
    separator = max(",\t;", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    found, lines = [], []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                found.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num} is no CSV ({error})") from None
    if not found:
        raise UserError(f"{where}: is empty; give a table with a row a run")
    columns, rows = [name.strip() for name in found[0]], found[1:]
    for row, line in zip(rows, lines[1:], strict=True):
        if len(row) != len(columns):
            raise UserError(
                f"{where}: line {line} has {len(row)} cells, and the first line names "
                f"{len(columns)} columns"
            )
    return columns, rows, lines[1:]

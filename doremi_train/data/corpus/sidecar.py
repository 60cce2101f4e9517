"""What a selection chose, by its sidecar: a row for every part of a document, where it stands and
whether it is in.

The columns that count: `shard` (the name of a source), `row` (of the document in it, from 0: the
line of JSON lines, the row of parquet, the document of a .bin or an archive), `start`, `end` (bytes
of its UTF-8, or tokens) and `selected`. The metadata may hold `data`, a fingerprint of
the files, `selection`, one of the choice, and `domains`, those that were chosen from. Any tool may
write one.

Where the metadata says `relabels`, as that of stage=regroup does, every document stands in it,
those for validation too, and belongs to the domain of its column `domain`.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from doremi_train.config import UserError, fingerprint, judged
from doremi_train.data.corpus.opening import Piece, Source
from doremi_train.data.corpus.sources import names, signature
from doremi_train.data.options import DataOptions

# What the metadata says of the columns, for whoever reads them.
SAID = {
    "rows": "from 0: line of JSON lines, row of parquet, document of other files",
    "offsets": "bytes of the document's UTF-8; of a .bin, tokens",
}
COLUMNS = ("shard", "row", "start", "end", "selected")


def identity(options: DataOptions, sources: list[Source]) -> Any:
    """A JSON value that changes with the selection. Raises UserError where it is none, or one of
    other files."""
    path = Path(str(options.selection))
    with _judged(path):
        schema, metadata = pq.read_schema(path), _metadata(path)
    needed = (*COLUMNS, "domain") if "relabels" in metadata else COLUMNS
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise UserError(
            f"data.selection={path}: has no column {', '.join(missing)}; give a sidecar of "
            "stage=select"
        )
    if metadata.get("data") not in (None, fingerprint(signature(options, sources))):
        raise UserError(
            f"data.selection={path}: was made for other files than those of data; select again"
        )
    if "selection" in metadata and "rows" not in metadata:
        raise UserError(
            f"data.selection={path}: an older version made it, which counted rows without empty "
            "documents and skipped lines; select again"
        )
    return [metadata.get("selection"), path.stat().st_size]


def domains(options: DataOptions) -> frozenset[str] | None:
    """The domains that something was chosen from: the others are left out. None where the sidecar
    does not say."""
    if options.selection is None:
        return None
    with _judged(options.selection):
        listed = _metadata(Path(options.selection)).get("domains")
        return frozenset(json.loads(listed)) if listed is not None else None


def relabels(options: DataOptions) -> bool:
    """Whether the sidecar says of every document, those for validation too, which domain it is
    of."""
    if options.selection is None:
        return False
    with _judged(options.selection):
        return "relabels" in _metadata(Path(options.selection))


def _judged(path: Path | str) -> contextlib.AbstractContextManager[None]:
    given = f"data.selection={path}: not a sidecar that can be read"
    return judged(given, "give a sidecar of stage=select", "the reader")


def _metadata(path: Path) -> dict[str, str]:
    return {
        key.decode(): value.decode()
        for key, value in (pq.read_metadata(path).metadata or {}).items()
    }


class Selected:
    """The chosen parts of one source, to be taken out of its pieces in their order."""

    def __init__(self, options: DataOptions, sources: list[Source], source: Source) -> None:
        shard = names(options, sources)[sources.index(source)]
        mine = [("shard", "==", shard), ("selected", "==", True)]
        columns = ["row", "start", "end"]
        named = ["domain"] if relabels(options) else []
        with _judged(str(options.selection)):
            table = pq.read_table(
                str(options.selection),
                columns=[*columns, *named],
                filters=mine,
                read_dictionary=named,
            )
            if any(table[name].null_count for name in [*columns, *named]):
                raise ValueError(f"a row without {', '.join([*columns, *named])}")
            row, start, end = (table[name].cast(pa.int64()).to_numpy() for name in columns)
            order = np.lexsort((start, row))
            self._row, self._start, self._end = row[order], start[order], end[order]
            self._names, self._domain = None, order
            if named:
                encoded = table["domain"].unify_dictionaries().combine_chunks()
                self._names = encoded.dictionary.to_pylist()
                self._domain = encoded.indices.to_numpy()[order]
        self._base, self._begins = 0, True

    def parts(self, piece: Piece) -> list[Piece]:
        """The chosen parts of the next piece. One that goes on in the piece after it does not end
        here."""
        if self._begins:
            self._base = 0
        self._begins = piece.last
        first, last = np.searchsorted(self._row, [piece.row, piece.row + 1])
        content: Any = None
        chosen, size = [], 0
        if first < last or not piece.last:
            content = piece.text.encode() if piece.text is not None else piece.tokens
            size = len(content)
        for number in range(first, last):
            start, end = (int(at[number]) - self._base for at in (self._start, self._end))
            part = content[max(start, 0) : max(end, 0)]
            if len(part):
                text = part.decode() if piece.text is not None else None
                tokens = None if piece.text is not None else part
                domain = self._names[self._domain[number]] if self._names else piece.domain
                chosen.append(
                    piece._replace(domain=domain, text=text, tokens=tokens, last=end <= size)
                )
        self._base += size
        return chosen

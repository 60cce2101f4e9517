"""Which split every document goes to, such that no text is in training and in validation."""

import hashlib
from collections.abc import Iterator

import numpy as np

from doremi_train.data.corpus.opening import BadLines, Piece, Source
from doremi_train.data.corpus.reading import read
from doremi_train.data.corpus.sidecar import Selected, relabels
from doremi_train.data.corpus.sidecar import domains as chosen_domains
from doremi_train.data.options import DataOptions


class Router:
    """Decides the split of every document, such that no text is in validation and in training.

    Order: given validation files, then documents split by hash (the same text falls on the same
    side, whatever its domain), then given training files. A document equal to a validation document
    met before is dropped and counted.
    """

    def __init__(self, options: DataOptions, sources: list[Source]) -> None:
        self.options = options
        self.sources = sources
        rank = {"validation": 0, None: 1, "train": 2}
        # Stable: else as resolved.
        self.order = sorted(sources, key=lambda source: rank[source.split])
        self.dropped = 0
        self._validation = HashSet()
        self._mixed = any(source.split == "train" for source in sources)
        self._threshold = _threshold(options)
        self._relabels = relabels(options)
        self._domains = None if self._relabels else chosen_domains(options)

    def pieces(self, source: Source, bad: BadLines) -> Iterator[tuple[str, Piece]]:
        """(split, piece) of the source, without what is dropped."""
        split: str | None = None
        first = True
        selected = Selected(self.options, self.sources, source) if self._select(source) else None
        for piece in read(source, self.options, bad):
            kept = [piece] if selected is None else selected.parts(piece)
            if self._domains is not None and piece.domain not in self._domains:
                continue
            if first:
                split = self._split(piece)
                self.dropped += split is None
            first = piece.last
            if split is not None and (split == "train" or self._relabels):
                yield from ((split, part) for part in kept)
            elif split is not None:
                yield split, piece

    def _select(self, source: Source) -> bool:
        return self.options.selection is not None and (
            self._relabels or source.split != "validation"
        )

    def _split(self, piece: Piece) -> str | None:
        """Split of the document that begins with this piece; None: dropped."""
        key = _key(piece)
        if piece.split == "validation":
            self._validation.add(key)
            return "validation"
        if key in self._validation:
            # Split off by hash in another domain: both copies are validation documents.
            return "validation" if piece.split is None and key < self._threshold else None
        if piece.split is None and key < self._threshold:
            if self._mixed:  # else the hash alone keeps the splits apart
                self._validation.add(key)
            return "validation"
        return "train"


def held_out(piece: Piece, options: DataOptions) -> bool:
    """Whether the document that begins with this piece is for validation, by its source or by its
    hash."""
    return piece.split == "validation" or (
        piece.split is None and _key(piece) < _threshold(options)
    )


def _key(piece: Piece) -> int:
    content = (
        piece.text.encode() if piece.text is not None else np.asarray(piece.tokens, "<i8").tobytes()
    )
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _threshold(options: DataOptions) -> float:
    return options.validation_fraction * 2.0**64


class HashSet:
    """A set of 64-bit integers at about 8 bytes each: validation sets of any size fit the
    memory."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._new: set[int] = set()

    def add(self, key: int) -> None:
        self._new.add(key)
        if len(self._new) >= 2**18:
            self._sorted = np.union1d(self._sorted, np.fromiter(self._new, np.uint64))
            self._new.clear()

    def __contains__(self, key: int) -> bool:
        if key in self._new:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        return place < len(self._sorted) and int(self._sorted[place]) == key

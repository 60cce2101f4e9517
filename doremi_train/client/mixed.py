"""Several datasets as one, in the order in which a stream draws from them."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

from doremi_train.client.stream import Stream
from doremi_train.config import UserError

_KEPT = 4  # steps whose draws are kept: a loader asks for a row after the other


class Rows(Protocol):
    """Anything with a length and a number for every row: a list, an array, a map-style dataset."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Any: ...


class Mixed:
    """A map-style dataset of `steps` batches: row i is row i mod b of step i // b.

    Read it in order (a sequential sampler, no shuffling): ranks and workers may divide it as they
    like, and a loader that skips what was read already continues exactly. Give the loaders a batch
    so that all ranks and micro-batches of a step together have the stream's. An item is the
    domain's own where that is a mapping, else {"input_ids": item, "labels": item}; `domain` is
    added, the number of its domain.

    Raises UserError where domains are not those of the stream, or of another length.
    """

    def __init__(self, domains: Mapping[str, Rows], stream: Stream, steps: int) -> None:
        lengths = {name: len(rows) for name, rows in domains.items()}
        if lengths != stream.sizes:
            raise UserError(
                f"Mixed: domains of {lengths!r:.300} rows, but the stream is of "
                f"{stream.sizes!r:.300}; give both the same"
            )
        self.stream, self.steps = stream, steps
        self._domains = [domains[name] for name in stream.names]
        self._draws: OrderedDict[int, list[tuple[int, int]]] = OrderedDict()

    def __len__(self) -> int:
        return self.steps * self.stream.batch

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        step, row = divmod(number, self.stream.batch)
        domain, sequence = self._draw(step)[row]
        item = self._domains[domain][sequence]
        named = item if isinstance(item, Mapping) else {"input_ids": item, "labels": item}
        return {**named, "domain": domain}

    def _draw(self, step: int) -> list[tuple[int, int]]:
        """Domain and sequence of every row."""
        if step not in self._draws:
            domain, sequence, _ = self.stream.draw(step)
            self._draws[step] = [*zip(domain.tolist(), sequence.tolist(), strict=True)]
            while len(self._draws) > _KEPT:
                self._draws.popitem(last=False)
        return self._draws[step]

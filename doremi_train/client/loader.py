"""The part of one process in the batches of a stream, for trainers that keep a loader's state."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from doremi_train.client.mixed import Mixed
from doremi_train.config import UserError


class Loader:
    """A torch DataLoader over a `Mixed`, read in order: micro-batches of `rows` rows for process
    `rank` of `size`, all of which together take the next part of the stream's batch.

    Its state is how many rows all of them were given, whatever its workers have read ahead, so
    another number of processes may go on. `more` is the DataLoader's: num_workers, collate_fn, ….

    Raises UserError where the processes' rows do not divide the stream's batch.
    """

    def __init__(self, mixed: Mixed, rows: int, rank: int = 0, size: int = 1, **more: Any) -> None:
        self._mixed, self._rows, self._rank, self._more = mixed, rows, rank, more
        self.size = size
        self._at_once = rows * size
        if rows < 1 or mixed.stream.batch % self._at_once:
            raise UserError(
                f"Loader: rows={rows}: {size} processes read {self._at_once} rows at once, which "
                f"does not divide the stream's batch of {mixed.stream.batch}; make it so"
            )
        self._given = 0  # rows, of all processes

    def __len__(self) -> int:
        """Micro-batches of the whole run."""
        return len(self._mixed) // self._at_once

    def __iter__(self) -> Iterator[Any]:
        first = self._rank * self._rows
        starts = range(self._given + first, len(self._mixed), self._at_once)
        parts: Any = (range(start, start + self._rows) for start in starts)
        mixed: Any = self._mixed  # a map-style dataset, which torch's annotation wants as a class
        for micro in DataLoader(mixed, batch_sampler=parts, **self._more):
            self._given += self._at_once
            yield micro
        self._given = 0

    def check(self, processes: int, micro_batches: int) -> None:
        """Raise UserError where a step of so many processes and micro-batches is not the
        stream's."""
        batch = self._mixed.stream.batch
        if self.size != processes or self._at_once * micro_batches != batch:
            raise UserError(
                f"Loader: rows={self._rows}, size={self.size}: with {micro_batches} micro-batches "
                f"a step of {processes} processes reads {self._rows * processes * micro_batches} "
                f"rows, the stream's has {batch}; make them agree"
            )

    def state_dict(self) -> dict[str, int]:
        return {"rows": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there in the next iteration. Raises UserError where that is in the middle of
        what these processes read at once."""
        if state["rows"] % self._at_once:
            raise UserError(
                f"Loader: {state['rows']} rows were read, which is no multiple of the "
                f"{self._at_once} that these processes read at once; resume with as many as before"
            )
        self._given = state["rows"]

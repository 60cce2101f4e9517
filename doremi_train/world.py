"""Rank arithmetic as a value: who does which part of a global batch."""

from typing import NamedTuple

from doremi_train.config import UserError


class World(NamedTuple):
    """`size` processes, of which this is number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int, micro: int) -> list[slice]:
        """Rows of the global batch that this rank takes, one slice for each of its micro-batches.

        Micro-batch m of all ranks together is one contiguous block, so a rank's share does not depend on its size.
        """
        return [slice(start, start + micro) for start in range(self.rank * micro, batch, self.size * micro)]

    def micro_batch(self, batch: int, micro: int | None) -> int:
        """The micro-batch size per process: as asked, or the largest. Raises UserError where it does not divide."""
        if micro is None and batch % self.size == 0:
            return batch // self.size
        if micro is None or batch % (micro * self.size):
            asked = f"training.micro_batch_size={micro}" if micro else "the number of processes"
            raise UserError(
                f"training.batch_size={batch}: must be a multiple of micro-batch size × processes "
                f"({micro or 1} × {self.size}); change it or {asked}"
            )
        return micro

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

    def rows(self, batch: int, micro: int | None) -> list[slice]:
        """Rows of the global batch that this rank takes, one slice for each of its micro-batches of
        at most `micro` rows (None: all of its share).

        All ranks take the same number of micro-batches, because each is a collective under
        sharding; where the batch does not divide, their sizes differ by one row, and some may be
        empty. Micro-batch m of all ranks together is one contiguous block, so a rank's share does
        not depend on its size.

        Raises UserError where there are more processes than rows.
        """
        if batch < self.size:
            raise UserError(
                f"training.batch_size={batch}: is less than the number of processes ({self.size}); "
                "raise it, or start fewer"
            )
        parts = -(-batch // ((micro or batch) * self.size))
        slots = [part * self.size + self.rank for part in range(parts)]
        return [
            slice(slot * batch // (parts * self.size), (slot + 1) * batch // (parts * self.size))
            for slot in slots
        ]

    def largest(self, batch: int, micro: int | None) -> int:
        """Rows of the largest micro-batch of any rank."""
        return max(
            part.stop - part.start
            for rank in range(self.size)
            for part in World(rank, self.size).rows(batch, micro)
        )

"""Curves kept in few pieces: sums of rows (K,), one a step, in at most `PIECES` pieces of equal
length, of which two become one where there is no room. So a piece is an eighth to a sixteenth of
the curve so far, however long; before there are eight steps it is one step.

K columns, P pieces.
"""

import torch
from torch import Tensor

PIECES = 16
FEWEST = 8  # full pieces to judge by


def empty(columns: int) -> Tensor:
    """(P, K) of a curve before its first step."""
    return torch.zeros(PIECES, columns, dtype=torch.float64)


def length(steps: int) -> int:
    """Steps of a piece, of a curve of so many: the least power of two with which there is room."""
    return 1 << max(0, -(-steps // PIECES) - 1).bit_length()


def add(sums: Tensor, steps: int, row: Tensor) -> Tensor:
    """(P, K) sums with the row (K,) of step number `steps`, counted from 1."""
    sums, size = sums.clone(), length(steps)
    if steps > 1 and size > length(steps - 1):
        sums[: PIECES // 2] = sums[0::2] + sums[1::2]
        sums[PIECES // 2 :] = 0
    sums[(steps - 1) // size] += row
    return sums


def means(sums: Tensor, steps: int) -> Tensor:
    """(P', K) means of the pieces after `steps` steps; none while the last one is not full."""
    size = length(steps)
    return sums[: 0 if steps % size else steps // size] / size

"""The gradients of single examples as their factors: one type for each use that a layer makes of a
parameter.

n examples, T tokens of each, p outputs and d inputs of a layer, r size of a sketch. Sums are
float32 where factors are bf16, float64 where they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NUMBERS = 1 << 20  # of materialised rows that may exist at once


class Factor(Protocol):
    """One use of a parameter of shape (p, d), or (p,). What it says of itself here is true of most;
    others say otherwise."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""

    @property
    def floats(self) -> Tensor:
        """(n, T, …), one of its tensors, on the device and of the type of all its floats."""

    def rows(self, rows: slice) -> Tensor:
        """(n, rows, d) or (n, rows): these rows of every example's gradient."""

    def tokens(self, direction: Tensor) -> Tensor:
        """(n, T) what every token adds to ⟨g_i, direction⟩."""

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_i weights_i g_i, for weights (n,)."""

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        """(n, …) leftᵀ g_i right, for left (p, r) and right (d, r); of a vector leftᵀ g_i."""

    def at(self, examples: Tensor) -> "Factor":
        """The factor of these examples alone, by index."""

    # ── What is cheapest ────────────────────────────────────────────────────────────

    def gram(self) -> Tensor | None:
        """(n, n) ⟨g_i, g_j⟩ from products of all tokens with each other; None where that costs more
        than rows."""
        return None

    @property
    def skips(self) -> bool:
        """Whether its weighted sum costs least as it is, rather than with a copy of the examples of
        other weights than 0: a sum over tokens is read but once."""
        return False

    @property
    def sparse(self) -> bool:
        """Whether most rows are 0, so that only some are looked at, and it is added in place."""
        return False

    def compact(self) -> tuple[Tensor | slice, "Factor"]:
        """Numbers of the rows that are looked at, and the factor over these alone."""
        return slice(None), self

    def added(self, total: Tensor, weights: Tensor) -> Tensor:
        """`total` (p, …) and Σ_i weights_i g_i; `total` may be used up."""
        return total + self.weighted(weights)

    def added_rows(self, total: Tensor, rows: slice) -> Tensor:
        """`total` (n, rows, …) and these rows; `total` may be used up."""
        return total + self.rows(rows)


# The gradients of n examples: all uses of every parameter, by its name.
Examples = Mapping[str, tuple[Factor, ...]]
Direction = Mapping[str, Tensor]  # one vector as long as the parameters, by their names


@dataclass(frozen=True, eq=False)
class Outer(Factor):
    """Σ_t left_t right_tᵀ: a linear layer."""

    left: Tensor  # (n, T, p)
    right: Tensor  # (n, T, d)
    # (n, T, r) each: their products with the sides of a sketch
    known: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape[-1], self.right.shape[-1]

    @property
    def floats(self) -> Tensor:
        return self.left

    @property
    def short(self) -> bool:
        """Whether products of tokens cost less than rows."""
        n, T, p = self.left.shape
        d = self.right.shape[-1]
        return n * T * (p + d) < p * d and (n * T) ** 2 <= NUMBERS

    def gram(self) -> Tensor | None:
        if not self.short:
            return None
        n, T = self.left.shape[:2]
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        pairs = (left @ left.T).to(wide(left)) * (right @ right.T)
        return pairs.view(n, T, n, T).sum((1, 3))

    @property
    def skips(self) -> bool:
        return in_place(self.left)

    def rows(self, rows: slice) -> Tensor:
        return self.left[..., rows].mT @ self.right

    def tokens(self, direction: Tensor) -> Tensor:
        return _dot(self.left @ direction.to(self.left.dtype), self.right)

    def weighted(self, weights: Tensor) -> Tensor:
        left, right = self.left, self.right
        if in_place(left):  # example by example, without a copy of any
            total = left.new_zeros(self.shape)
            for run, weight in _runs(weights):
                total.addmm_(left[run].flatten(0, 1).T, right[run].flatten(0, 1), alpha=weight)
            return total
        if self.shape[0] < self.shape[1]:
            left = left * weights[:, None, None].to(left.dtype)
        else:
            right = right * weights[:, None, None].to(right.dtype)
        return left.flatten(0, 1).T @ right.flatten(0, 1)

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        assert right is not None
        if self.known is not None and [side.shape[-1] for side in self.known] == [
            left.shape[1],
            right.shape[1],
        ]:
            of_left, of_right = self.known
        else:  # of no sketch, or of one of another size
            of_left, of_right = (
                self.left @ left.to(self.left.dtype),
                self.right @ right.to(self.right.dtype),
            )
        return of_left.mT @ of_right

    def at(self, examples: Tensor) -> "Outer":
        return Outer(self.left.index_select(0, examples), self.right.index_select(0, examples))


@dataclass(frozen=True, eq=False)
class Lookup(Factor):
    """Σ_t e(id_t) values_tᵀ: an embedding."""

    ids: Tensor  # (n, T)
    values: Tensor  # (n, T, d)
    size: int  # V

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.values.shape[-1]

    @property
    def floats(self) -> Tensor:
        return self.values

    @property
    def sparse(self) -> bool:
        return True

    def rows(self, rows: slice) -> Tensor:
        n, _, d = self.values.shape
        height = min(rows.stop, self.size) - rows.start
        return self.added_rows(self.values.new_zeros(n, height, d, dtype=wide(self.values)), rows)

    def added_rows(self, total: Tensor, rows: slice) -> Tensor:
        if total.dtype != wide(self.values):
            return total + self.rows(rows)
        n, height, d = total.shape
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        of_example = torch.arange(n, device=self.ids.device)[:, None].expand_as(self.ids)[inside]
        place = of_example * height + self.ids[inside] - rows.start
        total.view(n * height, d).index_add_(0, place, self.values[inside].to(total.dtype))
        return total

    def tokens(self, direction: Tensor) -> Tensor:
        return _dot(self.values, direction[self.ids])

    def weighted(self, weights: Tensor) -> Tensor:
        return self.added(self.values.new_zeros(self.shape, dtype=wide(self.values)), weights)

    def added(self, total: Tensor, weights: Tensor) -> Tensor:
        values = self.values.to(total.dtype) * weights[:, None, None].to(total.dtype)
        return total.index_add_(0, self.ids.flatten(), values.flatten(0, 1))

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        assert right is not None
        return left[self.ids].mT @ (self.values @ right.to(self.values.dtype)).to(left.dtype)

    def at(self, examples: Tensor) -> "Lookup":
        return Lookup(self.ids[examples], self.values[examples], self.size)

    def compact(self) -> tuple[Tensor, "Lookup"]:
        present, ids = self.ids.unique(return_inverse=True)
        return present, Lookup(ids, self.values, len(present))


@dataclass(frozen=True, eq=False)
class Sum(Factor):
    """Σ_t values_t: a bias, or the scale of a norm."""

    values: Tensor  # (n, T, p)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.values.shape[-1],)

    @property
    def floats(self) -> Tensor:
        return self.values

    @property
    def skips(self) -> bool:
        return True

    def rows(self, rows: slice) -> Tensor:
        return self.values[..., rows].sum(1, dtype=wide(self.values))

    def tokens(self, direction: Tensor) -> Tensor:
        return _dot(self.values, direction)

    def weighted(self, weights: Tensor) -> Tensor:
        rows = self.rows(slice(0, None))
        chosen = weights.nonzero()[:, 0]  # others may not be finite: not even 0 times
        return weights[chosen].to(rows.dtype) @ rows[chosen]

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        return self.rows(slice(0, None)).to(left.dtype) @ left

    def at(self, examples: Tensor) -> "Sum":
        return Sum(self.values[examples])


# ── What they have in common ────────────────────────────────────────────────────────


def blocks(rows: int, width: int) -> Iterator[slice]:
    """0 … rows in pieces of so few that `width` numbers for each of them stay within bounds."""
    step = max(1, NUMBERS // max(1, width))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def in_place(left: Tensor) -> bool:
    """Whether products of examples are best added up one after the other: on a GPU each would be a
    launch, and in bf16 the sum would be rounded as often."""
    return left.device.type == "cpu" and left.dtype == wide(left)


def _runs(weights: Tensor) -> list[tuple[slice, float]]:
    """Examples that follow each other and have the same weight; those of weight 0 left out."""
    runs: list[tuple[slice, float]] = []
    for number, weight in enumerate(weights.tolist()):
        if runs and runs[-1] == (slice(runs[-1][0].start, number), weight):
            runs[-1] = slice(runs[-1][0].start, number + 1), weight
        elif weight:
            runs.append((slice(number, number + 1), weight))
    return runs


def wide(tensor: Tensor) -> torch.dtype:
    """What sums are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ over the last dimension, in float32 at least."""
    return (left.to(wide(left)) * right).sum(-1)

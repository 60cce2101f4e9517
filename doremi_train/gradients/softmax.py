"""Factors of a projection onto the vocabulary, whose output gradients are softmax minus target."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from doremi_train.gradients import factors
from doremi_train.gradients.factors import Factor, Outer, Sum


@dataclass(frozen=True, eq=False)
class Softmax(Factor):
    """The output projection under a cross-entropy. Its left factor is (softmax − 1 at the target) ·
    gradient: whole where it is small, else made again where it is needed, some rows at a time, so
    that the logits of all tokens never exist."""

    hidden: Tensor  # (n, T, d)
    targets: Tensor  # (n, T)
    normalizers: Tensor  # (n, T) log Σ exp(logits)
    gradient: Tensor  # (n, T) of the token's loss
    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    # (n, T, r) its product with the left side of a sketch, where a backward left it
    known: Tensor | None = None
    whole: Tensor | None = None  # (n, T, V) itself, where a backward left it

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def floats(self) -> Tensor:
        return self.hidden

    @property
    def skips(self) -> bool:
        return self.whole is not None and factors.in_place(self.whole)

    def left(self, rows: slice) -> Tensor:
        """(n, T, rows)"""
        if self.whole is not None:
            return self.whole[..., rows]
        logits = self.hidden @ self.weight[rows].T.to(self.hidden.dtype)
        if self.bias is not None:
            logits = logits + self.bias[rows].to(logits.dtype)
        left = logits.to(self.normalizers.dtype).sub_(self.normalizers[..., None]).exp_()
        inside = (self.targets >= rows.start) & (self.targets < rows.stop)
        index = (self.targets - rows.start).clamp(0, left.shape[-1] - 1)
        left.scatter_add_(-1, index[..., None], -inside[..., None].to(left.dtype))
        return left.mul_(self.gradient[..., None]).to(self.hidden.dtype)

    def rows(self, rows: slice) -> Tensor:
        return self.left(rows).mT @ self.hidden

    def tokens(self, direction: Tensor) -> Tensor:
        return sum(
            (Outer(self.left(r), self.hidden).tokens(direction[r]) for r in self._blocks()),
            torch.tensor(0.0),
        )

    def weighted(self, weights: Tensor) -> Tensor:
        if self.whole is not None:
            return Outer(self.whole, self.hidden).weighted(weights)
        right = (self.hidden * weights[:, None, None].to(self.hidden.dtype)).flatten(0, 1)
        total = right.new_empty(self.shape)
        for rows in self._blocks():
            torch.mm(self.left(rows).flatten(0, 1).T, right, out=total[rows])
        return total

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        of_left = self.known
        if of_left is None or of_left.shape[-1] != left.shape[1]:
            of_left = sum(
                (self.left(r) @ left[r].to(self.hidden.dtype) for r in self._blocks()),
                torch.tensor(0.0),
            )
        assert right is not None
        return of_left.mT @ (self.hidden @ right.to(self.hidden.dtype))

    def at(self, examples: Tensor) -> "Softmax":
        hidden, targets, normalizers, gradient = (
            field.index_select(0, examples)
            for field in (self.hidden, self.targets, self.normalizers, self.gradient)
        )
        whole = None if self.whole is None else self.whole.index_select(0, examples)
        return Softmax(hidden, targets, normalizers, gradient, self.weight, self.bias, whole=whole)

    def _blocks(self) -> Iterator[slice]:
        width = self.targets.numel() if self.whole is None else 0
        return factors.blocks(len(self.weight), width)


@dataclass(frozen=True, eq=False)
class SoftmaxBias(Factor):
    """The bias of that projection."""

    of: Softmax

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.of.weight),)

    @property
    def floats(self) -> Tensor:
        return self.of.hidden

    def rows(self, rows: slice) -> Tensor:
        return self.of.left(rows).sum(1)

    def tokens(self, direction: Tensor) -> Tensor:
        return sum(
            (Sum(self.of.left(r)).tokens(direction[r]) for r in self.of._blocks()),
            torch.tensor(0.0),
        )

    def weighted(self, weights: Tensor) -> Tensor:
        return torch.cat([Sum(self.of.left(r)).weighted(weights) for r in self.of._blocks()])

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        return sum(
            (Sum(self.of.left(r)).sketched(left[r], None) for r in self.of._blocks()),
            torch.tensor(0.0),
        )

    def at(self, examples: Tensor) -> "SoftmaxBias":
        return SoftmaxBias(self.of.at(examples))

"""LESS: Selecting Influential Data for Targeted Instruction Tuning (Xia et al. 2024,
https://arxiv.org/abs/2402.04333).

What a step on the training example z does to the loss of a target's examples, summed over the
checkpoints of a warm-up:

    Inf(z, s) = Σ_i η̄_i · cos(∇ℓ(s; θ_i), Γ(z; θ_i))   s a subtask of the target, of any examples
    Γ(z; θ)   = m̂ / (√v̂ + ε)                            the direction of AdamW's step on z alone
    m = β₁ m_{t−1} + (1 − β₁) ∇ℓ(z; θ),   m̂ = m / (1 − β₁ᵗ),     and v alike of the squared gradient
    score(z)  = max over s of Inf(z, s)

A gradient is that of the mean loss of an example's tokens, without dropout. The cosine stands there
because gradients are the shorter the longer the example. Γ is not linear in ∇ℓ(z), so it has to
exist: a block of rows at a time.

C checkpoints, N examples, S subtasks, k numbers of a projection.
"""

import functools
import hashlib
from typing import Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT


@dataclass(frozen=True, config=STRICT)
class Options:
    """The paper prints ε inside the root. Its code does so too, corrects no bias, and takes the
    mean of cosines."""

    epsilon: Literal["outside", "inside"] = "outside"
    """Where ε stands in AdamW's direction: outside the root, or inside it, as the paper prints."""

    bias_correction: bool = True
    """Whether AdamW's moments are corrected for their start; false is the published code's."""

    cosine: Literal["of_mean", "mean"] = "of_mean"
    """Cosine with a subtask's mean gradient, or the mean of cosines with each of its examples."""


class Moments(NamedTuple):
    """AdamW's state of one parameter, or of a part of it, before the step on an example."""

    first: Tensor
    second: Tensor
    step: int  # that were taken: t − 1
    betas: tuple[float, float]
    epsilon: float


def direction(gradient: Tensor, moments: Moments, options: Options) -> Tensor:
    """Γ of gradients (…, *shape) of examples, for moments of `shape`. AdamW moves by −η Γ, without
    its decay."""
    (beta1, beta2), t = moments.betas, moments.step + 1
    of_first, of_second = (1 - beta1**t, 1 - beta2**t) if options.bias_correction else (1.0, 1.0)
    moved = torch.add(moments.first * (beta1 / of_first), gradient, alpha=(1 - beta1) / of_first)
    root = torch.addcmul(
        moments.second * (beta2 / of_second), gradient, gradient, value=(1 - beta2) / of_second
    )
    if options.epsilon == "inside":
        return moved.div_(root.add_(moments.epsilon).sqrt_())
    return moved.div_(root.sqrt_().add_(moments.epsilon))


def influence(cosines: Tensor, rates: Tensor) -> Tensor:
    """(N, S) of cosines (C, N, S) and the mean learning rates (C,) of the warm-up's epochs."""
    return torch.einsum("c,cns->ns", rates.to(cosines), cosines)


def score(influences: Tensor) -> Tensor:
    """(N,) of influences (N, S): how much an example serves the subtask that it serves best."""
    return influences.amax(1)


def top(scores: Tensor, count: int) -> Tensor:
    """(≤ count,) indices of the highest finite scores, highest first; of equal ones the lower
    index."""
    order = scores.nan_to_num(nan=-torch.inf, posinf=-torch.inf).argsort(
        descending=True, stable=True
    )
    return order[: min(count, int(scores.isfinite().sum()))]


# ── Projection ──────────────────────────────────────────────────────────────────────
#
# Number j of a parameter's gradient is added to number (j + shift) mod k of the projection with a
# random sign; the shift is drawn for each k numbers that follow each other. Inner products stay
# what they were on average, at the cost of one addition a number. Signs and shifts are hashes of
# where a number stands, and every number of the projection is added up in the order of j: so it has
# the same bits on any device, in any batch, and however the parameter is cut.


class Projection:
    """Adds up the projections (N, k) of vectors of N examples, given parameter by parameter in
    pieces, in order."""

    def __init__(self, count: int, size: int, seed: int, like: Tensor) -> None:
        # The second half holds what goes over the end of the first.
        self._sums = like.new_zeros(count, 2 * size)
        self.size, self._seed = size, seed

    def add(self, name: str, numbers: int, start: int, values: Tensor) -> None:
        """Values (N, …) are those from number `start` on of the parameter `name`, which has so many
        `numbers`."""
        end, k = start + values.shape[1], self.size
        signs = _signs(name, self._seed, numbers, values.device)
        shifts = _shifts(name, self._seed, -(-numbers // k), k)
        for row in range(start // k, -(-end // k)):
            low, high = max(start, row * k), min(end, (row + 1) * k)
            at = low - row * k + shifts[row]
            self._sums[:, at : at + high - low].addcmul_(
                values[:, low - start : high - start], signs[low:high].to(values.dtype)
            )

    def result(self) -> Tensor:
        return self._sums[:, : self.size] + self._sums[:, self.size :]


@functools.lru_cache(maxsize=4096)
def _signs(name: str, seed: int, numbers: int, device: torch.device) -> Tensor:
    """(numbers,) ±1"""
    words = _hash(torch.arange(-(-numbers // 32), device=device), _key(name, seed) & _MASK)
    bits = (words[:, None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits).to(torch.int8).flatten()[:numbers]


@functools.lru_cache(maxsize=4096)
def _shifts(name: str, seed: int, rows: int, size: int) -> list[int]:
    return (_hash(torch.arange(rows), _key(name, seed) >> 32) % size).tolist()


def _key(name: str, seed: int) -> int:
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little"
    )


_MASK = 2**32 - 1


def _hash(counters: Tensor, key: int) -> Tensor:
    """32 random bits for every counter below 2³² (Wellons' lowbias32), in integers that are the
    same everywhere."""
    x = (counters ^ key) & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 16)

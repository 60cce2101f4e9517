"""Cross-entropy of every token, fused with the output projection, so that the logits of all tokens
never exist at once.

Both directions go over the logits a tile at a time, some tokens by some entries of the vocabulary:
the forward keeps the log-sum-exp of every token, the backward computes the tile again and turns it
into its gradient in place. Tiles are square where they can be, for then the head and the hidden
states pass through memory least often. The gradient is not fixed in the forward, because DoReMi
weighs the losses by what they turn out to be; this rules out torch's own chunked
`linear_cross_entropy`, which computes gradients in the forward. Of the kernel libraries, Liger's
gave wrong gradients for weighted per-token losses until July 2026, and cut-cross-entropy leaves
small gradients out unless told otherwise; neither was tried here on a GPU, so none is used.

N tokens, d hidden size, V vocabulary.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass
class Also:
    """What is left of the gradient of the logits after a backward: its product with `right`, and
    all of it where it is at most `keep` numbers."""

    right: Tensor | None = None  # (V, r)
    keep: int = 0
    product: Tensor | None = None  # (N, r)
    gradient: Tensor | None = None  # (N, V)


class Projection(nn.Module):
    """Losses (N,) in nats from hidden states (N, d) and targets (N,): float32, or float64 where the
    states are.

    It shares the parameters of the model's own head. It is a module of its own because sharding
    engines gather a module's parameters when it is called. Under autocast the products are bf16,
    and the softmax float32, as there.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.hidden_size = head.weight, head.bias, head.in_features
        self.also: Also | None = None

    def forward(self, hidden: Tensor, targets: Tensor, logits: int) -> Tensor:
        """`logits` is how many may exist at once."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        losses: Tensor
        if self.also is None:
            losses = _CrossEntropy.apply(hidden, self.weight, self.bias, targets, logits, dtype)
        else:
            losses = _OfHiddenAlone.apply(
                hidden, self.weight, self.bias, targets, logits, dtype, self.also
            )
        return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logits: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.tiles, ctx.dtype = _tiles(len(hidden), len(weight), logits), dtype
        cast, head, bias_ = (
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
        wide = torch.promote_types(dtype, torch.float32)
        right = torch.zeros(len(hidden), dtype=wide, device=hidden.device)  # logits of the targets
        normalizers = torch.full_like(right, -math.inf)  # log Σ exp(logits), of every token
        for rows, columns in ctx.tiles:
            z = F.linear(cast[rows], head[columns], None if bias_ is None else bias_[columns]).to(
                wide
            )
            place, inside = _place(targets[rows], columns)
            right[rows] += torch.where(inside, z.gather(1, place)[:, 0], 0)
            # A tile may be −∞ throughout.
            top = z.amax(1, keepdim=True).clamp_min(torch.finfo(wide).min)
            part = z.sub_(top).exp_().sum(1).log_().add_(top[:, 0])
            normalizers[rows] = torch.logaddexp(normalizers[rows], part)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        return normalizers - right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        dtype = ctx.dtype
        cast, head, bias_ = (
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        for rows, columns in ctx.tiles:
            # ∂/∂logits = (softmax − 1 at the target) · gradient of the token's loss
            z = F.linear(cast[rows], head[columns], None if bias_ is None else bias_[columns]).to(
                gradient.dtype
            )
            z.sub_(normalizers[rows, None]).exp_()
            place, inside = _place(targets[rows], columns)
            z.scatter_add_(1, place, -inside[:, None].to(z.dtype)).mul_(gradient[rows, None])
            if of_bias is not None:
                of_bias[columns] += z.sum(0)
            z = z.to(dtype)
            if of_hidden is not None:
                _add_product(of_hidden[rows], z, head[columns])
            if of_weight is not None:
                _add_product(of_weight[columns], z.T, cast[rows])
        return of_hidden, of_weight, of_bias, None, None, None


class _OfHiddenAlone(torch.autograd.Function):
    """The same where nobody asks for the gradient of the head. All that is left of a token, the
    gradient of its hidden state first of all, is in proportion to the gradient of its loss; so it
    is made for 1 in the forward, while the token's logits are there, and the backward has none to
    compute again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logits: int,
        dtype: torch.dtype,
        also: Also,
    ) -> Tensor:
        cast, head, bias_ = (
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
        wide = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        width = hidden.shape[1]
        # One product gives both: that with a few columns alone would take as long.
        sides = head if also.right is None else torch.cat([head, also.right.to(dtype)], 1)
        products = cast.new_empty(len(hidden), sides.shape[1])
        also.gradient = (
            cast.new_empty(len(hidden), len(head)) if len(hidden) * len(head) <= also.keep else None
        )
        for rows in _slices(len(hidden), _rows(len(head), logits, hidden.device.type)):
            into = also.gradient[rows] if also.gradient is not None and dtype == wide else None
            z = torch.mm(cast[rows], head.T, out=into)
            z = (z if bias_ is None else z.add_(bias_)).to(wide)
            place = targets[rows, None]
            of_target, top = z.gather(1, place), z.amax(1, keepdim=True)
            torch.softmax(z, 1, out=z)
            # log Σ exp(logits) is the highest logit less the logarithm of its part, which is never
            # below 1 / V
            torch.sub(top - z.amax(1, keepdim=True).log_(), of_target, out=losses[rows, None])
            z.scatter_add_(1, place, z.new_full((1, 1), -1.0).expand_as(place))
            z = z.to(dtype)
            if also.gradient is not None and into is None:
                also.gradient[rows] = z
            torch.mm(z, sides, out=products[rows])
        also.product = None if also.right is None else products[:, width:]
        ctx.also, ctx.dtype = also, hidden.dtype
        ctx.save_for_backward(products[:, :width].contiguous())
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        each = gradient[:, None]
        if gradient.ne(1).any():  # most often the losses were added up, and all is as it should be
            for left in (ctx.also.product, ctx.also.gradient):
                if left is not None:
                    left.mul_(each)
            of_hidden = of_hidden * each
        return of_hidden.to(ctx.dtype), None, None, None, None, None, None


def _rows(vocabulary: int, logits: int, device: str) -> int:
    """Tokens whose logits are computed together: on a CPU so few that these stay in its cache, if
    that is enough for a product of matrices."""
    most = max(1, logits // vocabulary)
    return min(most, max(_ROWS_ON_CPU, _CACHED_ON_CPU // vocabulary)) if device == "cpu" else most


# Seen on one thread, 2026-11-21: the softmax of 4096 × 1024 logits took 3.9 ms in pieces of 256
# rows, 5.3 ms at once; a product of 64 rows as long a row as one of 256, one of 16 twice as long.
_ROWS_ON_CPU, _CACHED_ON_CPU = 64, 1 << 18


def _tiles(tokens: int, vocabulary: int, logits: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the tiles of (N, V) that have at most so many logits."""
    columns = min(vocabulary, max(math.isqrt(logits), logits // tokens))
    return list(
        itertools.product(_slices(tokens, max(1, logits // columns)), _slices(vocabulary, columns))
    )


def _slices(size: int, length: int) -> list[slice]:
    return [slice(at, min(at + length, size)) for at in range(0, size, length)]


def _place(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(n, 1) of each target among these columns, and (n,) whether it is one of them."""
    place = targets - columns.start
    nearest = place.clamp(0, columns.stop - columns.start - 1)
    return nearest[:, None], place == nearest


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.dtype == left.dtype:
        torch.addmm(to, left, right, out=to)
    else:
        to += left @ right

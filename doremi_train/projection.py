"""Cross-entropy of every token, fused with the output projection, so that the logits of all tokens never exist at once.

Both directions go over the tokens a chunk at a time: the forward keeps the log-sum-exp of every token, the backward
computes the chunk's logits again and turns them into their gradient in place. The gradient is not fixed in the forward,
because DoReMi weighs the losses by what they turn out to be; this rules out torch's own chunked `linear_cross_entropy`,
which computes gradients in the forward. Of the kernel libraries, Liger's gave wrong gradients for weighted per-token
losses until July 2026, and cut-cross-entropy leaves small gradients out unless told otherwise; neither was tried here
on a GPU, so none is used.

N tokens, d hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass
class Also:
    """What a backward leaves of the gradient of the logits: all of it, where it exists at one time, else its product
    with `right`."""

    right: Tensor | None = None  # (V, r)
    product: Tensor | None = None  # (N, r)
    gradient: Tensor | None = None  # (N, V)


class Projection(nn.Module):
    """Losses (N,) in nats from hidden states (N, d) and targets (N,): float32, or float64 where the states are.

    It shares the parameters of the model's own head. It is a module of its own because sharding engines gather a
    module's parameters when it is called. Under autocast the products are bf16, and the softmax float32, as there.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.hidden_size = head.weight, head.bias, head.in_features
        self.also: Also | None = None

    def forward(self, hidden: Tensor, targets: Tensor, logits: int) -> Tensor:
        """`logits` is how many may exist at once."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows = max(1, logits // self.weight.shape[0])
        losses: Tensor = _CrossEntropy.apply(hidden, self.weight, self.bias, targets, rows, dtype, self.also)
        return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        dtype: torch.dtype,
        also: Also | None,
    ) -> Tensor:
        ctx.rows, ctx.dtype, ctx.also = rows, dtype, also
        cast, head = hidden.to(dtype), _to(dtype, weight, bias)
        wide = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        normalizers = torch.empty_like(losses)  # log Σ exp(logits), of every token
        for n in range(0, len(hidden), rows):
            chunk = slice(n, n + rows)
            z = F.linear(cast[chunk], *head).to(wide)
            top = z.amax(1, keepdim=True)
            right = z.gather(1, targets[chunk, None])[:, 0]
            normalizers[chunk] = z.sub_(top).exp_().sum(1).log_().add_(top[:, 0])
            losses[chunk] = normalizers[chunk] - right
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        cast, head = hidden.to(ctx.dtype), _to(ctx.dtype, weight, bias)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        for n in range(0, len(hidden), ctx.rows):
            chunk = slice(n, n + ctx.rows)
            # ∂/∂logits = (softmax − 1 at the target) · gradient of the token's loss
            z = F.linear(cast[chunk], *head).to(gradient.dtype).sub_(normalizers[chunk, None]).exp_()
            z.scatter_add_(1, targets[chunk, None], z.new_full((len(z), 1), -1.0)).mul_(gradient[chunk, None])
            if of_bias is not None:
                of_bias += z.sum(0)
            z = z.to(ctx.dtype)
            if of_hidden is not None:
                of_hidden[chunk] = z @ head[0]
            if ctx.also is not None and len(z) == len(hidden):
                ctx.also.gradient = z
            elif ctx.also is not None and ctx.also.right is not None:
                if ctx.also.product is None:
                    ctx.also.product = z.new_empty(len(hidden), ctx.also.right.shape[1])
                ctx.also.product[chunk] = z @ ctx.also.right.to(z.dtype)
            if of_weight is not None and of_weight.dtype == z.dtype:
                torch.addmm(of_weight, z.T, cast[chunk], out=of_weight)
            elif of_weight is not None:
                of_weight += z.T @ cast[chunk]
        return of_hidden, of_weight, of_bias, None, None, None, None


def _to(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)

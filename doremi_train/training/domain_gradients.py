"""The gradient of every domain of a batch, from one forward and one backward for activations (for
DoGE).

What a layer saw (`gradients.capture`) gives the gradient sum of each domain, which adds up over
micro-batches and processes. Their products decide the weights, and then the step's own gradient is
Σ_k weight_k · sum_k: nothing is computed twice. They are kept, K times the size of the model in
float32 on every process.

K domains, n sequences of a micro-batch, T tokens a sequence, M target sequences, P numbers of a
parameter.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from doremi_train.config import UserError
from doremi_train.data.batches import MicroBatch
from doremi_train.gradients import capture, products
from doremi_train.methods import doge
from doremi_train.parallel import comm


class Target(NamedTuple):
    """Sequences towards which domains are to help."""

    tokens: Tensor  # (M, T + 1); M may be 0: then a domain is to help the others
    batch: int  # of them that a step looks at, one after another


class DomainGradients:
    """Gradients of every domain, taken beside a model on this process."""

    def __init__(
        self, model: nn.Module, domains: int, target: Target, device: torch.device
    ) -> None:
        self._model, self._domains, self._target, self._device = model, domains, target, device
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sums: dict[str, Tensor] = {}  # (K, P) by parameter

    def begin(self) -> None:
        self._sums = {
            name: p.new_zeros(self._domains, p.numel()) for name, p in self._named.items()
        }

    def add(self, micro: MicroBatch) -> Tensor:
        """Losses (n, T) of a micro-batch, without a graph; its gradients are added to the sums."""
        length = micro.tokens.shape[1] - 1
        if not len(micro.tokens):  # of an uneven batch
            return torch.zeros(0, length, device=self._device)
        tokens = micro.tokens.to(self._device, non_blocking=True)
        captured = capture.capture(
            self._model, functools.partial(self._model, tokens), (len(tokens), length)
        )
        with torch.no_grad():
            for k in micro.domain.unique().tolist():
                ones = (micro.domain == k).to(self._device, captured.losses.dtype)
                for name, gradient in products.weighted(captured.examples, ones).items():
                    self._sums[name][k] += gradient.flatten()
        return captured.losses

    def align(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """`doge.align` of the batch over all processes, whose domains have `tokens` (K,), at step
        `step` from 0; (K,) each, on the host. A collective, after which the sums are those of all
        processes."""
        comm.average(list(self._sums.values()))
        size, target = comm.world().size, self._target_gradient(step)
        counts = tokens.clamp_min(1).to(self._device)[:, None]
        alignment, square = torch.zeros(2, self._domains, dtype=torch.float64, device=self._device)
        for name, total in self._sums.items():
            total.mul_(size)
            of_target = None if target is None else target[name].flatten()
            aligned = doge.align((total / counts).to(total.dtype), of_target)
            alignment, square = alignment + aligned[0], square + aligned[1]
        return alignment.cpu(), square.cpu()

    def write(self, weights: Tensor) -> None:
        """Σ_k weights_k · sum_k, for weights (K,), as the model's gradient."""
        for name, total in self._sums.items():
            parameter = self._named[name]
            parameter.grad = (weights.to(total) @ total).view_as(parameter)

    def _target_gradient(self, step: int) -> dict[str, Tensor] | None:
        """Gradient of the mean loss of the sequences that are next. Every process computes all of
        it: all have the same bits."""
        count = len(self._target.tokens)
        if not count:
            return None
        rows = (torch.arange(self._target.batch) + step * self._target.batch) % count
        loss = self._model(self._target.tokens[rows].to(self._device)).mean()
        gradients = torch.autograd.grad(loss, list(self._named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if gradient is None else gradient
            for (name, p), gradient in zip(self._named.items(), gradients, strict=True)
        }


def check(model: nn.Module, strategy: str, compiled: bool) -> None:
    """Raise UserError where gradients cannot be taken apart: of this model, or under this
    engine."""
    if strategy not in ("single", "ddp") or compiled:
        raise UserError(
            "mixture=doge: takes gradients apart layer by layer on whole, uncompiled models; use "
            "engine=ddp without engine.compile"
        )
    try:
        capture.require_factored(model)
    except capture.NotFactored as error:
        raise UserError(f"mixture=doge: {error}; take another model") from None

"""Picking the examples of a step: candidates are scored, some are kept, and their gradients are
taken."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from doremi_train.data.batches import Batch
from doremi_train.gradients import capture, directional, products
from doremi_train.gradients.factors import Examples
from doremi_train.gradients.products import Kept, Products
from doremi_train.methods import greats
from doremi_train.parallel import comm
from doremi_train.training import batch_selection
from doremi_train.training.batch_selection import Setting


class State(NamedTuple):
    """Tensors of an earlier step that a continued run needs."""

    target: dict[str, Tensor]  # the validation gradient, preconditioned; sketched as {"": (R,)}
    curvature: float  # λ


class Chosen(NamedTuple):
    picked: Tensor  # (k,) into the candidates, ascending
    scores: Tensor  # (N,) that the policy looked at
    ratio: float  # penalties over scores
    local: Tensor | None = None  # (…,) of the picks those on this process, into its candidates
    # (…, T) of these, whose backward writes the gradient; None: a second pass is needed.
    losses: Tensor | None = None


class Scores(NamedTuple):
    """A row a candidate, to be added over processes that each fill in their own."""

    value: Tensor  # (N,) loss, |g|² or ⟨g, g_val⟩
    sketch: Tensor  # (N, R)


class Selector:
    """The policy at work beside a model and its optimiser on this process. `state` belongs into
    checkpoints."""

    def __init__(
        self,
        setting: Setting,
        count: int,
        model: nn.Module,
        optimizer: Any,
        device: torch.device,
        one_pass: bool,
        micro: int,
    ) -> None:
        self.options, self.candidates, self.count = setting.options, setting.candidates, count
        self.one_pass = one_pass and setting.options.method in batch_selection.GRADIENT
        self.state = State({}, 1.0)
        self._validation = setting.validation.to(device)
        self._model, self._optimizer, self._device, self._micro = model, optimizer, device, micro

    def __str__(self) -> str:
        passes = "one pass" if self.one_pass else "two passes: the picks are run again"
        return f"{self.options.method} picks {self.count} of {self.candidates}, {passes}"

    def choose(self, batch: Batch, rows: list[slice], step: int, rate: float, seed: int) -> Chosen:
        """Pick from `batch`, of which this process has `rows`, for step number `step` (from 1) of
        learning rate `rate`.

        The same on every process. Raises ArithmeticError where fewer than k candidates have a
        finite score.
        """
        options = self.options
        if options.method == "random":
            generator = np.random.Generator(np.random.Philox(key=[seed, step]))
            scores = torch.from_numpy(generator.permutation(self.candidates).astype(np.float64))
            return self._chosen(greats.top(scores, self.count), scores, rows)
        if options.method in ("greats", "topk"):
            self._look_ahead(step)
        scored, losses, examples, exact = self._score(batch, rows)
        if options.method == "greats":
            # Tokens of a candidate, on average.
            length = float(batch.tokens.sum()) / self.candidates
            gram = scored.sketch @ scored.sketch.T if exact is None else exact.gram
            own = options.curvature == "identity"
            picks = greats.pick(
                scored.value / length,
                gram / length**2,
                self.count,
                rate if own else rate / self.count,  # the paper's step counts η for every pick
                1.0 if own else max(0.0, self.state.curvature),
                options.cosine_cap,
            )
        else:
            picks = greats.top(scored.value, self.count)
        return self._chosen(picks, scored.value, rows, losses, examples, exact)

    def saved(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        target = {name: value.cpu() for name, value in self.state.target.items()}
        return {"target": target, "curvature": self.state.curvature}

    def restore(self, saved: Mapping[str, Any]) -> None:
        target = {name: value.to(self._device) for name, value in saved["target"].items()}
        self.state = State(target, saved["curvature"])

    # ── Scores ──────────────────────────────────────────────────────────────────────

    def _score(
        self, batch: Batch, rows: list[slice]
    ) -> tuple[Scores, Tensor | None, Examples | None, Products | None]:
        """Scores of all candidates; and in one pass losses (n, T), factors and, by GREATS's exact
        route, products."""
        values = torch.zeros(self.candidates, dtype=torch.float64, device=self._device)
        pieces: list[tuple[slice, Tensor]] = []
        losses = examples = exact = None
        for micro, where in zip(batch.micro, rows, strict=True):
            if not len(micro.tokens):
                continue
            tokens = micro.tokens.to(self._device, non_blocking=True)
            if self.options.method == "max_loss":
                with torch.no_grad():
                    values[where] = self._model(tokens).double().sum(1) / micro.carrying.to(
                        self._device
                    )
                continue
            shape = (len(tokens), tokens.shape[1] - 1)
            losses, examples = capture.capture(
                self._model,
                functools.partial(self._model, tokens),
                shape,
                self.options.verify,
                self.options.sketch if self.options.route == "sketch" else None,
            )
            with torch.no_grad():
                if self.options.route == "exact":
                    value, exact = self._exactly(examples)
                else:
                    sketch = products.sketch(examples, self.options.sketch)
                    pieces.append((where, sketch))
                    norm = self.options.method == "grad_norm"
                    value = (
                        sketch.square().sum(1)
                        if norm
                        else sketch @ self.state.target[""].to(sketch.dtype)
                    )
                values[where] = value.double()
        exchanged = self.options.method == "greats" and self.options.route == "sketch"
        sketches = values.new_zeros(self.candidates, len(self.state.target[""]) if exchanged else 0)
        for where, sketch in pieces if exchanged else ():
            sketches[where] = sketch.double()
        return comm.all_reduce_sum(Scores(values, sketches))[0], losses, examples, exact

    def _exactly(self, examples: Examples) -> tuple[Tensor, Products | None]:
        if self.options.method == "grad_norm":
            return products.norm2(examples), None
        if self.options.method == "topk":
            return products.dot(examples, self.state.target)[:, 0], None
        exact = products.products(
            examples, (self.state.target,), keep=batch_selection.KEPT if self.one_pass else 0
        )
        return exact.dots[:, 0], exact

    def _look_ahead(self, step: int) -> None:
        """The gradient of the validation loss, and λ along it, when they are due."""
        measuring = self.options.method == "greats" and self.options.curvature == "calibrated"
        due = measuring and (step - 1) % self.options.curvature_every == 0
        if not due and not batch_selection.looks_ahead(step, self.options.validation_every):
            return
        training = self._model.training
        self._model.eval()
        gradient = self._gradient()
        target = self._preconditioned(gradient)
        curvature = self.state.curvature
        if due:
            square = sum(float(g.double().square().sum()) for g in gradient.values())
            curvature = directional.curvature(self._model, self._gradient, target) / square
        self._model.train(training)
        if self.options.route == "sketch":
            target = {"": products.sketch_of(target, self.options.sketch)}
        self.state = State(target, curvature)

    def _gradient(self) -> dict[str, Tensor]:
        """Gradient of the mean validation loss. Every process computes all of it: then all have the
        same bits."""
        named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        carrying = (self._validation[:, 1:] >= 0).sum()
        for tokens in self._validation.split(self._micro):
            loss = self._model(tokens).sum() / carrying
            parts = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, part in zip(named, parts, strict=True):
                if part is not None:
                    total[name] += part
        return total

    def _preconditioned(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradient as AdamW would make it: divided by √v̂ + ε, with v after a step against this
        gradient, so that what was never trained (√v = 0) does not outweigh all else. For other
        optimisers the gradient itself."""
        if not self.options.preconditioned or not isinstance(self._optimizer, torch.optim.AdamW):
            return gradient
        named, preconditioned = dict(self._model.named_parameters()), {}
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for name, part in gradient.items():
            state, group = self._optimizer.state.get(named[name], {}), groups[id(named[name])]
            keep = group["betas"][1]
            squares = (
                keep * state.get("exp_avg_sq", torch.zeros_like(part)) + (1 - keep) * part.square()
            )
            corrected = squares / (1 - keep ** (float(state.get("step", 0.0)) + 1))
            preconditioned[name] = part / (corrected.sqrt() + group["eps"])
        return preconditioned

    # ── Picks ───────────────────────────────────────────────────────────────────────

    def _chosen(
        self,
        picks: greats.Picks,
        scores: Tensor,
        rows: list[slice],
        losses: Tensor | None = None,
        examples: Examples | None = None,
        exact: Products | None = None,
    ) -> Chosen:
        if len(picks.picked) < self.count:
            raise ArithmeticError(
                f"only {len(picks.picked)} of {self.candidates} candidates have a finite score"
            )
        picked = picks.picked.sort().values
        if not self.one_pass:
            return Chosen(picked, scores.cpu(), picks.ratio, None, None)
        assert losses is not None and examples is not None
        (mine,) = rows
        local = picked[(picked >= mine.start) & (picked < mine.stop)] - mine.start
        anchor = torch.zeros((), device=self._device, requires_grad=True)
        write = self._writer(examples, exact.kept if exact else {}, len(losses), local)
        own: Tensor = _FromFactors.apply(losses[local.to(losses.device)], anchor, write)
        return Chosen(picked, scores.cpu(), picks.ratio, local, own)

    def _writer(
        self, examples: Examples, kept: Kept, count: int, local: Tensor
    ) -> Callable[[Tensor], None]:
        named = dict(self._model.named_parameters())

        def write(weights: Tensor) -> None:
            """Σ weights_i g_i into .grad, averaged over processes as engines do; weights (…,) of
            the local picks."""
            of_all = weights.new_zeros(count).index_copy_(0, local.to(weights.device), weights)
            for name, gradient in products.weighted(examples, of_all, kept).items():
                named[name].grad = gradient.to(named[name].dtype)
            comm.average([p.grad for p in named.values() if p.grad is not None])

        return write


class _FromFactors(torch.autograd.Function):
    """Losses (n, T) whose backward is `write(weights of the rows)`, instead of one through the
    model."""

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, anchor: Tensor, write: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.write = write
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (gradient,) = gradients
        if not torch.equal(gradient, gradient[:, :1].expand_as(gradient)):
            raise ValueError(
                "one pass gives one weight to all tokens of a sequence; this objective weighs each "
                "token"
            )
        ctx.write(gradient[:, 0])
        return None, None, None

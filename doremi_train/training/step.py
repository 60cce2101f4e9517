"""One optimiser step: forward, one exchange of sums, the objective's update, weighted backward.

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train.console import say
from doremi_train.data.batches import Batch, Batches, MicroBatch, some
from doremi_train.data.sampler import Draw
from doremi_train.model import optim
from doremi_train.parallel import comm
from doremi_train.parallel.engine import Engine
from doremi_train.training.domain_gradients import DomainGradients
from doremi_train.training.selector import Chosen, Selector
from doremi_train.training.task import Position, Task, TrainingFailed


class Loss(NamedTuple):
    """The plain training loss, summed."""

    total: Tensor  # () nats
    tokens: Tensor  # ()


class Sums(NamedTuple):
    """Sums over micro-batches, then over ranks."""

    stats: Any  # the objective's
    loss: Loss  # of this rank alone; ranks are added when somebody asks


class Observed(NamedTuple):
    """A micro-batch after its forward."""

    losses: Tensor  # (B, T) with their gradient
    reference: Tensor | None  # (B, T)
    sums: Sums


class Picks(NamedTuple):
    """Candidates of a step, and those that it trains on."""

    candidates: Draw
    chosen: Chosen


class Learned(NamedTuple):
    """Knowledge of a step after the exchange, the same on every rank."""

    state: Any  # of the objective
    stats: Any  # of the global batch
    stopping: bool  # whether any process was told to stop
    sound: bool  # whether all sums are finite; else the batch is left out


class Taken(NamedTuple):
    """Outcome of a step."""

    position: Position
    stats: Any  # sums of the global batch
    stopping: bool
    sound: bool
    picks: Picks | None  # of a step that chooses among candidates


class Step:
    """The step of a task on this process. `loss` is that of the steps so far; who reads it empties
    it."""

    def __init__(
        self,
        task: Task,
        engine: Engine,
        batches: Batches,
        device: torch.device,
        rows: list[slice],
        selector: Selector | None,
        domain_gradients: DomainGradients | None,
        asked: Callable[[], bool],
    ) -> None:
        """`rows` are those of this process's micro-batches in what is drawn; `asked` says whether
        all processes are to stop after a step."""
        self.task, self.engine, self.batches = task, engine, batches
        self.device, self.world = device, comm.world()
        self._rows, self._selector, self._gradients = rows, selector, domain_gradients
        self._asked = asked
        self.loss = Loss(*torch.zeros(2, dtype=torch.float64, device=device))

    def take(self, position: Position) -> Taken:
        """One optimiser step from `position`. Raises TrainingFailed where a loss is not finite and
        that ends the run."""
        task, options = self.task, self.task.objective_options
        number, state = position.step + 1, position.state
        if task.followed is not None:
            mixture = task.followed(position.step)
        else:
            mixture = task.objective.sampling(state, options)
        batch = self.batches.get(position.step, mixture, position.counts)
        self._seed(number)
        picks = None
        if self._selector is not None:
            batch, picks = self._pick(self._selector, batch, number)
        ready = picks.chosen.losses if picks is not None else None
        *early, last = batch.micro
        if self._gradients is not None:
            learned = self._by_domain(self._gradients, state, batch, number)
        elif task.accumulation == "exact" and early:
            # The weights of this very batch are known only after all of its forwards, so these are
            # done twice.
            with torch.no_grad():
                seen = [self._observe(micro, ready) for micro in batch.micro]
            learned = self._learn(state, [observed.sums for observed in seen], batch, number)
            for micro, observed in zip(batch.micro, seen, strict=True) if learned.sound else ():
                with self.engine.accumulating(last=micro is last):
                    again = observed._replace(losses=self._losses(micro, ready))
                    self._backward(again, micro, learned.state, learned.stats.tokens)
        else:
            # With one micro-batch these are the weights of this very batch too: nothing is computed
            # twice. With more, they are those of the step before, or never move: every token count
            # is known from the draw.
            parts = []
            for micro in early:
                with self.engine.accumulating(last=False):
                    observed = self._observe(micro, ready)
                    self._backward(observed, micro, state, batch.tokens)
                    parts.append(observed.sums)
            with self.engine.accumulating(last=True):
                observed = self._observe(last, ready)
                learned = self._learn(state, [*parts, observed.sums], batch, number)
                if learned.sound:
                    weighing = state if task.accumulation == "lagged" else learned.state
                    self._backward(observed, last, weighing, batch.tokens)
        if learned.sound:
            self.engine.step(optim.learning_rate(number, task.training.steps, task.training))
        else:
            self.engine.discard()
            self.require_finite(number)
        skipped = position.skipped + (not learned.sound)
        after = Position(number, learned.state, batch.draw.counts, skipped)
        return Taken(after, learned.stats, learned.stopping, learned.sound, picks)

    def require_finite(self, number: int) -> None:
        """Raise TrainingFailed on every rank where parameters of any are not finite after step
        `number`: no later batch could be sound."""
        # Read once by the host.
        sound = torch.stack([part.isfinite().all() for part in self.engine.parts()])
        broken = not bool(sound.all())
        nothing = Loss(*torch.zeros(2, 1, dtype=torch.float64, device=self.device))
        if comm.all_reduce_sum(nothing, broken)[1]:
            raise TrainingFailed(
                f"{self.task.label}: the model's parameters are not finite at step {number}, so no "
                "later batch has a loss; lower training.learning_rate, or raise training.warmup, "
                "and start again in another run_dir"
            )

    def _by_domain(
        self, gradients: DomainGradients, state: Any, batch: Batch, number: int
    ) -> Learned:
        """Learn as `_learn` does, for an objective that looks at every domain's gradient; the
        step's own is made from these."""
        gradients.begin()
        sums = add([self._sums(micro, gradients.add(micro), None) for micro in batch.micro])
        alignment, square = gradients.align(batch.tokens, number - 1)
        if self.world.first:  # the same on all processes, so that one of them adds it to the sums
            alignment, square = alignment.to(self.device), square.to(self.device)
            sums = sums._replace(stats=sums.stats._replace(alignment=alignment, square=square))
        learned = self._learn(state, [sums], batch, number)
        if learned.sound:
            domains = torch.arange(len(batch.tokens))
            objective, options = self.task.objective, self.task.objective_options
            weights = objective.weigh(learned.state, domains, batch.tokens, options)
            gradients.write(weights[:, 0])
        return learned

    def _pick(self, selector: Selector, batch: Batch, number: int) -> tuple[Batch, Picks]:
        """The picks of a batch of candidates. In one pass their losses are there already, and their
        gradient comes from the stored factors; else they are an ordinary batch."""
        training = self.task.training
        rate = optim.learning_rate(number, training.steps, training)
        try:
            chosen = selector.choose(batch, self._rows, number, rate, self.task.seed)
        except ArithmeticError as error:
            raise TrainingFailed(f"{self.task.label}: step {number}: {error}") from None
        picks, picked = Picks(batch.draw, chosen), chosen.picked.numpy()
        if chosen.local is not None:
            return self.batches.among(batch, picked, chosen.local.numpy()), picks
        rows = self.world.rows(training.batch_size, training.micro_batch_size)
        return self.batches.of(some(batch.draw, picked), rows), picks

    def _losses(self, micro: MicroBatch, ready: Tensor | None) -> Tensor:
        """(B, T) with gradient; `ready` where the picking computed them."""
        if ready is not None:
            return ready
        # A rank without rows takes part all the same: under sharding every forward and backward is
        # a collective.
        some_rows = len(micro.tokens) > 0
        tokens = micro.tokens if some_rows else micro.tokens.new_zeros(1, micro.tokens.shape[1])
        return self.engine.model(tokens.to(self.device, non_blocking=True))[: len(micro.tokens)]

    def _observe(self, micro: MicroBatch, ready: Tensor | None) -> Observed:
        """The forward of a micro-batch, with the reference's."""
        losses = self._losses(micro, ready)
        reference = self.task.reference.losses(micro) if self.task.reference is not None else None
        return Observed(losses, reference, self._sums(micro, losses, reference))

    def _sums(self, micro: MicroBatch, losses: Tensor, reference: Tensor | None) -> Sums:
        """Sums of losses (B, T) and the reference's."""
        task, losses = self.task, losses.detach()
        domain = micro.domain.to(self.device, non_blocking=True)
        count = len(task.store.domains)
        stats = task.objective.observe(losses, reference, domain, count, task.objective_options)
        total = losses.double().sum()
        return Sums(stats, Loss(total, torch.full_like(total, int(micro.carrying.sum()))))

    def _learn(self, state: Any, parts: Sequence[Sums], batch: Batch, number: int) -> Learned:
        """The one exchange of a step: sums of all ranks, then the objective's update, the same
        everywhere. α is kept and updated in float64 on the host.

        Raises TrainingFailed where the batch is not sound and may not be left out.
        """
        sums = add(parts)
        stats, stopping = comm.all_reduce_sum(sums.stats, self._asked())
        sound = self._check_finite(stats, number, batch)
        if sound:
            state = self.task.objective.update(state, stats, self.task.objective_options)
            for part, step in zip(self.loss, sums.loss, strict=True):
                part.add_(step)
        return Learned(state, stats, stopping, sound)

    def _backward(self, observed: Observed, micro: MicroBatch, state: Any, tokens: Tensor) -> None:
        """Gradient of Σ weight · loss over the global batch. This is the owner of the denominator:
        weights are already divided by global counts, and the number of ranks undoes the average
        that engines take over them."""
        objective, options = self.task.objective, self.task.objective_options
        losses = observed.losses
        by_token = (losses, observed.reference) if objective.token_wise else ()
        weights = objective.weigh(state, micro.domain, tokens, options, *by_token)
        total = (weights.to(losses.device, losses.dtype) * losses).sum()
        self.engine.backward(total * self.world.size)

    def _seed(self, number: int) -> None:
        """Dropout is a function of (seed, step, rank), so a resumed run needs no generator
        state."""
        entropy = [self.task.seed, number, self.world.rank]
        mixed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        # Not torch.manual_seed: without a GPU it formats a traceback each time, and keeps it.
        generators = torch.cuda if self.device.type == "cuda" else torch.default_generator
        generators.manual_seed(int(mixed[0]) >> 1)

    def _check_finite(self, stats: Any, number: int, batch: Batch) -> bool:
        """Whether all sums are finite; the same on every rank. Raises TrainingFailed where that
        ends the run."""
        fields = [field.view(len(field), -1) for field in stats]
        finite = torch.cat(fields, dim=1).isfinite().all(1)  # (K,)
        if finite.all():
            return True
        bad = torch.nonzero(~finite)[:, 0].tolist()
        names = [self.task.store.domains[k] for k in bad]
        drawn = {
            name: batch.draw.sequence[batch.draw.domain == k].tolist()
            for k, name in zip(bad, names, strict=True)
        }
        message = (
            f"{self.task.label}: the loss is not finite at step {number}, domain "
            f"{', '.join(names)} (its sequences in this batch: {drawn})"
        )
        if self.task.training.on_nonfinite == "stop":
            raise TrainingFailed(
                f"{message}; lower training.learning_rate, look at that text, or set "
                "training.on_nonfinite=skip"
            )
        if self.world.first:
            say(f"{message}; the batch is left out on all processes")
        return False


def add(parts: Sequence[Any]) -> Any:
    """Sums of several micro-batches, added field by field."""
    first = parts[0]
    if isinstance(first, Tensor):
        return sum(parts[1:], start=first)
    return type(first)(*(add(fields) for fields in zip(*parts, strict=True)))

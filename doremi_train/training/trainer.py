"""The only training loop. It trains any `methods.Objective`: the ordinary loss, Group DRO, …

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train.console import Bar, console
from doremi_train.data.batches import Batch, Batches, MicroBatch, some
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import losses
from doremi_train.model import optim
from doremi_train.model.folders import save
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import comm, engine, place
from doremi_train.storage import checkpoint
from doremi_train.storage.runs import Preempted, set_status, stop
from doremi_train.training import batch_selection, domain_gradients, selector
from doremi_train.training.logs import Logs
from doremi_train.training.task import Position, Task, TrainingFailed, Watch, refuse_accumulation


class Trainer:
    """A model being trained: `fit` is the loop, `step` is one optimiser step."""

    def __init__(self, task: Task, model: LanguageModel, place: place.Place) -> None:
        self.task, self.device, self.world = task, place.device, comm.world()
        training = task.training
        drawn = task.selection.candidates if task.selection is not None else training.batch_size
        self._rows = self.world.rows(drawn, training.micro_batch_size)
        if len(self.world.rows(training.batch_size, training.micro_batch_size)) > 1:
            refuse_accumulation(task, model, place)
        self.micro = self.world.largest(drawn, training.micro_batch_size)
        stored = task.reference.stored if task.reference is not None else None
        self.batches = Batches(
            task.store,
            training.sequence_length,
            drawn,
            self._rows,
            task.seed,
            task.subsample,
            stored,
        )
        self.bare = model
        self._saved = checkpoint.latest(task.run.folder / "checkpoints")
        self.begins_at = self._saved["step"] if self._saved is not None else 0
        self.engine = engine.build(place, model, training, self._saved)
        self.engine.warm_up(
            torch.zeros(
                self.micro, training.sequence_length + 1, dtype=torch.int64, device=self.device
            )
        )
        self.engine_used = f"{place}, {training.precision}: {self.engine.wrapper}"
        self.selector = self._selector(place) if task.selection is not None else None
        self.domain_gradients: domain_gradients.DomainGradients | None = None
        if task.target is not None:
            domain_gradients.check(model, place.strategy, place.compile)
            domains = len(task.store.domains)
            self.domain_gradients = domain_gradients.DomainGradients(
                model, domains, task.target, self.device
            )
        if self.selector is not None:
            self.engine_used += f"; {self.selector}"
        if self.world.first and task.bar is None:
            console.print(f"{task.label:<22} {self.engine_used}")
        self._chosen: selector.Chosen | None = None
        self._loss = _Loss(*torch.zeros(2, dtype=torch.float64, device=self.device))

    def fit(self, watch: Watch = lambda line: None) -> Position:
        """Train to the end, from the newest checkpoint if any. Raises Preempted after saving, when
        told to stop."""
        position = self._restore()
        for after in self.steps(position, watch):
            position = after
        return position

    def steps(self, position: Position, watch: Watch = lambda line: None) -> Iterator[Position]:
        """The steps from `position` to the end, each with its logs; gives the position after every
        one."""
        task, training = self.task, self.task.training
        tokens = training.batch_size * training.sequence_length  # of one step
        with (
            self._logs(position.step, watch) as logs,
            self.batches,
            self._bar(position.step, tokens) as bar,
        ):
            while position.step < training.steps:
                clock = time.perf_counter()
                before = position.skipped
                position, stats, stopping = self.step(position)
                logs.trace(task, position, stats, skipped=position.skipped > before)
                if self._chosen is not None:
                    logs.selection(
                        task.store.domains, position.step, self._candidates, self._chosen
                    )
                if position.step % training.log_every == 0 or position.step == training.steps:
                    loss = self._mean_loss()
                    bar.update(position.step * tokens, f"loss {loss:.3f}")
                    logs.metrics(
                        step=position.step,
                        loss=loss,
                        learning_rate=optim.learning_rate(position.step, training.steps, training),
                        tokens_per_second=tokens / (time.perf_counter() - clock),
                    )
                if position.step % self._evaluate_every == 0 or position.step == training.steps:
                    logs.evaluation(position.step, self.evaluate())
                if position.step in self._kept:
                    self._keep(position.step)
                if stopping or position.step % training.checkpoint_every == 0:
                    logs.sync()
                    self._save(position)
                if stopping:
                    raise Preempted(
                        f"{task.label}: told to stop; saved at step {position.step} of "
                        f"{training.steps}; the same command continues it"
                    )
                yield position

    def step(self, position: Position) -> tuple[Position, Any, bool]:
        """One optimiser step: forward, one exchange of sums, the objective's update, weighted
        backward.

        Returns the new position, the global batch's sums, and whether any process was told to stop.
        """
        task, options = self.task, self.task.objective_options
        number, state = position.step + 1, position.state
        batch = self.batches.get(
            position.step, task.objective.sampling(state, options), position.counts
        )
        self._begin(number)
        if self.selector is not None:
            batch = self._select(self.selector, batch, number)
        *early, last = batch.micro
        if self.domain_gradients is not None:
            state, stats, stopping, sound = self._by_domain(
                self.domain_gradients, state, batch, number
            )
        elif task.accumulation == "exact" and early:
            # The weights of this very batch are known only after all of its forwards, so these are
            # done twice.
            with torch.no_grad():
                _, references, observed = zip(
                    *(self._observe(micro) for micro in batch.micro), strict=True
                )
            state, stats, stopping, sound = self._learn(state, _add(observed), batch, number)
            for micro, reference in zip(batch.micro, references, strict=True) if sound else ():
                with self.engine.accumulating(last=micro is last):
                    self._backward(self._losses(micro), reference, micro, state, stats.tokens)
        else:
            # With one micro-batch these are the weights of this very batch too: nothing is computed
            # twice. With more, they are those of the step before, or never move: every token count
            # is known from the draw.
            parts = []
            for micro in early:
                with self.engine.accumulating(last=False):
                    losses, reference, stats = self._observe(micro)
                    self._backward(losses, reference, micro, state, batch.tokens)
                    parts.append(stats)
            with self.engine.accumulating(last=True):
                losses, reference, stats = self._observe(last)
                before = state
                state, stats, stopping, sound = self._learn(
                    state, _add([*parts, stats]), batch, number
                )
                if sound:
                    weighing = before if task.accumulation == "lagged" else state
                    self._backward(losses, reference, last, weighing, batch.tokens)
        if sound:
            self.engine.step(optim.learning_rate(number, task.training.steps, task.training))
        else:
            self.engine.discard()
        return (
            Position(number, state, batch.draw.counts, position.skipped + (not sound)),
            stats,
            stopping,
        )

    def _by_domain(
        self, gradients: domain_gradients.DomainGradients, state: Any, batch: Batch, number: int
    ) -> tuple[Any, Any, bool, bool]:
        """As `_learn`, of an objective that looks at every domain's gradient; the step's own is
        made from these."""
        gradients.begin()
        sums = _add([self._sums(micro, gradients.add(micro), None) for micro in batch.micro])
        alignment, square = gradients.align(batch.tokens, number - 1)
        if self.world.first:  # the same on all processes, so that one of them adds it to the sums
            sums = sums._replace(alignment=alignment.to(self.device), square=square.to(self.device))
        state, stats, stopping, sound = self._learn(state, sums, batch, number)
        if sound:
            domains = torch.arange(len(batch.tokens))
            gradients.write(
                self.task.objective.weigh(
                    state, domains, batch.tokens, self.task.objective_options
                )[:, 0]
            )
        return state, stats, stopping, sound

    def _selector(self, place: place.Place) -> selector.Selector:
        """Raises UserError where candidates cannot be scored exactly as asked."""
        task, training = self.task, self.task.training
        assert task.selection is not None
        batch_selection.check(
            task.selection, training.batch_size, len(self._rows), place.strategy, place.compile
        )
        # Several micro-batches, and layers that are computed again, are there to save the memory
        # that factors take.
        one_pass = len(self._rows) == 1 and not training.activation_checkpointing
        return selector.Selector(
            task.selection,
            training.batch_size,
            self.bare,
            getattr(self.engine, "optimizer", None),
            self.device,
            one_pass,
            self.micro,
        )

    def evaluate(self) -> dict[str, Any]:
        task = self.task
        return losses.measure(
            self.engine.model,
            task.store,
            task.training.sequence_length,
            self.micro,
            task.evaluation,
            self.device,
        )

    def _select(self, selector: selector.Selector, batch: Batch, number: int) -> Batch:
        """The picks of a batch of candidates. In one pass their losses are there already, and their
        gradient comes from the stored factors; else they are an ordinary batch."""
        training = self.task.training
        rate = optim.learning_rate(number, training.steps, training)
        try:
            chosen = selector.choose(batch, self._rows, number, rate, self.task.seed)
        except ArithmeticError as error:
            raise TrainingFailed(f"{self.task.label}: step {number}: {error}") from None
        self._candidates, self._chosen = batch.draw, chosen
        if chosen.local is not None:
            return self.batches.among(batch, chosen.picked.numpy(), chosen.local.numpy())
        rows = self.world.rows(training.batch_size, training.micro_batch_size)
        return self.batches.of(some(batch.draw, chosen.picked.numpy()), rows)

    def _losses(self, micro: MicroBatch) -> Tensor:
        """(B, T) with gradient."""
        if self._chosen is not None and self._chosen.losses is not None:
            return self._chosen.losses
        # A rank without rows takes part all the same: under sharding every forward and backward is
        # a collective.
        tokens = (
            micro.tokens if len(micro.tokens) else micro.tokens.new_zeros(1, micro.tokens.shape[1])
        )
        return self.engine.model(tokens.to(self.device, non_blocking=True))[: len(micro.tokens)]

    def _observe(self, micro: MicroBatch) -> tuple[Tensor, Tensor | None, Any]:
        """Losses (B, T) of a micro-batch with their gradient, the reference's, and the objective's
        sums."""
        task = self.task
        losses = self._losses(micro)
        reference = task.reference.losses(micro) if task.reference is not None else None
        return losses, reference, self._sums(micro, losses, reference)

    def _sums(self, micro: MicroBatch, losses: Tensor, reference: Tensor | None) -> Any:
        """The objective's, of losses (B, T) and the reference's."""
        task, domain = self.task, micro.domain.to(self.device, non_blocking=True)
        self._step_loss.total.add_(losses.detach().double().sum())
        self._step_loss.tokens.add_(int(micro.carrying.sum()))
        return task.objective.observe(
            losses.detach(), reference, domain, len(task.store.domains), task.objective_options
        )

    def _learn(
        self, state: Any, stats: Any, batch: Batch, number: int
    ) -> tuple[Any, Any, bool, bool]:
        """The one exchange of a step: sums of all ranks, then the objective's update, the same
        everywhere.

        α is kept and updated in float64 on the host.

        Returns state, sums, whether to stop, and whether the batch is sound. Raises TrainingFailed where it is not and
        may not be left out.
        """
        stats, stopping = comm.all_reduce_sum(stats, stop.requested)
        sound = self._check_finite(stats, number, batch)
        if sound:
            state = self.task.objective.update(state, stats, self.task.objective_options)
            for part, step in zip(self._loss, self._step_loss, strict=True):
                part.add_(step)
        return state, stats, stopping, sound

    def _backward(
        self,
        losses: Tensor,
        reference: Tensor | None,
        micro: MicroBatch,
        state: Any,
        tokens: Tensor,
    ) -> None:
        """Gradient of Σ weight · loss over the global batch. This is the owner of the denominator:
        weights are already divided by global counts, and the number of ranks undoes the average
        that engines take over them."""
        task = self.task
        weights = task.objective.weigh(
            state, micro.domain, tokens, task.objective_options, losses, reference
        )
        total = (weights.to(losses.device, losses.dtype) * losses).sum()
        self.engine.backward(total * self.world.size)

    def _begin(self, number: int) -> None:
        # Dropout is a function of (seed, step, rank), so a resumed run needs no generator state.
        mixed = np.random.SeedSequence([self.task.seed, number, self.world.rank]).generate_state(
            1, np.uint64
        )
        # Not torch.manual_seed: without a GPU it formats a traceback each time, and keeps it.
        generators = torch.cuda if self.device.type == "cuda" else torch.default_generator
        generators.manual_seed(int(mixed[0]) >> 1)
        self._step_loss = _Loss(*torch.zeros_like(torch.stack(self._loss)))
        self._chosen = None

    def _check_finite(self, stats: Any, number: int, batch: Batch) -> bool:
        """Whether all sums are finite; the same on every rank. Raises TrainingFailed where that
        ends the run."""
        finite = (
            torch.cat([field.view(len(field), -1) for field in stats], dim=1).isfinite().all(1)
        )  # (K,)
        if finite.all():
            return True
        bad = torch.nonzero(~finite)[:, 0].tolist()
        names = [self.task.store.domains[k] for k in bad]
        drawn = {
            n: batch.draw.sequence[batch.draw.domain == k].tolist()
            for k, n in zip(bad, names, strict=True)
        }
        found = (
            f"{self.task.label}: the loss is not finite at step {number}, domain "
            f"{', '.join(names)} (its sequences in this batch: {drawn})"
        )
        if self.task.training.on_nonfinite == "stop":
            raise TrainingFailed(
                f"{found}; lower training.learning_rate, look at that text, or set "
                "training.on_nonfinite=skip"
            )
        if self.world.first:
            print(f"{found}; the batch is left out on all processes", flush=True)
        return False

    def _mean_loss(self) -> float:
        """Mean training loss over tokens and ranks since the last call, nats per token."""
        summed = comm.all_reduce_sum(self._loss)[0]
        mean = float(summed.total / summed.tokens)
        for part in self._loss:
            part.zero_()
        return mean

    @property
    def _evaluate_every(self) -> int:
        return self.task.evaluation.every or max(1, self.task.training.steps // 20)

    @property
    def _kept(self) -> set[int]:
        """Steps after which the model is kept: one of text, for only that is asked
        downstream.tasks."""
        parts = self.task.training.snapshots + 1 if isinstance(self.task.store, TokenStore) else 1
        return {self.task.training.steps * part // parts for part in range(1, parts)}

    def _keep(self, step: int) -> None:
        tensors, store = self.engine.state()["model"], self.task.store
        assert isinstance(store, TokenStore)
        folder = self.task.run.folder / "snapshots" / f"step-{step:09d}"
        comm.on_first(
            lambda: save(self.bare, tensors, folder, store.tokenizer(), store.end_of_document)
        )

    def _bar(self, step: int, tokens: int) -> Bar:
        whole = self.task.training.steps * tokens
        return self.task.bar or Bar(self.task.label, whole, step * tokens, show=self.world.first)

    def _logs(self, step: int, watch: Watch) -> "contextlib.AbstractContextManager[Logs]":
        return Logs(self.task.run.folder if self.world.first else None, step, watch)

    def _save(self, position: Position) -> None:
        """Rank 0 writes; the others wait, so that none runs ahead of a checkpoint that is not
        there."""
        # The loss since the last line of metrics moves to rank 0, as in the checkpoint: a continued
        # run logs the same.
        loss = comm.all_reduce_sum(self._loss)[0]
        for part, total in zip(self._loss, loss, strict=True):
            part.copy_(total if self.world.first else torch.zeros_like(total))
        content = {
            "step": position.step,
            "state": list(position.state),
            "counts": torch.from_numpy(position.counts),
            "skipped": position.skipped,
            "loss": [float(part) for part in self._loss],
            **self._trained(),
        }
        if self.selector is not None:
            content["selection"] = self.selector.saved()
        comm.on_first(lambda: self._write(content))

    def _trained(self) -> dict[str, Any]:
        """The engine's state without frozen parameters, which a continued run begins with again."""
        state = self.engine.state()
        frozen = {name for name, p in self.bare.named_parameters() if not p.requires_grad}
        return state | {
            "model": {name: tensor for name, tensor in state["model"].items() if name not in frozen}
        }

    def _write(self, content: dict[str, Any]) -> None:
        folder, step = self.task.run.folder, content["step"]
        checkpoint.save(folder / "checkpoints", step, content, self.task.training.keep_checkpoints)
        if self.task.run.mirror:
            checkpoint.push(folder, self.task.run.mirror)
        set_status(folder, "running", step)

    def _restore(self) -> Position:
        """Where the checkpoint that the engine was built from left off, or the start."""
        task, domains = self.task, len(self.task.store.domains)
        fresh = task.objective.init(domains, task.training.steps, task.objective_options)
        saved, self._saved = self._saved, None
        step = saved["step"] if saved is not None else 0
        if comm.broadcast(step) != step:
            raise TrainingFailed(
                f"{task.label}: process {self.world.rank} finds a checkpoint of step {step}, the "
                f"first one another; {task.run.folder} must be on a file system that all nodes "
                "share: set store"
            )
        if saved is None:
            return Position(0, fresh, np.zeros(domains, dtype=np.int64))
        if self.selector is not None:
            self.selector.restore(saved["selection"])
        for part, value in zip(self._loss, saved["loss"], strict=True):
            part.fill_(value if self.world.first else 0.0)
        return Position(
            step, type(fresh)(*saved["state"]), saved["counts"].numpy(), saved["skipped"]
        )


class _Loss(NamedTuple):
    total: Tensor  # () nats
    tokens: Tensor  # ()


def _add(parts: Any) -> Any:
    """Sums of several micro-batches, added field by field."""
    columns = list(parts)
    return type(columns[0])(
        *(sum(fields[1:], start=fields[0]) for fields in zip(*columns, strict=True))
    )

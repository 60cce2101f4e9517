"""The only training loop. It trains any `methods.Objective`: the ordinary loss, Group DRO, …

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from doremi_train.config import UserError
from doremi_train.console import Bar, say
from doremi_train.data.batches import Batches
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import losses
from doremi_train.model import optim
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import comm, engine, place
from doremi_train.storage.runs import Preempted, set_status, stop
from doremi_train.training import batch_selection, checkpoints, domain_gradients, saving, selector
from doremi_train.training.logs import Logs
from doremi_train.training.step import Step, Taken
from doremi_train.training.task import Position, Task, TrainingFailed, Watch, refuse_accumulation


class Trainer:
    """A model being trained: `fit` is the loop, `step.take` one optimiser step."""

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
        self._saved = checkpoints.newest(task.run)
        self.begins_at = self._saved.step if self._saved is not None else 0
        self._saver = checkpoints.Saver(task.run, training.keep_checkpoints, training.timeout)
        self.engine = engine.build(place, model, training, self._saved)
        self.engine.warm_up(
            torch.zeros(
                self.micro, training.sequence_length + 1, dtype=torch.int64, device=self.device
            )
        )
        self.engine_used = f"{place}, {training.precision}: {self.engine.wrapper}"
        self.selector = self._selector(place) if task.selection is not None else None
        gradients: domain_gradients.DomainGradients | None = None
        if task.target is not None:
            domain_gradients.check(model, place.strategy, place.compile)
            gradients = domain_gradients.DomainGradients(
                model, len(task.store.domains), task.target, self.device
            )
        self.step = Step(
            task,
            self.engine,
            self.batches,
            self.device,
            self._rows,
            self.selector,
            gradients,
            lambda: stop.requested or self._saver.failed,
        )
        if self.selector is not None:
            self.engine_used += f"; {self.selector}"
        if self.world.first and task.bar is None:
            say(f"{task.label:<22} {self.engine_used}")

    def fit(self, watch: Watch = lambda line: None) -> Position:
        """Train to the end, from the newest checkpoint if any. Raises Preempted after saving, when
        told to stop."""
        position = self._restore()
        for taken in self.steps(position, watch):
            position = taken.position
        return position

    def steps(self, position: Position, watch: Watch = lambda line: None) -> Iterator[Taken]:
        """The steps from `position` to the end, each with its logs."""
        task, training = self.task, self.task.training
        tokens = training.batch_size * training.sequence_length  # of one step
        with (
            contextlib.closing(self._saver),
            self._logs(position.step, watch) as logs,
            self.batches,
            task.followed or contextlib.nullcontext(),
            self._bar(position.step, tokens) as bar,
        ):
            last = task.ends(position)
            while not last:
                clock = time.perf_counter()
                taken = self.step.take(position)
                position = taken.position
                last = task.ends(position)
                if last or self._looked_at(position.step) or taken.stopping:
                    self.step.require_finite(position.step)
                logs.trace(task, position, taken.stats, skipped=not taken.sound)
                if taken.picks is not None:
                    logs.selection(task.store.domains, position.step, taken.picks)
                if position.step % training.log_every == 0 or last:
                    loss = self._mean_loss()
                    bar.update(position.step * tokens, f"loss {loss:.3f}")
                    logs.metrics(
                        step=position.step,
                        loss=loss,
                        learning_rate=optim.learning_rate(position.step, training.steps, training),
                        tokens_per_second=tokens / (time.perf_counter() - clock),
                    )
                if position.step % self._evaluate_every == 0 or last:
                    logs.evaluation(position.step, self.evaluate(position.step))
                if position.step in self._kept:
                    self._keep(position.step)
                if taken.stopping or position.step % training.checkpoint_every == 0:
                    logs.sync()
                    self._save(position)
                if last or taken.stopping:
                    self._saver.settle()
                if (step := self._saver.completed()) is not None:
                    set_status(task.run.folder, "running", step)
                if taken.stopping:
                    raise Preempted(
                        f"{task.label}: told to stop; saved at step {position.step} of "
                        f"{training.steps}; the same command continues it"
                    )
                yield taken

    def _looked_at(self, step: int) -> bool:
        """Whether the model is measured or kept after `step`, be it the last or not."""
        every = (self._evaluate_every, self.task.training.checkpoint_every)
        return step in self._kept or any(step % count == 0 for count in every)

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
            self.engine.optimizer,
            self.device,
            one_pass,
            self.micro,
        )

    def evaluate(self, step: int | None = None) -> dict[str, Any]:
        """Held-out losses after `step`; None: at the end. Raises TrainingFailed where they are not
        finite: the model is then spoilt, and what is left out of its training is of no help."""
        task = self.task
        measured = losses.measure(
            self.engine.model,
            task.store,
            task.training.sequence_length,
            self.micro,
            task.evaluation,
            self.device,
        )
        if not math.isfinite(measured["mean_loss"]):
            raise TrainingFailed(
                f"{task.label}: the held-out loss is not finite at step "
                f"{step or task.training.steps}; lower training.learning_rate, or raise "
                "training.warmup, and start again in another run_dir"
            )
        return measured

    def _mean_loss(self) -> float:
        """Mean training loss over tokens and ranks since the last call, nats per token."""
        summed = comm.all_reduce_sum(self.step.loss)[0]
        mean = float(summed.total / summed.tokens)
        for part in self.step.loss:
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
        store = self.task.store
        assert isinstance(store, TokenStore)
        folder = self.task.run.folder / "snapshots" / f"step-{step:09d}"
        saving.save(self.engine, self.bare, folder, store, self.task.training.sequence_length)

    def _bar(self, step: int, tokens: int) -> Bar:
        whole = self.task.training.steps * tokens
        return self.task.bar or Bar(self.task.label, whole, step * tokens, show=self.world.first)

    def _logs(self, step: int, watch: Watch) -> "contextlib.AbstractContextManager[Logs]":
        return Logs(self.task.run.folder if self.world.first else None, step, watch)

    def _save(self, position: Position) -> None:
        """Begin to write a checkpoint, when the one before is complete."""
        # The loss since the last line of metrics moves to rank 0, as in the checkpoint: a continued
        # run logs the same.
        loss = comm.all_reduce_sum(self.step.loss)[0]
        for part, total in zip(self.step.loss, loss, strict=True):
            part.copy_(total if self.world.first else torch.zeros_like(total))
        values = {
            "state": list(position.state),
            "counts": torch.from_numpy(position.counts),
            "skipped": position.skipped,
            "loss": [float(part) for part in self.step.loss],
        }
        if self.selector is not None:
            values["selection"] = self.selector.saved()
        self._saver.save(position.step, values, self.engine.pieces())

    def _restore(self) -> Position:
        """Position of the checkpoint that the engine was built from, or the start."""
        task, domains = self.task, len(self.task.store.domains)
        fresh = task.objective.init(domains, task.training.steps, task.objective_options)
        saved, self._saved = self._saved, None
        if saved is None:
            return Position(0, fresh, np.zeros(domains, dtype=np.int64))
        values = saved.values
        saved.close()
        needed = {"state", "counts", "skipped", "loss"}
        if self.selector is not None:
            needed.add("selection")
        if not needed <= values.keys() or values["counts"].shape != (domains,):
            raise UserError(
                f"{saved.folder}: holds {', '.join(sorted(values))} of another version, or of "
                f"another number of domains than {domains}; delete {saved.folder.parent}, and the "
                "run begins again"
            )
        if self.selector is not None:
            self.selector.restore(values["selection"])
        for part, value in zip(self.step.loss, values["loss"], strict=True):
            part.fill_(value if self.world.first else 0.0)
        # A field that came after the checkpoint was written is as at the start.
        state = fresh._replace(**dict(zip(fresh._fields, values["state"], strict=False)))
        return Position(saved.step, state, values["counts"].numpy(), values["skipped"])

"""The only training loop. It trains any `methods.Objective`: the ordinary loss, Group DRO, …

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from doremi_train import checkpoint, comm, evaluation, files, optim
from doremi_train.config import STRICT, Count, Positive, UserError
from doremi_train.data.batches import Batch, Batches, MicroBatch
from doremi_train.data.sampler import Ints
from doremi_train.data.shards import TokenStore
from doremi_train.methods import Objective
from doremi_train.model import LanguageModel
from doremi_train.runs import Preempted, Run, set_status, stop
from doremi_train.track import Bar


@dataclass(frozen=True, config=STRICT)
class Options(optim.Options):
    steps: Positive = 400
    batch_size: Positive = 32  # sequences per optimiser step, over all processes
    micro_batch_size: Positive | None = None  # sequences per process and forward; null: all of the process's share
    sequence_length: Positive = 128  # tokens
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward and backward; parameters and α stay fp32 and fp64
    activation_checkpointing: bool = False
    checkpoint_every: Positive = 100  # steps
    keep_checkpoints: Positive = 2
    log_every: Positive = 10  # steps between lines of metrics.jsonl
    threads: Count = 0  # of torch on a CPU, per process; 0: torch's own choice


class TrainingFailed(Exception):
    """The run cannot go on. Exit code 1, one message, no traceback."""

    exit_code = 1


class Task(NamedTuple):
    """What to train, on what, towards what."""

    label: str
    run: Run
    objective: Objective
    objective_options: Any
    store: TokenStore
    seed: int
    training: Options
    evaluation: evaluation.Options
    accumulation: Literal["exact", "lagged"] = "lagged"
    reference: nn.Module | None = None  # frozen, on the device, giving losses (B, T)


class Position(NamedTuple):
    """Where a run is, beside its model and optimiser."""

    step: int  # optimiser steps done
    state: Any  # of the objective
    counts: Ints  # (K,) sequences drawn


class Trainer:
    """A model being trained: `fit` is the loop, `step` is one optimiser step."""

    def __init__(self, task: Task, model: LanguageModel, accelerator: Accelerator) -> None:
        self.task, self.accelerator, self.world = task, accelerator, comm.world()
        self.bare = model
        training = task.training
        micro = self.world.micro_batch(training.batch_size, training.micro_batch_size)
        several = training.batch_size > micro * self.world.size
        if task.accumulation == "exact" and several and has_dropout(model):
            raise UserError(
                "proxy.accumulation=exact: with several micro-batches it runs every forward twice, which must agree, "
                "so the model may not have dropout; set its dropout to 0, or use proxy.accumulation=lagged"
            )
        self.micro = micro
        self.batches = Batches(task.store, training.sequence_length, training.batch_size, micro, task.seed, self.world)
        self.model, self.optimizer = accelerator.prepare(model, optim.build(model, training))
        self._loss = _Loss(*torch.zeros(2, dtype=torch.float64, device=accelerator.device))

    def fit(self) -> Position:
        """Train to the end, from the newest checkpoint if any. Raises Preempted after saving, when told to stop."""
        task, training = self.task, self.task.training
        position = self._restore()
        tokens = training.batch_size * training.sequence_length  # of one step
        with self._logs(position.step) as logs, self.batches, self._bar(position.step, tokens) as bar:
            while position.step < training.steps:
                clock = time.perf_counter()
                position, stats, stopping = self.step(position)
                logs.trace(task, position, stats)
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
                if stopping or position.step % training.checkpoint_every == 0:
                    logs.sync()
                    self._save(position)
                if stopping:
                    raise Preempted(
                        f"{task.label}: told to stop; saved at step {position.step} of {training.steps}; "
                        "the same command continues it"
                    )
        return position

    def step(self, position: Position) -> tuple[Position, Any, bool]:
        """One optimiser step: forward, one exchange of sums, the objective's update, weighted backward.

        Returns the new position, the global batch's sums, and whether any process was told to stop.
        """
        task, options = self.task, self.task.objective_options
        number, state = position.step + 1, position.state
        batch = self.batches.get(position.step, task.objective.sampling(state, options), position.counts)
        self._prepare_step(number)
        if task.accumulation == "exact" and len(batch.micro) == 1:
            # The weights of this very batch are known between its forward and its backward: nothing is computed twice.
            losses, stats = self._observe(batch.micro[0])
            state, stats, stopping = self._learn(state, stats, number, batch)
            self._backward(losses, batch.micro[0], state, stats.tokens)
        elif task.accumulation == "exact":
            with torch.no_grad():
                stats = _add(self._observe(micro)[1] for micro in batch.micro)
            state, stats, stopping = self._learn(state, stats, number, batch)
            for micro, sync in self._synchronised(batch.micro):
                with sync:
                    self._backward(self._losses(micro), micro, state, stats.tokens)
        else:
            # Weights of the step before, or weights that never move: every token count is known from the draw.
            sums = []
            for micro, sync in self._synchronised(batch.micro):
                with sync:
                    losses, stats = self._observe(micro)
                    self._backward(losses, micro, state, batch.tokens)
                    sums.append(stats)
            state, stats, stopping = self._learn(state, _add(sums), number, batch)
        if task.training.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), task.training.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Position(number, state, batch.draw.counts), stats, stopping

    def evaluate(self) -> dict[str, Any]:
        task = self.task
        return evaluation.measure(
            self.model, task.store, task.training.sequence_length, self.micro, task.evaluation, self.accelerator.device
        )

    def _losses(self, micro: MicroBatch) -> Tensor:
        """(B, T) with gradient."""
        return self.model(micro.tokens.to(self.accelerator.device, non_blocking=True))

    def _observe(self, micro: MicroBatch) -> tuple[Tensor, Any]:
        """Losses (B, T) of a micro-batch with their gradient, and the objective's sums."""
        task, device = self.task, self.accelerator.device
        losses = self._losses(micro)
        reference = None
        if task.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                reference = task.reference(micro.tokens.to(device, non_blocking=True))
        domain = micro.domain.to(device, non_blocking=True)
        stats = task.objective.observe(
            losses.detach(), reference, domain, len(task.store.domains), task.objective_options
        )
        self._loss.total.add_(losses.detach().double().sum())
        self._loss.tokens.add_(losses.numel())
        return losses, stats

    def _learn(self, state: Any, stats: Any, number: int, batch: Batch) -> tuple[Any, Any, bool]:
        """The one exchange of a step: sums of all ranks, then the objective's update, the same everywhere."""
        stats, stopping = comm.all_reduce_sum(stats, stop.requested)
        stats = type(stats)(*(s.cpu() for s in stats))  # K floats: α is kept and updated in float64 on the host
        self._check_finite(stats, number, batch)
        return self.task.objective.update(state, stats, self.task.objective_options), stats, stopping

    def _backward(self, losses: Tensor, micro: MicroBatch, state: Any, tokens: Tensor) -> None:
        """Gradient of Σ weight · loss over the global batch. This is the owner of the denominator: weights are already
        divided by global counts, and the number of ranks undoes the average that DDP takes over them."""
        weights = self.task.objective.weigh(state, micro.domain, tokens, self.task.objective_options)
        total = (weights.to(losses.device, losses.dtype) * losses).sum()
        self.accelerator.backward(total * self.world.size)

    def _synchronised(self, micro: list[MicroBatch]) -> Iterator[tuple[MicroBatch, contextlib.AbstractContextManager]]:
        """Micro-batches, each with the context in which only the last one's backward exchanges gradients."""
        for part in micro[:-1]:
            yield part, self.accelerator.no_sync(self.model)
        yield micro[-1], contextlib.nullcontext()

    def _prepare_step(self, number: int) -> None:
        # Dropout is a function of (seed, step, rank), so a resumed run needs no generator state.
        mixed = np.random.SeedSequence([self.task.seed, number, self.world.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]) >> 1)
        rate = optim.learning_rate(number, self.task.training.steps, self.task.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _check_finite(self, stats: Any, number: int, batch: Batch) -> None:
        bad = [k for k in range(len(stats.tokens)) if not all(math.isfinite(field[k]) for field in stats)]
        if not bad:
            return
        names = [self.task.store.domains[k] for k in bad]
        drawn = {n: batch.draw.sequence[batch.draw.domain == k].tolist() for k, n in zip(bad, names, strict=True)}
        raise TrainingFailed(
            f"{self.task.label}: the loss is not finite at step {number}, domain {', '.join(names)} "
            f"(its sequences in this batch: {drawn}); lower training.learning_rate, or look at that text"
        )

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

    def _bar(self, step: int, tokens: int) -> Bar:
        return Bar(self.task.label, self.task.training.steps * tokens, step * tokens, show=self.world.first)

    def _logs(self, step: int) -> "contextlib.AbstractContextManager[_Logs]":
        return _Logs(self.task.run.folder if self.world.first else None, step)

    def _save(self, position: Position) -> None:
        """Rank 0 writes; the others wait, so that none runs ahead of a checkpoint that is not there."""
        # The loss since the last line of metrics moves to rank 0, as in the checkpoint: a continued run logs the same.
        loss = comm.all_reduce_sum(self._loss)[0]
        for part, whole in zip(self._loss, loss, strict=True):
            part.copy_(whole if self.world.first else torch.zeros_like(whole))
        if self.world.first:
            content = {
                "step": position.step,
                "state": list(position.state),
                "counts": torch.from_numpy(position.counts),
                "loss": [float(part) for part in self._loss],
                "model": self.bare.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            folder = self.task.run.folder
            checkpoint.save(folder / "checkpoints", position.step, content, self.task.training.keep_checkpoints)
            if self.task.run.mirror:
                checkpoint.push(folder, self.task.run.mirror)
            set_status(folder, "running", position.step)
        comm.barrier()

    def _restore(self) -> Position:
        task, domains = self.task, len(self.task.store.domains)
        fresh = task.objective.init(domains, task.training.steps, task.objective_options)
        content = checkpoint.latest(task.run.folder / "checkpoints")
        if content is None:
            return Position(0, fresh, np.zeros(domains, dtype=np.int64))
        self.bare.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        for part, value in zip(self._loss, content["loss"], strict=True):
            part.fill_(value if self.world.first else 0.0)
        return Position(content["step"], type(fresh)(*content["state"]), content["counts"].numpy())


class _Loss(NamedTuple):
    total: Tensor  # () nats
    tokens: Tensor  # ()


class _Logs:
    """The JSON lines of a run, on the first rank; nothing on the others."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self._folder, self._step = folder, step
        self._files: dict[str, files.JsonLines] = {}

    def __enter__(self) -> "_Logs":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def metrics(self, **line: float) -> None:
        self._write("metrics", line)

    def evaluation(self, step: int, measured: dict[str, Any]) -> None:
        losses = {name: figures["loss"] for name, figures in measured["domains"].items()}
        self._write("evaluations", {"step": step, "mean_loss": measured["mean_loss"], "domains": losses})

    def trace(self, task: Task, position: Position, stats: Any) -> None:
        columns = task.objective.record(position.state, stats)
        if columns:
            named = {
                key: dict(zip(task.store.domains, column.tolist(), strict=True)) for key, column in columns.items()
            }
            self._write("domain_weights", {"step": position.step, **named})

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def _write(self, name: str, line: dict[str, Any]) -> None:
        if self._folder is None:
            return
        if name not in self._files:
            self._files[name] = files.JsonLines(self._folder / f"{name}.jsonl", self._step)
        self._files[name].write(line)


def has_dropout(model: LanguageModel) -> bool:
    """Whether two forwards of the model in training mode may differ: a dropout layer, or dropout inside attention."""
    config = model.inner.config
    attention = [getattr(config, name, 0.0) or 0.0 for name in ("attention_dropout", "attn_pdrop", "attn_dropout")]
    return any(attention) or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


def _add(parts: Any) -> Any:
    """Sums of several micro-batches, added field by field."""
    columns = list(parts)
    return type(columns[0])(*(sum(fields[1:], start=fields[0]) for fields in zip(*columns, strict=True)))

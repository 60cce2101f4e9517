"""Our mixtures in a `transformers.Trainer` whose training dataset is a `Mixed`: losses by domain,
mixtures that follow from them, and DoReMi's proxy.

Make the Trainer with `train_sampling_strategy="sequential"` and `remove_unused_columns=False`, then
attach one of the two to it. They hang on hooks of its model, so that the Trainer's own loop,
engines and checkpoints stay as they are. One model a process (no DataParallel).

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from doremi_train.client.learned import Learner
from doremi_train.client.losses import sums, token_losses
from doremi_train.client.mixed import Mixed
from doremi_train.client.proxy import Reweighting
from doremi_train.config import UserError
from doremi_train.methods import doremi
from doremi_train.methods.online import Stats
from doremi_train.parallel import comm


class DomainLosses(TrainerCallback):
    """Attached to a Trainer, it logs the loss of every domain as `loss/NAME` (nats per token),
    wherever the Trainer logs its own, and tells a `learner`."""

    def __init__(self, trainer: Trainer, learner: Learner | None = None) -> None:
        if not isinstance(trainer.train_dataset, Mixed):
            raise UserError(
                f"Trainer: train_dataset is a {type(trainer.train_dataset).__name__}; give a "
                "doremi_train.client.Mixed"
            )
        self.stream = trainer.train_dataset.stream
        self._learner = learner
        self._step, self._logged = self._nothing(), self._nothing()
        self._domain: Tensor | None = None
        assert trainer.model is not None
        trainer.model.register_forward_pre_hook(self._take, with_kwargs=True)
        trainer.model.register_forward_hook(self._after, with_kwargs=True)
        # Before the trackers, so that they get the losses too.
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check that the Trainer reads the stream as it is meant, and go on where it does."""
        check(args, state, self.stream.batch)
        if self._learner is not None:
            ahead = _ahead(args)
            if self._learner.lag < ahead:
                raise UserError(
                    f"Learner: lag={self._learner.lag}: the loader reads {ahead} steps ahead; set "
                    f"lag={ahead}, or lower dataloader_num_workers or dataloader_prefetch_factor"
                )
            if state.global_step:
                self._learner.restore(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        total = comm.all_reduce_sum(self._step)[0]
        self._step = self._nothing()
        self._logged = Stats(*(a + b for a, b in zip(self._logged, total, strict=True)))
        if self._learner is not None:
            self._learner.report(*total)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        means = (self._logged.loss / self._logged.tokens).tolist()
        named = zip(self.stream.names, means, self._logged.tokens.tolist(), strict=True)
        found = {f"loss/{name}": mean for name, mean, tokens in named if tokens}
        for lines in (logs, state.log_history[-1] if state.log_history else None):
            if lines is not None and "loss" in lines:
                lines.update(found)
        self._logged = self._nothing()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._learner is not None and comm.world().first:
            self._learner.save()

    def _nothing(self) -> Stats:
        zeros = torch.zeros(len(self.stream.names), dtype=torch.float64)
        return Stats(zeros, zeros)

    def _take(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Keep the domains (B,) from the model, which would not know them."""
        self._domain = kwargs.pop("domain", None)
        return args, kwargs

    def _after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training:
            return output
        if self._domain is None:
            raise UserError("the model got a batch without `domain`; keep it in the data collator")
        losses, present = _losses(output, kwargs["labels"])
        found = sums(losses.detach(), present, self._domain, len(self.stream.names))
        # On the model's device, where ranks can add them up.
        self._step = Stats(*(a.to(b.device) + b for a, b in zip(self._step, found, strict=True)))
        return self._use(losses, present, kwargs, output)

    def _use(self, losses: Tensor, present: Tensor, kwargs: dict[str, Any], output: Any) -> Any:
        return output


class Proxy(DomainLosses):
    """DoReMi's proxy: attached to a Trainer, it weighs the loss by α_t (`Reweighting`), with the
    excess over `reference`, a frozen causal language model. The stream is uniform in the paper.

    With gradient_accumulation_steps above 1 it is lagged: the weights are α_{t−1}.
    """

    def __init__(
        self,
        trainer: Trainer,
        reference: nn.Module,
        steps: int,
        options: doremi.Options | None = None,
    ) -> None:
        super().__init__(trainer)
        self._reference = reference.eval().requires_grad_(False)
        accumulated = trainer.args.gradient_accumulation_steps
        self._reweighting = Reweighting(self.stream, steps, options, accumulated)
        self._averages = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        super().on_train_begin(args, state, control, **more)
        self._averages = bool(args.average_tokens_across_devices)
        self._reweighting.begin(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._reweighting.save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._reweighting.finish("transformers")

    def _use(self, losses: Tensor, present: Tensor, kwargs: dict[str, Any], output: Any) -> Any:
        assert self._domain is not None
        if getattr(output, "logits", None) is None:
            raise UserError(
                f"Proxy: the model gives a {type(output).__name__} without logits, whose loss the "
                "trainer makes itself, so it cannot be weighed; use transformers' own Trainer"
            )
        with torch.no_grad():
            named = {key: kwargs[key] for key in ("input_ids", "attention_mask") if key in kwargs}
            logits = self._reference.to(losses.device)(**named).logits
            reference, _ = shifted(logits, kwargs["labels"])
        part = self._reweighting.objective(losses, reference, present, self._domain)
        counted = kwargs.get("num_items_in_batch") is not None
        # Gradients are averaged over processes, and losses of micro-batches; where the Trainer
        # counts tokens itself, it may have thought of both.
        averaged = 1 if counted else self._reweighting.micro_batches
        size = 1 if counted and self._averages else comm.world().size
        output.loss = averaged * size * part
        return output


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T − 1) losses of the next token, and where there is one, of logits (B, T, V) and labels
    (B, T), as `token_losses`."""
    return token_losses(logits[:, :-1], labels[:, 1:])


def _losses(output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T − 1) losses, and where there are any, of a model's output. Raises UserError where it
    has none of tokens."""
    if getattr(output, "logits", None) is not None:
        return shifted(output.logits, labels)
    if getattr(output, "log_probs", None) is not None:  # TRL's SFTTrainer fuses the loss
        return -output.log_probs, output.label_mask
    raise UserError(
        f"the model gives a {type(output).__name__} without logits, so losses of tokens are not "
        "known; turn its fused loss off, or draw from the Mixed alone"
    )


def check(args: TrainingArguments, state: TrainerState, batch: int) -> None:
    """Raise UserError where a Trainer would not read a stream of `batch` sequences a step in its
    order."""
    if args.train_sampling_strategy != "sequential":
        raise UserError(
            f"train_sampling_strategy={args.train_sampling_strategy!r}: would shuffle what the "
            "stream has drawn; set sequential"
        )
    if args.remove_unused_columns:
        raise UserError(
            "remove_unused_columns=True: would take `domain` out of every batch, since the model "
            "does not know it; set False"
        )
    size = comm.world().size
    read = args.train_batch_size * args.gradient_accumulation_steps * size
    if read != batch:
        raise UserError(
            f"per_device_train_batch_size={args.per_device_train_batch_size}: with {size} "
            f"processes and gradient_accumulation_steps={args.gradient_accumulation_steps} a step "
            f"reads {read} sequences, the stream's has {batch}; make them agree"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"n_gpu={args.n_gpu}: one model over several GPUs of a process is not supported; start "
            "one process each, with torchrun or accelerate launch"
        )


def _ahead(args: TrainingArguments) -> int:
    """Steps that a loader may be ahead of the training: accelerate's reads one batch more, and the
    Trainer all micro-batches of a step."""
    waiting = args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
    return 1 + -(-(waiting + 1) // args.gradient_accumulation_steps)

"""Our mixtures in a `transformers.Trainer` whose training dataset is a `Mixed`: losses by domain,
mixtures that follow from them, and DoReMi's proxy.

Make the Trainer with `train_sampling_strategy="sequential"` and `remove_unused_columns=False`, then
attach one of the two to it. They hang on hooks of its model, so that the Trainer's own loop,
engines and checkpoints stay as they are. One model a process (no DataParallel).

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from doremi_train import files, mixture
from doremi_train.client.learned import Learner, restored, save
from doremi_train.client.mixed import Mixed
from doremi_train.config import UserError
from doremi_train.methods import doremi
from doremi_train.methods.online import Stats
from doremi_train.parallel import comm

_IGNORED = -100  # label of a token without a loss


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
        losses, present = token_losses(output.logits, kwargs["labels"])
        sums = _sums(losses.detach(), present, self._domain, len(self.stream.names))
        # On the model's device, where ranks can add them up.
        self._step = Stats(*(a.to(b.device) + b for a, b in zip(self._step, sums, strict=True)))
        return self._use(losses, present, kwargs, output)

    def _use(self, losses: Tensor, present: Tensor, kwargs: dict[str, Any], output: Any) -> Any:
        return output


class Proxy(DomainLosses):
    """DoReMi's proxy: attached to a Trainer over a uniform stream, it weighs the loss by α_t
    (Algorithm 1), with the excess over `reference`, a frozen causal language model.

    At the end `<folder>/weights.json` is the mixture, and `domain_weights.jsonl` has α_t and λ_t of
    every step. A step is one micro-batch of every process, because α_t is that of the whole batch.
    """

    def __init__(
        self,
        trainer: Trainer,
        reference: nn.Module,
        steps: int,
        options: doremi.Options | None = None,
    ) -> None:
        super().__init__(trainer)
        self._options = options or doremi.Options()
        if self._options.objective != "weight":
            raise UserError("Proxy: objective=resample: is not here; leave it at weight")
        self._reference = reference.eval().requires_grad_(False)
        self.state = doremi.init(len(self.stream.names), steps, self._options)
        self._averages = False
        self._trace: files.JsonLines | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        super().on_train_begin(args, state, control, **more)
        if args.gradient_accumulation_steps > 1:
            raise UserError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}: α of a batch "
                "weighs all of it, so a proxy takes it at once; set 1 and a larger "
                "per_device_train_batch_size, or more processes"
            )
        self._averages = bool(args.average_tokens_across_devices)
        if state.global_step:
            self.state = restored(self._path(state.global_step), self.state)
        if comm.world().first:
            path = self.stream.folder / "domain_weights.jsonl"
            self._trace = files.JsonLines(path, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trace is not None:
            self._trace.sync()
            save(self._path(state.global_step), self.state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trace is None:
            return
        self._trace.close()
        weights = self.stream.mapping(doremi.result(self.state).numpy())
        about = {"steps": int(self.state.step), "trainer": "transformers"}
        found = mixture.Mixture("doremi", weights, provenance=about)
        mixture.save(self.stream.folder / "weights.json", found)

    def _use(self, losses: Tensor, present: Tensor, kwargs: dict[str, Any], output: Any) -> Any:
        domain, domains = self._domain, len(self.stream.names)
        assert domain is not None
        with torch.no_grad():
            named = {key: kwargs[key] for key in ("input_ids", "attention_mask") if key in kwargs}
            logits = self._reference.to(losses.device)(**named).logits
            reference, _ = token_losses(logits, kwargs["labels"])
        sums = doremi.observe(losses, reference, domain, domains, self._options)
        # What is padded has no excess, and is no token.
        counted = _sums(losses.detach(), present, domain, domains).tokens
        total = comm.all_reduce_sum(doremi.Stats(sums.excess, counted))[0]
        self.state = doremi.update(self.state, total, self._options)
        self._write(total)
        weights = doremi.weigh(self.state, domain.cpu(), total.tokens, self._options)
        # Gradients are averaged over processes; the Trainer itself may have thought of it.
        scaled = self._averages and kwargs.get("num_items_in_batch") is not None
        size = 1 if scaled else comm.world().size
        output.loss = size * (weights.to(losses) * losses).sum()
        return output

    def _write(self, total: doremi.Stats) -> None:
        if self._trace is None:
            return
        names = self.stream.names
        columns = {
            key: dict(zip(names, value.tolist(), strict=True)) if value.dim() else value.item()
            for key, value in doremi.record(self.state, total).items()
        }
        self._trace.write({"step": int(self.state.step), **columns})

    def _path(self, step: int) -> Path:
        return self.stream.folder / "learned" / f"doremi-{step:08d}.json"


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T − 1) losses of the next token in nats, 0 where it is ignored, and where it is not, of
    logits (B, T, V) and labels (B, T)."""
    following = labels[:, 1:].to(logits.device)
    flat = cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        following.flatten(),
        ignore_index=_IGNORED,
        reduction="none",
    )
    return flat.view_as(following), following != _IGNORED


def _sums(losses: Tensor, present: Tensor, domain: Tensor, domains: int) -> Stats:
    """(K,) losses, and tokens that have one."""
    zeros = losses.new_zeros(domains, dtype=torch.float64)
    return Stats(*(zeros.index_add(0, domain, x.double().sum(1)) for x in (losses, present)))


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

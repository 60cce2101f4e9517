"""Our stream in torchtitan 0.3.0: a dataloader, losses by domain, a mixture that follows from them,
and DoReMi's proxy.

In a configuration of yours, `dataloader=MixedDataLoader.Config(mixed=…)` draws from the stream with
any trainer; for losses by domain return a `DomainTrainer.Config` in place of the `Trainer.Config`.
Rows have seq_len + 1 tokens. Losses by domain need a row's whole logits on a process: no tensor,
context or pipeline parallelism, and no chunked loss.

K domains, B sequences of a micro-batch, T tokens a sequence, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.trainer import Trainer

from doremi_train.client.learned import Learner
from doremi_train.client.loader import Loader
from doremi_train.client.losses import sums, token_losses
from doremi_train.client.mixed import Mixed
from doremi_train.client.proxy import Reweighting
from doremi_train.client.stream import Stream
from doremi_train.config import UserError
from doremi_train.methods.online import Stats
from doremi_train.parallel import comm


class MixedDataLoader(Loader, BaseDataLoader):
    """The rows of a `Mixed` in its order; its state is a number, in torchtitan's checkpoint."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        mixed: Annotated[Callable[[], Mixed] | None, tyro.conf.Suppress] = None
        """Opens the dataset, in every process."""

        num_workers: int = 0
        """Processes that read ahead."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        if config.mixed is None:
            raise UserError("MixedDataLoader: mixed=None: give a function that opens the dataset")
        self.mixed = config.mixed()
        super().__init__(
            self.mixed,
            local_batch_size,
            dp_rank,
            dp_world_size,
            num_workers=config.num_workers,
            collate_fn=partial(_batch, seq_len),
        )


class DomainTrainer(Trainer):
    """A Trainer that logs the loss of every domain as `loss/NAME` (nats per token) to torchtitan's
    loggers, and tells a `learner`; or that is DoReMi's proxy, where `reweighting` is given."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        learner: Annotated[Callable[[Stream], Learner] | None, tyro.conf.Suppress] = None
        reweighting: Annotated[Callable[[Stream], Reweighting] | None, tyro.conf.Suppress] = None
        reference: Annotated[Callable[[Tensor], Tensor] | None, tyro.conf.Suppress] = None
        """Logits (B, T, V) of the frozen reference, of tokens (B, T)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        place, loader = self.parallel_dims, self.dataloader
        if not isinstance(loader, MixedDataLoader):
            raise UserError("DomainTrainer: dataloader: must be a MixedDataLoader.Config")
        if place.tp_enabled or place.cp_enabled or place.pp_enabled:
            raise UserError(
                "DomainTrainer: parallelism: losses by domain need the whole logits of a row; "
                "leave tensor, context and pipeline parallelism at 1"
            )
        if not isinstance(self.loss_fn, CrossEntropyLoss):
            raise UserError(
                f"DomainTrainer: loss={type(self.loss_fn).__name__}: has no losses of tokens; set "
                "loss=CrossEntropyLoss.Config()"
            )
        loader.check(loader.size, self.gradient_accumulation_steps)
        self.loss_fn: Any = self._by_domain  # validation has the other one
        self.stream = loader.mixed.stream
        self._learner = config.learner(self.stream) if config.learner else None
        self._reweighting = config.reweighting(self.stream) if config.reweighting else None
        self._reference = config.reference
        if self._reweighting is not None:
            self._reweighting.check(self.gradient_accumulation_steps)
        self._begun = False
        self._step, self._logged = self._nothing(), self._nothing()

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor) -> Any:
        """Keep the domains (B,) from the model, which would not know them."""
        self._domain: Tensor = input_dict.pop("domain")
        self._tokens = input_dict["input"]
        return super().post_dataloading_process(input_dict, labels)

    def train_step(self, data_iterator: Any) -> None:
        if not self._begun:  # a checkpoint may have been loaded by now
            self._begin(self.step - 1)
        super().train_step(data_iterator)
        total = comm.all_reduce_sum(self._step)[0]
        self._step = self._nothing()
        if self._learner is not None:
            self._learner.report(*total)
        self._logged = Stats(*(a + b for a, b in zip(self._logged, total, strict=True)))
        if self.metrics_processor.should_log(self.step):
            means = (self._logged.loss / self._logged.tokens).tolist()
            named = zip(self.stream.names, means, self._logged.tokens.tolist(), strict=True)
            found = {f"loss/{name}": mean for name, mean, tokens in named if tokens}
            self.metrics_processor.logger.log(found, self.step)
            self._logged = self._nothing()

    def state_dict(self) -> dict[str, Any]:
        """What torchtitan saves of the run; ours is saved beside."""
        for part in (self._learner, self._reweighting):
            if part is not None and self._begun and comm.world().first:
                part.save()
        return super().state_dict()

    def train(self) -> None:
        super().train()
        if self._reweighting is not None and self.step == self.config.training.steps:
            self._reweighting.finish("torchtitan")

    def _begin(self, step: int) -> None:
        self._begun = True
        if self._learner is not None and step:
            self._learner.restore(step)
        if self._reweighting is not None:
            self._reweighting.begin(step)

    def _by_domain(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's part of the loss: torchtitan adds gradients of processes up."""
        losses, present = token_losses(pred, labels)
        domain, domains = self._domain, len(self.stream.names)
        seen = sums(losses.detach(), present, domain, domains)
        self._step = Stats(*(a.to(b.device) + b for a, b in zip(self._step, seen, strict=True)))
        if self._reweighting is None:
            return losses.sum() / global_valid_tokens, {}
        assert self._reference is not None
        with torch.no_grad():
            held = token_losses(self._reference(self._tokens), labels)[0]
        return self._reweighting.objective(losses, held, present, domain), {}

    def _nothing(self) -> Stats:
        zeros = torch.zeros(len(self.stream.names), dtype=torch.float64)
        return Stats(zeros, zeros)


def _batch(seq_len: int, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs (B, T), positions (B, T) and domains (B,); and labels (B, T)."""
    tokens = torch.stack([torch.as_tensor(row["input_ids"]).long() for row in rows])
    if tokens.shape[1] != seq_len + 1:
        raise UserError(
            f"Mixed: rows of {tokens.shape[1]} tokens, but training.seq_len={seq_len} needs "
            f"{seq_len + 1} for its labels"
        )
    inputs = {
        "input": tokens[:, :-1],
        "positions": torch.arange(seq_len).expand(len(rows), -1),
        "domain": torch.tensor([row["domain"] for row in rows]),
    }
    return inputs, tokens[:, 1:]

"""Losses by domain, and what follows from them, in a `lightning.Trainer` whose train dataloader is
a `Loader` over a `Mixed`.

A plain DataLoader begins anew where Lightning resumes within an epoch; a `Loader` goes on.

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

from collections.abc import Mapping
from typing import Any

import lightning as pl
import torch

from doremi_train.client.learned import Learner
from doremi_train.client.loader import Loader
from doremi_train.client.losses import sums
from doremi_train.client.proxy import Reweighting
from doremi_train.client.stream import Stream
from doremi_train.config import UserError
from doremi_train.methods.online import Stats
from doremi_train.parallel import comm


class DomainLosses(pl.Callback):
    """Logs the loss of every domain as `loss/NAME` (nats per token) after each step, and tells a
    `learner`; keeps the state of either, or of the `reweighting` that a training step uses.

    `training_step` has to return, beside "loss", "losses" (B, T) in nats and "present" (B, T),
    where there are any.
    """

    def __init__(
        self,
        stream: Stream,
        learner: Learner | None = None,
        reweighting: Reweighting | None = None,
    ) -> None:
        self.stream, self._learner, self._reweighting = stream, learner, reweighting
        self._seen = self._nothing()
        self._steps = 0  # of the Trainer, so far

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, Loader):
            raise UserError(
                f"train_dataloader: a {type(loader).__name__} begins anew where Lightning resumes; "
                "give a doremi_train.client.loader.Loader"
            )
        loader.check(trainer.world_size, trainer.accumulate_grad_batches)
        self._steps, self._seen = trainer.global_step, self._nothing()
        if self._learner is not None and self._steps:
            self._learner.restore(self._steps)
        if self._reweighting is not None:
            self._reweighting.check(trainer.accumulate_grad_batches)
            self._reweighting.begin(self._steps)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        if not isinstance(outputs, Mapping) or not {"losses", "present"} <= outputs.keys():
            raise UserError("training_step: must return a dict of loss, losses and present")
        domains = len(self.stream.names)
        found = sums(outputs["losses"].detach(), outputs["present"], batch["domain"], domains)
        self._seen = Stats(*(a.to(b.device) + b for a, b in zip(self._seen, found, strict=True)))
        if trainer.global_step == self._steps:
            return  # gradients are accumulated
        self._steps = trainer.global_step
        total = comm.all_reduce_sum(self._seen)[0]
        self._seen = self._nothing()
        if self._learner is not None:
            self._learner.report(*total)
        named = zip(self.stream.names, *(part.tolist() for part in total), strict=True)
        pl_module.log_dict(
            {f"loss/{name}": loss / tokens for name, loss, tokens in named if tokens}
        )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for part in (self._learner, self._reweighting):
            if part is not None and comm.world().first:
                part.save()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._reweighting is not None and not trainer.interrupted:
            self._reweighting.finish("lightning")

    def _nothing(self) -> Stats:
        zeros = torch.zeros(len(self.stream.names), dtype=torch.float64)
        return Stats(zeros, zeros)

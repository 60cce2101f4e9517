"""DoReMi's proxy in the loop of another trainer: losses of a batch in, its objective out.

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

from pathlib import Path

import torch
from torch import Tensor

from doremi_train import files, mixture
from doremi_train.client.learned import restored, save
from doremi_train.client.losses import sums
from doremi_train.client.stream import Stream
from doremi_train.config import UserError
from doremi_train.methods import doremi
from doremi_train.parallel import comm


class Reweighting:
    """α_t of Algorithm 1 over what a stream draws, in a run of `steps` steps.

    `<folder>/domain_weights.jsonl` has α_t and λ_t of every step, and after `finish`
    `weights.json` the mixture. A step is one micro-batch of every process, because α_t is that of
    the whole batch. Where it is `micro_batches` of them, they are weighed by α_{t−1}, as our own
    proxy.accumulation=lagged does, and have to be whole: no label may be ignored.
    """

    def __init__(
        self,
        stream: Stream,
        steps: int,
        options: doremi.Options | None = None,
        micro_batches: int = 1,
    ) -> None:
        self.stream, self.micro_batches = stream, micro_batches
        self._options = options or doremi.Options()
        if self._options.objective != "weight":
            raise UserError("Reweighting: objective=resample: is not here; leave it at weight")
        self.state = doremi.init(len(stream.names), steps, self._options)
        self._parts: list[doremi.Stats] = []  # of this step's micro-batches
        self._trace: files.JsonLines | None = None

    def check(self, micro_batches: int) -> None:
        """Raise UserError where a step of the trainer has another number of micro-batches."""
        if micro_batches != self.micro_batches:
            raise UserError(
                f"Reweighting: micro_batches={self.micro_batches}: the trainer's steps have "
                f"{micro_batches}; make them agree"
            )

    def begin(self, step: int = 0) -> None:
        """Start after `step` steps, at which it was saved. Raises UserError where it was not."""
        if step:
            self.state = restored(self._path(step), self.state)
        self._parts = []
        if comm.world().first:
            self._trace = files.JsonLines(self.stream.folder / "domain_weights.jsonl", step)

    def objective(
        self, losses: Tensor, reference: Tensor, present: Tensor, domain: Tensor
    ) -> Tensor:
        """The part of this process's micro-batch in Σ_k α[k] · (mean loss of domain k), which is
        the sum over all micro-batches and processes: multiply it by the number of processes where
        gradients are averaged over them, and by that of micro-batches where losses are.

        `losses` (B, T) of the proxy and `reference` (B, T) in nats, where `present` (B, T) they
        are any; `domain` (B,). All processes have to call it together.
        """
        domains = len(self.stream.names)
        seen = doremi.observe(losses.detach(), reference, domain, domains, self._options)
        # What is padded has no excess, and is no token.
        counted = sums(losses.detach(), present, domain, domains).tokens
        self._parts.append(seen._replace(tokens=counted))
        if self.micro_batches == 1:
            tokens = self._learn().tokens
            weighing = self.state
        else:
            tokens, weighing = self._drawn(present), self.state
            if len(self._parts) == self.micro_batches:
                self._learn()
        weights = doremi.weigh(weighing, domain.cpu(), tokens, self._options)
        return (weights.to(losses) * losses).sum()

    def save(self) -> None:
        """Write the state to where `begin` finds it; on the first process alone."""
        if self._trace is not None:
            self._trace.sync()
            save(self._path(int(self.state.step)), self.state)

    def finish(self, trainer: str) -> None:
        """Write the mixture; on the first process alone."""
        if self._trace is None:
            return
        self._trace.close()
        weights = self.stream.mapping(doremi.result(self.state).numpy())
        about = {"steps": int(self.state.step), "trainer": trainer}
        mixture.save(
            self.stream.folder / "weights.json",
            mixture.Mixture("doremi", weights, provenance=about),
        )

    def _drawn(self, present: Tensor) -> Tensor:
        """(K,) tokens of the whole batch, which are known before all of it was seen."""
        if not present.all():
            raise UserError(
                f"Reweighting: micro_batches={self.micro_batches}: a label is ignored, so how many "
                "tokens a domain has in the batch is not known before its last micro-batch; take "
                "the batch at once, or pack the sequences"
            )
        return torch.from_numpy(self.stream.quota(int(self.state.step)) * present.shape[1])

    def _learn(self) -> doremi.Stats:
        """Sums of the whole batch, from which α has moved."""
        parts = (torch.stack(part).sum(0) for part in zip(*self._parts, strict=True))
        total = comm.all_reduce_sum(doremi.Stats(*parts))[0]
        self._parts = []
        self.state = doremi.update(self.state, total, self._options)
        if self._trace is not None:
            columns = {
                key: self.stream.mapping(value.numpy()) if value.dim() else value.item()
                for key, value in doremi.record(self.state, total).items()
            }
            self._trace.write({"step": int(self.state.step), **columns})
        return total

    def _path(self, step: int) -> Path:
        return self.stream.folder / "learned" / f"doremi-{step:08d}.json"

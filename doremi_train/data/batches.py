"""Batches of a run: the draw of a step, read from the token store, cut into this rank's
micro-batches.

K domains, B sequences of a micro-batch, T tokens a sequence.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.config import UserError
from doremi_train.data.sampler import Draw, Ints, Sampler, Subsample


class Store(Protocol):
    """What sequences come from: `shards.TokenStore`, or `instructions.Instructions`."""

    domains: tuple[str, ...]
    fingerprint: str

    def named(self, vector: Any) -> dict[str, float]:
        """{domain: value} of a tensor or array (K,)."""

    def sizes(self, split: str) -> Ints:
        """(K,) tokens."""

    def sequences(self, split: str, length: int) -> Ints:
        """(K,) how many sequences each domain has."""

    def gather(self, split: str, domain: Ints, sequence: Ints, length: int) -> Ints:
        """(B, T + 1) tokens for T ≤ `length`; one that carries no loss is there as its complement
        ~id, negative."""

    def carrying(self, split: str, domain: Ints, sequence: Ints, length: int) -> Ints:
        """(B,) tokens that carry a loss."""

    def bytes_per_token(self, split: str) -> NDArray[np.float64]:
        """(K,) UTF-8 bytes of text per token; nan where unknown."""


class MicroBatch(NamedTuple):
    # (B, T + 1) int64: inputs are all but the last, targets all but the first; see Store.gather
    tokens: Tensor
    domain: Tensor  # (B,) int64
    sequence: Tensor  # (B,) int64 index within the domain
    # (B, T) float16 losses of the reference, as far as they are stored.
    reference: Tensor | None = None

    @property
    def carrying(self) -> Tensor:
        """(B,) tokens that carry a loss."""
        return (self.tokens[:, 1:] >= 0).sum(1)


class Batch(NamedTuple):
    micro: list[MicroBatch]  # this rank's share
    draw: Draw  # the whole global batch, the same on every rank
    tokens: Tensor  # (K,) float64 loss-carrying tokens of the global batch


class Batches:
    """Random access to the batches of a run. One is read ahead, on the guess that the weights stay
    as they are."""

    def __init__(
        self,
        store: Store,
        length: int,
        batch: int,
        rows: list[slice],
        seed: int,
        subsample: Subsample | None = None,
        stored: Callable[[Ints, Ints], Tensor | None] | None = None,
    ) -> None:
        self.store, self.length = store, length
        require_sequences(store, "train", length)
        self.sampler = Sampler(
            store.sequences("train", length), store.domains, batch, seed, subsample
        )
        self.sizes = self.sampler.sizes  # (K,) sequences that may be drawn
        self._rows = rows  # of the global batch: this rank's, one slice a micro-batch
        # The reference's losses of (domain, sequence), to be read with the tokens.
        self._stored = stored
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, bytes, Future[Batch]] | None = None

    def get(self, step: int, weights: Tensor, counts: Ints) -> Batch:
        """The batch of step `step` (from 0) under `weights` (K,), `counts` (K,) sequences having
        been drawn before."""
        mixture = weights.numpy()
        if self._ahead is not None and self._ahead[:2] == (step, mixture.tobytes()):
            batch = self._ahead[2].result()
        else:
            batch = self._read(step, mixture, counts)
        ahead = self._reader.submit(self._read, step + 1, mixture, batch.draw.counts)
        self._ahead = (step + 1, mixture.tobytes(), ahead)
        return batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _read(self, step: int, weights: NDArray[np.float64], counts: Ints) -> Batch:
        return self.of(self.sampler.draw(step, weights, counts), self._rows)

    def of(self, draw: Draw, rows: list[slice]) -> Batch:
        """The batch of a draw, cut into these rows of it."""
        micro = [self._micro(draw.domain[part], draw.sequence[part]) for part in rows]
        return Batch(micro, draw, self._tokens(draw))

    def among(self, batch: Batch, picks: Ints, local: Ints) -> Batch:
        """The sequences `picks` of the draw, which are `local` of the micro-batch, of a batch in
        one micro-batch."""
        (micro,) = batch.micro
        kept = MicroBatch(*(None if field is None else field[local] for field in micro))  # type: ignore[arg-type]
        draw = some(batch.draw, picks)
        return Batch([kept], draw, self._tokens(draw))

    def _tokens(self, draw: Draw) -> Tensor:
        carrying = self.store.carrying("train", draw.domain, draw.sequence, self.length)
        return torch.from_numpy(np.bincount(draw.domain, carrying, len(draw.counts)))

    def _micro(self, domain: Ints, sequence: Ints) -> MicroBatch:
        micro = read(self.store, "train", domain, sequence, self.length)
        return (
            micro
            if self._stored is None
            else micro._replace(reference=self._stored(domain, sequence))
        )


def some(draw: Draw, index: Ints) -> Draw:
    """These sequences of a draw."""
    return Draw(draw.domain[index], draw.sequence[index], draw.counts)


def read(store: Store, split: str, domain: Ints, sequence: Ints, length: int) -> MicroBatch:
    """The named sequences as tensors."""
    tokens = store.gather(split, domain, sequence, length)
    return MicroBatch(
        torch.from_numpy(tokens), torch.from_numpy(domain), torch.from_numpy(sequence)
    )


def require_sequences(store: Store, split: str, length: int) -> None:
    """Raise UserError naming a domain whose split is shorter than one sequence of `length` + 1
    tokens."""
    remedy = (
        "add text" if split == "train" else "give validation files, raise data.validation_fraction"
    )
    for name, size, tokens in zip(
        store.domains, store.sequences(split, length), store.sizes(split), strict=True
    ):
        if size == 0:
            raise UserError(
                f"domain {name!r}: {tokens} {split} tokens are less than one sequence of "
                f"training.sequence_length={length} + 1; {remedy}, shorten the sequence, or leave "
                "the domain out"
            )


def fixed_sequences(store: Store, split: str, length: int, per_domain: int) -> tuple[Ints, Ints]:
    """(domain (N,), sequence (N,)): at most `per_domain` sequences a domain, evenly spread over the
    split.

    The choice depends on the data alone, never on a mixture or a seed. Raises UserError where a
    domain has none.
    """
    require_sequences(store, split, length)
    domains, sequences = [], []
    for k, size in enumerate(store.sequences(split, length)):
        taken = min(per_domain, int(size))
        domains.append(np.full(taken, k))
        sequences.append(np.arange(taken) * size // taken)
    return np.concatenate(domains), np.concatenate(sequences)

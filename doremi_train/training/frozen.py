"""Losses of the frozen reference: computed with every batch, or cached in the store and computed
once.

    <store>/losses/<address>/recipe.json    fingerprints of model, data and tokeniser, sequence
                                            length, precision
                             losses.f16     a row of T float16 and their CRC-32 for every training
                                            sequence, domain after domain; sparse

Nothing else says what is there. A row whose checksum is another was never written, or not to its
end, or was damaged since. That needs no lock: writers of one row write what the same model gives,
and whoever sees it torn computes it again. The cache stays in the local store; a second home
(`remote`) has no copy, since it can always be computed again. In memory no loss is 0, and a row
with a 0 in it is one that is not there.

K domains, N sequences of all domains together, B sequences of a micro-batch, T tokens a sequence.
"""

import contextlib
import mmap
import os
import weakref
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train import files
from doremi_train.config import UserError, fingerprint
from doremi_train.data.batches import MicroBatch
from doremi_train.data.sampler import Ints
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import importance
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import comm

Halves = NDArray[np.float16]

_HALF = np.dtype("<f2")
_CHECK = 2  # float16 that a checksum takes the room of
_SMALLEST, _LARGEST = (float(limit) for limit in (np.finfo(_HALF).tiny, np.finfo(_HALF).max))


class Reference(Protocol):
    """The frozen reference as the trainer sees it."""

    def stored(self, domain: Ints, sequence: Ints) -> Tensor | None:
        """What is known without the model of sequences `sequence` (B,) of `domain` (B,): (B, T)
        float16 with a 0 in every row that is not, or nothing. Called by another thread, ahead of
        `losses`."""

    def losses(self, micro: MicroBatch) -> Tensor:
        """(B, T) float32 on the device, nats."""


class Live:
    """The model itself, as `engine.frozen` spread it."""

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._divided = any(map(comm.in_parts, model.parameters()))

    def stored(self, domain: Ints, sequence: Ints) -> Tensor | None:
        return None

    @torch.no_grad()
    def losses(self, micro: MicroBatch) -> Tensor:
        tokens = micro.tokens
        if not len(tokens):  # of an uneven batch
            if not self._divided:
                return torch.zeros(0, tokens.shape[1] - 1, device=self._device)
            tokens = tokens.new_zeros(1, tokens.shape[1])  # to take part
        return self._model(tokens.to(self._device, non_blocking=True))[: len(micro.tokens)]


class LogRatio:
    """Loss under the reference minus loss under a model of the data: ℓ_ref − ℓ_q, for IMP."""

    def __init__(self, reference: Reference, data: Reference) -> None:
        self._reference, self._data = reference, data

    def stored(self, domain: Ints, sequence: Ints) -> Tensor | None:
        return None  # each reads its own when it is asked for losses

    def losses(self, micro: MicroBatch) -> Tensor:
        return importance.log_ratio(self._reference.losses(micro), self._data.losses(micro))


# ── In the store ────────────────────────────────────────────────────────────────────


def recipe(reference: str, store: TokenStore, length: int, precision: str) -> dict[str, str | int]:
    """Everything that decides the losses of the reference with the fingerprint `reference`."""
    return {
        "reference": reference,
        "data": store.fingerprint,
        "tokenizer": store.manifest["tokenizer"]["fingerprint"],
        "sequence_length": length,
        "precision": precision,
        "checksums": True,  # of rows, which older versions had not
    }


class Table:
    """The file of one recipe. A row is a training sequence."""

    def __init__(self, folder: Path, store: TokenStore, recipe: Mapping[str, Any]) -> None:
        """Open it, or begin it. Raises UserError where what is there is something else."""
        self.path = _path(folder, recipe)
        self.length = int(recipe["sequence_length"])
        # (K + 1,)
        self._first = np.concatenate([[0], np.cumsum(store.sequences("train", self.length))])
        said = self.path.with_name("recipe.json")
        if not said.exists():
            with files.making(said) as todo:
                if todo:
                    files.write_json(said, recipe)
        if _read(said) != recipe:
            raise self._damaged(
                f"{said} is not of the reference, data, sequence length and precision of this run"
            )
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)
        size = row_bytes(self.length) * int(self._first[-1])
        if os.fstat(self._file).st_size == 0:
            os.truncate(self.path, size)  # takes no room until rows are written
        elif os.fstat(self._file).st_size != size:
            raise self._damaged(
                f"{self.path} has {self.path.stat().st_size} bytes instead of {size}"
            )
        mapped = mmap.mmap(self._file, size, prot=mmap.PROT_READ)
        # A batch's rows lie far apart: what is beside them is not wanted.
        mapped.madvise(mmap.MADV_RANDOM)
        # (N, T + 2)
        self._rows: Halves = np.frombuffer(mapped, _HALF).reshape(-1, self.length + _CHECK)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, domain: Ints, sequence: Ints) -> Ints:
        """(B,) where the sequences stand."""
        return self._first[domain] + sequence

    def sequences(self, rows: Ints) -> tuple[Ints, Ints]:
        """(domain (B,), sequence (B,)) that stand there."""
        domain = np.searchsorted(self._first, rows, side="right") - 1
        return domain, rows - self._first[domain]

    def read(self, rows: Ints) -> Halves:
        """(B, T), a copy, 0 where a row is not there as it was written."""
        found = self._rows[rows]
        losses = found[:, : self.length].copy()
        sound = _checks(losses).view(np.uint16) == found[:, self.length :].view(np.uint16)
        losses[~sound.all(1)] = 0
        return losses

    def write(self, rows: Ints, losses: Halves) -> None:
        """Raises OSError where there is no room. Never through the map, where that would be a fatal
        signal."""
        try:
            checked = np.concatenate([losses, _checks(losses)], axis=1)
            for row, values in zip(rows.tolist(), checked, strict=True):
                left, at = memoryview(values.tobytes()), row_bytes(self.length) * row
                while left:
                    written = os.pwrite(self._file, left, at)
                    left, at = left[written:], at + written
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"reference.losses=cached: {what}; delete {self.path.parent}, and the same command "
            "computes it again"
        )


def _read(path: Path) -> Any:
    with contextlib.suppress(ValueError):
        return files.read_json(path)


def exists(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether the store `folder` has a table of this recipe."""
    return _path(folder, recipe).exists()


def _path(folder: Path, recipe: Mapping[str, Any]) -> Path:
    return folder / "losses" / fingerprint(recipe) / "losses.f16"


def row_bytes(length: int) -> int:
    """Bytes of the losses of a sequence of `length` tokens in a table."""
    return (length + _CHECK) * _HALF.itemsize


def _checks(losses: Halves) -> Halves:
    """(B, T) → (B, 2) the CRC-32 of each row."""
    sums = np.array([zlib.crc32(row.tobytes()) for row in losses], "<u4")
    return sums.view(_HALF).reshape(-1, _CHECK)


def there(losses: Halves) -> NDArray[np.bool_]:
    """(B,) whether rows (B, T) are."""
    return (losses.view(np.uint16) != 0).all(1)


def rounded(losses: Tensor) -> Halves:
    """(B, T) as they are stored: in float16, never 0; what is not finite stays so."""
    clamped = losses.float().clamp(_SMALLEST, _LARGEST)
    return torch.where(losses.isfinite(), clamped, losses).half().cpu().numpy()


class Cached:
    """Losses from the file. Only rows that are not in it are computed, and only then is the model
    loaded.

    A computed loss is used as it is stored, rounded, so a run that was killed and continues sees
    the same numbers. For this the rows of a micro-batch also go first, in one write, to the file
    `pending`: a kill between two rows would leave the others to be computed in a smaller batch,
    which differs in the last bits.
    """

    def __init__(
        self,
        table: Table,
        load: Callable[[], Live],
        device: torch.device,
        pending: Path | None = None,
        divided: bool = False,
    ) -> None:
        """`divided`: the model is, so that all processes compute where any has to."""
        self._table, self._load, self._device, self._pending = table, load, device, pending
        self._divided = divided
        self._live: Live | None = None
        if pending is not None:
            pending.parent.mkdir(parents=True, exist_ok=True)
            self._finish_write(pending)

    def stored(self, domain: Ints, sequence: Ints) -> Tensor:
        losses = torch.from_numpy(self._table.read(self._table.rows(domain, sequence)))
        return losses.pin_memory() if self._device.type == "cuda" else losses

    def losses(self, micro: MicroBatch) -> Tensor:
        known = micro.reference
        if known is None:
            known = self.stored(micro.domain.numpy(), micro.sequence.numpy())
        losses = known.numpy()
        missing = ~there(losses)
        if comm.any_of(bool(missing.any())) if self._divided else missing.any():
            losses[missing] = self._complete(micro, missing)
        return known.to(self._device, non_blocking=True).float()

    def _complete(self, micro: MicroBatch, missing: NDArray[np.bool_]) -> Halves:
        """Rows that were missing when the batch was read ahead: from the file by now, or computed
        and written."""
        rows = self._table.rows(micro.domain.numpy(), micro.sequence.numpy())[missing]
        # A sequence that comes twice in a batch is computed once.
        rows, nth, back = np.unique(rows, return_index=True, return_inverse=True)
        losses = self._table.read(rows)
        absent = ~there(losses)
        if absent.any() or self._divided:
            losses[absent] = self._compute(micro, np.flatnonzero(missing)[nth[absent]])
            sound = absent & np.isfinite(losses).all(1)
            self._write(rows[sound], losses[sound])
        return losses[back]

    def _compute(self, micro: MicroBatch, nth: Ints) -> Halves:
        if self._live is None:
            # Loading draws random numbers, and dropout of this step must not depend on whether it
            # was needed.
            with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                self._live = self._load()
        some = MicroBatch(micro.tokens[nth], micro.domain[nth], micro.sequence[nth])
        return rounded(self._live.losses(some))

    def _write(self, rows: Ints, losses: Halves) -> None:
        if self._pending is not None:
            content = rows.astype("<i8").tobytes() + losses.tobytes()
            self._pending.write_bytes(zlib.crc32(content).to_bytes(4, "little") + content)
        self._table.write(rows, losses)

    def _finish_write(self, pending: Path) -> None:
        """What a killed run was writing: all of it, or nothing where `pending` itself was not
        written to its end."""
        with contextlib.suppress(FileNotFoundError):
            content = pending.read_bytes()
            if zlib.crc32(content[4:]) == int.from_bytes(content[:4], "little"):
                count = len(content[4:]) // (8 + 2 * self._table.length)
                rows = np.frombuffer(content, "<i8", count, offset=4)
                losses = np.frombuffer(content, _HALF, offset=4 + 8 * count).reshape(count, -1)
                absent = ~there(self._table.read(rows))
                self._table.write(rows[absent], losses[absent])

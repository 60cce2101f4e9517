"""Rows of numbers about the examples of a pool on disk, in shards: gradient features, or cosines
with targets.

Any number of processes and commands fill one folder together: each takes a shard that nobody has. A
shard carries the fingerprint of everything that decides its content, so none is ever read for
another.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from doremi_train import files
from doremi_train.config import UserError, fingerprint

Kind = Literal["int8", "float16", "float64"]


class Rows:
    """(count, width) numbers, memory-mapped.

    Raises UserError where the folder holds rows of something else.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        count: int,
        width: int,
        kind: Kind,
        per_shard: int,
    ) -> None:
        self.folder, self.count, self.width, self.kind, self.per_shard = (
            folder,
            count,
            width,
            kind,
            per_shard,
        )
        described = {
            "recipe": dict(recipe),
            "count": count,
            "width": width,
            "kind": kind,
            "per_shard": per_shard,
        }
        self._print = fingerprint(described)
        path = folder / "rows.json"
        if path.exists() and fingerprint(files.read_json(path)) != self._print:
            raise UserError(
                f"{folder}: holds rows of other examples, models or settings; delete it, or take "
                "another"
            )
        others = [shard.name for shard in folder.glob("*.npy") if self._print not in shard.name]
        if others:
            raise UserError(
                f"{folder}/{others[0]}: is a shard of other examples, models or settings; delete it"
            )
        if not path.exists():
            with files.making(path) as todo:
                if todo:
                    files.write_json(path, described)

    @property
    def shards(self) -> int:
        return -(-self.count // self.per_shard)

    def shard(self, number: int) -> slice:
        """The rows of a shard."""
        return slice(number * self.per_shard, min(self.count, (number + 1) * self.per_shard))

    def fill(
        self,
        compute: Callable[[slice], NDArray[np.floating]],
        first: int,
        look: Callable[[int], None],
    ) -> None:
        """Compute whatever shards are not there, beginning with number `first` so that several
        processes meet late; and wait for those that others are at. `look` is told how many rows are
        there, often; what it raises ends this."""
        while missing := [
            number for number in range(self.shards) if not self._path(number).exists()
        ]:
            took = False
            for number in sorted(missing, key=lambda n: (n - first) % self.shards):
                with self._path(number).with_suffix(".lock").open("a") as lock:
                    if not files.try_lock(lock) or self._path(number).exists():
                        continue
                    self._clear(number)
                    rows = stored(compute(self.shard(number)), self.kind)
                    with files.replacing(self._path(number)) as aside, aside.open("wb") as file:
                        np.save(file, rows, allow_pickle=False)
                took = True
                look(self._finished())
            if not took:
                time.sleep(0.1)
                look(self._finished())

    def _clear(self, number: int) -> None:
        for left in self.folder.glob(f".{self._path(number).name}.*.partial"):
            left.unlink(missing_ok=True)

    def _finished(self) -> int:
        finished = [
            self.shard(number) for number in range(self.shards) if self._path(number).exists()
        ]
        return sum(rows.stop - rows.start for rows in finished)

    def read(self, number: int) -> NDArray[Any]:
        """The rows of a shard, mapped. Raises UserError for one that is torn."""
        path, rows = self._path(number), self.shard(number)
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            if mapped.shape != (rows.stop - rows.start, self.width) or mapped.dtype != np.dtype(
                self.kind
            ):
                raise ValueError(f"it has {mapped.shape} {mapped.dtype}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: torn or of another size ({error}); delete it, and the same command goes "
                "on"
            ) from None
        return mapped

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.{self._print}.npy"


def stored(rows: NDArray[np.floating], kind: Kind) -> NDArray[Any]:
    """Rows as they are kept. Of features only the direction counts, so int8 and float16 rows are
    scaled, each by its largest number to 127, or by its length to 1."""
    if kind == "float64":
        return rows.astype(np.float64)
    by = (
        np.abs(rows).max(1, keepdims=True) / 127
        if kind == "int8"
        else np.linalg.norm(rows, axis=1, keepdims=True)
    )
    scaled = np.divide(rows, by, out=np.zeros_like(rows), where=by > 0)
    return (np.rint(scaled) if kind == "int8" else scaled).astype(kind)


def cosines(rows: NDArray[Any], targets: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, S) of stored features (N, k) and targets (S, k), whose lengths are left as they are."""
    wide = rows.astype(np.float32)
    with np.errstate(invalid="ignore"):
        return (
            wide @ targets.astype(np.float32).T / np.linalg.norm(wide, axis=1, keepdims=True)
        ).astype(np.float64)

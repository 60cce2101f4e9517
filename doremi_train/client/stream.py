"""The sequences of every step under a mixture that may change every `every` steps.

The steps from m · every on, up to the next multiple, are block m. Its weights are decided once, by
whoever needs them first (a rank, a worker of a loader that reads ahead), and are a file from then
on: `<folder>/blocks/00000007.json`. So all ranks change at the same step, and a run that continues
draws what it would have drawn. Beside them stands how many sequences of every domain came before
the block, so that any step is found at once.

K domains, b sequences a batch.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_train import files, mixture
from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.data.sampler import Draw, Ints, Sampler

Floats = NDArray[np.float64]

_POLL = 0.02  # seconds between looks for a block that another process decides


class Block(NamedTuple):
    weights: Floats  # (K,)
    counts: Ints  # (K,) sequences drawn before its first step


class Stream:
    """Draws of `batch` sequences a step from domains of `sizes` sequences.

    `mixture` is {domain: weight}, or the path of a weights.json (or of a plain {domain: weight}),
    which is read again for every block, and may have a `schedule`; None: a
    `doremi_train.client.learned.Learner` decides. `folder` is where the blocks are; every process
    of the run needs the same. A file that cannot be read leaves the weights as they are, and says
    so; the first one has to be read.

    Raises UserError where the folder belongs to another stream, and what is not a mixture.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch: int,
        mixture: Mapping[str, float] | Path | str | None,
        folder: Path | str,
        every: int = 100,
        seed: int = 0,
        timeout: float = 600.0,
    ) -> None:
        for name, value in (("batch", batch), ("every", every), *sizes.items()):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"Stream: {name}={value!r}: must be a whole number above 0")
        if not sizes:
            raise UserError("Stream: sizes={}: has no domain; give {domain: sequences}")
        self.sizes, self.batch, self.every = dict(sizes), batch, every
        self.folder, self._mixture, self._timeout = Path(folder), mixture, timeout
        # One for all blocks: there may be as many as steps.
        self._lock = self.folder / ".deciding.lock"
        self._sampler = Sampler(np.array([*sizes.values()]), self.names, batch, seed)
        self._claim({"sizes": dict(sizes), "batch": batch, "every": every, "seed": seed})
        self._known: tuple[int, Block] | None = None  # the block that was asked for last
        self._next: tuple[int, Ints] | None = None  # a step, and the counts before it

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def draw(self, step: int) -> Draw:
        """The batch of step `step`, from 0: domains (b,), sequences (b,) within them, and how many
        of each domain (K,) were drawn by its end.

        Raises TimeoutError where nobody decides the step's weights.
        """
        block, weights = step // self.every, self.weights(step)
        if self._next is not None and self._next[0] == step:
            counts = self._next[1]
        else:
            before = self._block(block).counts
            counts = before + self._between(block * self.every, step, weights)
        drawn = self._sampler.draw(step, weights, counts)
        self._next = step + 1, drawn.counts
        return drawn

    def weights(self, step: int) -> Floats:
        """(K,) the mixture of step `step`."""
        return self._block(step // self.every).weights

    def quota(self, step: int) -> Ints:
        """(K,) how many sequences of each domain step `step` has."""
        return self._between(step, step + 1, self.weights(step))

    def decide(self, block: int, weights: Floats) -> None:
        """Fix the weights (K,) of a block, unless they are."""
        path = self._path(block)
        if path.exists():
            return
        counts = np.zeros(len(self.names), np.int64)
        if block:
            start, before = (block - 1) * self.every, self._block(block - 1)
            counts = before.counts + self._between(start, start + self.every, before.weights)
        content = {"weights": weights.tolist(), "counts": counts.tolist()}
        with files.locked(self._lock):
            if not path.exists():
                files.write_json(path, {"step": block * self.every} | content)

    def decided(self, block: int) -> bool:
        return self._path(block).exists()

    def mapping(self, weights: Floats) -> dict[str, float]:
        """{domain: weight} of weights (K,)."""
        return dict(zip(self.names, weights.tolist(), strict=True))

    def _block(self, block: int) -> Block:
        if self._known is None or self._known[0] != block:
            self._ensure(block)
            content = files.read_json(self._path(block))
            read = Block(np.array(content["weights"]), np.array(content["counts"], np.int64))
            self._known = block, read
        return self._known[1]

    def _ensure(self, block: int) -> None:
        """Have the block decided, and those before it."""
        if self._mixture is None:
            self._wait(block)
            return
        first = block
        while first and not self.decided(first - 1):
            first -= 1
        for each in range(first, block + 1):
            if not self.decided(each):
                self.decide(each, self._read(each))

    def _read(self, block: int) -> Floats:
        """(K,) what the mixture says by now of a block's first step."""
        if isinstance(self._mixture, Mapping):
            given = mixture.checked(self._mixture, self.names, "Stream: mixture")
            return np.array([*given.values()])
        assert self._mixture is not None
        try:
            path = Path(self._mixture)
            read = mixture.of_step(path, self.names, block * self.every, f"{path}")
            return np.array([*read.weights.values()])
        except UserError as error:
            if not block:
                raise
            say(f"{error}; the mixture stays as it was from step {block * self.every} on")
            return self._block(block - 1).weights

    def _wait(self, block: int) -> None:
        end = time.monotonic() + self._timeout
        while not self.decided(block):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{self._path(block)}: the weights of step {block * self.every} are not there "
                    f"after timeout={self._timeout:g} s; see whether the process of the Learner "
                    "goes on, and raise the Learner's lag to as many steps as the loader reads "
                    "ahead"
                )
            time.sleep(_POLL)

    def _between(self, start: int, end: int, weights: Floats) -> Ints:
        """(K,) sequences of the steps start … end − 1, all of one mixture."""
        before = self._sampler.counts_before
        return before(end, weights) - before(start, weights)

    def _path(self, block: int) -> Path:
        return self.folder / "blocks" / f"{block:08d}.json"

    def _claim(self, about: dict[str, Any]) -> None:
        """Say whose the folder is."""
        path = self.folder / "stream.json"
        with files.making(path) as new:
            with files.locked(self._lock):
                for left in (self.folder / "blocks").glob(".*.partial"):  # of what was killed
                    left.unlink(missing_ok=True)
            if new:
                files.write_json(path, {"schema": 1} | about)
                return
        found = files.read_json(path)
        # Compared as they are written: the order of the domains is that of the weights.
        other = [key for key in about if json.dumps(about[key]) != json.dumps(found.get(key))]
        if other:
            raise UserError(
                f"{self.folder}: belongs to a stream with another {', '.join(other)} "
                f"({', '.join(f'{key}={found.get(key)!r:.200}' for key in other)}); give another "
                "folder"
            )

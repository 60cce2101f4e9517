"""The mixture of a file that may change while a run trains on it.

The file is read for step 0 and every `every` steps. What was decided is a line of the run's
`mixture_file.jsonl`, on disk before a step draws from it: {"step": the first that it holds for,
from 0, "weights", "sha256" of the file that it is of, "refused": why the file of that moment was
not taken}. A run that continues follows its lines as far as they go, whatever the file says by
then.

K domains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doremi_train import files, mixture
from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.parallel import comm

TRACE = "mixture_file.jsonl"


class Followed:
    """(K,) the mixture of a step, from 0, by the file `path`; the same on every process.

    A file that cannot be used, because it is being written or is no mixture, leaves the mixture as
    it is, and that is said once. Raises UserError where the first one cannot be used.
    """

    def __init__(
        self, path: Path, every: int, domains: Sequence[str], folder: Path, normalize: bool = False
    ) -> None:
        """`folder` is the run's."""
        self._path, self._every, self._domains = path, every, domains
        self._trace, self._normalize = folder / TRACE, normalize
        self._lines: dict[int, dict[str, Any]] = {}  # by step, as the others below of rank 0 alone
        self._log: files.JsonLines | None = None
        self._known: tuple[int, Tensor] | None = None

    def __enter__(self) -> "Followed":
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def __call__(self, step: int) -> Tensor:
        """A collective for every step that is a multiple of `every`, and for the first one that is
        asked for."""
        first = step - step % self._every
        if self._known is None or self._known[0] != first:
            weights = comm.on_first(lambda: self._decided(first))
            ordered = [weights[name] for name in self._domains]
            self._known = first, torch.tensor(ordered, dtype=torch.float64)
        return self._known[1]

    def _decided(self, step: int) -> dict[str, float]:
        if self._log is None:
            self._lines = {line["step"]: line for line in files.read_lines(self._trace)}
            self._log = files.JsonLines(self._trace, 1 + max(self._lines, default=0))
        if step not in self._lines:
            self._lines[step] = self._decide(step, self._lines.get(step - self._every))
            self._log.write(self._lines[step])
            self._log.sync()
        weights: dict[str, float] = self._lines[step]["weights"]
        return weights

    def _decide(self, step: int, before: dict[str, Any] | None) -> dict[str, Any]:
        """The line of `step`, after the one `before`."""
        given = f"main.mixture_file={self._path}"
        try:
            read = mixture.of_step(self._path, self._domains, step, given, self._normalize)
        except UserError as error:
            if before is None:
                raise
            refused = str(error)
            if before.get("refused") != refused:
                say(f"{refused}; the mixture stays as it was from step {step} on")
            return before | {"step": step, "refused": refused}
        if before is not None and before["weights"] != read.weights:
            say(f"main.mixture_file={self._path}: another mixture from step {step} on")
        return {"step": step, "weights": read.weights, "sha256": read.digest}

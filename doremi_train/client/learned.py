"""A mixture that follows from the losses of another trainer: sums per domain in, weights out.

K domains. Whoever trains gives the sums of the whole global batch after every step; where that is
more than one process, on the first alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doremi_train import files, mixture
from doremi_train.client.stream import Stream
from doremi_train.config import UserError
from doremi_train.methods import ONLINE
from doremi_train.methods.online import Stats


class Learner:
    """The online mixture `method` (ado, odm or dro) of a run of `steps` steps, which decides the
    blocks of a stream.

    Block m is drawn from what is known after m · every − `lag` steps: raise `lag` to as many steps
    as the loader reads ahead. `prior` is where it begins (uniform, unless it is given), and
    `max_epochs` the most passes over any domain. `options` are those of the method, of which dro
    needs `target_losses`, {domain: nats per token}.

    Raises UserError for a method or an option that there is not.
    """

    def __init__(
        self,
        stream: Stream,
        method: str,
        steps: int,
        lag: int = 0,
        prior: Mapping[str, float] | None = None,
        max_epochs: float | None = None,
        **options: Any,
    ) -> None:
        if method not in ONLINE:
            raise UserError(f"Learner: method={method!r}: unknown; allowed: {', '.join(ONLINE)}")
        names = stream.names
        self.stream, self.steps, self.lag = stream, steps, lag
        self.method, self._rules = method, ONLINE[method]
        given = prior or dict.fromkeys(names, 1 / len(names))
        if "target_losses" in options:
            options["target_losses"] = tuple(options["target_losses"][name] for name in names)
        cap = float("inf") if max_epochs is None else max_epochs / (steps * stream.batch)
        high = (min(1.0, size * cap) for size in stream.sizes.values())
        start = tuple(mixture.checked(given, names, "Learner: prior").values())
        try:
            self._options = self._rules.Options(prior=start, high=tuple(high), **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"Learner: method={method}: {error}") from None
        self.state = self._rules.init(len(names), steps, self._options)
        self.step = 0
        self._decide(range(lag // stream.every + 1))

    @property
    def weights(self) -> Tensor:
        """(K,) what the next batch would be drawn from without a lag."""
        return self._rules.sampling(self.state, self._options)

    def report(self, loss: Tensor, tokens: Tensor) -> None:
        """Sums of the losses (K,) in nats, and how many tokens (K,) they are of, of the next
        step. Raises ValueError where there are none, or they are not finite: no mixture follows."""
        if not (loss.isfinite().all() and tokens.sum() > 0):
            raise ValueError(
                f"step {self.step + 1}: losses {loss.tolist()} over {tokens.tolist()} tokens say "
                "nothing about the mixture; look for what broke the training"
            )
        self.state = self._rules.update(self.state, Stats(loss, tokens), self._options)
        self.step += 1
        block, rest = divmod(self.step + self.lag, self.stream.every)
        if not rest:
            self._decide(range(block, block + 1))

    def save(self) -> None:
        """Write the state to where `restore` finds it."""
        save(self._path(self.step), self.state)

    def restore(self, step: int) -> None:
        """Go on after `step` steps, at which it was saved. Raises UserError where it was not."""
        self.state, self.step = restored(self._path(step), self.state), step

    def _decide(self, blocks: range) -> None:
        for block in blocks:
            self.stream.decide(block, self.weights.numpy())

    def _path(self, step: int) -> Path:
        return self.stream.folder / "learned" / f"{self.method}-{step:08d}.json"


def save(path: Path, state: Any) -> None:
    """Write a method's state, a NamedTuple of tensors: numbers read back exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # An interval that is not known yet is infinite, which JSON has no number for.
    texts = {key: [repr(x) for x in value.flatten().tolist()] for key, value in _fields(state)}
    files.write_json(path, texts)


def restored(path: Path, like: Any) -> Any:
    """A state that was saved, in the shapes of `like`, one of the same method. Raises UserError
    where there is none."""
    if not path.exists():
        raise UserError(
            f"{path}: missing, so what the mixture had learned by that step is not known; continue "
            "from a step that was saved, or start anew with another folder"
        )
    found = files.read_json(path)
    return type(like)(
        *(
            torch.tensor([float(x) for x in found[key]], dtype=torch.float64)
            .to(value.dtype)
            .reshape(value.shape)
            for key, value in _fields(like)
        )
    )


def _fields(state: Any) -> list[tuple[str, Tensor]]:
    return [*zip(state._fields, state, strict=True)]

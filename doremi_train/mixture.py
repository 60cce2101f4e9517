"""The mixture artefact: `weights.json`, what a proxy run is for and a final run starts from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from doremi_train import files
from doremi_train.config import UserError, read_hashed, read_object

if TYPE_CHECKING:  # `client` reads mixtures without torch
    from torch import Tensor

ROUNDED = 1e-3  # weights of four decimals sum to 1 within this
_ORIGINAL = "train_domain_weights"  # key of the original DoReMi's files
_ENDLESS = 1e300  # from here on sums, and whole numbers as floats, may overflow
_REMEDY = 'give a file of {"weights": {domain: weight}}'


@dataclass(frozen=True)
class Mixture:
    """Weights per domain: the part of the final run's tokens that comes from it."""

    method: str
    weights: dict[str, float]  # sum 1
    # 95 %, Student-t over proxy seeds; None for one seed.
    interval: dict[str, tuple[float, float]] | None = None
    # Passes over each domain in the final run.
    epochs: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    # Weights from each step on, where they changed.
    schedule: Sequence[tuple[int, dict[str, float]]] | None = None

    def tensor(self, domains: Sequence[str]) -> "Tensor":
        """(K,) float64 in the order of `domains`, with a sum of 1 to 1e-12. Where it is that
        already, the bits stay: a mixture that was written and read is the same run."""
        import torch

        return torch.tensor(_normal([self.weights[name] for name in domains]), dtype=torch.float64)


def save(path: Path, mixture: Mixture) -> None:
    content = {"schema": 1, "unit": "token"} | asdict(mixture)
    if mixture.schedule is None:
        del content["schedule"]
    files.write_json(path, content)


def load(path: Path, domains: Sequence[str], normalize: bool = False) -> Mixture:
    """Read a weights.json, or a plain {domain: weight}, or the original DoReMi's
    {"train_domain_weights": …}, whose published files are rounded: their sums may be off by
    `ROUNDED`.

    Raises UserError naming the domain that is unknown, missing, negative or not a number, or the
    sum where it is not 1.
    """
    given = f"mixture.path={path}"
    content = read_object(path, given, _REMEDY)
    return Mixture(str(content.get("method", "file")), _weights(content, domains, given, normalize))


class Read(NamedTuple):
    """What a file says of one step."""

    weights: dict[str, float]  # sum 1
    digest: str  # SHA-256 of the file


def of_step(
    path: Path, domains: Sequence[str], step: int, given: str, normalize: bool | None = None
) -> Read:
    """The weights at `step`, from 0, of a file as `load` reads it, which may be staged: those of
    the last stage of its `schedule` that has begun. `given` names it in messages.

    Raises UserError as `load` does, and where a schedule has no stage for the step.
    """
    content, digest = read_hashed(path, given, _REMEDY)
    stages = content.get("schedule")
    if stages is None:
        return Read(_weights(content, domains, given, normalize), digest)
    try:
        weights = [{**weights} for start, weights in stages if int(start) <= step][-1]
    except (TypeError, ValueError, OverflowError, IndexError):
        raise UserError(
            f"{given}: schedule={stages!r:.200} has no weights for this step; give a list of "
            "[first step, {domain: weight}], the first of step 0"
        ) from None
    return Read(checked(weights, domains, f"{given}: schedule", normalize), digest)


def _weights(
    content: Mapping[str, Any], domains: Sequence[str], given: str, normalize: bool | None
) -> dict[str, float]:
    values, tolerance = content, 1e-6
    for key in ("weights", _ORIGINAL):
        if isinstance(content.get(key), Mapping):
            values = content[key]
            tolerance = ROUNDED if key == _ORIGINAL else 1e-6
    return checked(values, domains, given, normalize, tolerance)


def checked(
    values: Mapping[str, Any],
    domains: Sequence[str],
    where: str,
    normalize: bool | None = None,
    tolerance: float = 1e-6,
) -> dict[str, float]:
    """Weights in the order of `domains` that sum to 1; what they sum to may be off by `tolerance`.
    `normalize`: whether it may be off by anything; None: not, and there is no key that says so.

    Raises UserError, starting with `where`, as `load` does.
    """
    for name, weight in values.items():
        if name not in domains:
            raise UserError(f"{where}: unknown domain {name!r}; the data has {', '.join(domains)}")
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not 0 <= weight < _ENDLESS  # nor is NaN
        ):
            raise UserError(
                f"{where}: weight of {name!r} is {weight!r}; must be a finite number ≥ 0"
            )
    missing = [name for name in domains if name not in values]
    if missing:
        raise UserError(
            f"{where}: no weight for {', '.join(missing)}; write 0 to leave a domain out"
        )
    total = math.fsum(values.values())
    if total <= 0 or (abs(total - 1) > tolerance and not normalize):
        key = "" if normalize is None else ", or set mixture.normalize=true"
        raise UserError(f"{where}: weights sum to {total:.9g}, not 1; correct them{key}")
    return dict(zip(domains, _normal([values[name] for name in domains]), strict=True))


def _normal(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    return [value if abs(total - 1) < 1e-12 else value / total for value in values]

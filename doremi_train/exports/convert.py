"""A mixture written for a trainer, and read back: shares of its draws, and parts of the tokens."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import yaml

from doremi_train.config import UserError, override
from doremi_train.exports import formats
from doremi_train.exports.form import Source, Stage

WHOLE = 10**12  # parts that are shared out: 12 decimals
# What a reader meets in a file of another form.
_MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SyntaxError,
    RecursionError,
    yaml.YAMLError,
)


def shares(
    weights: Mapping[str, float],
    tokens_per_document: Mapping[str, float] | None,
    zeros: bool = False,
) -> dict[str, float]:
    """Parts of a trainer's draws from parts of the tokens, without domains that get none, or with
    their `zeros`.

    Decimals of 12 digits that sum to exactly 1, by largest remainder. `tokens_per_document` is the
    mean of each domain; None where sequences are drawn.
    """
    exact = {
        name: Fraction(weight) / (Fraction(tokens_per_document[name]) if tokens_per_document else 1)
        for name, weight in weights.items()
    }
    parts = {name: value * WHOLE / sum(exact.values()) for name, value in exact.items()}
    counts = {name: math.floor(part) for name, part in parts.items()}
    missing = WHOLE - sum(counts.values())
    for name in sorted(parts, key=lambda name: counts[name] - parts[name])[:missing]:
        counts[name] += 1
    return {name: count / WHOLE for name, count in counts.items() if count or zeros}


def weights(
    drawn: Mapping[str, float], tokens_per_document: Mapping[str, float] | None
) -> dict[str, float]:
    """Parts of the tokens from parts of a trainer's draws: the inverse of `shares`."""
    tokens = {
        name: part * (tokens_per_document[name] if tokens_per_document else 1)
        for name, part in drawn.items()
    }
    return {name: value / math.fsum(tokens.values()) for name, value in tokens.items()}


Schedule = Sequence[tuple[int, Mapping[str, float]]]


def held(schedule: Schedule, steps: int, every: int) -> Schedule:
    """The schedule of a run of `steps`, changed at multiples of `every` steps only: what is drawn
    in between is the mean of what was."""
    if all(step % every == 0 for step, _ in schedule):
        return schedule
    ends = [step for step, _ in schedule[1:]] + [steps]
    result: list[tuple[int, Mapping[str, float]]] = []
    for start in range(0, steps, every):
        stop = min(start + every, steps)
        parts = [
            (min(stop, end) - max(start, step), drawn)
            for (step, drawn), end in zip(schedule, ends, strict=True)
            if step < stop and end > start
        ]
        mean = {
            name: math.fsum(length * drawn[name] for length, drawn in parts) / (stop - start)
            for name in parts[0][1]
        }
        if not result or mean != result[-1][1]:
            result.append((start, mean))
    return result


def write(
    to: str,
    drawn: Mapping[str, float],
    paths: Mapping[str, str],
    epochs: Mapping[str, float],
    schedule: Schedule = (),
    batch_size: int = 1,
) -> str:
    """Text for the target `to`. `schedule` is what is drawn from each step on, where it changes:
    the trainer gets it if it can follow one, and else the whole run's `drawn`. `batch_size` is the
    sequences of a step.

    Raises UserError naming the domains without a path, or a path that cannot be.
    """
    form = formats.FORMATS[to]
    missing = [name for name in drawn if name not in paths]
    if missing and form.paths:
        example = dict(paths) | {name: f"/data/{name}" for name in missing[:3]}
        raise UserError(
            f"export.paths: no path for {', '.join(missing)}; export.to={to} needs one of each "
            f"domain, as in {override('export.paths', example)}"
        )

    def sources(drawn: Mapping[str, float]) -> list[Source]:
        return [
            Source(name, paths.get(name, name), weight, epochs.get(name, 0.0))
            for name, weight in drawn.items()
        ]

    whole = sources(drawn)
    for source in whole:
        same = [other.domain for other in whole if other.path == source.path]
        if len(same) > 1:
            raise UserError(
                f"export.paths: {' and '.join(same)} both have {source.path!r}; give each its own"
            )
        reason = form.refuses(source) if form.refuses else None
        if reason:
            raise UserError(
                f"export.paths.{source.domain}={source.path!r}: {reason}; use another path"
            )
    if schedule and form.write_stages:
        return form.write_stages(
            [Stage(step, sources(weights)) for step, weights in schedule], batch_size
        )
    return form.write(whole)


def read(
    to: str, text: str, domains: Sequence[str], paths: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Weights {domain: weight} of a text for the target `to`, in its unit and unchecked; a domain
    that is not in it has 0.

    Raises UserError that starts with `where` for a text of another form, or a source that is no
    domain.
    """
    try:
        drawn = dict(formats.FORMATS[to].read(text))
    except _MALFORMED as error:
        raise UserError(f"{where}: not of the form of mixture.format={to} ({error})") from None
    names = {name: name for name in domains} | {path: name for name, path in paths.items()}
    result: dict[str, Any] = dict.fromkeys(domains, 0.0)
    for source, weight in drawn.items():
        if names.get(source) not in result:
            raise UserError(
                f"{where}: {source!r} is neither a domain nor in export.paths; the data has "
                f"{', '.join(domains)}; give "
                f"{override('export.paths', {domains[0]: source})}"
            )
        result[names[source]] = weight
    return result

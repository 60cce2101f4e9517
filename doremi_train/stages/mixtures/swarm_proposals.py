"""Proposals of a swarm, and what came of them: fit, gates, confirmation and verdict."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from torch import Tensor

from doremi_train import files
from doremi_train.methods import box, guards, swarm
from doremi_train.methods.box import Floats
from doremi_train.methods.guards import Held, Noise
from doremi_train.methods.objective import Objective
from doremi_train.parallel.threads import fitting
from doremi_train.stages.mixtures import swarm_problem
from doremi_train.stages.mixtures.swarm_problem import Problem, Row
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run


class Proposal(NamedTuple):
    mixed: Floats  # (K,)
    predicted: float  # objective: the mean loss in nats per token, where nothing else is said
    interval: tuple[float, float]
    distance: float  # to the nearest run that was fitted, total variation
    refused: list[str]  # why it is not to be believed, before it is trained


class Proposed(NamedTuple):
    proposals: list[Proposal]
    diagnostics: swarm.Diagnostics
    fitted: Floats  # (N,) objective
    unseen: Floats  # (N,) the same out of fold
    noise: Noise  # of the metrics between runs


@fitting("swarm")
def propose(session: Session, problem: Problem, rows: Sequence[Row], wanted: Objective) -> Proposed:
    """Fit, solve at λ, 4 λ, …, and say what is to be expected."""
    options, random = session.config.swarm, swarm_problem.generator(session, 0)
    points, losses = swarm_problem.table_of(problem, rows)
    fit, realised = swarm_problem.fitted(session, problem, rows, wanted), wanted.scores(losses)
    known = swarm_problem.known(problem)
    turned = losses * wanted.turn  # since laws are of what falls
    apart = swarm.out_of_fold(points, turned, options.regressor, random, known) * wanted.turn
    unseen = wanted.scores(apart)
    diagnostics, proposals = swarm.diagnose(unseen, realised), []
    for index in range(options.candidates):
        point = swarm.solve(fit, problem.prior, problem.inside, options.kl * 4**index, random)
        near = box.distance(points, point)
        predicted = float(fit.predict(point[None]).mean())
        proposals.append(
            Proposal(
                mixed=box.on_grid(problem.space.expand(point), problem.within),
                predicted=predicted,
                interval=swarm.interval(predicted, near, realised - unseen),
                distance=float(near.min()),
                refused=swarm.gates(diagnostics, point, points, wanted.unit),
            )
        )
    noise = guards.noise(points, losses, apart)
    return Proposed(proposals, diagnostics, fit.predict(points).mean(1), unseen, noise)


def baselines(problem: Problem) -> dict[str, Tensor]:
    """What a proposal has to beat, (K,) each."""
    uniform = np.full(len(problem.names), 1 / len(problem.names))
    mixtures = {"natural": problem.natural, "uniform": uniform, "unimax": problem.even}
    if problem.target is not None:
        mixtures["target"] = problem.target
    return {name: torch.from_numpy(mixed) for name, mixed in mixtures.items()}


# ── The confirmation ────────────────────────────────────────────────────────────────


def conclude(
    session: Session,
    problem: Problem,
    search: Run,
    rows: Sequence[Row],
    proposed: Proposed,
    confirmed: Sequence[Row],
    names: Sequence[str],
    wanted: Objective,
) -> None:
    """Take the best mixture of those that were trained, within caps, floors and guards and not
    refused; and write all down. `names` (M,) are those of the metrics."""
    lines: list[dict[str, Any]] = []
    naturals = len(swarm_problem.on_natural(problem, rows))
    for index, row in enumerate(confirmed):
        realised = float(wanted.scores(np.array([row.losses]))[0])
        line: dict[str, Any] = {
            "name": row.run.rpartition("/")[2],
            "weights": swarm_problem.named(problem, row.weights),
            "realised": realised,
        }
        if index < len(proposed.proposals):
            proposal = proposed.proposals[index]
            line |= {
                "predicted": proposal.predicted,
                "interval": proposal.interval,
                "distance": proposal.distance,
            }
            line["refused"] = proposal.refused + swarm.confirm(
                realised, proposal.interval, wanted.unit
            )
        else:
            inside = box.inside(np.array(row.weights), problem.within)
            line["refused"] = [] if inside else ["it is outside mixture.max_epochs or swarm.floor"]
        if line["name"] != "natural":  # which others are held against
            held = guards.held(wanted, np.array(row.losses), proposed.noise, naturals)
            line["refused"] += beyond(wanted, held, names)
            line["in_doubt"] = in_doubt(wanted, held, names)
        lines.append(line)
    # Where all are refused, the last one, which keeps caps and floors.
    kept = [line for line in lines if not line["refused"]] or lines[-1:]
    chosen = min(kept, key=lambda line: line["realised"])
    verdict = "; ".join([_verdict(lines, chosen, wanted.unit), *chosen.get("in_doubt", [])])
    diagnostics, first = proposed.diagnostics._asdict(), lines[0]
    files.write_bytes(
        search.folder / "runs.jsonl",
        b"".join(
            orjson.dumps(line) + b"\n" for line in _lines(problem, rows, proposed, names, wanted)
        ),
    )
    files.write_json(
        search.folder / "fit.json",
        {
            "verdict": verdict,
            "chosen": chosen["name"],
            "diagnostics": diagnostics,
            "confirmed": lines,
        },
    )
    session.say(f"swarm: {verdict}")
    search.finish(
        {
            "weights": chosen["weights"],
            "provenance": {
                "swarm": search.folder.name,
                "runs": len(rows),
                "chosen": chosen["name"],
                "verdict": verdict,
                **diagnostics,
                **{
                    f"proposal_{key}": first[key]
                    for key in ("predicted", "interval", "realised", "distance")
                },
            },
        }
    )


def _verdict(lines: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], unit: str) -> str:
    """What is written, and why it is not the proposal where it is not."""
    first = lines[0]
    low, high = first["interval"]
    if chosen is first:
        return (
            f"the proposal reached {first['realised']:.4f} {unit} ({low:.4f} to {high:.4f} "
            "predicted) and is the best of those confirmed"
        )
    why = "; ".join(first["refused"]) or f"it reached {first['realised']:.4f} {unit}"
    if chosen["refused"]:
        return (
            f"the proposal is refused: {why}; so is everything else, and {chosen['name']} is "
            "written, which keeps mixture.max_epochs and swarm.floor"
        )
    return (
        f"the proposal is {'refused' if first['refused'] else 'not the best'}: {why}; "
        f"{chosen['name']} is written instead, with {chosen['realised']:.4f} the best of those "
        "confirmed"
    )


def beyond(wanted: Objective, held: Held, names: Sequence[str]) -> list[str]:
    """Which guards a run breaks: what it loses itself decides, for a guard protects."""
    return [
        f"it loses {held.lost[m]:.2%} of {names[m]} against natural{_between(held, m)}, more than "
        f"objective.guard={wanted.guard[m]:.2%}"
        for m in np.flatnonzero(held.lost > wanted.guard).tolist()
    ]


def in_doubt(wanted: Objective, held: Held, names: Sequence[str]) -> list[str]:
    """Which guards it keeps, but not beyond doubt."""
    doubtful = (held.lost <= wanted.guard) & (held.high > wanted.guard)
    return [
        f"it loses {held.lost[m]:.2%} of {names[m]} against natural{_between(held, m)}, so that it "
        f"keeps objective.guard={wanted.guard[m]:.2%} is not beyond doubt"
        for m in np.flatnonzero(doubtful).tolist()
    ]


def _between(held: Held, m: int) -> str:
    return f" ({held.low[m]:.2%} to {held.high[m]:.2%})" if np.isfinite(held.high[m]) else ""


def _lines(
    problem: Problem,
    rows: Sequence[Row],
    proposed: Proposed,
    names: Sequence[str],
    wanted: Objective,
) -> list[dict[str, Any]]:
    first = proposed.proposals[0].mixed
    return [
        {
            "run": row.run,
            "weights": swarm_problem.named(problem, row.weights),
            "losses": dict(zip(names, row.losses, strict=True)),
            "loss": float(wanted.scores(np.array([row.losses]))[0]),
            "fitted": float(proposed.fitted[index]),
            "out_of_fold": float(proposed.unseen[index]),
            # From the first proposal.
            "distance": float(box.distance(np.array(row.weights), first)),
        }
        for index, row in enumerate(rows)
    ]

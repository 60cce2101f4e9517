"""What mixtures are judged by: the validation loss of every domain, and, where `objective.*` counts
them, the loss on the text of `target.*`, bits per byte of tasks, and scores of the user's own.

K domains, M metrics, N target sequences of T tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doremi_train import files
from doremi_train.config import UserError, fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation.statistics import listed, unit
from doremi_train.methods import objective as objectives
from doremi_train.methods.box import Floats
from doremi_train.methods.objective import Objective
from doremi_train.parallel import comm
from doremi_train.stages.runs import measuring, scores, targets, tasks
from doremi_train.stages.runs.targets import TARGET
from doremi_train.stages.session import Session


def names(session: Session, store: TokenStore) -> list[str]:
    """(M,) of the metrics."""
    target = [TARGET] if counts_target(session, store) else []
    return [*store.domains, *target, *tasks.counted(session, store), *_scored(session, store)]


def objective(
    session: Session, store: TokenStore, natural: Floats, scale: Floats | None = None
) -> Objective:
    """The objective over metrics (M,), which have these values with natural; standardised by a
    scale (M,) where objective.standardise asks for it. Raises UserError for a metric that there is
    not, and for one that has no scale."""
    asked, known, of_tasks = (
        session.config.objective,
        names(session, store),
        tasks.counted(session, store),
    )
    counted = {"domains": store.domains, "tasks": of_tasks, "scores": ()}[asked.over]
    if asked.scores is not None and not _scored(session, store):
        raise UserError(
            f"objective.scores={list(asked.scores)}: objective.metrics and objective.guard name "
            "none of them; give the weight of one, as in objective.metrics={arc_easy/acc: -1}, "
            "which is below 0 where more is better"
        )
    try:
        found = objectives.objective(asked, known, natural, counted, _scored(session, store))
    except KeyError as error:
        raise UserError(
            f"objective: unknown metric {error.args[0]!r}; there are {listed(store.domains)}, "
            f"{TARGET}, which is the text of target.files or target.domains, the tasks "
            f"{listed(tasks.known(session))}, and those of objective.scores"
        ) from None
    except ValueError as error:
        raise UserError(f"objective.metrics: {error}") from None
    if asked.standardise and scale is not None:
        return standardised(found, known, scale)
    weighed = [name for name, w in zip(known, found.weights, strict=True) if w]
    return found._replace(unit=unit(weighed, of_tasks, _scored(session, store)))


def standardised(wanted: Objective, names: Sequence[str], scale: Floats) -> Objective:
    """The objective of metrics (M,) of these names in units of a scale (M,). Raises UserError where
    one that counts has none."""
    try:
        return objectives.standardised(wanted, names, scale)
    except ValueError as error:
        raise UserError(
            f"objective.standardise=true: {error}; give more runs on the same mixture (natural at "
            "best), or take objective.standardise=false, and weights in objective.metrics that say "
            "what a unit of each is worth"
        ) from None


def weights(session: Session, store: TokenStore) -> dict[str, float]:
    """The metrics that count, with their weights."""
    known = names(session, store)
    found = objective(session, store, np.ones(len(known))).weights.tolist()
    return {name: weight for name, weight in zip(known, found, strict=True) if weight}


def recipe(session: Session, store: TokenStore) -> dict[str, Any]:
    """What of the objective decides the result of a search; nothing where all domains count
    alike. Raises UserError for an objective that cannot be, before anything is trained."""
    asked = session.config.objective
    if asked == objectives.Options():
        return {}
    objective(session, store, np.ones(len(names(session, store))))
    content: dict[str, Any] = {
        "reduce": asked.reduce,
        "metrics": asked.metrics,
        "guard": asked.guard,
    }
    if asked.standardise:
        content["standardise"] = True
    content[TARGET] = _text(session, store)[1]
    if tasks.counted(session, store):
        content["tasks"] = {name: text for name, (_, text) in tasks.golds(session, store).items()}
    if _scored(session, store):  # their values come with the runs, and stay
        content["scores"] = [str(Path(place).absolute()) for place in asked.scores or ()]
    return {"objective": content}


def measured(
    session: Session, store: TokenStore, runs: Mapping[str, Path]
) -> dict[str, list[float]]:
    """(M,) of finished runs, by name, from their folders; what was measured before is not measured
    again. A collective."""
    found = comm.on_first(lambda: there(session, store, runs))
    if found is not None:
        return found
    more = beyond(session, store, {name: folder / "model" for name, folder in runs.items()})
    losses = comm.on_first(
        lambda: {name: domain_losses(folder, store) for name, folder in runs.items()}
    )
    return {
        name: [
            *losses[name],
            *([of["target_loss"]] if "target_loss" in of else []),
            *of.get("tasks", {}).values(),
            *of.get("scores", {}).values(),
        ]
        for name, of in more.items()
    }


def there(
    session: Session, store: TokenStore, runs: Mapping[str, Path]
) -> dict[str, list[float]] | None:
    """The same where all of it is known by now, else None. For any process alone."""
    models = {name: folder / "model" for name, folder in runs.items()}
    target = [str(_text(session, store)[1])] if counts_target(session, store) else []
    texts = [*target, *(text for _, text in tasks.golds(session, store).values())]
    wanted, found = _scored(session, store), dict[str, list[float]]()
    scored = scores.known(session, wanted, models) if wanted else {}
    for name, folder in runs.items():
        measured = [measuring.kept(session, models[name], text) for text in texts]
        given = list(scored[name].values()) if wanted else []
        if None in measured or len(given) < len(wanted):
            return None
        values = [value for one in measured if one is not None for value in one.values()]
        found[name] = [*domain_losses(folder, store), *values, *given]
    return found


def beyond(
    session: Session, store: TokenStore, models: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """What the objective counts beside domains, of model folders by name: `target_loss`, `tasks`
    and `scores`, in the order of names. A collective."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for name, model in models.items():
        if counts_target(session, store):
            found[name]["target_loss"] = target_loss(session, store, model)
        if tasks.counted(session, store):
            found[name]["tasks"] = tasks.bits_per_byte(session, store, model)
    wanted = _scored(session, store)
    if wanted:
        given = comm.on_first(lambda: scores.of_models(session, wanted, models))
        for name, of in given.items():
            found[name]["scores"] = of
    return found


def domain_losses(run: Path, store: TokenStore) -> list[float]:
    """(K,) validation loss of a finished run per domain, nats per token."""
    domains = files.read_json(run / "result.json")["evaluation"]["domains"]
    return [domains[name]["loss"] for name in store.domains]


def counts_target(session: Session, store: TokenStore) -> bool:
    """Whether the objective counts the target's text."""
    asked = session.config.objective
    counted = TARGET in (asked.metrics or {}) or TARGET in (asked.guard or {})
    if counted and TARGET in store.domains:
        raise UserError(
            f"objective: {TARGET} is a domain of the data, and the text of target.*; rename the "
            "domain"
        )
    return counted


def target_loss(session: Session, store: TokenStore, model: Path) -> float:
    """Mean loss of a model's folder on the target, nats per token; that of a run in the store is
    measured once, and kept there. A collective."""
    towards, text = _text(session, store)
    (known,) = measuring.known(session, model, [str(text)])
    if known is None:
        known = {"loss": float(measuring.losses_on(session, store, model, towards).mean())}
        measuring.keep(session, model, {str(text): known})
    return float(known["loss"])


def _scored(session: Session, store: TokenStore) -> list[str]:
    """The metrics that are scores: what is counted, and nothing else. None without
    objective.scores."""
    asked = session.config.objective
    if asked.scores is None:
        return []
    other = {*store.domains, TARGET, *tasks.known(session)}
    return [name for name in {**(asked.metrics or {}), **(asked.guard or {})} if name not in other]


def _text(session: Session, store: TokenStore) -> tuple[Tensor, str | None]:
    """The target's sequences (N, T + 1), read once, and their fingerprint; None where they do not
    count."""
    if not counts_target(session, store):
        return torch.zeros(0, 0, dtype=torch.int64), None
    if __name__ not in session.results:
        towards = targets.of_mixtures(session, store)
        if not len(towards):
            raise UserError(
                f"objective: counts {TARGET}, and there is none; give target.files or "
                "target.domains"
            )
        session.results[__name__] = towards, fingerprint(towards.tolist())
    text: tuple[Tensor, str] = session.results[__name__]
    return text

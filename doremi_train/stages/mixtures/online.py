"""Online mixtures: the main run adapts its own, and what it drew is written down as weights and as
a staged schedule.

K domains.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import losses
from doremi_train.methods import ONLINE, dro, online
from doremi_train.mixture import Mixture
from doremi_train.model import folders
from doremi_train.parallel import comm, engine
from doremi_train.stages import prepare
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import budget, followed, language_model, reference
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.runs.budget import main_steps
from doremi_train.stages.runs.language_model import Begun
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run
from doremi_train.training.task import TrainingOptions

_ANY = [1.0]  # a target loss, where options are checked before it is known
PIECES = 50  # of a schedule, at most


def asked(session: Session) -> bool:
    """Whether the mixture is one that the main run adapts."""
    return session.method in ONLINE


@once
def main(session: Session) -> Run:
    """The main run."""
    store, config = prepare.run(session), session.config
    target = known_target(session, store)
    if target is None:
        options_of(session, store, _ANY * len(store.domains))  # wrong before a reference is trained
        target = _reference_losses(session, store)
    options = options_of(session, store, target)
    run = recipe(session, store, options)

    def begin() -> Begun:
        task = language_model.task_of(
            session,
            run,
            "main",
            store,
            objective=ONLINE[session.method],
            objective_options=options,
            training=_training(session),
        )
        shape = language_model.resolved_model(session, store, "main")
        return Begun(task, language_model.built(session, shape, config.training, config.seed))

    language_model.train_once(session, run, "main", begin)
    return run


class Adapted(NamedTuple):
    """A way whose mixture is what the main run drew."""

    HOW: str

    def run(self, session: Session) -> Mixture:
        """What the main run drew of each domain, and when."""
        trained = main(session)
        drawn, trace = comm.on_first(
            lambda: (
                trained.result()["weights"],
                list(files.read_lines(trained.folder / "domain_weights.jsonl")),
            )
        )
        return Mixture(session.method, drawn, schedule=schedule(trace))

    def ahead(self, session: Session, store: TokenStore, pipeline: Pipeline) -> None:
        """The main run; a reference whose losses it needs is a run too. What it will draw is not
        known before."""
        config, target = session.config, known_target(session, store)
        wanted = config.online.target_losses is None and config.reference.path is None
        if ONLINE[session.method] is dro and wanted:
            ingredients = reference.ingredients(session, store, reference.mixture(session, store))
            run = language_model.recipe(session, store, *ingredients)
            pipeline.add("reference", "reference", ingredients[0], config.training.steps, run)
        options = options_of(session, store, target or _ANY * len(store.domains))
        known = None if target is None else recipe(session, store, options)
        shape = language_model.resolved_model(session, store, "main")
        pipeline.add("main", "main", shape, main_steps(session), known)


ado = Adapted(
    "The main run draws what it still learns from, by laws that are fitted to its losses."
)
odm = Adapted("The main run draws what has high loss, and a part of everything, as a bandit does.")
furthest = Adapted("The main run draws what is furthest above its target loss.")


def schedule(trace: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """[(first step from 0, mean mixture until the next), …] of what every step drew, in PIECES
    pieces at most."""
    edges = np.unique(np.linspace(0, len(trace), min(PIECES, len(trace)) + 1).astype(int)).tolist()
    pieces = []
    for first, last in itertools.pairwise(edges):
        steps = [line["tokens"] for line in trace[first:last]]
        pieces.append(
            (
                first,
                {
                    name: fmean(step[name] / sum(step.values()) for step in steps)
                    for name in steps[0]
                },
            )
        )
    return pieces


def recipe(session: Session, store: TokenStore, options: online.Options) -> Run:
    """The main run with these options, wherever and whenever it is trained."""
    return Run(
        session.store,
        "online",
        {
            "data": store.fingerprint,
            "model": language_model.resolved_model(session, store, "main"),
            "method": session.method,
            "options": asdict(options),
            "training": training_identity(_training(session)),
            "evaluation": session.plain["evaluation"],
            "seed": session.config.seed,
        },
    )


def options_of(session: Session, store: TokenStore, target: Sequence[float]) -> online.Options:
    """Options of the method asked for; `target` (K,) are the losses that dro is to reach.

    Raises UserError where caps leave no mixture, or something else weighs or picks what is drawn.
    """
    config, asked, steps = session.config, session.config.online, main_steps(session)
    method = session.method
    if config.training.loss_weighting != "none" or config.batch_selection.method != "none":
        raise UserError(
            f"mixture={method}: looks at the plain losses of whole batches; leave "
            "training.loss_weighting and batch_selection at none"
        )
    if followed.asked(session):
        raise UserError(
            f"main.mixture_file={config.main.mixture_file}: the main run of mixture={method} "
            "adapts its mixture itself; leave one of the two out"
        )
    within = budget.caps(session, store, asked.floor, "online.floor")
    common: dict[str, Any] = {
        "prior": tuple(budget.heuristic(session, store, asked.prior, steps).tolist()),
        "high": tuple(within.high.tolist()),
        "floor": asked.floor,
        "warmup": asked.warmup,
        "every": asked.every or max(1, steps // 50),
    }
    if ONLINE[method] is dro:
        return dro.Options(**common, step_size=asked.step_size, target_losses=tuple(target))
    return online.Options(**common)


def known_target(session: Session, store: TokenStore) -> list[float] | None:
    """(K,) losses that dro is to reach, where they are known without training or measuring; for
    other methods ()."""
    config, given = session.config, session.config.online.target_losses
    if ONLINE[session.method] is not dro:
        return []
    if given is not None:
        if set(given) != set(store.domains):
            raise UserError(
                f"online.target_losses: names {', '.join(given)}; must name exactly "
                f"{', '.join(store.domains)}"
            )
        return [given[name] for name in store.domains]
    if config.reference.path is not None:
        return None
    ingredients = reference.ingredients(session, store, reference.mixture(session, store))
    run = language_model.recipe(session, store, *ingredients)
    return _by_domain(run.result()["evaluation"], store) if run.finished else None


def _reference_losses(session: Session, store: TokenStore) -> list[float]:
    """(K,) validation losses of the reference, which is trained if it is not there."""
    config, training = session.config, session.config.training
    folder = reference.folder(session, store, reference.mixture(session, store), "reference")
    loaded = folders.load(folder, store.vocabulary_size, "reference.path", training.precision)
    loaded = engine.frozen(session.place, loaded)
    rows = comm.world().largest(training.batch_size, training.micro_batch_size)
    length, options = training.sequence_length, config.evaluation
    return _by_domain(
        losses.measure(loaded, store, length, rows, options, session.place.device), store
    )


def _by_domain(figures: Mapping[str, Any], store: TokenStore) -> list[float]:
    return [figures["domains"][name]["loss"] for name in store.domains]


def _training(session: Session) -> TrainingOptions:
    return replace(session.config.training, steps=main_steps(session))

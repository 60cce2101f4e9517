"""Online mixtures: the main run adapts its own, and what it drew is written down as weights and as
a staged schedule.

K domains.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train import mixture as doremi_train_mixture
from doremi_train.config import UserError
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import losses
from doremi_train.methods import ONLINE, dro, online
from doremi_train.model import folders
from doremi_train.parallel import comm
from doremi_train.stages import prepare
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import budget, language_model, reference
from doremi_train.stages.runs.budget import main_steps
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run
from doremi_train.training.task import Task, TrainingOptions
from doremi_train.training.trainer import Trainer

STAGES = 50  # of a schedule, at most


def asked(session: Session) -> bool:
    """Whether the mixture is one that the main run adapts."""
    return session.config.mixture.method in ONLINE


@once
def run(session: Session) -> Run:
    """The main run."""
    store = prepare.run(session)
    config = session.config
    target = known_target(session, store)
    options = options_of(
        session, store, _reference_losses(session, store) if target is None else target
    )
    found = recipe(session, store, options)
    with session.computing(found, "main") as todo:
        if not todo:
            session.say(f"{'main':<22} is in the store already: {found.folder.name}")
            return found
        task = Task(
            label="main",
            run=found,
            objective=ONLINE[config.mixture.method],
            objective_options=options,
            store=store,
            seed=config.seed,
            training=_training(session),
            evaluation=config.evaluation,
            bar=session.part("main"),
        )
        shape = language_model.resolved_model(session, store, config.main.model)
        built = folders.build(shape, config.seed, config.training.activation_checkpointing)
        language_model.finish(session, task, Trainer(task, built, session.place))
    return found


def mixture(session: Session) -> doremi_train_mixture.Mixture:
    """What the main run drew of each domain, and when."""
    found = run(session)
    drawn, trace = comm.on_first(
        lambda: (
            found.result()["weights"],
            list(files.read_lines(found.folder / "domain_weights.jsonl")),
        )
    )
    return doremi_train_mixture.Mixture(
        session.config.mixture.method, drawn, schedule=schedule(trace)
    )


def schedule(trace: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """[(first step from 0, mean mixture until the next), …] of what every step drew, in STAGES
    pieces at most."""
    edges = np.unique(np.linspace(0, len(trace), min(STAGES, len(trace)) + 1).astype(int)).tolist()
    found = []
    for first, last in itertools.pairwise(edges):
        steps = [line["tokens"] for line in trace[first:last]]
        found.append(
            (
                first,
                {
                    name: fmean(step[name] / sum(step.values()) for step in steps)
                    for name in steps[0]
                },
            )
        )
    return found


def recipe(session: Session, store: TokenStore, options: online.Options) -> Run:
    """The main run with these options, wherever and whenever it is trained."""
    return Run(
        session.store,
        "online",
        {
            "data": store.fingerprint,
            "model": language_model.resolved_model(session, store, session.config.main.model),
            "method": session.config.mixture.method,
            "options": asdict(options),
            "training": training_identity(_training(session)),
            "evaluation": session.plain["evaluation"],
            "seed": session.config.seed,
        },
    )


def options_of(session: Session, store: TokenStore, target: Sequence[float]) -> online.Options:
    """Of the method asked for; `target` (K,) are the losses that dro is to reach.

    Raises UserError where caps leave no mixture, or something else weighs or picks what is drawn.
    """
    config, asked, steps = session.config, session.config.online, main_steps(session)
    method = config.mixture.method
    if config.training.loss_weighting != "none" or config.batch_selection.method != "none":
        raise UserError(
            f"mixture={method}: looks at the plain losses of whole batches; leave "
            "training.loss_weighting and batch_selection at none"
        )
    within = budget.caps(session, store, asked.floor, "online.floor")
    common: dict[str, Any] = {
        "prior": tuple(budget.heuristic(session, store, asked.prior, steps).tolist()),
        "high": tuple(within.high.tolist()),
        "floor": asked.floor,
        "warmup": asked.warmup,
        "every": asked.every or max(1, steps // 50),
    }
    if method == "dro":
        return dro.Options(**common, step_size=asked.step_size, target_losses=tuple(target))
    return online.Options(**common)


def known_target(session: Session, store: TokenStore) -> list[float] | None:
    """(K,) losses that dro is to reach, where they are known without training or measuring; for
    other methods ()."""
    config, given = session.config, session.config.online.target_losses
    if config.mixture.method != "dro":
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
    found = language_model.recipe(session, store, *ingredients)
    return _by_domain(found.result()["evaluation"], store) if found.finished else None


def _reference_losses(session: Session, store: TokenStore) -> list[float]:
    """(K,) validation losses of the reference, which is trained if it is not there."""
    config, training = session.config, session.config.training
    folder = reference.folder(session, store, reference.mixture(session, store), "reference")
    loaded = folders.load(folder, store.vocabulary_size, "reference.path").to(session.place.device)
    loaded.precision = training.precision
    rows = comm.world().largest(training.batch_size, training.micro_batch_size)
    length, options = training.sequence_length, config.evaluation
    return _by_domain(
        losses.measure(loaded, store, length, rows, options, session.place.device), store
    )


def _by_domain(figures: Mapping[str, Any], store: TokenStore) -> list[float]:
    return [figures["domains"][name]["loss"] for name in store.domains]


def _training(session: Session) -> TrainingOptions:
    return replace(session.config.training, steps=main_steps(session))

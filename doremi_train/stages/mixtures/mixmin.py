"""MixMin: a small model of every domain, and the mixture of them that a target needs.

An expert is a run on its domain alone, addressed by that domain and the tokeniser: with a given
tokeniser a new domain costs one run.

K domains, M target sequences, T tokens a sequence.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from doremi_train import mixture
from doremi_train.config import fingerprint
from doremi_train.console import Part
from doremi_train.data.sampler import Subsample
from doremi_train.data.tokens.shards import TokenStore, domain_folder
from doremi_train.methods import box, mixmin
from doremi_train.methods.box import Box, Floats
from doremi_train.parallel import comm
from doremi_train.stages import prepare
from doremi_train.stages.runs import budget, language_model, measuring, submit, targets
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run
from doremi_train.training.task import TrainingOptions

HOW = (
    "An expert is trained on every domain alone; the mixture is that of the experts which finds "
    "the target least surprising."
)


@once
def run(session: Session) -> mixture.Mixture:
    """Train every expert, look at the target with each, and solve."""
    store = prepare.run(session)
    search = state(session, store)
    towards = targets.of_ways(session, store, store.domains)
    with session.computing(search, "mixmin") as todo:
        if todo:
            experts = _train(session, store)
            looked = [
                measuring.losses_on(session, store, one.folder / "model", towards)
                for one in experts
            ]
            losses = torch.stack(looked).flatten(1).numpy()  # (K, N)
            comm.on_first(lambda: _conclude(session, store, search, losses))
    result = comm.on_first(search.result)
    return mixture.Mixture("mixmin", result["weights"], provenance=result["provenance"])


def ahead(session: Session, store: TokenStore, pipeline: Pipeline) -> Tensor | None:
    """The expert of every domain; the mixture (K,) if it is solved."""
    shape, steps = language_model.resolved_model(session, store), session.config.training.steps
    for name, run in experts(session, store).items():
        pipeline.add(name, "expert", shape, steps, run)
    search = state(session, store)
    if not search.finished:
        return None
    return mixture.Mixture("mixmin", search.result()["weights"]).tensor(store.domains)


def experts(session: Session, store: TokenStore) -> dict[str, Run]:
    """The run of every domain by its name under run_dir, wherever and whenever it is trained."""
    return {
        _name(domain): language_model.recipe(
            session, store.only([domain]), *_ingredients(session, store)
        )
        for domain in store.domains
    }


def state(session: Session, store: TokenStore) -> Run:
    """The run that solves. Raises UserError where caps and floor leave no mixture, or the target is
    wrong."""
    within = _box(session, store)
    return Run(
        session.store,
        "mixmin",
        {
            "experts": {name: one.address for name, one in experts(session, store).items()},
            "target": fingerprint(targets.of_ways(session, store, store.domains).tolist()),
            "low": within.low.tolist(),
            "high": within.high.tolist(),
        },
    )


def _name(domain: str) -> str:
    return f"mixmin/experts/{domain_folder(domain)}"


def _ingredients(
    session: Session, store: TokenStore
) -> tuple[dict[str, Any], Tensor, TrainingOptions, Subsample | None]:
    """What an expert is trained from: model, its one domain, training options and part of the
    data."""
    shape = language_model.resolved_model(session, store)
    one = torch.ones(1, dtype=torch.float64)
    return shape, one, session.config.training, budget.subsample(session)


def _train(session: Session, store: TokenStore) -> list[Run]:
    training = session.config.training
    tokens = training.steps * training.batch_size * training.sequence_length
    runs = []
    with session.over("mixmin", tokens * len(store.domains)) as bar:
        if session.config.submit.cluster != "none":
            _submit(session, store)
        for domain in store.domains:
            part = Part(bar, domain)
            ingredients = _ingredients(session, store)
            runs.append(
                language_model.train(
                    session, store.only([domain]), _name(domain), *ingredients, bar=part
                )
            )
            part.update(tokens)
    return runs


def _submit(session: Session, store: TokenStore) -> None:
    """The experts that are not finished as jobs side by side: each the reference stage on its
    domain."""
    trained = experts(session, store)
    children = {}
    for domain in store.domains:
        if not trained[_name(domain)].finished:
            alone = {
                "data.only": [domain],
                "stage": "reference",
                "reference.mixture": "uniform",
                "reference.path": None,
            }
            children[_name(domain)] = submit.configured(
                session, session.run_dir / "jobs" / _name(domain), **alone
            )
    submit.submit(session, children)


def _conclude(session: Session, store: TokenStore, search: Run, losses: Floats) -> None:
    within = _box(session, store)
    solution = mixmin.solve(losses, within)
    point = box.on_grid(solution.weights, within)
    even = np.full(len(point), 1 / len(point))
    natural = budget.heuristic(session, store, "natural", budget.main_steps(session)).numpy()
    provenance = {
        "mixmin": search.folder.name,
        "experts_loss": solution.loss,
        "experts_loss_natural": mixmin.mixed(losses, natural),
        "experts_loss_uniform": mixmin.mixed(losses, even),
        "expert_losses": store.named(losses.mean(1)),
    }
    session.say(
        f"mixmin: the mixed experts reach {solution.loss:.4f} nats per token of the target, "
        f"{provenance['experts_loss_natural']:.4f} with natural and "
        f"{provenance['experts_loss_uniform']:.4f} with uniform weights"
    )
    search.finish({"weights": store.named(point), "provenance": provenance})


def _box(session: Session, store: TokenStore) -> Box:
    return budget.caps(session, store, session.config.mixmin.floor, "mixmin.floor")

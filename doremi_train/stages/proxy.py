"""The proxy: Group DRO against the reference, for every round and seed, averaged into weights.json."""

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from doremi_train import model, weights
from doremi_train.data.shards import TokenStore
from doremi_train.methods import doremi
from doremi_train.runs import Run
from doremi_train.stages import (
    Proxy,
    Session,
    language_model,
    once,
    prepare,
    reference,
    reference_losses,
    submit,
    training_identity,
)
from doremi_train.train import Task, Trainer


@once
def run(session: Session) -> weights.Mixture:
    """Reference and proxy, round after round, until the mixture stays where it was."""
    if not several(session):
        return _rounds(session)
    with session.reporting(session.run_dir / "proxy"):
        return _rounds(session)


def several(session: Session) -> bool:
    """Whether `proxy/` is a folder of runs, round-1/seed-0 and so on, or the one run itself."""
    return session.config.proxy.rounds > 1 or session.config.proxy.seeds > 1


def reference_name(number: int) -> str:
    """Under run_dir, of the reference of round `number`, from 1."""
    return "reference" if number == 1 else f"proxy/round-{number}/reference"


def name_of(session: Session, number: int, index: int) -> str:
    """Under run_dir, of the proxy of seed `index` in round `number`."""
    return f"proxy/round-{number}/seed-{index}" if several(session) else "proxy"


def _rounds(session: Session) -> weights.Mixture:
    store = prepare.run(session)
    options = session.config.proxy
    before = reference.mixture(session, store)  # (K,) α_ref
    for number in range(1, options.rounds + 1):
        folder = reference.folder(session, store, before, reference_name(number))
        if session.config.submit.cluster != "none" and options.seeds > 1:
            _submit(session, store, folder, number)
        proxies = [_train(session, store, folder, number, seed) for seed in range(options.seeds)]
        averages = [average(proxy, store) for proxy in proxies]
        mean, interval = weights.summarize(averages)
        moved = float((mean - before).abs().max())
        session.say(f"round {number}: the largest change of a weight against α_ref is {moved:.4f}")
        if moved < options.round_tolerance:
            break
        before = mean
    return _mixture(session, store, mean, interval, number)


def _submit(session: Session, store: TokenStore, reference_folder: Path, number: int) -> None:
    """The seeds of a round as jobs side by side: each the proxy stage of a configuration with that one seed."""
    children = {}
    for index in range(session.config.proxy.seeds):
        if not recipe(session, store, reference_folder, index).finished:
            children[f"proxy/round-{number}/seed-{index}"] = submit.configured(
                session,
                session.run_dir / f"proxy/round-{number}/jobs/seed-{index}",
                stage="proxy",
                seed=language_model.proxy_seed(session, index),
                **{"proxy.seeds": 1, "proxy.rounds": 1, "reference.path": str(reference_folder.resolve())},
            )
    submit.submit(session, children)


def recipe(session: Session, store: TokenStore, reference_folder: Path, index: int) -> Run:
    """The proxy of seed `index` against a reference, wherever and whenever it is trained."""
    config, options = session.config, session.config.proxy
    method = algorithm(options)
    return Run(
        session.store,
        "proxy",
        {
            "data": store.fingerprint,
            "model": language_model.resolved_model(session, store),
            "reference": model.folder_fingerprint(reference_folder),
            "options": {field.name: getattr(method, field.name) for field in fields(method)},
            "accumulation": options.accumulation,
            "training": training_identity(config.training),
            "evaluation": session.plain["evaluation"],
            "seed": language_model.proxy_seed(session, index),
        }
        | language_model.described(language_model.subsample(session))
        | ({"reference_losses": "cached"} if reference_losses.cached(session) else {}),  # rounded
    )


def _train(session: Session, store: TokenStore, reference_folder: Path, number: int, index: int) -> Run:
    """One proxy: seed `index` of round `number`."""
    config = session.config
    name = name_of(session, number, index)
    run = recipe(session, store, reference_folder, index)
    with session.computing(run, name) as todo:
        if not todo:
            session.say(f"{name:<22} is in the store already: {run.folder.name}")
            return run
        task = Task(
            label=name,
            run=run,
            objective=doremi,
            objective_options=algorithm(config.proxy),
            store=store,
            seed=language_model.proxy_seed(session, index),
            training=config.training,
            evaluation=config.evaluation,
            accumulation=config.proxy.accumulation,
            reference=reference_losses.of(session, store, run, reference_folder),
            subsample=language_model.subsample(session),
        )
        shape = language_model.resolved_model(session, store)
        built = model.build(shape, language_model.proxy_seed(session, index), config.training.activation_checkpointing)
        language_model.finish(session, task, Trainer(task, built, session.place))
    return run


def algorithm(options: Proxy) -> doremi.Options:
    """The options that Algorithm 1 itself reads."""
    return doremi.Options(**{field.name: getattr(options, field.name) for field in fields(doremi.Options)})


def average(proxy: Run, store: TokenStore) -> Tensor:
    """ᾱ (K,) of a finished proxy."""
    found = proxy.result()["weights"]
    return torch.tensor([found[name] for name in store.domains], dtype=torch.float64)


def _mixture(
    session: Session, store: TokenStore, mean: Tensor, interval: tuple[Tensor, Tensor] | None, rounds: int
) -> weights.Mixture:
    low_high = None
    if interval is not None:
        pairs = zip(store.domains, interval[0].tolist(), interval[1].tolist(), strict=True)
        low_high = {name: (low, high) for name, low, high in pairs}
    return weights.Mixture(
        method="doremi",
        weights=dict(zip(store.domains, mean.tolist(), strict=True)),
        interval=low_high,
        provenance={"proxy_seeds": session.config.proxy.seeds, "rounds": rounds},
    )

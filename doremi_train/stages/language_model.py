"""A language model trained on a fixed mixture: reference, baseline, uniform and main are all this run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train import batch_selection, losses
from doremi_train.config import UserError
from doremi_train.console import Bar
from doremi_train.data.sampler import Subsample
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import HEURISTICS, box, cross_entropy, importance
from doremi_train.model import configs, folders
from doremi_train.parallel import comm
from doremi_train.stages.options import training_identity
from doremi_train.stages.session import Session
from doremi_train.storage import checkpoint
from doremi_train.storage.runs import Run, set_status
from doremi_train.train import Options, Position, Task, Trainer

SEEDS_APART = 1_000_000  # between the proxies of one command: far from the seeds a sweep counts through


class Weighting(NamedTuple):
    """How a run weighs its tokens (see `stages.weighting`)."""

    options: importance.Options  # but for the mixture, which is the run's
    recipe: dict[str, Any]  # what it adds to that of the run
    reference: Callable[[Run], losses.Reference]


def recipe(
    session: Session,
    store: TokenStore,
    config: dict[str, Any],
    weights: Tensor,
    training: Options,
    part: Subsample | None = None,
    weighting: Weighting | None = None,
    selection: batch_selection.Setting | None = None,
) -> Run:
    """The run that trains `config` on `weights` (K,): whoever asks for the same one gets the same folder."""
    return Run(
        session.store,
        "language_model",
        {
            "data": store.fingerprint,
            "model": config,
            "mixture": dict(zip(store.domains, weights.tolist(), strict=True)),
            "training": training_identity(training),
            "evaluation": session.plain["evaluation"],
            "seed": session.config.seed,
        }
        | described(part)
        | (weighting.recipe if weighting else {})
        | batch_selection.described(selection),
    )


def train(
    session: Session,
    store: TokenStore,
    name: str,
    config: dict[str, Any],
    weights: Tensor,
    training: Options,
    part: Subsample | None = None,
    weighting: Weighting | None = None,
    selection: batch_selection.Setting | None = None,
    bar: Bar | None = None,
) -> Run:
    """Train it, unless it is in the store already; link it as `run_dir/name`. `bar`: of many runs, for whom it is moved
    on in silence."""
    run = recipe(session, store, config, weights, training, part, weighting, selection)
    bar = bar or session.part(name)
    with session.computing(run, name) as todo:
        if not todo and bar is None:
            session.say(f"{name:<22} is in the store already: {run.folder.name}")
        if not todo:
            return run
        task = Task(
            label=name,
            run=run,
            objective=cross_entropy,
            objective_options=cross_entropy.Options(weights=tuple(weights.tolist())),
            store=store,
            seed=session.config.seed,
            training=training,
            evaluation=session.config.evaluation,
            subsample=part,
            selection=selection,
            bar=bar,
        )
        if weighting is not None:
            options = replace(weighting.options, weights=tuple(weights.tolist()))
            task = task._replace(
                objective=importance,
                objective_options=options,
                accumulation="exact" if options.of_the_batch else "lagged",
                reference=weighting.reference(run),
            )
        built = folders.build(config, session.config.seed, training.activation_checkpointing)
        finish(session, task, Trainer(task, built, session.place))
    return run


Save = Callable[[dict[str, Tensor]], None]  # of the model's whole tensors by name, into the run's folder


def finish(
    session: Session, task: Task, trainer: Trainer, save: Save | None = None, said: Mapping[str, Any] | None = None
) -> None:
    """Train to the end, save the model, and write the result: the run is done. `save`: otherwise than as a model of the
    token store; `said`: what the result says more."""
    with session.tracking.run(task.label, task.run.folder.name, trainer.begins_at) as tracked:
        position = trainer.fit(tracked.line)
        measured = trainer.evaluate()
        tensors = trainer.engine.state()["model"]
        more = {"evaluation": measured, **(said or {})}
        write = save or (lambda tensors: _save(task, trainer, tensors))
        comm.on_first(lambda: tracked.summary(_write(task, trainer, position, more, lambda: write(tensors))))
    trainer.engine.close()


def _save(task: Task, trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    assert isinstance(task.store, TokenStore)
    folders.save(trainer.bare, tensors, task.run.folder / "model", task.store.tokenizer(), task.store.end_of_document)


def _write(
    task: Task, trainer: Trainer, position: Position, more: dict[str, Any], save: Callable[[], None]
) -> dict[str, float]:
    """Returns the headline."""
    save()
    epochs = dict(zip(task.store.domains, (position.counts / trainer.batches.sizes).tolist(), strict=True))
    result: dict[str, Any] = {"steps": position.step, "skipped": position.skipped, "epochs": epochs}
    result |= {"engine": trainer.engine_used, **more}
    if hasattr(task.objective, "result"):
        average = task.objective.result(position.state).tolist()
        result["weights"] = dict(zip(task.store.domains, average, strict=True))
    task.run.finish(result)
    set_status(task.run.folder, "running", position.step)
    checkpoint.remove(task.run.folder / "checkpoints")
    learned = {f"learned_weights/{name}": weight for name, weight in result.get("weights", {}).items()}
    measured = more["evaluation"]
    return {"mean_loss": measured["mean_loss"], "worst_loss": measured["worst_loss"], **learned}


def main_steps(session: Session) -> int:
    return session.config.main.steps or session.config.training.steps


def final_tokens(session: Session) -> int:
    """Tokens of the run that the mixture is for."""
    training = session.config.training
    return session.config.main.tokens or main_steps(session) * training.batch_size * training.sequence_length


def proxy_seed(session: Session, index: int) -> int:
    """Of proxy number `index` of a command."""
    return session.config.seed + SEEDS_APART * index


def subsample(session: Session) -> Subsample | None:
    """The part of every domain that reference and proxy read; None: all. At equal weights they pass over it as often as
    the final run passes over the whole. It is the same for every proxy seed of a command."""
    training = session.config.training
    part = Fraction(training.steps * training.batch_size * training.sequence_length, final_tokens(session))
    if not session.config.proxy.match_repetition or part >= 1:
        return None
    return Subsample(part, session.config.seed % SEEDS_APART)


def described(part: Subsample | None) -> dict[str, Any]:
    """What a sub-sample adds to the recipe of a run; nothing where all is read."""
    return {} if part is None else {"subsample": {"part": str(part.part), "seed": part.seed}}


def resolved_model(session: Session, store: TokenStore, name: str | None = None) -> dict[str, Any]:
    """The proxy's transformers config, or that of the preset `name`."""
    options = session.config.model if name is None else configs.Options(**configs.preset(name, "main.model"))
    length = session.config.training.sequence_length
    key = "model" if name is None else "main.model"
    return configs.resolve(options, store.vocabulary_size, store.end_of_document, length, key)


def caps(session: Session, store: TokenStore, floor: float, key: str) -> box.Box:
    """Where mixtures may be: no domain more than mixture.max_epochs times in the final run, and at least `floor` (of
    this key). Raises UserError where that leaves none."""
    sizes = np.asarray(store.sizes("train"), dtype=np.float64)
    try:
        return box.box(sizes, final_tokens(session), session.config.mixture.max_epochs, floor, key)
    except ValueError as error:
        raise UserError(f"mixture={session.config.mixture.method}: {error}") from None


def heuristic(session: Session, store: TokenStore, name: str, steps: int) -> Tensor:
    """(K,) a mixture from sizes, for a run of `steps` steps. Raises UserError where it cannot be met."""
    training = session.config.training
    budget = steps * training.batch_size * training.sequence_length
    sizes = torch.from_numpy(np.asarray(store.sizes("train"), dtype=np.float64))
    try:
        return HEURISTICS[name](sizes, budget, session.config.mixture)
    except ValueError as error:
        raise UserError(f"mixture {name}: {error}") from None

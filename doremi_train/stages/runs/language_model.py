"""A language model trained on a fixed mixture: reference, baseline, uniform and main are all this
run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from doremi_train.config import in_keys
from doremi_train.console import Bar
from doremi_train.data.batches import Store
from doremi_train.data.sampler import Subsample
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import Objective, cross_entropy, importance
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import comm
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import budget, start
from doremi_train.stages.session import Session
from doremi_train.storage import checkpoint
from doremi_train.storage.runs import Run, set_status
from doremi_train.training import batch_selection, frozen, saving
from doremi_train.training.task import Position, Task, TrainingFailed, TrainingOptions
from doremi_train.training.trainer import Trainer


class Weighting(NamedTuple):
    """Weighting of a run's tokens (see `stages.runs.weighting`)."""

    options: importance.Options  # but for the mixture, which is the run's
    recipe: dict[str, Any]  # what it adds to that of the run
    reference: Callable[[Run], frozen.Reference]


def recipe(
    session: Session,
    store: TokenStore,
    config: dict[str, Any],
    weights: Tensor,
    training: TrainingOptions,
    part: Subsample | None = None,
    weighting: Weighting | None = None,
    selection: batch_selection.Setting | None = None,
    seed: int | None = None,
) -> Run:
    """The run that trains `config` on `weights` (K,): whoever asks for the same one gets the same
    folder. `seed`: another than the command's."""
    return Run(
        session.store,
        "language_model",
        {
            "data": store.fingerprint,
            "model": config,
            "mixture": store.named(weights),
            "training": training_identity(training),
            "evaluation": session.plain["evaluation"],
            "seed": session.config.seed if seed is None else seed,
        }
        | budget.described(part)
        | (weighting.recipe if weighting else {})
        | batch_selection.described(selection),
    )


def train(
    session: Session,
    store: TokenStore,
    name: str,
    config: dict[str, Any],
    weights: Tensor,
    training: TrainingOptions,
    part: Subsample | None = None,
    weighting: Weighting | None = None,
    selection: batch_selection.Setting | None = None,
    bar: Bar | None = None,
    seed: int | None = None,
) -> Run:
    """Train it, unless it is in the store already; link it as `run_dir/name`. `bar`: of many runs,
    for whom it is moved on in silence."""
    run = recipe(session, store, config, weights, training, part, weighting, selection, seed)
    bar = bar or session.part(name)

    def begin() -> Begun:
        task = task_of(
            session,
            run,
            name,
            store,
            objective=cross_entropy,
            objective_options=cross_entropy.Options(weights=tuple(weights.tolist())),
            training=training,
            subsample=part,
            selection=selection,
            bar=bar,
            seed=run.recipe["seed"],
        )
        if weighting is not None:
            options = replace(weighting.options, weights=tuple(weights.tolist()))
            task = task._replace(
                objective=importance,
                objective_options=options,
                accumulation="exact" if options.of_the_batch else "lagged",
                reference=weighting.reference(run),
            )
        return Begun(task, built(session, config, training, run.recipe["seed"]))

    train_once(session, run, name, begin, quiet=bar is not None)
    return run


class Begun(NamedTuple):
    """A run that is to be trained."""

    task: Task
    model: LanguageModel  # as it is before the first step
    # Otherwise than as a model of the token store. A collective.
    save: Callable[[Trainer], None] | None = None
    said: Mapping[str, Any] | None = None  # what the result says more
    first: Callable[[Trainer], None] = lambda trainer: None  # before it goes on


def train_once(
    session: Session, run: Run, name: str, begin: Callable[[], Begun], quiet: bool = False
) -> bool:
    """Train a run unless it is in the store already, and link it as `run_dir/name`. `begin` is
    asked only where there is work to do; whether there was is what is returned."""
    with session.computing(run, name, quiet) as todo:
        if todo:
            begun = begin()
            trainer = Trainer(begun.task, begun.model, session.place)
            begun.first(trainer)
            _finish(session, begun, trainer)
    return todo


def task_of(session: Session, run: Run, name: str, store: Store, **of: Any) -> Task:
    """A task with what all runs of a command have in common; `of` says the rest, and what
    differs."""
    common: dict[str, Any] = {
        "seed": session.config.seed,
        "training": session.config.training,
        "evaluation": session.config.evaluation,
        "bar": session.part(name),
    }
    return Task(label=name, run=run, store=store, **(common | of))


def built(
    session: Session, config: dict[str, Any], training: TrainingOptions, seed: int
) -> LanguageModel:
    """A model of this shape as it is before the first step: freshly initialised, or with the
    weights that it starts from; the engine fills it."""
    if configs.STARTED in config:
        return start.model(session, config, training)
    return folders.shaped(config, seed, training.activation_checkpointing, training.precision)


def _finish(session: Session, begun: Begun, trainer: Trainer) -> None:
    """Train to the end, save the model, and write the result: the run is done."""
    task = begun.task
    with session.tracking.run(task.label, task.run.folder.name, trainer.begins_at) as tracked:
        position = trainer.fit(tracked.line)
        measured = trainer.evaluate()
        if begun.save is not None:
            begun.save(trainer)
        else:
            _save(task, trainer)
        more = {"evaluation": measured, **(begun.said or {})}
        comm.on_first(lambda: tracked.summary(_write(task, trainer, position, more)))
    trainer.engine.close()


def _save(task: Task, trainer: Trainer) -> None:
    assert isinstance(task.store, TokenStore)
    folder, length = task.run.folder / "model", task.training.sequence_length
    saving.save(trainer.engine, trainer.bare, folder, task.store, length, tried=True)


def _write(
    task: Task, trainer: Trainer, position: Position, more: dict[str, Any]
) -> dict[str, float]:
    """Returns the headline."""
    epochs = task.store.named(position.counts / trainer.batches.sizes)
    result: dict[str, Any] = {"steps": position.step, "skipped": position.skipped, "epochs": epochs}
    result |= {"engine": trainer.engine_used, **more}
    if (task.run.folder / "model" / "config.json").exists():  # the weights that were measured
        result["model"] = folders.folder_fingerprint(task.run.folder / "model")
    weights = learned(task.label, task.objective, position.state)
    if weights is not None:
        result["weights"] = task.store.named(weights)
    task.run.finish(result)
    set_status(task.run.folder, "running", position.step)
    checkpoint.remove(task.run.folder / "checkpoints")
    line = {f"learned_weights/{name}": weight for name, weight in result.get("weights", {}).items()}
    measured = more["evaluation"]
    return {"mean_loss": measured["mean_loss"], "worst_loss": measured["worst_loss"], **line}


def learned(label: str, objective: Objective, state: Any) -> Tensor | None:
    """(K,) the mixture that a run's objective learned; None where it learns none. Raises
    TrainingFailed where it never came to that."""
    try:
        return objective.result(state)
    except ValueError as error:
        said = in_keys(error, {"average_from": "proxy.average_from", "warmup": "proxy.warmup"})
        raise TrainingFailed(f"{label}: {said}") from None


def resolved_model(
    session: Session, store: TokenStore, role: start.Role = "model"
) -> dict[str, Any]:
    """The transformers config of proxies and small runs, of the reference, or of the final
    model."""
    name = session.config.main.model if role == "main" else None
    if start.folder(session.config, role) is not None:
        key, shape = f"start.{role}", start.shape(session, store, role)
    else:
        key = "model" if name is None else "main.model"
        options = session.config.model
        if name is not None:
            options = ModelOptions(**configs.preset(name, key))
        length = session.config.training.sequence_length
        shape = configs.resolve(options, store.vocabulary_size, store.end_of_document, length, key)
    _require_same_tokenizer(json.dumps(shape), store, key)
    return shape


@lru_cache(4)
def _require_same_tokenizer(shape: str, store: TokenStore, key: str) -> None:
    """The check of `folders`, once for a command: a model's shape is asked for many times."""
    folders.require_same_tokenizer(json.loads(shape), store.tokenizer(), store.end_of_document, key)

"""Small runs on many mixtures: in this process one after another, as local processes, or as Slurm
jobs.

They are the ordinary runs of a reference, content-addressed in the store: whoever needs one of them
finds it there.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from doremi_train.config import fingerprint
from doremi_train.console import Bar, Part
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.stages.runs import language_model, reference, submit
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run, recipe_of, steps_of


def recipe(session: Session, store: TokenStore, mixed: Tensor, seed: int | None = None) -> Run:
    """The run on the mixture `mixed` (K,), wherever and whenever it is trained; `seed`: another
    than the command's."""
    ingredients = reference.ingredients(session, store, mixed)
    return language_model.recipe(session, store, *ingredients, seed=seed)


def tokens(session: Session) -> int:
    """Tokens of one run."""
    training = session.config.training
    return training.steps * training.batch_size * training.sequence_length


def train(
    session: Session,
    store: TokenStore,
    mixtures: Mapping[str, Tensor],
    whole: Bar,
    seed: int | None = None,
) -> dict[str, Run]:
    """A run on each mixture (K,), linked by its name under run_dir; `whole` counts the tokens of
    all of them. `seed`: another than the command's."""
    if session.config.submit.cluster != "none":
        _submit(session, store, mixtures, whole, seed)
    runs = {}
    for name, mixed in mixtures.items():
        part, ingredients = Part(whole, name), reference.ingredients(session, store, mixed)
        runs[name] = language_model.train(session, store, name, *ingredients, bar=part, seed=seed)
        part.update(tokens(session))
    return runs


def _submit(
    session: Session,
    store: TokenStore,
    mixtures: Mapping[str, Tensor],
    whole: Bar,
    seed: int | None,
) -> None:
    """The runs that are not finished as jobs side by side: each the reference stage on a given
    mixture."""
    runs = {name: recipe(session, store, mixed, seed) for name, mixed in mixtures.items()}
    # Of equal runs one.
    waiting = {run.folder: name for name, run in runs.items() if not run.finished}
    children = {}
    for name in waiting.values():
        mixed = store.named(mixtures[name])
        given = {"reference.mixture": "file", "mixture.method": "file", "mixture.weights": mixed}
        more = {} if seed is None else {"seed": seed}
        children[name] = submit.configured(
            session, session.run_dir / "jobs" / name, stage="reference", **given, **more
        )
    before, step = whole.done, tokens(session) // session.config.training.steps

    def watch() -> None:
        done = sum(steps_of(folder) * step for folder in waiting)
        if done:
            whole.update(before + done, f"{len(waiting)} jobs")

    submit.submit(session, children, watch)
    whole.update(before)  # those that are finished now are counted with the others


def finished_like(session: Session, run: Run) -> list[dict[str, float]]:
    """The mixtures of the finished runs in the store that differ from `run` in their mixture
    only."""

    def rest(recipe: Mapping[str, Any]) -> str:
        return fingerprint({**recipe, "mixture": None})

    folders = sorted(session.store.glob("runs/language_model-*"))
    recipes = [recipe_of(folder) for folder in folders if (folder / "result.json").exists()]
    return [recipe["mixture"] for recipe in recipes if rest(recipe) == rest(run.recipe)]

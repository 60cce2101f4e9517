"""Scores as metrics of runs, which the user evaluates: those of models that have none are asked
for."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from doremi_train import files
from doremi_train.config import UserError, listed
from doremi_train.evaluation import scores
from doremi_train.stages.session import Session

LIST = "unscored.txt"  # in run_dir: model folders, a line each


def known(
    session: Session, names: list[str], models: Mapping[str, Path]
) -> dict[str, dict[str, float]]:
    """{name: {metric: score}} of model folders by name, on what they have of these metrics."""
    asked, found = session.config.objective.scores or (), dict[str, dict[str, float]]()
    given = [(_places(session, model), of) for model, of in scores.read(asked, _KEY).items()]
    for name, model in models.items():
        whole: dict[str, float] = {}
        for places, values in given:
            # By its address the run is known on any machine.
            if {str(model.resolve()), model.resolve().parent.name} & places:
                whole |= values
        found[name] = {metric: whole[metric] for metric in names if metric in whole}
    return found


def of_models(
    session: Session, names: list[str], models: Mapping[str, Path]
) -> dict[str, dict[str, float]]:
    """The same, of all of these metrics. Raises UserError where some are missing, and writes which
    models are to be evaluated. For the first process."""
    asked, path = session.config.objective.scores or (), session.run_dir / LIST
    path.unlink(missing_ok=True)
    found = known(session, names, models)
    missing = {
        str(models[name].resolve()): None for name, of in found.items() if len(of) < len(names)
    }
    if not missing:
        return found
    files.write_bytes(path, "".join(f"{model}\n" for model in missing).encode())
    there = {metric for values in scores.read(asked, _KEY).values() for metric in values}
    raise UserError(
        f"{_KEY}={list(asked)}: {len(missing)} models have no {listed(names)} yet (there are: "
        f"{listed(there)}); evaluate those whose folders are the lines of {path}, as in "
        f"lm_eval --model hf --model_args pretrained=FOLDER --tasks … --output_path {asked[0]}, "
        "and give the same command again, which goes on from there"
    )


_KEY = "objective.scores"


def _places(session: Session, model: str) -> set[str]:
    """What a model is known by: its path, and every folder in it, links followed."""
    paths = {Path(model)}
    with contextlib.suppress(OSError, ValueError):  # of a name that can be no path
        paths |= {Path(model).resolve(), (session.run_dir / model).resolve()}
    return {part for path in paths for part in (*path.parts, str(path))}

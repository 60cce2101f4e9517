"""What the final models and those kept on the way can do: tasks of lm-evaluation-harness, on local files.

The cloze task is made from the data's own validation text: passages of which the last word is to be guessed.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from doremi_train import files
from doremi_train.config import UserError, fingerprint
from doremi_train.console import Bar
from doremi_train.evaluation import downstream
from doremi_train.parallel import comm
from doremi_train.stages import Session, prepare
from doremi_train.storage.runs import Run, stop

_SHOTS = 8  # passages kept apart, from which the one shot is taken
_ANSWER = 16  # tokens of room for it


def run(session: Session, trained: Mapping[str, Run]) -> None:
    """downstream.json: {model: {task: [{step, accuracy, standard_error, examples}, …]}}; nothing where no task is asked
    for."""
    if session.config.downstream.tasks:
        comm.on_first(lambda: _run(session, trained))


def _run(session: Session, trained: Mapping[str, Run]) -> None:
    asked, folder = session.config.downstream, session.run_dir / "downstream"
    described = {}
    for name in asked.tasks:
        place = _cloze(session, folder / "cloze") if name == "cloze" else Path((asked.files or {})[name])
        downstream.define(name, place, folder / "tasks" / f"{name}.yaml")
        described[name] = [fingerprint((place / f"{part}.jsonl").read_text()) for part in ("test", "train")]
    runs = {one.folder: one for one in trained.values()}
    with Bar("downstream", len(runs), unit="model") as bar:
        for done, one in enumerate(runs.values()):
            _measure(session, one, described, folder / "tasks")
            bar.update(done + 1)
    content = {name: _state(session, one, described).result() for name, one in trained.items()}
    files.write_json(session.run_dir / "downstream.json", content)


def _state(session: Session, one: Run, described: Mapping[str, Any]) -> Run:
    limit = session.config.downstream.examples
    recipe = {"model": one.folder.name, "tasks": described, "examples": limit, "steps": sorted(_models(one))}
    return Run(session.store, "downstream", recipe)


def _models(one: Run) -> dict[int, Path]:
    """Of a run: those kept on the way and the final one, by step."""
    kept = {int(path.name.removeprefix("step-")): path for path in one.folder.glob("snapshots/step-*")}
    return kept | {int(one.result()["steps"]): one.folder / "model"}


def _measure(session: Session, one: Run, described: Mapping[str, Any], definitions: Path) -> None:
    state = _state(session, one, described)
    if state.finished:
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in described}
    for step, model in sorted(_models(one).items()):
        stop.check("downstream")
        limit, device = session.config.downstream.examples, session.place.device
        for name, accuracy in downstream.measure(model, definitions, list(described), device, limit).items():
            line = {"step": step, "accuracy": accuracy.value, "standard_error": accuracy.error}
            found[name].append(line | {"examples": accuracy.examples})
    state.begin()
    state.finish(found)


def _cloze(session: Session, folder: Path) -> Path:
    """The files of the cloze task: passages of validation text, as many of every domain as there are, in turn."""
    store, wanted = prepare.run(session), session.config.downstream.examples + _SHOTS
    length = (session.config.training.sequence_length - _ANSWER) // 2  # so that shot and question fit the model
    if length < downstream.LEAST_PASSAGES:
        raise UserError(
            f"downstream.tasks: cloze needs sequences of {2 * downstream.LEAST_PASSAGES + _ANSWER} tokens at least, not "
            f"training.sequence_length={session.config.training.sequence_length}"
        )
    passages = [downstream.passages(store, k, length) for k in range(len(store.domains))]
    found: list[str] = []
    for together in itertools.zip_longest(*passages):  # of every domain the first, then of every domain the second, …
        found += [passage for passage in together if passage is not None]
        if len(found) >= wanted:
            break
    if len(found) <= _SHOTS:
        raise UserError(f"downstream.tasks: the validation text has {len(found)} passages for cloze; give more")
    for part, texts in (("train", found[:_SHOTS]), ("test", found[_SHOTS:wanted])):
        lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)
        files.write_bytes(folder / f"{part}.jsonl", lines)
    return folder

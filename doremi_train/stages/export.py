"""The mixture in the form that the trainer of the final run reads, with a side file that says where
it comes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.exports import convert, formats
from doremi_train.exports.form import Format
from doremi_train.mixture import Mixture
from doremi_train.parallel import comm
from doremi_train.redaction import redact
from doremi_train.stages import fit, mixtures, prepare
from doremi_train.stages.mixtures import given
from doremi_train.stages.runs import budget
from doremi_train.stages.session import Session
from doremi_train.storage.urls import reaching


def run(session: Session) -> Path:
    """Write the file and `FILE.provenance.json`.

    Raises UserError where export.paths lacks a domain, has one that is not in the data, or holds a
    password.
    """
    options = session.config.export
    to, paths = str(options.to), options.paths or {}
    form = formats.FORMATS[to]
    store = prepare.run(session) if session.config.fit.runs is None else None
    domains = list(store.domains if store is not None else fit.require(session).weights)
    unknown = [name for name in paths if name not in domains]
    if unknown:
        raise UserError(
            f"export.paths: unknown domain {unknown[0]!r}; the data has {', '.join(domains)}"
        )
    for name, place in paths.items():
        if redact(place) != place:
            raise UserError(
                f"export.paths.{name}={place}: holds a password; leave it out, and give it to the "
                "trainer"
            )
    means = given.tokens_per_document(session, store, to)
    chosen = mixtures.run(session) if store is not None else fit.require(session)
    drawn = convert.shares(chosen.weights, means, form.zeros)
    batch_size = session.config.training.batch_size
    schedule = [
        (step, convert.shares(mixed, means, form.zeros))
        for step, mixed in _stages(session, form, chosen, batch_size)
    ]
    text = convert.write(to, drawn, paths, chosen.epochs, schedule, batch_size)
    path = Path(options.path or session.run_dir / "export" / f"mixture_{to}.{form.ending}")
    left_out = [name for name in domains if name not in drawn]
    beside = {
        "to": to,
        "draws": "documents" if means else "sequences",
        "tokens_per_document": means,
        "weights": chosen.weights,
        "left_out": left_out,
        "epochs": chosen.epochs,
        "provenance": chosen.provenance,
    }
    comm.on_first(lambda: _write(path, text, beside))
    unit = "documents, so weights are divided by mean tokens per document" if means else "sequences"
    session.say(f"export: {path}, for a trainer that draws {unit}")
    if schedule and form.write_stages:
        session.say(
            f"export: {len(schedule)} stages, for a run of {budget.main_steps(session)} steps of "
            f"{batch_size} sequences"
        )
    elif schedule:
        session.say(f"export: the mean of the schedule; {to} knows one mixture for the whole run")
    if left_out:
        session.say(f"export: left out, as their weight is zero: {', '.join(left_out)}")
    for told in form.tells(_mixtures(form, drawn, schedule)) if form.tells else []:
        session.say(f"export: {form.trainer}: {told}")
    return path


def _stages(session: Session, form: Format, chosen: Mixture, batch_size: int) -> convert.Schedule:
    """The mixture's schedule, changed where the trainer can change only."""
    schedule = chosen.schedule or []
    if not schedule or not form.every:
        return schedule
    weights = [weight for _, mixed in schedule for weight in mixed.values()]
    every = form.every(weights, batch_size)
    return convert.held(schedule, budget.main_steps(session), every)


def _mixtures(
    form: Format, drawn: Mapping[str, float], schedule: convert.Schedule
) -> list[Mapping[str, float]]:
    """What the trainer is given, one after another."""
    return [mixed for _, mixed in schedule] if schedule and form.write_stages else [drawn]


def _write(path: Path, text: str, beside: Mapping[str, Any]) -> None:
    with reaching(str(path), "export.path"):
        files.write_bytes(path, text.encode())
    files.write_json(path.with_name(f"{path.name}.provenance.json"), beside)

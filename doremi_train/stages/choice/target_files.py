"""The files that a choice serves: targets and benchmarks, read as the data is read."""

from dataclasses import replace

from doremi_train.config import UserError
from doremi_train.data import options as data_options
from doremi_train.data.corpus.opening import Source
from doremi_train.data.corpus.sources import resolve_one
from doremi_train.data.options import DataOptions
from doremi_train.stages.session import Session
from doremi_train.storage import runs

_LONGEST = 255  # bytes of a name that a file system takes


def trained(session: Session) -> str:
    """Name of the target whose selection is trained on."""
    options = session.config.selection
    known = list(options.targets or {})
    if options.train is None and len(known) == 1:
        return known[0]
    if options.train not in known:
        raise UserError(
            f"selection.train={options.train}: which target's choice to train on; one of "
            f"{', '.join(known)}"
        )
    return options.train


def targets(session: Session) -> dict[str, list[Source]]:
    """The files of every target."""
    given = session.config.selection.targets
    if not given:
        raise UserError(
            "selection.targets: missing; give files of the text to serve: "
            "'selection.targets={NAME: [FILES]}'"
        )
    for name in given:
        if not name or "/" in name or name.startswith(".") or len(name.encode()) > _LONGEST:
            raise UserError(f"selection.targets.{name}: not a name; take letters and digits")
        if name in runs.OWN:
            raise UserError(
                f"selection.targets.{name}: a choice has a file of its own of this name; take "
                "another one"
            )
    return {
        name: files_of(session, patterns, f"selection.targets.{name}")
        for name, patterns in given.items()
    }


def files_of(session: Session, patterns: tuple[str, ...], key: str) -> list[Source]:
    if not patterns:
        return []
    return resolve_one(text_options(session, patterns), key)


def text_options(session: Session, patterns: tuple[str, ...] = ()) -> DataOptions:
    """Options that read targets and benchmarks as the data is read."""
    return replace(
        session.config.data, embedded=None, root=None, files=None, domain_key=None, selection=None,
        domains={"text": data_options.Split(patterns)},
    )  # fmt: skip

"""The choice of documents or of examples that a run trains on, by whichever method was asked
for."""

from pathlib import Path

from doremi_train.config import UserError
from doremi_train.stages.choice import documents, less
from doremi_train.stages.session import Session, once


@once
def run(session: Session) -> Path:
    """The folder of the choices, one for every target.

    Raises UserError for everything wrong with targets, budgets and sources.
    """
    if session.config.selection.method == "none":
        raise UserError(
            "selection=none: nothing to select; give selection=ngram "
            "'selection.targets={NAME: [FILES]}'"
        )
    return (
        less.run(session) if session.config.selection.method == "less" else documents.run(session)
    )


def show(session: Session, folder: Path) -> None:
    """A page and a summary of a choice."""
    (less if session.config.selection.method == "less" else documents).show(session, folder)

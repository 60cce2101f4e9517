"""Choose the documents or examples that serve a target, and show the choice; stages that train use
it as it is."""

from pathlib import Path

from doremi_train.stages import choice
from doremi_train.stages.session import Session


def run(session: Session) -> Path:
    """The folder of the choices, one for every target."""
    folder = choice.run(session)
    choice.show(session, folder)
    return folder

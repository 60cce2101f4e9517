"""Whether the store still is what was put into it: every finished run and every token store, read
in full. Other commands look at a sample of what they use.

A damaged run is finished no more, and is computed again by the command that needs it.
"""

import os
from pathlib import Path

from doremi_train.config import UserError
from doremi_train.data.tokens import verify
from doremi_train.parallel import comm
from doremi_train.stages.session import Session
from doremi_train.storage import runs
from doremi_train.storage.runs import Unusable, stop


def run(session: Session) -> None:
    """Read all of it. Raises Unusable where anything is damaged, and UserError where there
    is no store."""
    comm.on_first(lambda: _run(session))


def _run(session: Session) -> None:
    if not session.store.is_dir():
        raise UserError(
            f"store={session.store}: is no folder; give the store, or the run_dir that it is in"
        )
    finished = sorted(path.parent for path in session.store.glob("runs/*/result.json"))
    prepared = sorted(path.parent for path in session.store.glob("data/*/manifest.json"))
    broken = [folder for folder in finished if _rejected(folder)]
    for folder in prepared:
        stop.check("verify")
        wrong = verify.damaged(folder)
        for text in wrong:
            session.say(f"verify: {text}")
        if wrong:
            broken.append(folder)
            session.say(f"verify: delete {folder}, and the same command prepares it again")
    what = f"{len(finished)} runs and {len(prepared)} token stores of {session.store}"
    if broken:
        raise Unusable(
            f"{len(broken)} of {what} are not as they were written: "
            + ", ".join(folder.name for folder in broken)
        )
    session.say(f"verify: {what} are as they were written")


def _rejected(folder: Path) -> bool:
    stop.check("verify")
    if runs.damaged(folder, full=True) is None:
        return False
    with runs.lock(folder, f"stage=verify, process {os.getpid()}"):
        damage = runs.damaged(folder, full=True)  # or somebody computed it again meanwhile
        if damage is not None:
            runs.reject(folder, damage)
    return damage is not None

"""Child runs side by side, each the command itself on a configuration of its own: processes here,
or a Slurm array.

What a child computes is found by its content address afterwards, so a child that was done before is
not sent again, and the parent needs nothing from a child but that it ended well.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.parallel import comm
from doremi_train.stages.runs import jobs
from doremi_train.stages.session import Session
from doremi_train.storage import runs
from doremi_train.storage.runs import Preempted

SECONDS_BETWEEN_LOOKS = 10.0  # into Slurm's queue


def submit(
    session: Session,
    children: Mapping[str, Mapping[str, Any]],
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Run composed configurations, named for messages, `submit.parallel` at a time; return when all
    ended well. `watch` is called now and then meanwhile.

    Raises Preempted when told to stop, after the children saved, and the error of the first child
    that failed, after the others saved. Called on every rank; rank 0 submits.
    """
    comm.on_first(lambda: _submit(session, children, watch))


def configured(session: Session, folder: Path, **changes: Any) -> dict[str, Any]:
    """This session's configuration for a child with a run_dir of its own; a change is a key such as
    "proxy.seeds"."""
    places = {
        "run_dir": str(folder),
        "store": str(session.store.resolve()),
        "submit.cluster": "none",
    }
    places |= session.tracking.of_part(folder.relative_to(session.run_dir).as_posix())
    plain = {
        name: dict(part) if isinstance(part, Mapping) else part
        for name, part in session.plain.items()
    }
    for key, value in (places | changes).items():
        group, _, name = key.rpartition(".")
        (plain[group] if group else plain)[name] = value
    return plain


def _submit(
    session: Session, children: Mapping[str, Mapping[str, Any]], watch: Callable[[], None]
) -> None:
    options = session.config.submit
    waiting, running = dict(children), dict[str, tuple[Any, int]]()  # running: a job, and its slot
    slots = list(range(options.parallel))
    failure: Exception | None = None
    looked = told = 0.0
    left = set[str]()  # whose process an earlier command left behind
    if options.cluster == "slurm" and waiting:
        for name, job in jobs.array_of(session, waiting).items():
            running[name] = job, 0
            session.say(f"{name:<22} is job {job.job_id} (slurm)")
        waiting = {}
    while running or (waiting and not failure):
        while waiting and slots and not failure:
            name = next(iter(waiting))
            if files.in_use(Path(waiting[name]["run_dir"])):
                if name not in left:
                    left.add(name)
                    session.say(f"{name:<22} is at work for an earlier command; waiting for it")
                break
            running[name] = jobs.start(session, waiting.pop(name), slots[-1]), slots.pop()
            session.say(f"{name:<22} is job {running[name][0].job_id} (local)")
        look = time.monotonic() > looked + SECONDS_BETWEEN_LOOKS
        looked = time.monotonic() if look else looked
        for name, (job, slot) in list(running.items()):
            if jobs.ended(job, look):
                failure = failure or jobs.failure_of(name, job)
                slots.append(slot)
                del running[name]
        if runs.stop.requested:
            failure = failure or Preempted(
                "told to stop; the jobs saved, and the same command continues them"
            )
        # Again and again: a child that is just starting does not listen.
        if failure and time.monotonic() > told + 2:
            told = time.monotonic()
            for job, _ in running.values():
                jobs.tell_to_stop(job)
        watch()
        time.sleep(0.2)
    if failure:
        raise failure

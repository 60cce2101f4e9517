"""One child run as a process here or as a job of Slurm: started, watched, stopped, and what became
of it."""

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from doremi_train.config import UserError
from doremi_train.parallel import slurm
from doremi_train.redaction import unveil, veil
from doremi_train.stages.options import Submit
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Preempted, stop
from doremi_train.training.task import TrainingFailed

_MINUTES_OF_A_YEAR = 525_600
_LINES_OF_A_LOG = 15


class Again(Protocol):
    """What submitit calls, and calls again after a time limit; it returns an exit code and a
    message."""

    def __call__(self) -> tuple[int, str]: ...

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        slurm.outlive_requeue()
        return DelayedSubmission(self)


@dataclass(frozen=True)
class Child(Again):
    """A composed configuration, and what runs it."""

    run: Callable[[dict[str, Any]], tuple[int, str]]
    plain: Mapping[str, Any]  # veiled, for it is kept in a file
    parent: int | None = None  # number of the process here with which this one ends

    def __call__(self) -> tuple[int, str]:
        if self.parent is not None:
            threading.Thread(target=_end_with, args=(self.parent,), daemon=True).start()
        return self.run(unveil(dict(self.plain)))


def _end_with(parent: int) -> None:
    """Save and stop when another process has ended, however it did. Where the system cannot tell
    (it is no Linux), this one goes on, and is waited for by the next command."""
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        stop.requested = True
    except (OSError, AttributeError):
        return
    else:
        select.select([watched], [], [])
        stop.requested = True


def start(session: Session, plain: Mapping[str, Any], slot: int) -> Any:
    """One child as a process here."""
    import submitit

    options = session.config.submit
    folder = Path(plain["run_dir"])
    logs = folder.with_name(f"{folder.name}.log")
    for old in logs.glob("*_result.pkl"):  # a process number comes again
        old.unlink()
    gpus = range(options.gpus_per_node * slot, options.gpus_per_node * (slot + 1))
    with clean_environment():
        executor = submitit.LocalExecutor(logs)
        executor.update_parameters(
            timeout_min=_MINUTES_OF_A_YEAR,
            tasks_per_node=options.tasks_per_node,
            gpus_per_node=len(gpus),
            visible_gpus=gpus,
        )
        return executor.submit(Child(session.child, veil(plain), os.getpid()))


def array_of(session: Session, children: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All children as one array of Slurm, `submit.parallel` of them at once."""
    options = session.config.submit
    logs = Path(next(iter(children.values()))["run_dir"]).with_name("array.log")
    with clean_environment(), slurm_refusals():
        executor = slurm_executor(
            options, logs, options.nodes, options.tasks_per_node, options.gpus_per_node
        )
        executor.update_parameters(array_parallelism=options.parallel)
        with executor.batch():
            return {
                name: executor.submit(Child(session.child, veil(plain)))
                for name, plain in children.items()
            }


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """A child is no rank of its parent, and no step of its job."""
    import submitit

    keep = {name: os.environ[name] for name in os.environ if name == "SLURM_CONF"}
    agent = [name for name in os.environ if name.startswith("TORCHELASTIC_")]
    with submitit.helpers.clean_env(extra_names=agent):
        os.environ.update(keep)
        yield


def slurm_executor(options: Submit, logs: Path, nodes: int, tasks: int, gpus: int) -> Any:
    """An executor of jobs of so many nodes, tasks and GPUs of each."""
    import submitit

    executor = submitit.SlurmExecutor(logs, max_num_timeout=1000)
    given = {
        "gpus_per_node": gpus,
        "cpus_per_task": options.cpus_per_task,
        "partition": options.partition,
    }
    executor.update_parameters(
        job_name="doremi-train",
        time=options.timeout_minutes,
        nodes=nodes,
        ntasks_per_node=tasks,
        signal_delay_s=min(120, options.timeout_minutes * 30),
        additional_parameters=dict(options.extra or {}),
        **{name: value for name, value in given.items() if value},
    )
    return executor


@contextlib.contextmanager
def slurm_refusals() -> Iterator[None]:
    """Raises UserError where there is no Slurm, or it takes no job."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"submit: Slurm took no job: {error}; sbatch must be here, and allow submit.partition, "
            ".extra and the like"
        ) from None


def ended(job: Any, look: bool) -> bool:
    """Whether a job ended, with a result or not; `look`: also in the queue, since not every Slurm
    keeps accounts."""
    if hasattr(job, "_process"):
        return job._process.poll() is not None
    if all(job.task(number).paths.result_pickle.exists() for number in range(job.num_tasks)):
        return True
    if not look:
        return False
    shown = subprocess.run(
        ["squeue", "-h", "-j", job.job_id, "-o", "%T"], capture_output=True, text=True, check=False
    )
    if shown.returncode:  # any other error: the controller is away for a while
        return "Invalid job id" in shown.stderr
    return not shown.stdout.strip()


def failure_of(name: str, job: Any) -> Exception | None:
    """What went wrong in a job that ended, named by the child, or nothing."""
    from submitit.core.utils import UncompletedJobError

    first = job.task(0)
    if not has_result(job):
        return TrainingFailed(
            f"{name}: job {job.job_id} ended without a result, as when it is killed{_log(first)}"
        )
    try:
        code, message = first.result()
    except UncompletedJobError:
        return TrainingFailed(f"{name}: job {job.job_id} failed{_log(first)}")
    kinds = {0: None, Preempted.exit_code: Preempted, UserError.exit_code: UserError}
    kind = kinds.get(code, TrainingFailed)
    return (
        kind(f"{name}: {message}{_log(first) if kind is TrainingFailed else ''}") if kind else None
    )


def has_result(job: Any) -> bool:
    """Whether a job that ended left a result; a file of another machine may be seen a while
    later."""
    for _ in range(50):
        if job.task(0).paths.result_pickle.exists():
            return True
        time.sleep(0.2)
    return False


def _log(task: Any) -> str:
    """The end of a task's log, and where it is."""
    for path in (task.paths.stderr, task.paths.stdout):
        text = path.read_text(errors="replace").strip() if path.exists() else ""
        if text:
            return f"; {path} ends with\n" + "\n".join(text.splitlines()[-_LINES_OF_A_LOG:])
    return f"; it left no log ({task.paths.stderr})"


def tell_to_stop(job: Any) -> None:
    """Tell a job to save and stop; one that has not started is taken out of the queue."""
    if hasattr(job, "_process"):
        job._process.send_signal(signal.SIGTERM)  # which hands it to its tasks
        return
    for how in ("--state=PENDING", "--signal=TERM"):
        subprocess.run(["scancel", "--quiet", how, job.job_id], capture_output=True, check=False)

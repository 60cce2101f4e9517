"""One job of the command: a composed configuration becomes a session, a stage does the work,
signals are heard."""

import contextlib
import errno
import functools
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

from omegaconf import OmegaConf

from doremi_train.config import UserError, fingerprint, load, read_mappings
from doremi_train.files import FULL
from doremi_train.redaction import redact
from doremi_train.stages import STAGES
from doremi_train.storage import waiting

# Where and which, not what: no part of a sweep's folder names.
_PLACES = (
    "run_dir",
    "store",
    "stage",
)


def sweep_name(overrides: list[str]) -> str:
    """The folder of one job of a sweep, such as seed=0,proxy.step_size=0.1; of a path its last
    part."""
    parts = (override.split("=", 1) for override in overrides)
    named = [
        f"{key}={redact(value).rstrip('/').rpartition('/')[2]}"
        for key, value in parts
        if key not in _PLACES
    ]
    name = quote(",".join(named), safe="=,.+[]{}:") or "default"
    if len(name) > 200:  # file systems end at 255
        # The last overrides, where a sweep usually stands, and a hash of all.
        name = f"{name[-150:].partition(',')[2]},{fingerprint(named)}".lstrip(",")
    return name


# Here, so that a sweep's job in another process has it too.
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
# Our defaults of the submitit launchers are checked against the plugin's own keys, as they should
# be.
warnings.filterwarnings("ignore", message="(?s).*is validated against ConfigStore schema")


def task(composed: Any) -> None:
    """One job: what Hydra calls, once, or once for each job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    job = HydraConfig.get()
    # Each job of a sweep has its own folder, and all share one store.
    try:
        if job.mode == RunMode.MULTIRUN:
            _place(plain, job)
        run(plain)
    except Exception as error:
        error.begun = True  # type: ignore[attr-defined]  # it is not Hydra's
        # A job in another process hands its failure to the sweep's own command, which waits for all
        # jobs and shows it.
        if "SUBMITIT_EXECUTOR" in os.environ or not hasattr(error, "exit_code"):
            raise
        die(str(error), error.exit_code, alone=getattr(error, "alone", False))


def _place(plain: dict[str, Any], job: Any) -> None:
    """Give a job of a sweep its folder, and the place that it shares with the others."""
    # What was taken out, or is of another kind, is refused when the configuration is checked.
    with contextlib.suppress(KeyError, TypeError):
        plain["store"] = plain["store"] or str(Path(plain["run_dir"]) / "store")
        shown = plain["tracking"]
        shown["path"] = shown["path"] or plain["run_dir"]
        shown["name"] = "/".join(filter(None, [shown["name"], job.sweep.subdir]))
        plain["run_dir"] = str(Path(job.sweep.dir) / job.sweep.subdir)


def child(plain: dict[str, Any]) -> tuple[int, str]:
    """A child run (`Session.child`) in a process of its own: its exit code and message."""
    try:
        run(plain)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        say(str(error))
        return error.exit_code, str(error)
    return 0, ""


def checked(plain: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The configuration with the content of the files that stand for mappings, and its options.
    Raises UserError for all that can be seen to be wrong before anything runs."""
    from doremi_train.stages import mixtures
    from doremi_train.stages.options import Config, check_files

    plain = read_mappings(plain)
    config = load(Config, plain)
    begun = config.start.first
    if begun is not None and config.data.tokenizer == "train":
        if not Path(begun[1]).is_dir():
            raise UserError(f"start.{begun[0]}={begun[1]}: no such folder; give that of a model")
        plain["data"]["tokenizer"] = begun[1]  # a model reads the tokens of its own
        config = load(Config, plain)
    mixtures.check(config)
    check_files(config)
    return plain, config


def run(plain: dict[str, Any]) -> None:
    name = plain.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        raise UserError(f"stage={name}: unknown; allowed: {', '.join(STAGES)}")
    stage = STAGES[name]
    if name in _ENDING_WITH_THE_REPORT and _said_again(name, plain):
        return
    # DeepSpeed is imported by accelerate whether it is used or not, and on a CPU it complains that
    # it is one.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    from doremi_train.parallel import comm
    from doremi_train.stages.session import open_session
    from doremi_train.storage import runs

    requeue = _listen(runs.stop)
    try:
        plain, config = checked(plain)
        with open_session(config, plain, child) as session, contextlib.ExitStack() as stack:
            if stage.several:
                stack.enter_context(session.alone(name))
            importlib.import_module(f"doremi_train.stages.{stage.module}").run(session)
    except runs.Preempted:
        requeue()
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise _unusable(error, plain) from error
        raise runs.DiskFull(
            f"{error}: no room left; free some, and the same command continues from the last "
            "checkpoint"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if runs.out_of_memory(error):
            raise runs.OutOfMemory(error) from error
        raise comm.explain(error) from None
    finally:
        comm.leave()


# A place that nothing can be written to, or where a file stands in a folder's place, or a folder in
# a file's.
_NO_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOTEMPTY,
)  # fmt: skip


def _unusable(error: OSError, plain: dict[str, Any]) -> Exception:
    """What to say of a file or folder that cannot be used: a mistake in the key that leads to it,
    where one does."""
    from doremi_train.storage import runs

    said = f"{type(error).__name__}: {error}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return runs.Unusable(
            f"{said}; raise the number of files that a process may have open (ulimit -n), and the "
            "same command continues"
        )
    if error.errno in _NO_PLACE and error.filename:
        at = os.path.realpath(str(error.filename2 or error.filename))
        for key in ("store", "run_dir"):
            given = plain.get(key)
            if isinstance(given, str) and Path(at).is_relative_to(os.path.realpath(given)):
                return UserError(
                    f"{key}={given}: {said}; give a folder that can be written, or move away "
                    "what is in the place of ours"
                )
    return runs.Unusable(f"{said}; check path and rights")


_ENDING_WITH_THE_REPORT = ("pipeline", "report")


def _said_again(stage: str, plain: dict[str, Any]) -> bool:
    """Say what the same command said when it was finished, where nothing changed since: without
    torch, in the time of a start. Returns whether that is so. Several processes go the ordinary
    way, on which they meet."""
    from doremi_train.parallel import slurm

    slurm.export_ranks()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return False
    from doremi_train import console
    from doremi_train.storage import finished, runs

    try:
        lines = finished.said(read_mappings(plain))
        if lines is None:
            return False
        folder = Path(plain["run_dir"])
        with runs.lock(folder / stage, str(folder.resolve())):
            runs.set_status(folder / stage, "finished")
    except OSError:  # which the ordinary way names
        return False
    console.say(f"{stage:<22} finished before; nothing of it changed since", *lines)
    return True


def _listen(stop: Any) -> Callable[[], None]:
    """SIGTERM, SIGUSR1 and SIGINT ask every loop to save and stop; a second SIGINT ends at once.

    In a job of submitit its signal of a time limit does so too. What is returned, to be called when
    all is saved, then does what submitit would have done at once: put the job back into the queue,
    and leave.
    """
    asked: list[Callable[[], None]] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.requested:
            os._exit(130)
        stop.requested = True
        if callable(kept.get(number)):
            asked[:] = [functools.partial(kept[number], number, None)]

    kept: dict[int, Any] = {}
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit import JobEnvironment

        number = JobEnvironment._usr_sig()
        kept[number] = signal.signal(number, ask)
    for number in {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} - kept.keys():
        signal.signal(number, ask)

    def requeue() -> None:
        from doremi_train.parallel import slurm

        for handler in asked:
            slurm.outlive_requeue()
            handler()
            # Not the first task, which puts the job back: nothing is wrong with this one.
            sys.exit(0)

    return requeue


def die(message: str, code: int, alone: bool = False) -> None:
    """One message, and the exit code. The first process speaks for all that end with the same, but
    for those that are `alone`."""
    from doremi_train.parallel import slurm

    slurm.export_ranks()
    if not alone and os.environ.get("WORLD_SIZE", "1") != "1":
        from doremi_train.parallel import comm

        spoken_for, message = comm.spoken_for(message)
        alone = not spoken_for and os.environ.get("RANK", "0") != "0"
    say(message, alone)
    if waiting.left():
        os._exit(code)
    sys.exit(code)


def say(message: str, alone: bool = False) -> None:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if alone or rank == "0":
        from doremi_train import console

        first, *more = message.split("\n")  # which no line of a value may pass for
        console.say(
            f"doremi-train: {f'process {rank}: ' * alone}{first}",
            *(f"  {line}" for line in more),
            error=True,
        )

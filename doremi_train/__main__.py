"""The command: Hydra composes the configuration, a stage does the work, a mistake is one message and exit code 2."""

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

from doremi_train.config import UserError, conf_dir, fingerprint

STAGES = ("pipeline", "plan", "prepare", "reference", "proxy", "main", "evaluate", "report")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PLACES = ("run_dir", "store", "stage")  # where and which, not what: no part of a sweep's folder names


def main() -> None:
    """Entry point of `doremi-train` and `python -m doremi_train`."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us whole, and we say them in one message
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_task)()
    except (HydraException, OmegaConfBaseException) as error:
        _die(f"{error}\nsee `doremi-train --help` for the keys and groups that exist", 2)


def _sweep_name(overrides: list[str]) -> str:
    """The folder of one job of a sweep, such as seed=0,proxy.step_size=0.1; of a path its last part."""
    parts = (override.split("=", 1) for override in overrides)
    named = [f"{key}={value.rstrip('/').rpartition('/')[2]}" for key, value in parts if key not in _PLACES]
    name = quote(",".join(named), safe="=,.+[]{}:") or "default"
    if len(name) > 200:  # file systems end at 255: the last overrides, where a sweep usually stands, and a hash of all
        name = f"{name[-150:].partition(',')[2]},{fingerprint(named)}".lstrip(",")
    return name


def _task(composed: Any) -> None:
    """One job: what Hydra calls, once, or once for each job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:  # each job of a sweep has its own folder, and all share one store
        plain["store"] = plain["store"] or str(Path(plain["run_dir"]) / "store")
        plain["run_dir"] = str(Path(job.sweep.dir) / job.sweep.subdir)
    try:
        if plain["stage"] not in STAGES:
            raise UserError(f"stage={plain['stage']}: unknown; allowed: {', '.join(STAGES)}")
        _run(plain)
    except UserError as error:
        _die(str(error), 2)


def _run(plain: dict[str, Any]) -> None:
    # DeepSpeed is imported by accelerate whether it is used or not, and on a CPU it complains that it is one.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    from doremi_train import comm, runs, stages, train

    _listen(runs.stop)
    try:
        session = stages.open_session(plain)
        stage = importlib.import_module(f"doremi_train.stages.{plain['stage']}")
        # The folders of the other stages are runs, which have locks and a status of their own.
        several = plain["stage"] in ("pipeline", "plan", "evaluate", "report")
        with session.alone(plain["stage"]) if several else contextlib.nullcontext():
            stage.run(session)
    except (runs.Preempted, train.TrainingFailed) as error:
        _die(str(error), error.exit_code)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in _FULL:
            _die(f"{error}: no room left; free some, and the same command continues from the last checkpoint", 1)
        gone = comm.explain(error)
        if not isinstance(gone, comm.Lost):
            raise
        print(f"doremi-train: process {os.environ.get('RANK')}: {gone}", file=sys.stderr, flush=True)
        sys.exit(gone.exit_code)
    finally:
        comm.leave()


def _listen(stop: Any) -> None:
    """SIGTERM, SIGUSR1 and SIGINT ask every loop to save and stop; a second SIGINT ends at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.requested:
            os._exit(130)
        stop.requested = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, ask)


def _die(message: str, code: int) -> None:
    """One message, on the first process alone, and the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"doremi-train: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

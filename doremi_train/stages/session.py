"""Session of a command: its configuration, the processes, and where things stand on disk."""

import contextlib
import functools
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from doremi_train import __version__, files, trackers
from doremi_train.config import UserError, flatten
from doremi_train.console import Bar, Part, say
from doremi_train.parallel import comm, place, slurm
from doremi_train.parallel.place import start
from doremi_train.parallel.world import World
from doremi_train.redaction import redact
from doremi_train.stages.options import Config, default, identity
from doremi_train.storage import checkpoint, runs
from doremi_train.storage.mirror import Mirror
from doremi_train.storage.urls import reaching


@dataclass
class Session:
    """One command on this process: its configuration as composed and as checked, and its place
    among the processes."""

    config: Config
    plain: Mapping[str, Any]
    place: place.Place
    # Runs a configuration in another process, which imports it.
    child: Callable[[dict[str, Any]], tuple[int, str]]
    results: dict[str, Any] = field(default_factory=dict)  # of the stages done in this command
    bar: Bar | None = None  # over many commands, of which this is one
    # Of a plan for more processes than were started: their number, and what they share out.
    planned: tuple[int, str] | None = None

    @property
    def world(self) -> World:
        """The processes that runs have, or are planned for."""
        return World(size=self.planned[0]) if self.planned else comm.world()

    @property
    def strategy(self) -> str:
        """What those share out."""
        return self.planned[1] if self.planned else self.place.strategy

    @property
    def device_type(self) -> str:
        """Where those compute: cpu or cuda."""
        elsewhere = self.planned and self.config.engine.device == "auto"
        return "cuda" if elsewhere else self.place.device.type

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def store(self) -> Path:
        return Path(self.config.store) if self.config.store else self.run_dir / "store"

    @functools.cached_property
    def mirror(self) -> Mirror | None:
        """The store's second home, if there is one."""
        return Mirror(self.config.remote) if self.config.remote else None

    @functools.cached_property
    def tracking(self) -> trackers.Tracking:
        """Trackers that show this command's curves."""
        return trackers.Tracking(self.config.tracking, self.run_dir, self.plain)

    def over(self, label: str, total: int) -> Bar:
        """The progress of several runs, `total` tokens: a bar of their own, or a share of the one
        over all."""
        return (
            Part(self.bar, label)
            if self.bar is not None
            else Bar(label, total, show=comm.world().first)
        )

    def part(self, label: str) -> Bar | None:
        """A run's share of the bar over all; None where it shows its own."""
        return Part(self.bar, label) if self.bar is not None else None

    @property
    def method(self) -> str:
        """Name of the way to the mixture: a key of `stages.mixtures.WAYS`."""
        return self.config.mixture.method

    def say(self, *lines: str) -> None:
        """Print lines, on the first process."""
        if comm.world().first:
            say(*lines)

    @contextlib.contextmanager
    def computing(self, run: runs.Run, name: str, quiet: bool = False) -> Iterator[bool]:
        """Hold a run's folder, linked as `run_dir/name`, and keep its status. Gives whether there
        is work to do: a finished run is not done again, also when it was finished by somebody else
        while this process waited; which is said, unless `quiet`."""
        comm.agree(flatten(run.recipe, f"recipe of {name}: "))
        with contextlib.ExitStack() as stack:
            comm.on_first(lambda: self._enter(stack, run, name))
            if self.mirror:  # every process sends what it writes
                run.mirror = self.mirror.at("runs", run.folder.name)
            todo = comm.broadcast(not run.finished)
            if not (todo or quiet):
                self.say(f"{name:<22} is in the store already: {run.folder.name}")
            with self.reporting(run.folder) if todo else contextlib.nullcontext():
                yield todo

    @contextlib.contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """Hold the folder of a stage that is more than one run, and keep its status.

        Raises UserError, and leaves the status alone, where the same stage of this run_dir is at
        work already.
        """
        folder = self.run_dir / stage
        with contextlib.ExitStack() as stack:
            comm.on_first(
                lambda: stack.enter_context(runs.lock(folder, str(self.run_dir.resolve())))
            )
            with self.reporting(folder):
                yield

    @contextlib.contextmanager
    def reporting(self, folder: Path) -> Iterator[None]:
        """Keep the `status.json` of a folder: running, then finished, preempted or failed."""
        self._status(folder, "running")
        try:
            yield
        except BaseException as error:
            preempted = isinstance(error, runs.Preempted | KeyboardInterrupt)
            with contextlib.suppress(OSError):  # a full disk is best named by the first error
                self._status(
                    folder, "preempted" if preempted else "failed", str(comm.explain(error))
                )
            raise
        self._status(folder, "finished")

    def _status(self, folder: Path, state: str, message: str = "") -> None:
        # Never a collective: the other ranks may be elsewhere when an error passes through here.
        if comm.world().first:
            runs.set_status(folder, state, message=message)

    def _enter(self, stack: contextlib.ExitStack, run: runs.Run, name: str) -> None:
        if not run.settled:
            stack.enter_context(runs.lock(run.folder, str(self.run_dir.resolve())))
        if not run.finished:
            run.begin()  # first: what it clears away is nothing that the second home brings
        run.take_over(self.run_dir / name)
        if self.mirror:
            run.mirror = self.mirror.at("runs", run.folder.name)
            self._meet(run, run.mirror)
        if run.finished and not run.settled:
            checkpoint.remove(run.folder / checkpoint.FOLDER)
            run.settle()
        files.link(self.run_dir / name, run.folder)

    @staticmethod
    def _meet(run: runs.Run, mirror: Mirror) -> None:
        """Bring what the run's second home has and this machine lacks, and the other way round."""
        if not run.finished:
            run.fetch()
        if run.finished:
            run.publish()
        else:
            checkpoint.fetch(run.folder, mirror)


Result = TypeVar("Result")


def once(stage: Callable[[Session], Result]) -> Callable[[Session], Result]:
    """A stage that several others need is done at most once in a command."""

    @functools.wraps(stage)
    def run(session: Session) -> Result:
        name = f"{stage.__module__}.{stage.__qualname__}"
        if name not in session.results:
            session.results[name] = stage(session)
        return session.results[name]

    return run


@contextlib.contextmanager
def open_session(
    config: Config, plain: Mapping[str, Any], child: Callable[[dict[str, Any]], tuple[int, str]]
) -> Iterator[Session]:
    """Join the processes, and claim the run folder for this configuration, which was checked."""
    slurm.export_ranks()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    planned = _planned(config)
    here = replace(config.engine, strategy="auto", processes=None, deepspeed=None)
    place = start(
        here if planned else config.engine,
        config.training.precision,
        config.training.timeout,
        lambda: runs.stop.check("meeting the other processes"),
        _of_all(plain),
    )
    session = Session(config, plain, place, child, planned=planned)
    comm.on_first(session.tracking.check)
    # What is not about one run leaves no mark in a run folder.
    over = config.stage == "verify" or (config.stage == "report" and sweep(session.run_dir))
    with contextlib.nullcontext() if over else claimed(session):
        yield session


def _planned(config: Config) -> tuple[int, str] | None:
    """The processes and the strategy that a plan is for, where they are not those that were
    started."""
    engine = config.engine
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if config.stage != "plan" or not alone or (engine.processes or 1) == 1:
        return None
    return engine.processes or 1, "ddp" if engine.strategy == "auto" else engine.strategy


# What computes, beside torch.
_LIBRARIES = ("accelerate", "numpy", "tokenizers", "transformers")


def _of_all(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes of a command have in common, or are no parts of one run."""
    keys = flatten(redact(plain))
    del keys["training.threads"]  # of each machine
    own = {"doremi_train": __version__, "Python": platform.python_version()}
    libraries = {"torch": torch.__version__} | {name: metadata.version(name) for name in _LIBRARIES}
    versions = own | libraries
    return keys | {f"version of {name}": version for name, version in versions.items()}


def sweep(run_dir: Path) -> list[Path]:
    """The finished run folders in the folder of a sweep."""
    return [path.parent for path in sorted(run_dir.glob("*/evaluation.json"))]


@contextlib.contextmanager
def claimed(session: Session) -> Iterator[None]:
    """Hold the run folder for this configuration: write config.yaml, or refuse a run_dir in which
    another configuration computed something, or computes, naming the keys."""
    with contextlib.ExitStack() as stack:
        comm.on_first(lambda: _claim(session, stack))
        yield


def _claim(session: Session, stack: contextlib.ExitStack) -> None:
    path = session.run_dir / "config.yaml"
    for key in ("run_dir", "store"):
        if (given := getattr(session.config, key)) is not None:
            with reaching(given, key):
                Path(given).mkdir(parents=True, exist_ok=True)
    alone = stack.enter_context(files.at_work(session.run_dir))
    with alone() as only:
        if path.exists():
            there = _composed(path)
            old, new = identity(redact(there)), identity(redact(session.plain))
            old |= {key: default(key) for key in new.keys() - old.keys()}  # of an older version
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            if changed and (not only or _computed(session.run_dir, there["stage"])):
                lines = [
                    f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in changed
                ]
                raise UserError(
                    f"run_dir={session.run_dir}: holds a run with another configuration\n"
                    + "\n".join(lines)
                    + "\n"
                    "take another run_dir, or give the same configuration"
                )
            if changed:
                _clear(session.run_dir)
        if only:
            _clear_partial(session.run_dir, session.store.resolve())
        text = yaml.safe_dump(redact(dict(session.plain)), sort_keys=False, allow_unicode=True)
        files.write_bytes(path, text.encode())


def _composed(path: Path) -> dict[str, Any]:
    """The configuration in a run folder. Raises UserError for anything else."""
    try:
        there = yaml.safe_load(path.read_text())
        if isinstance(there, dict) and isinstance(there.get("stage"), str):
            return there
        why = "it has no stage"
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(
        f"run_dir={path.parent}: {path.name} is no configuration of a run ({why:.200}); delete it "
        "if this command is the one that the folder is of, or take another run_dir"
    )


# What is there before anything is computed, and the results beside the folders of stages.
_BEGUN = ("config.yaml", "plan.json", "recipe.json", "status.json")
_RESULTS = (
    "weights.json", "evaluation.json", "findings.json", "downstream.json", "classify.json",
    "report.html", "compare.html", "jobs",
)  # fmt: skip


def _computed(run_dir: Path, stage: str) -> bool:
    """Whether a run folder holds what was computed, beside data that was prepared, or a plan that
    was made, on the way to something else than that `stage`."""
    if (run_dir / f"{stage}.json").exists():
        return True
    if any((run_dir / name).exists() for name in _RESULTS):
        return True
    return any(path.name == stage == "prepare" or _filled(path) for path in _folders(run_dir))


def _folders(run_dir: Path) -> list[Path]:
    """The folders and links of stages; a user's own folders are none."""
    return [path for path in run_dir.iterdir() if (path / "status.json").exists()]


def _filled(folder: Path) -> bool:
    if folder.name == "prepare":
        return False
    return any(
        _filled(path) if path.is_dir() else path.name not in _BEGUN
        for path in folder.iterdir()
        if not path.name.startswith(".")
    )


def _clear_partial(run_dir: Path, store: Path) -> None:
    """Remove what was left half-written in a run folder that nobody else works in. A store in it
    has locks of its own, and a run folder in it is held by who works there."""
    for name, below, there in os.walk(run_dir):  # follows no link
        folder = Path(name)
        if folder.resolve() == store or (folder != run_dir and "config.yaml" in there):
            below.clear()
        else:
            files.clear_partial(folder, below=False)


def _clear(run_dir: Path) -> None:
    """Remove what a command that computed nothing left in a run folder."""
    (run_dir / "plan.json").unlink(missing_ok=True)
    for path in _folders(run_dir):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)

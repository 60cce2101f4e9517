"""Runs in the store: a folder named by the content of what it computes, locked while in use, never
done twice.

`<store>/runs/<kind>-<address>/` holds `recipe.json` (everything that decides the result),
`status.json`, the logs, the checkpoints and, at the end, `result.json`. Two stages, seeds or sweeps
that need the same run share it.
"""

import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.config import UserError, fingerprint
from doremi_train.console import say
from doremi_train.redaction import redact
from doremi_train.storage import seal
from doremi_train.storage.mirror import Mirror, Torn
from doremi_train.storage.seal import Seal

CHECKSUMS = "checksums.json"  # {file: seal} of a finished run
LOCK = ".lock"
# What lies in a run's folder beside what it computes, and which a user's names there may not be.
OWN = ("recipe.json", "status.json", "result.json", CHECKSUMS, "checkpoints", "report.html")


class Preempted(Exception):
    """The run was told to stop, and saved. The same command continues it."""

    exit_code = 75


class DiskFull(Exception):
    """There is no room for what has to be written. Exit code 1: with room, the same command
    continues."""

    exit_code = 1


class Unusable(Exception):
    """A file or folder that is needed cannot be read or written. Exit code 1."""

    exit_code = 1


class OutOfMemory(Exception):
    """More memory was asked for than there is. Exit code 1: the same command continues the run."""

    exit_code = 1
    alone = True  # the others may have had enough

    def __init__(self, error: BaseException) -> None:
        said = " ".join(str(error).split()) or type(error).__name__
        super().__init__(
            f"out of memory ({said:.300}); lower training.micro_batch_size, set "
            "training.activation_checkpointing=true, or take a smaller model or number where one "
            "is very large"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; torch's own on a CPU is a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


class Stop:
    """Whether this process was asked to stop. Every loop looks at it; signals set it (see
    `__main__`)."""

    requested = False

    def check(self, what: str) -> None:
        """Raise Preempted where the work can simply be done again."""
        if self.requested:
            raise Preempted(f"{what}: told to stop; the same command continues it")


stop = Stop()


class Run:
    """One content-addressed run folder, and its second home if there is one."""

    mirror: Mirror | None = None  # every process sends its part of checkpoints, the first the rest
    _held: tuple[int, int] | None = None  # the lock under which it was begun

    def __init__(self, store: Path, kind: str, recipe: Mapping[str, Any]) -> None:
        self.recipe = redact(recipe)
        self.address = fingerprint(self.recipe)
        self.folder = store / "runs" / f"{kind}-{self.address}"

    @property
    def finished(self) -> bool:
        """Whether it is done, and its files are those that were written, by a sample that is taken
        once in a process. Whoever holds its folder computes another one again (`begin`)."""
        if not (self.folder / "result.json").exists():
            return False
        if self.folder not in _sound and damaged(self.folder) is None:
            _sound.add(self.folder)
        return self.folder in _sound

    @property
    def settled(self) -> bool:
        """Whether it is finished, and what comes after its result is done too."""
        return self.finished and status(self.folder).get("state") == "finished"

    def settle(self) -> None:
        """Say that it is finished, where whoever finished it did not come to that."""
        steps = self.result().get("steps")  # of a vocabulary they are a list
        set_status(self.folder, "finished", steps if isinstance(steps, int) else None)

    def result(self) -> Any:
        return files.read_json(self.folder / "result.json")

    def begin(self) -> None:
        """Make its folder, or go on in it, for whoever holds it; a damaged result is rejected. One
        without a recipe is what somebody wrote on into a folder that was deleted, of which a part
        is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = files.identity(self.folder / LOCK)
        if (self.folder / "result.json").exists() and (damage := damaged(self.folder)):
            reject(self.folder, damage)
        if not self._begun:
            for path in self.folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name not in (LOCK, "status.json"):
                    path.unlink()
        files.write_json(self.folder / "recipe.json", self.recipe)

    @property
    def _begun(self) -> bool:
        return (self.folder / "recipe.json").exists()

    def take_over(self, copy: Path) -> None:
        """Where a folder stands in the place of the link to this run, as after `cp -rL`: take from
        it what this run lacks, and clear it away. Raises UserError where it is none of this run."""
        if copy.is_symlink() or not copy.is_dir():
            return
        recipe = copy / "recipe.json"
        if fingerprint(recipe_of(copy)) != self.address:
            raise UserError(
                f"run_dir: {copy} is a folder of something else, where a link to {self.folder} "
                "belongs; move it away"
            )
        if not self.finished and not any(self.folder.glob("checkpoints/step-*/manifest.json")):
            files.write_bytes(self.folder / "recipe.json", recipe.read_bytes())
            names = _in_order([path.name for path in copy.iterdir()], (".", "recipe.json"))
            for name in names:
                _replace(self.folder / name, copy / name)
            self.begin()  # which looks at what came
        gone = files.aside_of(copy)
        copy.rename(gone)
        shutil.rmtree(gone)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, which says that everything else is on disk by now; and before it,
        what tells whether all of it still is what was written. Raises Unusable where its folder was
        deleted meanwhile, and a part of it with it, also where another command is at work there
        by now."""
        there = files.identity(self.folder / LOCK)
        if not self._begun or self._held not in (None, there):
            raise Unusable(
                f"{self.folder}: was deleted while it was at work; the same command begins it again"
            )
        content = files.as_json(result)
        seals = seal.of(self.folder, self._kept())
        files.write_json(self.folder / CHECKSUMS, seals | {"result.json": seal.of_content(content)})
        files.write_bytes(self.folder / "result.json", content)
        _sound.add(self.folder)
        self.publish()

    def publish(self) -> None:
        """Copy a finished run to its second home, result.json last, unless it is there; its
        checkpoints there have served."""
        if self.mirror is None:
            return
        if not self.mirror.has("result.json"):
            self._push(self.mirror)
        elif self.settled:
            return
        self.mirror.remove(name for name in self.mirror.sizes() if name.startswith("checkpoints/"))

    def _kept(self) -> list[str]:
        """The run's own files."""
        paths = (
            path
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        )
        names = (path.relative_to(self.folder).as_posix() for path in paths)
        return sorted(name for name in names if not name.startswith(_NOT_KEPT))

    def _push(self, mirror: Mirror) -> None:
        mirror.clear_dead()
        if not (self.folder / CHECKSUMS).exists():  # of an older version
            files.write_json(self.folder / CHECKSUMS, seal.of(self.folder, self._kept()))
        names = _in_order(_seals((self.folder / CHECKSUMS).read_bytes()))
        mirror.push(self.folder, [CHECKSUMS, *names])

    def fetch(self) -> None:
        """Bring a finished run from its second home, result.json last, if it is there as it was
        put there. Otherwise it is finished there no more: it is computed again, and then goes
        there again."""
        if self.mirror is None or not self.mirror.has("result.json"):
            return
        try:
            self._pull(self.mirror)
        except Torn as error:
            say(f"{self.mirror.url}: torn or corrupt ({error}); the run is computed again")
            self.mirror.remove(["result.json"])

    def _pull(self, mirror: Mirror) -> None:
        """Raises Torn where a file is missing or another one than was put there."""
        sizes, listed = mirror.sizes(), mirror.read(CHECKSUMS)
        try:
            # Of an older version there is no list.
            seals = dict.fromkeys(sizes, Seal()) if listed is None else _seals(listed)
        except ValueError:
            raise Torn(f"{CHECKSUMS} cannot be read") from None
        if listed is not None:
            files.write_bytes(self.folder / CHECKSUMS, listed)
        for name in _in_order(seals):
            if name not in sizes:
                raise Torn(f"{name} is missing")
            try:
                mirror.pull(self.folder, name, sha256=seals[name].get("sha256"))
            except Torn as error:
                raise Torn(f"{name} {error}") from None


# What is not among the files of a finished run: what belongs to this machine, and what lists them.
_NOT_KEPT = ("checkpoints/", "status.json", CHECKSUMS)
_sound = set[Path]()  # folders of finished runs that this process looked at, or made


def damaged(folder: Path, full: bool = False) -> str | None:
    """The first file of a finished run that is not as it was written, by a sample or in `full`;
    None where all are, or nothing is known, as of an older version's."""
    try:
        seals = _seals((folder / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return f"{CHECKSUMS} cannot be read"
    return seal.broken(folder, seals, full)


def reject(folder: Path, damage: str) -> None:
    """Say what is wrong with a finished run, which is finished no more: whoever needs it computes
    it again. It is for whoever holds the folder's lock: another may have computed it by now."""
    say(f"{folder}: {damage}; it is computed again when it is needed")
    (folder / "result.json").unlink(missing_ok=True)


def _seals(content: bytes) -> dict[str, Seal]:
    """Raises ValueError for anything else than names with their seals."""
    listed = files.as_object(content)
    seals = {}
    for name, entry in listed.items():
        seals[name] = Seal(sha256=entry) if isinstance(entry, str) else entry
        if not isinstance(seals[name], dict):
            raise ValueError(f"{name}: {type(entry).__name__} where an object is expected")
    return seals


def _replace(path: Path, by: Path) -> None:
    """Move `by`, a file or a folder, to the place of what is at `path`."""
    if path.is_dir():
        shutil.rmtree(path)
    shutil.move(by, path)


def _in_order(seals: Iterable[str], without: tuple[str, ...] = _NOT_KEPT) -> list[str]:
    """The names of a run's files, result.json last."""
    names = [name for name in seals if not name.startswith(without)]
    return sorted(names, key=lambda name: (name == "result.json", name))


def set_status(folder: Path, state: str, step: int | None = None, message: str = "") -> None:
    """`status.json`: state (running, finished, preempted or failed), step, message; what launch
    scripts read.

    Without a step the last one stays.
    """
    if step is None:
        step = status(folder).get("step")
    said = {"state": state, "step": step, "message": redact(message), "time": time.time()}
    files.write_json(folder / "status.json", said)


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of a run; empty where there is none, or a damaged one."""
    try:
        return files.read_object(folder / "recipe.json")
    except (FileNotFoundError, ValueError):
        return {}


def status(folder: Path) -> dict[str, Any]:
    """What `status.json` says; nothing where there is none, or a damaged one: it is written anew,
    and decides no number."""
    try:
        return files.read_object(folder / "status.json")
    except (FileNotFoundError, ValueError):
        return {}


def steps_of(folder: Path) -> int:
    """Steps that a run has done, as far as it says."""
    step = status(folder).get("step")
    return step if isinstance(step, int) else 0


def _holder(folder: Path) -> str:
    try:
        return (folder / LOCK).read_text().strip()
    except FileNotFoundError:  # deleted just now
        return "nobody"


@contextmanager
def lock(folder: Path, owner: str) -> Iterator[None]:
    """Hold `folder` alone. Where another owner has it, wait: two runs may share a part, and it is
    computed once. Where it is the same owner (a second start in one run_dir), raise UserError
    naming the process.

    The lock is the kernel's (flock), so it ends with the process that held it, however that ended.
    It is that of the folder which is there: another may stand in the place of one that was deleted.
    Raises UserError where a damaged run's folder does not let it.
    """
    told: list[str] = []

    def waiting() -> None:
        if not told:
            told.append(_holder(folder))
            if told[0].startswith(f"{owner} "):
                raise UserError(
                    f"{folder}: in use by {told[0]}; wait until it ends, stop it, or take another "
                    "run_dir"
                )
            say(f"{folder.name}: being computed by {told[0]}; waiting for it")
        # A job at its time limit must not wait past it.
        stop.check(f"waiting for {folder.name}")

    with ExitStack() as stack:
        try:
            file = stack.enter_context(files.locked(folder / LOCK, waiting))
        except OSError as error:
            if (damage := damaged(folder)) is None:
                raise
            raise UserError(
                f"store: {folder}: {damage}, and nothing can be written there ({error.strerror}); "
                "delete that folder, or take another store"
            ) from None
        file.truncate(0)
        file.write(f"{owner} (process {os.getpid()} on {socket.gethostname()})")
        file.flush()
        files.clear_partial(folder)
        yield

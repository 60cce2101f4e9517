"""Checkpoints while training goes on: a step waits for a copy in the host's memory, and a thread of
every process writes it.

No thread takes part in a collective. Each puts a note beside its part, and until then gives a sign
of life now and then; the first process's waits for all notes, and then writes the manifest.
`settle` is where processes wait for each other, and where what went wrong is raised on all of them.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.parallel import comm
from doremi_train.parallel.comm import Lost
from doremi_train.storage import checkpoint, parts
from doremi_train.storage.parts import Piece, Saved
from doremi_train.storage.runs import Run
from doremi_train.training.task import TrainingFailed

_LOOK = (0.01, 1.0)  # shortest and longest time between looks for notes, seconds
_SIGN_OF_LIFE = 5.0  # seconds
_SENT_AGAIN = 30.0  # seconds after which a second home that failed is tried again
_LEAVING = 5.0  # seconds that a process which ends gives the others for their parts


def newest(run: Run) -> Saved | None:
    """The newest sound checkpoint of a run, from which all processes continue; what came after it
    is gone. A collective.

    Raises UserError as `checkpoint.newest` does, and TrainingFailed where processes find other
    checkpoints.
    """
    folder, world = run.folder / checkpoint.FOLDER, comm.world()
    first, *others = comm.gather([path.name for path in checkpoint.paths(folder)])
    for rank, other in enumerate(others, 1):
        if other != first:
            raise TrainingFailed(
                f"process {rank} finds the checkpoints {other}, the first one {first}; {folder} "
                "must be on a file system that all nodes share: set store"
            )

    def fault(path: Path) -> str | None:
        faults = comm.gather(checkpoint.fault(path, *world))
        return next((found for found in faults if found is not None), None)

    path = checkpoint.newest(folder, fault, say if world.first else lambda line: None)
    comm.on_first(lambda: checkpoint.begin(folder, checkpoint.step_of(path) if path else 0))
    return Saved(path) if path is not None else None


class Saver:
    """Writes checkpoints of a run, one at a time."""

    def __init__(self, run: Run, keep: int, timeout: float) -> None:
        """`timeout`: seconds without a sign of life after which a process is given up."""
        self._run, self._keep, self._timeout = run, keep, timeout
        self._folder, self._world = run.folder / checkpoint.FOLDER, comm.world()
        # No note of an earlier start is taken for one of this.
        self._start = comm.broadcast(secrets.token_hex(8))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._leaving = threading.Event()
        self._superseded = threading.Event()  # the next checkpoint is about to be written, or none
        self._step = self._told = 0  # of the last complete checkpoint, as the first process knows

    @property
    def failed(self) -> bool:
        """Whether something went wrong in the background, as far as this process knows."""
        return self._error is not None

    @property
    def writing(self) -> bool:
        """Whether this process still writes, or the first waits for others."""
        return self._thread is not None and self._thread.is_alive()

    def completed(self) -> int | None:
        """The step of a checkpoint that was completed since the last call; the first process
        knows."""
        told, self._told = self._told, self._step
        return self._step if self._step != told else None

    def save(self, step: int, values: Any, pieces: Iterable[Piece]) -> None:
        """Copy what this process has to save, and begin to write it. `values`, with the tensors in
        them, are the same on all processes; tensors of `pieces` this process has alone.

        A collective, because it waits for the checkpoint before.
        """
        self.settle()
        plain, tensors = parts.divide(values)
        shared = (parts.share(name, tensor, *self._world) for name, tensor in tensors.items())
        copies = _copied([*shared, *pieces])
        self._superseded.clear()
        self._thread = threading.Thread(
            target=self._go, args=(step, plain, copies), name="checkpoint", daemon=True
        )
        self._thread.start()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is complete. A collective. Raises on all
        processes what went wrong on any."""
        if self._thread is None:  # the same on all
            return
        thread = self._thread
        self._superseded.set()

        def finish() -> None:
            thread.join()
            if self._error is not None:
                raise self._error

        failures = comm.gather(_described(self._error) if self._error is not None else None)
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise _raised(rank, failure)
        comm.on_first(finish)
        thread.join()  # of another process: it has written its note
        self._thread = None

    def close(self) -> None:
        """End, also where the other processes may be gone: what is being written is completed if
        they are quick. No collective."""
        self._leaving.set()
        self._superseded.set()
        if self._thread is not None:
            self._thread.join()

    # ── In the background ───────────────────────────────────────────────────────────

    def _go(self, step: int, values: Any, pieces: list[Piece]) -> None:
        path = checkpoint.of_step(self._folder, step)
        try:
            if self._world.first:
                records = [self._write(path, pieces), *self._others(path)]
                self._complete(step, values, records)
            else:
                note = _note_of(path, self._world.rank)
                with _signs_of_life(note.with_suffix(".alive"), self._timeout):
                    record = self._write(path, pieces)
                files.write_json(note, record | {"start": self._start})
        except BaseException as error:  # raised by `settle`
            self._error = error
            if not self._world.first:
                with contextlib.suppress(OSError):  # of a full disk; the next step will tell
                    note = _note_of(path, self._world.rank)
                    files.write_json(note, {"error": _described(error), "start": self._start})

    def _write(self, path: Path, pieces: list[Piece]) -> dict[str, Any]:
        """This process's part, here and in the run's second home."""
        part = path / parts.part_name(*self._world)
        record = parts.write(part, pieces)
        name = part.relative_to(self._run.folder).as_posix()
        return record if self._sent([name]) else record | {"unsent": [name]}

    def _complete(self, step: int, values: Any, records: list[dict[str, Any]]) -> None:
        path = checkpoint.complete(self._folder, step, values, records, self._keep)
        for rank in range(1, self._world.size):
            note = _note_of(path, rank)
            note.unlink()
            note.with_suffix(".alive").unlink(missing_ok=True)
        self._step = step
        unsent = [name for record in records for name in record.get("unsent", ())]
        while not self._sent(unsent, step):
            if self._superseded.wait(_SENT_AGAIN):
                say(f"{path}: is not in its second home; the next one will be")
                return

    def _sent(self, names: list[str], step: int | None = None) -> bool:
        """Copy files of the run to its second home, and what completes the checkpoint of a step.
        Returns whether they are there: a home that fails, which at the start it did not, is no
        reason to end a run of days, and is tried again."""
        mirror = self._run.mirror
        if mirror is None:
            return True
        try:
            mirror.push(self._run.folder, names)
            if step is not None:
                checkpoint.push(self._run.folder, step, mirror)
        except UserError as error:
            say(f"{error}; training goes on, and it is tried again")
            return False
        return True

    def _others(self, path: Path) -> list[dict[str, Any]]:
        """The notes of all other processes. Raises Lost where one of them does nothing any more."""
        found: dict[int, dict[str, Any]] = {}
        seen: set[tuple[str, int, int]] = set()
        since, pause = time.monotonic(), _LOOK[0]
        while True:
            for rank in range(1, self._world.size):
                if rank not in found and (note := self._read(path, rank)) is not None:
                    found[rank] = note
            if len(found) == self._world.size - 1:
                return [found[rank] for rank in sorted(found)]
            if (now := _looks(path)) != seen:
                seen, since = now, time.monotonic()
            limit = min(self._timeout, _LEAVING) if self._leaving.is_set() else self._timeout
            if time.monotonic() - since > limit:
                missing = next(rank for rank in range(1, self._world.size) if rank not in found)
                raise Lost(
                    f"process {missing} gave no sign of life in {path} within training.timeout="
                    f"{self._timeout:g} s; look at its own output, and see to it that this is on a "
                    "file system that all nodes share. The same command continues from the last "
                    "checkpoint"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LOOK[1])

    def _read(self, path: Path, rank: int) -> dict[str, Any] | None:
        """The note of a process, if it is there and of this start. Raises the error that it tells
        of."""
        note = _note_of(path, rank)
        if not note.exists():
            return None
        said: dict[str, Any] = files.read_json(note)
        if said["start"] != self._start:
            return None
        if "error" in said:
            raise _raised(rank, said["error"])
        return said


def _copied(pieces: list[Piece]) -> list[Piece]:
    """The same in the host's memory, in one place that goes back to the system as a whole."""
    sizes = [-(-piece.values.nbytes // 16) * 16 for piece in pieces]
    room = torch.empty(sum(sizes), dtype=torch.uint8)
    copies = []
    for piece, place in zip(pieces, room.split(sizes), strict=True):
        own = place[: piece.values.nbytes].view(piece.values.dtype)
        copies.append(piece._replace(values=own.copy_(piece.values.detach())))
    return copies


def _note_of(path: Path, rank: int) -> Path:
    return path / f"part-{rank:05d}.json"


@contextlib.contextmanager
def _signs_of_life(file: Path, timeout: float) -> Iterator[None]:
    """Touch the file now and then: a part that is large, or on its way to a second home, shows
    nothing else."""
    done = threading.Event()

    def give() -> None:
        while not done.wait(min(_SIGN_OF_LIFE, timeout / 4)):
            with contextlib.suppress(OSError):  # the part will tell
                file.touch()

    thread = threading.Thread(target=give, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _looks(folder: Path) -> set[tuple[str, int, int]]:
    """What changes while somebody works in the folder."""
    found = set()
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has its name by now
            found.add((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    return found


def _described(error: BaseException) -> dict[str, Any]:
    """What a note says of an error."""
    number = error.errno if isinstance(error, OSError) else None
    name = str(error.filename) if isinstance(error, OSError) and error.filename else None
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return {"errno": number, "file": name, "text": text, "kind": type(error).__name__}


def _raised(rank: int, told: dict[str, Any]) -> Exception:
    """The error that was described, as far as exit codes tell them apart."""
    if told["errno"] is not None:
        return OSError(told["errno"], told["text"], told["file"])
    return TrainingFailed(f"process {rank}: no checkpoint: {told['kind']}: {told['text']}")

"""Checkpoints: saved aside, checked, renamed; the newest sound one is restored exactly.

A checkpoint is one file of tensors and plain values, loaded with `weights_only=True`, and its
checksum.
"""

import hashlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.storage.mirror import Mirror, Torn

FOLDER = "checkpoints"  # within a run


def save(folder: Path, step: int, content: dict[str, Any], keep: int) -> None:
    """Write `folder/step-XXXXXXXXX.pt` and its checksum, then drop all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    aside = files.aside_of(path)
    try:
        with aside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (
        BaseException
    ) as error:  # the checkpoints before it stay, and what was written of this one makes room
        aside.unlink(missing_ok=True)
        # Torch hides a full disk in its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise
    files.write_bytes(checksum_of(path), _digest(aside).encode())
    aside.rename(path)
    files.sync_folder(folder)
    for old in paths(folder)[:-keep]:
        old.unlink()
        checksum_of(old).unlink(missing_ok=True)


def latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint whose checksum holds, or None. A torn or corrupt one is named and
    passed over.

    Raises UserError as `read` does.
    """
    path = _newest(folder)
    return None if path is None else _load(path)


def read(path: Path) -> dict[str, Any]:
    """One checkpoint. Raises UserError where its checksum does not hold, and for one that holds
    more than tensors and plain values: loading it could run code."""
    checksum = checksum_of(path)
    if (
        not path.exists()
        or not checksum.exists()
        or checksum.read_bytes() != _digest(path).encode()
    ):
        raise UserError(
            f"{path}: missing, torn or corrupt; delete {path.parent.parent}, and it is computed "
            "again"
        )
    return _load(path)


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused, because it holds more than tensors and plain values, and loading it "
            "could run code; delete it, and find out who wrote it"
        ) from None


def remove(folder: Path) -> None:
    """Drop all checkpoints of a run that has finished."""
    if folder.exists():
        shutil.rmtree(folder)  # with whatever a kill left half-written in it


def push(run: Path, mirror: Mirror) -> None:
    """Copy the newest checkpoint of the folder `run`, and the logs that belong to it, to the run's
    second home, and keep as many there as here."""
    kept = [f"{path.parent.name}/{path.name}" for path in paths(run / FOLDER)]
    checksums = [_checksum(name) for name in kept]
    mirror.clear_dead()
    mirror.push(run, [*_logs(run), "recipe.json", kept[-1], checksums[-1]])
    mirror.remove(
        name
        for name in mirror.sizes()
        if name.startswith(FOLDER) and name not in (*kept, *checksums)
    )


def fetch(run: Path, mirror: Mirror) -> None:
    """Bring the newest sound checkpoint and the logs, where the one in the folder `run` is older or
    there is none."""
    newest, sizes = _newest(run / FOLDER), mirror.sizes()
    for name in sorted(
        (name for name in sizes if name.startswith(FOLDER) and name.endswith(".pt")), reverse=True
    ):
        if newest is not None and Path(name).name <= newest.name:
            return
        checksum = mirror.read(_checksum(name))
        try:
            if checksum is None:
                raise Torn("has no checksum")
            for log in (log for log in sizes if log.endswith(".jsonl")):
                mirror.pull(run, log)  # first: a checkpoint counts on its logs
            files.write_bytes(run / _checksum(name), checksum)
            mirror.pull(run, name, sha256=checksum.decode())
        except Torn as error:
            (run / _checksum(name)).unlink(missing_ok=True)
            say(f"{mirror.url}/{name}: torn or corrupt (it {error}); the one before it is used")
            continue
        say(f"{run.name}: continues from {mirror.url}/{name}")
        return


def _newest(folder: Path) -> Path | None:
    for path in reversed(paths(folder)):
        checksum = checksum_of(path)
        if checksum.exists() and checksum.read_bytes() == _digest(path).encode():
            return path
        say(f"{path}: torn or corrupt (its checksum does not hold); the one before it is used")
    return None


def _checksum(name: str) -> str:
    return name.removesuffix(".pt") + ".sha256"


def _logs(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("*.jsonl"))


def paths(folder: Path) -> list[Path]:
    """The checkpoints of a folder, sound or not, in the order of their steps."""
    return sorted(folder.glob("step-*.pt"))


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def checksum_of(path: Path) -> Path:
    """The file beside a checkpoint that says whether it is whole."""
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints: saved aside, checked, renamed; the newest sound one is restored exactly.

A checkpoint is one file of tensors and plain values, loaded with `weights_only=True`, and its checksum.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from doremi_train import files


def save(folder: Path, step: int, content: dict[str, Any], keep: int) -> None:
    """Write `folder/step-XXXXXXXXX.pt` and its checksum, then drop all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    aside = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:  # the checkpoints before it stay, and what was written of this one makes room
        aside.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides a full disk in its own
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise
    files.write_bytes(path.with_suffix(".sha256"), _digest(aside).encode())
    aside.rename(path)
    files.sync_folder(folder)
    for old in _paths(folder)[:-keep]:
        old.unlink()
        old.with_suffix(".sha256").unlink(missing_ok=True)


def latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint whose checksum holds, or None. A torn or corrupt one is named and passed over."""
    for path in reversed(_paths(folder)):
        checksum = path.with_suffix(".sha256")
        if checksum.exists() and checksum.read_bytes() == _digest(path).encode():
            return torch.load(path, map_location="cpu", weights_only=True)
        print(f"{path}: torn or corrupt (its checksum does not hold); the one before it is used", flush=True)
    return None


def remove(folder: Path) -> None:
    """Drop all checkpoints of a run that has finished."""
    if folder.exists():
        shutil.rmtree(folder)  # with whatever a kill left half-written in it


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

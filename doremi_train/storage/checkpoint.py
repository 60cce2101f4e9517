"""Checkpoints of a run: every process writes its part, and a manifest that is renamed into place
says that all are there. The newest sound one is restored exactly.

    checkpoints/step-000000123/part-00000-of-00004.safetensors …   numbers, as `parts` lays them out
                               manifest.json                       checksums, and which lie where

No pickle is read.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.storage import parts
from doremi_train.storage.mirror import Mirror, Torn
from doremi_train.storage.parts import MANIFEST, Saved, Unsound

FOLDER = "checkpoints"  # within a run


def of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` is, or will be."""
    return folder / f"step-{step:09d}"


def paths(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, sound or not, in the order of their steps."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def complete(
    folder: Path,
    step: int,
    values: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
    keep: int,
) -> Path:
    """Write the manifest of a checkpoint whose parts are all on disk, then drop all but the last
    `keep`."""
    path = of_step(folder, step)
    files.write_bytes(path / MANIFEST, parts.manifest(step, values, records))
    files.sync_folder(folder)
    for old in paths(folder)[:-keep]:
        _discard(old)
    return path


def newest(
    folder: Path, faulty: Callable[[Path], str | None], tell: Callable[[str], None] = say
) -> Path | None:
    """The newest checkpoint in which `faulty` finds nothing; a torn or foreign one is told of and
    passed over.

    Raises UserError where there are only checkpoints of an older version.
    """
    for path in reversed(paths(folder)):
        if (found := faulty(path)) is None:
            return path
        tell(f"{path}: torn or corrupt ({found}); the one before it is used")
    older = sorted(folder.glob("step-*.pt"))
    if older:
        raise UserError(
            f"{folder}: holds checkpoints of an older version ({older[-1].name}), which are "
            f"pickles and not read; finish the run with that version, or delete {folder}: it then "
            "begins again"
        )
    return None


def fault(path: Path, rank: int = 0, size: int = 1, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, as far as `Saved.verify` looks. Raises UserError for another
    version's."""
    try:
        Saved(path).verify(rank, size, contents)
    except Unsound as error:
        return str(error)
    return None


def read(path: Path) -> Saved:
    """One checkpoint. Raises UserError where it is not sound."""
    try:
        saved = Saved(path)
        saved.verify()
    except Unsound as error:
        raise UserError(
            f"{path}: missing, torn or corrupt ({error}); delete {path.parent.parent}, and it is "
            "computed again"
        ) from None
    return saved


def begin(folder: Path, step: int) -> None:
    """Drop what was not completed, and what comes after `step`, from which the run continues: it
    was passed over, and is written again."""
    for path in folder.glob("step-*"):
        if path.is_dir() and (step_of(path) > step or not (path / MANIFEST).exists()):
            _discard(path)


def remove(folder: Path) -> None:
    """Drop all checkpoints of a run that has finished."""
    if folder.exists():
        shutil.rmtree(folder)  # with whatever a kill left half-written in it


def _discard(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # first: without it the rest counts for nothing
    shutil.rmtree(path)


# ── A second home ───────────────────────────────────────────────────────────────────


def push(run: Path, step: int, mirror: Mirror) -> None:
    """Copy the manifest of a checkpoint whose parts are there, after the logs that belong to it, to
    the run's second home, and keep as many there as here."""
    kept = [f"{FOLDER}/{path.name}/" for path in paths(run / FOLDER)]
    mirror.clear_dead()
    manifest = of_step(run / FOLDER, step) / MANIFEST
    mirror.push(run, [*_logs(run), "recipe.json", manifest.relative_to(run).as_posix()])
    old = [
        name
        for name in mirror.sizes()
        if name.startswith(f"{FOLDER}/") and not name.startswith(tuple(kept))
    ]
    mirror.remove(sorted(old, key=lambda name: not name.endswith(MANIFEST)))


def fetch(run: Path, mirror: Mirror) -> None:
    """Bring the newest sound checkpoint and the logs, where the one in the folder `run` is older or
    there is none.

    Raises UserError where there are only checkpoints of an older version, or one of a newer.
    """
    # At a glance: the trainer that takes one up reads all of it.
    at_once = [path for path in paths(run / FOLDER) if fault(path, contents=False) is None]
    here = at_once[-1].name if at_once else ""
    sizes = mirror.sizes()
    there = [name for name in sizes if name.startswith(f"{FOLDER}/step-")]
    manifests = sorted((name for name in there if name.endswith(f"/{MANIFEST}")), reverse=True)
    for name in manifests:
        folder = (run / name).parent
        if folder.name <= here:
            return
        try:
            _pull(run, mirror, name, sizes)
        except (Torn, Unsound) as error:
            shutil.rmtree(folder, ignore_errors=True)
            say(
                f"{mirror.url}/{name.removesuffix(f'/{MANIFEST}')}: torn or corrupt ({error}); the "
                "one before it is used"
            )
            continue
        say(f"{run.name}: continues from {mirror.url}/{name.removesuffix(f'/{MANIFEST}')}")
        return
    if not here and not manifests and any(name.endswith(".pt") for name in there):
        raise UserError(
            f"{mirror.url}/{FOLDER}: holds checkpoints of an older version, which are pickles and "
            "not read; finish the run with that version, or delete them there: it then begins again"
        )


def _pull(run: Path, mirror: Mirror, name: str, sizes: Mapping[str, int]) -> None:
    """Bring the checkpoint of the manifest `name`. Raises Torn or Unsound."""
    text = mirror.read(name)
    if text is None:
        raise Torn("it is gone")
    home = name.removesuffix(MANIFEST)
    try:
        manifest = parts.parse(text)
    except UserError as error:
        raise UserError(
            f"{mirror.url}/{home}: {error}; continue with that version, or delete it there"
        ) from None
    for log in (log for log in sizes if log.endswith(".jsonl")):
        mirror.pull(run, log)  # first: a checkpoint counts on its logs
    for part in manifest.parts:
        if home + part.name not in sizes:
            raise Torn(f"{part.name} is missing")
        try:
            mirror.pull(run, home + part.name, part.size, part.sha256)
        except Torn as error:
            raise Torn(f"{part.name} {error}") from None
    files.write_bytes(run / name, text)


def _logs(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("*.jsonl"))

"""What a finished command said, kept in `run_dir/finished.json` beside a fingerprint of all that it
rests on. The same command again, where nothing of that changed, says it once more: it computes
nothing, and imports neither torch nor numpy, which is most of what it would take.
"""

import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.config import fingerprint, flatten
from doremi_train.console import Sheet
from doremi_train.redaction import redact
from doremi_train.storage.urls import PIPE

NAME = "finished.json"
_APART = (NAME, "status.json")  # which change although nothing did
_WHERE = ("run_dir", "store", "stage")
_MOST = 200_000  # files that are looked at: they take about a second
_PATTERN = re.compile(r"[*?\[{]")  # begins what stands for several names


def keep(plain: Mapping[str, Any], said: Sequence[str | Sheet]) -> None:
    """Write what a finished command with this composed configuration said; nothing where it would
    not be known whether it still holds."""
    rests_on = _rests_on(plain)
    if rests_on is not None:
        lines = [line if isinstance(line, str) else list(line) for line in said]
        content = {"rests_on": rests_on, "said": redact(lines)}
        files.write_json(Path(plain["run_dir"]) / NAME, content)


def said(plain: Mapping[str, Any]) -> list[str | Sheet] | None:
    """What the same command said when it was finished; None where it was not, or where anything
    that it rests on is otherwise by now. Raises OSError where files cannot be looked at."""
    run_dir = plain.get("run_dir")
    if not isinstance(run_dir, str) or not (Path(run_dir) / NAME).exists():
        return None
    try:
        kept = files.read_json(Path(run_dir) / NAME)
        lines = [line if isinstance(line, str) else Sheet(*line) for line in kept["said"]]
        return lines if kept["rests_on"] == _rests_on(plain) else None
    except (ValueError, KeyError, TypeError):  # it is not as it was written
        return None


def _rests_on(plain: Mapping[str, Any]) -> str | None:
    """Fingerprint of the configuration, of this program and what is installed beside it, of all in
    the run folder and the runs that it links, and of all files that the configuration names: of
    each its size and time. None where there is more to do, or to ask, than looking at files here:
    a second home, trackers, URLs, very many files."""
    decides = {key: value for key, value in plain.items() if key not in _WHERE}
    flat, named = flatten(decides), sorted({*_strings(decides)})
    elsewhere = any("://" in name or name.startswith(PIPE) for name in named)
    if elsewhere or flat.get("remote") is not None or flat.get("tracking.backend") != "none":
        return None
    run_dir = Path(plain["run_dir"])
    store = Path(plain.get("store") or run_dir / "store").resolve()
    own = _below(Path(__file__).parents[1]), _below(run_dir, store)
    looked = [*(islice(of, _MOST) for of in own), *map(_of, named)]
    found = [[*of] if of is not None else None for of in looked]
    if None in found or sum(len(of or ()) for of in found) >= _MOST:
        return None
    libraries = [sys.version, Path(sysconfig.get_path("purelib")).stat().st_mtime_ns]
    return fingerprint([redact(decides), named, libraries, str(store), found])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(entry)


def _of(name: str) -> Iterable[Any] | None:
    """The files that a value of the configuration names, if it names any: a file, all below a
    folder, or below that in which a pattern begins. None where that is too much to look at."""
    pattern = _PATTERN.search(name)
    before, slash, _ = name[: pattern.start()].rpartition("/") if pattern else (name, "", "")
    path = Path(before or slash or ".")
    try:
        if path.resolve() == Path("/"):
            return None
        return islice(_below(path), _MOST) if path.is_dir() else [_stated(path)]
    except (OSError, ValueError):  # a text that no file can be named by
        return []


def _below(root: Path, without: Path | None = None) -> Iterator[Any]:
    """[folder] and then [file, size, time] of all files below `root`, links followed, each folder
    once; but for hidden files, compiled ones, and those that change although nothing did."""
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or real == str(without):
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(set(below) - {"__pycache__"})
        counted = [name for name in sorted(names) if name[0] != "." and name not in _APART]
        if counted:
            yield [real]
            yield from (_stated(Path(folder, name)) for name in counted)


def _stated(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError:  # a link to what is gone
        return [path.name]
    return [path.name, found.st_size, found.st_mtime_ns]

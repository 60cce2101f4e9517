"""The command killed before its n-th operation on the files of a folder, and what a folder holds
compared with another.

SIGKILL leaves a process no time, so what is on disk at that moment is what its next start finds.
The operations are those that change what is there: a file, folder or link that is made, renamed,
linked, emptied or removed, and an fsync. Python tells of all but the last by audit events, whoever
asks for them (pathlib, shutil, torch, a library); writers in C++ and Rust (parquet, safetensors,
tokenizers) tell nothing, but what comes before and after them does. A file that is opened to be
written in its place counts twice: before it is there, and where it is there and empty.

Processes that the command starts count with it, in one log that all of them write: workers that are
spawned, and the jobs of `submit`, by `sitecustomize.py` of `helpers/counted`. Whoever does the n-th
operation is killed, alone.
"""

import json
import os
import re
from functools import partial
from pathlib import Path

from helpers import counting, forked
from helpers.command import Outcome, environment

NEVER = 0
_SITE = Path(__file__).parent / "counted"


def run(
    overrides: list[str], folder: Path, log: Path, at: int = NEVER, timeout: float = 300
) -> Outcome:
    """The command, killed before its operation number `at` below `folder`, or never; every
    operation is a line of `log`."""
    given = json.dumps([str(folder.resolve()), str(log), at])
    env = environment() | {counting.KEY: given}
    env["PYTHONPATH"] = os.pathsep.join([str(_SITE), str(_SITE.parents[1]), env["PYTHONPATH"]])
    process = forked.ranks(1, overrides, env, before=counting.install_from_environment)
    return Outcome(*forked.ended(process, timeout))


def operations(log: Path) -> list[str]:
    """What the command did, in order: the operation and the path."""
    return log.read_text().splitlines() if log.exists() else []


# ── What is there afterwards ────────────────────────────────────────────────────────


def left(folder: Path) -> dict[str, bytes]:
    """{path below `folder`: content} of all that is there, without what differs between any two
    runs: times, how long something took, and who holds a lock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(
            r"instructions-\w+", partial(_by_content, folder), str(path.relative_to(folder))
        )
        if path.parent.suffix == ".log":
            continue  # submitit's, which names its files by the numbers of processes
        if path.is_symlink():
            found[name] = bytes(path.readlink())
        elif path.is_dir():
            found[name] = b"a folder"
        elif not path.name.endswith("lock"):
            found[name] = _timeless(path)
    return found


def _by_content(folder: Path, name: re.Match[str]) -> str:
    """Examples that were chosen are named after the time of their file too."""
    for manifest in folder.rglob(f"{name[0]}/manifest.json"):
        return f"instructions-{json.loads(manifest.read_bytes())['fingerprint']}"
    return name[0]


def _timeless(path: Path) -> bytes:
    content = path.read_bytes()
    for name, times in _TIMES.items():
        if path.match(name):
            content = re.sub(times, rb"", content)
    return content


# {end of a path: what of the file is a time, or how long something took}
_TIMES = {
    "finished.json": rb'"rests_on": "[0-9a-f]+"',
    "status.json": rb'"time": [^,}]+',
    "metrics.jsonl": rb'"tokens_per_second":[^,}]+',
    "runs/*/checksums.json": rb'"metrics.jsonl": [^}]+',
    # All of it: a plan is of what its command finds done.
    "plan.json": rb"(?s).*",
    "instructions-*/manifest.json": rb'(?s)"request": .*',
}

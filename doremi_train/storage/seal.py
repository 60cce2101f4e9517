"""What tells whether files are still those that were written: in full, which reads all of them, or
by a sample, which costs next to nothing and finds what was cut, zeroed or exchanged.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

Seal = dict[str, Any]  # bytes, sample and sha256 of a file; of older versions sha256 alone

BLOCK, BLOCKS = 4096, 16  # bytes, evenly spread from the first to the last, that a sample reads
OTHER = "has another content than was written"


def of(folder: Path, names: Iterable[str]) -> dict[str, Seal]:
    """{name: seal} of files in `folder`."""
    seals = {}
    for name in names:
        with (folder / name).open("rb") as file:
            seals[name] = _seal(file)
    return seals


def of_content(content: bytes) -> Seal:
    """The seal of a file that is still to be written."""
    return _seal(io.BytesIO(content))


def broken(folder: Path, seals: Mapping[str, Seal], full: bool = False) -> str | None:
    """The first file that is not as it was sealed, and how; None where all are."""
    for name, seal in seals.items():
        try:
            wrong = otherwise(folder / name, seal.get("bytes"), seal.get("sample"))
            if wrong is None and full and sha256(folder / name) != seal.get("sha256"):
                wrong = OTHER
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        except ValueError:  # a zero byte, half a character
            wrong = "is the name of no file"
        if wrong is not None:
            return f"{name} {wrong}"
    return None


def otherwise(path: Path, size: int | None, sampled: str | None) -> str | None:
    """How a file differs from one of this size and sample, as far as they are known; None where it
    does not. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        found = _size(file)
        if size is not None and found != size:
            return f"has {found} bytes where {size} were written"
        return OTHER if sampled is not None and sample(file) != sampled else None


def sample(file: IO[bytes]) -> str:
    """Digest of some of a file's bytes: of all, where there are no more than that."""
    size, digest = _size(file), hashlib.sha256()
    if size <= BLOCK * BLOCKS:
        file.seek(0)
        digest.update(file.read())
    else:
        for n in range(BLOCKS):
            file.seek(n * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def sample_of(path: Path) -> str:
    """The same of a path."""
    with path.open("rb") as file:
        return sample(file)


def sha256(path: Path) -> str:
    """Digest of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(file: IO[bytes]) -> Seal:
    sampled, size = sample(file), _size(file)
    file.seek(0)
    whole = hashlib.sha256()
    while chunk := file.read(1 << 20):
        whole.update(chunk)
    return {"bytes": size, "sample": sampled, "sha256": whole.hexdigest()}


def _size(file: IO[bytes]) -> int:
    return file.seek(0, io.SEEK_END)

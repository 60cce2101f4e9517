"""A prepared store in a second home: fetched from there, or published to it."""

import hashlib
from pathlib import Path

from doremi_train.config import UserError
from doremi_train.data.tokens.encoding import Progress
from doremi_train.data.tokens.shards import CHECKSUMS, read_manifest, shards_of
from doremi_train.files import write_json
from doremi_train.storage.mirror import Mirror


def fetch(target: Path, mirror: Mirror) -> bool:
    """Bring what opens the store `target` from its second home, if it is finished there; its shards
    come when they are needed. Returns whether there is such a store."""
    home = mirror.at(target.name)
    missing = [name for name in _OPENED if not (target / name).exists()]
    if missing and home.has("manifest.json"):
        for name in missing:
            home.pull(target, name)
    return (target / "manifest.json").exists()


# The manifest last: it says that all is there.
_OPENED = (
    CHECKSUMS,
    "index.npy",
    "tokenizer.json",
    "manifest.json",
)


def publish(target: Path, mirror: Mirror, progress: Progress) -> None:
    """Copy a finished store to its second home, unless it is there; goes on where an earlier copy
    stopped."""
    home = mirror.at(target.name)
    if home.has("manifest.json"):
        return
    home.clear_dead()
    shards = shards_of(read_manifest(target))
    checksums: dict[str, str] = {}
    uploaded, done, total = home.sizes(), 0, sum(shards.values())
    for name, size in shards.items():
        progress("uploading", done, total)
        with _shard(target / name).open("rb") as file:
            checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if uploaded.get(name) != size:
            home.push(target, [name])
        done += size
    write_json(target / CHECKSUMS, checksums)
    home.push(target, _OPENED)


def _shard(path: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"store: {path} is missing, and it is not in remote either; delete {path.parents[2]}, "
            "run again"
        )
    return path

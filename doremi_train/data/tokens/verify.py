"""Whether a finished token store still is what was written, read in full."""

import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.data.tokens.shards import Stream, TokenStore

Ints = NDArray[np.int64]


def damaged(path: Path) -> list[str]:
    """What of a store is not as it was written; shards that are in its second home only are passed
    over."""
    try:
        store = TokenStore.open(path)
        store.tokenizer()
    except UserError as error:
        return [str(error)]
    streams = store.members()
    found = [_damage(store, stream, members) for stream, members in streams.items()]
    return [text for text in found if text is not None]


def _damage(store: TokenStore, stream: Stream, members: Ints) -> str | None:
    split, domain = stream
    described = store.manifest["domains"][domain][split]
    folder, size = store.path / described["folder"], np.dtype(store.manifest["dtype"]).itemsize
    digest = ""
    try:
        for shard, offset, tokens in members.tolist():
            with (folder / f"{shard:05d}.tar").open("rb") as file:
                file.seek(offset)
                body = file.read(tokens * size)
                file.seek(-file.tell() % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE, os.SEEK_CUR)
                ends = np.load(file, allow_pickle=False)
            digest = chained(digest, body, ends)
    except FileNotFoundError as error:
        return None if store.elsewhere else f"{error.filename} is missing"
    except (OSError, ValueError, EOFError) as error:
        return f"{folder}: member {len(digest)} cannot be read ({error})"
    if digest != described["sha256"]:
        return f"{folder} holds other tokens than were written"
    return None


def chained(digest: str, tokens: bytes, ends: Ints) -> str:
    """The digest of a stream with one more member: its tokens, and where its documents end."""
    parts = hashlib.sha256(tokens).digest() + hashlib.sha256(ends.tobytes()).digest()
    return hashlib.sha256(bytes.fromhex(digest) + parts).hexdigest()

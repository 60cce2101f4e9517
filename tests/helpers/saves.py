"""What is done in a process before the command begins, so that the second of two fails in the
middle of a part of a checkpoint."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors

AFTER = 3  # parts that go well


def killed() -> None:
    """The second process is killed when half of a part is on disk."""
    really, count = safetensors.save_file, 0

    def save_file(tensors: Any, path: Path) -> None:
        nonlocal count
        really(tensors, path)
        count += 1
        if count > AFTER:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        _parts().save_file = save_file


def full() -> None:
    """The second process alone has no room for a part, from the first one on."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def _parts() -> Any:
    from doremi_train.storage import parts

    return parts

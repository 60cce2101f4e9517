"""To stop real processes at a chosen place, and to compare what two runs left."""

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train.data.tokens.shards import TokenStore
from helpers.command import Outcome

STEPS = 60  # of LONG


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def reached(stage: Path, step: int) -> bool:
    """Whether the stage has a checkpoint of this step or a later one."""
    return any(number >= step for number in checkpoints(stage))


def checkpoints(stage: Path) -> list[int]:
    """Steps of the checkpoints on disk, oldest first."""
    folder = stage / "checkpoints"
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


def wait_for(
    condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 300
) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.002)


def ended(process: "subprocess.Popen[str]") -> Outcome:
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


class reaped:
    """Whatever the test does, no process outlives it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def same_numbers(one: Path, two: Path) -> None:
    """α of every step within 1e-6, learning curves within 1e-4, the same draws."""
    for a, b in zip(
        *(lines(run / "proxy" / "domain_weights.jsonl") for run in (one, two)), strict=True
    ):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"]
        assert all(abs(a["weights"][name] - b["weights"][name]) < 1e-6 for name in a["weights"])
        assert all(
            abs(a["excess_loss"][name] - b["excess_loss"][name]) < 1e-5 for name in a["weights"]
        )
    for stage in ("reference", "proxy", "main"):
        for a, b in zip(*(lines(run / stage / "metrics.jsonl") for run in (one, two)), strict=True):
            assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) < 1e-4
        for a, b in zip(
            *(lines(run / stage / "evaluations.jsonl") for run in (one, two)), strict=True
        ):
            assert abs(a["mean_loss"] - b["mean_loss"]) < 1e-4


def same_bits(one: Path, two: Path) -> None:
    names = ["weights.json", "proxy/domain_weights.jsonl"]
    names += [f"{stage}/model/model.safetensors" for stage in ("reference", "proxy", "main")]
    names += [f"{stage}/evaluations.jsonl" for stage in ("reference", "proxy", "main")]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for a, b in zip(*(lines(run / "proxy" / "metrics.jsonl") for run in (one, two)), strict=True):
        assert (
            a["step"] == b["step"]
            and a["learning_rate"] == b["learning_rate"]
            and a["loss"] == b["loss"]
        )


def documents_of(store: TokenStore, split: str, domain: str) -> list[str]:
    """Texts, read back from the shards of a small store."""
    tokenizer, found, pending = store.tokenizer(), [], []
    for path in sorted(
        (store.path / store.manifest["domains"][domain][split]["folder"]).glob("*.tar")
    ):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".tokens.npy"):
                    pending += np.load(io.BytesIO(archive.extractfile(member).read())).tolist()  # type: ignore
    while store.end_of_document in pending:
        cut = pending.index(store.end_of_document)
        found.append(tokenizer.decode(pending[:cut], skip_special_tokens=False))
        pending = pending[cut + 1 :]
    assert not pending
    return found

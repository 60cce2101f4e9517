"""Logs of a run while it trains: metrics, evaluations, domain weights and picks, a line a step."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train.data.batches import some
from doremi_train.data.sampler import Draw
from doremi_train.training.step import Picks
from doremi_train.training.task import Position, Task, Watch


class Logs:
    """The JSON lines of a run, on the first rank; nothing on the others."""

    def __init__(self, folder: Path | None, step: int, watch: Watch) -> None:
        self._folder, self._step, self._watch = folder, step, watch
        self._files: dict[str, files.JsonLines] = {}

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def metrics(self, **line: float) -> None:
        self._write("metrics", line)

    def evaluation(self, step: int, measured: dict[str, Any]) -> None:
        losses = {name: figures["loss"] for name, figures in measured["domains"].items()}
        self._write(
            "evaluations", {"step": step, "mean_loss": measured["mean_loss"], "domains": losses}
        )

    def trace(self, task: Task, position: Position, stats: Any, skipped: bool) -> None:
        columns = task.objective.record(position.state, stats)
        if columns:
            named = {
                key: task.store.named(column) if column.dim() else column.item()
                for key, column in columns.items()
            }
            mark = {"skipped": True} if skipped else {}  # the update was left out with the batch
            if task.ends(position) and position.step < task.training.steps:
                mark["settled"] = True  # which is why there is no line after it
            self._write("domain_weights", {"step": position.step, **named, **mark})

    def selection(self, domains: tuple[str, ...], step: int, picks: Picks) -> None:
        candidates, chosen = picks

        def count(drawn: Draw) -> dict[str, int]:
            counts = np.bincount(drawn.domain, minlength=len(domains))
            return dict(zip(domains, counts.tolist(), strict=True))

        def one(at: int) -> dict[str, Any]:
            domain, sequence = domains[int(candidates.domain[at])], int(candidates.sequence[at])
            return {"domain": domain, "sequence": sequence, "score": float(chosen.scores[at])}

        order = chosen.scores.nan_to_num(nan=-math.inf).argsort(stable=True)
        line = {
            "step": step,
            "candidates": count(candidates),
            "picked": count(some(candidates, chosen.picked.numpy())),
            "penalty_to_score": chosen.ratio,
            "highest": one(int(order[-1])),
            "lowest": one(int(order[0])),
        }
        self._write("batch_selection", line)

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def _write(self, name: str, line: dict[str, Any]) -> None:
        if self._folder is None:
            return
        if name not in self._files:
            self._files[name] = files.JsonLines(self._folder / f"{name}.jsonl", self._step)
        self._files[name].write(line)
        self._watch(line)

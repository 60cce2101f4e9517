"""The runs that a command would make, before any of them: their names, and what the store has
of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run, steps_of


class Ahead(NamedTuple):
    """One run of the pipeline."""

    name: str  # its folder under run_dir
    kind: str  # reference, proxy, doge, expert, swarm or main
    config: dict[str, Any]  # of its model
    steps: int
    done: int  # steps that are in the store already
    same_as: str | None  # an earlier run of the pipeline, which is this very one
    # Sequences for which a frozen model is still to be run, where its losses are cached.
    missing: float = 0.0

    @property
    def left(self) -> float:
        """Part that is still to be done."""
        return 0.0 if self.same_as else 1 - self.done / self.steps

    @property
    def state(self) -> str:
        """new, begun, done, or same."""
        if self.same_as:
            return "same"
        return "new" if self.done == 0 else "begun" if self.left else "done"


@dataclass
class Pipeline:
    """Runs of a command in their order; those of the same address are one."""

    session: Session
    runs: list[Ahead] = field(default_factory=list)
    names: dict[Path, str] = field(default_factory=dict)  # of runs whose address is known

    def add(
        self, name: str, kind: str, config: dict[str, Any], steps: int, run: Run | None
    ) -> None:
        """Add a run; `run` is None where it depends on one that is not finished."""
        same_as = self.names.setdefault(run.folder, name) if run is not None else name
        done = self._done(run, steps) if run is not None else 0
        self.runs.append(
            Ahead(name, kind, config, steps, done, same_as if same_as != name else None)
        )

    def _done(self, run: Run, steps: int) -> int:
        mirror = self.session.mirror
        if run.finished or (
            mirror is not None and mirror.at("runs", run.folder.name).has("result.json")
        ):
            return steps
        return steps_of(run.folder) if (run.folder / "checkpoints").exists() else 0

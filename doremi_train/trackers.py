"""Curves beside the JSON lines, in wandb or TensorBoard. The JSON lines are the truth and are
always written.

A tracker gets the very lines of `metrics.jsonl`, `evaluations.jsonl` and `domain_weights.jsonl`,
flat. It is a convenience: where it fails, that is said once and tracking ends; the training goes
on. Nothing asks for an account.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic.dataclasses import dataclass

from doremi_train import files
from doremi_train.config import STRICT, UserError, fingerprint
from doremi_train.console import say
from doremi_train.parallel import comm
from doremi_train.redaction import redact


@dataclass(frozen=True, config=STRICT)
class TrackingOptions:
    backend: Literal["none", "wandb", "tensorboard"] = "none"
    """Where curves are shown."""

    mode: Literal["auto", "online", "offline"] = "auto"
    """Whether wandb sends curves at once; auto: online where a login is found without asking, else
    offline."""

    project: str = "doremi-train"
    """Project of wandb."""

    entity: str | None = None
    """User or team of wandb; null: wandb's default."""

    group: str | None = None
    """Group of wandb; null: the name of the folder that tracking.path says."""

    tags: tuple[str, ...] = ()
    """Tags of wandb."""

    name: str | None = None
    """What stands before the name of each run (reference, proxy, main, …); null: nothing."""

    path: str | None = None
    """Folder in which wandb/ and tensorboard/ are written; null: run_dir, or a sweep's own for its
    jobs."""


class Subject(NamedTuple):
    """What is tracked as one run."""

    name: str
    stage: str
    id: str  # the same when the run is continued
    step: int = 0  # what was done before


class Tracker(Protocol):
    """One run in a backend. Any of this may raise anything."""

    place: str  # where its curves are

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def summary(self, values: Mapping[str, float]) -> None: ...

    def artifact(self, name: str, paths: Sequence[Path]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Tracking:
    """What a command's runs are tracked as, and where. The first process does it; on the others
    nothing happens."""

    def __init__(self, options: TrackingOptions, run_dir: Path, config: Mapping[str, Any]) -> None:
        self.options, self.config = options, redact(config)
        self.folder = Path(options.path or run_dir)
        self.failed = False

    @property
    def group(self) -> str:
        return self.options.group or self.folder.resolve().name

    def check(self) -> None:
        """Raise UserError where what is asked for cannot be had, before anything runs."""
        if (
            self.options.backend == "tensorboard"
            and importlib.util.find_spec("tensorboard") is None
        ):
            raise UserError(
                "tracking=tensorboard: TensorBoard is not installed; "
                "pip install -c constraints.txt -e '.[tensorboard]', or use tracking=wandb"
            )
        if self.options.backend == "wandb" and self.options.mode == "online":
            with _contained(self.folder):
                _mode(self.options)

    @contextlib.contextmanager
    def run(self, label: str, id: str, step: int = 0) -> Iterator["Tracked"]:
        """Track a training run that continues from `step`. Called on every process."""
        tracked = Tracked(self)
        if self.options.backend != "none":
            subject = Subject(self._named(label), _stage(label), id, step)
            # The others wait in peace: it may wait for a network.
            comm.on_first(lambda: tracked.open(subject))
        try:
            yield tracked
        except BaseException as error:
            tracked.close(getattr(error, "exit_code", 1))
            raise
        tracked.close()

    def report(self, page: Path) -> None:
        """Track a written report: the page, the JSON files beside it, and its headline. No
        collective."""
        if self.options.backend == "none" or not comm.world().first:
            return
        beside = (page.with_name(f"{name}.json") for name in ("weights", "evaluation", "plan"))
        id = f"report-{fingerprint(str(page.parent.resolve()))}"
        tracked = Tracked(self)
        tracked.open(Subject(self._named("report"), "report", id))
        tracked.summary(_headline(page.parent))
        tracked.artifact(id, [page, *(path for path in beside if path.exists())])
        tracked.close()

    def of_part(self, name: str) -> dict[str, str]:
        """What a child's configuration says, so that its runs stand in this folder and group."""
        return {"tracking.path": str(self.folder.resolve()), "tracking.name": self._named(name)}

    def _named(self, label: str) -> str:
        return "/".join(filter(None, [self.options.name, label]))


_ANY = (Exception, SystemExit)  # wandb leaves the interpreter where its own process ended badly


class Tracked:
    """A tracker, or none. Its failure is said once and ends tracking, not the run."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self._tracker: Tracker | None = None

    def open(self, subject: Subject) -> None:
        if self._tracking.failed:
            return
        try:
            self._tracker = _BACKENDS[self._tracking.options.backend](self._tracking, subject)
        except _ANY as error:
            self._fail(error)
        else:
            say(f"{subject.name:<22} {self._tracker.place}")

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of one of the logs."""
        self._attempt(lambda tracker: tracker.log(line["step"], flat(line)))

    def summary(self, values: Mapping[str, float]) -> None:
        """Final numbers."""
        self._attempt(lambda tracker: tracker.summary(values))

    def artifact(self, name: str, paths: Sequence[Path]) -> None:
        self._attempt(lambda tracker: tracker.artifact(name, paths))

    def close(self, exit_code: int = 0) -> None:
        """`exit_code`: of the run."""
        self._attempt(lambda tracker: tracker.close(exit_code))
        self._tracker = None

    def _attempt(self, act: Callable[[Tracker], None]) -> None:
        if self._tracker is not None:
            try:
                act(self._tracker)
            except _ANY as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        tracker, self._tracker, self._tracking.failed = self._tracker, None, True
        told = f"{type(error).__name__}: {error}"
        say(
            f"tracking={self._tracking.options.backend}: {told}; tracking ends, the run goes on "
            "and its JSON lines are whole"
        )
        if tracker is not None:
            with contextlib.suppress(*_ANY):  # it is broken, and that was said
                tracker.close(1)


def flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """{"step": 1, "weights": {"web": 0.5}} → {"step": 1, "weights/web": 0.5}; a domain's loss is
    domains/web/loss."""
    values: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            end = "/loss" if key == "domains" else ""
            values |= {f"{key}/{name}{end}": entry for name, entry in value.items()}
        else:
            values[key] = value
    return values


def _stage(label: str) -> str:
    """proxy/round-2/seed-0 → proxy; proxy/round-2/reference → reference; baseline → main."""
    parts = label.split("/")
    return next((stage for stage in ("reference", "proxy") if stage in parts), "main")


def _headline(run_dir: Path) -> dict[str, float]:
    """The mean loss of every model, and the mixture; of a sweep nothing."""
    values: dict[str, float] = {}
    if (run_dir / "evaluation.json").exists():
        figures = files.read_json(run_dir / "evaluation.json")
        values |= {f"mean_loss/{name}": model["mean_loss"] for name, model in figures.items()}
    if (run_dir / "weights.json").exists():
        values |= flat({"weights": files.read_json(run_dir / "weights.json")["weights"]})
    return values


# ── Backends, imported only when asked for ──────────────────────────────────────────


class _Wandb:
    def __init__(self, tracking: Tracking, subject: Subject) -> None:
        options = tracking.options
        # Otherwise wandb would silently take another folder.
        (tracking.folder / "wandb").mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_contained(tracking.folder))
            import wandb

            mode = _mode(options)
            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                group=tracking.group[-128:],
                name=subject.name[-128:],
                tags=options.tags,
                job_type=subject.stage,
                id=subject.id,
                resume="allow",
                mode=mode,
                config=dict(tracking.config),
                allow_val_change=True,  # where the run is continued with other free keys
                settings=wandb.Settings(
                    root_dir=str(tracking.folder),
                    console="off",
                    # No run of the whole interpreter, which would stay where closing fails.
                    reinit="create_new",
                    # Seconds; what is not sent then stays on disk for `wandb sync`.
                    finish_timeout=20,
                    # An address of a repository, and the command line, may hold passwords.
                    disable_git=True,
                    x_disable_meta=True,
                    # Seconds: what is lost when wandb's own process is killed.
                    x_transaction_log_flush_interval=1,
                ),
            )
            # The axis is ours: after a kill some steps come again, and wandb's own count would drop
            # them.
            self._run.define_metric("*", step_metric="step")
            self._closing = stack.pop_all()
        where = (
            "disabled"
            if self._run.disabled
            else self._run.url or f"offline, {Path(self._run.dir).parent}"
        )
        self.place = f"wandb: {where}"

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def artifact(self, name: str, paths: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(name, type="report")
        for path in paths:
            artifact.add_file(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        with self._closing:
            self._run.finish(exit_code=exit_code)


def _mode(options: TrackingOptions) -> Any:
    """online, offline, or None: as the environment and wandb's own settings say. Asks nobody, and
    uses no network."""
    import wandb

    if options.mode == "offline":
        return "offline"
    try:
        known, why = wandb.login(prompt=False, verify=False), "no login was found"
    except wandb.errors.AuthenticationError as error:
        known, why = False, str(error)
    if options.mode == "online":
        if not known:
            raise UserError(
                f"tracking.mode=online: {why}; run `wandb login`, or set WANDB_API_KEY; or use "
                "tracking.mode=offline, which needs no account"
            )
        return "online"
    return None if known or os.environ.get("WANDB_MODE", "online") != "online" else "offline"


@contextlib.contextmanager
def _contained(folder: Path) -> Iterator[None]:
    """wandb's own files in `folder`, its messages unsaid, its errors sent nowhere; at the end,
    nothing of it stays.

    Its process must not outlive a run: a child job, perhaps on another machine, would try to talk
    to it.
    """
    import wandb

    own = str(folder.resolve() / "wandb")
    settings = {
        "WANDB_DATA_DIR": own,
        "WANDB_CACHE_DIR": own,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    before = {name: os.environ.get(name) for name in settings}
    hooks = sys.exit, sys.excepthook
    os.environ |= settings
    try:
        yield
    finally:
        with contextlib.suppress(*_ANY):  # its process may be gone
            wandb.teardown()
        sys.exit, sys.excepthook = hooks
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _TensorBoard:
    def __init__(self, tracking: Tracking, subject: Subject) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = tracking.folder / "tensorboard" / subject.name.strip("/")
        # Whatever a killed run wrote after its last checkpoint comes again.
        self._writer = SummaryWriter(str(folder), purge_step=subject.step + 1)
        self.place = f"tensorboard: {folder}"

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, float(value), step)

    def summary(self, values: Mapping[str, float]) -> None:
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in values.items())
        self._writer.add_text("summary", f"| | |\n|---|---|\n{rows}")

    def artifact(self, name: str, paths: Sequence[Path]) -> None:
        """TensorBoard keeps no files."""

    def close(self, exit_code: int) -> None:
        self._writer.close()


_BACKENDS: dict[str, Callable[[Tracking, Subject], Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
}

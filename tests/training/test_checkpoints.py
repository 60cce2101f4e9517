"""Checkpoints that are written while training goes on: whatever happens to a process meanwhile, the
run continues from a whole one."""

import datetime
import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engines, forked, saves
from helpers.command import Outcome, environment
from helpers.processes import checkpoints, reached, read, wait_for

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.model import folders
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import engine
from doremi_train.parallel.comm import Lost
from doremi_train.parallel.place import Place
from doremi_train.parallel.world import World
from doremi_train.storage import checkpoint, parts
from doremi_train.storage.runs import Run
from doremi_train.training import checkpoints as ours
from doremi_train.training.checkpoints import Saver
from doremi_train.training.task import TrainingFailed


def saver(folder: Path, size: int = 1, timeout: float = 0.5) -> Saver:
    made = Saver(Run(folder, "run", {}), 2, timeout)
    made._world = World(0, size)
    return made


def piece(value: float = 1.0) -> parts.Piece:
    return parts.share("w", torch.full((5,), value), 0, 1)


def test_what_is_saved_is_as_it_was_when_it_was_asked_for(tmp_path: Path) -> None:
    of, tensor = saver(tmp_path), torch.ones(1_000_000)
    for step in (1, 2, 3):
        of.save(step, {"state": [tensor[:2]]}, [parts.share("w", tensor, 0, 1)])
        tensor += 1
    of.settle()
    assert of.completed() == 3 and of.completed() is None
    saved = ours.newest(of._run)
    assert saved is not None and saved.step == 3 and saved.whole("w").unique().tolist() == [3]
    assert saved.values["state"][0].tolist() == [3, 3]
    assert len(checkpoint.paths(of._folder)) == 2


def test_what_goes_wrong_in_the_background_is_raised_where_processes_meet(tmp_path: Path) -> None:
    of = saver(tmp_path)
    of._folder.parent.mkdir(parents=True)
    of._folder.write_text("not a folder")
    of.save(1, {}, [piece()])
    assert of._thread is not None
    of._thread.join()
    assert of.failed
    with pytest.raises(OSError, match="checkpoints"):
        of.settle()
    of.close()


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    place, options = Place("single", torch.device("cpu"), False, {}), OptimizerOptions()
    of = saver(tmp_path)

    def model(width: int) -> Any:
        return folders.build(engines.CONFIG | {"vocab_size": 20, "intermediate_size": width}, 0)

    trained = engine.build(place, model(64), options)
    trained.model(torch.zeros(1, 5, dtype=torch.int64)).sum().backward()
    trained.step(1e-3)
    of.save(1, {}, trained.pieces())
    of.settle()
    saved = checkpoint.read(checkpoint.paths(of._folder)[0])
    again = engine.build(place, model(64), options, saved)
    one, other = ({p.name: p.values for p in of.pieces()} for of in (trained, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(UserError, match=r"32, 64\] for .*4h_to_h.weight, .* \[32, 65\]") as error:
        engine.build(place, model(65), options, saved)
    assert f"delete {of._folder}" in str(error.value)
    of.save(2, {}, (piece for piece in trained.pieces() if "layers.1" not in piece.name))
    of.settle()
    with pytest.raises(UserError, match=r"holds nothing for model/.*layers.1"):
        engine.build(place, model(64), options, checkpoint.read(checkpoint.paths(of._folder)[1]))


def begun(of: Saver, step: int) -> Path:
    """The first of two processes has its part."""
    of.save(step, {}, [piece()._replace(values=torch.ones(3))])
    path = checkpoint.of_step(of._folder, step)
    wait = time.monotonic() + 5
    while not (path / parts.part_name(0, 2)).exists() and time.monotonic() < wait:
        time.sleep(0.01)
    return path


def other(path: Path, start: str, **said: object) -> None:
    """The second has its part too, or says why not."""
    rest = parts.Piece("w", (5,), 3, torch.ones(2))
    record = said or parts.write(path / parts.part_name(1, 2), [rest])
    files.write_json(path / "part-00001.json", {**record, "start": start})


def test_a_manifest_waits_for_the_parts_of_this_start(tmp_path: Path) -> None:
    of = saver(tmp_path, 2, timeout=30)
    path = begun(of, 1)
    other(path, "another")
    time.sleep(0.1)
    assert not checkpoint.paths(of._folder)
    other(path, of._start)
    of.settle()
    assert checkpoint.read(path).whole("w").tolist() == [1] * 5
    assert not (path / "part-00001.json").exists()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"errno": errno.ENOSPC, "file": "x", "text": "no room", "kind": "OSError"}, OSError),
        ({"errno": None, "file": None, "text": "odd", "kind": "KeyError"}, TrainingFailed),
    ],
)
def test_another_process_s_error_is_raised_by_all(
    said: dict[str, object], error: type[Exception], tmp_path: Path
) -> None:
    of = saver(tmp_path, 2, timeout=30)
    other(begun(of, 1), of._start, error=said)
    with pytest.raises(error, match=str(said["text"])):
        of.settle()


def test_a_process_that_writes_nothing_is_given_up(tmp_path: Path) -> None:
    of = saver(tmp_path, 2)
    begun(of, 1)
    with pytest.raises(Lost, match=r"process 1 gave no sign .*training.timeout=0.5 s"):
        of.settle()


def test_a_process_whose_part_takes_long_is_waited_for(tmp_path: Path) -> None:
    """As one that sends it far away."""
    of = saver(tmp_path, 2, timeout=0.4)
    path = begun(of, 1)
    with ours._signs_of_life(path / "part-00001.alive", 0.4):
        time.sleep(1.2)
    assert of.writing
    other(path, of._start)
    of.settle()
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", parts.part_name(0, 2), parts.part_name(1, 2)
    ]  # fmt: skip


# ── Two processes ───────────────────────────────────────────────────────────────────

KILLS = int(os.environ.get("KILLS", "1"))  # of each engine
OFTEN = (
    f"training.steps={20 + 8 * KILLS}",
    "training.checkpoint_every=1",
    "evaluation.every=1000",
)


@pytest.fixture(scope="module")
def launch(module_fresh: list[str]) -> Callable[..., list[forked.Forked]]:
    """Both processes of `launch(engine, store)`, which train a reference in a store that has the
    data."""
    given = module_fresh[-1]
    data = Path(given.removeprefix("store=")) / "data"

    def start(
        engine: str, store: Path, before: Callable[[], None] = forked.nothing
    ) -> list[forked.Forked]:
        store.mkdir(exist_ok=True)
        if not (store / "data").exists():
            (store / "data").symlink_to(data.resolve())
        overrides = [*module_fresh, *OFTEN, "stage=reference", f"engine={engine}"]
        overrides += [f"store={store}", f"run_dir={store / 'run'}"]
        return forked.ranks(2, overrides, environment(), before=before)

    return start


@pytest.fixture(scope="module")
def never(
    launch: Callable[..., list[forked.Forked]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], bytes]:
    """The model of an engine that was never killed."""
    known: dict[str, bytes] = {}

    def model(engine: str) -> bytes:
        if engine not in known:
            store = tmp_path_factory.mktemp(engine)
            assert ended(launch(engine, store)).code == 0
            known[engine] = left(store)
        return known[engine]

    return model


def ended(processes: list[forked.Forked]) -> Outcome:
    return Outcome(*forked.ended(processes, 300))


def left(store: Path) -> bytes:
    return (store / "run/reference/model/model.safetensors").read_bytes()


@pytest.mark.acceptance
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_killed_during_background_saves(
    engine: str,
    launch: Callable[..., list[forked.Forked]],
    never: Callable[[str], bytes],
    tmp_path: Path,
) -> None:
    """At moments that come with the day; KILLS=10 takes so many for each engine. A save begins with
    every step, so that one is always being written."""
    dice = random.Random(f"{engine} {datetime.datetime.now(datetime.UTC).date()}")
    stage, fell = tmp_path / "run" / "reference", []
    for _ in range(KILLS):
        both = launch(engine, tmp_path)
        try:
            before = (checkpoints(stage) or [0])[-1]
            wait_for(lambda before=before: reached(stage, before + 1) or done(stage), both[0])
            time.sleep(dice.uniform(0, 0.3))
        finally:
            for process in both:
                process.kill()
            for process in both:
                process.communicate()
        folders = [path.name for path in (stage / "checkpoints").glob("step-*")]
        fell.append((checkpoints(stage)[-1:], sorted(folders)[-1:]))
    last = ended(launch(engine, tmp_path))
    assert last.code == 0, (last, fell)
    assert left(tmp_path) == never(engine), fell
    assert not list(stage.glob("checkpoints*"))


def done(stage: Path) -> bool:
    return (stage / "result.json").exists()


@pytest.mark.acceptance
def test_a_process_killed_in_the_middle_of_its_part(
    launch: Callable[..., list[forked.Forked]], never: Callable[[str], bytes], tmp_path: Path
) -> None:
    first, second = launch("fsdp2", tmp_path, saves.killed)
    outcome = ended([first])
    assert outcome.code == 1 and "another process ended" in outcome.err, outcome
    assert second.wait(60) != 0
    stage = tmp_path / "run" / "reference"
    assert checkpoints(stage) == [saves.AFTER - 1, saves.AFTER]
    assert list(stage.glob("checkpoints/*/.*.partial"))
    again = ended(launch("fsdp2", tmp_path))
    assert again.code == 0 and left(tmp_path) == never("fsdp2"), again


@pytest.mark.acceptance
def test_a_disk_that_is_full_for_one_process_stops_both(
    launch: Callable[..., list[forked.Forked]], tmp_path: Path
) -> None:
    outcome = ended(launch("fsdp2", tmp_path, saves.full))
    assert outcome.code == 1 and "no room left" in outcome.err, outcome
    stage = tmp_path / "run" / "reference"
    assert read(stage / "status.json")["state"] == "failed" and not checkpoints(stage)
    assert not list(stage.glob("checkpoints/*/.*.partial"))

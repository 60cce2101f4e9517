"""Messages tell to delete a folder of the store. Whichever it is, and whenever, the same command
then ends in the same result."""

import random
import shutil
import time
from pathlib import Path

import pytest
from helpers import forked
from helpers.command import environment, run_here
from helpers.processes import ended, read, reaped

pytestmark = pytest.mark.acceptance
ASKED = (
    "reference.losses=cached", "training.checkpoint_every=4", "main.comparisons=[]", "seed=47"
)  # fmt: skip
RESULTS = ("weights.json", "evaluation.json")


def folders(store: Path) -> list[Path]:
    """What a message may name: the whole store, its prepared data, each run, each table of
    losses."""
    return [store, *sorted(path for path in store.glob("*/*") if path.is_dir())]


def results(run_dir: Path) -> list[object]:
    return [read(run_dir / name) for name in RESULTS]


def test_any_folder_of_a_finished_store_may_be_deleted(tiny: list[str], tmp_path: Path) -> None:
    store, run_dir = tmp_path / "store", tmp_path / "run"
    command = [*tiny, *ASKED, f"store={store}", f"run_dir={run_dir}"]
    first = run_here(*command)
    assert first.code == 0, first
    expected, names = results(run_dir), [path.relative_to(store) for path in folders(store)]
    assert {name.parts[0] for name in names[1:]} >= {"data", "runs"}
    for name in names:
        shutil.rmtree(store / name)
        again = run_here(*command)
        assert again.code == 0, (name, again)
        assert results(run_dir) == expected, name


def test_a_folder_may_be_deleted_while_a_command_is_at_work(
    tiny: list[str], tmp_path: Path
) -> None:
    """That command may end with a message; the next one has a working store."""

    def command(name: str) -> list[str]:
        return [*tiny, *ASKED, f"store={tmp_path / name}", f"run_dir={tmp_path / name}-run"]

    alone = run_here(*command("alone"))
    assert alone.code == 0, alone
    expected, many = results(tmp_path / "alone-run"), len(folders(tmp_path / "alone"))
    dice = random.Random(47)
    for name in ("one", "two"):
        (process,) = forked.ranks(1, command(name), environment())
        with reaped(process):
            moment = dice.randrange(2, many)
            while process.poll() is None and len(folders(tmp_path / name)) < moment:
                time.sleep(0.002)
            gone = dice.choice(folders(tmp_path / name))
            shutil.rmtree(gone, ignore_errors=True)  # some of it may be written right now
            outcome = ended(process)
        assert "Traceback" not in outcome.err, (gone, outcome)
        again = run_here(*command(name))
        assert again.code == 0, (gone, again)
        assert results(tmp_path / f"{name}-run") == expected, gone

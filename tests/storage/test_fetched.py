"""What comes from a second home is what was put there, and comes to where it belongs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from doremi_train.config import UserError
from doremi_train.storage.mirror import Mirror
from doremi_train.storage.runs import CHECKSUMS, Run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The second home of a finished run of three files."""
    run = made(tmp_path / "first", tmp_path / "home")
    run.begin()
    (run.folder / "model").mkdir(parents=True)
    (run.folder / "model" / "weights").write_bytes(b"1234")
    (run.folder / "log.jsonl").write_bytes(b"{}")
    run.finish({"loss": 1})
    return tmp_path / "home"


def made(store: Path, home: Path) -> Run:
    run = Run(store, "run", {"seed": 1})
    run.mirror = Mirror(str(home))
    return run


def test_a_finished_run_comes_back_whole(home: Path, tmp_path: Path) -> None:
    sums = json.loads((home / CHECKSUMS).read_text())
    assert sorted(sums) == ["log.jsonl", "model/weights", "recipe.json", "result.json"]
    other = made(tmp_path / "second", home)
    other.fetch()
    assert other.finished and (other.folder / "model" / "weights").read_bytes() == b"1234"


DAMAGE: list[Callable[[Path], object]] = [
    lambda home: (home / "model" / "weights").write_bytes(b"1235"),  # of the same size
    lambda home: (home / "log.jsonl").write_bytes(b""),
    lambda home: (home / "log.jsonl").unlink(),
    lambda home: (home / CHECKSUMS).write_bytes(b"{"),
    lambda home: (home / CHECKSUMS).write_bytes(b"[1]"),
    lambda home: (home / "result.json").write_bytes(b'{"loss": 0}'),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_was_damaged_there_is_computed_and_put_there_again(
    damage: Callable[[Path], object],
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(home)
    other = made(tmp_path / "second", home)
    other.fetch()
    assert not other.finished and "computed again" in capsys.readouterr().out
    assert not (home / "result.json").exists()
    shutil.copytree(tmp_path / "first", tmp_path / "second", dirs_exist_ok=True)
    other.publish()
    third = made(tmp_path / "third", home)
    third.fetch()
    assert third.finished and (third.folder / "model" / "weights").read_bytes() == b"1234"


def test_a_run_without_checksums_is_that_of_an_older_version(home: Path, tmp_path: Path) -> None:
    (home / CHECKSUMS).unlink()
    other = made(tmp_path / "second", home)
    other.fetch()
    assert other.finished


def test_what_is_not_in_the_list_does_not_come(home: Path, tmp_path: Path) -> None:
    (home / "more.json").write_bytes(b"{}")
    other = made(tmp_path / "second", home)
    other.fetch()
    assert other.finished and not (other.folder / "more.json").exists()


OUTSIDE = ["../up", "model/../../up", "/up", "checkpoints/../../up.pt", "a//b", "./up"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_a_folder(name: str, home: Path, tmp_path: Path) -> None:
    """Of a list of checksums, and of objects, whose names may be anything."""
    listed = json.loads((home / CHECKSUMS).read_text())
    (home / CHECKSUMS).write_text(json.dumps({name: "0" * 64} | listed))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/home/log", b"x")
    mirror = Mirror(str(home))
    with pytest.raises(UserError, match="leads out of its folder"):
        mirror.pull(tmp_path / "second" / "run", name)
    mirror._fs, mirror._path = memory, "/home"
    memory.store[f"/home/{name}"] = memory.store["/home/log"]
    with pytest.raises(UserError, match="leads out of its folder"):
        mirror.sizes()
    made(tmp_path / "second", home).fetch()
    assert not [*tmp_path.rglob("up*")]

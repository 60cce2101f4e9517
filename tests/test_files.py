"""Files are whole or not there; logs are cut back to where a run continues from."""

import contextlib
import math
import os
from pathlib import Path

import pytest

from doremi_train import files


def test_json_reads_back_exactly_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    value = {"α": [0.1 + 0.2, 1e-300, 5e-324, 1 / 3], "n": 1 << 60}
    files.write_json(tmp_path / "sub" / "a.json", value)
    files.write_json(tmp_path / "sub" / "a.json", value)
    assert files.read_json(tmp_path / "sub" / "a.json") == value
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.json"]


def test_a_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", math.nan)
    assert files.read_json(tmp_path / "a.json") == 1


def test_a_link_is_relative_and_can_be_replaced(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "store" / name).mkdir(parents=True)
        files.link(tmp_path / "run" / "link", tmp_path / "store" / name)
    assert (tmp_path / "run" / "link").readlink() == Path("../store/two")


def log(path: Path, start: int, *steps: int) -> None:
    lines = files.JsonLines(path, start)
    for step in steps:
        lines.write({"step": step, "loss": step / 3})
    lines.sync()
    lines.close()


def test_a_log_continues_from_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log(path, 0, 1, 2, 3, 4)
    log(path, 2, 3)
    assert list(files.read_lines(path)) == [{"step": s, "loss": s / 3} for s in (1, 2, 3)]
    log(path, 0, 1)
    assert [line["step"] for line in files.read_lines(path)] == [1]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log(path, 0, 1, 2)
    path.write_bytes(path.read_bytes()[:-4])
    assert [line["step"] for line in files.read_lines(path)] == [1]
    log(path, 2, 3)
    assert [line["step"] for line in files.read_lines(path)] == [1, 3]


def test_leftovers_of_kills_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    inner, folder = tmp_path / "epochs", files.aside_of(tmp_path / "step-000000004")
    for made in (inner, folder):
        made.mkdir()
        (made / "config.json").touch()
    left = [tmp_path / "step-000000010.32484.partial", files.aside_of(inner / "result.json")]
    files.aside_of(tmp_path / "main").symlink_to("nowhere")
    mine = [tmp_path / "notes.partial", tmp_path / ".rsync.partial", inner / "config.json"]
    for path in (*left, *mine):
        path.touch()
    files.clear_partial(tmp_path)
    assert set(tmp_path.rglob("*")) == {inner, *mine}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for content in ("one", "two"):
        with files.replacing_folder(path) as aside:
            (aside / content).touch()
    with contextlib.suppress(ValueError), files.replacing_folder(path) as aside:
        (aside / "three").touch()
        raise ValueError
    assert [entry.relative_to(tmp_path) for entry in tmp_path.rglob("*")] == [
        Path("model"),
        Path("model/two"),
    ]


def test_a_folder_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync = tmp_path / "model", os.fsync
    synced = []

    def noted(handle: int) -> None:
        fsync(handle)
        synced.append((Path(f"/proc/self/fd/{handle}").readlink().name, path.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    with files.replacing_folder(path) as aside:
        (aside / "sub").mkdir()
        for name in ("one", "sub/two"):
            (aside / name).touch()
    assert {("one", False), ("two", False)} < set(synced)


def test_a_file_is_made_once_and_what_kills_left_of_it_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a[1].json"
    other = files.aside_of(path.with_name("b.json"))
    with files.making(path) as todo:
        assert todo
        files.aside_of(path).touch()  # and here it is killed
        other.touch()
    made = []
    for _ in range(2):
        with files.making(path) as todo:
            made.append(todo)
            files.write_json(path, 1)
    assert made == [True, False]
    assert {one.name for one in path.parent.iterdir()} == {path.name, ".a[1].json.lock", other.name}


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(files.read_lines(tmp_path / "none.jsonl")) == []


def test_a_lock_is_waited_for_and_the_wait_can_be_ended(tmp_path: Path) -> None:
    class Told(Exception):
        pass

    def tell() -> None:
        raise Told

    path = tmp_path / "lock"
    with files.locked(path), pytest.raises(Told), files.locked(path, tell):
        pytest.fail("two hold it")
    with files.locked(path, tell):  # free again
        pass

"""A run's folder is held by one command at a time, also where it is damaged, or deleted."""

import shutil
import threading
from pathlib import Path

import pytest

from doremi_train import config, files
from doremi_train.storage import runs
from doremi_train.storage.runs import LOCK, Run, Unusable, lock


def finished(store: Path) -> Run:
    run = Run(store, "kind", {"a": 1})
    with lock(run.folder, "first"):
        run.begin()
        (run.folder / "model").write_bytes(b"1234")
        run.finish({"b": 2})
    runs._sound.clear()  # as another process
    return run


def test_who_only_looks_at_a_damaged_run_leaves_it(tmp_path: Path) -> None:
    """Another may have computed it again before the one that looked comes to reject it."""
    damaged, slow = finished(tmp_path), Run(tmp_path, "kind", {"a": 1})
    (damaged.folder / "model").write_bytes(b"12")
    assert not slow.finished and (slow.folder / "result.json").exists()
    with lock(damaged.folder, "quick"):
        damaged.begin()
        assert not (slow.folder / "result.json").exists()
        (damaged.folder / "model").write_bytes(b"1234")
        damaged.finish({"b": 2})
    runs._sound.clear()
    with lock(slow.folder, "slow"):
        assert slow.finished and slow.settled is False


def test_a_damaged_copy_is_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, copy = finished(tmp_path / "store"), tmp_path / "run" / "kind"
    shutil.copytree(run.folder, copy)
    shutil.rmtree(run.folder)
    (copy / "model").write_bytes(b"12")
    run.begin()
    run.take_over(copy)
    assert not run.finished and "computed again" in capsys.readouterr().out
    assert not (run.folder / "result.json").exists()


def test_a_run_that_another_began_anew_is_not_finished_by_the_first(tmp_path: Path) -> None:
    one, two = (Run(tmp_path, "kind", {"a": 1}) for _ in range(2))
    with lock(one.folder, "one"):
        one.begin()
        shutil.rmtree(one.folder)
        with lock(two.folder, "two"):  # it waits for nobody: that folder is another
            two.begin()
            with pytest.raises(Unusable, match="deleted while it was at work"):
                one.finish({"b": 1})
            two.finish({"b": 2})
    assert two.result() == {"b": 2}


def test_who_waited_for_a_folder_that_was_deleted_waits_for_the_one_in_its_place(
    tmp_path: Path,
) -> None:
    folder, asked, entered = tmp_path / "run", threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        with lock(folder, "third"):
            entered.set()

    third = threading.Thread(target=wait)
    with lock(folder, "first"):
        third.start()
        assert asked.wait(60)
        shutil.rmtree(folder)
        second = lock(folder, "second")
        second.__enter__()
    held = files.take_lock(folder / LOCK)
    assert held is None and not entered.wait(0.5)
    second.__exit__(None, None, None)
    assert entered.wait(60)
    third.join()


def test_the_same_command_twice_is_refused_once(tmp_path: Path) -> None:
    with (
        lock(tmp_path, "run"),
        pytest.raises(config.UserError, match="in use by run "),
        lock(tmp_path, "run"),
    ):
        pass

"""Checkpoints: exact there and back, the newest sound one wins, nothing that could run code is
read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from doremi_train.config import UserError
from doremi_train.storage import checkpoint


def content(step: int) -> dict[str, Any]:
    tensor = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return {
        "step": step,
        "state": [tensor, torch.tensor(step)],
        "model": {"w": tensor.float()},
        "optimizer": {0: [1.5]},
    }


def saved(folder: Path, steps: int, keep: int = 10) -> list[Path]:
    for step in range(1, steps + 1):
        checkpoint.save(folder, step, content(step), keep)
    return sorted(folder.glob("*.pt"))


def test_comes_back_exactly(tmp_path: Path) -> None:
    saved(tmp_path / "c", 2)
    found = checkpoint.latest(tmp_path / "c")
    assert found is not None and found["step"] == 2 and found["optimizer"] == {0: [1.5]}
    assert (
        torch.equal(found["state"][0], content(2)["state"][0])
        and found["state"][0].dtype == torch.float64
    )
    assert torch.equal(found["model"]["w"], content(2)["model"]["w"])


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None


def test_only_the_last_few_are_kept_and_nothing_is_left_beside_them(tmp_path: Path) -> None:
    saved(tmp_path, 5, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-00000000{step}{suffix}" for step in (4, 5) for suffix in (".pt", ".sha256")
    ]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    checkpoint.save(tmp_path, 1, {"step": 1, "new": True}, 2)
    assert checkpoint.latest(tmp_path) == {"step": 1, "new": True}


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_checksum(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def spoil_checksum(path: Path) -> None:
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("damage", [tear, flip, lose_checksum, spoil_checksum])
def test_a_damaged_newest_is_named_and_passed_over(
    tmp_path: Path, damage: Any, capsys: Any
) -> None:
    newest = saved(tmp_path, 3)[-1]
    damage(newest)
    found = checkpoint.latest(tmp_path)
    assert found is not None and found["step"] == 2
    assert newest.name in capsys.readouterr().out


def test_all_damaged_is_a_start_from_the_beginning(tmp_path: Path) -> None:
    for path in saved(tmp_path, 2):
        tear(path)
    assert checkpoint.latest(tmp_path) is None


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path, capsys: Any) -> None:
    checkpoint.save(tmp_path, 1, {"evil": Evil()}, 1)
    with pytest.raises(UserError, match="could run code"):
        checkpoint.latest(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_remove_takes_the_leftovers_of_a_kill_too(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    saved(folder, 2)
    (folder / "step-000000003.99.partial").write_bytes(b"half")
    (folder / ".step-000000003.sha256.99.partial").write_bytes(b"half")
    checkpoint.remove(folder)
    assert not folder.exists()
    checkpoint.remove(folder)  # of nothing: fine

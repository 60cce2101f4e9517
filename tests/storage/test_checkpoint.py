"""Checkpoints: exact there and back however they are divided, the newest sound one wins, nothing
that could run code is read."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.storage import checkpoint, parts
from doremi_train.storage.mirror import Mirror
from doremi_train.storage.parts import MANIFEST, Piece, Saved, Unsound


def weight(step: int) -> Tensor:
    return torch.rand(5, 3, generator=torch.Generator().manual_seed(step))


def save(folder: Path, step: int, keep: int = 10, size: int = 2, more: Any = None) -> Path:
    """A checkpoint of `size` processes, one after another."""
    values, tensors = parts.divide(
        {"state": [torch.tensor([0.1, math.inf], dtype=torch.float64), 7], "more": more}
    )
    path, records = checkpoint.of_step(folder, step), []
    for rank in range(size):
        pieces = [parts.share(f"model/{n}", weight(step + n), rank, size) for n in range(2)]
        pieces += [parts.share(name, tensor, rank, size) for name, tensor in tensors.items()]
        records.append(parts.write(path / parts.part_name(rank, size), pieces))
    return checkpoint.complete(folder, step, values, records, keep)


def latest(folder: Path) -> int | None:
    path = checkpoint.newest(folder, checkpoint.fault)
    return checkpoint.step_of(path) if path is not None else None


@pytest.mark.parametrize("size", [1, 2, 4, 7, 40])
def test_comes_back_exactly_in_any_parts(tmp_path: Path, size: int) -> None:
    saved = checkpoint.read(save(tmp_path, 3, size=size, more={"a": torch.zeros(0, 4), "b": None}))
    assert saved.step == 3
    for n in range(2):
        assert torch.equal(saved.whole(f"model/{n}"), weight(3 + n))
        flat = weight(3 + n).flatten()
        for start in range(16):
            for stop in range(start, 16):
                assert torch.equal(saved.read(f"model/{n}", start, stop), flat[start:stop])
    (state, seven), more = saved.values["state"], saved.values["more"]
    assert state.dtype == torch.float64 and state.tolist() == [0.1, math.inf] and seven == 7
    assert more["a"].shape == (0, 4) and more["b"] is None


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None


def test_only_the_last_few_are_kept_and_nothing_is_left_beside_them(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        f"step-00000000{step}/{name}"
        for step in (4, 5)
        for name in (MANIFEST, parts.part_name(0, 2), parts.part_name(1, 2))
    ]


def test_a_checkpoint_counts_when_its_manifest_is_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / MANIFEST).unlink()
    assert latest(tmp_path) == 1
    checkpoint.begin(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


PART = parts.part_name(1, 2)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    """The part of the same process in the checkpoint before."""
    path.write_bytes((path.parents[1] / "step-000000002" / path.name).read_bytes())


def edited(path: Path) -> None:
    """A number that is no tensor's."""
    path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step": 4'))


def renamed(path: Path) -> None:
    """Whoever can write a checksum can write another path too."""
    content = json.loads(path.read_bytes())["manifest"]
    content["parts"][0]["name"] = "../../../etc/passwd"
    path.write_text(json.dumps({"manifest": content, "sha256": parts._digest(content)}))


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (tear, PART, f"{PART} has .* bytes where"),
        (flip, PART, f"{PART} has another checksum"),
        (foreign, PART, f"{PART} has another checksum"),
        (Path.unlink, PART, f"{PART} is missing"),
        (tear, MANIFEST, f"{MANIFEST} is not one"),
        (edited, MANIFEST, f"{MANIFEST} has another checksum"),
        (renamed, MANIFEST, f"{MANIFEST} is not one"),
    ],
)
def test_a_damaged_newest_is_named_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], object], name: str, said: str, capsys: Any
) -> None:
    for step in (1, 2, 3):
        newest = save(tmp_path, step)
    damage(newest / name)
    assert latest(tmp_path) == 2
    out = capsys.readouterr().out
    assert newest.name in out and "the one before it is used" in out
    with pytest.raises(UserError, match=said):
        checkpoint.read(newest)


def test_all_damaged_is_a_start_from_the_beginning(tmp_path: Path) -> None:
    for step in (1, 2):
        tear(save(tmp_path, step) / PART)
    assert latest(tmp_path) is None


def test_a_gap_between_parts_is_found(tmp_path: Path) -> None:
    half = Piece("w", (4,), 2, torch.zeros(2))
    record = parts.write(tmp_path / parts.part_name(0, 1), [half])
    with pytest.raises(Unsound, match="do not make up w"):
        parts.manifest(1, {}, [record])
    other = parts.write(tmp_path / parts.part_name(1, 2), [Piece("w", (5,), 0, torch.zeros(2))])
    with pytest.raises(Unsound, match="another type or shape"):
        parts.manifest(1, {}, [record, other])


def test_another_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / MANIFEST
    content = json.loads(path.read_bytes())["manifest"] | {"format": 2, "version": "9.0"}
    path.write_text(json.dumps({"manifest": content, "sha256": parts._digest(content)}))
    with pytest.raises(UserError, match=r"9\.0.*delete") as error:
        latest(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_checkpoint_of_an_older_version_is_refused_unless_there_is_a_newer_one(
    tmp_path: Path,
) -> None:
    torch.save({"step": 4}, tmp_path / "step-000000004.pt")
    with pytest.raises(UserError, match="older version") as error:
        latest(tmp_path)
    assert f"delete {tmp_path}" in str(error.value) and "step-000000004.pt" in str(error.value)
    save(tmp_path, 1)
    assert latest(tmp_path) == 1


def test_remove_takes_the_leftovers_of_a_kill_too(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    save(folder, 2)
    files.aside_of(save(folder, 3) / PART).write_bytes(b"half")
    checkpoint.remove(folder)
    assert not folder.exists()
    checkpoint.remove(folder)  # of nothing: fine


# ── A second home ───────────────────────────────────────────────────────────────────


def sent(run: Path, home: Mirror, *steps: int) -> None:
    """Save, and send what each process and then the first one sends."""
    (run / "recipe.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step":1}\n')
    for step in steps:
        path = save(run / checkpoint.FOLDER, step, keep=2)
        home.push(run, [f"{checkpoint.FOLDER}/{path.name}/{parts.part_name(n, 2)}" for n in (0, 1)])
        checkpoint.push(run, step, home)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_checkpoint_comes_back_from_its_second_home(tmp_path: Path, run: Path) -> None:
    home, other = Mirror(str(tmp_path / "home")), tmp_path / "other"
    sent(run, home, 1, 2, 3)
    kept = {name.split("/")[1] for name in home.sizes() if name.startswith(checkpoint.FOLDER)}
    assert kept == {"step-000000002", "step-000000003"}
    checkpoint.fetch(other, home)
    assert latest(other / checkpoint.FOLDER) == 3 and (other / "metrics.jsonl").exists()


@pytest.mark.parametrize("damage", [tear, flip, Path.unlink])
@pytest.mark.parametrize("name", [PART, MANIFEST])
def test_one_that_was_damaged_there_is_passed_over(
    damage: Callable[[Path], object], name: str, tmp_path: Path, run: Path, capsys: Any
) -> None:
    home, other = Mirror(str(tmp_path / "home")), tmp_path / "other"
    sent(run, home, 1, 2)
    damage(tmp_path / "home" / checkpoint.FOLDER / "step-000000002" / name)
    checkpoint.fetch(other, home)
    assert latest(other / checkpoint.FOLDER) == 1
    out = capsys.readouterr().out
    assert "continues from" in out
    if (damage, name) != (Path.unlink, MANIFEST):  # without one it is none
        assert "step-000000002: torn or corrupt" in out


def test_a_newer_one_here_stays(tmp_path: Path, run: Path, capsys: Any) -> None:
    home = Mirror(str(tmp_path / "home"))
    sent(run, home, 1)
    save(run / checkpoint.FOLDER, 2)
    checkpoint.fetch(run, home)
    assert latest(run / checkpoint.FOLDER) == 2 and not capsys.readouterr().out
    tear(checkpoint.of_step(run / checkpoint.FOLDER, 2) / PART)
    (checkpoint.of_step(run / checkpoint.FOLDER, 1) / PART).unlink()
    checkpoint.fetch(run, home)
    assert latest(run / checkpoint.FOLDER) == 1


def test_those_of_an_older_version_there_are_refused(tmp_path: Path, run: Path) -> None:
    there = tmp_path / "home" / checkpoint.FOLDER
    there.mkdir(parents=True)
    torch.save({}, there / "step-000000004.pt")
    with pytest.raises(UserError, match="older version.*delete them there"):
        checkpoint.fetch(run, Mirror(str(tmp_path / "home")))


def test_the_reader_maps_the_file_and_gives_what_outlives_it(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    saved = Saved(path)
    whole = saved.whole("model/0")
    saved.close()
    checkpoint.remove(tmp_path)
    assert torch.equal(whole, weight(1))

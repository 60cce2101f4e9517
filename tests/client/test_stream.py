"""Draws in another trainer: a function of the step alone, whoever asks and however often the
mixture changes."""

import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from doremi_train.client import Mixed, Stream
from doremi_train.config import UserError
from doremi_train.data.sampler import Sampler

SIZES = {"web": 230, "code": 41, "a name, with [brackets]": 7, "never": 19}
WEIGHTS = {"web": 0.6, "code": 0.3995, "a name, with [brackets]": 0.1005, "never": 0.0} | {
    "code": 0.3, "a name, with [brackets]": 0.1
}  # fmt: skip
BATCH = 13


def write(path: Path, weights: dict[str, float]) -> Path:
    path.write_text(json.dumps(weights))
    return path


def changing(folder: Path, steps: int = 240, every: int = 20) -> list[list[tuple[int, int]]]:
    """(domain, sequence) of every step of a stream whose mixture changes three times."""
    file = write(folder / "mixture.json", WEIGHTS)
    stream, drawn = Stream(SIZES, BATCH, file, folder / "run", every, seed=5), []
    for step in range(steps):
        if step in (31, 97, 150):  # in the middle of a block: it counts from the next one on
            parts = np.random.default_rng(step).dirichlet(np.ones(4)).tolist()
            write(file, dict(zip(SIZES, parts, strict=True)))
        draw = stream.draw(step)
        drawn.append([*zip(draw.domain.tolist(), draw.sequence.tolist(), strict=True)])
    return drawn


def again(folder: Path, steps: list[int]) -> list[list[tuple[int, int]]]:
    """The same of another process that starts there."""
    stream = Stream(SIZES, BATCH, folder / "mixture.json", folder / "run", 20, seed=5)
    draws = map(stream.draw, steps)
    return [[*zip(d.domain.tolist(), d.sequence.tolist(), strict=True)] for d in draws]


def test_it_draws_what_our_own_trainer_draws(tmp_path: Path) -> None:
    stream = Stream(SIZES, BATCH, WEIGHTS, tmp_path, every=7, seed=3)
    ours = Sampler(np.array([*SIZES.values()]), tuple(SIZES), BATCH, 3)
    weights = np.array([*WEIGHTS.values()])
    counts = np.zeros(len(SIZES), np.int64)
    for step in range(100):
        wanted, found = ours.draw(step, weights, counts), stream.draw(step)
        counts = wanted.counts
        assert all((a == b).all() for a, b in zip(wanted, found, strict=True))


def test_every_sequence_comes_once_an_epoch_while_the_mixture_changes(tmp_path: Path) -> None:
    drawn = changing(tmp_path)
    for domain, size in enumerate(SIZES.values()):
        mine = [sequence for step in drawn for at, sequence in step if at == domain]
        assert len(mine) > size  # more than one epoch
        for start in range(0, len(mine), size):
            times = Counter(mine[start : start + size])
            assert set(times.values()) == {1}
    blocks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("run/blocks/*.json"))]
    changes = [b["step"] for a, b in pairwise(blocks) if a["weights"] != b["weights"]]
    assert changes == [40, 100, 160]


def test_any_step_is_found_at_once_by_whoever_starts_anew(tmp_path: Path) -> None:
    drawn = changing(tmp_path)
    write(tmp_path / "mixture.json", WEIGHTS)  # what is decided stays, whatever the file says now
    order = np.random.default_rng(0).permutation(len(drawn)).tolist()
    assert again(tmp_path, order) == [drawn[step] for step in order]


def _race(folder: Path, which: int, box: "multiprocessing.Queue[object]") -> None:
    parts = np.random.default_rng(which).dirichlet(np.ones(4)).tolist()
    stream = Stream(SIZES, BATCH, dict(zip(SIZES, parts, strict=True)), folder, every=3)
    box.put([[x.tolist() for x in stream.draw(step)] for step in range(60)])


def test_processes_that_would_decide_differently_draw_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    box: multiprocessing.Queue[object] = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, n, box)) for n in range(4)]
    for racer in racers:
        racer.start()
    found = [box.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert all(one == found[0] for one in found)
    weights = [json.loads(p.read_text())["weights"] for p in tmp_path.glob("blocks/*.json")]
    assert len(weights) == 20


def test_what_a_killed_process_left_half_written_is_gone(tmp_path: Path) -> None:
    stream = Stream(SIZES, BATCH, WEIGHTS, tmp_path)
    stream.draw(0)
    left = tmp_path / "blocks" / ".00000001.json.elsewhere-1.partial"
    left.write_text("{")
    Stream(SIZES, BATCH, WEIGHTS, tmp_path).draw(100)
    assert not left.exists()
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file() and p.name[0] != "."] == [
        "00000000.json",
        "00000001.json",
        "stream.json",
    ]


def test_a_schedule_says_the_weights_of_every_stage(tmp_path: Path) -> None:
    stages = [(0, WEIGHTS), (40, dict.fromkeys(SIZES, 0.25))]
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps({"schema": 1, "weights": WEIGHTS, "schedule": stages}))
    stream = Stream(SIZES, BATCH, file, tmp_path / "run", every=20)
    for step, weights in ((0, WEIGHTS), (39, WEIGHTS), (40, stages[1][1]), (90, stages[1][1])):
        assert stream.mapping(stream.weights(step)) == pytest.approx(weights, abs=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        '{"web": 0.6, "co',
        "[]",
        '{"web": 1.0}',
        '{"web": 2, "code": -1}',
        '{"weights": {}, "schedule": 3}',
        '{"weights": {}, "schedule": [[0, 1, 2]]}',
        '{"weights": {}, "schedule": [[0, [0.5, 0.5]]]}',
    ],
)
def test_a_file_that_is_no_mixture_leaves_the_weights_as_they_are(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mixture.json", WEIGHTS)
    stream = Stream(SIZES, BATCH, file, tmp_path / "run", every=10)
    before = stream.weights(0)
    file.write_text(text)
    assert (stream.weights(10) == before).all()
    said = " ".join(capsys.readouterr().out.split())
    assert "mixture.json" in said and "stays as it was from step 10 on" in said
    with pytest.raises(UserError, match=r"mixture\.json"):
        Stream(SIZES, BATCH, file, tmp_path / "other").draw(0)


def test_a_folder_of_another_stream_is_refused(tmp_path: Path) -> None:
    Stream(SIZES, BATCH, WEIGHTS, tmp_path, seed=1)
    Stream(SIZES, BATCH, None, tmp_path, seed=1)  # the mixture may be another
    for sizes, batch, seed, key in (
        (SIZES | {"web": 231}, BATCH, 1, "sizes"),
        (dict(reversed(SIZES.items())), BATCH, 1, "sizes"),
        (SIZES, 14, 1, "batch"),
        (SIZES, BATCH, 2, "seed"),
    ):
        with pytest.raises(UserError, match=f"another {key} .*give another folder"):
            Stream(sizes, batch, WEIGHTS, tmp_path, seed=seed)


@pytest.mark.parametrize(
    ("sizes", "batch", "every", "said"),
    [
        ({}, 4, 1, "no domain"),
        ({"a": 0}, 4, 1, "a=0: must be a whole number above 0"),
        ({"a": 1}, 0, 1, "batch=0"),
        ({"a": 1}, True, 1, "batch=True"),
        ({"a": 1}, 4, 0.5, r"every=0\.5"),
    ],
)
def test_what_is_no_stream_is_refused(
    sizes: dict[str, int], batch: int, every: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        Stream(sizes, batch, dict.fromkeys(sizes, 1.0), tmp_path, every)


def test_a_step_that_nobody_decides_ends_with_a_message(tmp_path: Path) -> None:
    stream = Stream(SIZES, BATCH, None, tmp_path, every=10, timeout=0.1)
    with pytest.raises(TimeoutError, match=r"step 20 .*raise the Learner's lag"):
        stream.draw(25)


def test_rows_of_a_dataset_are_those_of_the_draws(tmp_path: Path) -> None:
    domains = {
        name: [{"text": f"{name} {n}"} for n in range(size)] if name == "web" else np.arange(size)
        for name, size in SIZES.items()
    }
    stream = Stream(SIZES, BATCH, WEIGHTS, tmp_path)
    dataset = Mixed(domains, stream, steps=30)
    assert len(dataset) == 30 * BATCH
    for number in (0, 5, 17 * BATCH + 4, 30 * BATCH - 1):
        draw = stream.draw(number // BATCH)
        domain, sequence = (int(x[number % BATCH]) for x in draw[:2])
        item = dataset[number]
        assert item["domain"] == domain
        assert item.get("text") == f"web {sequence}" or item["labels"] == sequence
    with pytest.raises(IndexError):
        dataset[30 * BATCH]
    with pytest.raises(UserError, match="give both the same"):
        Mixed(domains | {"code": range(3)}, stream, steps=30)


def test_it_needs_no_torch() -> None:
    code = "import sys, doremi_train.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_sum_names_no_key_that_there_is_none_of(tmp_path: Path) -> None:
    path = tmp_path / "mixture.json"
    path.write_text('{"a": 0.5, "b": 0.4}')
    for given in ({"a": 0.5, "b": 0.4}, path):
        with pytest.raises(UserError, match=r"sum to 0\.9, not 1; correct them$"):
            Stream({"a": 5, "b": 5}, 2, given, tmp_path / "stream", every=1).draw(0)

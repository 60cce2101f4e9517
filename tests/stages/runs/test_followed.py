"""The final model on the mixture of a file that changes while it trains: what is drawn, what is
written down, and that a run which was killed ends in the same bits."""

import hashlib
import json
import shutil
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import forked
from helpers.command import Command, environment, start
from helpers.processes import ended, lines, reached, read, reaped, wait_for

from doremi_train.config import UserError
from doremi_train.data.batches import Batches
from doremi_train.training.followed import TRACE, Followed

NAMES = ("digits", "plain", "rich")
FIRST = {"digits": 0.7, "plain": 0.2, "rich": 0.1}
SECOND = {"digits": 0.9, "plain": 0.05, "rich": 0.05}
THIRD = {"digits": 0.8, "plain": 0.2, "rich": 0.0}
FOLLOWS = (
    "stage=main", "mixture=natural", "main.comparisons=[]", "main.mixture_every=10", "seed=74",
    "training.steps=60", "training.checkpoint_every=7", "evaluation.every=20",
)  # fmt: skip


def write(path: Path, weights: object) -> str:
    """As a user should: aside, and renamed. The file's SHA-256."""
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(weights))
    aside.rename(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of(followed: Followed, *steps: int) -> list[dict[str, float]]:
    """{domain: weight} of steps."""
    return [dict(zip(NAMES, followed(step).tolist(), strict=True)) for step in steps]


# ── Decisions ───────────────────────────────────────────────────────────────────────


def test_what_was_decided_is_on_disk_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "mixture.json"
    digests = [write(file, FIRST)]
    with Followed(file, 10, NAMES, tmp_path) as followed:
        assert of(followed, 0, 9) == [FIRST, FIRST]
        digests.append(write(file, SECOND))
        assert of(followed, 9, 10) == [FIRST, SECOND]  # from the next reading on
        trace = lines(tmp_path / TRACE)  # before any step draws from it
    assert trace == [
        {"step": 10 * n, "weights": weights, "sha256": digest}
        for n, (weights, digest) in enumerate(zip((FIRST, SECOND), digests, strict=True))
    ]
    write(file, THIRD)
    with (tmp_path / TRACE).open("ab") as torn:
        torn.write(b'{"step": 20, "weig')  # killed while it wrote
    with Followed(file, 10, NAMES, tmp_path) as again:
        assert of(again, 5, 14, 20, 3) == [FIRST, SECOND, THIRD, FIRST]
    assert [line["step"] for line in lines(tmp_path / TRACE)] == [0, 10, 20]


WRONG = [
    ('{"digits": 0.6, "pla', "not a JSON file"),
    ("[]", "must hold a JSON object"),
    ('{"digits": 1.0}', "no weight for plain, rich"),
    ('{"digits": 0.5, "plain": 0.5, "rich": 0, "other": 0}', "unknown domain 'other'"),
    ('{"digits": 0.5, "plain": 0.6, "rich": 0}', "sum to 1.1"),
    ('{"schedule": [[Infinity, {}]]}', "has no weights for this step"),
    ('{"digits": 1, "plain": 1' + 400 * "0" + ', "rich": 0}', "must be a finite number"),
    ('{"digits": 1e299, "plain": 1e300, "rich": 0}', "must be a finite number"),
    (None, "No such file"),
]


@pytest.mark.parametrize(("text", "why"), WRONG)
def test_a_file_that_is_no_mixture_leaves_the_one_before(
    text: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mixture.json"
    digest = write(file, FIRST)
    with Followed(file, 10, NAMES, tmp_path) as followed:
        followed(0)
        file.unlink() if text is None else file.write_text(text)
        assert of(followed, 10, 20) == [FIRST, FIRST]
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("stays as it was") == 1 and "from step 10 on" in said and why in said
        assert f"main.mixture_file={file}" in said
        *_, last = lines(tmp_path / TRACE)
        assert last["sha256"] == digest and why in last["refused"]
        write(file, SECOND)
        assert of(followed, 30) == [SECOND]
    if text is not None:
        file.write_text(text)
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"main\.mixture_file="):  # there is none before
        Followed(file, 10, NAMES, tmp_path / "other")(10)


def test_stages_begin_where_the_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mixture.json"
    write(file, {"weights": THIRD, "schedule": [[0, FIRST], [10, SECOND], [25, THIRD]]})
    with Followed(file, 10, NAMES, tmp_path) as followed:
        steps = (0, 9, 10, 25, 30)
        assert of(followed, *steps) == [FIRST, FIRST, SECOND, SECOND, THIRD]


# ── The main run ────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_every_sequence_comes_once_an_epoch_while_the_mixture_changes(
    fresh: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run_dir = tmp_path / "mixture.json", tmp_path / "run"
    digests, drawn = [write(file, FIRST)], []
    really = Batches.get

    def get(batches: Batches, step: int, *rest: Any) -> Any:
        batch = really(batches, step, *rest)
        drawn.append(batch.draw)
        if step in (13, 27):  # in the middle of what was decided
            digests.append(write(file, {13: SECOND, 27: THIRD}[step]))
        return batch

    monkeypatch.setattr(Batches, "get", get)
    overrides = [*fresh, *FOLLOWS, f"main.mixture_file={file}", f"run_dir={run_dir}"]
    overrides += [
        "training.batch_size=16",
        "training.sequence_length=128",
        "evaluation.every=60",
        "training.steps=40",
    ]
    assert command(*overrides, "stage=plan").code == 0
    assert f"follows main.mixture_file={file}" in " ".join(read(run_dir / "plan.json")["warnings"])
    outcome = command(*overrides)
    assert outcome.code == 0, outcome
    assert "another mixture from step 20 on" in " ".join(outcome.out.split())
    trace = lines(run_dir / "main" / TRACE)
    assert [line["step"] for line in trace] == [*range(0, 40, 10)]
    changes = [b["step"] for a, b in pairwise(trace) if a["weights"] != b["weights"]]
    assert changes == [20, 30]
    assert [trace[n]["sha256"] for n in (1, 2, 3)] == digests
    result, counts = read(run_dir / "main" / "result.json"), drawn[-1].counts
    epochs = 0
    for domain, name in enumerate(NAMES):
        mine = np.concatenate([d.sequence[d.domain == domain] for d in drawn]).tolist()
        size = round(counts[domain] / result["epochs"][name])
        assert len(mine) == counts[domain]
        for start_ in range(0, len(mine), size):
            times = Counter(mine[start_ : start_ + size])
            assert set(times.values()) == {1}
            epochs += len(times) == size
    assert epochs >= 1  # some domain was read more than once
    for first, line in zip(range(0, 40, 10), trace, strict=True):
        for domain, name in enumerate(NAMES):
            ours = sum(int((d.domain == domain).sum()) for d in drawn[first : first + 10])
            assert abs(ours - 160 * line["weights"][name]) < 2, (first, name)


def follow(file: Path, main: Path, changes: list[dict[str, float]], process: Any) -> None:
    """Change the file as soon as what it holds is used."""
    for after in range(len(changes)):
        wait_for(lambda: distinct(main / TRACE) > after, process)  # noqa: B023
        write(file, changes[after])


def distinct(trace: Path) -> int:
    """How many mixtures the trace has."""
    if not trace.exists():
        return 0
    return len({json.dumps(line["weights"]) for line in lines(trace)})


def replayed(trace: list[Any], file: Path) -> None:
    """The same decisions as a staged mixture."""
    write(file, {"schedule": [[line["step"], line["weights"]] for line in trace]})


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_bits(
    fresh: list[str], command: Command, tmp_path: Path
) -> None:
    file, run_dir, other = tmp_path / "mixture.json", tmp_path / "run", tmp_path / "other"
    write(file, FIRST)
    overrides = [*fresh, *FOLLOWS, f"main.mixture_file={file}"]
    process = start(*overrides, f"run_dir={run_dir}")
    with reaped(process):
        follow(file, run_dir / "main", [SECOND], process)
        wait_for(
            lambda: reached(run_dir / "main", 14) and distinct(run_dir / "main" / TRACE) == 2,
            process,
        )
        process.kill()
        assert ended(process).code == -signal.SIGKILL
    before = lines(run_dir / "main" / TRACE)
    assert len(before) < 6
    write(file, THIRD)  # what it says now is not what was used
    moved = tmp_path / "moved"
    run_dir.rename(moved)
    outcome = command(*overrides, f"run_dir={moved}")
    assert outcome.code == 0, outcome
    trace = lines(moved / "main" / TRACE)
    assert trace[: len(before)] == before and trace[-1]["weights"] == THIRD and len(trace) == 6
    # Another run_dir is another run, though its recipe says the same of everything else.
    replayed(trace, file)
    outcome = command(*overrides, f"run_dir={other}")
    assert outcome.code == 0, outcome
    assert (moved / "main").resolve() != (other / "main").resolve()
    for name in ("model/model.safetensors", "evaluations.jsonl"):
        assert (moved / "main" / name).read_bytes() == (other / "main" / name).read_bytes(), name
    # And finished, it is what it was, whatever the file says.
    write(file, FIRST)
    outcome = command(*overrides, f"run_dir={moved}")
    assert outcome.code == 0 and "in the store already" in outcome.out, outcome
    assert lines(moved / "main" / TRACE) == trace


@pytest.mark.acceptance
def test_it_goes_on_elsewhere_with_what_was_decided(
    fresh: list[str], command: Command, tmp_path: Path
) -> None:
    file, here, there = tmp_path / "mixture.json", tmp_path / "here", tmp_path / "there"
    write(file, FIRST)
    overrides = [*fresh, *FOLLOWS, f"main.mixture_file={file}", f"remote={tmp_path / 'second'}"]
    process = start(*overrides, f"run_dir={here}", f"store={tmp_path / 'lost'}")
    with reaped(process):
        follow(file, here / "main", [SECOND], process)
        wait_for(lambda: distinct(here / "main" / TRACE) == 2, process)
        process.send_signal(signal.SIGTERM)
        assert ended(process).code == 75
    before = lines(here / "main" / TRACE)
    assert len(before) < 6
    there.mkdir()
    shutil.copy(here / "mixture_file.json", there)
    shutil.rmtree(here)
    shutil.rmtree(tmp_path / "lost")
    write(file, THIRD)
    assert command(*overrides, f"run_dir={there}").code == 0
    trace = lines(there / "main" / TRACE)
    assert trace[: len(before)] == before and trace[-1]["weights"] == THIRD and len(trace) == 6


@pytest.mark.slow
def test_two_processes_are_as_one_while_the_file_changes(
    fresh: list[str], command: Command, tmp_path: Path
) -> None:
    file, both, one = tmp_path / "mixture.json", tmp_path / "both", tmp_path / "one"
    write(file, FIRST)
    overrides = [*fresh, *FOLLOWS, f"main.mixture_file={file}"]
    ranks = forked.ranks(2, [*overrides, f"run_dir={both}"], environment())
    follow(file, both / "main", [SECOND, THIRD], ranks[0])
    for code, _, said in [forked.ended(ranks, 300)]:
        assert code == 0, said
    trace = lines(both / "main" / TRACE)
    assert distinct(both / "main" / TRACE) == 3
    replayed(trace, file)
    assert command(*overrides, f"run_dir={one}").code == 0
    for name in ("metrics", "evaluations"):
        logs = (lines(run / "main" / f"{name}.jsonl") for run in (both, one))
        for a, b in zip(*logs, strict=True):
            key = "loss" if name == "metrics" else "mean_loss"
            assert a["step"] == b["step"] and abs(a[key] - b[key]) < 1e-4
    assert read(both / "main/result.json")["epochs"] == read(one / "main/result.json")["epochs"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["mixture=odm"], "adapts its mixture itself"),
        (["training.loss_weighting=rho"], "weighs by one mixture"),
        (["stage=compare"], "every main run"),
        ([], "unknown domain 'web'; the data has digits, plain, rich"),
        (["main.mixture_file=nothing.json"], "nothing.json"),
    ],
)
def test_a_mistake_is_named(
    more: list[str], said: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "mixture.json"
    write(file, FIRST if more else {"web": 1.0})
    given = [f"main.mixture_file={file}", f"run_dir={tmp_path / 'run'}", *FOLLOWS]
    for stage in ([], ["stage=plan"]) if not more else ([],):
        outcome = command(*tiny, *given, *more, *stage)
        assert outcome.code == 2 and said in " ".join(outcome.err.split()), outcome
        assert "main.mixture_file=" in outcome.err


def test_a_file_that_is_none_is_named_before_the_proxies(
    tiny: list[str], command: Command, tmp_path: Path
) -> None:
    given = [f"main.mixture_file={tmp_path / 'none.json'}", f"run_dir={tmp_path / 'run'}"]
    outcome = command(*tiny, *given, "stage=main", "seed=74")
    assert outcome.code == 2 and "none.json" in outcome.err, outcome
    assert not (tmp_path / "run" / "reference").exists()

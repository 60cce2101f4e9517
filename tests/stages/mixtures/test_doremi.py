"""DoReMi whose step size and start follow from the run: in the command, its trace, and what goes on
after a stop."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Command, run_here
from helpers.processes import lines, read

from doremi_train.methods import doremi
from doremi_train.storage.runs import stop
from doremi_train.training.checkpoints import Saver

AUTO = ["mixture=doremi_auto", "stage=proxy", "training.steps=24", "training.checkpoint_every=100"]


@pytest.fixture(scope="module")
def alone(module_fresh: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    outcome = run_here(*module_fresh, *AUTO, f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    return run_dir


@pytest.mark.slow
def test_a_stranger_recomputes_the_weights(alone: Path) -> None:
    """From λ and the recorded η alone, in plain Python; and η from the ranges so far."""
    trace = lines(alone / "proxy" / "domain_weights.jsonl")
    assert read(alone / "reference" / "recipe.json")["mixture"] == {
        name: pytest.approx(1 / 3) for name in trace[0]["weights"]
    }
    begins, span, last = trace[-1]["average_from"], 0.0, 0.0
    alpha = dict.fromkeys(trace[0]["weights"], 1 / 3)
    assert 9 <= begins <= 13  # eight pieces of a curve at least, and at most half of the run
    for line in trace:
        excess = line["excess_loss"]
        span = max(span, max(excess.values()) - min(excess.values()))
        eta = math.sqrt(8 * math.log(3) / 24) / span
        assert line["step_size"] == pytest.approx(eta if line["step"] >= begins else 0, rel=1e-12)
        if line["step"] >= begins:
            power = eta / last
            raised = {n: a**power * math.exp(eta * excess[n]) for n, a in alpha.items()}
            total = math.fsum(raised.values())
            alpha = {n: 0.999 * value / total + 0.001 / 3 for n, value in raised.items()}
        last = eta
        assert line["weights"] == pytest.approx(alpha, rel=1e-9)
    kept = trace[begins - 1 :]
    learned = read(alone / "proxy" / "result.json")["weights"]
    for name, weight in learned.items():
        assert weight == pytest.approx(math.fsum(x["weights"][name] for x in kept) / len(kept))


def same_bits(one: Path, two: Path) -> None:
    for name in ("domain_weights.jsonl", "model/model.safetensors"):
        assert (one / "proxy" / name).read_bytes() == (two / "proxy" / name).read_bytes(), name


def stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[int]:
    """Tell the proxy to stop at these updates; what is returned has one entry an update."""
    really, calls = doremi.update, []

    def update(*arguments: Any) -> doremi.State:
        calls.append(1)
        stop.requested = len(calls) in steps
        return really(*arguments)

    monkeypatch.setattr(doremi, "update", update)
    return calls


@pytest.mark.slow
def test_stopped_in_the_start_and_after_it_it_continues_to_the_same_bits(
    fresh: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stop_at(monkeypatch, 5, 20)
    overrides = [*fresh, *AUTO, f"run_dir={tmp_path / 'run'}"]
    overrides += [f"reference.path={alone / 'reference' / 'model'}"]
    assert [run_here(*overrides).code for _ in range(3)] == [75, 75, 0]
    assert len(calls) == 24
    same_bits(alone, tmp_path / "run")


@pytest.mark.slow
def test_stopped_and_its_store_gone_it_continues_from_the_second_home(
    fresh: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stop_at(monkeypatch, 15)
    overrides = [*fresh, *AUTO, f"run_dir={tmp_path / 'run'}", f"remote={tmp_path / 'home'}"]
    overrides += [f"reference.path={alone / 'reference' / 'model'}", f"store={tmp_path / 'store'}"]
    assert run_here(*overrides).code == 75
    for name in ("run", "store"):
        shutil.rmtree(tmp_path / name)
    assert run_here(*overrides).code == 0
    assert len(calls) == 24  # none was done again
    same_bits(alone, tmp_path / "run")


@pytest.mark.slow
def test_a_checkpoint_from_before_there_was_more_in_the_state_is_continued(
    fresh: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, calls = Saver.save, stop_at(monkeypatch, 5)

    def save(self: Saver, step: int, values: dict[str, Any], pieces: Any) -> None:
        saved(self, step, values | {"state": values["state"][:7]}, pieces)

    monkeypatch.setattr(Saver, "save", save)
    paper = [*fresh, "stage=proxy", "proxy.warmup=0.25"]
    paper += [f"reference.path={alone / 'reference' / 'model'}"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert [run_here(*paper, f"run_dir={one}").code for _ in range(2)] == [75, 0]
    assert len(calls) == 12
    assert run_here(*paper, f"run_dir={two}", f"store={tmp_path / 'other'}").code == 0
    same_bits(one, two)


@pytest.mark.acceptance
def test_two_processes_give_the_weights_of_one(
    alone: Path, fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    outcome = doremi(*fresh, *AUTO, f"run_dir={tmp_path / 'run'}", processes=2)
    assert outcome.code == 0, outcome.err
    ours, theirs = (
        lines(run / "proxy" / "domain_weights.jsonl") for run in (alone, tmp_path / "run")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a["step"], a["tokens"], a["average_from"]) == (
            b["step"],
            b["tokens"],
            b["average_from"],
        )
        assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)
        assert a["step_size"] == pytest.approx(b["step_size"], rel=1e-5)


@pytest.mark.slow
def test_a_proxy_ends_when_its_average_is_known(
    fresh: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before and continued, it still does; and the plan knows no better than an upper
    bound."""
    run_dir = tmp_path / "run"
    # With so much smoothing α forgets in a step or two.
    known = [*fresh, "stage=proxy", "proxy.settled=0.1", "training.steps=60"]
    known += ["proxy.smoothing=0.9", "training.checkpoint_every=1000", "evaluation.every=60"]
    known += [f"run_dir={run_dir}"]
    stop_at(monkeypatch, 13)
    assert [command(*known).code for _ in range(2)] == [75, 0]
    folder = run_dir / "proxy"
    trace, result = lines(folder / "domain_weights.jsonl"), read(folder / "result.json")
    assert result["steps"] == len(trace) == trace[-1]["step"] < 60
    assert result["steps"] >= 15
    assert trace[-1]["half_width"] <= 0.1 and trace[-1]["settled"]
    assert not any("settled" in line for line in trace[:-1])
    assert all(line.get("half_width", 1) > 0.1 for line in trace[:-1])
    for name, weight in result["weights"].items():
        mean = math.fsum(line["weights"][name] for line in trace) / len(trace)
        assert weight == pytest.approx(mean, abs=1e-12)
    assert lines(folder / "evaluations.jsonl")[-1]["step"] == result["steps"]
    outcome = command(*known, "stage=plan")
    assert outcome.code == 0, outcome
    assert "is known to ± 0.1 (proxy.settled)" in " ".join(outcome.out.split())
    assert read(run_dir / "plan.json")["stages"]["proxy"]["state"] == "done"


def test_a_run_that_nothing_ends_has_the_address_it_had(alone: Path) -> None:
    options = read(alone / "proxy" / "recipe.json")["options"]
    assert "settled" not in options and options["absent"] is None

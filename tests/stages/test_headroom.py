"""Headroom of a small corpus: asked with few runs that a swarm uses again, said with intervals, in
the plan and in the report."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Outcome, run_here

RUNS = "headroom.runs=2"


def read(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "headroom" / "headroom.json").read_text())
    return content


@pytest.fixture(scope="module")
def tiny(module_fresh: list[str]) -> list[str]:
    """In a store where nothing is trained: a headroom reuses what it finds."""
    return module_fresh


@pytest.fixture(scope="module")
def asked(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    run_dir = tmp_path_factory.mktemp("headroom") / "run"
    more = "mixture=natural", "main.comparisons=[]"
    return run_dir, run_here(*tiny, f"run_dir={run_dir}", "stage=headroom", RUNS, *more)


@pytest.mark.slow
def test_what_can_be_gained_and_whether_it_pays(asked: tuple[Path, Outcome]) -> None:
    run_dir, outcome = asked
    assert outcome.code == 0, outcome
    content = read(run_dir)
    scores = content["scores"]
    assert {name.removeprefix("headroom/") for name in scores} == {
        "natural", "natural-again", "natural-half", "natural-quarter", "natural-eighth",
        "uniform", "run-0", "run-1",
    }  # fmt: skip
    steps = [
        json.loads((run_dir / f"headroom/natural-{part}" / "result.json").read_text())["steps"]
        for part in ("again", "half", "quarter", "eighth")
    ]
    assert steps == [12, 6, 3, 1]
    natural = (scores["headroom/natural"] + scores["headroom/natural-again"]) / 2
    for name, score in {"natural": natural, "uniform": scores["headroom/uniform"]}.items():
        gain = content["gains"][name]
        assert 0 <= gain["low"] <= gain["mean"] <= gain["high"]
        assert gain["mean"] == pytest.approx(max(score - content["best"]["score"], gain["low"]))
    assert sum(content["best"]["mixture"].values()) == pytest.approx(1)
    # Of a final run that is as small as one of the swarm's, the swarm is never worth it.
    assert content["worth"] is False and content["swarm_runs"] == 13
    assert content["swarm_flops"] == pytest.approx(13 * content["final_flops"])
    for said in content["said"]:
        assert f"headroom: {said}" in outcome.out
    assert content["said"][-1].startswith("not worth one: for a final run of 3.07k tokens")


@pytest.mark.slow
def test_the_plan_of_a_swarm_says_it_or_offers_it(
    tiny: list[str], asked: tuple[Path, Outcome], tmp_path: Path
) -> None:
    known = run_here(*tiny, f"run_dir={tmp_path / 'a'}", RUNS, "stage=plan", "mixture=swarm")
    assert "plan: headroom: not worth one: for a final run" in known.out
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    done = {name for name, run in plan["stages"].items() if run["state"] == "done"}
    assert {"swarm/round-1/natural", "swarm/round-1/uniform"} <= done
    other = run_here(*tiny, f"run_dir={tmp_path / 'b'}", "seed=1", "stage=plan", "mixture=swarm")
    assert "stage=headroom tells with 9 runs" in other.out
    plain = run_here(*tiny, f"run_dir={tmp_path / 'c'}", "stage=plan", "mixture=natural")
    assert "headroom" not in plain.out


@pytest.mark.slow
def test_the_report_says_it(tiny: list[str], asked: tuple[Path, Outcome]) -> None:
    run_dir = asked[0]
    more = "mixture=natural", "main.comparisons=[]"
    outcome = run_here(*tiny, f"run_dir={run_dir}", "stage=report", *more)
    assert outcome.code == 0, outcome
    assert "Headroom: not worth one: for a final run" in (run_dir / "report.html").read_text()


@pytest.mark.slow
def test_more_runs_begin_with_those_that_there_are(
    tiny: list[str], asked: tuple[Path, Outcome], tmp_path: Path
) -> None:
    final = "main.tokens=100000000000", "mixture.max_epochs=1e9", "proxy.match_repetition=false"
    more = ("headroom.runs=3", *final)
    outcome = run_here(*tiny, f"run_dir={tmp_path}", "stage=headroom", *more)
    assert outcome.code == 0, outcome
    content = read(tmp_path)
    assert content["reused"] == 2 and "headroom/run-1" not in content["scores"]
    assert content["final_tokens"] == 10**11 and content["worth"] in (True, None)
    again = run_here(*tiny, f"run_dir={tmp_path}", "stage=headroom", *more)
    assert "is in the store already: headroom-" in again.out and content["said"][0] in again.out


def test_what_cannot_be_asked_is_refused(tiny: list[str], tmp_path: Path) -> None:
    for wrong, said in {
        "headroom.runs=0": "headroom.runs=0",
        "objective.metrics={poetry: 1}": "unknown metric 'poetry'",
        "swarm.floor=0.9": "swarm.floor=0.9",
    }.items():
        outcome = run_here(*tiny, f"run_dir={tmp_path / 'x'}", "stage=headroom", wrong)
        assert outcome.code == 2 and said in outcome.err, outcome
        assert not (tmp_path / "x" / "headroom").exists()

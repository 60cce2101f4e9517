"""What the report begins with: steps to natural's final loss, mean and worst domain, FLOPs."""

import math
from pathlib import Path
from typing import Any

import pytest

from doremi_train.evaluation.headline import headline
from doremi_train.evaluation.results import Result, Setting, small_runs
from doremi_train.stages.evaluate import compare

STEPS = 400


def run(
    reached: int | None,
    loss: float = 3.0,
    small: float | None = 0.5,
    known: bool = True,
    **config: str,
) -> Result:
    """A run whose mixture reaches natural's loss at a step, and is at `loss` in the end."""
    figures: dict[str, Any] = {
        name: {"mean_loss": mean, "worst_loss": mean + 1, "domains": {}, "steps": STEPS}
        for name, mean in (("main", loss), ("baseline", 3.2), ("natural", 3.1))
    }
    if known:
        figures["main"] |= {"steps_to": {"natural": reached, "baseline": 5}, "steps_to_baseline": 5}
    config = {"reference.mixture": "natural"} | config
    mixture = {"method": "doremi", "weights": {"a": 1.0}}
    return Result(Path(), config, mixture, figures, {}, [], [], [], [], [], {}, small, {}, {}, None)


def setting(*runs: Result) -> Setting:
    return Setting({}, 1, 1, list(runs))


def test_one_seed_has_no_interval_and_the_flops_are_said_both_ways() -> None:
    said = headline(setting(run(200)))
    assert said == (
        "The learned mixture reaches natural's final loss in 50 % of the steps. That is 50 % of "
        "the FLOPs where small runs are left out, and 100 % with all included: the small runs took "
        "50 % of a final run. At its end it is 0.1000 nats per token better on the mean over "
        "domains and 0.1000 nats per token better on the worst domain."
    )


def test_a_file_that_was_followed_is_not_called_learned() -> None:
    followed = setting(run(200, **{"main.mixture_file": "mixture.json"}))
    assert followed.candidates["main"] == "followed"
    assert "The followed mixture reaches natural's final loss" in headline(followed)


def test_seeds_have_student_s_interval() -> None:
    said = headline(setting(run(180, 3.0), run(200, 3.01), run(220, 3.02)))
    half = 4.302652729911275 * 5 / math.sqrt(3)  # of 45, 50 and 55 %
    assert f"in 50 ± {half:.0f} % of the steps." in said
    half = 4.302652729911275 * 0.01 / math.sqrt(3)
    assert f"0.0900 ± {half:.4f} nats per token better on the mean over domains" in said


def test_seeds_that_never_reach_it_are_said_and_leave_no_interval() -> None:
    said = headline(setting(run(100), run(300), run(None, 3.2)))
    assert "in 50 % of the steps with 2 of 3 seeds, and not at all with 1." in said
    said = headline(setting(run(None, 3.2)))
    assert said.startswith(
        "The learned mixture does not reach natural's final loss in its 400 steps. The small "
        "runs took 50 % of a final run's FLOPs besides. At its end it is 0.1000 "
        "nats per token worse on the mean over domains"
    )
    assert "steps with any seed." in headline(setting(run(None, 3.2), run(None, 3.3)))


def test_natural_may_be_the_baseline_or_the_mixture_itself() -> None:
    one = run(200)
    del one.figures["natural"]
    assert "reaches natural's final loss in 1 % of" in headline(setting(one))
    uniform = run(200, **{"reference.mixture": "uniform"})
    assert "reaches natural's" in headline(setting(uniform))
    del uniform.figures["natural"]
    assert "reaches uniform's final loss in 1 % of" in headline(setting(uniform))
    assert headline(setting(run(STEPS, 3.1))) == ""  # it is natural
    alone = run(200)
    del alone.figures["natural"], alone.figures["baseline"]
    assert headline(setting(alone)) == ""


def test_an_objective_that_is_measured_at_the_end_alone_has_no_steps() -> None:
    said = headline(setting(run(200, known=False)))
    assert said.startswith("In how many steps natural's final loss is reached is not known")
    assert "FLOPs" not in said and "0.1000 nats per token better" in said


def test_a_way_without_small_runs_and_a_plan_that_does_not_say() -> None:
    assert "It has no small runs, so that is 50 % of the FLOPs too." in headline(
        setting(run(200, small=0.0))
    )
    assert "FLOPs" not in headline(setting(run(200, small=None)))


def test_small_runs_are_those_before_the_final_one_each_once() -> None:
    def stage(kind: str, flops: float) -> dict[str, Any]:
        return {"kind": kind, "whole_flops": flops}

    stages = {
        "reference": stage("reference", 30.0),
        "proxy": stage("proxy", 40.0),
        "main": stage("main", 200.0),
        "baseline": stage("main", 0.0),  # the same run as another
    }
    assert small_runs({"stages": stages}) == pytest.approx(0.35)
    assert small_runs({}) is None
    assert small_runs({"stages": {"main": {"kind": "main"}}}) is None


def test_steps_are_to_the_objective_and_to_every_other_model() -> None:
    def curve(*scores: float) -> list[dict[str, Any]]:
        return [
            {"step": 10 * k, "mean_loss": 9.0, "domains": {"a": score}}
            for k, score in enumerate(scores, start=1)
        ]

    curves = {"main": curve(4, 2, 1), "baseline": curve(4, 3, 2), "uniform": curve(5, 4, 0.5)}
    figures: dict[str, Any] = {name: {"domains": {"a": {"loss": 1.0}}} for name in curves}
    compare(figures, curves, lambda line: float(line["domains"]["a"]))
    assert figures["main"]["steps_to"] == {"baseline": 20, "uniform": None}
    assert figures["uniform"]["steps_to"] == {"main": 30, "baseline": 30}
    assert figures["main"]["steps_to_baseline"] == 20 and figures["main"]["steps"] == 30
    compare(unknown := {name: {"domains": {"a": {"loss": 1.0}}} for name in curves}, curves, None)
    assert "steps_to" not in unknown["main"] and unknown["main"]["steps"] == 30

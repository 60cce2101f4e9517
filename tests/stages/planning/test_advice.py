"""Advice that the plan ends with: what is said for which data and budget."""

from typing import Any

import pytest

from doremi_train.stages.planning.advice import EARNED, LITTLE, Known, advise

EVEN = {"a": 0.3, "b": 0.3, "c": 0.4 - 1e-9}
FEW = {"a": 1.0, "b": 2.0, "c": 0.5}


def known(way: str = "doremi", share: float = 0.17, **more: Any) -> Known:
    given = {"weights": dict(EVEN, c=0.33, a=0.33, b=0.33), "passes": FEW, "most_passes": 4.0}
    return Known(way=way, **({"shares": {"doremi": share}, "tokens": 1_000_000} | given | more))


def test_small_runs_that_cost_much_are_advised_against_with_the_budget_that_would_do() -> None:
    said = advise(known(share=0.17))
    assert said.startswith(
        "advice: at this budget the small runs of doremi are 17 % of the final run's FLOPs"
    )
    assert "take mixture=odm" in said and "or mixture=uniform, or" in said
    assert said.endswith("or raise main.tokens above 3.4M, where they are 5 %")
    # And above it, it is said no more.
    again = advise(known(share=0.17 / 3.41, tokens=3_410_000))
    assert "odm" not in again and "are only 5 % of the final run's FLOPs" in again
    assert "uniform say six seeds of stage=compare" in again


@pytest.mark.parametrize("share", [LITTLE, LITTLE / 2, 1e-5])
def test_small_runs_that_cost_little_are_left_to_be_compared(share: float) -> None:
    assert "hardly count" in advise(known(share=share))


def test_where_uniform_repeats_too_often_it_is_unimax() -> None:
    said = advise(known(passes={"a": 1.0, "b": 12.34, "c": 0.5}))
    assert "or mixture=unimax (uniform would pass 12.3 times over b), or raise" in said
    assert "unimax" not in advise(known(passes={"a": 1.0, "b": 4.0, "c": 0.5}))


@pytest.mark.parametrize(
    ("top", "domains", "poor"),
    [(0.317, 11, True), (0.17, 8, False), (0.99, 3, False), (0.9, 4, True), (0.1, 22, False)],
)
def test_natural_is_advised_against_where_one_domain_has_several_times_its_part(
    top: float, domains: int, poor: bool
) -> None:
    weights = {"big": top} | {f"d{k}": (1 - top) / (domains - 1) for k in range(domains - 1)}
    said = advise(known("natural", weights=weights))
    assert (f"natural gives {100 * top:.0f} % of the tokens to big" in said) == poor
    assert ("take mixture=uniform, or odm" in said) == poor


@pytest.mark.parametrize("way", ["uniform", "odm", "file"])
def test_a_way_without_small_runs_is_kept_unless_they_would_hardly_cost(way: str) -> None:
    dear = advise(known(way, share=0.5))
    assert f"{way} has no small runs, and none" in dear and "(of doremi 50 %" in dear
    cheap = advise(known(way, share=0.02))
    assert "those of doremi would be only 2 %" in cheap and "stage=compare" in cheap


@pytest.mark.parametrize("way", ["doremi", "swarm", "natural"])
def test_headroom_that_was_measured_decides(way: str) -> None:
    shares = {"doremi": 0.17, "swarm": 0.7}
    said = advise(known(way, shares=shares, measured=True, worth=True))
    assert "take mixture=swarm" in said and ("as asked for" in said) == (way == "swarm")
    for worth, word in ((False, "found no swarm worth"), (None, "could not tell")):
        said = advise(known("swarm", shares=shares, measured=True, worth=worth))
        assert word in said and "the small runs of swarm are 70 % of" in said
    assert "headroom" not in advise(known(way, shares=shares))


@pytest.mark.parametrize("way", ["swarm", "natural", "doremi"])
def test_for_metrics_that_were_chosen_a_swarm_is_advised_where_one_paid(way: str) -> None:
    said = advise(known(way, shares={"doremi": 0.3, "swarm": 0.5}, chosen=True))
    assert "its small runs are 50 % of the final run's FLOPs here" in said
    assert ("keep to mixture=swarm" in said) == (way == "swarm")
    assert ("take mixture=swarm" in said) == (way != "swarm")
    dear = advise(known(way, shares={"doremi": 0.3, "swarm": 2 * EARNED}, chosen=True))
    assert "ask stage=headroom first, or raise main.tokens above 2M" in dear
    # Where a domain is scarce one did not pay against uniform.
    scarce = {"a": 1.0, "b": 19.8, "c": 0.5}
    said = advise(known(way, shares={"swarm": 0.5}, passes=scarce, chosen=True))
    assert "(uniform would pass 19.8 times over b) a swarm was better than natural" in said
    assert "earned back" not in said and "compare with mixture=uniform" in said
    # What was measured on this data decides, as ever.
    shares = {"doremi": 0.3, "swarm": 0.5}
    measured = advise(known(way, shares=shares, chosen=True, measured=True, worth=False))
    assert "objective.metrics" not in measured

"""Ways that follow something else than the objective say so, in the plan, at the start and in
weights.json; the others follow it."""

import json
from pathlib import Path

import pytest
from helpers.command import run_here
from helpers.processes import read
from helpers.sessions import opened

from doremi_train.stages import prepare
from doremi_train.stages.mixtures import follows
from doremi_train.stages.runs import targets

RUNS = ("training.steps=4", "evaluation.every=2", "main.comparisons=[]", "target.sequences=6")
SMALL = ("swarm.runs=3", "swarm.candidates=1")
RICH = "objective.metrics={rich: 1}"
TARGET = ("objective=target", "target.domains=[rich]")
ELSEWHERE = [
    # what is asked for, what is followed instead
    (["mixture=doremi", RICH], "follows the excess loss over the reference, of all domains alike"),
    (["mixture=doremi", *TARGET], "which is the mean of target × 1"),
    (["mixture=doremi", "objective=worst"], "which is the largest of domains"),
    (["mixture=ado", RICH], "follows what the main run still learns of every domain"),
    (["mixture=odm", *TARGET], "follows the training losses of all domains"),
    (["mixture=dro", RICH], "follows the distance of every domain from its target loss"),
    (["mixture=doge", "objective=worst"], "follows all domains alike"),
    (["mixture=mixmin", "target.domains=[rich]"], "follows the text of target.*"),
    (["mixture=mixmin", "objective.metrics={cloze: 1}", "training.sequence_length=48"], "cloze"),
    (
        ["mixture=mixmin", RICH, "objective.guard={plain: 0.1}"],
        "follows the domains that objective.metrics weighs, and keeps no guard; it is judged by "
        "the objective, which is the mean of rich × 1, with guards on plain",
    ),
]
FOLLOWED = [
    ["mixture=doremi"], ["mixture=odm"], ["mixture=doge"], ["mixture=mixmin"],
    ["mixture=mixmin", *TARGET],
    ["mixture=doge", *TARGET], ["mixture=doge", RICH], ["mixture=search", *SMALL, *TARGET],
    ["mixture=search", *SMALL, "objective=worst"], ["mixture=uniform", *TARGET],
]  # fmt: skip


def said(*overrides: str) -> str | None:
    with opened(*overrides) as session:
        return follows.unfollowed(session, prepare.run(session))


@pytest.mark.parametrize(("overrides", "instead"), ELSEWHERE)
def test_what_is_followed_instead_is_said(
    overrides: list[str], instead: str, tiny: list[str], tmp_path: Path
) -> None:
    line = said(*tiny, *RUNS, *overrides, f"run_dir={tmp_path}")
    assert line is not None and line.startswith(overrides[0]) and instead in line


@pytest.mark.parametrize("overrides", FOLLOWED)
def test_what_follows_the_objective_says_nothing(
    overrides: list[str], tiny: list[str], tmp_path: Path
) -> None:
    assert said(*tiny, *RUNS, *overrides, f"run_dir={tmp_path}") is None


def test_it_is_said_in_the_plan_at_the_start_and_in_the_result(
    tiny: list[str], tmp_path: Path
) -> None:
    given = (*tiny, *RUNS, "mixture=odm", RICH, f"run_dir={tmp_path}")
    assert run_here(*given, "stage=plan").code == 0
    outcome = run_here(*given, "stage=main")
    assert outcome.code == 0, outcome
    line = "mixture=odm follows the training losses of all domains; it is judged by the objective"
    (warned,) = (w for w in read(tmp_path / "plan.json")["warnings"] if "objective" in w)
    follows_ = read(tmp_path / "weights.json")["provenance"]["follows"]
    assert warned.startswith(line) and follows_.startswith(line)
    assert f"mixture: {line}" in " ".join(outcome.out.split())


@pytest.mark.slow
def test_a_domain_that_is_weighed_alone_is_a_target(tiny: list[str], tmp_path: Path) -> None:
    """By its name in objective.metrics, or as target.domains: the very same run."""
    given = (*tiny, *RUNS, "mixture=mixmin", "stage=main", "training.steps=3")
    for number, overrides in enumerate(([RICH], TARGET)):
        outcome = run_here(*given, *overrides, f"run_dir={tmp_path / str(number)}")
        assert outcome.code == 0, outcome
    mixtures = [json.loads((tmp_path / n / "weights.json").read_text()) for n in ("0", "1")]
    assert mixtures[0] == mixtures[1] and "follows" not in mixtures[0]["provenance"]


def test_sequences_are_in_proportion_to_weights() -> None:
    def counts(shares: list[float] | None, sequences: int = 10, domains: int = 3) -> list[int]:
        names = [f"d{k}" for k in range(domains)]
        return targets._counts(targets._Wanted("", "", names, "", sequences, shares))

    assert counts(None) == [3, 3, 4] and counts([1.0, 1.0, 1.0]) == [3, 3, 4]
    assert counts([0.5, 0.3, 0.2]) == [5, 3, 2] and counts([2.0, 0.1, 0.1]) == [9, 0, 1]
    for sequences in range(1, 50):
        exact = [(n + 1) * sequences // 3 - n * sequences // 3 for n in range(3)]
        assert counts(None, sequences) == exact and sum(exact) == sequences


def test_too_few_sequences_for_a_small_weight_are_refused(tiny: list[str], tmp_path: Path) -> None:
    few = ("mixture=doge", "objective.metrics={plain: 1, rich: 100}", "stage=plan")
    outcome = run_here(*tiny, *RUNS, *few, f"run_dir={tmp_path}")
    assert outcome.code == 2 and "target.sequences=6: none of domain 'plain'" in outcome.err

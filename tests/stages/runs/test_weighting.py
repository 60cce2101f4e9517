"""training.loss_weighting: main runs whose tokens count by their excess loss over a reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Command, run_here
from helpers.processes import lines, read

from doremi_train.training import frozen

POLICIES = ("none", "rho", "dimp", "imp")
UNIFORM = ("mixture=uniform", "main.comparisons=[]", "stage=main")


@pytest.fixture(scope="module")
def reference(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a reference of other training than the runs' own."""
    run_dir = tmp_path_factory.mktemp("reference")
    other = [f"run_dir={run_dir}", "stage=reference", "training.steps=40", "seed=7"]
    assert run_here(*tiny, *other).code == 0
    return [f"reference.path={(run_dir / 'reference' / 'model').resolve()}"]


def main_loss(run_dir: Path) -> list[float]:
    return [line["mean_loss"] for line in lines(run_dir / "main" / "evaluations.jsonl")]


@pytest.mark.slow
def test_every_policy_trains_on_a_mixture_and_says_where_its_weight_goes(
    fresh: list[str], reference: list[str], tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}
    for policy in POLICIES:
        run_dir = tmp_path / policy
        overrides = [
            *fresh,
            *UNIFORM,
            *reference,
            f"training.loss_weighting={policy}",
            f"run_dir={run_dir}",
        ]
        if policy == "imp":
            before = run_here(*overrides, "stage=plan")
            assert before.code == 0, before
            assert [
                read(run_dir / "plan.json")["stages"][name]["state"]
                for name in ("data_model", "main")
            ] == ["new"] * 2
        assert run_here(*overrides).code == 0
        seen[policy] = main_loss(run_dir)
        assert run_here(*overrides, "stage=plan").code == 0
        planned = read(run_dir / "plan.json")["stages"]
        assert {name: run["state"] for name, run in planned.items()} == dict.fromkeys(
            planned, "done"
        )
        trace = run_dir / "main" / "domain_weights.jsonl"
        assert trace.exists() == (policy != "none")
        for line in lines(trace) if policy != "none" else []:
            tokens = line["tokens"]
            mean = sum(line["loss_weight"][name] * tokens[name] for name in tokens) / sum(
                tokens.values()
            )
            assert mean == pytest.approx(1)
            assert 0 < line["effective_sample_size"] <= sum(tokens.values())
    assert len({tuple(found) for found in seen.values()}) == len(POLICIES)
    assert (tmp_path / "imp" / "data_model" / "model" / "config.json").exists()
    assert all(found[-1] < 5.7 for found in seen.values())  # ln 300 is knowing nothing


@pytest.mark.slow
def test_without_power_it_is_the_ordinary_run(
    fresh: list[str], reference: list[str], tmp_path: Path
) -> None:
    for name, more in {
        "none": [],
        "zero": ["training.loss_weighting=dimp", "weighting.power=0.0"],
    }.items():
        assert run_here(*fresh, *UNIFORM, *reference, *more, f"run_dir={tmp_path / name}").code == 0
    assert main_loss(tmp_path / "zero") == pytest.approx(main_loss(tmp_path / "none"), abs=1e-5)


@pytest.mark.slow
def test_the_reference_may_be_of_this_command_and_only_main_runs_change(
    fresh: list[str], tmp_path: Path
) -> None:
    common = [*fresh, "stage=main", "main.comparisons=[]"]
    assert run_here(*common, f"run_dir={tmp_path / 'none'}").code == 0
    assert run_here(*common, f"run_dir={tmp_path / 'rho'}", "training.loss_weighting=rho").code == 0
    for stage in ("reference", "proxy"):
        assert (tmp_path / "none" / stage).resolve() == (tmp_path / "rho" / stage).resolve()
    assert (tmp_path / "none" / "main").resolve() != (tmp_path / "rho" / "main").resolve()


@pytest.mark.slow
def test_cached_losses_give_what_live_ones_give(
    fresh: list[str], reference: list[str], tmp_path: Path
) -> None:
    for kind in ("live", "cached"):
        how = [
            "training.loss_weighting=imp",
            f"reference.losses={kind}",
            f"run_dir={tmp_path / kind}",
        ]
        assert run_here(*fresh, *UNIFORM, *reference, *how).code == 0
    assert main_loss(tmp_path / "cached") == pytest.approx(main_loss(tmp_path / "live"), abs=1e-3)
    # The reference's, and the model's of the data.
    assert len(list((tmp_path / "store").glob("losses/*/losses.f16"))) == 2


@pytest.mark.slow
def test_the_plan_counts_the_losses_that_are_not_cached(
    fresh: list[str], reference: list[str], tmp_path: Path
) -> None:
    common = [*fresh, *UNIFORM, *reference, "training.loss_weighting=dimp"]

    def flops(*overrides: str) -> float:
        run_dir = tmp_path / "-".join(["run", *overrides]).replace("=", "-")
        assert run_here(*common, *overrides, "stage=plan", f"run_dir={run_dir}").code == 0
        return float(read(run_dir / "plan.json")["stages"]["main"]["flops"])

    plain, live = flops("training.loss_weighting=none"), flops()
    new = flops("reference.losses=cached")
    assert run_here(*common, "reference.losses=cached", f"run_dir={tmp_path / 'trained'}").code == 0
    (file,) = (tmp_path / "store").glob("losses/*/losses.f16")
    rows = np.fromfile(file, np.float16).reshape(-1, 34)[:, :32]  # without checksums
    # A step costs a forward of the reference more on each of its sequences, unless its losses are
    # there.
    assert (new - plain) / (live - plain) == pytest.approx(frozen.there(rows).sum() / (12 * 8))
    assert flops("reference.losses=cached", "weighting.power=0.5") == plain  # draws what is there
    assert plain < flops("reference.losses=cached", "seed=5") <= new


def test_imp_against_itself_is_refused(tiny: list[str], tmp_path: Path) -> None:
    outcome = run_here(*tiny, f"run_dir={tmp_path}", "training.loss_weighting=imp")
    assert outcome.code == 2 and "reference.path" in outcome.err, outcome


@pytest.mark.acceptance
@pytest.mark.parametrize("policy", ["rho", "dimp"])
def test_two_processes_and_micro_batches_give_the_numbers_of_one(
    policy: str, fresh: list[str], reference: list[str], doremi: Command, tmp_path: Path
) -> None:
    """An uneven batch in one part on one process, and in three on two."""
    common = [
        *fresh,
        *UNIFORM,
        *reference,
        f"training.loss_weighting={policy}",
        "training.batch_size=9",
    ]
    assert run_here(*common, f"run_dir={tmp_path / 'one'}").code == 0
    parts = [
        f"store={tmp_path / 'other'}",
        "training.micro_batch_size=2",
        f"run_dir={tmp_path / 'two'}",
    ]
    outcome = doremi(*common, *parts, processes=2)
    assert outcome.code == 0, outcome.err
    assert main_loss(tmp_path / "two") == pytest.approx(main_loss(tmp_path / "one"), abs=1e-4)
    for a, b in zip(
        *(lines(tmp_path / run / "main" / "domain_weights.jsonl") for run in ("one", "two")),
        strict=True,
    ):
        assert a["tokens"] == b["tokens"] and a["step"] == b["step"]
        assert a["loss_weight"] == pytest.approx(
            b["loss_weight"], abs=2e-3 if policy == "rho" else 1e-4
        )
        assert a["effective_sample_size"] == pytest.approx(b["effective_sample_size"], rel=1e-3)

"""The plan: what would run and at what cost, which warnings it gives, and that looking ahead
changes nothing."""

import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import TINY, Command, run_here
from helpers.corpus import documents, write_jsonl

from doremi_train import files
from doremi_train.model import costs, language_model
from doremi_train.reports import plan_text
from doremi_train.stages.planning.warnings import too_short
from doremi_train.storage import runs

DOMAINS = ["digits", "plain", "rich"]
STEPS, BATCH, LENGTH = 12, 8, 32
TOKENS = STEPS * BATCH * LENGTH


def planned(*overrides: str) -> dict[str, Any]:
    outcome = run_here(*overrides, "stage=plan")
    assert outcome.code == 0, outcome
    run_dir = next(Path(o.removeprefix("run_dir=")) for o in overrides if o.startswith("run_dir="))
    return files.read_json(run_dir / "plan.json") | {"printed": outcome.out}


@pytest.fixture(scope="module", autouse=True)
def plain_logits() -> Iterator[None]:
    """A step of a language model is 3 F only where the projection is not computed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "NARROW_ON_CPU", 0)
        yield


@pytest.fixture(scope="module")
def default(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a seed that no other test has, so that nothing of it is done."""
    return planned(*tiny, f"run_dir={tmp_path_factory.mktemp('plan')}", "seed=71")


def shape(run_dir: Path) -> costs.Shape:
    recipe = json.loads(next(run_dir.glob("*/recipe.json")).read_text())
    return costs.shape(recipe["model"])


# ── Runs ────────────────────────────────────────────────────────────────────────────


def test_every_run_is_there_and_equal_runs_count_once(default: dict[str, Any]) -> None:
    stages = default["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == {
        "reference": "new", "proxy": "new", "main": "new", "baseline": "same", "uniform": "new",
    }  # fmt: skip
    assert stages["baseline"]["same_as"] == "reference" and stages["baseline"]["flops"] == 0
    assert all(stage["tokens"] == TOKENS for stage in stages.values())
    assert default["evaluation"]["models"] == 1  # trainers measure theirs
    total = sum(stage["flops"] for stage in stages.values()) + default["evaluation"]["flops"]
    assert default["total_flops"] == total > 0
    # Of a plan of before anything ran, what is left is the whole.
    assert all(stage["whole_flops"] == stage["flops"] for stage in stages.values())


def test_flops_of_a_run(default: dict[str, Any], tmp_path: Path) -> None:
    stages = default["stages"]
    layers = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    forward = 2 * (layers + 32 * 300) + 4 * LENGTH * 2 * 32  # F: two layers, d 32, f 64, V 300
    # At steps 6 and 12, and once more; 3 domains of 4 sequences.
    evaluated = (2 + 1) * 3 * 4 * LENGTH * forward
    for name, forwards in {"reference": 3, "proxy": 4, "main": 3, "uniform": 3}.items():
        assert stages[name]["flops"] == forwards * forward * TOKENS + evaluated, name
    # The reference on training text.
    assert default["evaluation"]["flops"] == 3 * 4 * LENGTH * forward
    assert default["accumulation"] == {"micro_batches": 1, "exact_over_lagged": 1, "seconds": 0}


@pytest.mark.parametrize(("mode", "forwards"), [("exact", 5), ("lagged", 4)])
def test_the_price_of_exact_accumulation(
    mode: str, forwards: int, tiny: list[str], tmp_path: Path
) -> None:
    found = planned(
        *tiny, f"run_dir={tmp_path}", "seed=71", "training.micro_batch_size=2",
        f"proxy.accumulation={mode}",
        "evaluation.every=12",
    )  # fmt: skip
    evaluated = 2 * 3 * 4 * LENGTH  # in tokens, one forward each
    F = found["stages"]["main"]["flops"] / (3 * TOKENS + evaluated)
    assert found["stages"]["proxy"]["flops"] == pytest.approx(F * (forwards * TOKENS + evaluated))
    price = found["accumulation"]
    assert (
        price["micro_batches"] == 4 and price["exact_over_lagged"] == 1.25 and price["seconds"] > 0
    )
    assert "costs 1.25 times what lagged does" in found["printed"]


@pytest.mark.parametrize(
    ("overrides", "learn", "look"),
    [
        # 24 candidates for 8 picks, 4 validation sequences. In ordinary steps on the picks: 3
        # forwards with a backward for activations, half of one; the picks' weights, the other half;
        # and the validation gradient's share.
        (["greats"], 3 / 2 + 1 / 2 + 4 / 8 / 10 + 2 * 4 / 8 / 100, 3 / 2 - 1 / 2),
        (
            ["greats", "batch_selection.route=exact"],
            3 + 1 / 2 + 4 / 8 / 10 + 2 * 4 / 8 / 100,
            -1 / 2,
        ),
        (["topk", "training.activation_checkpointing=true"], 3 / 2 + 1 + 4 / 8 / 10, 3 / 2),
        (["max_loss"], 1, 3),
        (["random"], 1, 0),
    ],
)
def test_candidates_of_main_are_counted(
    overrides: list[str], learn: float, look: float, tiny: list[str], tmp_path: Path
) -> None:
    found = planned(
        *tiny, f"run_dir={tmp_path}", "seed=71", "mixture=uniform", "main.comparisons=[natural]",
        "batch_selection.candidates=24", "batch_selection.validation_sequences=4",
        "evaluation.sequences=2", f"batch_selection={overrides[0]}", *overrides[1:],
    )  # fmt: skip
    main, ordinary = found["stages"]["main"], found["stages"]["natural"]
    layers, head = 2 * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * LENGTH * 2 * 32, 2 * 32 * 300
    F = layers + head
    B = 2 * F + layers * ("training.activation_checkpointing=true" in overrides)
    assert main["flops"] - ordinary["flops"] == pytest.approx(
        TOKENS * (learn * (F + B) + look * F - (F + B)), abs=1
    )
    assert main["tokens"] == ordinary["tokens"] == ordinary["candidates"] == TOKENS
    assert main["candidates"] == 3 * TOKENS and "of which it is trained on" in found["printed"]
    assert main["memory"]["activations"] > 2 * ordinary["memory"]["activations"]


def test_rounds_and_seeds_are_all_counted(tiny: list[str], tmp_path: Path) -> None:
    found = planned(*tiny, f"run_dir={tmp_path}", "seed=71", "proxy.rounds=3", "proxy.seeds=2")
    names = [name for name, stage in found["stages"].items() if stage["kind"] != "main"]
    assert names == [
        "reference", "proxy/round-1/seed-0", "proxy/round-1/seed-1",
        "proxy/round-2/reference", "proxy/round-2/seed-0", "proxy/round-2/seed-1",
        "proxy/round-3/reference", "proxy/round-3/seed-0", "proxy/round-3/seed-1",
    ]  # fmt: skip
    assert "proxy × 6" in found["printed"] and "reference × 3" in found["printed"]
    assert found["evaluation"]["models"] == 1  # the first reference


@pytest.mark.parametrize(
    ("overrides", "states"),
    [
        (["mixture=uniform"], {"main": "new", "baseline": "new", "uniform": "same"}),
        (["mixture=natural", "main.comparisons=[baseline]"], {"main": "new", "baseline": "same"}),
        (["main.comparisons=[]"], {"reference": "new", "proxy": "new", "main": "new"}),
    ],
)
def test_only_what_the_method_needs_is_run(
    overrides: list[str], states: dict[str, str], tiny: list[str], tmp_path: Path
) -> None:
    found = planned(*tiny, f"run_dir={tmp_path}", "seed=71", *overrides)
    assert {name: stage["state"] for name, stage in found["stages"].items()} == states
    if "proxy" not in states:
        assert (
            found["reference_losses"] is None
            and found["absent"] is None
            and found["accumulation"] is None
        )
        assert all(domain["proxy_epochs"] is None for domain in found["domains"].values())


@pytest.mark.slow
def test_what_is_done_costs_nothing_and_is_not_measured(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny, f"run_dir={tmp_path}", "seed=72"]
    assert run_here(*overrides, "stage=proxy").code == 0
    half = planned(*overrides)
    states = {name: stage["state"] for name, stage in half["stages"].items()}
    assert states == {
        "reference": "done",
        "proxy": "done",
        "main": "new",
        "baseline": "same",
        "uniform": "new",
    }
    for name in ("reference", "proxy", "baseline"):
        assert half["stages"][name]["flops"] == half["stages"][name]["seconds"] == 0
        assert (half["stages"][name]["whole_flops"] > 0) == (name != "baseline")
    assert half["stages"]["main"]["seconds"] > 0
    # It is known by now.
    assert half["domains"]["rich"]["final_epochs"].keys() == {
        "natural",
        "uniform",
        "learned",
    }
    assert run_here(*overrides, "stage=main").code == 0
    monkeypatch.setattr(costs, "measure", None)  # would raise
    whole = planned(*overrides)
    assert all(stage["flops"] == stage["seconds"] == 0 for stage in whole["stages"].values())
    weights = files.read_json(tmp_path / "weights.json")["weights"]
    sizes = {
        name: domain["training_sequences"] * LENGTH for name, domain in whole["domains"].items()
    }
    for name, domain in whole["domains"].items():
        assert domain["final_epochs"]["learned"] == pytest.approx(
            weights[name] * TOKENS / sizes[name]
        )
        assert domain["main_epochs"]["main"] == domain["final_epochs"]["learned"]


@pytest.mark.slow
def test_rounds_that_have_converged_are_not_counted(tiny: list[str], tmp_path: Path) -> None:
    overrides = [
        *tiny,
        f"run_dir={tmp_path}",
        "seed=73",
        "proxy.rounds=3",
        "proxy.round_tolerance=1.0",
    ]
    assert planned(*overrides)["stages"].keys() >= {"proxy/round-3/reference"}
    assert run_here(*overrides, "stage=proxy").code == 0
    found = planned(*overrides)["stages"]
    assert [name for name, stage in found.items() if stage["kind"] != "main"] == [
        "reference",
        "proxy/round-1/seed-0",
    ]


def test_a_run_that_was_stopped_is_counted_from_there(fresh: list[str], tmp_path: Path) -> None:
    overrides = [
        *fresh,
        f"run_dir={tmp_path}",
        "training.checkpoint_every=3",
        "evaluation.every=12",
    ]
    new = planned(*overrides)["stages"]["reference"]
    assert run_here(*overrides, "stage=reference").code == 0
    folder = (tmp_path / "reference").resolve()
    (folder / "result.json").unlink()  # as if it were at step 9
    (folder / "checkpoints").mkdir()
    runs.set_status(folder, "preempted", 9)
    begun = planned(*overrides)["stages"]["reference"]
    assert begun["state"] == "begun" and begun["flops"] == pytest.approx(new["flops"] / 4)
    assert begun["whole_flops"] == new["whole_flops"] == new["flops"]


def test_a_given_reference_costs_its_own_forward(tiny: list[str], tmp_path: Path) -> None:
    assert run_here(*tiny, f"run_dir={tmp_path / 'first'}", "stage=reference", "seed=72").code == 0
    given = f"reference.path={tmp_path / 'first' / 'reference' / 'model'}"
    larger = [
        "model.config.hidden_size=64",
        "model.config.intermediate_size=128",
        "evaluation.every=12",
    ]
    found = planned(*tiny, f"run_dir={tmp_path / 'second'}", "seed=71", given, *larger)
    assert "reference" not in found["stages"]
    small, large = (2 * (2 * (4 * d * d + 4 * d * d) + d * 300) + 8 * LENGTH * d for d in (32, 64))
    # No trainer here measured it: on validation and on training text.
    assert found["evaluation"]["flops"] == 2 * 3 * 4 * LENGTH * small
    evaluated = 2 * 3 * 4 * LENGTH * large
    assert found["stages"]["proxy"]["flops"] == (3 * large + small) * TOKENS + evaluated
    assert (
        found["stages"]["proxy"]["memory"]["reference"]
        < found["stages"]["proxy"]["memory"]["parameters"]
    )
    refused = run_here(
        *tiny, f"run_dir={tmp_path / 'third'}", "stage=plan", f"reference.path={tmp_path / 'no'}"
    )
    assert refused.code == 2 and "reference.path" in refused.err


# ── Time and memory ─────────────────────────────────────────────────────────────────


def test_time_is_estimated_from_a_measured_micro_step(default: dict[str, Any]) -> None:
    seconds = {name: stage["seconds"] for name, stage in default["stages"].items()}
    assert seconds["proxy"] > seconds["reference"] > 0 and seconds["baseline"] == 0
    assert default["total_seconds"] == sum(seconds.values()) + default["evaluation"]["seconds"]
    assert default["not_measured"] == []
    assert (
        "on 1 process of this machine, estimated from a few micro-steps measured now"
        in default["printed"]
    )


def test_time_that_cannot_be_measured_is_not_invented(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_CPU_FLOPS", 1.0)
    found = planned(*tiny, f"run_dir={tmp_path}", "seed=71")
    assert found["total_seconds"] is None and found["stages"]["proxy"]["seconds"] is None
    assert found["total_flops"] > 0 and "time is not estimated: one sequence is" in found["printed"]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["model", "main.model"])
def test_a_plan_of_8b_on_64_processes_allocates_no_model(
    key: str, tiny: list[str], tmp_path: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = [one for one in tiny if key != "model" or not one.startswith("model.")]
    asked = [f"{key}=8b", "engine=fsdp2", "engine.processes=64", "engine.write_speed=2e9"]
    found = planned(*own, f"run_dir={tmp_path / 'few'}", "seed=71", *asked)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB
    main = found["stages"]["main"]
    whole = main["parameters"]
    assert 6e9 < whole < 9e9 and found["processes"] == 64
    states = ("parameters", "gradients", "optimizer")
    assert [main["memory"][name] for name in states] == [
        -(-bytes_ * whole // 64) for bytes_ in (4, 4, 8)
    ]
    part = -(-12 * whole // 64)
    assert main["checkpoint"] == {"bytes": 12 * whole, "process": part, "seconds": part / 2e9}
    assert main["memory"]["total"] == sum(
        count for name, count in main["memory"].items() if name != "total"
    )
    assert found["total_seconds"] is None  # of processes that are not here
    for said in ("fsdp2, 64 processes, planned", "at 2 GB/s", f"training.batch_size={BATCH} is"):
        assert said in found["printed"]
    more = [f"run_dir={tmp_path / 'enough'}", "training.batch_size=64"]
    enough = planned(*own, "seed=71", *asked, *more)
    assert "training.batch_size=64 is" not in enough["printed"]


def test_it_says_which_way_to_the_reference_s_losses_is_cheapest(
    default: dict[str, Any], tiny: list[str], tmp_path: Path
) -> None:
    ways, proxy = default["reference_ways"], default["stages"]["proxy"]
    assert [*ways["ways"]] == ["live, whole on each process", "cached"]  # of one process
    live, cached = ways["ways"].values()
    assert live["memory"] == proxy["memory"]["total"] == cached["memory"] + 4 * proxy["parameters"]
    assert live["sequences"] == cached["sequences"] == STEPS * BATCH
    assert cached["disk"] == default["reference_losses"]["bytes"] and not live["disk"]
    assert ways["cheapest"] == "live, whole on each process" and ways["room"] > 1e9
    assert "reference.losses=live reference.sharded=false" in default["printed"]

    own = [one for one in tiny if not one.startswith("model.")]
    asked = [*own, "seed=71", "model=8b", "engine=fsdp2", "engine.processes=64"]
    for room, best in (("16e9", "cached"), ("1e9", None)):
        at = tmp_path / room
        found = planned(*asked, f"run_dir={at}", f"engine.memory={room}", "training.batch_size=64")
        ways = found["reference_ways"]
        assert ways["cheapest"] is None if best is None else ways["cheapest"].startswith(best)
    whole, divided, cached = ways["ways"].values()
    size = found["stages"]["proxy"]["parameters"]
    assert found["stages"]["proxy"]["memory"]["total"] == divided["memory"]
    assert whole["memory"] - divided["memory"] == 4 * size - 4 * -(-size // 64)
    assert divided["gathered"] == STEPS * 4 * (size - -(-size // 64)) > cached["gathered"] > 0
    assert "None fits into the 1 GB" in found["printed"]
    seeds = planned(*tiny, "seed=71", f"run_dir={tmp_path}", "proxy.seeds=9", "training.steps=300")
    assert seeds["reference_ways"]["cheapest"] == "cached"  # sequences that several draw


def test_processes_that_are_not_here_are_for_a_plan_alone(tiny: list[str], tmp_path: Path) -> None:
    asked = [*tiny, f"run_dir={tmp_path}", "engine.processes=64"]
    refused = run_here(*asked, "stage=reference")
    assert refused.code == 2 and "engine.processes=64" in refused.err
    file = Path(__file__).parents[2] / "launch" / "deepspeed" / "zero2.json"
    found = planned(*asked, "engine=zero2", f"engine.deepspeed={file}")
    assert found["place"] == "zero2, 64 processes, planned"


def test_memory_of_a_process(default: dict[str, Any]) -> None:
    for name, stage in default["stages"].items():
        memory = stage["memory"]
        assert memory["parameters"] == memory["gradients"] == 4 * stage["parameters"]
        assert memory["optimizer"] == 8 * stage["parameters"]
        assert memory["reference"] == (memory["parameters"] if name == "proxy" else 0)
        assert memory["activations"] >= BATCH * LENGTH * 300 * 4
        assert memory["total"] == sum(value for key, value in memory.items() if key != "total")


@pytest.mark.slow
def test_looking_ahead_changes_no_bit(
    tiny: list[str], corpus: Path, store: Path, tmp_path: Path
) -> None:
    """In one process, one after the other; the measured time stands in no address."""
    runs_ = []
    for name, stages in {"bare": ["proxy"], "planned": ["plan", "proxy"]}.items():
        own = tmp_path / name / "store"
        own.mkdir(parents=True)
        (own / "data").symlink_to(store / "data")
        for stage in stages:
            overrides = [
                *tiny,
                f"run_dir={tmp_path / name / 'run'}",
                f"store={own}",
                f"stage={stage}",
                "seed=71",
            ]
            torch.manual_seed(5)
            before = torch.get_rng_state()
            assert run_here(*overrides).code == 0
            if stage == "plan":
                assert torch.equal(torch.get_rng_state(), before)
        runs_.append(tmp_path / name / "run")
    for file in ("domain_weights.jsonl", "model/model.safetensors", "evaluations.jsonl"):
        assert (runs_[0] / "proxy" / file).read_bytes() == (runs_[1] / "proxy" / file).read_bytes()
    assert (runs_[0] / "proxy").resolve().name == (runs_[1] / "proxy").resolve().name


@pytest.mark.acceptance
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_two_processes_plan_together(
    strategy: str, default: dict[str, Any], tiny: list[str], doremi: Command, tmp_path: Path
) -> None:
    overrides = [*tiny, f"run_dir={tmp_path}", "seed=71", "stage=plan", f"engine={strategy}"]
    outcome = doremi(*overrides, "training.micro_batch_size=2", processes=2)
    assert outcome.code == 0, outcome.err
    found = files.read_json(tmp_path / "plan.json")
    assert outcome.out.count("Runs, on") == 1 and found["processes"] == 2
    assert found["accumulation"]["micro_batches"] == 2
    for key in ("domains", "reference_losses", "absent", "warnings"):
        assert found[key] == default[key], key
    assert 0 < found["total_seconds"] < 600
    whole, mine = default["stages"]["main"]["memory"], found["stages"]["main"]["memory"]
    halves = {"ddp": "", "fsdp2": "parameters gradients optimizer", "zero2": "gradients"}[
        strategy
    ].split()
    for part in ("parameters", "gradients"):
        assert mine[part] == -(-whole[part] // 2 if part in halves else -whole[part]), part


# ── Data ────────────────────────────────────────────────────────────────────────────


def test_epochs_against_main_tokens(tiny: list[str], tmp_path: Path) -> None:
    more = ["main.tokens=10000000", "main.steps=30", "mixture.max_epochs=100"]
    more.append("proxy.match_repetition=false")
    found = planned(*tiny, f"run_dir={tmp_path}", "seed=71", *more)
    sizes = {name: domain["training_tokens"] for name, domain in found["domains"].items()}
    for name, domain in found["domains"].items():
        once = domain["training_sequences"] * LENGTH
        assert once <= sizes[name] < once + 2 * LENGTH
        natural = sizes[name] / sum(sizes.values())
        assert domain["natural_weight"] == pytest.approx(natural)
        drawn = domain["proxy_epochs"] * domain["training_sequences"]
        assert drawn == pytest.approx(STEPS * BATCH / 3, abs=1.5)  # quotas rotate
        here = 30 * BATCH * LENGTH / once
        assert domain["main_epochs"] == pytest.approx(
            {"baseline": natural * here, "uniform": here / 3}
        )
        assert domain["final_epochs"] == pytest.approx(
            {"natural": natural * 1e7 / once, "uniform": 1e7 / once / 3}
        )
    assert "the final run of 10M tokens" in found["printed"]


def test_proxy_epochs_are_those_that_the_run_reports(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, f"run_dir={tmp_path}", "seed=72"]
    assert run_here(*overrides, "stage=proxy").code == 0
    reported = files.read_json(tmp_path / "proxy" / "result.json")["epochs"]
    assert {
        name: d["proxy_epochs"] for name, d in planned(*overrides)["domains"].items()
    } == reported


def test_size_of_the_reference_losses(tiny: list[str], tmp_path: Path) -> None:
    one = planned(*tiny, f"run_dir={tmp_path / 'one'}", "seed=71")["reference_losses"]
    # All distinct within an epoch.
    assert one == {
        "sequences": STEPS * BATCH,
        "rounds": 1,
        "bytes": 2 * TOKENS + 4 * STEPS * BATCH,  # and a checksum each
    }
    steps = ["training.steps=20000", "mixture.max_epochs=100"]
    long = planned(*tiny, f"run_dir={tmp_path / 'long'}", "seed=71", *steps, "proxy.rounds=2")
    total = sum(domain["training_sequences"] for domain in long["domains"].values())
    assert long["reference_losses"] == {
        "sequences": total,
        "rounds": 2,
        "bytes": 2 * (2 * LENGTH + 4) * total,
    }
    seeds = planned(
        *tiny, f"run_dir={tmp_path / 'seeds'}", "seed=71", "proxy.seeds=2", "training.steps=300"
    )
    sizes = [domain["training_sequences"] for domain in seeds["domains"].values()]
    part = [300 * BATCH / 3 / size for size in sizes]
    assert max(part) < 1
    expected = sum(size * (2 * f - f * f) for size, f in zip(sizes, part, strict=True))
    assert seeds["reference_losses"]["sequences"] == pytest.approx(expected, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "uniform", "floor"), [(8, 0, 1 - 8 * 0.3 / 3), (2, 1 / 3, 0.8)])
def test_absence_is_that_of_the_sampler(
    batch: int, uniform: float, floor: float, tiny: list[str], tmp_path: Path
) -> None:
    from doremi_train.data.sampler import Sampler

    more = [f"training.batch_size={batch}", "proxy.smoothing=0.3"]
    found = planned(*tiny, f"run_dir={tmp_path / 'weight'}", "seed=71", *more)["absent"]
    assert found == {"uniform": pytest.approx(uniform), "at_floor": None}
    more += ["proxy.objective=resample"]
    found = planned(*tiny, f"run_dir={tmp_path / 'resample'}", "seed=71", *more)["absent"]
    assert found == {"uniform": pytest.approx(uniform), "at_floor": pytest.approx(floor)}
    for weights, expected in ((np.full(3, 1 / 3), uniform), (np.array([0.1, 0.1, 0.8]), floor)):
        counts = [
            Sampler(np.array([9] * 3), ("a", "b", "c"), batch, 0).counts_before(t, weights)
            for t in range(3001)
        ]
        assert (np.diff(counts, axis=0)[:, 0] == 0).mean() == pytest.approx(expected, abs=0.002)


# ── Warnings ────────────────────────────────────────────────────────────────────────

# Enough sequences of each domain, little repetition, and room for tests that ask for more.
SILENT = ["proxy.average_from=0.5", "training.steps=400", "mixture.max_epochs=1000"]
UNMATCHED = ["main.tokens=100000000", "proxy.match_repetition=false"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (SILENT, None),
        ([*SILENT, "training.batch_size=2"], "33 % of the proxy's batches miss a domain"),
        ([*SILENT, "training.steps=9000"], "The proxy passes over digits"),
        ([*SILENT, *UNMATCHED], "the planned final run"),
        ([*SILENT, *UNMATCHED], "proxy.match_repetition=true"),
        ([*SILENT, "proxy.average_from=0"], "For about the first 200"),
        ([*SILENT, "proxy.average_from=0", "proxy.step_size=auto"], None),
        ([*SILENT, "proxy.average_from=0", "proxy.warmup=auto"], None),
        (
            [*SILENT, "training.steps=300", "proxy.step_size=0.1"],
            "The proxy sees 800 sequences of each domain",
        ),
    ],
)
def test_warnings_are_given_where_they_are_due(
    overrides: list[str], said: str | None, tiny: list[str], tmp_path: Path
) -> None:
    found = planned(*tiny, f"run_dir={tmp_path}", "seed=71", *overrides)
    if said is None:
        assert found["warnings"] == []
    else:
        assert any(said in warning for warning in found["warnings"]), found["warnings"]
        assert said in found["printed"]


@pytest.mark.parametrize(
    ("steps", "batch", "domains", "step_size", "average_from", "warnings"),
    [
        (400, 32, 8, 1.0, 0.0, 1),  # half of the average is start-up
        (400, 32, 8, 1.0, 0.5, 0),
        (400, 32, 8, 0.1, 0.0, 0),
        (2000, 32, 8, 1.0, 0.0, 0),
        (1999, 32, 8, 1.0, 0.0, 1),
        (2000, 32, 80, 1.0, 0.0, 1),  # 800 sequences of each
        (200_000, 512, 22, 1.0, 0.0, 0),  # the paper's
        (12, 8, 3, 1.0, 0.0, 2),
    ],
)
def test_a_proxy_is_too_short_for_its_domains(
    steps: int, batch: int, domains: int, step_size: float, average_from: float, warnings: int
) -> None:
    assert len(too_short(steps, batch, domains, step_size, average_from)) == warnings


def test_many_domains_are_shown_by_their_extremes_and_names_are_text(tmp_path: Path) -> None:
    for k in range(33):
        name, characters = ("[bold]first", 300) if k == 0 else (f"domain {k}", 6000 + 300 * k)
        write_jsonl(
            tmp_path / "data" / name / "train.jsonl", documents(k, "abcdefgh", 50, characters)
        )
        write_jsonl(
            tmp_path / "data" / name / "validation.jsonl", documents(99 + k, "abcdefgh", 50, 1000)
        )
    found = planned(*TINY, f"data.root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}")
    assert len(found["domains"]) == 33 and "3 more are in plan.json" in found["printed"]
    rows = [
        line
        for line in found["printed"].splitlines()
        if line.startswith(("│ domain", "│ [bold]first"))
    ]
    assert len(rows) == 30
    assert sum("has only" in warning for warning in found["warnings"]) == 1
    assert "plan: warning: Domain [bold]first has only" in found["printed"]


def test_figures_are_written_for_people() -> None:
    assert [plan_text.human(seconds) for seconds in (None, 0.5, 45, 240, 9000, 10**6)] == [
        "not known", "0.5 s", "45 s", "4 min", "2.5 h", "11.6 days",
    ]  # fmt: skip
    assert [plan_text.size(count) for count in (999, 3_280_000, 1.5e12)] == [
        "999 B",
        "3.28 MB",
        "1.5 TB",
    ]


# ── proxy.match_repetition ──────────────────────────────────────────────────────────


@pytest.mark.slow
def test_proxies_repeat_their_data_as_the_final_run_will(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, f"run_dir={tmp_path}", "seed=71", "main.tokens=1000000", "proxy.seeds=2"]
    overrides.append("mixture.max_epochs=10")
    outcome = run_here(*overrides)  # by default, since the tokens of the final run are given
    assert outcome.code == 0, outcome
    found = planned(*overrides)
    # On the whole data.
    assert {name: stage["state"] for name, stage in found["stages"].items()}["baseline"] == "done"
    seeds = [(tmp_path / "proxy" / "round-1" / f"seed-{seed}").resolve() for seed in (0, 1)]
    recipes = [
        files.read_json(folder / "recipe.json")
        for folder in (*seeds, (tmp_path / "reference").resolve())
    ]
    part = f"{TOKENS // 64}/{1000000 // 64}"
    assert all(recipe["subsample"] == {"part": part, "seed": 71} for recipe in recipes)
    for name in ("main", "baseline", "uniform"):
        assert "subsample" not in files.read_json(tmp_path / name / "recipe.json")
    for name, domain in found["domains"].items():
        expected = math.ceil(domain["training_sequences"] * TOKENS / 1_000_000)
        assert domain["proxy_sequences"] == expected
        exact = (
            domain["final_epochs"]["uniform"]
            * domain["training_sequences"]
            * TOKENS
            / 1_000_000
            / expected
        )
        assert domain["proxy_epochs"] == pytest.approx(exact, abs=1.5 / expected)  # quotas rotate
        for folder in seeds:
            assert files.read_json(folder / "result.json")["epochs"][name] == domain["proxy_epochs"]
    assert not any("final run" in warning for warning in found["warnings"])


def test_a_final_run_that_is_no_longer_needs_no_part(tiny: list[str], tmp_path: Path) -> None:
    plain, matched = (
        planned(*tiny, f"run_dir={tmp_path / str(on)}", "seed=72", f"proxy.match_repetition={on}")
        for on in ("false", "true")
    )
    for key in ("domains", "reference_losses", "warnings"):
        assert plain[key] == matched[key]
    assert matched["stages"]["baseline"]["same_as"] == "reference"
    assert [s["state"] for s in plain["stages"].values()] == [
        s["state"] for s in matched["stages"].values()
    ]


# ── Advice ──────────────────────────────────────────────────────────────────────────


def test_the_plan_ends_with_advice_from_what_every_way_would_cost(
    default: dict[str, Any], tiny: list[str], tmp_path: Path
) -> None:
    stages, shares = default["stages"], default["small_runs"]
    main = stages["main"]["flops"]
    small = stages["reference"]["flops"] + stages["proxy"]["flops"]
    assert shares["doremi"] == pytest.approx(small / main, rel=0.01)  # of the same length here
    assert shares["dro"] == pytest.approx(stages["reference"]["flops"] / main, rel=0.01)
    assert shares["mixmin"] == pytest.approx(3 * shares["dro"])
    assert "odm" not in shares
    assert default["advice"].startswith("advice: at this budget the small runs of doremi are")
    assert " ".join(default["printed"].split()).endswith(default["advice"])
    # What a final run of a hundred times the tokens makes of it, counted by hand.
    longer = planned(
        *tiny, f"run_dir={tmp_path}", f"main.tokens={100 * TOKENS}", "evaluation.every=1200",
        "proxy.match_repetition=false",
    )  # fmt: skip
    assert longer["small_runs"]["doremi"] == pytest.approx(
        7 / 3 / 100, rel=0.1
    )  # evaluations come on top
    assert "hardly count" in longer["advice"]


@pytest.mark.parametrize(
    ("overrides", "way"),
    [
        (["mixture=swarm", "swarm.runs=5", "swarm.candidates=2"], "swarm"),
        (["mixture=mixmin"], "mixmin"),
        (["mixture=search", "swarm.runs=4"], "search"),
        (["mixture=doge", "proxy.seeds=2"], "doge"),
        (["proxy.rounds=2", "proxy.seeds=3"], "doremi"),
    ],
)
def test_what_another_way_would_cost_is_what_it_costs(
    overrides: list[str], way: str, tiny: list[str], tmp_path: Path
) -> None:
    """About: runs that two parts of a way share count once where it is asked for."""
    keys = [key for key in overrides if not key.startswith("mixture=")]
    other = planned(*tiny, *keys, f"run_dir={tmp_path / 'one'}", "seed=71", "mixture=natural")
    asked = planned(*tiny, *overrides, f"run_dir={tmp_path / 'two'}", "seed=71")
    assert other["small_runs"]["natural"] == 0
    assert asked["small_runs"][way] == pytest.approx(other["small_runs"][way], rel=0.15)

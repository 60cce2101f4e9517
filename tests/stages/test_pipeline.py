"""The whole pipeline on a small corpus: every file of the contract, nothing done twice, and every
variant runs."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.command import TINY, Command, Outcome, run_here
from helpers.corpus import documents, write_jsonl

from doremi_train import files
from doremi_train.storage.runs import set_status

DOMAINS = ["digits", "plain", "rich"]
STEPS = 12


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ran(*overrides: str) -> Outcome:
    outcome = run_here(*overrides)
    assert outcome.code == 0, outcome
    return outcome


@pytest.fixture(scope="module")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run_dir of the default pipeline."""
    run_dir = tmp_path_factory.mktemp("runs") / "default"
    ran(*tiny, f"run_dir={run_dir}")
    return run_dir


# ── The files of the contract ───────────────────────────────────────────────────────


@pytest.mark.slow
def test_config_holds_every_key_resolved(finished: Path) -> None:
    import yaml

    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["training"]["steps"] == STEPS and config["run_dir"] == str(finished)
    assert {
        "stage",
        "store",
        "seed",
        "data",
        "model",
        "evaluation",
        "reference",
        "proxy",
        "main",
    } <= config.keys()
    assert "hydra" not in config


def test_plan(finished: Path) -> None:
    plan = read(finished / "plan.json")
    assert list(plan["domains"]) == DOMAINS
    assert math.isclose(math.fsum(d["natural_weight"] for d in plan["domains"].values()), 1)
    assert plan["stages"].keys() == {"reference", "proxy", "main", "baseline", "uniform"}
    assert plan["total_flops"] > 0 and all(
        stage["memory"]["total"] > 0 for stage in plan["stages"].values()
    )


def test_weights(finished: Path) -> None:
    artefact = read(finished / "weights.json")
    assert artefact.keys() >= {
        "schema",
        "method",
        "weights",
        "unit",
        "interval",
        "epochs",
        "provenance",
    }
    assert (artefact["schema"], artefact["method"], artefact["unit"]) == (1, "doremi", "token")
    assert artefact["interval"] is None  # one seed
    assert abs(math.fsum(artefact["weights"].values()) - 1) < 1e-9
    assert artefact["weights"].keys() == artefact["epochs"].keys() == set(DOMAINS)
    assert artefact["provenance"].keys() >= {
        "seed",
        "steps",
        "model",
        "tokenizer",
        "data",
        "version",
    }
    sizes = {
        name: domain["training_tokens"]
        for name, domain in read(finished / "plan.json")["domains"].items()
    }
    for name, weight in artefact["weights"].items():
        assert math.isclose(artefact["epochs"][name], weight * STEPS * 8 * 32 / sizes[name])


def recompute(
    trace: list[Any], step_size: float, smoothing: float
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Every α_t and ᾱ from the excess losses alone, in plain Python: what a stranger would do."""
    count = len(trace[0]["weights"])
    alpha = dict.fromkeys(trace[0]["weights"], 1 / count)
    all_alphas = []
    for line in trace:
        raised = {
            name: alpha[name] * math.exp(step_size * line["excess_loss"][name]) for name in alpha
        }
        total = math.fsum(raised.values())
        alpha = {
            name: (1 - smoothing) * value / total + smoothing / count
            for name, value in raised.items()
        }
        all_alphas.append(alpha)
    return all_alphas, {name: math.fsum(a[name] for a in all_alphas) / len(trace) for name in alpha}


def test_a_stranger_recomputes_the_weights(finished: Path) -> None:
    trace = lines(finished / "proxy" / "domain_weights.jsonl")
    assert [line["step"] for line in trace] == list(range(1, STEPS + 1))
    for line in trace:
        assert line.keys() == {"step", "weights", "excess_loss", "tokens"}
        assert sum(line["tokens"].values()) == 8 * 32
        assert all(value >= 0 for value in line["excess_loss"].values())
    alphas, average = recompute(trace, step_size=1.0, smoothing=1e-3)
    for line, alpha in zip(trace, alphas, strict=True):
        assert all(abs(line["weights"][name] - alpha[name]) < 1e-12 for name in alpha)
    written = read(finished / "weights.json")["weights"]
    assert all(abs(written[name] - average[name]) < 1e-12 for name in average)
    # The proxy did learn something.
    assert len({round(value, 6) for value in written.values()}) == 3


def test_metrics_and_statuses(finished: Path) -> None:
    for stage in ("reference", "proxy", "main", "baseline", "uniform"):
        metrics = lines(finished / stage / "metrics.jsonl")
        assert [line["step"] for line in metrics] == [4, 8, 12]
        for line in metrics:
            assert line.keys() >= {"step", "loss", "learning_rate", "tokens_per_second"}
            assert 0 < line["loss"] < 10 and line["tokens_per_second"] > 0
        status = read(finished / stage / "status.json")
        assert status.keys() >= {"state", "step", "message"} and status["state"] == "finished"
        assert not (finished / stage / "checkpoints").exists()
    assert read(finished / "prepare" / "status.json")["state"] == "finished"


def test_evaluation(finished: Path) -> None:
    figures = read(finished / "evaluation.json")
    assert figures.keys() == {"reference", "proxy", "main", "baseline", "uniform"}
    for model in figures.values():
        assert list(model["domains"]) == DOMAINS
        losses = [domain["loss"] for domain in model["domains"].values()]
        assert math.isclose(model["mean_loss"], math.fsum(losses) / 3) and model[
            "worst_loss"
        ] == max(losses)
        for domain in model["domains"].values():
            assert domain["tokens"] == 4 * 32 and 0 < domain["bits_per_byte"] < 10
    # A learned mixture is compared at its last evaluation with what the final model measures: the
    # same model.
    last = lines(finished / "main" / "evaluations.jsonl")[-1]
    assert last["step"] == STEPS and math.isclose(
        last["mean_loss"], figures["main"]["mean_loss"], rel_tol=1e-5
    )


def test_models_load_with_transformers_and_give_the_measured_loss(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in ("reference", "main"):
        model = AutoModelForCausalLM.from_pretrained(finished / stage / "model")
        tokenizer = AutoTokenizer.from_pretrained(finished / stage / "model")
        assert model.config.vocab_size == len(tokenizer) == 300
        tokens = tokenizer("abc def", return_tensors="pt").input_ids
        assert model(tokens).logits.shape == (1, tokens.shape[1], 300)


def test_report_is_one_self_contained_page(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert page.count("<svg") == 7 and all(name in page for name in DOMAINS)
    assert "<script" not in page and "<link" not in page and 'src="' not in page


# ── Nothing is done twice ───────────────────────────────────────────────────────────


def results(*folders: Path) -> dict[str, int]:
    """When each file of the runs and of the prepared data was written last."""
    return {
        str(path): path.stat().st_mtime_ns
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_the_same_command_again_does_nothing_again(
    finished: Path, tiny: list[str], store: Path
) -> None:
    weights, evaluation = (
        (finished / "weights.json").read_bytes(),
        (finished / "evaluation.json").read_bytes(),
    )
    before = results(store / "runs", store / "data")
    ran(*tiny, f"run_dir={finished}")
    assert results(store / "runs", store / "data") == before
    assert (finished / "weights.json").read_bytes() == weights
    assert (finished / "evaluation.json").read_bytes() == evaluation


def test_what_a_kill_after_its_result_left_of_a_run_is_settled(
    fresh: list[str], tmp_path: Path
) -> None:
    """Neither its checkpoints nor a status that says "running" stay for good."""
    reference = [*fresh, f"run_dir={tmp_path / 'run'}", "stage=reference"]
    ran(*reference)
    run = (tmp_path / "run" / "reference").resolve()
    whole = {path.name for path in run.iterdir()}
    set_status(run, "running", 6)
    (run / "checkpoints" / "step-000000006").mkdir(parents=True)
    manifest = run / "checkpoints" / "step-000000006" / "manifest.json"
    for left in (manifest, files.aside_of(run / "status.json")):
        left.write_bytes(b"")
    assert "is in the store already" in ran(*reference).out
    assert {path.name for path in run.iterdir()} == whole
    status = read(run / "status.json")
    assert (status["state"], status["step"]) == ("finished", STEPS)


def test_what_kills_left_in_a_run_dir_is_cleared_but_not_in_others_within(
    fresh: list[str], tmp_path: Path
) -> None:
    at = tmp_path / "run"
    (at / "jobs" / "seed-0" / "proxy").mkdir(parents=True)
    (at / "jobs" / "seed-0" / "config.yaml").touch()  # a run_dir of its own, perhaps at work
    left = [at / "weights.json", at / "swarm" / "round-1" / "run-0", at / "downstream" / "a.yaml"]
    others = [at / "jobs" / "seed-0" / "weights.json", at / "store" / "runs" / "a" / "result.json"]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.aside_of(path).touch()
    ran(*fresh, f"run_dir={at}", f"store={at / 'store'}", "stage=plan")
    assert set(at.rglob("*.partial")) == {*map(files.aside_of, others)}


def test_the_reference_is_the_baseline(finished: Path) -> None:
    assert (finished / "reference").resolve() == (finished / "baseline").resolve()
    assert (finished / "main").resolve() != (finished / "baseline").resolve()
    figures = read(finished / "evaluation.json")
    assert figures["reference"]["domains"] == figures["baseline"]["domains"]


def test_two_run_dirs_share_a_store(
    finished: Path, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    folders = set((store / "runs").iterdir())
    ran(*tiny, f"run_dir={tmp_path}")
    assert set((store / "runs").iterdir()) == folders
    for stage in ("prepare", "reference", "proxy", "main", "baseline", "uniform"):
        assert (tmp_path / stage).resolve() == (finished / stage).resolve()
    assert (tmp_path / "weights.json").read_bytes() == (finished / "weights.json").read_bytes()


@pytest.mark.slow
def test_a_run_dir_of_its_own_store_gives_the_same_bits(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    ran(*TINY, f"data.root={corpus}", f"run_dir={tmp_path}")
    assert (tmp_path / "store" / "data").is_dir()
    assert (tmp_path / "weights.json").read_bytes() == (finished / "weights.json").read_bytes()
    name = Path("main") / "model" / "model.safetensors"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_a_stage_alone_does_what_it_needs(tiny: list[str], tmp_path: Path) -> None:
    ran(*tiny, f"run_dir={tmp_path}", "stage=reference", "seed=3")
    assert (tmp_path / "reference" / "model").is_dir()
    assert not (tmp_path / "proxy").exists() and not (tmp_path / "weights.json").exists()
    ran(*tiny, f"run_dir={tmp_path}", "stage=proxy", "seed=3")
    assert (tmp_path / "proxy" / "domain_weights.jsonl").exists() and not (
        tmp_path / "main"
    ).exists()
    ran(*tiny, f"run_dir={tmp_path}", "stage=main", "seed=3")
    assert (tmp_path / "main" / "model").is_dir() and not (tmp_path / "evaluation.json").exists()


# ── Variants ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "method", ["natural", "uniform", "unimax", pytest.param("temperature", marks=pytest.mark.slow)]
)
def test_a_mixture_from_sizes(method: str, tiny: list[str], tmp_path: Path) -> None:
    ran(*tiny, f"run_dir={tmp_path}", f"mixture={method}", "main.comparisons=[baseline]")
    artefact = read(tmp_path / "weights.json")
    assert artefact["method"] == method and abs(math.fsum(artefact["weights"].values()) - 1) < 1e-9
    assert not (tmp_path / "proxy").exists()
    assert read(tmp_path / "evaluation.json").keys() >= {"main", "baseline"}
    sizes = {
        name: domain["training_tokens"]
        for name, domain in read(tmp_path / "plan.json")["domains"].items()
    }
    if method == "natural":
        expected = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        assert all(math.isclose(artefact["weights"][name], expected[name]) for name in sizes)
    if method == "uniform":
        assert set(artefact["weights"].values()) == {1 / 3}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniform", "doremi"])
def test_no_mixture_repeats_a_domain_more_than_is_allowed(
    method: str, tiny: list[str], tmp_path: Path
) -> None:
    common = [*tiny, f"mixture={method}", "main.comparisons=[]", "stage=main"]
    ran(*common, f"run_dir={tmp_path / 'free'}", "main.tokens=800000", "mixture.max_epochs=100")
    said = ran(*common, f"run_dir={tmp_path / 'kept'}", "main.tokens=800000")
    free, kept = (read(tmp_path / name / "weights.json") for name in ("free", "kept"))
    over = {name for name, epochs in free["epochs"].items() if epochs > 4}
    assert over and all(kept["epochs"][name] == pytest.approx(4) for name in over)
    assert (
        max(kept["epochs"].values()) <= 4 * (1 + 1e-9)
        and abs(math.fsum(kept["weights"].values()) - 1) < 1e-9
    )
    below = [name for name in DOMAINS if kept["epochs"][name] < 4 * (1 - 1e-9)]
    grown = {round(kept["weights"][name] / free["weights"][name], 9) for name in below}
    assert (
        len(grown) == 1 and grown.pop() > 1 and "more than mixture.max_epochs=4 passes" in said.out
    )
    too_long = run_here(*common, f"run_dir={tmp_path / 'refused'}", "main.tokens=10000000")
    assert too_long.code == 2 and "mixture.max_epochs=4" in too_long.err
    assert not (tmp_path / "refused" / "proxy").exists()


def test_a_mixture_from_a_file(tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "given.json"
    file.write_text(json.dumps({"plain": 0.5, "rich": 0.5, "digits": 0}))
    ran(
        *tiny,
        f"run_dir={tmp_path / 'run'}",
        "mixture=file",
        f"mixture.path={file}",
        "main.comparisons=[]",
    )
    artefact = read(tmp_path / "run" / "weights.json")
    assert artefact["weights"] == {"digits": 0, "plain": 0.5, "rich": 0.5}
    assert not (tmp_path / "run" / "proxy").exists()
    assert "main" in read(tmp_path / "run" / "evaluation.json")


def test_the_weights_of_one_run_are_the_mixture_of_another(
    finished: Path, tiny: list[str], tmp_path: Path
) -> None:
    given = ["mixture=file", f"mixture.path={finished / 'weights.json'}"]
    ran(*tiny, f"run_dir={tmp_path}", *given)
    assert (tmp_path / "main").resolve() == (finished / "main").resolve()


def test_seeds_of_the_proxy_give_an_interval(
    finished: Path, tiny: list[str], tmp_path: Path
) -> None:
    ran(*tiny, f"run_dir={tmp_path}", "stage=main", "proxy.seeds=2")
    artefact = read(tmp_path / "weights.json")
    traces = [
        lines(tmp_path / "proxy" / "round-1" / f"seed-{seed}" / "domain_weights.jsonl")
        for seed in (0, 1)
    ]
    averages = [recompute(trace, 1.0, 1e-3)[1] for trace in traces]
    assert averages[0] != averages[1]
    for name in DOMAINS:
        low, high = artefact["interval"][name]
        assert low <= artefact["weights"][name] <= high
        mean = (averages[0][name] + averages[1][name]) / 2
        # T of one degree of freedom.
        half = 12.706204736432095 * abs(averages[0][name] - averages[1][name]) / 2
        assert math.isclose(artefact["weights"][name], mean, abs_tol=1e-12)
        assert math.isclose(high, min(1, mean + half), abs_tol=1e-9)
    # The first of several seeds is the one that a single proxy has.
    assert (tmp_path / "proxy" / "round-1" / "seed-0").resolve() == (finished / "proxy").resolve()


def test_rounds_of_the_proxy(tiny: list[str], tmp_path: Path) -> None:
    ran(*tiny, f"run_dir={tmp_path}", "stage=main", "proxy.rounds=2", "proxy.round_tolerance=0")
    assert read(tmp_path / "weights.json")["provenance"]["rounds"] == 2
    first = recompute(
        lines(tmp_path / "proxy" / "round-1" / "seed-0" / "domain_weights.jsonl"), 1.0, 1e-3
    )[1]
    second = recompute(
        lines(tmp_path / "proxy" / "round-2" / "seed-0" / "domain_weights.jsonl"), 1.0, 1e-3
    )[1]
    written = read(tmp_path / "weights.json")["weights"]
    assert all(abs(written[name] - second[name]) < 1e-12 for name in DOMAINS)
    # The reference of the second round is trained on the first round's result.
    used = read(tmp_path / "proxy" / "round-2" / "reference" / "recipe.json")["mixture"]
    assert all(abs(used[name] - first[name]) < 1e-12 for name in DOMAINS)


@pytest.mark.slow
def test_rounds_end_when_no_weight_moves(tiny: list[str], tmp_path: Path) -> None:
    ran(*tiny, f"run_dir={tmp_path}", "stage=proxy", "proxy.rounds=3", "proxy.round_tolerance=1")
    assert not (tmp_path / "proxy" / "round-2").exists()


VARIANTS = [
    ["proxy.objective=resample"],
    ["proxy.score=hardest"],
    ["proxy.score=easiest"],
    ["proxy.clip=domain"],
    ["proxy.accumulation=lagged", "training.micro_batch_size=4"],
    ["proxy.average_from=0.5"],
]
SLOW_VARIANTS = [
    ["training.precision=bf16"],
    ["training.optimizer=adafactor"],
    ["training.activation_checkpointing=true"],
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", SLOW_VARIANTS, ids=" ".join)
def test_a_variant_of_the_training(overrides: list[str], tiny: list[str], tmp_path: Path) -> None:
    test_a_variant_of_the_proxy(overrides, tiny, tmp_path)


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_a_variant_of_the_proxy(overrides: list[str], tiny: list[str], tmp_path: Path) -> None:
    ran(*tiny, f"run_dir={tmp_path}", "stage=proxy", *overrides)
    trace = lines(tmp_path / "proxy" / "domain_weights.jsonl")
    assert len(trace) == STEPS
    alphas, _ = recompute(trace, 1.0, 1e-3)
    for line, alpha in zip(trace, alphas, strict=True):
        assert all(abs(line["weights"][name] - alpha[name]) < 1e-12 for name in alpha)


@pytest.mark.slow
def test_micro_batches_change_nothing(
    finished: Path, tiny: list[str], corpus: Path, tmp_path: Path
) -> None:
    # A store of its own: how a batch is cut is no part of a run's address.
    own = [
        f"store={tmp_path / 'store'}",
        "training.micro_batch_size=2",
        "training.checkpoint_every=5",
    ]
    ran(*tiny, f"run_dir={tmp_path / 'run'}", "stage=proxy", *own)
    one = lines(finished / "proxy" / "domain_weights.jsonl")
    four = lines(tmp_path / "run" / "proxy" / "domain_weights.jsonl")
    for a, b in zip(one, four, strict=True):
        assert all(abs(a["weights"][name] - b["weights"][name]) < 1e-6 for name in DOMAINS)
        assert a["tokens"] == b["tokens"]


@pytest.mark.slow
def test_an_existing_reference(finished: Path, tiny: list[str], tmp_path: Path) -> None:
    given = finished / "reference" / "model"
    ran(*tiny, f"run_dir={tmp_path}", f"reference.path={given}")
    assert not (tmp_path / "reference").exists()
    # The same reference, so the same proxy: it is in the store already.
    assert (tmp_path / "proxy").resolve() == (finished / "proxy").resolve()
    assert read(tmp_path / "evaluation.json").keys() == {
        "reference",
        "proxy",
        "main",
        "baseline",
        "uniform",
    }


# ── Folders ─────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_nothing_is_written_outside_run_dir(doremi: Command, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    overrides = [*TINY, f"data.root={corpus}", f"run_dir={tmp_path / 'run'}", "stage=proxy"]
    outcome = doremi(*overrides, cwd=tmp_path / "cwd")
    assert outcome.code == 0, outcome
    assert os.listdir(tmp_path / "cwd") == []  # noqa: PTH208 (hidden files too)
    assert "proxy" in outcome.out
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "store", "prepare", "reference", "proxy"}


@pytest.mark.slow
def test_a_sweep_shares_its_store_and_is_summarised(corpus: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    base = [*TINY, f"data.root={corpus}", f"run_dir={sweep}", "main.comparisons=[baseline]"]
    ran("-m", *base, "seed=0,1")
    folders = sorted(path for path in sweep.iterdir() if (path / "evaluation.json").exists())
    assert len(folders) == 2
    assert {(folder / "prepare").resolve() for folder in folders} == {
        path for path in (sweep / "store" / "data").iterdir() if path.is_dir()
    }
    assert len({(folder / "proxy").resolve() for folder in folders}) == 2
    ran(*base, "stage=report")
    page = (sweep / "report.html").read_text()
    assert "2 runs" in page and "Student-t" in page
    means = [read(folder / "evaluation.json")["main"]["mean_loss"] for folder in folders]
    assert f"{sum(means) / 2:.4f} ±" in page


@pytest.mark.slow
def test_a_sweep_may_change_the_precision(tiny: list[str], tmp_path: Path) -> None:
    ran(
        "-m",
        *tiny,
        f"run_dir={tmp_path}",
        "stage=reference",
        "seed=5",
        "training.precision=bf16,fp32",
    )
    assert len(list(tmp_path.glob("*/reference/result.json"))) == 2


@pytest.mark.slow
def test_the_report_escapes_names_of_domains(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    records = [{"text": text, "set": "tame"} for text in documents(1, "abcdefgh", 50, 40_000)]
    records += [{"text": text, "set": evil} for text in documents(2, "xyz", 50, 40_000)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides = [f"data.files=['{file}']", "data.domain_key=set", f"run_dir={tmp_path / 'run'}"]
    ran(*TINY, *overrides, "main.comparisons=[]", "data.validation_fraction=0.1")
    assert evil in read(tmp_path / "run" / "weights.json")["weights"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.slow
def test_domains_with_their_own_validation_files(corpus: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held-out.jsonl", documents(7, "abcdefgh", 50, 20_000))
    a = f"{{train: ['{corpus}/plain/*'], validation: ['{held_out}']}}"
    domains = f"{{a: {a}, b: {{train: ['{corpus}/rich/*']}}}}"
    ran(*TINY, f"data.domains={domains}", f"run_dir={tmp_path / 'run'}", "stage=reference")
    assert (tmp_path / "run" / "reference" / "model").is_dir()

"""Fine-tuning and selection on real weights: SmolLM2-135M-Instruct."""

import json
from pathlib import Path

import pytest
from helpers import pretrained
from helpers.command import Command
from helpers.processes import lines
from safetensors.torch import load_file

pytestmark = pytest.mark.acceptance

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Germany": "Berlin", "Japan": "Tokyo", "Austria": "Vienna", "Greece": "Athens",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw",
    "Hungary": "Budapest", "Ireland": "Dublin", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Canada": "Ottawa", "Russia": "Moscow",
    "China": "Beijing", "Iran": "Tehran", "Iraq": "Baghdad",
}  # fmt: skip


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained.smol(tmp_path_factory.mktemp("smol"))


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def capitals(countries: list[str]) -> list[dict[str, str]]:
    return [
        {"prompt": f"The capital of {name}?", "completion": f" {CAPITALS[name]}"}
        for name in countries
    ]


@pytest.fixture(scope="module")
def asked(smol: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a pool of capitals and sums and a few capitals as target, and the overrides to
    train on it."""
    folder = tmp_path_factory.mktemp("asked")
    names = list(CAPITALS)
    sums = [
        {"prompt": f"What is {n} plus {n + 3}?", "completion": f" {2 * n + 3}"}
        for n in range(2, 22)
    ]
    write(folder / "capitals.jsonl", capitals(names[:12]))
    write(folder / "sums.jsonl", sums[:16])
    write(folder / "held-capitals.jsonl", capitals(names[12:16]))
    write(folder / "held-sums.jsonl", sums[16:])
    write(folder / "target.jsonl", capitals(names[16:22]))
    split = "{{train: [{0}/{1}.jsonl], validation: [{0}/held-{1}.jsonl]}}"
    domains = ", ".join(f"{name}: {split.format(folder, name)}" for name in ("capitals", "sums"))
    return folder, [
        f"finetune.model={smol}", f"data.domains={{{domains}}}", "data.embedded=null",
        "finetune.lora.rank=8", "finetune.lora.targets=[q_proj,v_proj]",
        "training.sequence_length=24", "training.threads=1", "training.learning_rate=0.001",
        "training.schedule=constant", "evaluation.sequences=4", "training.log_every=1",
    ]  # fmt: skip


def test_greats_picks_the_examples_that_lora_trains_on(
    asked: tuple[Path, list[str]], command: Command, tmp_path: Path
) -> None:
    folder, overrides = asked
    run_dir = tmp_path / "run"
    outcome = command(
        *(
            "stage=finetune",
            *overrides,
            f"run_dir={run_dir}",
            "training.batch_size=4",
            "training.steps=4",
        ),
        *(
            "batch_selection=greats",
            "batch_selection.verify=true",
            "batch_selection.validation_sequences=4",
        ),
        f"batch_selection.validation=[{folder}/target.jsonl]",
    )
    assert outcome.code == 0, outcome
    found = json.loads((run_dir / "finetune/result.json").read_text())
    assert "greats picks 4 of 8, one pass" in found["engine"]
    assert found["evaluation"]["mean_loss"] < found["before"]["mean_loss"] - 0.05, found
    picks = [line["picked"] for line in lines(run_dir / "finetune/batch_selection.jsonl")]
    assert [sum(picked.values()) for picked in picks] == [4] * 4
    adapter = load_file(run_dir / "finetune/adapter/adapter_model.safetensors")
    assert len(adapter) == 30 * 2 * 2 and all(part.isfinite().all() for part in adapter.values())


def test_less_finds_the_target_s_kind_and_trains_on_it(
    asked: tuple[Path, list[str]], command: Command, tmp_path: Path
) -> None:
    """The whole command: warm-up by LoRA, scoring, choice, fine-tuning."""
    folder, overrides = asked
    run_dir = tmp_path / "run"
    less = [
        *overrides, "selection=less", f"selection.targets={{capitals: [{folder}/target.jsonl]}}",
        "selection.documents=8", "selection.less.warmup=0.3", "selection.less.epochs=2",
        "training.batch_size=4", "selection.less.baselines=[random]", "training.steps=3",
        f"run_dir={run_dir}",
    ]  # fmt: skip
    outcome = command("stage=select", *less)
    assert outcome.code == 0, outcome
    told = json.loads((run_dir / "select/result.json").read_text())["targets"]["capitals"][
        "methods"
    ]
    assert told["less"]["examples"] == told["random"]["examples"] == 8
    assert told["less"]["domains"].get("capitals", 0) >= 7, told
    outcome = command("stage=finetune", *less)
    assert outcome.code == 0, outcome
    found = json.loads((run_dir / "finetune/result.json").read_text())
    assert found["data"]["examples"]["capitals"]["train"] == 8
    assert found["evaluation"]["mean_loss"] < found["before"]["mean_loss"], found

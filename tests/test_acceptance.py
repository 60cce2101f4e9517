"""Long proofs on real text, at the default model and size: what the README claims."""

import json
from pathlib import Path

import pytest
from conftest import Command

pytestmark = pytest.mark.acceptance

DEBPILE = Path(__file__).parents[2] / "shared" / "corpora" / "debpile"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_micro_batches_do_not_change_alpha(command: Command, tmp_path: Path) -> None:
    """Batch 32 at once and as four micro-batches of 8: every α_t of 200 steps agrees to 1e-6, in float32."""
    source = [f"data.root={DEBPILE}"] if DEBPILE.is_dir() else []
    common = [*source, "stage=proxy", "training.steps=200", "evaluation.every=200", "training.batch_size=32"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(*common, "stage=reference", f"run_dir={whole}").code == 0
    # Another store, because a run's address leaves out how it is cut: in one store this would be the same run.
    reference = f"reference.path={whole}/reference/model"
    tokenizer = f"data.tokenizer={whole}/prepare/tokenizer.json"
    for run_dir, micro in ((tmp_path / "again", "null"), (parts, "8")):
        overrides = [*common, reference, tokenizer, f"run_dir={run_dir}", f"training.micro_batch_size={micro}"]
        assert command(*overrides).code == 0
    first, second = lines(tmp_path / "again/proxy/domain_weights.jsonl"), lines(parts / "proxy/domain_weights.jsonl")
    assert len(first) == len(second) == 200
    assert len({len(line["weights"]) for line in first}) == 1
    for a, b in zip(first, second, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)


@pytest.mark.skipif(not DEBPILE.is_dir(), reason="the corpus of eight domains is not beside the checkout")
def test_eight_domains_of_real_text_end_to_end(command: Command, tmp_path: Path) -> None:
    """The whole job, short: the mixture is learned, no domain is lost, and the page is there."""
    assert command(f"data.root={DEBPILE}", f"run_dir={tmp_path}", "training.steps=80", "evaluation.every=40").code == 0
    weights = json.loads((tmp_path / "weights.json").read_text())["weights"]
    assert len(weights) == 8
    assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
    assert min(weights.values()) >= 1e-3 / 8
    assert max(weights.values()) - min(weights.values()) > 0.05  # not the uniform mixture it started from
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"reference", "proxy", "main", "baseline", "uniform"} <= evaluation.keys()
    assert evaluation["main"]["mean_loss"] < 6.5 < 6.93  # ln 1024 is knowing nothing
    assert (tmp_path / "report.html").stat().st_size > 20_000

"""Long proofs on real text, at the default model and size: what the README claims."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.command import Command

pytestmark = pytest.mark.acceptance

DEBPILE = Path(__file__).parents[2] / "shared" / "corpora" / "debpile"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: the text is prepared once."""
    return tmp_path_factory.mktemp("store")


def test_micro_batches_do_not_change_alpha(command: Command, store: Path, tmp_path: Path) -> None:
    """Batch 32 at once and as four micro-batches of 8: every α_t of 200 steps agrees to 1e-6, in
    float32."""
    source = [f"data.root={DEBPILE}"] if DEBPILE.is_dir() else []
    common = [
        *source,
        "mixture=doremi",
        "stage=proxy",
        "training.steps=200",
        "evaluation.every=200",
        "training.batch_size=32",
    ]
    assert (
        command(*common, "stage=reference", f"store={store}", f"run_dir={tmp_path}/whole").code == 0
    )
    # A store of its own, because a run's address leaves out how it is cut: in one store this would
    # be the same run.
    shutil.copytree(store, tmp_path / "store")
    for name, where, micro in (("whole", store, "null"), ("parts", tmp_path / "store", "8")):
        overrides = [
            f"store={where}",
            f"run_dir={tmp_path / name}",
            f"training.micro_batch_size={micro}",
        ]
        assert command(*common, *overrides).code == 0
    first, second = (
        lines(tmp_path / name / "proxy/domain_weights.jsonl") for name in ("whole", "parts")
    )
    assert len(first) == len(second) == 200
    assert len({len(line["weights"]) for line in first}) == 1
    for a, b in zip(first, second, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)


@pytest.mark.skipif(
    not DEBPILE.is_dir(), reason="the corpus of eight domains is not beside the checkout"
)
def test_eight_domains_of_real_text_end_to_end(
    command: Command, store: Path, tmp_path: Path
) -> None:
    """The whole job, short: the mixture is learned, no domain is lost, and the page is there."""
    short = ("mixture=doremi", "training.steps=80", "evaluation.every=40")
    assert (
        command(f"data.root={DEBPILE}", f"store={store}", f"run_dir={tmp_path}", *short).code == 0
    )
    weights = json.loads((tmp_path / "weights.json").read_text())["weights"]
    assert len(weights) == 8
    assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
    assert min(weights.values()) >= 1e-3 / 8
    # Not the uniform mixture it started from.
    assert max(weights.values()) - min(weights.values()) > 0.05
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"reference", "proxy", "main", "baseline", "uniform"} <= evaluation.keys()
    assert evaluation["main"]["mean_loss"] < 6.5 < 6.93  # ln 1024 is knowing nothing
    assert (tmp_path / "report.html").stat().st_size > 20_000

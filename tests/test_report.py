"""The report over a sweep: runs are grouped by what varies beside the seed, and drawn against the size of the proxy."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import run_here

from doremi_train.stages.report import _settings, _size_charts


def run_of(folder: Path, width: int, seed: int, **more: float) -> Path:
    """What the report reads of one run: a wider model is better, and a later seed worse."""
    shape = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 8, "n_embd": width, "n_layer": 1, "n_head": 1}
    config = {"seed": seed, "run_dir": str(folder), "model": {"config": {"n_embd": width, "n_head": 1}}, "proxy": more}
    losses = {"main": 4 - width / 100 + seed / 1000, "baseline": 4.5 - width / 100, "uniform": 4.25}
    figures = {name: {"mean_loss": loss, "worst_loss": loss + 1, "domains": {}} for name, loss in losses.items()}
    (folder / "reference" / "model").mkdir(parents=True)
    (folder / "reference" / "model" / "config.json").write_text(json.dumps(shape))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "evaluation.json").write_text(json.dumps(figures))
    (folder / "weights.json").write_text(json.dumps({"weights": {"a": 0.25 + seed / 100, "b": 0.75 - seed / 100}}))
    return folder


def test_runs_are_grouped_by_what_varies_beside_the_seed(tmp_path: Path) -> None:
    made = [run_of(tmp_path / f"{w}-{s}", w, s) for w in (32, 16) for s in (0, 1, 2)]
    small, large = _settings(made)
    assert [len(small.figures), len(large.figures)] == [3, 3] and small.size < large.size
    assert small.label == f"proxy of {small.size:,} parameters" and small.rest == ""
    losses, weights = _size_charts([small, large])
    assert all(f" {name}" in losses for name in ("learned", "baseline", "uniform")) and " main" not in losses
    assert " a" in weights and " b" in weights
    assert len(re.findall(r'id="FillBetween|id="PolyCollection', losses)) == 3, "a band for each curve"


def test_other_keys_make_curves_of_their_own(tmp_path: Path) -> None:
    made = [run_of(tmp_path / f"{w}-{e}", w, 0, step_size=e) for w in (16, 32) for e in (0.1, 1.0)]
    settings = _settings(made)
    assert [setting.rest for setting in settings] == ["proxy.step_size=0.1", "proxy.step_size=1.0"] * 2
    assert "learned (proxy.step_size=0.1)" in _size_charts(settings)[0]


def test_seeds_alone_are_one_setting(tmp_path: Path) -> None:
    (setting,) = _settings([run_of(tmp_path / str(seed), 16, seed) for seed in (0, 1)])
    assert setting.label == "" and len(setting.figures) == 2


@pytest.mark.parametrize("widths", [(16,), (16, 32)])
def test_the_page_has_a_table_for_each_setting(widths: tuple[int, ...], corpus: Path, tmp_path: Path) -> None:
    for width in widths:
        for seed in (0, 1):
            run_of(tmp_path / "sweep" / f"{width}-{seed}", width, seed)
    outcome = run_here(f"data.root={corpus}", "stage=report", f"run_dir={tmp_path / 'sweep'}")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.count("<table>") == len(widths) == page.count("Over 2 runs the learned mixture is better than baseline")
    assert page.count("<svg") == (2 if len(widths) > 1 else 0)

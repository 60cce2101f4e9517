"""The recipes of conf/experiment: each is one command, and ends in a page with its picture."""

import json
from pathlib import Path

import pytest
from helpers.command import run_here

SHORT = (
    "data.vocabulary_size=300", "training.sequence_length=32", "training.batch_size=8",
    "training.steps=8", "training.threads=1", "evaluation.sequences=4", "evaluation.every=4",
)  # fmt: skip

# Recipe → overrides that make it small, how many runs it then has, and the title of its first
# picture.
RECIPES = {
    "ablation": (["seed=0,1"], 6, "Mean validation loss of each setting"),
    "sizes": (["model=nano,tiny", "main.model=nano", "seed=0"], 2, "parameters of the proxy"),
    "equal": (["model=nano,tiny", "seed=0"], 2, "parameters of the proxy"),
    "larger": (["main.model=nano,tiny", "seed=0"], 2, "parameters of the final model"),
    "rounds": (["proxy.rounds=1,2", "seed=0"], 2, "proxy.rounds"),
    "sensitivity": (
        ["proxy.step_size=0.1,1.0", "proxy.smoothing=0.001,0.01"],
        4,
        "proxy.step_size",
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "rounds" else pytest.mark.acceptance)
        for name in RECIPES
    ],
)
def test_a_recipe_is_one_command_with_its_picture(name: str, corpus: Path, tmp_path: Path) -> None:
    changes, count, title = RECIPES[name]
    outcome = run_here(
        f"experiment={name}", f"data.root={corpus}", *SHORT, f"run_dir={tmp_path}", *changes
    )
    assert outcome.code == 0, outcome.err
    runs = [path.parent for path in tmp_path.glob("*/evaluation.json")]
    assert len(runs) == count
    page = (tmp_path / "report.html").read_text()
    assert title in page and f"{count} runs of" in page
    assert "lowest mean loss" in outcome.out
    sizes = {
        json.loads((run / "main" / "model" / "config.json").read_text())["hidden_size"]
        for run in runs
    }
    assert len(sizes) == (2 if name in ("equal", "larger") else 1)

"""Scores from files: the harness's own layout, plain ones, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from doremi_train.config import UserError
from doremi_train.evaluation import scores

# As lm-evaluation-harness 0.4.13 writes it, but for keys that are not read.
HARNESS: dict[str, Any] = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.2,
            "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.1},
    },
    "config": {"model": "hf", "model_args": {"pretrained": "runs/one/model", "dtype": "float32"}},
    "model_source": "hf", "model_name": "runs/one/model",
}  # fmt: skip
READ = {"arc_easy/acc": 0.25, "arc_easy/acc_norm": 0.5, "gsm8k/exact_match/strict-match": 0.0}


def write(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_the_harness_and_plain_files_are_read_the_latest_last(tmp_path: Path) -> None:
    write(tmp_path / "all/runs__one__model/results_2026-01-02T00-00-00.json", HARNESS)
    later = HARNESS | {"results": {"arc_easy": {"acc,none": 0.75}}}
    later["config"] = {"model_args": "pretrained=runs/one/model,dtype=float32"}
    write(tmp_path / "all/results_2026-01-03T00-00-00.json", later)
    plain = write(tmp_path / "mine.json", {"language_model-1": {"mine": 3}})
    found = scores.read([str(tmp_path / "all"), plain, str(tmp_path / "not/yet")], "key")
    assert found == {
        "runs/one/model": READ | {"arc_easy/acc": 0.75},
        "language_model-1": {"mine": 3.0},
    }


def test_the_installed_harness_writes_that_layout(tmp_path: Path) -> None:
    trackers = pytest.importorskip("lm_eval.loggers", reason="needs the extra eval")
    tracker = trackers.EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf", model_args="pretrained=runs/one/model", system_instruction=None,
        chat_template=None, fewshot_as_multiturn=False,
    )  # fmt: skip
    given = {key: HARNESS[key] for key in ("results", "config")}
    tracker.save_results_aggregated(given | {"config": {"model_args": "pretrained=runs/one/model"}})
    assert scores.read([str(tmp_path)], "key") == {"runs/one/model": READ}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1], "must hold a JSON object"),
        ({"model": 3}, "model: must be {METRIC: SCORE}, not 3"),
        ({"model": {"acc": "high"}}, "model: acc='high' is no number"),
        ({"model": {"acc": True}}, "model: acc=True is no number"),
        ({"model": {"acc": float("nan")}}, "model: acc=nan is no number"),
    ],
)
def test_other_files_are_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "scores.json", content)
    with pytest.raises(UserError, match="objective.scores.*scores.json") as caught:
        scores.read([path], "objective.scores")
    assert said in str(caught.value)

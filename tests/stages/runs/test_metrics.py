"""Tasks and scores as metrics of runs: counted by a search and its verdict, measured once, the same
on two processes; and what cannot be."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Command, run_here
from helpers.processes import lines, read
from helpers.sessions import opened

from doremi_train.config import UserError
from doremi_train.evaluation import gold
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import follows

RUNS = (
    "mixture=search", "swarm.runs=3", "training.steps=4", "training.sequence_length=48",
    "evaluation.every=2", "main.comparisons=[baseline]", "seed=83", "downstream.examples=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of one's own."""
    folder = tmp_path_factory.mktemp("mine")
    for part, count in (("train", 1), ("test", 7)):
        asked = [{"prompt": f"after {n} comes", "answers": [f"bad {n}"]} for n in range(count)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in asked))
    return folder


@pytest.fixture(scope="module")
def tasks(mine: Path) -> list[str]:
    return [f"downstream.files={{mine: {mine}}}", "objective.metrics={mine: 2, cloze: 1}"]


@pytest.fixture(scope="module")
def searched(tiny: list[str], tasks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tasks") / "run"
    outcome = run_here(*tiny, *RUNS, "objective=tasks", *tasks, f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    assert "bits per byte on the objective" in " ".join(outcome.out.split())
    return run_dir


def kept(store: Path, run: Path) -> set[float]:
    """What is kept in the store of a run's tasks."""
    found = [read(path) for path in (store / "metrics").glob(f"{run.resolve().name}-*.json")]
    return {entry["bits_per_byte"] for entry in found if "bits_per_byte" in entry}


@pytest.mark.slow
def test_a_search_takes_what_is_best_on_the_tasks(searched: Path, store: Path) -> None:
    scores = {}
    for run in sorted((searched / "search").glob("run-*")):
        assert len(kept(store, run)) == 2, run
    figures, mixture = read(searched / "evaluation.json"), read(searched / "weights.json")
    for name, of in figures.items():
        scores[name] = (2 * of["tasks"]["mine"] + of["tasks"]["cloze"]) / 3
        assert set(of["tasks"]) == {"mine", "cloze"} and "target_loss" not in of
        assert set(of["tasks"].values()) == kept(store, searched / name)
        assert "steps_to_baseline" not in of  # tasks are measured at the end alone
    # The final models are of the small ones' size and length.
    assert mixture["provenance"]["realised"] == pytest.approx(scores["main"], rel=1e-12)
    assert "the objective is measured at the end alone" in (searched / "report.html").read_text()


def test_what_is_measured_is_measured_once(
    searched: Path, tiny: list[str], tasks: list[str], store: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (store / "metrics").iterdir()}
    given = (*tiny, *RUNS, *tasks, f"run_dir={tmp_path}")
    outcome = run_here(*given)
    assert outcome.code == 0, outcome
    assert read(tmp_path / "weights.json") == read(searched / "weights.json")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Other examples are another objective.
    outcome = run_here(*given, "downstream.examples=5")
    assert outcome.code == 2 and "downstream.examples: 6 there, 5 now" in outcome.err


@pytest.mark.acceptance
def test_two_processes_measure_what_one_does(
    searched: Path, fresh: list[str], tasks: list[str], doremi: Command, tmp_path: Path
) -> None:
    given = (*fresh, *RUNS, *tasks, "objective=tasks", f"run_dir={tmp_path / 'run'}")
    outcome = doremi(*given, processes=2)
    assert outcome.code == 0, outcome
    one, two = (read(folder / "evaluation.json") for folder in (searched, tmp_path / "run"))
    for name in one:
        for task, value in one[name]["tasks"].items():
            assert two[name]["tasks"][task] == pytest.approx(value, abs=1e-4)


def test_all_tasks_count_alike_and_domains_are_theirs(
    tiny: list[str], mine: Path, tmp_path: Path
) -> None:
    """With the weights of domains the steps to the baseline are by them."""
    given = (*tiny, *RUNS, "mixture=uniform", f"downstream.files={{mine: {mine}}}")
    outcome = run_here(*given, "objective=tasks", "stage=evaluate", f"run_dir={tmp_path}/tasks")
    assert outcome.code == 0, outcome
    assert set(read(tmp_path / "tasks/evaluation.json")["main"]["tasks"]) == {"mine"}
    weighed = ("objective.metrics={rich: 2, digits: 1}", "stage=evaluate")
    outcome = run_here(*given, *weighed, f"run_dir={tmp_path}/two")
    assert outcome.code == 0, outcome
    figures = read(tmp_path / "two/evaluation.json")
    curves = {name: lines(tmp_path / "two" / name / "evaluations.jsonl") for name in figures}

    def score(line: dict[str, Any]) -> float:
        return (2 * line["domains"]["rich"] + line["domains"]["digits"]) / 3

    for name in ("main", "baseline"):
        goal = score(curves["baseline"][-1])
        reached = [line["step"] for line in curves[name] if score(line) <= goal]
        assert figures[name]["steps_to_baseline"] == (reached[0] if reached else None)
        assert "tasks" not in figures[name]


def harness(folder: Path, number: int, model: str, value: float) -> None:
    folder.mkdir(exist_ok=True)
    content = {
        "results": {"arc": {"alias": "arc", "acc,none": value, "acc_stderr,none": 0.1}},
        "config": {"model_args": {"pretrained": model}},
        "model_name": model,
    }
    (folder / f"results_{number}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_scores_of_one_s_own_are_asked_for_and_then_counted(
    tiny: list[str], tmp_path: Path
) -> None:
    """Small runs are trained, their folders named, scored outside, and the same command goes on;
    more of a score is better."""
    given = (
        *tiny, *RUNS, "seed=84", "objective=custom", "objective.metrics={arc/acc: -1}",
        f"objective.scores=[{tmp_path / 'scores'}]", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    random, asked = np.random.default_rng(0), list[str]()
    for _ in range(3):  # the small runs, and the final ones
        outcome = run_here(*given)
        if outcome.code == 0:
            break
        assert outcome.code == 2 and "models have no arc/acc yet" in outcome.err, outcome
        wanted = (tmp_path / "run/unscored.txt").read_text().splitlines()
        assert wanted and not set(wanted) & set(asked)
        assert all((Path(model) / "config.json").exists() for model in wanted)
        for model in wanted:
            asked.append(model)
            harness(tmp_path / "scores", len(asked), model, float(random.uniform()))
    assert outcome.code == 0, outcome
    assert not (tmp_path / "run/unscored.txt").exists() and len(asked) == 4
    by_model = {
        read(path)["model_name"]: read(path)["results"]["arc"]["acc,none"]
        for path in (tmp_path / "scores").iterdir()
    }
    small = {
        run.name: by_model[str((run / "model").resolve())]
        for run in (tmp_path / "run/search").glob("run-*")
    }
    provenance = read(tmp_path / "run/weights.json")["provenance"]
    best = max(small, key=lambda name: small[name])
    assert provenance["chosen"] == f"search/{best}" and provenance["realised"] == -small[best]
    figures = read(tmp_path / "run/evaluation.json")
    assert figures["main"]["scores"] == {"arc/acc": small[best]}
    assert f"reaches {-small[best]:.4f} points on the objective" in " ".join(outcome.out.split())


MISTAKES = [
    (["objective=tasks"], "objective=tasks: there are no tasks; give downstream.files="),
    (["objective.metrics={moon: 1}"], "unknown metric 'moon'; there are digits, plain and rich, "),
    (["objective.metrics={lambada: 1}"], "unknown metric 'lambada'"),
    (["objective=custom"], "objective.metrics: every weight is 0"),
    (["objective.scores=[x]"], "name none of them; give the weight of one"),
    (["objective.metrics={mine: 1}", "downstream.files={mine: nowhere}"], "has no test.jsonl"),
    (["downstream.files={a/b: x}"], "'a/b' cannot be the name of a task"),
    (["downstream.files={target: x}"], "'target' cannot be the name of a task"),
    (
        ["objective.metrics={plain: 1}", "downstream.files={plain: x}"],
        "plain is a domain of the data, and a task of downstream.files",
    ),
    (
        ["objective.metrics={cloze: 1}", "training.sequence_length=16"],
        "cloze needs sequences of 32 tokens at least",
    ),
]


def test_an_objective_that_cannot_be_is_refused_before_training(
    tiny: list[str], tmp_path: Path
) -> None:
    for number, (overrides, said) in enumerate(MISTAKES):
        given = (*tiny, *RUNS, *overrides, f"run_dir={tmp_path / str(number)}")
        with pytest.raises(UserError) as caught, opened(*given) as session:
            follows.unfollowed(session, prepare.run(session))
        assert said in str(caught.value), overrides
    assert run_here(*tiny, *RUNS, "objective=tasks", f"run_dir={tmp_path / 'run'}").code == 2


@pytest.mark.acceptance
def test_the_harness_finds_answers_as_likely(searched: Path, mine: Path) -> None:
    """Its log-likelihoods of the same answers, over their bytes."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def asked(part: str) -> list[tuple[str, str]]:
        return [gold.asked("mine", line) for line in lines(mine / f"{part}.jsonl")]

    ((prompt, answer),) = asked("train")
    pairs = [
        (f"{prompt} {answer}\n\n{question}", f" {right}") for question, right in asked("test")[:6]
    ]
    model = HFLM(str(searched / "main/model"), device="cpu", dtype="float32", batch_size=1)
    likely = model.loglikelihood(
        [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)], disable_tqdm=True
    )
    bits = [
        -value / math.log(2) / len(right.strip().encode())
        for (value, _), (_, right) in zip(likely, pairs, strict=True)
    ]
    found = read(searched / "evaluation.json")["main"]["tasks"]["mine"]
    assert found == pytest.approx(math.fsum(bits) / len(bits), rel=1e-4)

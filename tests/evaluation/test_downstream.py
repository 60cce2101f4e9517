"""Tasks on local files through lm-evaluation-harness: what it counts as right is what is right."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import Command
from helpers.processes import read

from doremi_train.config import UserError
from doremi_train.evaluation import downstream

FORMS = sorted(downstream.FORMS)


def write(folder: Path, test: list[dict], train: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("test", test), ("train", train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_definition_reads_the_user_s_files(form: str, tmp_path: Path) -> None:
    downstream.define(form, write(tmp_path / "mine", [], []), tmp_path / "task.yaml")
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"]["test"] == str(
        (tmp_path / "mine/test.jsonl").resolve()
    )
    assert task["num_fewshot"] == 1 and task["metric_list"][0]["metric"] == "exact_match"
    (tmp_path / "mine/train.jsonl").unlink()
    with pytest.raises(UserError, match=f"downstream.files.{form}=.* has no train.jsonl"):
        downstream.define(form, tmp_path / "mine", tmp_path / "task.yaml")


def test_a_mistake_is_named(tiny: list[str], command: Command, tmp_path: Path) -> None:
    for overrides, said in (
        (["downstream.tasks=[magic]"], "allowed: triviaqa, naturalqs"),
        (["downstream.tasks=[squadv2]"], "downstream.files={squadv2: FOLDER}"),
    ):
        outcome = command(*tiny, *overrides, "stage=plan", f"run_dir={tmp_path / 'run'}")
        assert outcome.code == 2 and said in outcome.err, outcome


QUESTION = {"question": "What is 3?", "answers": ["3"]}
LINES = [
    # form, line 2 of test.jsonl, what is said of it
    ("triviaqa", {"question": "q", "answer": {"aliases": ["3"]}}, "has no key 'answers'"),
    (
        "squadv2",
        {"context": "c", "question": "q", "answers": {"text": ["3"], "answer_start": [0]}},
        "answers must be a list of texts",
    ),
    ("squadv2", QUESTION, "has no key 'context'"),
    ("naturalqs", {"question": "q", "answers": []}, "answers must be a list of one text or more"),
    ("naturalqs", {"question": "q", "answers": [3]}, "answers must be a list of texts"),
    ("webquestions", {"question": None, "answers": ["3"]}, "has no key 'question'"),
    ("webquestions", {"question": 7, "answers": ["3"]}, "question must be a text"),
    ("lambada", {"text": "one\n"}, "text must have two words or more"),
    ("lambada", ["one two"], "is no JSON object"),
]


@pytest.mark.parametrize(("form", "line", "said"), LINES)
def test_a_line_of_another_layout_is_named_before_anything_runs(
    form: str, line: Any, said: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval: lm-evaluation-harness")
    good = {**QUESTION, "context": "c", "text": "one two"}
    folder = write(tmp_path / "mine", [good, line], [good])
    asked = [f"downstream.tasks=[{form}]", f"downstream.files={{{form}: {folder}}}"]
    outcome = command(*tiny, *asked, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2 and not (tmp_path / "run").exists(), outcome
    assert f"downstream.files.{form}: {folder}/test.jsonl, line 2 " in outcome.err
    assert said in outcome.err
    with pytest.raises(UserError, match="train.jsonl is empty"):
        downstream.check(form, write(tmp_path / "mine", [good], []))


def test_white_space_around_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs the extra eval")
    line = {"text": "one two\nthree four\n", "context": "c\n", "question": "q ", "answers": ["3\n"]}
    for form in FORMS:
        folder = write(tmp_path / form, [line], [line])
        assert downstream.padded(form, folder)
        downstream.define(form, folder, tmp_path / "tasks" / f"{form}.yaml")
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = tasks.get_task_dict([f"doremi_{form}" for form in FORMS], manager)
    for form in FORMS:
        task, words = found[f"doremi_{form}"], form in ("lambada", "cloze")
        (asked,) = task.test_docs()
        right = "four" if words else "3"
        assert task.process_results(asked, [right])["exact_match"] == 1, form
        assert task.doc_to_text(asked).endswith("three" if words else "Q: q\nA:"), form


def test_without_the_harness_it_is_said_before_anything_runs(
    tiny: list[str], command: Command, tmp_path: Path
) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-evaluation-harness is installed")
    outcome = command(*tiny, "downstream.tasks=[cloze]", f"run_dir={tmp_path / 'run'}")
    assert (
        outcome.code == 2
        and "install doremi-train[eval]" in outcome.err
        and not (tmp_path / "run").exists()
    )


# ── With the harness ────────────────────────────────────────────────────────────────

TASKS = (
    "training.sequence_length=128", "training.batch_size=4", "training.snapshots=2",
    "main.comparisons=[baseline]", "reference.mixture=uniform", "mixture=natural", "seed=77",
    "downstream.examples=12",
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tiny: list[str], command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="needs the extra eval: lm-evaluation-harness")
    run_dir = tmp_path_factory.mktemp("downstream") / "run"
    outcome = command(*tiny, *TASKS, f"run_dir={run_dir}", "downstream.tasks=[cloze]")
    assert outcome.code == 0, outcome
    return run_dir


@pytest.mark.acceptance
def test_accuracy_over_steps_of_both_models_is_in_the_report(done: Path) -> None:
    found = read(done / "downstream.json")
    assert set(found) == {"main", "baseline"}
    for curves in found.values():
        assert [line["step"] for line in curves["cloze"]] == [4, 8, 12]
        assert all(
            0 <= line["accuracy"] <= 1 and line["examples"] == 12 for line in curves["cloze"]
        )
    passages = [
        json.loads(line)["text"]
        for line in (done / "downstream/cloze/test.jsonl").read_text().splitlines()
    ]
    assert len(passages) == 12 and all(
        len(text.split()) >= 8 and text.split()[-1].isalnum() for text in passages
    )
    page = (done / "report.html").read_text()
    assert "What the models can do" in page and "Accuracy on cloze, one shot" in page


@pytest.mark.acceptance
def test_right_is_what_greedy_decoding_gives(
    done: Path, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    """All tasks of the paper, on files of one's own: half of the questions have the model's own
    answer, in other case and among others; the other half do not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = done / "main" / "model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )

    def answer(prompt: str, room: int = 24) -> str:
        tokens = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        generated = model.generate(tokens, max_new_tokens=room, do_sample=False, pad_token_id=0)
        return tokenizer.decode(generated[0, tokens.shape[1] :]).split("\n")[0].strip()

    words, shot = (
        ("abcd", "hgfe", "dadb", "cafe", "bead", "fade"),
        {"question": "abc def", "answers": ["ghi"]},
    )
    questions = [f"{word} {word}" for word in words]

    def asked(before: str, **more: str) -> list[dict]:
        given = [
            answer(f"{before}Q: abc def\nA: ghi\n\n{before}Q: {question}\nA:")
            for question in questions
        ]
        assert all(given)
        return [
            {
                "question": question,
                "answers": ["never this", text.upper() if number % 2 else "nor this"],
                **more,
            }
            for number, (question, text) in enumerate(zip(questions, given, strict=True))
        ]

    plain, context = asked(""), {"context": "feed the cab"}
    with_context = [
        *asked("feed the cab\n", **context),
        {"question": "bad", "answers": [], **context},
    ]
    ends = [answer(f"abc def ghi\n\n{question}", 12).split() for question in questions]
    last_words = [
        {"text": f"{question} {end[0].upper() if number % 2 else 'never'}"}
        for number, (question, end) in enumerate(zip(questions, ends, strict=True))
    ]
    lines = {
        **dict.fromkeys(("triviaqa", "naturalqs", "webquestions"), (plain, shot)),
        "squadv2": (with_context, shot | context),
        "lambada": (last_words, {"text": "abc def ghi"}),
    }
    places = {name: write(tmp_path / name, test, [train]) for name, (test, train) in lines.items()}
    assert set(places) | {"cloze"} == set(FORMS)
    files = ", ".join(f"{name}: {place}" for name, place in places.items())
    overrides = [
        f"downstream.tasks=[{','.join(places)}]",
        f"downstream.files={{{files}}}",
        "stage=evaluate",
    ]
    outcome = command(*tiny, *TASKS, *overrides, f"run_dir={done}")
    assert outcome.code == 0, outcome
    found = {name: curve[-1] for name, curve in read(done / "downstream.json")["main"].items()}
    assert {name: line["examples"] for name, line in found.items()} == {
        name: len(test) for name, (test, _) in lines.items()
    }
    # The last has no answer, and one is given.
    assert found.pop("squadv2")["accuracy"] == pytest.approx(3 / 7)
    assert {name: line["accuracy"] for name, line in found.items()} == dict.fromkeys(found, 0.5)

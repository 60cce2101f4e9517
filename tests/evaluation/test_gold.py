"""Bits per byte of gold answers: against the most naive way in float64, and what is asked."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.models import build
from tokenizers import Tokenizer

from doremi_train.config import UserError
from doremi_train.data.tokens import tokenizer
from doremi_train.evaluation import downstream, gold

TEXT = "the cab fed a bee and the dad had a bag of figs in a shed by the sea é語 " * 8


@pytest.fixture(scope="module")
def encoder() -> Tokenizer:
    return tokenizer.learn([TEXT], 300)


LINES = [
    {"prompt": "what had dad? ", "answers": ["a bag of figs", "figs"]},
    {"prompt": "who fed the bee?", "answers": ["the cab"]},
    {"prompt": "where? " + "in a shed by the sea " * 6, "answers": [" by the é語 sea "]},
    {"prompt": "x", "answers": ["f"]},
]


def test_bits_per_byte_are_those_of_the_most_naive_way(encoder: Tokenizer) -> None:
    """Example by example, nothing padded, in float64; every example counts alike."""
    length, size = 40, tokenizer.vocabulary_size(encoder)
    model = build("gpt2", vocab_size=size, n_positions=length)
    task = gold.gold("mine", LINES, encoder, length, pad=0)
    assert task.tokens.shape[1] == length + 1 and task.answer.shape == task.tokens[:, 1:].shape
    with torch.no_grad():
        logits = model(task.tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), task.tokens[:, 1:], reduction="none"
        )
        expected = []
        for line in LINES[1:]:
            shot = f"{LINES[0]['prompt'].strip()} a bag of figs\n\n"  # type: ignore[attr-defined]
            right = line["answers"][0].strip()
            before = f"{shot}{line['prompt'].strip()}"  # type: ignore[attr-defined]
            tokens = encoder.encode(f"{before} {right}").ids
            count = len(tokens) - len(encoder.encode(before).ids)
            seen = torch.tensor([tokens[-(length + 1) :]])
            likely = model(seen[:, :-1]).logits.log_softmax(-1)[0]
            last = len(likely)
            surprise = -sum(float(likely[i, seen[0, i + 1]]) for i in range(last - count, last))
            expected.append(surprise / math.log(2) / len(right.encode()))
    assert gold.bits_per_byte(losses, task) == pytest.approx(math.fsum(expected) / 3, rel=1e-12)
    spoiled = losses.masked_fill(~task.answer, float("nan"))  # what is not looked at
    assert gold.bits_per_byte(spoiled, task) == gold.bits_per_byte(losses, task)


RECORD = {
    "text": " one two\nthree four\n",
    "context": "c\n",
    "question": "q ",
    "answers": ["3\n", "4"],
}


@pytest.mark.parametrize("form", [*downstream.FORMS, "mine"])
def test_what_is_asked_is_what_the_harness_asks(form: str, tmp_path: Path) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs the extra eval")
    line = RECORD | {"prompt": "Q: q\nA: "}
    for part in downstream.PARTS:
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(line) + "\n")
    downstream.define(form, tmp_path, tmp_path / "tasks" / f"{form}.yaml")
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    task = tasks.get_task_dict([f"doremi_{form}"], manager)[f"doremi_{form}"]
    (document,) = task.test_docs()
    prompt, answer = gold.asked(form, line)
    assert prompt == task.doc_to_text(document)
    target = task.doc_to_target(document)
    assert answer == (target[0] if isinstance(target, list) else target)


def test_a_question_without_an_answer_is_unanswerable() -> None:
    record = {"context": "c", "question": "q", "answers": []}
    assert gold.asked("squadv2", record) == ("c\nQ: q\nA:", "unanswerable")
    assert gold.asked("cloze", {"text": "one two "}) == ("one", "two")


def test_answers_that_do_not_fit_are_named(encoder: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"downstream.files.mine: .* line \d has \d+ tokens; must"):
        gold.gold("mine", LINES, encoder, 1, pad=0)


def test_of_a_file_the_first_lines_are_read(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 7)):
        lines = [{"prompt": f"{part} {n}", "answers": ["a"]} for n in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    read = [record["prompt"] for record in gold.read("mine", tmp_path, 2)]
    assert read == ["train 0", "test 0", "test 1"]
    (tmp_path / "test.jsonl").write_text('{"prompt": "x", "answers": "a"}\n')
    with pytest.raises(UserError, match="answers must be a list of texts"):
        gold.read("mine", tmp_path, 2)

"""Tasks for lm-evaluation-harness on local files, and what a model makes of them. Its package is
loaded here alone.

A task is a folder with `test.jsonl` and `train.jsonl`, from which the one shot is taken. Its
definition is a YAML file that `lm_eval --include_path` reads too:

| form | keys of a line | asked for |
|---|---|---|
| `triviaqa`, `naturalqs`, `webquestions` | question, answers (a list) | one of the answers |
| `squadv2` | context, question, answers (or none) | one of the answers, or "unanswerable" |
| `lambada`, `cloze` | text | its last word |
| any other name | prompt, answers (a list) | one of the answers |

White space around a text is no part of it. All are answered by greedy generation after one example,
and right by exact match but for case and punctuation, as in DoReMi (Xie et al. 2023, arXiv
2305.10429), section 3.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
import yaml

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.data.tokens.shards import TokenStore

_ANSWERS = "answers|map('trim')|list"
_QUESTION = ("Q: {{question|trim}}\nA:", f"{{{{{_ANSWERS}}}}}")
_LAST_WORD = ("{{text.strip().rsplit(none, 1)[0]}}", "{{text.strip().rsplit(none, 1)[-1]}}")
_WORD = {
    "name": "answer",
    "filter": [{"function": "regex", "regex_pattern": r"^\s*(\S+)"}, {"function": "take_first"}],
}
_LINE = {
    "name": "answer",
    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
}

# Prompt, answer, filter of what was generated, and tokens that may be generated.
FORMS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "triviaqa": (*_QUESTION, _LINE, 24),
    "naturalqs": (*_QUESTION, _LINE, 24),
    "webquestions": (*_QUESTION, _LINE, 24),
    "squadv2": (
        "{{context|trim}}\nQ: {{question|trim}}\nA:",
        f"{{{{{_ANSWERS} if answers|length else ['unanswerable']}}}}",
        _LINE,
        24,
    ),
    "lambada": (*_LAST_WORD, _WORD, 12),
    "cloze": (*_LAST_WORD, _WORD, 12),
}
"""What a form asks, and what is right:

>>> from doremi_train.evaluation.downstream import FORMS
>>> prompt, answer, *_ = FORMS["triviaqa"]
>>> print(prompt)
Q: {{question|trim}}
A:
>>> print(answer)
{{answers|map('trim')|list}}
"""
# Of a task of the user's own, by any other name.
OWN: tuple[str, str, dict[str, Any], int] = ("{{prompt|trim}}", f"{{{{{_ANSWERS}}}}}", _LINE, 24)
PARTS = ("test", "train")
KEYS = dict.fromkeys(("triviaqa", "naturalqs", "webquestions"), ("question", "answers")) | {
    "squadv2": ("context", "question", "answers"),
    "lambada": ("text",),
    "cloze": ("text",),
}
OWN_KEYS = ("prompt", "answers")
LEAST_PASSAGES = 8  # words of a passage


class Accuracy(NamedTuple):
    value: float
    error: float  # its standard error
    examples: int


def define(name: str, folder: Path, path: Path) -> None:
    """Write the definition of task `name` on the files of `folder`. Raises UserError where one is
    missing."""
    _require_files(name, folder)
    prompt, answer, taken, tokens = FORMS.get(name, OWN)
    content = {
        "task": f"doremi_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {part: str((folder / f"{part}.jsonl").resolve()) for part in PARTS}
        },
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 1,
        "output_type": "generate_until",
        "doc_to_text": prompt,
        "doc_to_target": answer,
        "target_delimiter": " ",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": tokens},
        "filter_list": [taken],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
    }
    files.write_bytes(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def _require_files(name: str, folder: Path) -> None:
    for part in PARTS:
        if not (folder / f"{part}.jsonl").is_file():
            raise UserError(
                f"downstream.files.{name}={folder}: has no {part}.jsonl; give a folder with "
                "test.jsonl and train.jsonl, from which the one shot is taken"
            )


def check(name: str, folder: Path) -> None:
    """Raise UserError where a file of task `name` is missing, or a line of it is not as the form of
    the task says."""
    _require_files(name, folder)
    for part in PARTS:
        path, number = folder / f"{part}.jsonl", 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                why = _wrong(name, line)
                if why:
                    raise UserError(f"downstream.files.{name}: {path}, line {number} {why}")
        if not number:
            raise UserError(f"downstream.files.{name}: {path} is empty; give examples")


def _wrong(name: str, line: bytes) -> str | None:
    """What is wrong with a line of the form `name`, and what would be right."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"is not JSON ({error}); write one object a line"
    keys = KEYS.get(name, OWN_KEYS)
    wanted = f"a line of {name} has {', '.join(keys)}"
    if not isinstance(record, dict):
        return f"is no JSON object; {wanted}"
    for key in keys:
        value = record.get(key)
        if value is None:
            return f"has no key {key!r}; {wanted}"
        if key == "answers":
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                return (
                    f"has answers={short(value)}: answers must be a list of texts; of the layout "
                    "{text: […], answer_start: […]} give the list of text alone"
                )
            if not value and name != "squadv2":
                return "has answers=[]: answers must be a list of one text or more"
        elif not isinstance(value, str) or not value.strip():
            return f"has {key}={short(value)}: {key} must be a text that is not empty"
    if keys == ("text",) and len(record["text"].split()) < 2:
        return f"has text={short(record['text'])}: text must have two words or more"
    return None


def short(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def padded(name: str, folder: Path) -> bool:
    """Whether a text of the files has white space around it, which was part of it once."""
    for part in PARTS:
        with (folder / f"{part}.jsonl").open("rb") as file:
            for record in map(orjson.loads, file):
                texts = [
                    text
                    for key in KEYS.get(name, OWN_KEYS)
                    for text in (record[key] if key == "answers" else [record[key]])
                ]
                if any(text != text.strip() for text in texts):
                    return True
    return False


def require() -> None:
    """Raise UserError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "downstream.tasks: needs lm-evaluation-harness; install doremi-train[eval], or leave "
            "it empty"
        )


def measure(
    model: Path, definitions: Path, names: Sequence[str], device: torch.device, limit: int
) -> dict[str, Accuracy]:
    """Accuracy of a saved model, by task."""
    from datasets.utils.logging import disable_progress_bar
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = HFLM(
        str(model), device=str(device), batch_size=16, dtype="float32", trust_remote_code=False
    )
    results: Mapping[str, Any] | None = simple_evaluate(
        loaded,
        tasks=[f"doremi_{name}" for name in names],
        task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert results is not None
    return {name: _accuracy(results, f"doremi_{name}") for name in names}


def _accuracy(results: Mapping[str, Any], task: str) -> Accuracy:
    value, count = (
        results["results"][task]["exact_match,answer"],
        results["n-samples"][task]["effective"],
    )
    return Accuracy(float(value), float((value * (1 - value) / count) ** 0.5), int(count))


def passages(store: TokenStore, k: int, length: int) -> Iterator[str]:
    """Passages of domain k, of whole words, the last one of letters or digits."""
    tokenizer = store.tokenizer()
    for n in range(int(store.sequences("validation", length)[k])):
        tokens = store.gather("validation", np.array([k]), np.array([n]), length)[0]
        ends = np.flatnonzero(tokens == store.end_of_document)
        piece = tokens[: ends[0]] if len(ends) else tokens
        words = tokenizer.decode(piece.tolist()).split()[1:-1]  # the outer ones may be parts
        while words and not words[-1].isalnum():
            words.pop()
        if len(words) >= LEAST_PASSAGES:
            yield " ".join(words)

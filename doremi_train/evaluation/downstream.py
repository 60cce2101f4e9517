"""Tasks for lm-evaluation-harness on local files, and what a model makes of them. Its package is
loaded here alone.

A task is a folder with `test.jsonl` and `train.jsonl`, from which the one shot is taken. Its
definition is a YAML file that `lm_eval --include_path` reads too:

| form | keys of a line | asked for |
|---|---|---|
| `triviaqa`, `naturalqs`, `webquestions` | question, answers (a list) | one of the answers |
| `squadv2` | context, question, answers (or none) | one of the answers, or "unanswerable" |
| `lambada`, `cloze` | text | its last word |

All are answered by greedy generation after one example, and right by exact match but for case and
punctuation, as in DoReMi (Xie et al. 2023, arXiv 2305.10429), section 3.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.data.tokens.shards import TokenStore

_QUESTION = ("Q: {{question}}\nA:", "{{answers}}")
_LAST_WORD = ("{{text.split(' ')[:-1]|join(' ')}}", "{{text.split(' ')[-1]}}")
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
        "{{context}}\nQ: {{question}}\nA:",
        "{{answers if answers|length else ['unanswerable']}}",
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
Q: {{question}}
A:
>>> print(answer)
{{answers}}
"""
LEAST_PASSAGES = 8  # words of a passage


class Accuracy(NamedTuple):
    value: float
    error: float  # its standard error
    examples: int


def define(name: str, folder: Path, path: Path) -> None:
    """Write the definition of task `name` on the files of `folder`. Raises UserError where one is
    missing."""
    for part in ("test", "train"):
        if not (folder / f"{part}.jsonl").is_file():
            raise UserError(f"downstream.files.{name}={folder}: has no {part}.jsonl")
    prompt, answer, taken, tokens = FORMS[name]
    content = {
        "task": f"doremi_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {
                part: str((folder / f"{part}.jsonl").resolve()) for part in ("test", "train")
            }
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

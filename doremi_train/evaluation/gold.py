"""Bits per byte of the gold answers of tasks: how surprising what is right is, given what was
asked. Smooth where an accuracy is noise, as of models below about 1B parameters.

Of an example it is −log₂ p(answer | prompt) over the UTF-8 bytes of the answer, and of a task the
mean over its examples, each of which counts alike, as in OLMo's evaluation and what is built on it
(`bpb` of its ICLMetric). The prompt is that of `evaluation.downstream`: one example that is
answered, the first of train.jsonl, and the question. The space before an answer is scored with it,
and is no byte of it. Of several right answers it is the first. What is longer than a sequence loses
its beginning.

N examples, L tokens that are foreseen.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import orjson
import torch
from tokenizers import Tokenizer
from torch import Tensor

from doremi_train.config import UserError
from doremi_train.data.tokens import tokenizer
from doremi_train.evaluation import downstream

UNANSWERABLE = "unanswerable"  # what is right where there is no answer
_BETWEEN = "\n\n"  # the example that is answered and the question


class Gold(NamedTuple):
    """Examples of a task in tokens."""

    tokens: Tensor  # (N, L + 1): prompt, answer, and then what is not looked at
    answer: Tensor  # (N, L) whether what is foreseen is of the answer
    bytes: Tensor  # (N,) float64, of the answer's text


def bits_per_byte(losses: Tensor, gold: Gold) -> float:
    """The task's, from losses (N, L) in nats; computed in float64."""
    nats = losses.double().masked_fill(~gold.answer, 0.0).sum(1)
    return float((nats / (math.log(2) * gold.bytes)).mean())


def read(name: str, folder: Path, limit: int) -> list[dict[str, Any]]:
    """The first line of train.jsonl, and `limit` of test.jsonl at most. Raises UserError for files
    that are not as the task's form says."""
    downstream.check(name, folder)
    records = []
    for part, count in (("train", 1), ("test", limit)):
        with (folder / f"{part}.jsonl").open("rb") as file:
            records += [orjson.loads(line) for line in itertools.islice(file, count)]
    return records


def asked(name: str, record: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and gold answer of a line of task `name`."""
    prompt = jinja2.Environment().from_string(downstream.FORMS.get(name, downstream.OWN)[0])
    if "answers" in downstream.KEYS.get(name, downstream.OWN_KEYS):
        answer = record["answers"][0].strip() if record["answers"] else UNANSWERABLE
    else:
        answer = record["text"].split()[-1]
    return prompt.render(record), answer


def gold(
    name: str, records: Sequence[Mapping[str, Any]], encoder: Tokenizer, length: int, pad: int
) -> Gold:
    """Lines of task `name` in tokens, after the first of them, which is the one that is answered.
    Raises UserError for an answer that has no token, or more than `length`."""
    (prompt, answer), *examples = (asked(name, record) for record in records)
    asks = [f"{prompt} {answer}{_BETWEEN}{one}" for one, _ in examples]
    whole = [f"{one} {right}" for one, (_, right) in zip(asks, examples, strict=True)]
    before, tokens = (tokenizer.encode(encoder, texts) for texts in (asks, whole))
    counts = [len(all_) - len(some) for all_, some in zip(tokens, before, strict=True)]
    for number, count in enumerate(counts, 1):
        if not 0 < count <= length:
            raise UserError(
                f"downstream.files.{name}: the answer of test.jsonl, line {number} has {count} "
                f"tokens; must have 1 to training.sequence_length={length}"
            )
    width = min(max(map(len, tokens)), length + 1)
    table, where = np.full((len(tokens), width), pad), np.zeros((len(tokens), width - 1), bool)
    for row, (ids, count) in enumerate(zip(tokens, counts, strict=True)):
        kept = ids[-width:]
        table[row, : len(kept)] = kept
        where[row, len(kept) - count - 1 : len(kept) - 1] = True
    sizes = torch.tensor([len(right.encode()) for _, right in examples], dtype=torch.float64)
    return Gold(torch.from_numpy(table), torch.from_numpy(where), sizes)

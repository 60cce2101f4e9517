"""Prompts, completions and messages become tokens of which some carry a loss."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError, fingerprint, judged, listed, read_object

ROLES = ("system", "user", "assistant")  # where there is no chat template, which may know others


Ints = NDArray[np.int64]


# What is said of answers that the chat template lays out otherwise than they were given.
TOLD = {
    "parts_left_out": "the chat template leaves out a part of {count} answers (such as their "
    "reasoning), which is therefore not trained on{place}",
    "opened": "the chat template's prompt opens {count} answers with a text that it does not give "
    "them when they are there (such as <think>), so they are trained without it, and asked with "
    "it{place}; give prompt and completion to have both alike",
    "without_end": "the chat template ends {count} answers with no token that ends what is "
    "generated (eos_token, or eos_token_id of generation_config.json), so it is not learned where "
    "to stop{place}; mend chat_template, or give prompt and completion",
}
# Further fields of a message that belong to an answer, as templates know them.
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Example(NamedTuple):
    ids: NDArray[np.int32]  # (n,)
    # (n,) tokens that carry a loss: those of answers, but never the first.
    carries: NDArray[np.bool_]


class Encoded(NamedTuple):
    """An example, and what of TOLD is to be said of how many of its answers."""

    example: Example
    told: Mapping[str, int]


def coded(example: Example, length: int) -> NDArray[np.int32]:
    """(n,) the first `length` + 1 tokens as they are stored."""
    ids, carries = (part[: length + 1] for part in example)
    return np.where(carries, ids, ~ids).astype(np.int32)


def padded(rows: Sequence[NDArray[np.int32]]) -> Ints:
    """(B, n) of the longest row; behind the others stands −1: id 0, without loss."""
    out = np.full((len(rows), max(map(len, rows), default=2)), -1, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


class Piece(NamedTuple):
    text: str
    carries: bool
    ended: bool = False  # by the end token
    special: bool = False  # special tokens in the text are read as such


class Encoder:
    """The tokeniser of a local transformers folder, and its chat template."""

    def __init__(self, folder: str, key: str) -> None:
        """Raises UserError where `folder`, given as `key`, has no tokeniser, or one without an end
        token."""
        from transformers import AutoTokenizer

        remedy = "give a model folder with its tokenizer.json and tokenizer_config.json"
        with judged(f"{key}={folder}: has no tokeniser that transformers loads", remedy):
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            opened = tokenizer("").input_ids[:1]  # what its settings are is judged when it is used
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{key}={folder}: its tokeniser has no eos_token, which ends an answer; "
                "name one in its tokenizer_config.json"
            )
        self.tokenizer, self.end = tokenizer, int(tokenizer.eos_token_id)
        self._ends = {self.end, *_generation_ends(Path(folder))}
        self._begin = [tokenizer.bos_token_id] if opened == [tokenizer.bos_token_id] else []

    @property
    def fingerprint(self) -> str:
        """Content address of what decides the ids: changes with the vocabulary, its rules and the
        chat template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        whole = (
            backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        )
        return fingerprint([whole, self.tokenizer.chat_template, self._begin, self.end])

    def encode(self, record: Mapping[str, Any], place: str) -> Example:
        """Raises UserError naming `place` (file and line) for a record that is no such example."""
        return self.encoded(record, place).example

    def encoded(self, record: Mapping[str, Any], place: str) -> Encoded:
        """The same with what is to be said of it."""
        told: Counter[str] = Counter()
        pieces = _pieces(record, place, self, told)
        templated = pieces[0].special if pieces else False
        ids: list[int] = [] if templated else list(self._begin)
        carries = [False] * len(ids)
        for piece in pieces:
            with judged(f"{place}: text", "mend it, or the tokeniser", "the tokeniser"):
                encoding = self.tokenizer(
                    piece.text,
                    add_special_tokens=False,
                    split_special_tokens=not piece.special,
                    verbose=False,
                )
            added = [*encoding.input_ids, *[self.end] * piece.ended]
            ids += added
            # An empty answer is no answer.
            answered = piece.carries and piece.text != ""
            carries += [answered] * len(added)
            told["without_end"] += answered and not self._ends.intersection(added)
        carries[:1] = [False] * len(carries[:1])  # nothing comes before it
        return Encoded(Example(np.array(ids, np.int32), np.array(carries, bool)), +told)

    def rendered(self, messages: list[dict[str, str]], place: str, asking: bool) -> str:
        """Messages as the chat template lays them out; `asking` for the next answer."""
        with judged(f"{place}: messages", "mend them", "the tokeniser's chat template"):
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asking
            )


def _generation_ends(folder: Path) -> list[int]:
    """Ids that end what is generated, of the folder's generation_config.json."""
    file = folder / "generation_config.json"
    if not file.exists():
        return []
    ends = read_object(file, str(file), "mend it, or delete it").get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _pieces(
    record: Mapping[str, Any], place: str, encoder: Encoder, told: Counter[str]
) -> list[Piece]:
    if ("messages" in record) == ("prompt" in record or "completion" in record):
        raise UserError(
            f"{place}: give either prompt and completion, or messages; the keys there: "
            f"{listed(record)}"
        )
    if "messages" in record:
        messages = _messages(record["messages"], place)
        return (
            _templated(messages, place, encoder, told)
            if encoder.tokenizer.chat_template
            else _plain(messages, place, told)
        )
    for key in ("prompt", "completion"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{place}: {key} must be text, not {record.get(key)!r:.100}")
    return [Piece(record["prompt"], False), Piece(record["completion"], True, ended=True)]


def _messages(messages: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{place}: messages must be a list of role and content, not {messages!r:.100}"
        )
    for nth, message in enumerate(messages, 1):
        given = message if isinstance(message, dict) else {}
        for key in ("role", "content"):
            if not isinstance(given.get(key), str):
                raise UserError(
                    f"{place}, message {nth}: needs role and content, both text; it is "
                    f"{message!r:.100}"
                )
    return messages


def _plain(messages: list[dict[str, str]], place: str, told: Counter[str]) -> list[Piece]:
    pieces, asked = [], ""
    for nth, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UserError(
                f"{place}, message {nth}: role={role!r}: unknown; allowed: {', '.join(ROLES)}"
            )
        if role == "assistant":
            pieces += [Piece(f"{asked}<|assistant|>\n", False), Piece(content, True, ended=True)]
            asked = "\n"
            told["parts_left_out"] += _lacks(content, message)
        else:
            asked += f"<|{role}|>\n{content}\n"
    return pieces


def _templated(
    messages: list[dict[str, str]], place: str, encoder: Encoder, told: Counter[str]
) -> list[Piece]:
    """Pieces of the messages up to the last answer, as the chat template lays them out. An answer
    is what follows the longest common beginning of the layout that asks for it and the one that has
    it."""
    pieces, done = [], ""
    for nth, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = encoder.rendered(messages[:nth], place, asking=True)
        after = encoder.rendered(messages[: nth + 1], place, asking=False)
        start = len(before)
        if not after.startswith(before):
            # Its own beginning is the answer's, also where it begins as the opening does.
            asked = len(encoder.rendered(messages[:nth], place, asking=False)) if nth else 0
            same = itertools.takewhile(
                lambda two: two[0] == two[1], zip(before, after, strict=False)
            )
            start = sum(1 for _ in same)
            where = after.find(message["content"].strip(), asked)
            start = start if where < 0 else min(start, where)
            told["opened"] += start >= asked and message["content"] != ""
        else:
            asked = start
        if not (before.startswith(done) and after.startswith(done)) or start < max(
            asked, len(done)
        ):
            raise UserError(
                f"{place}, message {nth + 1}: the tokeniser's chat template lays it out otherwise "
                "once more messages follow, so this answer cannot be told from the rest; give each "
                "answer as an example of its own"
            )
        answer = after[start:] if message["content"] else ""
        if answer and _lacks(answer, message):
            # What the prompt opens is not left out.
            plain = len(encoder.rendered(messages[:nth], place, asking=False)) if nth else 0
            told["parts_left_out"] += _lacks(after[plain:], message)
        pieces += [
            Piece(after[len(done) : start], False, special=True),
            Piece(answer, True, special=True),
        ]
        done = after
    return pieces


def _lacks(answer: str, message: Mapping[str, Any]) -> bool:
    """Whether an answer lacks a part of its message, white space aside."""
    has = "".join(answer.split())
    parts = (message.get(key) for key in ("content", *_REASONING))
    return any("".join(part.split()) not in has for part in parts if isinstance(part, str))

"""Prompts, completions and messages become tokens of which some carry a loss."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doremi_train.config import UserError, fingerprint
from doremi_train.storage.steady import one_line

ROLES = ("system", "user", "assistant")  # where there is no chat template, which may know others


Ints = NDArray[np.int64]


class Example(NamedTuple):
    ids: NDArray[np.int32]  # (n,)
    # (n,) tokens that carry a loss: those of answers, but never the first.
    carries: NDArray[np.bool_]


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

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # it fails in many ways
            raise UserError(
                f"{key}={folder}: has no tokeniser that transformers loads "
                f"({one_line(error)[:300]}); give a model folder with its tokenizer.json and "
                "tokenizer_config.json"
            ) from None
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{key}={folder}: its tokeniser has no eos_token, which ends an answer; "
                "name one in its tokenizer_config.json"
            )
        self.tokenizer, self.end = tokenizer, int(tokenizer.eos_token_id)
        self._begin = (
            [tokenizer.bos_token_id]
            if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
            else []
        )

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
        pieces = _pieces(record, place, self)
        templated = pieces[0].special if pieces else False
        ids: list[int] = [] if templated else list(self._begin)
        carries = [False] * len(ids)
        for piece in pieces:
            encoding = self.tokenizer(
                piece.text,
                add_special_tokens=False,
                split_special_tokens=not piece.special,
                verbose=False,
            )
            added = [*encoding.input_ids, *[self.end] * piece.ended]
            ids += added
            # An empty answer is no answer.
            carries += [piece.carries and piece.text != ""] * len(added)
        carries[:1] = [False] * len(carries[:1])  # nothing comes before it
        return Example(np.array(ids, np.int32), np.array(carries, bool))

    def rendered(self, messages: list[dict[str, str]], place: str, asking: bool) -> str:
        """Messages as the chat template lays them out; `asking` for the next answer."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asking
            )
        except Exception as error:  # of the template
            raise UserError(
                f"{place}: the tokeniser's chat template refuses these messages "
                f"({one_line(error)[:300]}); mend them"
            ) from None


def _pieces(record: Mapping[str, Any], place: str, encoder: Encoder) -> list[Piece]:
    if ("messages" in record) == ("prompt" in record or "completion" in record):
        raise UserError(
            f"{place}: give either prompt and completion, or messages; the keys there: "
            f"{', '.join(sorted(record)) or 'none'}"
        )
    if "messages" in record:
        messages = _messages(record["messages"], place)
        return (
            _templated(messages, place, encoder)
            if encoder.tokenizer.chat_template
            else _plain(messages, place)
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


def _plain(messages: list[dict[str, str]], place: str) -> list[Piece]:
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
        else:
            asked += f"<|{role}|>\n{content}\n"
    return pieces


def _templated(messages: list[dict[str, str]], place: str, encoder: Encoder) -> list[Piece]:
    """Pieces of the messages up to the last answer, as the chat template lays them out."""
    pieces, done = [], ""
    for nth, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = encoder.rendered(messages[:nth], place, asking=True)
        after = encoder.rendered(messages[: nth + 1], place, asking=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(
                f"{place}, message {nth + 1}: the tokeniser's chat template lays it out otherwise "
                "once more messages follow, so this answer cannot be told from the rest; give each "
                "answer as an example of its own"
            )
        answer = after[len(before) :] if message["content"] else ""
        pieces += [
            Piece(before[len(done) :], False, special=True),
            Piece(answer, True, special=True),
        ]
        done = after
    return pieces

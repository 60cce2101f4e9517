"""Tokenisers: load one from this machine, or learn byte-level BPE from a sample of the training
text."""

import json
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from doremi_train.config import Refused, UserError, judging, read_object
from doremi_train.config import fingerprint as content_address

END_OF_DOCUMENT = "<|endoftext|>"
USUAL_ENDS = (  # in this order: a tokeniser that has several ends documents with the first
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "[SEP]",
)
# Learning takes a time that grows with the square of a word's length.
LONGEST_WORD = 1000
WRITES_ALL = "give a tokeniser that writes all text (byte-level BPE does), or `train` to learn one"


def load(name: str) -> Tokenizer:
    """The tokeniser of a `tokenizer.json` or of a local transformers folder; nothing is ever
    downloaded.

    Raises UserError where `name` is neither.
    """
    path = Path(name)
    if path.is_dir():
        file = path / "tokenizer.json"
        return _ready(_parse(file) if file.is_file() else _convert(path))
    if path.is_file():
        return _ready(_parse(path))
    raise UserError(
        f"data.tokenizer={name!r}: no such file or folder; give a tokenizer.json, a local "
        "transformers folder or `train` to learn one from the data"
    )


def learn(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocabulary_size` tokens; id 0 ends a document. A function of the
    texts alone, whose words it sees in parts of at most LONGEST_WORD bytes."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.FixedLength(LONGEST_WORD)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return _ready(tokenizer)


def parse(text: str) -> Tokenizer:
    """The tokeniser that `serialise` wrote."""
    return _ready(Tokenizer.from_str(text))


def serialise(tokenizer: Tokenizer) -> str:
    """The content of a tokenizer.json."""
    return tokenizer.to_str(pretty=True)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Content address: does not depend on how the file was laid out, nor on truncation and
    padding."""
    return content_address(json.loads(tokenizer.to_str()))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest token id + 1: what an embedding needs, also where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_document(tokenizer: Tokenizer, name: str | None = None, said: str | None = None) -> int:
    """Id of the token that ends a document: `name` (data.end_of_document), else what its folder has
    `said`, else the first usual one that exists, special tokens before others.

    Raises UserError where the tokeniser has no such token.
    """
    special = [
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    ]
    if name is not None or said is not None:
        candidates: list[str] = [str(name if name is not None else said)]
    else:
        candidates = sorted(USUAL_ENDS, key=lambda usual: usual not in special)
    for candidate in candidates:
        token = tokenizer.token_to_id(candidate)
        if token is not None:
            return int(token)
    allowed = (
        f"its special tokens are {special[:20]}"
        if special
        else "it has no special tokens, so name any of its tokens"
    )
    if name is not None:
        received = "not a token"
    elif said is not None:
        received = f"its folder says that eos_token is {said!r}, which is not a token"
    else:
        received = "not given, and none of the usual names is a token"
    raise UserError(
        f"data.end_of_document={name!r}: {received} of this tokeniser; {allowed}; "
        "set data.end_of_document to the token that ends a document"
    )


def first_usual_end(tokenizer: Tokenizer) -> str | None:
    """The first of the usual ends that is a token at all."""
    return next((end for end in USUAL_ENDS if tokenizer.token_to_id(end) is not None), None)


def said_end(name: str) -> str | None:
    """The end of a document that the folder of a tokeniser states: its eos_token.

    Raises UserError where the files that say so cannot be read.
    """
    path = Path(name)
    folder = path.parent if path.name == "tokenizer.json" and path.is_file() else path
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if not file.is_file():
            continue
        remedy = "mend it, or give the tokenizer.json alone, in a folder of its own"
        end = read_object(file, f"data.tokenizer={name!r}: {file}", remedy).get("eos_token")
        content = end.get("content") if isinstance(end, dict) else end
        if isinstance(content, str) and content:
            return content
    return None


class CannotEncode(UserError):
    """A text that the tokeniser raises an error on."""

    def __init__(self, number: int, text: str, cause: str) -> None:
        shown = text if len(text) <= 60 else f"{text[:57]}…"
        super().__init__(f"data.tokenizer cannot encode {shown!r} ({cause}); {WRITES_ALL}")
        self.number, self.cause = number, cause


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], dtype: type[np.unsignedinteger] = np.uint32
) -> list[np.ndarray]:
    """Token ids of each text, without special tokens, on all cores.

    Raises CannotEncode for the first text that the tokeniser raises an error on.
    """
    return [np.array(e.ids, dtype) for e in encodings(tokenizer, texts)]


def encodings(tokenizer: Tokenizer, texts: Sequence[str], offsets: bool = False) -> list[Encoding]:
    """What the library says of each text, with or without where its tokens stand; raises as
    `encode`."""
    texts = list(texts)
    batch = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    try:
        with judging():
            return batch(texts, add_special_tokens=False)
    except Refused as whole:
        for number, text in enumerate(texts):
            try:
                with judging():
                    batch([text], add_special_tokens=False)
            except Refused as error:
                raise CannotEncode(number, text, str(error)) from None
        raise CannotEncode(0, "", str(whole)) from None


def _ready(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "<|endoftext|>" written in a text is text: it must not end the document.
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # BPE dropout would make the tokens random
    return tokenizer


def _parse(file: Path) -> Tokenizer:
    try:
        with judging():
            return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Refused as error:
        raise UserError(
            f"data.tokenizer={str(file)!r}: not a readable tokenizer.json ({error}); "
            "give the file that the tokenizers library writes, or `train` to learn one"
        ) from None


def _convert(folder: Path) -> Tokenizer:
    """A folder with only the files of a slow tokeniser (vocab.txt, *.model): transformers converts
    them."""
    from transformers import AutoTokenizer  # slow to import, rarely needed
    from transformers.utils import logging

    _require_packages(folder)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it guesses on the way misleads
    try:
        with judging():
            backend = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            ).backend_tokenizer
            return Tokenizer.from_str(backend.to_str())
    except Refused as error:
        raise UserError(
            f"data.tokenizer={str(folder)!r}: neither has this folder a tokenizer.json, nor can "
            f"transformers read another tokeniser there ({error}); give a tokenizer.json, or "
            "`train` to learn one"
        ) from None
    finally:
        logging.set_verbosity(before)


def _require_packages(folder: Path) -> None:
    """Raises UserError where the vocabulary is in a model file whose package is not installed."""
    if any(folder.glob("vocab.*")):
        return
    for file in sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")]):
        package = "tiktoken" if _is_tiktoken(file) else "sentencepiece"
        if find_spec(package) is None:
            raise UserError(
                f"data.tokenizer={str(folder)!r}: {file.name} needs the package {package}: "
                f"pip install {package}; or give a tokenizer.json, or `train` to learn one"
            )


def _is_tiktoken(file: Path) -> bool:
    """Whether a model is lines of base64 and a rank; SentencePiece's are binary."""
    try:
        with file.open("rb") as lines:
            return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", lines.readline(10_000)) is not None
    except OSError:
        return False

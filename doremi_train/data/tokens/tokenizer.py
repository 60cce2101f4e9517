"""Tokenisers: load one from this machine, or learn byte-level BPE from a sample of the training
text."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from doremi_train.config import UserError
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
    texts alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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


def end_of_document(tokenizer: Tokenizer, name: str | None = None) -> int:
    """Id of the token that ends a document: `name` (data.end_of_document), else the first usual one
    that exists.

    Raises UserError where the tokeniser has no such token.
    """
    for candidate in (name,) if name is not None else USUAL_ENDS:
        token = tokenizer.token_to_id(candidate)
        if token is not None:
            return int(token)
    special = [
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    ]
    allowed = (
        f"its special tokens are {special[:20]}"
        if special
        else "it has no special tokens, so name any of its tokens"
    )
    received = (
        "not given, and none of the usual names is a token" if name is None else "not a token"
    )
    raise UserError(
        f"data.end_of_document={name!r}: {received} of this tokeniser; {allowed}; "
        "set data.end_of_document to the token that ends a document"
    )


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], dtype: type[np.unsignedinteger] = np.uint32
) -> list[np.ndarray]:
    """Token ids of each text, without special tokens, on all cores."""
    return [
        np.array(e.ids, dtype)
        for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


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
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(
            f"data.tokenizer={str(file)!r}: not a readable tokenizer.json ({error}); "
            "give the file that the tokenizers library writes, or `train` to learn one"
        ) from None


def _convert(folder: Path) -> Tokenizer:
    """A folder with only the files of a slow tokeniser (vocab.txt, *.model): transformers converts
    them."""
    from transformers import AutoTokenizer  # slow to import, rarely needed

    try:
        backend = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
        return Tokenizer.from_str(backend.to_str())
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.tokenizer={str(folder)!r}: neither has this folder a tokenizer.json, nor can "
            f"transformers read another tokeniser there ({reason}); give a tokenizer.json, or "
            "`train` to learn one"
        ) from None

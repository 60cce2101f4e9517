"""The sample of every domain that a tokeniser is learnt from."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from doremi_train.config import UserError
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.corpus.routing import Router
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.data.tokens.encoding import Meter, Progress
from doremi_train.files import write_bytes

# How many times the tokeniser's sample is read in search of domains, where the files do not name
# them.
READ_AHEAD = 4


def sampled_tokenizer(
    target: Path, options: DataOptions, sources: list[Source], progress: Progress
) -> Tokenizer:
    """The store's tokeniser: given, or learned once; its file also serves a continued
    preparation."""
    file = target / "tokenizer.json"
    if file.exists():
        return tokenizers.parse(file.read_text(encoding="utf-8"))
    if options.tokenizer == "train":
        texts = _sample(options, sources, Meter(sources, "learning the tokeniser", progress))
        tokenizer = tokenizers.learn(texts, options.vocabulary_size)
    else:
        tokenizer = tokenizers.load(options.tokenizer)
    write_bytes(file, tokenizers.serialise(tokenizer).encode())
    return tokenizer


def _sample(options: DataOptions, sources: list[Source], meter: Meter) -> list[str]:
    """The first training documents of each domain, up to an even share of data.tokenizer_sample
    characters.

    Where the files do not name the domains, a share shrinks whenever a new domain is met, and at
    most READ_AHEAD times the sample is read.
    """
    shares = {source.domain: _Share() for source in sources if source.domain is not None}
    named, seen = bool(shares), 0
    for domain, text in _sample_texts(options, sources, shares, meter):
        share = shares.setdefault(domain, _Share())
        share.add(text, _even(options, shares))
        seen += len(text)
        if not named and seen >= READ_AHEAD * options.tokenizer_sample:
            break
    for share in shares.values():
        share.keep(_even(options, shares))
    return [text for domain in sorted(shares) for text in shares[domain].texts]


def _sample_texts(
    options: DataOptions, sources: list[Source], shares: dict[str, "_Share"], meter: Meter
) -> Iterator[tuple[str, str]]:
    """(domain, text) of training pieces, passing over the rest of a named domain once its share is
    full."""
    router, bad = Router(options, sources), BadLines(options)
    for source in router.order:
        named = (
            shares.get(source.domain)
            if source.domain is not None and source.split != "validation"
            else None
        )
        if named is not None and named.characters >= _even(options, shares):
            continue
        for split, piece in router.pieces(source, bad):
            if piece.text is None:
                raise UserError(
                    f"data.tokenizer='train': {source.url} is already tokenised; give the "
                    "tokeniser it was made with"
                )
            meter.show(meter.read(source, len(piece.text)))
            if split == "train":
                yield piece.domain, piece.text
            if named is not None and named.characters >= _even(options, shares):
                break


def _even(options: DataOptions, shares: dict[str, "_Share"]) -> int:
    return max(options.tokenizer_sample // len(shares), 1)


class _Share:
    """Text of one domain for the tokeniser."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.characters = 0

    def add(self, text: str, most: int) -> None:
        """Append as much of the text as fits `most` characters."""
        part = text[: max(most - self.characters, 0)]
        if part:
            self.texts.append(part)
            self.characters += len(part)

    def keep(self, most: int) -> None:
        """Keep the first `most` characters."""
        texts, self.texts, self.characters = self.texts, [], 0
        for text in texts:
            self.add(text, most)

"""A small corpus of generated text."""

import json
import random
from collections.abc import Iterator
from pathlib import Path


def words(seed: int, letters: str, vocabulary: int) -> Iterator[str]:
    """Endless words over `letters`, frequent ones first (Zipf): every seed a language of its
    own."""
    random_ = random.Random(seed)
    known = ["".join(random_.choices(letters, k=random_.randint(2, 8))) for _ in range(vocabulary)]
    weights = [1 / (rank + 1) for rank in range(vocabulary)]
    while True:
        yield from random_.choices(known, weights, k=1000)


def documents(seed: int, letters: str, vocabulary: int, characters: int) -> Iterator[str]:
    """Documents of about 60 words until there are `characters` of them."""
    stream = words(seed, letters, vocabulary)
    while characters > 0:
        text = " ".join(next(stream) for _ in range(60))
        characters -= len(text)
        yield text


def write_jsonl(path: Path, texts: Iterator[str] | list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path

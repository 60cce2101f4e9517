"""A corpus whose given domains each hide several topics."""

import json
import random
from pathlib import Path

from helpers.corpus import write_jsonl

COMMON = 300  # words that all topics share
OWN = 150  # words of each topic
SHARED = 0.5  # part of the words that are common ones
WORDS = 80  # of a document, about


def document(topic: int, number: int) -> str:
    """A document of a topic: common words, and some of its own, each frequent ones first (Zipf)."""
    random_ = random.Random(topic * 1_000_003 + number)
    common = [_word(n) for n in range(COMMON)]
    own = [_word(COMMON + OWN * topic + n) for n in range(OWN)]
    weights = {id(side): [1 / (n + 3) for n in range(len(side))] for side in (common, own)}
    length = random_.randint(WORDS // 2, WORDS * 3 // 2)
    sides = [common if random_.random() < SHARED else own for _ in range(length)]
    return " ".join(random_.choices(side, weights[id(side)])[0] for side in sides)


def _word(number: int) -> str:
    random_ = random.Random(-number - 1)
    return "".join(random_.choices("bcdfghklmnprstvz", k=3) + random_.choices("aeiou", k=3))


def planted(root: Path, domains: int, each: int, documents: int) -> dict[str, int]:
    """Write `domains` folders that hide `each` topics, so many documents of each. Returns the topic
    of every text."""
    topics: dict[str, int] = {}
    for domain in range(domains):
        texts = []
        for topic in range(domain * each, (domain + 1) * each):
            own = [document(topic, number) for number in range(documents)]
            topics |= dict.fromkeys(own, topic)
            texts += own
        random.Random(domain).shuffle(texts)
        write_jsonl(root / f"given{domain}" / "train.jsonl", texts)
    return topics


def texts_of(root: Path) -> dict[tuple[str, int], str]:
    """{(name of the file as sidecars have it, row): text} of a data.root of JSON lines."""
    return {
        (f"{path.parent.name}/{path.name}", row): json.loads(line)["text"]
        for path in sorted(root.glob("*/*.jsonl"))
        for row, line in enumerate(path.open())
    }

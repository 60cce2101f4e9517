"""Tasks of real text, made from a folder of domains: given how a section begins, write what
follows. Of manual pages a section is what stands under a heading, elsewhere it is a paragraph. A
pool holds examples of every domain; the target is one of these, of which a few more examples are
given and others are evaluated.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planted_tasks import write
from doremi_train.data.corpus import opening, reading, sources
from doremi_train.data.options import DataOptions

LENGTH = 128  # tokens of a sequence
BEGINNING, END = 60, 240  # characters of a prompt and of its completion, at most
SERVED, TESTED = 32, 48  # examples of the target that are given, and that are evaluated
_HEADING = re.compile(r"\n(?=[A-Z][A-Z ]{3,}\n)")


def examples(root: Path, domain: str, split: str) -> Iterator[dict[str, Any]]:
    """Examples, two of a document, so that pages are many."""
    where = DataOptions(embedded=None, root=str(root))
    for source in sources.resolve(where):
        if (source.domain, source.split) == (domain, split):
            for piece in reading.read(source, where, opening.BadLines(where)):
                yield from itertools.islice(_sections(piece.text or ""), 2)


def _sections(text: str) -> Iterator[dict[str, Any]]:
    parts = _HEADING.split(text)
    for part in parts[1:] if len(parts) > 1 else text.split("\n\n"):
        words = re.split(r"(?<=\s)", part.strip()[: BEGINNING + END])
        lengths = np.cumsum([len(word) for word in words])
        begins = int((lengths <= BEGINNING).sum())
        prompt, completion = "".join(words[:begins]), "".join(words[begins:])
        if begins and len(completion) > END // 2:
            yield {"prompt": prompt, "completion": completion}


def domains(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def selecting(folder: Path, base: Path, root: Path, target: str, count: int) -> list[str]:
    """Overrides that select from a pool with at most `count` examples of each domain."""
    held: list[dict[str, Any]] = []
    for domain in domains(root):
        candidates = list(itertools.islice(examples(root, domain, "train"), 2 * count))
        picked = [candidates[n] for n in np.random.default_rng(0).permutation(len(candidates))]
        if domain == target:  # of other examples than those of the pool
            write(folder / f"target/{target}.jsonl", picked[-SERVED:])
            picked = picked[:-SERVED]
        else:
            held += itertools.islice(examples(root, domain, "validation"), 4)
        write(folder / f"pool/{domain}.jsonl", picked[:count])
    write(folder / "held.jsonl", held)
    write(
        folder / f"test/{target}.jsonl",
        list(itertools.islice(examples(root, target, "validation"), TESTED)),
    )
    return [
        *("selection=less", f"finetune.model={base}", *_TRAINING, "training.batch_size=16"),
        *("training.schedule=constant", "training.learning_rate=0.001", "finetune.lora.rank=null"),
        "data.embedded=null",
        f"data.domains={{pool: {{train: [{folder}/pool/*.jsonl], "
        f"validation: [{folder}/held.jsonl]}}}}",
        f"selection.targets={{{target}: [{folder}/target/{target}.jsonl]}}",
    ]


_TRAINING = (
    "training.threads=1",
    f"training.sequence_length={LENGTH}",
    f"evaluation.sequences={TESTED}",
)


def pretraining(folder: Path, root: Path, steps: int) -> tuple[list[str], Path]:
    """The command that makes a base model of all domains, and where it leaves it."""
    run_dir = folder / "base"
    return [
        *(
            "stage=reference",
            f"run_dir={run_dir}",
            f"data.root={root}",
            "data.vocabulary_size=2048",
            "model=tiny",
        ),
        *(
            *_TRAINING,
            "evaluation.sequences=8",
            "training.batch_size=16",
            f"training.steps={steps}",
        ),
        "training.learning_rate=0.004",
    ], run_dir / "reference/model"

"""Contents of domains, as stage=regroup counted them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from doremi_train.config import UserError, judged
from doremi_train.evaluation.statistics import listed
from doremi_train.files import read_json
from doremi_train.methods.content import Floats

REMEDY = "give the folder run_dir/regroup of stage=regroup"


def read(folders: Sequence[str], key: str) -> dict[str, Floats]:
    """{domain: (F,) part of its words in each fine cluster}, of the domains that the first folder
    made, and of those that were given to any.

    Raises UserError where a folder is none, or has other clusters than the first.
    """
    found: dict[str, Floats] = {}
    model = None
    for folder in folders:
        with judged(f"{key}={folder}", REMEDY, "the reader"):
            counted = read_json(Path(folder) / "result.json")["clusters"]
            own, given, made = (counted[name] for name in ("model", "given", "domains"))
            parts = {name: np.array(words, np.float64) for name, words in given.items()}
            if model is None:
                parts = {name: np.array(words, np.float64) for name, words in made.items()} | parts
        if model not in (None, own):
            raise UserError(
                f"{key}={folder}: has other clusters than {folders[0]}; make it with "
                f"regroup.model={folders[0]}"
            )
        twice = sorted(parts.keys() & found.keys())
        if twice:
            raise UserError(f"{key}={folder}: {listed(twice)} is in an earlier folder too; rename")
        model = own
        found |= {name: words / words.sum() for name, words in parts.items() if words.sum() > 0}
    return found

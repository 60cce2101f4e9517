"""The stages of a run, each a module with `run(session)`, read top to bottom.

Nothing is imported here: a mistake in a command is answered without torch.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    """What `stage=` runs."""

    module: str  # of this package
    several: bool = False  # it is more than one run, which have locks and a status of their own


STAGES: dict[str, Stage] = {
    "pipeline": Stage("pipeline", several=True),
    "plan": Stage("plan", several=True),
    "vocabulary": Stage("vocabulary"),
    "select": Stage("select"),
    "regroup": Stage("regroup"),
    "prepare": Stage("prepare"),
    "reference": Stage("reference"),
    "proxy": Stage("proxy"),
    "swarm": Stage("mixtures"),
    "main": Stage("main"),
    "evaluate": Stage("evaluate", several=True),
    "report": Stage("report", several=True),
    "export": Stage("export", several=True),
    "classify": Stage("classify", several=True),
    "finetune": Stage("finetune"),
    "compare": Stage("compare", several=True),
    "fit": Stage("fit", several=True),
    "headroom": Stage("headroom"),
    "verify": Stage("verify"),
}
"""What `stage=swarm` runs:

>>> from doremi_train.stages import STAGES
>>> STAGES["swarm"]
Stage(module='mixtures', several=False)
"""

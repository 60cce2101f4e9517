"""The whole job: prepare, plan, reference, proxy, weights, main and its comparisons, evaluation,
report.

Each stage does what it needs that is not finished, so the order below is only the order of the
story.
"""

from doremi_train.stages import plan, report
from doremi_train.stages.session import Session


def run(session: Session) -> None:
    plan.run(session)
    report.run(session)

"""Costs of a swarm, and of the run that its mixture is for."""

from typing import Any

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.stages.mixtures import swarm
from doremi_train.stages.planning.bill import Bill
from doremi_train.stages.runs import budget, language_model
from doremi_train.stages.runs.ahead import Ahead, Pipeline
from doremi_train.stages.session import Session


def of_swarm(session: Session, store: TokenStore) -> dict[str, Any]:
    """FLOPs of a swarm, and of the run that its mixture is for, as where nothing is done yet."""
    bill, pipeline = Bill(session, store, {}), Pipeline(session)
    swarm.ahead(session, store, pipeline)
    whole = [run._replace(done=0) for run in pipeline.runs if not run.same_as]
    training, tokens = session.config.training, budget.final_tokens(session)
    shape = language_model.resolved_model(session, store, "main")
    steps = max(tokens // (training.batch_size * training.sequence_length), 1)
    return {
        "swarm_runs": len(whole),
        "swarm_flops": float(sum(bill.run(run)["flops"] for run in whole)),
        "final_tokens": tokens,
        "final_flops": float(bill.run(Ahead("main", "main", shape, steps, 0, None))["flops"]),
    }

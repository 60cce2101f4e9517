"""What the small runs of every way cost, as parts of the final run."""

from collections.abc import Mapping
from typing import Any

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import swarm
from doremi_train.stages.planning.bill import Bill
from doremi_train.stages.runs import budget, language_model
from doremi_train.stages.runs.ahead import Ahead
from doremi_train.stages.session import Session


def of_ways(
    session: Session, store: TokenStore, bill: Bill, stages: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """FLOPs before the final run of `main.tokens`, {way: in units of it}. Those of the way that is
    asked for are of its `stages` in the plan; of others, by how many runs of which kind they are,
    as if none was there and each its own."""
    config, domains, length = session.config, len(store.domains), session.config.training
    proxy, draws = config.proxy, config.swarm.runs or swarm.RUNS_PER_DOMAIN * domains
    references = 0 if config.reference.path is not None else 1
    counts = {
        "doremi": {
            "reference": proxy.rounds * references,
            "proxy": proxy.rounds * proxy.seeds,
        },
        "doge": {"doge": proxy.seeds},
        "mixmin": {"expert": domains},
        "swarm": {"swarm": draws * config.swarm.rounds + config.swarm.candidates + 3},
        "search": {"swarm": draws},
        "dro": {"reference": 0 if config.online.target_losses else references},
    }
    shape = language_model.resolved_model(session, store)
    final = language_model.resolved_model(session, store, "main")
    tokens = length.batch_size * length.sequence_length
    steps = max(budget.final_tokens(session) // tokens, 1)

    def flops(name: str, kind: str, model: dict[str, Any], steps: int) -> float:
        return float(bill.run(Ahead(name, kind, model, steps, 0, None))["flops"])

    whole = flops("main", "main", final, steps)
    each = {kind: flops(kind, kind, shape, length.steps) for of in counts.values() for kind in of}
    shares = {
        way: sum(count * each[kind] for kind, count in of.items()) / whole
        for way, of in counts.items()
    }
    asked = [stage["whole_flops"] for stage in stages.values() if stage["kind"] != "main"]
    return shares | {session.method: sum(asked) / whole}

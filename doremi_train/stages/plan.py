"""Plan of what would run, and at what cost, before anything does: plan.json, and the same in a
terminal.

K domains, T tokens a sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from doremi_train import files
from doremi_train.config import fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import detectors
from doremi_train.methods import simplex
from doremi_train.model import costs
from doremi_train.parallel import comm, place
from doremi_train.reports import plan_text
from doremi_train.stages import headroom, main, prepare
from doremi_train.stages.mixtures import follows
from doremi_train.stages.planning import advice, ahead, losses_from, shares, warnings
from doremi_train.stages.planning.bill import Bill
from doremi_train.stages.runs import budget, reference, reference_losses
from doremi_train.stages.runs.ahead import Ahead
from doremi_train.stages.session import Session
from doremi_train.training import frozen


def run(session: Session) -> dict[str, Any]:
    """Sizes, epochs, FLOPs, memory and time of every run, and warnings.

    Raises UserError where there are more processes than sequences in a batch.
    """
    store = prepare.run(session)
    training = session.config.training
    world = session.world
    share = max(training.batch_size, world.size) if session.planned else training.batch_size
    rows = world.largest(share, training.micro_batch_size)
    runs, learned = comm.on_first(lambda: ahead.runs(session, store))
    shape = (rows, training.sequence_length, training.precision, training.activation_checkpointing)
    paces = {  # on all processes at once, since they may share a machine
        address: f"it is a plan for {world.size} processes, which are not here"
        if session.planned
        else costs.measure(config, *shape, session.place.device)
        for address, config in {
            fingerprint(run.config): run.config for run in runs if run.left
        }.items()
    }
    return comm.on_first(lambda: _write(session, store, runs, learned, paces))


def _write(
    session: Session,
    store: TokenStore,
    runs: Sequence[Ahead],
    learned: Tensor | None,
    paces: Mapping[str, costs.Pace | str],
) -> dict[str, Any]:
    bill = Bill(session, store, paces)
    stages, evaluation = {run.name: bill.run(run) for run in runs}, bill.evaluation(runs)
    seconds = [part["seconds"] for part in (*stages.values(), evaluation)]
    kinds = {run.kind for run in runs}
    domains = _domains(session, store, learned, small_runs=bool(kinds & {"proxy", "doge"}))
    warned = warnings.warnings(session, domains, proxies="proxy" in kinds)
    instead = follows.unfollowed(session, store)
    warned["processes"] = _too_many(session)
    warned["objective"] = [] if instead is None else [f"{instead}."]
    losses = _reference_losses(session, store, runs)
    plan = {
        "domains": domains,
        "stages": stages,
        "evaluation": evaluation,
        "total_flops": sum(part["flops"] for part in (*stages.values(), evaluation)),
        "total_seconds": None if None in seconds else sum(seconds),
        "not_measured": sorted({pace for pace in paces.values() if isinstance(pace, str)}),
        "place": f"{session.strategy}, {session.world.size} processes, planned"
        if session.planned
        else str(session.place),
        "processes": session.world.size,
        "write_speed": session.config.engine.write_speed,
        "accumulation": bill.accumulation(runs),
        "reference_losses": losses,
        "reference_ways": _ways(session, bill.ways_to_losses(runs, losses)) if losses else None,
        "absent": _absent(session, len(store.domains)) if "proxy" in kinds else None,
        "settled": session.config.proxy.settled if "proxy" in kinds else None,
        "headroom": headroom.ahead(session, store) if "swarm" in kinds else None,
        "small_runs": shares.of_ways(session, store, bill, stages),
        "warnings": [message for messages in warned.values() for message in messages],
    }
    plan["advice"] = advice.advise(_known(session, plan))
    files.write_json(session.run_dir / "plan.json", plan)
    plan_text.show(plan, warned, session.store, session.config.main.tokens)
    return plan


def _too_many(session: Session) -> list[str]:
    """A warning where more processes are planned for than a batch has sequences."""
    batch, size = session.config.training.batch_size, session.world.size
    return [
        f"training.batch_size={batch} is less than the {size} processes that are planned for, "
        "which such a run refuses: this is a plan of a sequence for each."
    ] * (batch < size)


def _known(session: Session, plan: Mapping[str, Any]) -> advice.Known:
    """What advice follows from."""
    path, domains = session.run_dir / "headroom" / "headroom.json", plan["domains"]
    return advice.Known(
        way=session.method,
        shares=plan["small_runs"],
        tokens=budget.final_tokens(session),
        weights={name: domain["natural_weight"] for name, domain in domains.items()},
        passes={name: domain["final_epochs"]["uniform"] for name, domain in domains.items()},
        most_passes=session.config.mixture.max_epochs,
        worth=files.read_json(path)["worth"] if path.exists() else None,
        measured=path.exists(),
        chosen=session.config.objective.metrics is not None,
    )


# ── Data ────────────────────────────────────────────────────────────────────────────


def _domains(
    session: Session, store: TokenStore, learned: Tensor | None, small_runs: bool
) -> dict[str, Any]:
    """Size of each domain, and how often every run passes over it: those here, and the one of
    `main.tokens`."""
    training, count = session.config.training, len(store.domains)
    length, sizes, validation = (
        training.sequence_length,
        store.sizes("train"),
        store.sizes("validation"),
    )
    sampler = reference_losses.sampler(session, store, 0)
    proxy_epochs = reference_losses.draws(session, sampler) / sampler.sizes
    known = learned.numpy() if learned is not None else None
    here = {name: weights.numpy() for name, weights in main.comparisons(session, store).items()}
    final = {"natural": sizes / sizes.sum(), "uniform": simplex.uniform(count).numpy()}
    if known is not None:
        here, final = {"main": known} | here, final | {"learned": known}
    once = store.sequences("train", length) * length  # (K,) tokens of one pass
    tokens = budget.main_steps(session) * training.batch_size * length
    reference_weights, unwritable = reference.mixture(session, store), store.unwritable()
    return {
        name: {
            "training_tokens": int(sizes[k]),
            "validation_tokens": int(validation[k]),
            "training_sequences": int(once[k] // length),
            "unwritable": float(unwritable[k]),
            "natural_weight": float(final["natural"][k]),
            "reference_weight": float(reference_weights[k]),
            "proxy_sequences": int(sampler.sizes[k]) if small_runs else None,  # that it may read
            "proxy_epochs": float(proxy_epochs[k]) if small_runs else None,
            "main_epochs": {
                way: float(weights[k] * tokens / once[k]) for way, weights in here.items()
            },
            "final_epochs": {
                way: float(weights[k] * budget.final_tokens(session) / once[k])
                for way, weights in final.items()
            },
        }
        for k, name in enumerate(store.domains)
    }


def _reference_losses(
    session: Session, store: TokenStore, runs: Sequence[Ahead]
) -> dict[str, int] | None:
    """Size of the reference's losses in fp16 on all sequences that the proxies of all seeds read,
    for every round; where they are cached, also for how many sequences of any run they are missing.

    What seeds have in common is an expectation, since they draw independently; draws from α are
    taken for uniform.
    """
    options, length = session.config.proxy, session.config.training.sequence_length
    if "proxy" not in {run.kind for run in runs} or not reference_losses.needed(session):
        return None
    sampler = reference_losses.sampler(session, store, 0)
    # (K,) part that one seed reads.
    read = np.minimum(reference_losses.draws(session, sampler) / sampler.sizes, 1)
    sequences = round(float((sampler.sizes * (1 - (1 - read) ** options.seeds)).sum()))
    size = {
        "sequences": sequences,
        "rounds": options.rounds,
        "bytes": frozen.row_bytes(length) * sequences * options.rounds,
    }
    if reference_losses.cached(session):
        size["missing"] = round(sum(run.missing for run in runs))
    return size


def _ways(session: Session, ways: Sequence[losses_from.Way]) -> dict[str, Any]:
    """What each way to those losses takes, and the cheapest for the memory that a process has."""
    room = session.config.engine.memory
    if room is None and not session.planned:
        room = place.room(session.place.device)
    best = losses_from.cheapest(ways, room)
    rows = {way.name: way._asdict() for way in ways}
    return {"room": room, "cheapest": best.name if best else None, "ways": rows}


def _absent(session: Session, domains: int) -> dict[str, float | None]:
    """Probability that a batch of the proxy misses a domain: where draws are uniform; and where
    they are from α, for a domain that has only the weight that smoothing leaves it."""
    options, batch = session.config.proxy, session.config.training.batch_size
    uniform, floor = detectors.missing_by_quota(
        batch, [1 / domains, options.smoothing / domains]
    ).tolist()
    return {"uniform": uniform, "at_floor": floor if options.objective == "resample" else None}

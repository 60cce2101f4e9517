"""What would run, and at what cost, before anything does: plan.json."""

from typing import Any

import numpy as np
from torch import Tensor

from doremi_train import comm, files, model
from doremi_train.data.shards import TokenStore
from doremi_train.methods import simplex
from doremi_train.stages import Session, language_model, main, mixture, prepare, reference


def run(session: Session) -> dict[str, Any]:
    """Sizes, epochs, FLOPs and memory of every stage, and warnings.

    Raises UserError where there are more processes than sequences in a batch.
    """
    store = prepare.run(session)
    training = session.config.training
    parts = comm.world().rows(training.batch_size, training.micro_batch_size)
    proxy_shape = language_model.resolved_model(session, store)
    main_shape = language_model.resolved_model(session, store, session.config.main.model)
    tokens = training.steps * training.batch_size * training.sequence_length
    main_tokens = main.training(session).steps * training.batch_size * training.sequence_length
    uniform, natural = simplex.uniform(len(store.domains)), reference.mixture(session, store)
    stages = {"reference": _stage(proxy_shape, tokens, training.sequence_length, 3)}
    if session.config.mixture.method == "doremi":
        passes = 5 if len(parts) > 1 and session.config.proxy.accumulation == "exact" else 4
        stages["proxy"] = _stage(proxy_shape, tokens, training.sequence_length, passes)
    for name in ("main", *session.config.comparisons):
        stages[name] = _stage(main_shape, main_tokens, training.sequence_length, 3)
    plan = {
        "domains": {
            name: {
                "training_tokens": int(store.sizes("train")[k]),
                "validation_tokens": int(store.sizes("validation")[k]),
                "natural_weight": float(natural[k]),
                "proxy_epochs": float(uniform[k]) * tokens / int(store.sizes("train")[k]),
                "main_epochs_if_uniform": float(uniform[k])
                * mixture.final_tokens(session)
                / int(store.sizes("train")[k]),
            }
            for k, name in enumerate(store.domains)
        },
        "stages": stages,
        "total_flops": sum(stage["flops"] for stage in stages.values()),
        "warnings": warnings(store, uniform, tokens, training.batch_size, training.sequence_length),
    }
    comm.on_first(lambda: files.write_json(session.run_dir / "plan.json", plan))
    total = int(np.sum(store.sizes("train")))
    session.say(
        f"plan: {len(store.domains)} domains, {total:,} training tokens; {len(stages)} runs of up to "
        f"{max(tokens, main_tokens):,} tokens, {plan['total_flops']:.2g} FLOPs in all; store {session.store}"
    )
    for warning in plan["warnings"]:
        session.say(f"plan: warning: {warning}")
    return plan


def _stage(shape: dict[str, Any], tokens: int, length: int, forwards: int) -> dict[str, Any]:
    """FLOPs count a backward as two forwards, so an ordinary step is 3 and a proxy with a live reference 4."""
    total, body = model.parameters(shape)
    width, layers = shape.get("hidden_size", 0), shape.get("num_hidden_layers", 0)
    forward = 2 * (body + width * shape["vocab_size"]) + 4 * layers * width * length  # per token: matrices, attention
    return {
        "parameters": total,
        "tokens": tokens,
        "flops": float(forwards) * forward * tokens,
        "state_bytes": 16 * total + 4 * total * (forwards > 3),  # parameters, gradients, Adam's moments; the reference
    }


def warnings(store: TokenStore, proxy: Tensor, tokens: int, batch: int, length: int) -> list[str]:
    """What makes domain weights worth less, seen from sizes alone."""
    found = []
    if batch < len(store.domains):
        found.append(
            f"training.batch_size={batch} is smaller than the number of domains ({len(store.domains)}): a step misses "
            "some of them, and an absent domain counts as excess 0; raise it"
        )
    for name, size, share in zip(store.domains, store.sizes("train"), proxy.tolist(), strict=True):
        epochs = share * tokens / int(size)
        if epochs > 4:
            found.append(
                f"domain {name}: the proxy passes over it {epochs:.1f} times; its excess loss will measure memory"
            )
        if int(size) < 20 * length:
            found.append(f"domain {name}: only {int(size)} training tokens")
    return found

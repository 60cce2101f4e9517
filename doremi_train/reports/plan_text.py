"""A plan as a person reads it: a table of runs, one of domains, and what to know beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from doremi_train.console import say, short

DOMAINS = 30  # in the table; of more, the smallest and the largest
MESSAGES = 5  # of one kind of warning; all are in plan.json


def show(
    plan: Mapping[str, Any], warned: Mapping[str, Sequence[str]], store: Path, budget: int | None
) -> None:
    """Print it. `budget` is main.tokens."""
    say(_runs(plan), _domains(plan["domains"], budget))
    say(*(f"plan: {sentence}" for sentence in sentences(plan)))
    for messages in warned.values():
        say(*(f"plan: warning: {message}" for message in messages[:MESSAGES]))
        if len(messages) > MESSAGES:
            say(f"plan: warning: {len(messages) - MESSAGES} more of this kind are in plan.json")
    say(f"plan: the store is {store}")
    say(f"plan: {plan['advice']}")


def _runs(plan: Mapping[str, Any]) -> Table:
    """Runs of one kind and cost are one row; one that is done, or the same as another, costs
    nothing."""
    table = _table("run", "parameters", "tokens", "FLOPs", "memory", "time")
    table.title = f"Runs, on {plan['place']}"
    rows: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for name, run in plan["stages"].items():
        kind = name if run["kind"] == "main" else run["kind"]
        rows.setdefault((kind, run["state"], run["flops"]), []).append(run)
    for (kind, state, flops), alike in rows.items():
        run = alike[0]
        time = {"done": "done", "same": f"is {run['same_as']}"}.get(state) or human(run["seconds"])
        table.add_row(
            f"{kind} × {len(alike)}" if len(alike) > 1 else kind,
            short(run["parameters"]),
            short(run["tokens"]),
            f"{flops:.2g}" if flops else "",
            size(run["memory"]["total"]),
            f"each {time}" if len(alike) > 1 and run["seconds"] else time,
        )
    evaluation = plan["evaluation"]
    if evaluation["models"]:
        flops = f"{evaluation['flops']:.2g}"
        table.add_row("evaluate", "", "", flops, "", human(evaluation["seconds"]))
    table.add_row(
        "all", "", "", f"{plan['total_flops']:.2g}", "", human(plan["total_seconds"]), style="bold"
    )
    return table


def _domains(domains: Mapping[str, Mapping[str, Any]], budget: int | None) -> Table:
    ways = next(iter(domains.values()))["final_epochs"]
    lossy = any(domain["unwritable"] for domain in domains.values())
    table = _table(
        "domain",
        "tokens",
        *["not written"] * lossy,
        "weight by size",
        "proxy",
        *(f"if {way}" for way in ways),
    )
    final = f"the final run of {short(budget)} tokens" if budget else "the main run"
    table.title = f"Domains, and epochs of each in the proxy and in {final}"
    names = sorted(domains, key=lambda name: domains[name]["training_tokens"])
    hidden = set(names[DOMAINS // 2 : -DOMAINS // 2]) if len(names) > DOMAINS else set()
    for name, domain in domains.items():
        if name in hidden:
            continue
        epochs = [domain["proxy_epochs"], *domain["final_epochs"].values()]
        shown = ["–" if value is None else f"{value:.3g}" for value in epochs]
        table.add_row(
            name,
            short(domain["training_tokens"]),
            *[f"{domain['unwritable']:.1%}"] * lossy,
            f"{domain['natural_weight']:.4f}",
            *shown,
        )
    if hidden:
        table.caption = f"the smallest and the largest; {len(hidden)} more are in plan.json"
    return table


def sentences(plan: Mapping[str, Any]) -> list[str]:
    """What the tables do not say."""
    said = [_memory(plan)]
    price, losses, absent = plan["accumulation"], plan["reference_losses"], plan["absent"]
    if plan["not_measured"]:
        said.append(f"time is not estimated: {'; '.join(plan['not_measured'])}")
    elif plan["total_seconds"]:
        said.append(
            f"about {human(plan['total_seconds'])} on {plan['processes']} "
            f"process{'es' * (plan['processes'] > 1)} of this machine, estimated from a few "
            "micro-steps measured now; what processes exchange, the optimiser's own work and "
            "saving come on top"
        )
    if price and price["micro_batches"] > 1:
        cost = f", {human(price['seconds'])} of it" if price["seconds"] is not None else ""
        said.append(
            f"a step has {price['micro_batches']} micro-batches, with which "
            f"proxy.accumulation=exact costs {price['exact_over_lagged']:.2f} times what lagged "
            f"does{cost}"
        )
    elif price:
        said.append(
            "a step is one micro-batch, with which proxy.accumulation=exact costs nothing more "
            "than lagged"
        )
    said += [
        f"{name} looks at {short(run['candidates'])} tokens, of which it is trained on "
        f"{short(run['tokens'])}"
        for name, run in plan["stages"].items()
        if run["candidates"] > run["tokens"]
    ]
    if losses and "missing" in losses:
        left = (
            f"computed for {short(losses['missing'])} sequences"
            if losses["missing"]
            else "all there"
        )
        said.append(f"reference losses, cached: {size(losses['bytes'])} of fp16, {left}")
    elif losses:
        said.append(f"reference losses, if cached: {size(losses['bytes'])} of fp16")
    if plan["reference_ways"]:
        said.append(_ways(plan["reference_ways"]))
    if absent:
        floor = absent["at_floor"]
        at_floor = (
            f", of {floor:.1%} where its weight is as small as smoothing allows"
            if floor is not None
            else ""
        )
        said.append(
            f"a domain is absent from {absent['uniform']:.1%} of the proxy's batches{at_floor}"
        )
    if plan["settled"]:
        said.append(
            "what is said of proxies is an upper bound: one ends when every weight of its average "
            f"is known to ± {plan['settled']} (proxy.settled)"
        )
    if plan["headroom"]:
        said.append(plan["headroom"])
    return said


def _memory(plan: Mapping[str, Any]) -> str:
    """Sentence on one process of the run that needs most, and on its checkpoint."""
    runs = plan["stages"]
    name = max(runs, key=lambda name: runs[name]["memory"]["total"])
    run, saved = runs[name], runs[name]["checkpoint"]
    parts = [
        f"{size(count)} {part}"
        for part, count in run["memory"].items()
        if count and part != "total"
    ]
    return (
        f"most memory of a process ({plan['place']}): {name}, {size(run['memory']['total'])}: "
        f"{', '.join(parts)}; a checkpoint has {size(saved['bytes'])}, of which each process "
        f"copies {size(saved['process'])} to its host and writes them beside the training, "
        f"{human(saved['seconds'])} at {size(plan['write_speed'])}/s (engine.write_speed)"
    )


def _ways(given: Mapping[str, Any]) -> str:
    """Sentence on the ways to the reference's losses."""
    ways, room = given["ways"], given["room"]
    needs = "; ".join(
        f"{name}, {size(way['memory'])}"
        + (f" and {size(way['disk'])} on disk" if way["disk"] else "")
        for name, way in ways.items()
    )
    needs = f"where the reference's losses come from, and the most memory of a process: {needs}"
    if given["cheapest"] is None:
        return f"{needs}. None fits into the {size(room)} that a process has (engine.memory)"
    keys = ways[given["cheapest"]]["keys"]
    fits = "if all fit (see engine.memory)" if room is None else f"that fits into {size(room)}"
    return f"{needs}. The cheapest {fits}: {keys}"


def human(seconds: float | None) -> str:
    """90 → 1.5 min."""
    if seconds is None:
        return "not known"
    for unit, length, limit in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < limit * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:.3g} days"


def size(count: float) -> str:
    """1500000 → 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _table(first: str, *rest: str) -> Table:
    return Table(Column(first), *(Column(name, justify="right") for name in rest))

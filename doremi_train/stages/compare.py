"""Comparison of every method with what the same FLOPs buy without it: which mixture, how sure, at
what cost.

For each method and seed a run that derives its weights anew and trains the final model. Beside it
the free mixtures, whose final run is longer by what the method's small runs cost, and random search
with as many small runs: what the method is worth. And the free mixtures in as many steps: what its
mixture is worth, as for a final run so large that the small ones cost next to nothing. All are
ordinary runs in the store; none learns from runs that are not its own. `compare/compare.json` has
every figure, `compare.html` a table and a picture a question.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from doremi_train import files
from doremi_train.config import UserError, load
from doremi_train.console import say
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import statistics
from doremi_train.evaluation.statistics import Paired, spread
from doremi_train.methods import replicates
from doremi_train.methods.objective import Objective
from doremi_train.parallel import comm
from doremi_train.reports.charts import Point, rows
from doremi_train.stages import main, prepare, report
from doremi_train.stages.options import Config
from doremi_train.stages.planning import ahead
from doremi_train.stages.planning.bill import Bill
from doremi_train.stages.runs import budget, metrics
from doremi_train.stages.runs import submit as jobs
from doremi_train.stages.session import Session, claimed
from doremi_train.storage.runs import stop


class Cost(NamedTuple):
    """Costs of one method and seed."""

    proxies: float  # FLOPs of everything before the final run
    main: float  # FLOPs of the final run
    tokens: int  # of all of it


class Contender(NamedTuple):
    """A method and its changes, trained once for every seed."""

    method: str
    changes: dict[str, Any]  # to the configuration
    cost: Cost

    @property
    def folder(self) -> str:
        return "-".join([self.method, *(str(value) for value in self.changes.values())])


class Question(NamedTuple):
    """Does a method beat what is trained without it?"""

    title: str
    method: Contender
    others: list[Contender]


def run(session: Session) -> dict[str, Any]:
    """Train what is not trained yet, and compare. Raises UserError where a method cannot be."""
    prepare.run(session)
    questions, failures = comm.on_first(lambda: _questions(session))
    contenders = {
        one.folder: one for question in questions for one in (question.method, *question.others)
    }
    by = _standard(session, contenders)
    children = {
        f"{name}/seed-{seed}": _configured(session, one, seed)
        for name, one in contenders.items()
        for seed in range(session.config.compare.seeds)
    }
    _train(
        session,
        children,
        {name: contenders[name.partition("/")[0]].cost.tokens for name in children},
    )
    reached, unit = _measured(session, list(children), contenders, by)
    content: dict[str, Any] = comm.on_first(
        lambda: _conclude(session, questions, failures, reached, unit)
    )
    return content


def _measured(
    session: Session,
    names: list[str],
    contenders: Mapping[str, Contender],
    by: Contender | None,
) -> tuple[dict[str, float], str]:
    """The objective of every child's final model, and its unit; the mean over domains where nothing
    else is said. A collective."""
    store = _store(session)
    folders = {name: session.run_dir / "compare" / name / "main" for name in names}
    measured = metrics.measured(session, store, folders)
    wanted = _wanted(session, store, measured, contenders, by)
    scores = {name: float(wanted.scores(np.array([row]))[0]) for name, row in measured.items()}
    return scores, wanted.unit


def _wanted(
    session: Session,
    store: TokenStore,
    measured: Mapping[str, list[float]],
    contenders: Mapping[str, Contender],
    by: Contender | None,
) -> Objective:
    """The objective, standardised `by` the seeds of natural where it asks for that."""
    if by is None:
        # A guard is for searches: it asks what natural has, and here no mixture is refused.
        return metrics.objective(session, store, np.ones(len(metrics.names(session, store))))
    free = {*session.config.compare.baselines, *(session.config.compare.files or {})}
    of, values = [name.rpartition("/")[0] for name in measured], np.array([*measured.values()])
    # Seeds of a learned mixture differ in it too, and are no replicates.
    alike = [
        [of.index(name) if contenders[name].method in free else -1 - n] for n, name in enumerate(of)
    ]
    natural = values[[name == by.folder for name in of]]
    scale = replicates.scale(np.array(alike, float), values, np.array([of.index(by.folder)]))
    return metrics.objective(session, store, natural.mean(0), scale)


def _standard(session: Session, contenders: Mapping[str, Contender]) -> Contender | None:
    """Natural, by whose seeds metrics are standardised, in as many steps as the methods' where it
    takes part so; None where they are not. Raises UserError where there is none, or one seed."""
    if not session.config.objective.standardise:
        return None
    natural = [one for one in contenders.values() if one.method == "natural"]
    if session.config.compare.seeds < 2 or not natural:
        raise UserError(
            "objective.standardise=true: metrics are standardised by the seeds of natural; put it "
            "into compare.baselines, and take compare.seeds=2 or more"
        )
    return min(natural, key=lambda one: one.changes.get("main.steps", 0))


# ── What is compared ────────────────────────────────────────────────────────────────


def _questions(session: Session) -> tuple[list[Question], list[str]]:
    """Comparisons at equal FLOPs and at equal steps, which are one where a method costs nothing
    before the final run; and what of it cannot be, in sentences."""
    asked, questions, failures = session.config.compare, [], []
    steps = budget.main_steps(session)
    for method in asked.methods:
        cost = _cost(session, method, {})
        longer = steps + int(cost.proxies / (cost.main / steps))
        free = (*asked.baselines, *(asked.files or {}))
        flops = [(name, {"main.steps": longer}) for name in free]
        one, two = (_cost(session, "search", {"swarm.runs": n}).proxies for n in (1, 2))
        count = int((cost.proxies - (2 * one - two)) / (two - one) + 1e-6)
        if asked.search and count:
            flops.append(("search", {"swarm.runs": count}))
        to_beat = {f"What {method} gains over what the same FLOPs buy otherwise": flops}
        if longer > steps:
            title = (
                f"What {method}'s mixture gains over free ones in as many steps, its small runs "
                "aside"
            )
            to_beat[title] = [(name, {"main.steps": steps}) for name in free]
        for title, tried in to_beat.items():
            others = []
            for name, changes in tried:
                try:
                    others.append(Contender(name, changes, _cost(session, name, changes)))
                # Such as UniMax, where the longer run needs more text than it allows.
                except UserError as error:
                    failures.append(f"{name} beside {method}: {error}")
            questions.append(Question(title, Contender(method, {}, cost), others))
    return questions, failures


def _cost(session: Session, method: str, changes: dict[str, Any]) -> Cost:
    """Costs as in a store where nothing is done yet, so that they are the same at any time. Runs
    that are one count once."""
    nowhere = {"store": str(session.run_dir / "compare" / "nothing"), "remote": None}
    child = _session(
        session, _configured(session, Contender(method, changes, Cost(0, 0, 0)), 0) | nowhere
    )
    store = _store(session)
    bill, before, final, tokens = Bill(child, store, {}), 0.0, 0.0, 0
    for run in ahead.runs(child, store)[0]:
        priced = bill.run(run)
        if run.kind == "main":
            final += priced["flops"]
        else:
            before += priced["flops"]
        tokens += 0 if run.same_as else priced["tokens"]
    return Cost(before, final, tokens)


def _store(session: Session) -> TokenStore:
    data = session.config.data
    return TokenStore.open(session.run_dir / "prepare", only=data.only, least=data.least_tokens)


def _configured(session: Session, contender: Contender, seed: int) -> dict[str, Any]:
    """The configuration of a contender's seed, a command of its own."""
    folder = session.run_dir / "compare" / contender.folder / f"seed-{seed}"
    own = (session.config.compare.files or {}).get(contender.method)
    changes: dict[str, Any] = {
        "mixture.method": contender.method if own is None else "file",
        "mixture.path": None if own is None else str(Path(own).resolve()),
        "mixture.weights": None,
        "mixture.format": None,
        "main.comparisons": [],
        "seed": session.config.seed + seed,
    }
    changes["swarm.reuse"] = False  # a swarm would fit runs that others have paid for
    return jobs.configured(session, folder, stage="main", **changes, **contender.changes)


def _session(session: Session, plain: Mapping[str, Any], **more: Any) -> Session:
    return Session(load(Config, plain), plain, session.place, session.child, **more)


def _train(
    session: Session, children: Mapping[str, Mapping[str, Any]], tokens: Mapping[str, int]
) -> None:
    """Every child's main stage, one after another or as jobs; one bar over all."""
    store = (session.run_dir / "prepare").resolve()
    for name in children:  # the same data, also where its sources differ by now
        comm.on_first(
            functools.partial(files.link, session.run_dir / "compare" / name / "prepare", store)
        )
    whole = session.over("compare", sum(tokens.values()))
    apart = session.config.submit.cluster != "none"

    def watch() -> None:
        finished = [
            name
            for name in children
            if (session.run_dir / "compare" / name / "main/result.json").exists()
        ]
        whole.update(
            sum(tokens[name] for name in finished), f"{len(finished)} of {len(children)} done"
        )

    with whole:
        if apart:
            jobs.submit(session, children, watch)
        for name, plain in children.items():
            stop.check("compare")
            before = whole.done
            child = _session(session, plain, bar=None if apart else whole)
            with claimed(child):
                main.run(child)
            if not apart:
                whole.update(before + tokens[name], name)


# ── What came of it ─────────────────────────────────────────────────────────────────


def _conclude(
    session: Session,
    questions: list[Question],
    failures: list[str],
    reached: Mapping[str, float],
    unit: str,
) -> dict[str, Any]:
    seeds = session.config.compare.seeds
    outcomes = {
        one.folder: _outcome(session, one, reached)
        for q in questions
        for one in (q.method, *q.others)
    }
    lowest = [
        min(outcome["losses"][seed] for outcome in outcomes.values()) for seed in range(seeds)
    ]
    for outcome in outcomes.values():
        outcome["regret"] = fmean(
            loss - best for loss, best in zip(outcome["losses"], lowest, strict=True)
        )
    answers = []
    for question in questions:
        method, names = question.method.folder, [other.folder for other in question.others]
        gains = {
            name: statistics.paired(outcomes[name]["losses"], outcomes[method]["losses"])
            for name in names
        }
        said = [statistics.judged(method, name, gain, seeds, unit) for name, gain in gains.items()]
        against = {name: gain._asdict() for name, gain in gains.items()}
        answers.append(
            {"title": question.title, "method": method, "against": against, "said": said}
        )
    content = {"seeds": seeds, "contenders": outcomes, "questions": answers, "failures": failures}
    content["unit"] = unit
    files.write_json(session.run_dir / "compare" / "compare.json", content)
    _show(session, content)
    return content


def _outcome(
    session: Session, contender: Contender, reached: Mapping[str, float]
) -> dict[str, Any]:
    """What the seeds of a contender reached; losses in the objective's unit."""
    names = [f"{contender.folder}/seed-{n}" for n in range(session.config.compare.seeds)]
    folders = [session.run_dir / "compare" / name for name in names]
    evaluated = [files.read_json(folder / "main/result.json")["evaluation"] for folder in folders]
    mixtures = [files.read_json(folder / "weights.json") for folder in folders]
    known = [
        mixture["provenance"]
        for mixture in mixtures
        if "proposal_realised" in mixture["provenance"]
    ]
    return {
        "losses": [reached[name] for name in names],
        "mean": [entry["mean_loss"] for entry in evaluated],
        "worst": [entry["worst_loss"] for entry in evaluated],
        "flops": contender.cost.proxies + contender.cost.main,
        "proxy_flops": contender.cost.proxies,
        "optimism": [entry["proposal_realised"] - entry["proposal_predicted"] for entry in known],
        "weights": [mixture["weights"] for mixture in mixtures],
    }


_COLUMNS = (
    "mixture", "objective", "mean over domains", "worst domain", "FLOPs",
    "of them before the final run", "regret", "optimism", "method's gain, Student-t",
    "paired bootstrap",
)  # fmt: skip


def _show(session: Session, content: Mapping[str, Any]) -> None:
    """One table and one picture a question, on a page and in the terminal."""
    sections = []
    for answer in content["questions"]:
        method, gains = (
            answer["method"],
            {name: Paired(**gain) for name, gain in answer["against"].items()},
        )
        title = answer["title"]
        table = [
            _row(name, content["contenders"][name], gains.get(name)) for name in (method, *gains)
        ]
        ends = [
            () if gain.half is None else (gain.mean - gain.half, gain.mean + gain.half)
            for gain in gains.values()
        ]
        points = [Point(gain.mean, *end) for gain, end in zip(gains.values(), ends, strict=True)]
        chart = (
            rows(title, content["unit"], list(gains), {method: points}, zero=True) if gains else ""
        )
        sections.append(
            {
                "title": title,
                "said": answer["said"],
                "columns": _COLUMNS,
                "rows": table,
                "chart": chart,
            }
        )
        shown = Table(*_COLUMNS, title=title)
        for row in table:
            shown.add_row(*row)
        say(shown, *answer["said"])
    for failure in content["failures"]:
        say(f"not compared: {failure}")
    page, shared = (
        session.run_dir / "compare.html",
        {key: content[key] for key in ("seeds", "failures", "unit")},
    )
    report.write_page(
        page, "compare.html.jinja", title=str(session.run_dir), sections=sections, **shared
    )
    say(f"compare: {page}")


def _row(name: str, outcome: Mapping[str, Any], gain: Paired | None) -> list[str]:
    told = ["", ""]
    if gain is not None:
        told = [f"{gain.mean:+.4f}", ""]
        if gain.half is not None:
            told = [f"{gain.mean:+.4f} ± {gain.half:.4f}", f"{gain.low:+.4f} to {gain.high:+.4f}"]
    kinds = ("losses", "mean", "worst", "optimism")
    *losses, optimism = (spread(outcome[key]) for key in kinds)
    flops = [f"{outcome[key]:.3g}" for key in ("flops", "proxy_flops")]
    return [name, *losses, *flops, f"{outcome['regret']:.4f}", optimism, *told]

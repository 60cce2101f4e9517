"""Choose from the raw corpus the documents that serve a target; the rest of the run trains on them.

Scores are kept in the store, named by what decides them: another budget, temperature or seed needs
no scoring again.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train import __version__, files, mixture
from doremi_train.config import UserError, fingerprint
from doremi_train.console import short
from doremi_train.data.corpus.opening import require_few
from doremi_train.data.corpus.sidecar import SAID
from doremi_train.data.corpus.sources import RULE, names, passed_over, resolve, signature
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.methods import ngram
from doremi_train.parallel import comm
from doremi_train.reports import selection_page
from doremi_train.selection.documents import (
    baselines,
    choose,
    describe,
    engines,
    granular,
    kernels,
    parts,
    scorers,
    tasks,
)
from doremi_train.stages.choice import array, target_files
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run, stop

SCORES = 3  # raise when the same request would give other scores, or counts beside them


# How it is computed, and what only the choice depends on: no part of the scores' address.
_CHOICE = (
    "train",
    "documents",
    "tokens",
    "fraction",
    "within",
    "temperature",
    "write",
    "engine",
    "workers",
)


def run(session: Session) -> Path:
    """The folder of the choices, one for every target."""
    wanted = comm.on_first(lambda: _recipe(session))
    choice = Run(session.store, "selection", wanted)
    with session.computing(choice, "select", quiet=True) as todo:
        if todo:
            comm.on_first(lambda: choice.finish(_select(session, choice.folder, wanted)))
    return choice.folder


def show(session: Session, folder: Path) -> None:
    """A page and a summary of a choice."""
    page = session.run_dir / "select" / "report.html"
    comm.on_first(lambda: selection_page.write(page, folder, session.config.selection.vocabulary))
    result = comm.on_first(lambda: files.read_json(folder / "result.json"))
    session.say(*summary(result, folder), f"report: {page}")


def _recipe(session: Session) -> dict[str, Any]:
    """Everything that decides the choice; under "scores" what decides the scores."""
    kernels.require_numba()  # wrong before the work, and not after it
    options = session.config.selection
    raw = session.config.data
    settings = {
        key: value for key, value in asdict(options).items() if key not in ("targets", "benchmarks")
    }
    text = target_files.text_options(session)
    scores = {key: value for key, value in settings.items() if key not in _CHOICE} | {
        "recipe": SCORES,
        "data": signature(raw, resolve(raw)) | {"validation_fraction": raw.validation_fraction},
        "targets": {
            name: signature(text, sources)
            for name, sources in target_files.targets(session).items()
        },
        "benchmarks": signature(
            text, target_files.files_of(session, options.benchmarks, "selection.benchmarks")
        ),
        "tokenizer": options.tokenizer
        and tokenizers.fingerprint(tokenizers.load(options.tokenizer)),
        "vocabulary": options.vocabulary and granular.load(options.vocabulary)[1],
        "encoder": options.encoder and baselines.files_of_encoder(options.encoder),
    }
    choice = {key: settings[key] for key in _CHOICE if key not in ("train", "engine", "workers")}
    return {"scores": scores, "choice": choice, "seed": session.config.seed}


def _select(session: Session, folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Score the corpus, unless that was done; then choose for every target. The content of
    `result.json`."""
    text = target_files.text_options(session)
    served = {
        name: parts.texts(sources, text, f"selection.targets.{name}")
        for name, sources in target_files.targets(session).items()
    }
    columns = {
        **served,
        **{f"{name}/half": scorers.halves(documents)[0] for name, documents in served.items()},
    }
    with array.engine(session, "select") as pool:
        work, sums = _score(
            session, session.store / "selection" / fingerprint(recipe["scores"]), columns, pool
        )
        sources = [task.source for task in work]
        scores = choose.Scores(
            [task.scores for task in work],
            names(session.config.data, sources),
            work[0].folder / "copies.npy",
        )
        totals = choose.totals(
            scores, list(columns), {source.domain for source in sources if source.domain}
        )
        data = fingerprint(signature(session.config.data, sources))
        chosen = {}
        for name, documents in served.items():
            metadata = SAID | {"selection": fingerprint([recipe, name]), "data": data}
            chosen[name] = _choose(
                session, folder / name, name, work, scores, totals, pool, metadata
            )
            words = chosen[name].pop("words")
            chosen[name] |= {
                "target_documents": len(documents),
                "kl": _kl(documents, sums["words"], words),
            }
    return {
        "eligible": {
            name: {"documents": n, "tokens": t} for name, (n, t) in sorted(totals.domains.items())
        },
        "refused": totals.refused,
        "bad_lines": int(sums["bad_lines"]),
        "seed": session.config.seed,
        "kl_reduction": float(np.mean([part["kl"]["reduction"] for part in chosen.values()])),
        "targets": chosen,
    }


def _score(
    session: Session, home: Path, columns: Mapping[str, list[bytes]], pool: engines.Engine
) -> tuple[list[Any], Any]:
    """(a task for every source, all of them done; the sums over the corpus)."""
    options, raw = session.config.selection, session.config.data
    work = [
        tasks.Task(home, number, source, raw, options) for number, source in enumerate(resolve(raw))
    ]
    for task in work:
        describe.require_text(task)
    home.mkdir(parents=True, exist_ok=True)
    with files.locked(home / "lock", lambda: stop.check("select")):
        files.clear_partial(home)
        array.everywhere(
            pool,
            "select",
            "counting",
            tasks.count,
            [task for task in work if not task.counts.exists()],
        )
        sums = tasks.summed(work)
        require_few(int(sums["bad_lines"]), raw)
        if not (home / "model.npz").exists():
            passed_over(raw).say(RULE)
            benchmarks = target_files.files_of(session, options.benchmarks, "selection.benchmarks")
            forbidden = {"targets": [text for documents in columns.values() for text in documents]}
            if benchmarks:
                forbidden["benchmarks"] = parts.texts(
                    benchmarks, target_files.text_options(session), "selection.benchmarks"
                )
            tasks.write_arrays(home / "model.npz", tasks.fit(options, columns, sums, forbidden))
        array.everywhere(
            pool,
            "select",
            "scoring",
            tasks.score,
            [task for task in work if not task.scores.exists()],
        )
        choose.number_copies([task.scores for task in work], home / "copies.npy")
    return work, sums


def _choose(
    session: Session,
    folder: Path,
    name: str,
    work: list[tasks.Task],
    scores: choose.Scores,
    totals: choose.Totals,
    pool: engines.Engine,
    metadata: dict[str, str],
) -> dict[str, Any]:
    """Write the sidecar, the mixture and the shards of one target; what is to be said about its
    choice."""
    options = session.config.selection
    groups, budgets = choose.budgets(options, totals)
    samplers = [
        choose.Sampler(
            scores,
            column,
            options.temperature * totals.spread(column, options.exact),
            session.config.seed,
            groups,
            options.budget[0] == "documents",
        )
        for column in (name, f"{name}/half")
    ]
    cuts = [sampler.cut(budgets) for sampler in samplers]
    top = replace(samplers[0], temperature=0.0).cut(budgets)
    profile = choose.write_sidecar(folder / "sidecar.parquet", samplers[0], cuts[0], top, metadata)

    # A worker needs no list of all files.
    half = replace(samplers[1], scores=choose.Scores([], [], scores.copies))
    looks = [
        describe.Look(task, folder, shard, first, half, cuts[1])
        for task, shard, first in zip(work, scores.shards, scores.firsts, strict=True)
    ]
    array.everywhere(
        pool, "select", name, describe.look, [at for at in looks if not at.path.exists()]
    )

    tokens = {domain: profile.domains.get(domain, [0, 0])[1] for domain in sorted(totals.domains)}
    if not sum(tokens.values()):
        kind, amount = session.config.selection.budget
        raise UserError(
            f"selection.{kind}={amount}: nothing was chosen for {name}; raise it, or lower "
            "selection.chunk, so that a part fits"
        )
    provenance = {"seed": session.config.seed, "data": metadata["data"], "version": __version__}
    weights = {domain: n / sum(tokens.values()) for domain, n in tokens.items()}
    mixture.save(
        folder / "weights.json",
        mixture.Mixture("selection", weights, provenance=provenance),
    )
    return profile.as_json() | describe.together(looks)


def _kl(documents: list[bytes], raw: Any, chosen: Any) -> dict[str, float]:
    """Divergences from the half of a target that the choice by the other half has not seen, in
    nats."""
    held_out = tasks.words(scorers.whole(scorers.halves(documents)[1]))
    far, near = ngram.kl(held_out, raw), ngram.kl(held_out, chosen)
    return {"raw": far, "chosen": near, "reduction": far - near}


def summary(result: Mapping[str, Any], folder: Path) -> list[str]:
    """What a person wants to know of a choice before training on it."""
    eligible = [
        sum(part[unit] for part in result["eligible"].values()) for unit in ("documents", "tokens")
    ]
    refused = (
        ", ".join(f"{count} {why}" for why, count in result["refused"].items() if count) or "none"
    )
    lines = [
        f"eligible {eligible[0]} documents, {short(eligible[1])} tokens; refused {refused}; "
        f"{result['bad_lines']} bad lines"
    ]
    for name, part in result["targets"].items():
        kl = part["kl"]
        share = part["tokens"] / max(eligible[1], 1)
        lines += [
            "",
            f"{name}: {part['documents']} documents, {short(part['tokens'])} tokens "
            f"({share:.1%}), by {part['target_documents']} target documents; {folder / name}",
            f"  effective sample size {part['effective_sample_size']:.1f} documents; "
            f"{part['overlap_with_top_k']:.1%} are those of plain top-k",
            f"  KL from a half of the target that was held out: {kl['raw']:.3f} nats to the "
            f"corpus, {kl['chosen']:.3f} to the choice, a reduction of {kl['reduction']:.3f}",
            "  tokens  " + "".join(f"{length:>8}+" for length in part["lengths"]["eligible"]),
        ]
        lines += [
            f"  {which:<9}"
            + "".join(f"{row.get(length, 0):>8} " for length in part["lengths"]["eligible"])
            for which, row in part["lengths"].items()
        ]
        for domain, chosen in part["domains"].items():
            whole = result["eligible"][domain]["tokens"]
            lines.append(
                f"  {domain:<22} {chosen['tokens'] / max(part['tokens'], 1):7.2%} of the choice, "
                f"{chosen['tokens'] / max(whole, 1):7.2%} of the domain"
            )
        for pair in zip(*part["examples"].values(), strict=False):
            lines += [
                f"  {which:<8} {text[:90]!r}"
                for which, text in zip(part["examples"], pair, strict=True)
            ]
    return lines

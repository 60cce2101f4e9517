"""Domains made from text, for a corpus whose folders are not the right ones: a sidecar that
`data.selection=` trains on, a map from the given domains, and a page.

What was read is kept in the store, named by what decides it: another number of domains reads
nothing again.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train.config import UserError, fingerprint, judged
from doremi_train.console import short
from doremi_train.data.corpus.opening import require_few
from doremi_train.data.corpus.sidecar import SAID
from doremi_train.data.corpus.sources import RULE, names, passed_over, resolve, signature
from doremi_train.evaluation import detectors
from doremi_train.methods import clusters
from doremi_train.parallel import comm
from doremi_train.reports import regroup_page
from doremi_train.selection.documents import baselines, engines, kernels, parts
from doremi_train.selection.regroup import assigning, describe, fit, sampling, write
from doremi_train.selection.regroup.options import RegroupOptions
from doremi_train.selection.regroup.task import Task
from doremi_train.stages.choice import array, target_files
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run, stop

RECIPE = 1  # raise when the same request would give other domains
# What only the last step depends on: no part of the address of what was read.
_LAST = ("domains", "least_tokens", "levels")
_FREE = ("engine", "workers")


def run(session: Session) -> Path:
    """The folder of the domains."""
    wanted = comm.on_first(lambda: _recipe(session))
    made = Run(session.store, "regroup", wanted)
    with session.computing(made, "regroup", quiet=True) as todo:
        if todo:
            comm.on_first(lambda: made.finish(_regroup(session, made.folder, wanted)))
    page = session.run_dir / "regroup" / "report.html"
    comm.on_first(lambda: regroup_page.write(page, made.folder))
    session.say(*summary(made.result(), session.run_dir / "regroup"), f"report: {page}")
    return made.folder


def _recipe(session: Session) -> dict[str, Any]:
    """Everything that decides the domains; under "read" what decides each document's cluster."""
    kernels.require_numba()  # wrong before the work, and not after it
    fit.require_sklearn()
    options, raw = session.config.regroup, session.config.data
    if raw.selection is not None:
        raise UserError(
            f"data.selection={raw.selection}: stage=regroup reads all documents; remove it"
        )
    settings = {key: value for key, value in asdict(options).items() if key not in _FREE}
    good = target_files.files_of(session, options.good, "regroup.good")
    read = {key: value for key, value in settings.items() if key not in _LAST} | {
        "recipe": RECIPE,
        "seed": session.config.seed,
        "data": signature(raw, resolve(raw)),
        "good": signature(target_files.text_options(session), good) if good else None,
        "model": options.model and _model(options.model),
        "encoder": options.encoder and baselines.files_of_encoder(options.encoder),
    }
    return {"read": read, "last": {key: settings[key] for key in _LAST}}


def _earlier(folder: str) -> write.Domains:
    """The domains that an earlier run found. Raises UserError where it is none."""
    with judged(
        f"regroup.model={folder}", "give the folder run_dir/regroup of stage=regroup", "the reader"
    ):
        return write.Domains(**files.read_json(Path(folder) / "domains.json"))


def _model(folder: str) -> list[Any]:
    """What tells a model apart from others."""
    domains = _earlier(folder)
    arrays = (Path(folder) / "model.npz").read_bytes()
    return [fingerprint(asdict(domains)), hashlib.sha256(arrays).hexdigest()]


def _regroup(session: Session, folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Read the corpus, unless that was done; then make the domains. The content of
    `result.json`."""
    options, raw = session.config.regroup, session.config.data
    earlier = _earlier(options.model) if options.model is not None else None
    if earlier is not None:  # it says what was found by itself
        within: Any = "corpus" if list(earlier.rest) == [""] else "domain"
        options = replace(options, within=within, encoder=earlier.encoder)
    home = session.store / "regroup" / fingerprint(recipe["read"])
    sources = resolve(raw)
    work = [Task(home, n, source, raw, options) for n, source in enumerate(sources)]
    home.mkdir(parents=True, exist_ok=True)
    with (
        files.locked(home / "lock", lambda: stop.check("regroup")),
        array.engine(session, "regroup") as pool,
    ):
        files.clear_partial(home)
        if not (home / "model.npz").exists():
            passed_over(raw).say(RULE)
            if earlier is not None:
                files.write_bytes(
                    home / "model.npz", (Path(str(options.model)) / "model.npz").read_bytes()
                )
            else:
                _find(session, home, work, pool)
        for served in ("draws", "sample"):  # as many documents as the sample, of every source
            shutil.rmtree(home / served, ignore_errors=True)
        if earlier is None:
            fit.require_documents(home, options)
        left = [task for task in work if not task.parts.exists()]
        array.everywhere(pool, "regroup", "assigning", assigning.assign, left)
    require_few(write.bad_lines(work), raw)
    model = assigning.load_model(home)
    given = write.sums(work, len(model.centres))
    if not given:
        raise UserError("stage=regroup: the data holds no text; give files that hold text")
    if earlier is not None:
        domains = earlier
        told: dict[str, Any] = files.read_json(Path(str(options.model)) / "result.json")["told"]
    else:
        domains, told = _made(home, work, model, given, options)
    metadata = SAID | {
        "relabels": "domain: of every document, those for validation too",
        "selection": fingerprint(recipe),
        "data": fingerprint(signature(raw, sources)),
    }
    found, words = write.write_sidecar(
        folder / "sidecar.parquet", work, names(raw, sources), domains, metadata
    )
    files.write_json(folder / "domains.json", asdict(domains))
    files.write_bytes(folder / "model.npz", (home / "model.npz").read_bytes())
    sizes = np.sum(list(found.values()), 0)  # (K · levels, 2)
    return {
        "domains": {new: _size(sizes[k]) for k, new in enumerate(domains.all_names)},
        "given": {name: _size(counts.sum(0)) for name, counts in found.items()},
        "map": {
            name: {new: _size(counts[k]) for k, new in enumerate(domains.all_names) if counts[k, 0]}
            for name, counts in found.items()
        },
        # Words in each fine cluster, by which runs under other names are compared (fit.content).
        "clusters": {
            "model": hashlib.sha256((home / "model.npz").read_bytes()).hexdigest(),
            "given": {name: counts[:, 1].tolist() for name, counts in given.items()},
            "domains": dict(zip(domains.all_names, words.tolist(), strict=True)),
        },
        "adjusted_rand_of_given": clusters.adjusted_rand(
            np.array([counts[:, 0] for counts in found.values()])
        ),
        "bad_lines": write.bad_lines(work),
        "asked": options.domains * len(model.groups) if earlier is None else None,
        "told": told,
    }


def _find(session: Session, home: Path, work: list[Task], pool: engines.Engine) -> None:
    """Draw a sample, and find fine clusters on it: what was done before a kill is not done
    again."""
    options, seed = session.config.regroup, session.config.seed
    looks = [sampling.Drawing(task, seed) for task in work]
    good = parts.texts(
        target_files.files_of(session, options.good, "regroup.good"),
        target_files.text_options(session),
        "regroup.good",
    ) if options.good else []  # fmt: skip

    def everywhere(what: str, task: Any, jobs: list[Any]) -> None:
        array.everywhere(pool, "regroup", what, task, jobs)

    everywhere("drawing", sampling.draw, [at for at in looks if not at.task.draws.exists()])
    drawn = sampling.drawn(work)
    if not drawn:
        raise UserError("stage=regroup: the data holds no text; give files that hold text")
    sampling.write_draws(home, drawn)
    everywhere("sampling", sampling.gather, [at for at in looks if not at.task.sample.exists()])
    starts = fit.begun(home, work, options)
    fit.require_documents(home, options)  # wrong before the work
    everywhere("clustering", fit.start, [start for start in starts if not start.path.exists()])
    fit.finished(home, starts, good, options)


def _made(
    home: Path,
    work: list[Task],
    model: assigning.Model,
    given: dict[str, Any],
    options: RegroupOptions,
) -> tuple[write.Domains, dict[str, Any]]:
    """(the domains; what is told of them)."""
    domains, told, halves = describe.made(home, work, model, given, options)
    alike = detectors.duplicate(domains.names, halves) if len(domains.names) > 1 else []
    return domains, told | {"findings": [finding.message for finding in alike]}


def _size(counts: Any) -> dict[str, int]:
    return {"documents": int(counts[0]), "tokens": int(counts[1])}


def summary(result: Mapping[str, Any], folder: Path) -> list[str]:
    """What a person wants to know of domains before training on them."""
    sizes, told = result["domains"], result["told"]
    documents, tokens = (
        sum(size[unit] for size in sizes.values()) for unit in ("documents", "tokens")
    )
    lines = [
        f"{documents} documents, {short(tokens)} words in {len(sizes)} domains; "
        f"{result['bad_lines']} bad lines"
    ]
    found = len(told["domains"])
    if result["asked"] is not None and found < result["asked"]:
        lines.append(
            f"only {found} of {result['asked']} domains of the least size were found; lower "
            "regroup.least_tokens or regroup.domains"
        )
    for name, size in sizes.items():
        lines.append(f"  {name:<44} {size['documents']:>9} {size['tokens'] / max(tokens, 1):7.2%}")
    if told["stability"] is not None:
        lines.append(
            f"adjusted Rand between the two best starts: {told['stability']['domains']:.3f} of the "
            f"domains, {told['stability']['fine']:.3f} of the fine clusters"
        )
    if len(result["given"]) > 1:
        lines.append(
            f"adjusted Rand against the given domains: {result['adjusted_rand_of_given']:.3f}"
        )
    return [
        *lines,
        *told["findings"],
        f"train on them with data.selection={folder / 'sidecar.parquet'}",
    ]

"""The mixture of the final run, by the method asked for, as weights.json."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from doremi_train import __version__, mixture
from doremi_train import mixture as doremi_train_mixture
from doremi_train.config import UserError, fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.exports import convert, formats
from doremi_train.methods import box
from doremi_train.methods.box import inside, project
from doremi_train.parallel import comm
from doremi_train.stages import adaptive, language_model, mixmin_runs, prepare, proxy, search_runs, swarm_search
from doremi_train.stages.language_model import final_tokens, main_steps
from doremi_train.stages.session import Session, once


@once
def run(session: Session) -> mixture.Mixture:
    """Compute it, complete it with epochs and provenance, and write it."""
    store = prepare.run(session)
    within(session, store)  # before anything is trained that could not be used
    mixture = _capped(session, store, _compute(session, store))
    mixture = complete(session, store, mixture)
    comm.on_first(lambda: doremi_train_mixture.save(session.run_dir / "weights.json", mixture))
    return mixture


def within(session: Session, store: TokenStore) -> box.Box | None:
    """Where mixture.max_epochs keeps the mixture of every method; None: weights that the user gave stay as they are.
    Raises UserError where it leaves none."""
    return None if session.config.mixture.method == "file" else language_model.caps(session, store, 0.0, "")


def capped(session: Session, store: TokenStore, found: Tensor) -> Tensor:
    """(K,) within mixture.max_epochs: what a domain has too much goes to the others in proportion."""
    box, point = within(session, store), found.numpy()
    return found if box is None or inside(point, box) else torch.from_numpy(project(point, box))


def _capped(session: Session, store: TokenStore, mixture: mixture.Mixture) -> mixture.Mixture:
    found = mixture.tensor(store.domains)
    kept = capped(session, store, found)
    if kept is found:
        return mixture
    session.say(
        f"{', '.join(name for name, less in zip(store.domains, kept < found, strict=True) if less)}: more than "
        f"mixture.max_epochs={session.config.mixture.max_epochs:g} passes; what was too much went to the others"
    )
    return replace(mixture, weights=dict(zip(store.domains, kept.tolist(), strict=True)))


def _compute(session: Session, store: TokenStore) -> mixture.Mixture:
    if session.config.mixture.method == "swarm":
        return swarm_search.run(session)
    if adaptive.asked(session):
        return adaptive.mixture(session)
    if session.config.mixture.method == "search":
        return search_runs.run(session)
    if session.config.mixture.method == "mixmin":
        return mixmin_runs.run(session)
    if session.config.mixture.method in ("doremi", "doge"):
        return proxy.run(session)
    return given(session, store)


def given(session: Session, store: TokenStore) -> mixture.Mixture:
    """The mixture of a method that trains nothing."""
    options = session.config.mixture
    if options.weights is not None:
        found = mixture.checked(options.weights, store.domains, "mixture.weights", options.normalize)
        return mixture.Mixture("file", found)
    if options.path is not None and options.format is not None:
        return imported(session, store, Path(options.path), options.format)
    if options.path is not None:
        return mixture.load(Path(options.path), store.domains, options.normalize)
    sized = language_model.heuristic(session, store, options.method, main_steps(session))
    return mixture.Mixture(options.method, dict(zip(store.domains, sized.tolist(), strict=True)))


def imported(session: Session, store: TokenStore, path: Path, form: str) -> mixture.Mixture:
    """The mixture of a file that was written for a trainer."""
    where = f"mixture.path={path}"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    drawn = convert.read(form, text, store.domains, session.config.export.paths or {}, where)
    drawn = mixture.checked(drawn, store.domains, where, normalize=True)
    return mixture.Mixture("file", convert.weights(drawn, tokens_per_document(session, store, form)))


def tokens_per_document(session: Session, store: TokenStore, form: str) -> dict[str, float] | None:
    """The mean of each domain; None where the trainer draws sequences, whose weights need none."""
    if (session.config.export.unit or formats.FORMATS[form].draws) == "sequences":
        return None
    means = store.sizes("train") / store.documents("train")
    return dict(zip(store.domains, means.tolist(), strict=True))


def complete(session: Session, store: TokenStore, mixture: mixture.Mixture) -> mixture.Mixture:
    """With the epochs that the final run makes of each domain, and where the weights come from."""
    epochs = mixture.tensor(store.domains).numpy() * final_tokens(session) / np.asarray(store.sizes("train"))
    shape = language_model.resolved_model(session, store)
    return replace(
        mixture,
        epochs=dict(zip(store.domains, epochs.tolist(), strict=True)),
        provenance={
            "seed": session.config.seed,
            "steps": session.config.training.steps,
            "model": fingerprint(shape),
            "tokenizer": store.manifest["tokenizer"]["fingerprint"],
            "data": store.fingerprint,
            "version": __version__,
        }
        | mixture.provenance,
    )

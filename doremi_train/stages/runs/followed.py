"""The main run on the mixture of a file that may change while it trains (main.mixture_file)."""

import secrets
from dataclasses import replace
from pathlib import Path

from doremi_train import files, mixture
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import cross_entropy, simplex
from doremi_train.parallel import comm
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import budget, language_model
from doremi_train.stages.runs.language_model import Begun
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run
from doremi_train.training import batch_selection
from doremi_train.training.followed import Followed

# What the file will say is in nobody's recipe: a run of this kind is its run_dir's, and no other's.
IDENTITY = "mixture_file.json"


def asked(session: Session) -> bool:
    """Whether the final model follows a file."""
    return session.config.main.mixture_file is not None


def check(session: Session, store: TokenStore) -> str | None:
    """What this run_dir calls its run, if it has begun one. Raises UserError where it would begin
    one now, and the file holds no mixture: before other runs are trained on the way to it."""
    main, path = session.config.main, session.run_dir / IDENTITY

    def found() -> str | None:
        if path.exists():
            identity: str = files.read_json(path)["run"]
            return identity
        given, normalize = str(main.mixture_file), session.config.mixture.normalize
        mixture.of_step(Path(given), store.domains, 0, f"main.mixture_file={given}", normalize)
        return None

    return comm.on_first(found)


def known(
    session: Session, store: TokenStore, selection: batch_selection.Setting | None
) -> Run | None:
    """The run, if this run_dir has begun one. Raises UserError as `check` does."""
    identity = check(session, store)
    return None if identity is None else _recipe(session, store, selection, identity)


def train(session: Session, store: TokenStore, selection: batch_selection.Setting | None) -> Run:
    """Train it, unless it is finished; link it as `run_dir/main`. Raises UserError where the file
    holds no mixture at the start."""
    run = _recipe(session, store, selection, comm.on_first(lambda: _identity(session)))
    main, config = session.config.main, session.config

    def begin() -> Begun:
        uniform = simplex.uniform(len(store.domains))  # in the place of the file's
        task = language_model.task_of(
            session,
            run,
            "main",
            store,
            objective=cross_entropy,
            objective_options=cross_entropy.Options(weights=tuple(uniform.tolist())),
            training=replace(config.training, steps=budget.main_steps(session)),
            selection=selection,
            followed=Followed(
                Path(str(main.mixture_file)),
                main.mixture_every,
                store.domains,
                run.folder,
                config.mixture.normalize,
            ),
        )
        shape = language_model.resolved_model(session, store, "main")
        return Begun(task, language_model.built(session, shape, config.training, config.seed))

    language_model.train_once(session, run, "main", begin)
    return run


def _recipe(
    session: Session,
    store: TokenStore,
    selection: batch_selection.Setting | None,
    identity: str,
) -> Run:
    training = replace(session.config.training, steps=budget.main_steps(session))
    main = session.config.main
    return Run(
        session.store,
        "followed",
        {
            "data": store.fingerprint,
            "model": language_model.resolved_model(session, store, "main"),
            "mixture_file": {
                "path": main.mixture_file,
                "every": main.mixture_every,
                "run": identity,
            },
            "training": training_identity(training),
            "evaluation": session.plain["evaluation"],
            "seed": session.config.seed,
        }
        | batch_selection.described(selection),
    )


def _identity(session: Session) -> str:
    path = session.run_dir / IDENTITY
    with files.making(path) as new:
        if new:
            files.write_json(path, {"run": secrets.token_hex(8)})
    identity: str = files.read_json(path)["run"]
    return identity

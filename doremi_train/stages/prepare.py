"""Text → token shards, once for all runs that share the store."""

from pathlib import Path

from rich.markup import escape

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.console import Bar
from doremi_train.data.batches import require_sequences
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import prepare, second_home
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.parallel import comm
from doremi_train.stages.choice import chosen
from doremi_train.stages.planning import warnings
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import set_status, stop


@once
def run(session: Session) -> TokenStore:
    """The prepared data of this configuration; made on the first process, opened on all.

    Raises UserError where a source or the tokeniser changed since this run_dir was started, or a
    domain is too small.
    """
    options = chosen.data(session)
    folder = comm.on_first(lambda: _prepare(session, options))
    mirror = session.mirror.at("data") if session.mirror else None
    if mirror is not None:
        # Also where this process is on another machine than the first one.
        second_home.fetch(folder, mirror)
    store = TokenStore.open(
        folder, mirror.at(folder.name) if mirror is not None else None, options.only
    )
    for split in ("train", "validation"):  # now, and not after the reference was trained
        require_sequences(store, split, session.config.training.sequence_length)
    for message in warnings.unwritable(store.named(store.unwritable())):
        session.say(escape(f"prepare: warning: {message}"))
    return store


def _prepare(session: Session, options: DataOptions) -> Path:
    link = session.run_dir / "prepare"
    mirror = session.mirror.at("data") if session.mirror else None
    if session.mirror:
        session.mirror.prove()
    request = prepare.request(options)
    if link.exists():
        before = files.read_json(link / "manifest.json")["request"]
        if prepare.address(before) != prepare.address(request):
            raise UserError(
                f"run_dir={session.run_dir}: its data changed since it was "
                f"prepared:\n{prepare.explain_change(before, request)}\ntake another run_dir, or "
                "bring the old data back"
            )
    with Bar("prepare", 1, unit="B", show=session.bar is None) as bar:

        def progress(description: str, done: int, total: int | None) -> None:
            stop.check("prepare")
            bar.total = total or done + 1
            bar.update(done, description)

        folder = prepare.prepare(options, session.store / "data", progress, mirror)
    set_status(folder, "finished")
    files.link(link, folder)
    return folder

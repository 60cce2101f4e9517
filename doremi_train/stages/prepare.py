"""Text → token shards, once for all runs that share the store."""

import shutil
from dataclasses import replace
from pathlib import Path

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.console import Bar
from doremi_train.data.batches import require_sequences
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import prepare, second_home
from doremi_train.data.tokens.shards import TokenStore, read_manifest
from doremi_train.parallel import comm
from doremi_train.stages.choice import chosen
from doremi_train.stages.planning import warnings
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import stop
from doremi_train.storage.steady import one_line


@once
def run(session: Session) -> TokenStore:
    """The prepared data of this configuration; made on the first process, opened on all.

    Raises UserError where a source or the tokeniser changed since this run_dir was started, or a
    domain is too small.
    """
    options = session.config.data
    before = kept(session)
    if before is not None:
        folder = before
    else:
        options = chosen.data(session)
        folder = comm.on_first(lambda: _prepare(session, options))
    mirror = session.mirror.at("data") if session.mirror else None
    if mirror is not None:
        # Also where this process is on another machine than the first one.
        second_home.fetch(folder, mirror)
    store = TokenStore.open(
        folder,
        mirror.at(folder.name) if mirror is not None else None,
        options.only,
        options.least_tokens,
    )
    comm.agree({"data": store.fingerprint, "tokenizer": store.manifest["tokenizer"]})
    _say_rare(session, store, options)
    for split in ("train", "validation"):  # now, and not after the reference was trained
        require_sequences(store, split, session.config.training.sequence_length)
    for message in warnings.unwritable(store.named(store.unwritable())):
        session.say(f"prepare: warning: {message}")
    return store


# What needs the text of a run no more, once it is prepared.
_FROM_STORE = ("report", "export", "evaluate", "compare")


@once
def kept(session: Session) -> Path | None:
    """The data of this run where its sources differ by now, or are gone, and nothing that is asked
    for reads them; None: they are as they were, or are needed. A collective, when first asked."""
    return comm.on_first(lambda: _kept(session))


def _kept(session: Session) -> Path | None:
    link, stage = session.run_dir / "prepare", session.config.stage
    finished = (session.run_dir / "main" / "result.json").exists()
    if not (link / "manifest.json").exists():
        return None
    if not (finished or stage in _FROM_STORE or _compared(link)):
        return None
    if stage == "prepare":
        return None
    before = read_manifest(link)["request"]
    before.pop("selection", None)  # whose sources are these
    try:
        now = prepare.request(replace(session.config.data, selection=None))
        why = prepare.explain_change(before, now)
    except UserError as error:
        why = one_line(error)
    if not why:
        return None
    if not _compared(link):  # which says so itself
        session.say(f"prepare                done before; its sources differ by now ({why})")
    return link.resolve()


def _compared(link: Path) -> bool:
    """Whether this is a contender of a comparison, which is of what another run_dir prepared."""
    contenders, comparison = link.parent.parent.parent, link.parent.parent.parent.parent
    return contenders.name == "compare" and (comparison / "prepare").resolve() == link.resolve()


def _say_rare(session: Session, store: TokenStore, options: DataOptions) -> None:
    """Say which domains are too small to stand alone, and what became of them."""
    manifest = read_manifest(store.path)
    whole, few = manifest["domains"], f"of fewer than data.least_tokens={options.least_tokens}"
    rare = sorted(set(options.only or whole) - set(store.domains))
    if rare:
        tokens = sum(whole[name]["train"]["tokens"] for name in rare)
        session.say(
            f"prepare                {len(rare)} domains {few} tokens are left out, {tokens} "
            f"tokens in all: {_some(rare)}"
        )
    for into, poured in manifest.get("poured", {}).items():
        tokens = whole[into]["train"]["tokens"]
        session.say(
            f"prepare                {len(poured)} domains {few} tokens are poured into "
            f"{into}, which has {tokens} tokens: {_some(poured)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


def _prepare(session: Session, options: DataOptions) -> Path:
    link = session.run_dir / "prepare"
    mirror = session.mirror.at("data") if session.mirror else None
    if session.mirror:
        session.mirror.prove()
    request = prepare.request(options)
    whole = (link / "manifest.json").exists()
    if link.exists() and not link.is_symlink() and not whole:
        raise UserError(
            f"run_dir: {link} is none of ours, where a link to prepared data belongs; move it away"
        )
    if whole:  # or it was deleted there, and is made again
        before = read_manifest(link)["request"]
        if prepare.address(before) != prepare.address(request):
            raise UserError(
                f"run_dir={session.run_dir}: its data changed since it was "
                f"prepared:\n{prepare.explain_change(before, request)}\ntake another run_dir, or "
                "bring the old data back"
            )
    _take_over(link, session.store / "data" / prepare.address(request))
    with Bar("prepare", 1, unit="B", show=session.bar is None) as bar:

        def progress(description: str, done: int, total: int | None) -> None:
            stop.check("prepare")
            bar.total = total or done + 1
            bar.update(done, description)

        folder = prepare.prepare(options, session.store / "data", progress, mirror)
    files.link(link, folder)
    return folder


def _take_over(copy: Path, folder: Path) -> None:
    """Bring a token store that stands where a link to it belongs, as after `cp -rL`, to its
    place."""
    if copy.is_symlink() or not copy.is_dir():
        return
    if (folder / "manifest.json").exists():
        shutil.rmtree(copy)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # what was begun of it
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(copy, folder)

"""Learn a vocabulary, from sub-words to phrases, that suits the targets: for
selection.features=granular."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.config import fingerprint
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.corpus.sources import resolve, signature
from doremi_train.data.options import DataOptions
from doremi_train.parallel import comm
from doremi_train.reports import selection_page
from doremi_train.selection.documents import granular, kernels, parts
from doremi_train.stages.choice import target_files
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run, stop


@once
def run(session: Session) -> Path:
    """Make `vocabulary.json`, with its log and picture, unless that was done."""
    recipe = comm.on_first(lambda: _recipe(session))
    made = Run(session.store, "vocabulary", recipe)
    with session.computing(made, "vocabulary", quiet=True) as todo:
        if todo:
            comm.on_first(lambda: made.finish(_make(session, made.folder)))
    path = session.run_dir / "vocabulary" / "vocabulary.json"
    result = made.result()
    first, last = result["steps"][0], result["steps"][-1]
    session.say(
        f"vocabulary  {first['tokens']} → {last['tokens']} tokens, H_v "
        f"{first['utility_plain']:.4f} → {last['utility_plain']:.4f} nats per byte (weighted by "
        f"use {first['utility_used']:.4f} → {last['utility_used']:.4f}); use it with "
        f"selection.features=granular selection.vocabulary={path}"
    )
    return path


def _recipe(session: Session) -> dict[str, Any]:
    kernels.require_numba()  # wrong before the work, and not after it
    options, raw, text = (
        session.config.vocabulary,
        session.config.data,
        target_files.text_options(session),
    )
    start = options.start and fingerprint([token.hex() for token in granular.start(options.start)])
    return asdict(options) | {
        "start": start,
        "data": signature(raw, resolve(raw)) | {"validation_fraction": raw.validation_fraction},
        "targets": {
            name: signature(text, sources)
            for name, sources in target_files.targets(session).items()
        },
    }


def _make(session: Session, folder: Path) -> dict[str, Any]:
    options = session.config.vocabulary
    text = target_files.text_options(session)
    target = [
        document
        for name, sources in target_files.targets(session).items()
        for document in parts.texts(sources, text, f"selection.targets.{name}")
    ]
    raw = _sample(resolve(session.config.data), session.config.data, options.sample)
    start = granular.start(options.start) if options.start is not None else []
    tokens, log = granular.make(start, target, raw, options)
    print_ = granular.save(folder / "vocabulary.json", tokens)
    files.write_bytes(folder / "vocabulary.svg", _picture(log).encode())
    return {"fingerprint": print_, "steps": log}


def _picture(log: list[dict[str, Any]]) -> str:
    """The chart as a file of its own."""
    return selection_page.utility(log).replace(
        ">", "><style>svg {--ink: #222; --soft: #666; --line: #ccc}</style>", 1
    )


def _sample(sources: list[Source], data: DataOptions, size: int) -> list[bytes]:
    """The first training documents of every source, `size` bytes in all."""
    texts: list[bytes] = []
    for source in sources:
        left = size // len(sources)
        for document in parts.documents(source, data, BadLines(data), whole=False):
            stop.check("vocabulary")
            if left <= 0 or not isinstance(document.content, bytes):
                break
            texts.append(document.content[:left])
            left -= len(document.content)
    return texts

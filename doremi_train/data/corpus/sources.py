"""Sources: from the data options to one ordered, deterministic list of files, which
`data.corpus.reading` reads."""

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from doremi_train.config import UserError
from doremi_train.data.corpus import installed, planted
from doremi_train.data.corpus.formats import INSTALLED, PLANTED, READERS, ending_of, index_of
from doremi_train.data.corpus.opening import (
    READER_VERSION,
    PassedOver,
    Source,
    file_system,
    refuse_command,
)
from doremi_train.data.options import DataOptions
from doremi_train.redaction import redact
from doremi_train.storage.urls import PIPE, reaching

SPLITS = ("train", "validation")  # how the names of files in data.root begin
RULE = "names of files in a domain's folder begin with train or validation"


def resolve(options: DataOptions) -> list[Source]:
    """The files to read, sorted by domain, split and name.

    Raises UserError for everything wrong that can be seen without reading them.
    """
    given = [key for key in ("root", "domains", "files") if getattr(options, key) is not None]
    if len(given) > 1:
        raise UserError(
            f"data.{' and data.'.join(given)}: only one of data.root, data.domains, data.files; "
            "remove the others"
        )
    if options.domain_key is not None and given != ["files"]:
        raise UserError(
            f"data.domain_key={options.domain_key!r}: it divides data.files; give data.files, or "
            "remove data.domain_key"
        )
    if options.root is not None:
        sources = _from_root(options.root, options)
    elif options.domains is not None:
        sources = _from_domains(options)
    elif options.files is not None:
        sources = _from_files(options)
    elif options.embedded == "planted":
        sources = _from_planted()
    elif options.embedded is not None:
        sources = _from_installed(options)
    else:
        raise UserError(
            "data: nothing to read; give data.root, data.domains, data.files or "
            "data.embedded=installed"
        )
    sources.sort(key=lambda source: (source.domain or "", source.split or "", source.url))
    _refuse_twice(sources)
    _refuse_other_encodings(sources)
    return sources


def resolve_one(options: DataOptions, key: str) -> list[Source]:
    """The files of the one domain of these options, which were given as `key`: messages say it."""
    (name,) = options.domains or {}
    try:
        return resolve(options)
    except UserError as error:
        said = str(error).replace(f"data.domains.{name}.train", key)
        raise UserError(said.replace(f"data.domains.{name}", key)) from None


def signature(options: DataOptions, sources: list[Source]) -> dict[str, Any]:
    """A JSON value that changes with any source file or reading option: the content address of what
    is prepared.

    Files of data.root are named relative to it, so that the folder may move.
    """
    files = {
        name: {
            "domain": source.domain,
            "split": source.split,
            "size": source.size,
            "version": source.version,
        }
        for name, source in zip(names(options, sources), sources, strict=True)
    }
    return {
        "reader": max((_reader_version(source) for source in sources), default=1),
        "text_key": options.text_key,
        "domain_key": options.domain_key,
        "files": files,
    }


def _reader_version(source: Source) -> int:
    ending = None if source.url.startswith(PIPE) else ending_of(source.url)
    return READER_VERSION.get(ending or "", 1)


def passed_over(options: DataOptions) -> PassedOver:
    """What stands in data.root, or is matched by a glob, and is not read, by kind."""
    found = PassedOver()
    for pattern in _patterns(options):
        _passed_over_by(pattern, options, found)
    if options.root is None:
        return found
    fs, path = file_system(options.root, "data.root", options)
    with reaching(options.root, "data.root"):
        for entry in sorted(fs.ls(path, detail=True), key=lambda entry: entry["name"]):
            name = _base(entry["name"])
            if name.startswith("."):
                found.add("hidden", name)
            elif not _is_folder(fs, entry):
                found.add("files beside the domains", name)
            else:
                _passed_over_in(fs, entry["name"], found)
    return found


def _patterns(options: DataOptions) -> list[str]:
    domains = (options.domains or {}).values()
    named = [pattern for files in domains for pattern in (*files.train, *files.validation)]
    return [pattern for pattern in (*named, *(options.files or ())) if not pattern.startswith(PIPE)]


def _passed_over_by(pattern: str, options: DataOptions, found: PassedOver) -> None:
    """Adds what a glob matches and is not read."""
    fs, path = file_system(pattern, "data", options)
    if not _is_glob(pattern, path) or "**" in path or fs.isfile(path):
        return
    with reaching(pattern, "data"):
        for name, entry in sorted(fs.glob(path, detail=True).items()):
            if _is_folder(fs, entry):
                found.add("folders that a glob matches", name)
            elif _is_hidden(name, path):
                found.add("hidden", name)


def _is_glob(pattern: str, path: str) -> bool:
    magic = "*" if pattern.startswith("http") else "*?["  # a URL may have a ? query
    return any(character in path for character in magic)


def _is_hidden(file: str, path: str) -> bool:
    """Whether a file that a glob `path` matches is hidden, and the glob is not one for those."""
    return _base(file).startswith(".") and not _base(path).startswith(".")


def _passed_over_in(fs: Any, folder: str, found: PassedOver) -> None:
    """Adds what is not read of one domain of data.root."""
    entries = sorted(fs.ls(folder, detail=True), key=lambda entry: entry["name"])
    all_names = {entry["name"] for entry in entries}
    for entry in entries:
        name, path = _base(entry["name"]), f"{_base(folder)}/{_base(entry['name'])}"
        if name.startswith("."):
            found.add("hidden", path)
        elif _is_folder(fs, entry):
            found.add("folders in a domain's folder", path)
        elif name.endswith(".idx"):
            if entry["name"][: -len(".idx")] + ".bin" not in all_names:
                found.add("files .idx without their .bin", path)
        elif not name.startswith(SPLITS):
            found.add(f"files {ending_of(name) or Path(name).suffix or 'without an ending'}", path)


def names(options: DataOptions, sources: list[Source]) -> list[str]:
    """A name for every source: its URL, or its path in data.root, so that the folder may move."""
    taken: dict[str, None] = {}
    for source in sources:
        name = redact(source.url)  # a password that changed is not another file
        name = "/".join(name.split("/")[-2:]) if options.root is not None else name
        while name in taken:  # addresses that differ only in what is not shown
            name += " (again)"
        taken[name] = None
    return list(taken)


# Which files


def _from_root(root: str, options: DataOptions) -> list[Source]:
    fs, path = file_system(root, "data.root", options)
    with reaching(root, "data.root"):
        if not root or not fs.isdir(path):
            raise UserError(
                f"data.root={root!r}: no such folder; give the folder whose sub-folders are the "
                "domains"
            )
        folders = [entry for entry in _entries(fs, path) if _is_folder(fs, entry)]
        if not folders:
            raise UserError(
                f"data.root={root!r}: no domain in it; each domain is a sub-folder with train* "
                f"files ({_allowed()})"
            )
        return [source for folder in folders for source in _from_folder(fs, folder["name"])]


def _from_folder(fs: Any, folder: str) -> list[Source]:
    """One domain of data.root."""
    domain = _base(folder)
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry in _entries(fs, folder):
        for split, paths in files.items():
            if (
                _base(entry["name"]).startswith(split)
                and not entry["name"].endswith(".idx")
                and not _is_folder(fs, entry)
            ):
                paths.append(entry["name"])
    if not files["train"]:
        found = PassedOver()
        _passed_over_in(fs, folder, found)
        others = f" (not read: {found})" if str(found) else ""
        raise UserError(
            f"data.root: domain {domain!r} has no train* file directly in {folder}{others}; "
            f"add one ({_allowed()}), or remove the folder"
        )
    splits = _splits(bool(files["validation"]))
    return [
        _source(fs, path, domain, splits[split], "data.root")
        for split in files
        for path in files[split]
    ]


def _from_domains(options: DataOptions) -> list[Source]:
    sources = []
    for domain, files in (options.domains or {}).items():
        splits = _splits(bool(files.validation))
        if not domain or not files.train:
            raise UserError(
                f"data.domains.{domain}.train={list(files.train)}: a domain needs a name and files"
            )
        for split, patterns in (("train", files.train), ("validation", files.validation)):
            for pattern in patterns:
                sources += _match(
                    pattern, domain, splits[split], f"data.domains.{domain}.{split}", options
                )
    if not sources:
        raise UserError("data.domains={}: no domain; give 'data.domains={NAME: {train: [FILES]}}'")
    return sources


def _from_files(options: DataOptions) -> list[Source]:
    if not options.files:
        raise UserError("data.files=[]: nothing to read; give globs, paths or URLs")
    if options.domain_key is None:
        raise UserError(
            "data.domain_key: missing; data.files needs the key that names a record's domain, such "
            "as meta.source"
        )
    sources = [
        source
        for pattern in options.files
        for source in _match(pattern, None, None, "data.files", options)
    ]
    for source in sources:
        if not source.url.startswith(PIPE) and ending_of(source.url) in (".txt", ".bin"):
            raise UserError(
                f"data.files: {source.url} has no records, so "
                f"data.domain_key={options.domain_key!r} cannot name its domain; give data.domains"
            )
    return sources


def _from_installed(options: DataOptions) -> list[Source]:
    sources = []
    for domain in installed.domains():
        for split in ("train", "validation"):
            documents = installed.listing(domain, split, options.validation_fraction)
            size = sum(document.size for document in documents)
            sources.append(
                Source(
                    f"{INSTALLED}{domain}/{split}",
                    domain,
                    split,
                    size,
                    installed.version(documents),
                )
            )
    if not sources:
        raise UserError(
            "data.embedded=installed: this installation has too little text; give data.root"
        )
    return sources


def _from_planted() -> list[Source]:
    return [
        Source(
            f"{PLANTED}{domain}/{split}",
            domain,
            split,
            planted.size(domain),
            planted.version(domain),
        )
        for domain in planted.domains()
        for split in ("train", "validation")
    ]


def _splits(validation_given: bool) -> dict[str, str | None]:
    """{kind of file: split of its texts}; None: nobody has split them yet."""
    return {"train": "train" if validation_given else None, "validation": "validation"}


def _match(
    pattern: str, domain: str | None, split: str | None, key: str, options: DataOptions
) -> list[Source]:
    """Files of a path, glob or URL. Raises UserError where there is none."""
    if pattern.startswith(PIPE):
        refuse_command(pattern, key, options)
        return [Source(pattern, domain, split, 0, "")]
    fs, path = file_system(pattern, key, options)
    with reaching(pattern, key):
        if fs.isfile(path):  # first: a name may hold glob characters
            return [_source(fs, path, domain, split, key, pattern)]
        if fs.isdir(path):
            raise UserError(
                f"{key}={pattern!r}: a folder, not a file; give {pattern.rstrip('/')}/*.ENDING "
                f"({_allowed()})"
            )
        paths = sorted(fs.glob(path)) if _is_glob(pattern, path) else []
        paths = [file for file in paths if fs.isfile(file) and not _is_hidden(file, path)]
        if not paths:
            raise UserError(
                f"{key}={pattern!r}: no such file, or the glob matches none; correct it or remove "
                "it"
            )
        return [_source(fs, file, domain, split, key) for file in paths]


def _source(
    fs: Any, path: str, domain: str | None, split: str | None, key: str, url: str | None = None
) -> Source:
    local = isinstance(fs, LocalFileSystem)
    url = path if local else url or fs.unstrip_protocol(path)
    ending = ending_of(url)
    if ending is None:
        raise UserError(f"{key}: {url} has an unknown ending; allowed are {_allowed()}")
    version = _version(fs, path)
    if ending == ".bin":
        if not fs.isfile(index_of(path)):
            raise UserError(
                f"{key}: {url} is without {_base(index_of(path))}; put the .idx of this .bin "
                "beside it"
            )
        version += " " + _version(fs, index_of(path))
    return Source(url, domain, split, int(fs.info(path).get("size") or 0), version)


def _version(fs: Any, path: str) -> str:
    if isinstance(fs, LocalFileSystem):
        return str(Path(path).stat().st_mtime_ns)
    info = fs.info(path)
    keys = (
        "ETag",
        "etag",
        "md5Hash",
        "checksum",
        "LastModified",
        "last_modified",
        "updated",
        "mtime",
        "created",
    )
    return next((str(info[key]) for key in keys if info.get(key)), "")


def _refuse_other_encodings(sources: list[Source]) -> None:
    """Raise UserError for names of files and folders that no file of results could hold."""
    for source in sources:
        try:
            f"{source.domain}{source.url}".encode()
        except UnicodeEncodeError:
            raise UserError(
                f"data: {ascii(source.url)[1:-1]}: its name holds bytes that are no UTF-8; rename "
                "it (convmv -f latin1 -t utf8 -r FOLDER)"
            ) from None


def _refuse_twice(sources: list[Source]) -> None:
    """A file listed twice would count twice, and might stand in training and validation."""
    seen: dict[str, Source] = {}
    for source in sources:
        file = os.path.realpath(source.url) if source.url.startswith("/") else source.url
        if file in seen:
            first, second = _place(seen[file]), _place(source)
            where = (
                f"by {first} and by {second}"
                if first != second
                else f"by {first}: its patterns overlap"
            )
            raise UserError(f"{file}: listed twice, {where}; list every file once")
        seen[file] = source


def _place(source: Source) -> str:
    return (
        f"domain {source.domain!r} ({source.split or 'train'})"
        if source.domain is not None
        else "data.files"
    )


def _entries(fs: Any, folder: str) -> list[dict[str, Any]]:
    entries = [
        entry for entry in fs.ls(folder, detail=True) if not _base(entry["name"]).startswith(".")
    ]
    return sorted(entries, key=lambda entry: entry["name"])


def _is_folder(fs: Any, entry: dict[str, Any]) -> bool:
    return entry["type"] == "directory" or (bool(entry.get("islink")) and fs.isdir(entry["name"]))


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _allowed() -> str:
    return " ".join(READERS)

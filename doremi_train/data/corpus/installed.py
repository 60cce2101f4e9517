"""The embedded corpus: text that every machine with this package already has, so that a first run
downloads nothing.

Seven domains, cut from the Python installation itself. The choice depends on nothing but names and
sizes of files (hashed, never on directory order or times), so one installation always gives the
same corpus.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from doremi_train.config import fingerprint

# Raise when the same files would give other text: prepared data of the older recipe is then not
# reused.
RECIPE = 1
DOCUMENT = 60_000  # characters; longer documents are cut at the end of a line
SHORTEST = 200  # characters; shorter files (an empty __init__.py) are no documents
SMALLEST = 300_000  # bytes; a domain with less text on this machine is left out
VALIDATION = 4  # documents of a domain kept for validation, at least
PAGE = 64  # code points of one document of Unicode names

SKIPPED = {
    "test",
    "tests",
    "testing",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "include",
}
PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sympy", "torch", "transformers")


class Document(NamedTuple):
    # Path relative to its tree, the same on every machine; what follows a colon is a part of the
    # file.
    name: str
    size: int  # bytes of text, about
    read: Callable[[], str]  # raises OSError, UnicodeDecodeError or SyntaxError


def domains() -> tuple[str, ...]:
    """Domains with enough text in this installation, sorted."""
    return tuple(
        domain for domain in sorted(_DOMAINS) if sum(d.size for d in _chosen(domain)) >= SMALLEST
    )


def listing(domain: str, split: str, fraction: float) -> list[Document]:
    """Documents of `split` (`train` or `validation`), sorted by name; `fraction` of the bytes are
    for validation."""
    chosen = _chosen(domain)
    wanted = fraction * sum(document.size for document in chosen)
    count = held = 0
    while (held < wanted or count < VALIDATION) and count < len(chosen) - 1:
        held += chosen[count].size
        count += 1
    return sorted(
        chosen[:count] if split == "validation" else chosen[count:],
        key=lambda document: document.name,
    )


def version(documents: list[Document]) -> str:
    """Digest of names and sizes: changes with the installed packages, not when they are installed
    again elsewhere."""
    return fingerprint([RECIPE, [[document.name, document.size] for document in documents]])


def texts(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    """(name, text) of each document; a file that cannot be read or decoded is left out."""
    for document in documents:
        try:
            text = _cut(document.read())
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        if len(text) >= SHORTEST:
            yield document.name, text


@cache
def _chosen(domain: str) -> list[Document]:
    """The domain's documents up to its cap, in the order of a hash of their names."""
    candidates, cap = _DOMAINS[domain]
    chosen: list[Document] = []
    total = 0
    for document in sorted(
        candidates(), key=lambda document: (_hash(document.name), document.name)
    ):
        if total >= cap:
            break
        chosen.append(document._replace(size=min(document.size, DOCUMENT)))
        total += chosen[-1].size
    return chosen


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= DOCUMENT
        else text[: text.rfind("\n", 0, DOCUMENT) + 1] or text[:DOCUMENT]
    )


def _python_code() -> Iterator[Document]:
    return (
        document for document in _stdlib() if not _is_table(document) and not _is_prose(document)
    )


def _docs_prose() -> Iterator[Document]:
    """Docstrings of those standard modules whose code is in no other domain, and the topics of
    `help()`."""
    folder = Path(sysconfig.get_path("stdlib"))
    for document in _stdlib():
        if _is_prose(document) and not _is_table(document):
            read = partial(_docstrings_of, folder / document.name)
            # Docstrings are about an eighth of the code.
            yield Document(document.name, document.size // 8, read)
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name, text in topics.items():
        yield Document(f"pydoc_data/topics.py:{name}", len(text.encode()), partial(str, text))


def _cpp_headers() -> Iterator[Document]:
    # ATen/ops is generated: thousands of files that hardly differ.
    root = _package("torch")
    return _files(root / "include", (".h", ".hpp", ".cuh"), SKIPPED | {"ops"}) if root else iter(())


def _package_code() -> Iterator[Document]:
    for name in PACKAGES:
        if root := _package(name):
            yield from _files(root, (".py",), SKIPPED, f"{name}/")


def _readmes() -> Iterator[Document]:
    seen = {"doremi-train"}  # our own README is no data: editing it must not change the corpus
    for distribution in importlib.metadata.distributions():
        metadata = distribution.read_text("METADATA")
        name = distribution.name.lower().replace("_", "-") if metadata else ""
        if metadata and name not in seen:  # the first on sys.path is the one that Python imports
            seen.add(name)
            description = metadata.partition("\n\n")[2]
            yield Document(
                f"{name}-{distribution.version}/METADATA",
                len(description.encode()),
                partial(str, description),
            )


def _tables() -> Iterator[Document]:
    """Tables for machines: character sets, entities, time zones, font metrics."""
    yield from (document for document in _stdlib() if _is_table(document))
    if root := _package("tzdata"):
        yield from _files(root, (".zi", ".tab"), SKIPPED, "tzdata/")
    if root := _package("matplotlib"):
        yield from _files(root / "mpl-data", (".afm",), SKIPPED, "matplotlib/mpl-data/")


def _unicode_names() -> Iterator[Document]:
    """Code point, category, direction, decomposition and name, a page of neighbours at a time."""
    for first in range(0, sys.maxunicode + 1, PAGE):
        if page := "".join(map(_describe, range(first, first + PAGE))):
            name = f"unicode-{unicodedata.unidata_version}/{first:06X}"
            yield Document(name, len(page.encode()), partial(str, page))


def _describe(code: int) -> str:
    character = chr(code)
    name = unicodedata.name(character, "")
    if not name or name.startswith(
        ("CJK UNIFIED", "CJK COMPATIBILITY", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH")
    ):
        return ""  # named by formula: a hundred thousand lines that say nothing
    fields = (unicodedata.category(character), unicodedata.bidirectional(character))
    return f"{code:04X};{';'.join(fields)};{unicodedata.decomposition(character)};{name}\n"


_DOMAINS: dict[str, tuple[Callable[[], Iterator[Document]], int]] = {  # candidates and cap in bytes
    "cpp_headers": (_cpp_headers, 5_000_000),
    "docs_prose": (_docs_prose, 6_000_000),
    "package_code": (_package_code, 6_000_000),
    "python_code": (_python_code, 4_000_000),
    "readmes": (_readmes, 3_000_000),
    "tables": (_tables, 2_000_000),
    "unicode_names": (_unicode_names, 2_000_000),
}


@cache
def _stdlib() -> tuple[Document, ...]:
    # _sysconfigdata is generated and holds paths of the machine; topics.py is prose.
    documents = _files(Path(sysconfig.get_path("stdlib")), (".py",), SKIPPED)
    return tuple(
        d
        for d in documents
        if not d.name.startswith("_sysconfigdata") and d.name != "pydoc_data/topics.py"
    )


def _is_table(document: Document) -> bool:
    return document.name.startswith("encodings/") or document.name == "html/entities.py"


def _is_prose(document: Document) -> bool:
    """A module gives its code to one domain or its docstrings to another, never both."""
    return _hash("prose:" + document.name) % 3 == 0


def _docstrings_of(path: Path) -> str:
    return "\n\n".join(_docstrings(ast.parse(path.read_bytes())))


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _package(name: str) -> Path | None:
    """Folder of an installed package, found without importing it; None where it is not
    installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _files(
    root: Path, endings: tuple[str, ...], skipped: set[str], prefix: str = ""
) -> Iterator[Document]:
    """Files below `root`, none where it is missing; names start with `prefix`."""
    for folder, children, names in os.walk(root):
        children[:] = [child for child in children if child not in skipped]
        for name in names:
            path = Path(folder, name)
            if name.endswith(endings) and path.is_file():
                relative = path.relative_to(root).as_posix()
                yield Document(
                    prefix + relative, path.stat().st_size, partial(path.read_text, "utf-8")
                )

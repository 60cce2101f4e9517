"""One source of the corpus, as workers are given it: what they write of it is a function of their
input alone, and a task whose output exists is done (as in `selection.documents.tasks`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from doremi_train.config import UserError
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.options import DataOptions
from doremi_train.selection.documents.parts import Document, documents
from doremi_train.selection.regroup.options import RegroupOptions


@dataclass(frozen=True)
class Task:
    folder: Path
    number: int  # of the source
    source: Source
    data: DataOptions
    options: RegroupOptions

    @property
    def draws(self) -> Path:
        return self.folder / "draws" / f"{self.number:05d}.npz"

    @property
    def sample(self) -> Path:
        return self.folder / "sample" / f"{self.number:05d}.npz"

    @property
    def parts(self) -> Path:
        return self.folder / "parts" / f"{self.number:05d}.parquet"

    def documents(self, bad: BadLines) -> Iterator[Document]:
        """Every document, those for validation too; a giant one in pieces."""
        for document in documents(self.source, self.data, bad, whole=False, every=True):
            if not isinstance(document.content, bytes):
                raise UserError(
                    f"stage=regroup: {self.source.url} holds tokens, not text; give text"
                )
            yield document

    def group(self, domain: str) -> str:
        """The name of what is clustered by itself: all, or each given domain."""
        return domain if self.options.within == "domain" else ""

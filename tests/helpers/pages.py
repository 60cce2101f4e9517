"""What is generated: tables of docs/, and the comments of keys in conf/. `python
tests/helpers/pages.py` writes all of it anew."""

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from doremi_train.config import conf_dir  # noqa: E402
from doremi_train.exports.form import Format  # noqa: E402
from doremi_train.exports.formats import FORMATS  # noqa: E402
from doremi_train.stages.mixtures import WAYS  # noqa: E402
from helpers import keys  # noqa: E402

# Files in which every key has its comment: the whole configuration, and of each group the option
# that the others build on. Elsewhere a key has one where somebody wrote one.
COMMENTED = (
    "config", "batch_selection/none", "data/installed", "engine/auto", "mixture/doremi",
    "model/tiny", "objective/mean", "selection/none", "selection/less", "tracking/none",
    "training/default",
)  # fmt: skip


def table_of_keys() -> str:
    """A table a group: what may be given for each key, its default, and what it is."""
    head = ["| key | default | takes | what it is |", "|---|---|---|---|"]
    options = {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in conf_dir().iterdir()
        if folder.is_dir()
    }
    lines = ["## The run", "", *head]
    for key in keys.every_key():
        if key.takes:
            cells = (f"`{key.name}`", f"`{key.default}`", key.takes, key.doc)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        elif "." in key.name:
            lines.append(f"| `{key.name}.*` | | | {key.doc} |")
        else:
            lines += ["", f"## {key.name}", "", key.doc]
            if key.name in options:
                choices = ", ".join(f"`{name}`" for name in options[key.name])
                lines += ["", f"`{key.name}=` is one of {choices}."]
            lines += ["", *head]
    return "\n".join(lines)


def table_of_ways() -> str:
    """A row a way to a mixture."""
    rows = [f"| `{name}` | {way.HOW} |" for name, way in WAYS.items()]
    return "\n".join(["| `mixture=` | what it does |", "|---|---|", *rows])


def table_of_exports() -> str:
    """A row for each target, then which of them differ in what they need or follow."""
    rows = [
        f"| `{to}` | {form.trainer} | {form.file} | {form.draws}: {form.because} |"
        for to, form in FORMATS.items()
    ]
    by_name = _listed({to: form for to, form in FORMATS.items() if not form.paths})
    staged = _listed({to: form for to, form in FORMATS.items() if form.write_stages})
    return "\n".join(
        [
            "| `export.to` | trainer | file | draws, as its source says |",
            "|---|---|---|---|",
            *rows,
            "",
            f"- Know sources by name, and need no `export.paths`: {by_name}.",
            f"- Follow a staged mixture, where the others get the whole run's: {staged}.",
        ]
    )


def _listed(formats: dict[str, Format]) -> str:
    return ", ".join(f"`{to}`" for to in formats)


# (page, marker): the table between <!-- marker --> and <!-- end of marker --> in the page.
TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("docs/keys.md", "keys"): table_of_keys,
    ("docs/mixtures.md", "ways"): table_of_ways,
    ("docs/export.md", "exports"): table_of_exports,
}


def generated() -> dict[Path, str]:
    """Every file that is generated, whole or in part, as it has to be."""
    due: dict[Path, str] = {}
    for (page, marker), table in TABLES.items():
        path = ROOT / page
        begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        before, rest = due.get(path, path.read_text()).split(begin)
        _, after = rest.split(end)
        due[path] = f"{before}{begin}\n\n{table()}\n\n{end}{after}"
    known = {key.name: key for key in keys.every_key()}
    for path in sorted(conf_dir().rglob("*.yaml")):
        name = path.relative_to(conf_dir()).with_suffix("").as_posix()
        group = name.rpartition("/")[0]
        if group.startswith("hydra"):
            continue  # the keys are those of the launchers
        text = path.read_text()
        prefix = "" if not group or text.startswith("# @package _global_") else f"{group}."
        due[path] = keys.commented(text, prefix, known, everywhere=name in COMMENTED)
    return due


if __name__ == "__main__":
    for path, text in generated().items():
        if path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))

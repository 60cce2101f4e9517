"""The part of docs/export.md that follows from the registry; `python tests/helpers/exports_page.py`
writes it anew."""

from pathlib import Path

from doremi_train.exports.formats import FORMATS, Format

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
BEGIN, END = "<!-- exports:begin (generated) -->\n", "<!-- exports:end -->"


def exports_table() -> str:
    """Markdown: a row for each target, then which of them differ in what they need or follow."""
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


def page() -> str:
    """Text of docs/export.md with the part between its marks as the registry has it."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{exports_table()}\n\n{END}{rest.split(END)[1]}"


def _listed(formats: dict[str, Format]) -> str:
    return ", ".join(f"`{to}`" for to in formats)


if __name__ == "__main__":
    PAGE.write_text(page())

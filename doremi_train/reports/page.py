"""A self-contained page from a template."""

from pathlib import Path
from typing import Any

import jinja2

from doremi_train import files
from doremi_train.console import shown


def write_page(path: Path, template: str = "report.html.jinja", **content: Any) -> None:
    """Render a template; every value is text, shown as on a terminal and then escaped; only our own
    charts are markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files.write_bytes(path, environment.get_template(template).render(**content).encode())


def _text(value: Any) -> Any:
    """What is not markup already, as it may be shown. Documents keep their lines."""
    plain = isinstance(value, str) and not hasattr(value, "__html__")
    return shown(value, kept="\n\t") if plain else value

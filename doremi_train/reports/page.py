"""A self-contained page from a template."""

from pathlib import Path
from typing import Any

import jinja2

from doremi_train import files


def write_page(path: Path, template: str = "report.html.jinja", **content: Any) -> None:
    """Render a template; every value is escaped, only our own charts are markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files.write_bytes(path, environment.get_template(template).render(**content).encode())

"""Pages as a browser shows them: Chromium without a screen and without network."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
Browser = Callable[..., str]
QUIET = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
    "hide-scrollbars", "proxy-server=127.0.0.1:9",
)  # fmt: skip


def show(profile: Path, page: Path, *flags: str, at: str = "") -> str:
    """What it prints of a page, opened at a #fragment."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *(f"--{flag}" for flag in (*QUIET, f"user-data-dir={profile}", *flags)),
        page.as_uri() + at,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout

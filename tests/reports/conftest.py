"""A browser for the tests of pages."""

import functools

import pytest
from helpers.browser import CHROMIUM, Browser, show


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """`browser(page, *flags, at="#…")` opens a page without network and gives what it prints."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    return functools.partial(show, tmp_path_factory.mktemp("chromium"))

"""Fixtures of the tests of the server; without the extra `serve`, the tests that need them are skipped."""

import pytest


def running():
    """The module that makes servers."""
    return pytest.importorskip("running", reason="the extra `serve` is not installed")


@pytest.fixture(scope="session")
def model():
    return running().byte_model()


@pytest.fixture(scope="session")
def tokenizer():
    return running().byte_tokenizer()


@pytest.fixture(scope="session")
def served(model, tokenizer):
    """A server for all tests that do not change it."""
    with running().serve(model, tokenizer) as found:
        yield found


@pytest.fixture(scope="module")  # not of the session: while playwright runs, no other event loop can
def browser():
    """Debian's chromium."""
    import browsing

    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=browsing.CHROMIUM, args=[*browsing.FLAGS.split(), "--disable-quic"])
        yield found
        found.close()

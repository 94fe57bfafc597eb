"""The page in a real browser: what opens it, and what nobody may find in it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
AXE = Path(__file__).parent / "axe"


@contextmanager
def opened(browser: Any, address: str, expect: str = r"$^", **options: Any) -> Iterator[Any]:
    """A page, of which nothing may fail: no error in the console but those expected, no request to another host."""
    context = browser.new_context(**{"viewport": {"width": 1000, "height": 900}, **options})
    page, wrong = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda said: said.type == "error" and not re.search(expect, said.text) and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    host = urlparse(address).netloc
    page.on("request", lambda asked: urlparse(asked.url).netloc not in (host, "") and wrong.append(asked.url))
    page.goto(address)
    yield page
    context.close()
    assert not wrong, wrong


def link(**state: Any) -> str:
    """The part of an address that restores this state."""
    return "#" + base64.b64encode(json.dumps(state).encode()).decode()


def barriers(page: Any) -> list[str]:
    """What axe-core finds that keeps somebody out, with the elements."""
    page.evaluate((AXE / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    return [f"{each['impact']} {each['id']}: {[node['html'][:120] for node in each['nodes']]}" for each in found]


def tab_to(page: Any, wanted: Any) -> None:
    """Press Tab until this element has the focus, which has to be seen."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if wanted.evaluate("element => element === document.activeElement"):
            assert wanted.evaluate("element => getComputedStyle(element).outlineStyle") != "none"
            return
    raise AssertionError(f"Tab does not reach {wanted}")

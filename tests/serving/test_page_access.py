"""The page for everybody: axe-core, the keyboard alone, narrow screens, no motion."""

from __future__ import annotations

import hashlib

import pytest

running = pytest.importorskip("running", reason="the extra `serve` is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from browsing import AXE, barriers, link, needs_chromium, opened, tab_to

VIEWS = ("race", "steps", "chat", "live")


def filled(page, view):
    """A view that shows all that it can: an answer, its settings, its program."""
    region = page.get_by_role("region", name=view.title(), exact=True)
    region.wait_for()
    if view != "live":
        region.locator(".settings summary").click()
        region.get_by_role("combobox", name="Tree", exact=True).select_option(label="written as JSON")
        region.locator("button.main").click()
        region.locator(".step").nth(2).wait_for(state="attached")
    ends = {"race": "[data-same]", "steps": "[data-chosen] .tree", "chat": ".said-assistant small", "live": "table meter"}
    region.locator(ends[view]).first.wait_for()
    if view == "chat":
        region.locator(".program summary").click()
    return region


def test_axe_is_the_file_whose_checksum_and_licence_stand_beside_it():
    beside = (AXE / "LICENSE.txt").read_text()
    assert hashlib.sha256((AXE / "axe.min.js").read_bytes()).hexdigest() in beside
    assert "Mozilla Public License, version 2.0" in beside


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_no_barrier(browser, served, view, scheme):
    served.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 20})
    with opened(browser, served.url + "/" + link(view=view, prompt="Once", limit=16), color_scheme=scheme) as page:
        filled(page, view)
        assert not barriers(page)


@needs_chromium
def test_axe_finds_a_barrier_where_there_is_one(browser):
    with opened(browser, "about:blank") as page:
        page.set_content("<html lang=en><title>t</title><main><h1>t</h1><input></main></html>")
        assert "label" in str(barriers(page))


@needs_chromium
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_fits_a_narrow_screen(browser, served, view):
    served.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 20})
    with opened(browser, served.url + "/" + link(view=view, prompt="a"), viewport={"width": 360, "height": 700}) as page:
        filled(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@needs_chromium
def test_race_is_shown_at_once_to_those_who_want_no_motion(browser, served):
    with opened(browser, served.url + "/" + link(prompt="Once", limit=12), reduced_motion="reduce") as page:
        page.get_by_role("region", name="Race").get_by_role("button", name="Race").click()
        page.locator("[data-same=yes]").wait_for()
        assert page.get_by_role("button", name="Replay").count() == 1


@needs_chromium
def test_keyboard_alone_decodes_and_walks_through_the_steps(browser, served):
    with opened(browser, served.url + "/" + link(prompt="-", limit=24)) as page:
        page.get_by_role("region", name="Race").wait_for()
        tab_to(page, page.get_by_role("button", name="Steps", exact=True))
        page.keyboard.press("Enter")
        view = page.get_by_role("region", name="Steps", exact=True)
        tab_to(page, view.get_by_label("Prompt"))
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type("Once upon")
        tab_to(page, view.get_by_role("button", name="Decode"))
        page.keyboard.press("Enter")
        view.get_by_role("button", name="Decode").wait_for()
        tab_to(page, view.get_by_role("button", name="Play slowly"))
        page.keyboard.press("Space")
        page.locator("[data-chosen='2']").wait_for()
        page.keyboard.press("Space")
        tab_to(page, view.get_by_role("slider"))
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.locator("[data-chosen='1']").wait_for()
        tab_to(page, view.get_by_role("group", name="Answer"))
        page.keyboard.press("End")
        last = view.locator(".step").count() - 1
        page.locator(f"[data-chosen='{last}']").wait_for()
        page.keyboard.press("ArrowLeft")
        page.locator(f"[data-chosen='{last - 1}']").wait_for()
        tab_to(page, view.get_by_role("region", name="Tree of this step"))

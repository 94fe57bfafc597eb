"""The page in a real browser, in front of the real server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from contextlib import contextmanager
from urllib.parse import urlparse

import pytest
import torch

running = pytest.importorskip("running", reason="the extra `serve` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from medusa.cli.recorded_page import recorded_page
from medusa.serving.page import FILES, FOLDER, POLICY

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS.split(), "--disable-quic"])
        yield found
        found.close()


@contextmanager
def opened(browser, address, expect=r"$^", **options):
    """A page, of which nothing may fail: no error in the console but those expected, no request to another host."""
    context = browser.new_context(**{"viewport": {"width": 1000, "height": 900}, **options})
    page, wrong = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda said: said.type == "error" and not re.search(expect, said.text) and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    host = urlparse(address).netloc
    page.on("request", lambda asked: urlparse(asked.url).netloc not in (host, "") and wrong.append(asked.url))
    page.goto(address)
    yield page
    context.close()
    assert not wrong, wrong


def link(**state) -> str:
    return "#" + base64.b64encode(json.dumps(state).encode()).decode()


def test_headers_let_the_page_load_from_its_server_only(served):
    for path in FILES:
        answer = served.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY and "http" not in POLICY


def test_first_paint_needs_less_than_100_kb():
    assert sum(path.stat().st_size for path in FILES.values() if path.suffix != ".txt") < 100_000


def test_vendored_file_is_the_one_whose_checksum_and_licences_stand_beside_it():
    beside = (FOLDER / "preact.LICENSE.txt").read_text()
    assert hashlib.sha256((FOLDER / "preact.js").read_bytes()).hexdigest() in beside
    assert "The MIT License" in beside and "Apache License" in beside


def test_page_needs_no_key_but_what_it_calls_does(model, tokenizer):
    with running.serve(model, tokenizer, api_key=("secret",)) as served:
        assert served.get("/").status_code == 200
        assert served.get("/v1/models").status_code == 401


@needs_chromium
def test_race_shows_both_runs_and_that_they_are_identical(browser, served):
    with opened(browser, served.url + "/") as page:
        page.get_by_label("Prompt").first.fill("Once upon a time")
        page.get_by_role("region", name="Race").get_by_role("button", name="Race").click()
        page.locator("[data-same]").wait_for()
        assert page.locator("[data-same=yes]").count() == 1
        page.get_by_role("button", name="Replay").wait_for()
        texts = [page.locator(f"[data-pane={name}] .text").text_content() for name in ("plain", "medusa")]
        assert texts[0] == texts[1] != ""
        heads = [page.locator(f"[data-pane={name}] h2").text_content() for name in ("plain", "medusa")]
        tokens, steps = zip(*(map(int, re.findall(r"\d+", head)) for head in heads))
        assert tokens[0] == tokens[1] and steps[1] <= steps[0]
        assert float(page.locator("[data-score=rate]").text_content()) == pytest.approx(tokens[1] / steps[1], abs=0.006)
        assert page.locator("[data-score=speedup]").text_content().startswith("\u00d7 ")


@needs_chromium
def test_race_is_shown_at_once_to_those_who_want_no_motion(browser, served):
    with opened(browser, served.url + "/" + link(prompt="Once", limit=12), reduced_motion="reduce") as page:
        page.get_by_role("region", name="Race").get_by_role("button", name="Race").click()
        page.locator("[data-same=yes]").wait_for()
        assert page.get_by_role("button", name="Replay").count() == 1


@needs_chromium
def test_steps_are_walked_with_the_keyboard_and_show_their_trees(browser, served):
    with opened(browser, served.url + "/" + link(view="steps", prompt="Once upon", limit=24)) as page:
        page.get_by_role("button", name="Decode").click()
        page.get_by_role("button", name="Decode").wait_for()
        page.locator("[data-chosen='0']").wait_for()
        page.get_by_role("group", name="Answer").focus()
        page.keyboard.press("ArrowRight")
        page.locator("[data-chosen='1']").wait_for()
        page.keyboard.press("ArrowLeft")
        page.locator("[data-chosen='0'] .tree").wait_for()
        assert page.locator(".tree .node").count() > 1
        path, words = page.locator(".tree .node.accepted"), page.locator(".words b")
        assert path.locator("b").all_text_contents() == words.all_text_contents()
        page.get_by_role("slider").focus()
        page.keyboard.press("End")
        last = page.locator(".step").count() - 1
        page.locator(f"[data-chosen='{last}']").wait_for()
        seen = page.locator(".step").filter(visible=True).first
        seen.hover()
        page.locator(f"[data-chosen='{seen.get_attribute('data-step')}']").wait_for()


@needs_chromium
def test_chat_streams_stops_and_goes_on(browser, served):
    with opened(browser, served.url + "/" + link(view="chat", limit=400, seed="1", temperature=1)) as page:
        view = page.get_by_role("region", name="Chat")
        view.get_by_label("Prompt", exact=True).fill("Hello")
        view.get_by_role("button", name="Send").click()
        page.locator(".said-assistant .step").nth(2).wait_for(state="attached")
        if view.get_by_role("button", name="Stop").count():
            view.get_by_role("button", name="Stop").click()
        view.get_by_role("button", name="Send").wait_for()
        assert served.idle()
        view.get_by_label("Prompt", exact=True).fill("And then?")
        view.get_by_role("button", name="Send").and_(page.locator(":enabled")).wait_for()
        view.get_by_label("Prompt", exact=True).press("Control+Enter")
        page.locator(".said-assistant").nth(1).wait_for()
        assert page.locator(".said-user").all_text_contents() == ["userHello", "userAnd then?"]
        view.locator(".program summary").click()
        view.get_by_role("button", name="Python").click()
        assert "'messages'" not in view.locator("pre").text_content()
        compile(view.locator("pre").text_content(), "copied", "exec")


@needs_chromium
def test_link_restores_the_prompt_and_the_settings(browser, served):
    with opened(browser, served.url + "/") as page:
        page.get_by_role("button", name="Steps", exact=True).click()
        view = page.get_by_role("region", name="Steps")
        view.get_by_label("Prompt").fill("Ünïcode ✓")
        view.locator(".settings summary").click()
        before = page.url
        view.get_by_label("Most tokens").fill("33")
        page.wait_for_function("before => location.href !== before", arg=before)
        page.reload()
        view.get_by_label("Prompt").wait_for()
        assert view.get_by_label("Prompt").input_value() == "Ünïcode ✓"
        view.locator(".settings summary").click()
        assert view.get_by_label("Most tokens").input_value() == "33"


@needs_chromium
def test_text_of_a_model_is_text_and_not_markup(browser, served):
    with opened(browser, served.url + "/" + link(view="chat", prompt="<img src=x onerror=alert(1)>", limit=4)) as page:
        page.get_by_role("button", name="Send").click()
        page.locator(".said-user").wait_for()
        assert page.locator("main img").count() == 0


@needs_chromium
def test_live_view_shows_the_metrics(browser, served):
    served.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 20})
    with opened(browser, served.url + "/" + link(view="live")) as page:
        page.locator("svg polyline").wait_for(state="attached")
        page.wait_for_function("document.querySelector('[data-live=slots]').textContent === '4'")
        assert float(page.locator("[data-live=rate]").text_content()) >= 1
        assert page.locator("[data-live=tree]").text_content().endswith("nodes")


@needs_chromium
def test_full_server_is_said_and_asked_again(browser, model, tokenizer):
    with running.serve(model, tokenizer, {"slots": 1, "queue": 1}) as served:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "ignore_eos": True}
        seen = threading.Event()

        def ask() -> None:  # again and again: the server stays full for as long as a browser takes to open the page
            while not seen.is_set():
                served.post("/v1/completions", body)
                seen.wait(0.05)

        others = [threading.Thread(target=ask) for _ in range(5)]
        for each in others:
            each.start()
        while not served.service.engine.load().waiting:
            pass
        try:
            with opened(browser, served.url + "/" + link(view="chat", prompt="Once", limit=5), expect="503") as page:
                page.get_by_role("button", name="Send").click()
                page.get_by_text("trying again in").wait_for()
                page.get_by_role("button", name="Stop").click()
                page.get_by_text("Stopped.").wait_for()
                seen.set()
                page.get_by_role("button", name="Regenerate").click()
                page.locator(".said-assistant .step").first.wait_for(state="attached", timeout=120_000)  # the others end first
        finally:
            seen.set()
            for each in others:
                each.join()


@needs_chromium
def test_server_that_is_gone_is_said_and_found_again(browser, model, tokenizer):
    with running.serve(model, tokenizer) as first:
        port = urlparse(first.url).port
        with opened(browser, first.url + "/" + link(view="chat", prompt="Once", limit=5), expect="ERR_|Failed to load") as page:
            page.get_by_role("button", name="Send").wait_for()
            first.server.should_exit = True
            page.locator("[data-how=dead], [data-how=draining]").wait_for()
            page.locator("[data-how=dead]").wait_for()
            with running.serve(model, tokenizer, port=port):
                page.locator(".banner").wait_for(state="detached")
                page.get_by_role("button", name="Send").click()
                page.locator(".said-assistant .step").first.wait_for(state="attached")


@needs_chromium
@pytest.mark.parametrize("view", ["race", "steps", "chat", "live"])
def test_every_view_fits_a_narrow_screen(browser, served, view):
    with opened(browser, served.url + "/" + link(view=view, prompt="a"), viewport={"width": 360, "height": 700}) as page:
        region = page.get_by_role("region", name=view.title(), exact=True)
        region.wait_for()
        if view != "live":
            region.locator("button.main").click()
            region.locator(".step").nth(2).wait_for(state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@needs_chromium
def test_key_is_asked_for(browser, model, tokenizer):
    with (
        running.serve(model, tokenizer, api_key=("secret",)) as served,
        opened(browser, served.url + "/" + link(view="chat", prompt="Once", limit=5), expect="401") as page,
    ):
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Enter").click()
        page.get_by_role("button", name="Send").click()
        page.locator(".said-assistant .step").first.wait_for(state="attached")


@needs_chromium
def test_recorded_run_is_one_file_that_shows_race_and_steps(browser, model, tokenizer, tmp_path):
    ids = tokenizer("Once </script> upon")["input_ids"]
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=16, eos_token_id=[257])[0, len(ids) :].tolist()
    runs = {"plain": [(i / 100, [token]) for i, token in enumerate(tokens)], "medusa": [(0.01, tokens[:1]), (0.05, tokens[1:])]}
    limits = {"max_new_tokens": 16, "eos_token_id": [257]}
    text = recorded_page(model, tokenizer, "tiny", "Once </script> upon", ids, runs, limits)
    (tmp_path / "run.html").write_text(text)
    with opened(browser, (tmp_path / "run.html").as_uri()) as page:
        page.locator("[data-same=yes]").wait_for()
        assert page.locator(".asked").text_content() == "Once </script> upon"
        page.get_by_role("button", name="Steps").click()
        page.locator("[data-chosen='0'] .tree .accepted").first.wait_for()
        record = json.loads(re.search('id="recorded">(.*)</script>', text)[1])
        assert [token for step in record["steps"]["steps"] for token in step["tokens"]] == tokens

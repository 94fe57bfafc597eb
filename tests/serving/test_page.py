"""The page in a real browser, in front of the real server."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shlex
import signal
import threading
import time
from urllib.parse import urlparse

import httpx
import pytest
import torch

running = pytest.importorskip("running", reason="the extra `serve` is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from browsing import barriers, link, needs_chromium, opened

from medusa.batch.rows import DecodingOptions
from medusa.cli.recorded_page import recorded_page
from medusa.serving.page import FILES, FOLDER, POLICY
from medusa.serving.requests import Request


def test_headers_let_the_page_load_from_its_server_only(served):
    for path in FILES:
        answer = served.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY and "http" not in POLICY


@needs_chromium
def test_first_paint_needs_less_than_100_kb(browser, served):
    with opened(browser, served.url + "/") as page:
        page.get_by_role("region", name="Race").wait_for()
        sizes = page.evaluate(
            "performance.getEntriesByType('resource').map(each => [new URL(each.name).pathname, each.transferSize])"
        )
        document = page.evaluate("performance.getEntriesByType('navigation')[0].transferSize")
        assert {path for path, size in sizes if size > 0} >= {path for path in FILES if path.endswith((".js", ".css"))}
        assert 10_000 < document + sum(size for _, size in sizes) < 100_000


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
        # At once, or the answer may end between finding the button and pressing it.
        page.evaluate("() => [...document.querySelectorAll('button.main')].find(b => b.textContent === 'Stop')?.click()")
        view.get_by_role("button", name="Send").wait_for()
        assert served.idle()
        view.get_by_label("Prompt", exact=True).fill("And then?")
        view.get_by_role("button", name="Send").and_(page.locator(":enabled")).wait_for()
        view.get_by_label("Prompt", exact=True).press("Control+Enter")
        page.locator(".said-assistant").nth(1).wait_for()
        assert page.locator(".said-user").all_text_contents() == ["userHello", "userAnd then?"]


@needs_chromium
def test_settings_of_the_form_reach_the_call(browser, served):
    with opened(browser, served.url + "/" + link(view="chat", prompt="Once")) as page:
        view = page.get_by_role("region", name="Chat")
        view.locator(".settings summary").click()
        for name, value in (
            ("Temperature", "0.9"),
            ("Seed", "7"),
            ("JSON schema", '{"enum": ["yes"]}'),
            ("System prompt", "Be brief."),
        ):
            view.get_by_label(name, exact=True).fill(value)
        view.get_by_role("combobox", name="Acceptance").select_option(value="typical")
        with page.expect_request("**/v1/chat/completions") as asked:
            view.get_by_role("button", name="Send").click()
        sent = asked.value.post_data_json
        assert (sent["temperature"], sent["seed"], sent["medusa"]["acceptance"]) == (0.9, 7, "typical")
        assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once"}]
        page.locator(".said-assistant small").wait_for()
        assert page.locator(".said-assistant .text").text_content() == '"yes"'


@needs_chromium
def test_copied_programs_make_the_call_of_the_page(browser, served):
    state = {"prompt": 'It\'s a "test" \\ of\nlines', "limit": 12, "temperature": 0.7, "seed": "3", "tree": "nodes", "nodes": 8}
    with opened(browser, served.url + "/" + link(view="chat", **state)) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Send").click()
        page.locator(".said-assistant small").wait_for()
        page.locator(".program summary").click()
        copied = {}
        for language in ("curl", "Python", "JavaScript"):
            page.get_by_role("button", name=language).click()
            page.get_by_role("button", name="Copy", exact=True).click()
            page.get_by_text("Copied.").wait_for()
            copied[language] = page.evaluate("navigator.clipboard.readText()")
        answer = page.locator(".said-assistant .text").text_content()
        page.get_by_role("button", name="Copy link").click()
        page.wait_for_function("navigator.clipboard.readText().then(text => text.startsWith('http') && !text.includes('v1'))")
        page.goto(page.evaluate("navigator.clipboard.readText()"))
        assert page.get_by_role("region", name="Chat").get_by_label("Prompt", exact=True).input_value() == state["prompt"]

    url, body = (shlex.split(copied["curl"])[place] for place in (1, -1))
    sent = json.loads(body)
    assert sent["medusa"] == {"tree": {"dynamic": {"num_nodes": 8, "depth": served.service.model.num_heads}}}
    said = httpx.post(url, json=sent, timeout=300).json()["choices"][0]["message"]["content"]
    assert said == answer
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(copied["Python"], {})
    assert printed.getvalue() == answer + "\n"
    with opened(browser, "about:blank") as page:  # the package `openai` is not here: what would be given to it
        code = copied["JavaScript"].replace('import OpenAI from "openai";', "")
        record = "class OpenAI { chat = {completions: {create: async body => (given = body, {choices: [{message: {}}]})}} }"
        page.set_content("")
        assert page.evaluate(f"async () => {{ let given; {record} {code} return given; }}") == sent


@needs_chromium
@pytest.mark.parametrize(("view", "button"), [("chat", "Send"), ("race", "Race")])
def test_tree_is_chosen_and_one_that_is_wrong_is_told(browser, served, view, button):
    with opened(browser, served.url + "/" + link(view=view, prompt="Once", limit=8), expect="400") as page:
        region = page.get_by_role("region", name=view.title(), exact=True)
        region.locator(".settings summary").click()
        region.get_by_role("combobox", name="Tree", exact=True).select_option(label="written as JSON")
        written = region.get_by_label("Tree as JSON")
        assert json.loads(written.input_value()) == served.service.model.tree.to_dict()
        for text, told in (("[[0]", "the tree is not JSON"), ('{"paths": [[0, 0]]}', "Failed: ")):
            written.fill(text)
            region.get_by_role("button", name=button, exact=True).click()
            region.locator(".said").get_by_text(told).wait_for()
        written.fill('{"paths": [[0]]}')
        with page.expect_request(lambda asked: '"paths"' in (asked.post_data or "")) as sent:
            region.get_by_role("button", name={"Send": "Regenerate"}.get(button, button), exact=True).click()
        assert sent.value.post_data_json["medusa"]["tree"] == {"paths": [[0]]}
        region.locator(".step").first.wait_for(state="attached")


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


@contextlib.contextmanager
def held_up(served):
    """A server of one slot whose step does not end, with a call that waits, until the yielded event is set."""
    enough = threading.Event()
    held = Request([1], DecodingOptions(max_new_tokens=2), ends=lambda token: enough.wait())
    served.service.engine.submit(held, lambda delivery: None)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 5, "ignore_eos": True}
    waiting = threading.Thread(target=served.post, args=("/v1/completions", body))
    waiting.start()
    try:
        while not served.service.engine.load().waiting:
            time.sleep(0.01)
        yield enough
    finally:
        enough.set()
        waiting.join()


@needs_chromium
@pytest.mark.parametrize(
    ("status", "engine", "settings"),
    [("503", {"slots": 1, "queue": 1}, {}), ("429", {"slots": 1}, {"max_per_client": 1})],
    ids=["full", "over the client's share"],
)
def test_refused_call_is_said_and_made_again(browser, model, tokenizer, status, engine, settings):
    with (
        running.serve(model, tokenizer, engine, **settings) as served,
        held_up(served) as enough,
        opened(browser, served.url + "/" + link(view="chat", prompt="Once", limit=5), expect=status) as page,
    ):
        page.get_by_role("button", name="Send").click()
        page.get_by_text("trying again in").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        page.get_by_role("button", name="Regenerate").click()
        page.get_by_text("trying again in").wait_for()
        enough.set()
        page.locator(".said-assistant .step").first.wait_for(state="attached")


@needs_chromium
def test_server_that_drains_and_is_gone_is_said_and_found_again(browser, model, tokenizer):
    with running.serve(model, tokenizer, {"slots": 1}) as first:
        port = urlparse(first.url).port
        expect = "ERR_|Failed to load"
        with opened(browser, first.url + "/" + link(view="chat", prompt="Once", limit=5), expect=expect) as page:
            page.get_by_role("button", name="Send").wait_for()
            with held_up(first):
                first.server.handle_exit(signal.SIGTERM, None)
                page.locator("[data-how=draining]").wait_for()
                page.get_by_role("button", name="Send").click()
                page.get_by_text("trying again in").wait_for()
                page.get_by_role("button", name="Stop").click()
            page.locator("[data-how=dead]").wait_for()
            with running.serve(model, tokenizer, port=port):
                page.locator(".banner").wait_for(state="detached")
                page.get_by_role("button", name="Regenerate").click()
                page.locator(".said-assistant .step").first.wait_for(state="attached")


@needs_chromium
def test_server_whose_engine_has_ended_is_said(browser, model, tokenizer):
    with running.serve(model, tokenizer) as served:
        served.service.engine.close(drain=False)
        with opened(browser, served.url + "/" + link(view="chat", prompt="Once"), expect="503") as page:
            page.locator("[data-how=failed]").wait_for()


@needs_chromium
def test_answer_of_a_server_that_dies_is_kept_and_told(browser, model, tokenizer):
    with running.serve(model, tokenizer) as served:
        state = link(view="chat", prompt="Once", limit=900, temperature=1, seed="1")
        with opened(browser, served.url + "/" + state, expect="ERR_|Failed to load") as page:
            page.get_by_role("button", name="Send").click()
            page.locator(".said-assistant .step").nth(2).wait_for(state="attached")
            served.server.should_exit = True
            page.get_by_text("Failed: ").or_(page.locator("[data-how=dead]")).first.wait_for()
            assert page.locator(".said-assistant .step").count() > 2


@needs_chromium
def test_key_is_asked_for(browser, model, tokenizer):
    with (
        running.serve(model, tokenizer, api_key=("secret",)) as served,
        opened(browser, served.url + "/" + link(view="chat", prompt="Once", limit=5), expect="401") as page,
    ):
        page.get_by_text("asks for an API key").wait_for()
        page.get_by_label("API key").fill("guess")
        page.get_by_role("button", name="Enter").click()
        page.get_by_text("does not know this API key").wait_for()
        assert not barriers(page)
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

"""Take the pictures of the page in docs/page/: `python docs/page.py http://127.0.0.1:8000`, where a chat model is served."""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).with_name("page")
PROMPT = "Explain in a few sentences why the sky is blue."
COLOURS = 32
READY = {"race": "button:text-is('Replay')", "steps": "[data-chosen] .tree", "chat": ".said-assistant small"}
LOAD = """async () => {
  const { data } = await (await fetch("v1/models")).json();
  const body = { model: data[0].id, prompt: "Once", max_tokens: 900, temperature: 1, ignore_eos: true };
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (let i = 0; i < 3; i++) fetch("v1/completions", options);
}"""


def show(page: Page, address: str, view: str) -> None:
    """Bring a view to where there is something to see."""
    state = json.dumps({"view": view, "prompt": PROMPT, "limit": 64})
    page.goto(address + "/#" + base64.b64encode(state.encode()).decode())
    region = page.get_by_role("region", name=view.title(), exact=True)
    region.wait_for()
    if view == "live":
        page.evaluate(LOAD)
        page.wait_for_timeout(20_000)
        return
    region.locator("button.main").click()
    region.locator("button.main:not(:text('Stop'))").wait_for()
    region.locator(READY[view]).first.wait_for()
    if view == "steps":
        for _ in range(2):
            region.get_by_role("group", name="Answer").press("ArrowRight")


def small(screenshot: bytes) -> Image.Image:
    """A picture in its commonest colours: all areas and lines keep theirs, only the edges of letters lose some."""
    pixels = np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB"))
    found, places, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    kept = found[counts.argsort()[::-1][:COLOURS]]
    nearest = np.square(found[:, None].astype(int) - kept).sum(-1).argmin(-1)
    picture = Image.fromarray(nearest[places].reshape(pixels.shape[:2]).astype(np.uint8), "P")
    picture.putpalette(kept.tobytes())
    return picture


def main(address: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for view in ("race", "steps", "chat", "live"):
            page = browser.new_page()
            page.set_default_timeout(300_000)
            show(page, address, view)
            for scheme in ("light", "dark"):
                for width in (360, 1440):
                    page.emulate_media(color_scheme=scheme)
                    page.set_viewport_size({"width": width, "height": 640})
                    page.wait_for_timeout(500)
                    small(page.screenshot(full_page=True)).save(FOLDER / f"{view}-{width}-{scheme}.png", optimize=True)
            page.close()


if __name__ == "__main__":
    main(sys.argv[1])

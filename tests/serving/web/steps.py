"""What a person does on the page, and what a test reads off it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Locator, Page, expect

WORDS = [
    "plain green toy",
    "red toy with blue stripes",
    "cyan toy with red stripes",
    "white toy with orange dots",
]
OpenPage = Callable[..., Page]


@contextmanager
def gateway_process(server: str, **settings: Any) -> Iterator[str]:
    """The gateway as users run it, and its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    code = (
        "from regionspot.serving.gateway import GatewaySettings, run\n"
        f"run(GatewaySettings({server!r}, **{settings!r}), port={port})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/healthz")
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def is_our_fault(message: Any) -> bool:
    """A browser also reports every answer that is an error, which some tests are after."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def choose(page: Page, picture: Path | dict[str, Any]) -> None:
    page.set_input_files("#file", picture)  # type: ignore[arg-type]
    page.locator("#stage").wait_for()


def on_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the picture lies."""
    page.locator("#stage").scroll_into_view_if_needed()
    stage = page.locator("#stage").bounding_box()
    assert stage is not None
    width, height = page.evaluate("[photo.naturalWidth, photo.naturalHeight]")
    return stage["x"] + x / width * stage["width"], stage["y"] + y / height * stage["height"]


def draw(page: Page, box: list[float]) -> None:
    for step, (x, y) in enumerate([(box[0], box[1]), (box[0] + 9, box[1] + 9), (box[2], box[3])]):
        page.mouse.move(*on_screen(page, x, y))
        if step == 0:
            page.mouse.down()
    page.mouse.up()


RECORDED = """
window.asked = [];
const ask = window.fetch;
window.fetch = (url, options) => {
  if (options.body) {
    const request = options.body.get("request");
    window.asked.push({...JSON.parse(request), image: options.body.has("image")});
    const forgotten = request.replace(/(image_handle":")[0-9a-f]+/, "$1" + "0".repeat(64));
    if (window.forgetful) options.body.set("request", forgotten);
  }
  return ask(url, options);
};
"""
"""What the page asks: a browser does not tell what is in a form with files. A forgetful window
knows no handle.
"""


def asked_by(page: Page) -> list[dict[str, Any]]:
    """Every question so far; their key `image` says whether a picture was sent along."""
    asked: list[dict[str, Any]] = page.evaluate("window.asked")
    return asked


def ask(page: Page, act: Callable[[], None] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask, by the button or as told; what was asked, and the answer."""
    with page.expect_response("**/v1/recognize") as caught:
        (act or page.locator("#ask").click)()
    answer = caught.value.json()
    expect(page.locator("#cancel")).to_be_hidden()
    return asked_by(page)[-1], answer


def regions(page: Page) -> Locator:
    return page.locator("#regions .region")


def percent(score: float) -> str:
    return "<1%" if 0 < score < 0.005 else f"{int(score * 100 + 0.5)}%"


def assert_shown(page: Page, answer: dict[str, Any]) -> None:
    """Every region's names and scores stand in the list, and its label on the picture."""
    expect(regions(page)).to_have_count(len(answer["regions"]))
    for index, found in enumerate(answer["regions"]):
        item, tag = regions(page).nth(index), page.locator("#labels .tag").nth(index)
        expect(item.locator(".pick .name")).to_have_text(found["class"])
        expect(item.locator(".pick .score")).to_have_text(percent(found["score"]))
        expect(item.locator(".bars li")).to_have_count(len(found["top"]) - 1)
        for row, (name, score) in enumerate(found["top"][1:]):
            assert item.locator(".bars li").nth(row).text_content() == name + percent(score)
        expect(tag.locator("b")).to_have_text(str(index + 1))
        expect(tag.locator("i")).to_have_text(percent(found["score"]))
        first, cut, last = (tag.locator("span").text_content() or "").partition("…")
        name = found["class"]
        assert name.startswith(first) and name.endswith(last) if cut else first == name


def add_boxes(page: Page, boxes: list[list[float]]) -> None:
    """Many at once, as if they had been drawn: dragging each would take minutes."""
    page.evaluate(
        """async (boxes) => {
          const {addRegion} = await import("/static/regions.js");
          for (const box of boxes) addRegion("box", box);
        }""",
        boxes,
    )

"""The page in a real browser, in front of a real gateway and a real server."""

from __future__ import annotations

import io
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from regionspot.serving.client import RegionClient
from regionspot.serving.gateway.app import WEB
from tests.serving.web.steps import (
    WORDS,
    OpenPage,
    ask,
    asked_by,
    assert_shown,
    choose,
    draw,
    gateway_process,
    on_screen,
    regions,
)

TOKEN = "correct-horse-battery-staple"


def test_draw_ask_and_read(
    open_page: OpenPage, server: Any, picture: Path, boxes: list[list[float]]
) -> None:
    page = open_page()
    choose(page, picture)
    for box in boxes:
        draw(page, box)
        page.keyboard.press("Escape")  # else the next one may begin at a corner that can be gripped
    page.fill("#words", ", ".join(WORDS))
    asked, answer = ask(page)
    # a pixel of the screen is about half of one here
    np.testing.assert_allclose(asked["boxes"], boxes, atol=1)
    assert asked["words"] == WORDS and asked["image"] and not asked["masks"]
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.recognize(picture, asked["boxes"], WORDS).to_json(picture.name)
    assert {key: answer[key] for key in expected} == expected
    assert_shown(page, answer)
    expect(page.locator("#status")).to_contain_text(re.compile(r"regions? in \d+ ms"))


def test_the_second_question_sends_no_picture(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [20, 20, 120, 120])
    page.fill("#words", "toy\nkitten")
    first, answer = ask(page)
    page.locator("#words").fill("toy, kitten, house,")
    second, again = ask(page)
    assert (first["image"], second["image"]) == (True, False)
    assert second["image_handle"] == answer["image_handle"] and second["words"] == [
        "toy",
        "kitten",
        "house",
    ]
    assert again["cached"]
    expect(page.locator("#status")).to_contain_text("encoders skipped")


def test_a_picture_that_the_server_forgot_is_sent_again(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [20, 20, 120, 120])
    page.fill("#words", "toy, kitten")
    ask(page)
    page.evaluate("window.forgetful = true")
    with page.expect_response(
        lambda response: response.url.endswith("/v1/recognize") and response.ok
    ):
        page.click("#ask")
    expect(page.locator("#status")).to_contain_text("1 region in")
    assert [one["image"] for one in asked_by(page)] == [True, False, True]
    expect(page.locator("#problem")).to_be_empty()


def test_points_by_click_and_a_registered_vocabulary(
    open_page: OpenPage, server: Any, picture: Path
) -> None:
    page = open_page()
    choose(page, picture)
    page.keyboard.press("p")
    for x, y in [(60, 70), (150, 120)]:
        page.mouse.click(*on_screen(page, x, y))
    page.keyboard.press("b")
    draw(page, [100, 30, 180, 90])
    page.select_option("#source", "mini")
    expect(page.locator("#words-field")).to_be_hidden()
    page.check("#want-masks", force=True)
    asked, answer = ask(page)
    np.testing.assert_allclose(asked["points"], [[60, 70], [150, 120]], atol=1)
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.recognize(
            picture, asked["boxes"], "mini", points=asked["points"], return_masks=True
        ).to_json("")
    assert answer["regions"] == expected["regions"]
    # the server answers boxes first; the page shows regions in the order in which they were made
    shown = [answer["regions"][index] for index in (1, 2, 0)]
    assert_shown(page, answer | {"regions": shown})


def test_keyboard_alone(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    # from here on: just before the key it may come too late
    page.on("filechooser", lambda chooser: None)
    keys = page.keyboard
    keys.press("Tab")
    expect(page.locator("#about-open")).to_be_focused()
    keys.press("Tab")
    expect(page.locator("#choose")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        keys.press("Enter")
    chooser.value.set_files(picture)
    page.locator("#stage").wait_for()
    keys.press("n")
    shape = page.locator(".shape")
    expect(shape).to_be_focused()
    before = shape.get_attribute("aria-label")
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowRight", "Shift+ArrowUp"):
        keys.press(key)
    assert shape.get_attribute("aria-label") != before
    keys.press("p")
    keys.press("n")
    expect(page.locator(".shape").nth(1)).to_be_focused()
    keys.press("Shift+Tab")
    expect(page.locator(".shape").nth(0)).to_be_focused()
    keys.press("Tab")
    keys.press("Tab")
    expect(page.get_by_role("radio", name="New region")).to_be_focused()
    keys.press("Tab")
    expect(page.locator("#source")).to_be_focused()
    keys.press("Tab")
    keys.type("toy, npb kitten")  # letters that are commands elsewhere
    asked, answer = ask(page, lambda: keys.press("Control+Enter"))
    assert (
        asked["words"] == ["toy", "npb kitten"] and len(asked["boxes"]) == len(asked["points"]) == 1
    )
    assert_shown(page, answer)
    picks = page.locator(".pick")
    picks.nth(0).focus()
    keys.press("ArrowDown")
    expect(picks.nth(1)).to_be_focused()
    expect(page.locator(".shape").nth(1)).to_have_class(re.compile("is-selected"))
    keys.press("Delete")
    expect(regions(page)).to_have_count(1)
    expect(picks.nth(0)).to_be_focused()
    page.locator(".shape").focus()
    ask(page, lambda: keys.press("Enter"))
    keys.press("Escape")
    expect(page.locator(".is-selected")).to_have_count(0)
    page.locator(".shape").focus()
    keys.press("Delete")
    expect(regions(page)).to_have_count(0)
    expect(page.locator("#add")).to_be_focused()


def test_a_drag_is_given_up_and_a_box_is_changed(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    page.mouse.move(*on_screen(page, 10, 10))
    page.mouse.down()
    page.mouse.move(*on_screen(page, 90, 90))
    page.keyboard.press("Escape")
    page.mouse.up()
    expect(regions(page)).to_have_count(0)
    draw(page, [90, 90, 20, 20])  # from the lower right
    assert_box(page.locator(".shape"), [20, 20, 90, 90])
    draw(page, [90, 90, 110, 130])  # by its corner
    assert_box(page.locator(".shape"), [20, 20, 110, 130])
    draw(page, [150, 150, 5000, 5000])  # beyond the picture's end
    width, height = page.evaluate("[photo.naturalWidth, photo.naturalHeight]")
    assert_box(page.locator(".shape").nth(1), [150, 150, width, height])


def assert_box(shape: Locator, box: list[float]) -> None:
    """Within the pixel that a pixel of the screen may be."""
    numbers = re.search(
        r"box from (\d+), (\d+) to (\d+), (\d+)", shape.get_attribute("aria-label") or ""
    )
    assert numbers is not None
    np.testing.assert_allclose([int(number) for number in numbers.groups()], box, atol=1)


def test_list_and_picture_point_at_each_other(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    draw(page, [120, 120, 200, 200])
    active = re.compile("is-active")
    regions(page).nth(0).hover()
    expect(page.locator(".shape").nth(0)).to_have_class(active)
    expect(page.locator(".tag").nth(0)).to_have_class(active)
    page.mouse.move(*on_screen(page, 150, 150))
    expect(regions(page).nth(1)).to_have_class(active)
    expect(regions(page).nth(0)).not_to_have_class(active)


def test_what_is_missing_is_said(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    problem = page.get_by_role("alert")
    page.click("#ask", force=True)  # it says that it is disabled, and why
    expect(problem).to_contain_text("Choose a picture")
    choose(page, picture)
    page.keyboard.press("Control+Enter")
    expect(problem).to_contain_text("Draw a box")
    draw(page, [10, 10, 60, 60])
    page.click("#ask", force=True)
    expect(problem).to_contain_text("Write a few words")
    expect(page.locator("#words")).to_be_focused()
    page.fill("#words", "toy, " + "x" * 300)
    _, answer = ask(page)
    assert answer["error"]["code"] == "VOCABULARY_INVALID"
    expect(problem).to_contain_text("longer than 256 characters")
    page.fill("#words", "toy, kitten, toy")  # twice is once
    ask(page)
    expect(problem).to_be_empty()


def test_pictures_that_cannot_be_used(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    page.set_input_files(
        "#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    )
    expect(page.get_by_role("alert")).to_contain_text("no picture")
    expect(page.locator("#empty")).to_be_visible()
    # a browser shows the upper half of it
    cut = picture.read_bytes()[: picture.stat().st_size // 2]
    choose(page, {"name": "cut.jpg", "mimeType": "image/jpeg", "buffer": cut})
    draw(page, [10, 10, 60, 60])
    page.fill("#words", "toy, kitten")
    _, answer = ask(page)
    assert answer["error"]["code"] == "IMAGE_INVALID"
    expect(page.get_by_role("alert")).to_contain_text("truncated")


def test_regions_are_called_as_the_page_calls_them(open_page: OpenPage, picture: Path) -> None:
    """The server counts from 0, boxes and clicks apart."""
    page = open_page()
    choose(page, picture)
    page.keyboard.press("p")
    page.mouse.click(*on_screen(page, 50, 50))
    page.keyboard.press("b")
    draw(page, [10, 10, 60, 60])
    page.fill("#words", "toy, kitten")
    message = "box 0 [1, 2, 3, 4] lies wholly outside the image"
    error = {"error": {"code": "REGION_INVALID", "message": message, "request_id": "a"}}
    page.route("**/v1/recognize", lambda route: route.fulfill(status=422, json=error))
    page.click("#ask")
    expect(page.get_by_role("alert")).to_have_text("Region 2 lies wholly outside the image.")


def test_without_a_model_server_and_without_the_gateway(open_page: OpenPage, picture: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with gateway_process(f"127.0.0.1:{nobody.getsockname()[1]}") as url:
            page = open_page(url, state="down")
            choose(page, picture)
            draw(page, [10, 10, 60, 60])
            page.fill("#words", "toy, kitten")
            page.click("#ask")
            expect(page.get_by_role("alert")).to_contain_text(
                "model server cannot be reached", timeout=20_000
            )
            expect(page.locator("#ask")).to_be_enabled()
    page.click("#ask")
    expect(page.get_by_role("alert")).to_contain_text("does not answer")


def test_token(open_page: OpenPage, server: Any, picture: Path) -> None:
    with gateway_process(server.ports.grpc_url, token=TOKEN) as url:
        page = open_page(url, state="waiting")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("wants a token")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("not the token")
        page.keyboard.press("Escape")
        expect(page.locator("#model")).to_contain_text("token is needed")
        choose(page, picture)
        draw(page, [10, 10, 60, 60])
        page.fill("#words", "toy, kitten")
        page.click("#ask")
        expect(dialog).to_be_visible()
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("1 region in")
        page.locator("#model[data-state=up]").wait_for()


def test_a_question_is_taken_back(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", "toy, kitten")
    page.route("**/v1/recognize", lambda route: None)  # never answered
    page.click("#ask")
    expect(page.locator("#ask")).to_be_disabled()
    page.click("#cancel")
    expect(page.locator("#ask")).to_be_enabled()
    expect(page.locator("#status")).to_have_text("Cancelled.")


def test_phone(open_page: OpenPage, picture: Path) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)

    def fits() -> bool:
        return bool(
            page.evaluate(
                "document.documentElement.scrollWidth <= innerWidth && innerWidth === 360"
            )
        )

    assert fits()
    choose(page, picture)
    page.locator(".segments label", has_text="Point").tap()
    for x, y in [(60, 60), (180, 160)]:
        page.touchscreen.tap(*on_screen(page, x, y))
    expect(regions(page)).to_have_count(2)
    page.fill("#words", ", ".join([*WORDS, "w" * 200]))
    page.locator(".switch").tap()
    asked, answer = ask(page, page.locator("#ask").tap)
    assert asked["masks"]
    assert_shown(page, answer)
    assert fits()
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert (
            box is not None
            and box["height"] >= 36
            and box["x"] >= 0
            and box["x"] + box["width"] <= 360
        )


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_both_see_pictures_upright(
    open_page: OpenPage, server: Any, picture: Path, file_format: str, orientation: int
) -> None:
    """A browser may not turn every format by its EXIF; the question is about what it shows all the
    same.
    """
    page = open_page()
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.open(picture).save(file, file_format, exif=exif)
    mime = f"image/{file_format.lower()}"
    choose(page, {"name": "turned", "mimeType": mime, "buffer": file.getvalue()})
    draw(page, [30, 30, 110, 100])
    page.fill("#words", ", ".join(WORDS))
    page.click("#ask")
    expect(page.locator("#status")).to_contain_text("1 region in")
    shown = page.evaluate("[photo.naturalWidth, photo.naturalHeight]")
    handle_asked, answer = ask(page)
    assert "image_handle" in handle_asked
    assert [answer["image"]["width"], answer["image"]["height"]] == shown


def test_other_formats_are_sent_as_png(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    file = io.BytesIO()
    Image.open(picture).save(file, "GIF")
    choose(page, {"name": "old.gif", "mimeType": "image/gif", "buffer": file.getvalue()})
    draw(page, [30, 30, 110, 100])
    page.fill("#words", ", ".join(WORDS))
    asked, answer = ask(page)
    assert asked["image"]
    assert_shown(page, answer)


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_drop_and_paste(open_page: OpenPage, picture: Path, how: str) -> None:
    page = open_page()
    page.evaluate(
        """([how, bytes]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "toys.jpg", {type: "image/jpeg"}));
          const options = {bubbles: true, cancelable: true};
          document.body.dispatchEvent(
            how === "drop" ? new DragEvent("drop", {...options, dataTransfer: transfer})
                           : new ClipboardEvent("paste", {...options, clipboardData: transfer}));
        }""",
        [how, list(picture.read_bytes())],
    )
    page.locator("#stage").wait_for()
    expect(page.locator("#photo")).to_have_attribute("alt", "Your picture, toys.jpg")


def test_sample(open_page: OpenPage) -> None:
    page = open_page()
    page.click("#sample")
    page.locator("#stage").wait_for()
    _, answer = ask(page, lambda: page.keyboard.press("Enter"))
    assert [found["class"] for found in answer["regions"]] == [
        "plain green toy",
        "red toy with blue stripes",
        "plain yellow toy",
    ]


def test_a_new_picture_begins_anew(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", "toy, kitten")
    ask(page)
    choose(page, picture)
    expect(regions(page)).to_have_count(0)
    draw(page, [10, 10, 60, 60])
    asked, _ = ask(page)
    assert asked["image"] and "image_handle" not in asked


CONTRAST = """
  const parse = (text) => text.match(/[\\d.]+/g).map(Number)
    .map((v, index) => text.startsWith("color(") && index < 3 ? v * 255 : v);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, index) => sum + v * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const ratio = (text, below) => {
    const [a, b] = [light(parse(getComputedStyle(text).color)), light(ground(below))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
"""
READABLE = f"""(selectors) => {{ {CONTRAST}
  return Object.fromEntries(selectors.map((selector) => {{
    const node = document.querySelector(selector);
    return [selector, ratio(node, node)];
  }}));
}}"""
ON_BARS = f"""(selectors) => {{ {CONTRAST}
  return Object.fromEntries(selectors.map((selector) => {{
    const bar = document.querySelector(selector);
    return [selector, ratio(bar.parentElement.parentElement.querySelector(".name"), bar)];
  }}));
}}"""
"""A name beside a bar is drawn over it."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(open_page: OpenPage, picture: Path, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    selectors = [
        ".brand",
        "#model-name",
        ".empty-title",
        ".empty .muted",
        "#choose",
        "#sample",
        "#words-note",
        "h2",
    ]
    ratios = page.evaluate(READABLE, selectors)
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    drawn = ["#hint", ".segments span", "input:checked + span", ".tag", ".number", ".name"]
    ratios |= page.evaluate(READABLE, [*drawn, "#words-note"])
    page.click("#ask", force=True)
    expect(page.locator("#problem")).not_to_be_empty()
    ratios |= page.evaluate(READABLE, ["#problem"])
    page.fill("#words", ",".join(WORDS))
    ask(page)
    # names stand on their bars
    named = [".pick .meter span", ".bars .meter span"]
    ratios |= page.evaluate(READABLE, ["#among", "#status", "#save-json", ".bars .name"])
    ratios |= page.evaluate(ON_BARS, named)
    page.fill("#words", "toy, kitten")
    expect(page.locator("#stale")).not_to_be_empty()
    ratios |= page.evaluate(READABLE, ["#stale", ".tag.is-stale"])
    assert min(ratios.values()) >= 4.5, ratios


def test_modules_are_fetched_at_once(address: str) -> None:
    """A module that is only named by another one costs one more way to the server and back."""
    page = httpx.get(address).text
    modules = {path.name for path in WEB.glob("*.js")} - {"app.js"}
    assert set(re.findall(r'rel="modulepreload" href="static/([\w.]+)"', page)) == modules
    for name in modules:
        assert (
            httpx.get(f"{address}/static/{name}")
            .headers["content-type"]
            .startswith("text/javascript")
        )


def test_everything_has_a_name(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    for control in page.locator("button:visible, select:visible, textarea:visible, .shape").all():
        expect(control).to_have_accessible_name(re.compile(r"\w"))
    for name in ("Box", "Point"):
        expect(page.get_by_role("radio", name=name)).to_have_count(1)
    expect(page.get_by_role("switch", name="Masks")).to_have_count(1)
    expect(page.get_by_role("button", name="Remove region 1")).to_have_count(1)

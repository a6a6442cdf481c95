"""Regions by several clicks, undo, zoom, masks, labels and crowds."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from regionspot.masks import decode_rle
from regionspot.serving.client import RegionClient
from tests.serving.web.steps import (
    WORDS,
    OpenPage,
    add_boxes,
    ask,
    asked_by,
    assert_shown,
    choose,
    draw,
    on_screen,
    regions,
)


def test_several_clicks_name_one_region(open_page: OpenPage, server: Any, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    page.keyboard.press("p")
    page.mouse.click(*on_screen(page, 60, 70))
    page.get_by_text("+ Include").click()
    page.mouse.click(*on_screen(page, 80, 70))
    page.get_by_text("− Exclude").click()
    page.mouse.click(*on_screen(page, 100, 90))
    expect(regions(page)).to_have_count(1)
    page.get_by_text("New region").click()
    page.mouse.click(*on_screen(page, 180, 150))
    page.keyboard.down("Alt")  # the same without the buttons
    page.mouse.click(*on_screen(page, 200, 170))
    page.keyboard.up("Alt")
    expect(regions(page)).to_have_count(2)
    page.fill("#words", ", ".join(WORDS))
    asked, answer = ask(page)
    # the region of two clicks repeats its last one: the API takes as many for each
    clicks = [[[60, 70], [80, 70], [100, 90]], [[180, 150], [200, 170], [200, 170]]]
    np.testing.assert_allclose(asked["points"], clicks, atol=1)
    assert asked["point_labels"] == [[1, 1, 0], [1, 0, 0]]
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.recognize(
            picture, None, WORDS, points=asked["points"], point_labels=asked["point_labels"]
        ).to_json("")
    assert answer["regions"] == expected["regions"]
    assert_shown(page, answer)


def test_clicks_by_keys(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    page.keyboard.press("p")
    page.keyboard.press("n")
    page.get_by_role("radio", name="Exclude").check(force=True)
    page.click("#add")
    shape = page.locator(".shape")
    expect(shape).to_be_focused()
    expect(shape).to_have_accessible_name(re.compile("2 points, point 2 at .*, excluded"))
    page.keyboard.press("Space")  # to the first one
    expect(shape).to_have_accessible_name(re.compile("2 points, point 1 at"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Delete")  # the point, and not yet the region
    expect(shape).to_have_accessible_name(re.compile("Region 1, point at"))
    page.keyboard.press("Delete")
    expect(regions(page)).to_have_count(0)


def test_undo_and_redo(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    expect(page.locator("#undo")).to_be_disabled()
    draw(page, [20, 20, 90, 90])
    page.fill("#words", ", ".join(WORDS))
    _, answer = ask(page)
    draw(page, [90, 90, 120, 130])  # by its corner
    expect(regions(page).locator(".pick .name")).to_have_text("Box, moved since it was asked")
    page.keyboard.press("Control+z")
    assert_shown(page, answer)  # where it was asked about, the answer holds again
    page.keyboard.press("Control+Shift+z")
    expect(regions(page).locator(".pick .name")).to_have_text("Box, moved since it was asked")
    page.click("#clear")
    expect(regions(page)).to_have_count(0)
    page.click("#undo")
    expect(regions(page)).to_have_count(1)
    page.locator(".shape").focus()
    before = page.locator(".shape").get_attribute("aria-label")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+z")  # keys that follow each other are one step
    expect(page.locator(".shape")).to_have_attribute("aria-label", before or "")
    page.locator("#words").focus()
    page.keyboard.press("Control+z")  # the text's own
    expect(regions(page)).to_have_count(1)


def test_a_drag_that_is_given_up_leaves_the_box(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [20, 20, 90, 90])
    before = page.locator(".shape").get_attribute("aria-label")
    page.mouse.move(*on_screen(page, 90, 90))
    page.mouse.down()
    page.mouse.move(*on_screen(page, 150, 150))
    page.keyboard.press("Escape")
    page.mouse.up()
    expect(page.locator(".shape")).to_have_attribute("aria-label", before or "")


def large_picture() -> dict[str, Any]:
    file = io.BytesIO()
    Image.effect_noise((4000, 3000), 40).convert("RGB").save(file, "JPEG", quality=60)
    return {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}


def test_small_things_are_drawn_in_a_zoomed_picture(open_page: OpenPage) -> None:
    page = open_page()
    choose(page, large_picture())
    fitted = page.locator("#stage").bounding_box()
    page.mouse.move(*on_screen(page, 3000, 2000))
    page.keyboard.down("Control")
    for _ in range(10):
        page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    expect(page.locator("#zoom-fit")).not_to_have_text("Fit")
    x, y = on_screen(page, 3000, 2000)  # what was under the pointer still is
    viewport = page.locator("#viewport").bounding_box()
    assert viewport is not None
    assert viewport["x"] < x < viewport["x"] + viewport["width"]
    assert viewport["y"] < y < viewport["y"] + viewport["height"]
    small = [2990.0, 1990.0, 3010.0, 2010.0]  # 4 pixels of the screen when it was fitted
    draw(page, small)
    page.mouse.wheel(0, 60)  # pans
    page.wait_for_timeout(50)
    assert on_screen(page, 3000, 2000)[1] == pytest.approx(y - 60, abs=2)
    page.keyboard.press("Escape")
    page.keyboard.press("0")
    assert page.locator("#stage").bounding_box() == fitted
    page.fill("#words", "toy, kitten")
    asked, _ = ask(page)
    np.testing.assert_allclose(asked["boxes"], [small], atol=0.6)


def test_two_fingers_zoom(open_page: OpenPage, picture: Path) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    choose(page, picture)
    before = page.locator("#stage").bounding_box()
    viewport = page.locator("#viewport").bounding_box()
    assert before is not None and viewport is not None
    x, y = viewport["x"] + viewport["width"] / 2, viewport["y"] + viewport["height"] / 2
    touch = page.context.new_cdp_session(page)

    def fingers(kind: str, *apart: float) -> None:
        points = [{"x": x + half, "y": y, "id": int(half > 0)} for half in apart]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", -20)
    fingers("touchStart", -20, 20)
    for half in (30, 40, 50, 60):
        fingers("touchMove", -half, half)
    fingers("touchEnd")
    after = page.locator("#stage").bounding_box()
    assert after is not None and after["width"] == pytest.approx(3 * before["width"], rel=0.05)
    expect(regions(page)).to_have_count(0)


COVERED = """async ([mask, size]) => {
  const {outlineOf} = await import("/static/masks.js");
  const canvas = Object.assign(document.createElement("canvas"), size);
  const paint = canvas.getContext("2d");
  paint.fill(outlineOf(mask).path, "evenodd");
  const {data} = paint.getImageData(0, 0, size.width, size.height);
  return Array.from({length: size.width * size.height}, (_, at) => data[at * 4 + 3] >= 128);
}"""


def test_outlines_follow_masks(
    open_page: OpenPage, picture: Path, boxes: list[list[float]]
) -> None:
    page = open_page()
    choose(page, picture)
    for box in boxes:
        draw(page, box)
        page.keyboard.press("Escape")
    page.fill("#words", ",".join(WORDS))
    page.check("#want-masks", force=True)
    _, answer = ask(page)
    size = {key: answer["image"][key] for key in ("width", "height")}
    for found in answer["regions"]:
        mask = decode_rle(found["mask"])
        covered = np.array(page.evaluate(COVERED, [found["mask"], size])).reshape(mask.shape)
        np.testing.assert_array_equal(covered, mask)


SEEN = """([x, y, around]) => {
  const all = [masks, document.getElementById("active-mask")].map((canvas) => {
    const bounds = canvas.getBoundingClientRect();
    const factor = canvas.width / bounds.width;
    const left = (x - bounds.left - around) * factor;
    const top = (y - bounds.top - around) * factor;
    const side = Math.max(2 * around * factor, 1);
    if (canvas.width === 1) return [0, 0, 0, 0];
    return [...canvas.getContext("2d").getImageData(left, top, side, side).data];
  }).flat();
  return Array.from({length: all.length / 4}, (_, at) => all.slice(at * 4, at * 4 + 4));
}"""


def test_masks_are_lines_that_leave_the_picture_as_it_is(open_page: OpenPage) -> None:
    page = open_page()
    page.click("#sample")
    page.locator("#stage").wait_for()
    page.check("#want-masks", force=True)
    _, answer = ask(page)
    page.mouse.move(5, 5)
    mask = decode_rle(answer["regions"][0]["mask"])  # a disc around 92, 92
    row = np.flatnonzero(mask[92])
    middle, edge = [on_screen(page, x, 92.5) for x in (92, row[0])]
    expect(page.locator("#status")).to_contain_text("3 regions")
    page.wait_for_timeout(100)
    inside = page.evaluate(SEEN, [*middle, 3])
    assert all(alpha == 0 for *_, alpha in inside)  # nothing lies over what is asked about
    line = page.evaluate(SEEN, [*edge, 5])
    light = [max(rgb) for *rgb, alpha in line if alpha > 250]
    dark = [max(rgb) for *rgb, alpha in line if 120 < alpha <= 250]
    assert max(light) > 200 and min(dark) < 60  # one of them shows on any ground
    page.mouse.move(*middle)
    expect(page.locator(".shape").nth(0)).to_have_class(re.compile("is-active"))
    page.wait_for_timeout(50)
    filled = [alpha for *_, alpha in page.evaluate(SEEN, [*middle, 3]) if alpha]
    assert filled and max(filled) < 60  # faint, and only while it is pointed at
    page.mouse.move(5, 5)
    page.wait_for_timeout(100)
    assert all(alpha == 0 for *_, alpha in page.evaluate(SEEN, [*middle, 3]))


LONG = [
    "a large and rather old wooden toy that somebody once painted by hand with a border in yellow",
    "a large and rather old wooden toy that somebody once painted by hand with a border in purple",
]


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_labels_keep_the_words_that_tell_names_apart(
    open_page: OpenPage, picture: Path, boxes: list[list[float]], width: int
) -> None:
    page = open_page(viewport={"width": width, "height": 900})
    choose(page, picture)
    for box in boxes[:2]:
        draw(page, box)
        page.keyboard.press("Escape")
    for words in (WORDS, LONG):
        page.fill("#words", ", ".join(words))
        _, answer = ask(page)
        for index, found in enumerate(answer["regions"]):
            name = page.locator(".tag").nth(index).locator("span")
            first, last = found["class"].split()[0], found["class"].split()[-1]
            shown = name.text_content() or ""
            assert shown.startswith(first) and shown.endswith(last)
            assert words is LONG or shown == found["class"]
            assert name.evaluate("(node) => node.scrollHeight <= node.clientHeight + 1")
            assert name.evaluate("(node) => node.scrollWidth <= node.clientWidth + 1")
            tag = page.locator(".tag").nth(index).bounding_box()
            viewport = page.locator("#viewport").bounding_box()
            assert tag is not None and viewport is not None
            assert tag["x"] >= viewport["x"] - 1
            assert tag["x"] + tag["width"] <= viewport["x"] + viewport["width"] + 1


def test_handles_at_the_edges_are_whole(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [0, 0, 5000, 5000])
    viewport = page.locator("#viewport").bounding_box()
    assert viewport is not None
    for corner in page.locator("#handles rect").all():
        box = corner.bounding_box()
        assert box is not None and box["x"] >= viewport["x"] and box["y"] >= viewport["y"]
        assert box["x"] + box["width"] <= viewport["x"] + viewport["width"]
        assert box["y"] + box["height"] <= viewport["y"] + viewport["height"]
    handle = page.locator("#handles rect").first.bounding_box()
    assert handle is not None
    page.mouse.move(handle["x"] + 1, handle["y"] + 1)  # outside of the picture
    page.mouse.down()
    page.mouse.move(handle["x"] + 101, handle["y"] + 101)
    page.mouse.up()
    expect(regions(page)).to_have_count(1)
    expect(page.locator(".shape")).not_to_have_accessible_name(re.compile("from 0, 0 to"))


def grid(count: int) -> list[list[float]]:
    """Boxes that cover a picture of mini's, 20 in a row."""
    places = [divmod(index, 20) for index in range(count)]
    return [[10.0 * x + 2, 10.0 * y + 2, 10.0 * x + 22, 10.0 * y + 22] for y, x in places]


def test_a_crowd_has_numbers_for_labels(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    add_boxes(page, grid(14))
    page.fill("#words", ", ".join(WORDS))
    ask(page)
    expect(page.locator(".tag span")).to_have_count(14)
    add_boxes(page, grid(15)[14:])
    _, answer = ask(page)
    page.keyboard.press("Escape")
    expect(page.locator(".tag span")).to_have_count(0)
    expect(page.locator(".tag").nth(14)).to_have_text("15")
    regions(page).nth(3).hover()
    expect(page.locator(".tag span")).to_have_text(answer["regions"][3]["class"])
    expect(page.locator(".bars li")).to_have_count(0)
    page.locator(".pick").nth(3).click()
    expect(page.locator(".bars li")).to_have_count(len(WORDS) - 1)


CHANGES = """() => {
  window.touched = new Set();
  window.changes = 0;
  const name = (node) => node.closest?.("[data-region], .tag, .shape")?.dataset?.region;
  new MutationObserver((records) => {
    window.changes += records.length;
    for (const {target} of records) {
      const region = name(target.nodeType === 1 ? target : target.parentElement);
      if (region) window.touched.add(region);
    }
  }).observe(document.body, {
    subtree: true, childList: true, attributes: true, characterData: true,
  });
}"""


def test_300_regions_with_masks_stay_fluid(open_page: OpenPage, picture: Path) -> None:
    """A move of the pointer redraws the region it is about, and what masks take is bounded by the
    screen.
    """
    page = open_page()
    page.set_default_timeout(120_000)
    choose(page, picture)
    add_boxes(page, grid(300))
    page.fill("#words", ", ".join(WORDS))
    page.check("#want-masks", force=True)
    _, answer = ask(page)
    assert len(answer["regions"]) == 300
    page.keyboard.press("Escape")
    page.mouse.click(*on_screen(page, 12, 7))
    expect(page.locator(".region.is-selected")).to_have_count(1)
    corner = page.locator("#handles rect").first.bounding_box()
    assert corner is not None
    x, y = corner["x"] + 5, corner["y"] + 5
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 5, y - 5)
    page.wait_for_timeout(200)
    page.evaluate(CHANGES)
    for step in range(20):
        page.mouse.move(x - 5 - step / 4, y - 5)
    page.wait_for_timeout(200)
    touched, changes = page.evaluate("[[...window.touched], window.changes]")
    page.mouse.up()
    assert len(touched) == 1, "a drag touches the region that is dragged"
    assert 0 < changes <= 20 * 60
    viewport = page.locator("#viewport").bounding_box()
    assert viewport is not None
    pixels = page.evaluate(
        "[...document.querySelectorAll('canvas')].map((c) => c.width * c.height)"
    )
    assert sum(pixels) <= 2 * viewport["width"] * viewport["height"] + 4
    assert len(asked_by(page)) == 1


def scrollers(page: Page) -> list[str]:
    """What scrolls up and down, the page included."""
    found: list[str] = page.evaluate(
        """() => [document.documentElement, ...document.body.querySelectorAll("*")]
          .filter((node) => node.scrollHeight > node.clientHeight + 1)
          .filter((node) => node === document.documentElement
            ? getComputedStyle(document.body).overflowY !== "hidden"
            : /auto|scroll/.test(getComputedStyle(node).overflowY))
          .map((node) => node.className || node.id || node.tagName)"""
    )
    return found


def test_on_a_desktop_the_stage_takes_the_height_and_one_thing_scrolls(
    open_page: OpenPage, picture: Path
) -> None:
    page = open_page(viewport={"width": 1440, "height": 900})
    choose(page, picture)
    add_boxes(page, grid(12))
    page.fill("#words", ", ".join(WORDS))
    ask(page)
    assert scrollers(page) == ["panel"]
    stage = page.locator("#stage").bounding_box()
    assert stage is not None and stage["height"] > 650 and stage["y"] + stage["height"] > 800

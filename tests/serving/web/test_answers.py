"""What stands on the page holds for what is asked: no answer on another box or other words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.serving.web.steps import (
    WORDS,
    OpenPage,
    ask,
    assert_shown,
    choose,
    draw,
    gateway_process,
    percent,
    regions,
)

TOKEN = "correct-horse-battery-staple"


def hold_the_answer(page: Page) -> Callable[[], None]:
    """Asks, and returns a function that lets the question through to the gateway."""
    held: list[Route] = []
    page.route("**/v1/recognize", lambda route: held.append(route))
    page.click("#ask")
    expect(page.locator("#cancel")).to_be_visible()
    while not held:
        page.wait_for_timeout(20)

    def let_go() -> None:
        held[0].continue_()
        expect(page.locator("#cancel")).to_be_hidden()
        page.unroute("**/v1/recognize")

    return let_go


def test_an_answer_is_not_put_on_a_box_that_moved(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.keyboard.press("Escape")
    draw(page, [120, 120, 200, 200])
    page.fill("#words", ", ".join(WORDS))
    let_go = hold_the_answer(page)
    page.locator(".shape").nth(1).focus()
    page.keyboard.press("ArrowRight")
    let_go()
    expect(regions(page).nth(1).locator(".name")).to_have_text("Box, moved since it was asked")
    expect(page.locator(".tag").nth(1)).to_have_text("2")
    expect(regions(page).nth(0).locator(".pick .score")).to_have_text(re.compile(r"^(<1|\d+)%$"))
    expect(page.locator("#stale")).to_contain_text("1 region was moved since")
    _, answer = ask(page)
    assert_shown(page, answer)
    expect(page.locator("#stale")).to_be_empty()


def test_an_answer_with_other_words_is_marked(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", ", ".join(WORDS))
    let_go = hold_the_answer(page)
    page.fill("#words", "toy, kitten")
    let_go()  # it answers the words of before
    stale = page.locator("#stale")
    expect(stale).to_contain_text("words changed")
    expect(page.locator(".tag.is-stale")).to_have_count(1)
    expect(page.locator(".region.is-stale")).to_have_count(1)
    expect(page.locator(".pick")).to_have_accessible_name(re.compile("asked with other words"))
    page.fill("#words", "\n".join(reversed(WORDS)))  # the same ones
    expect(stale).to_be_empty()
    expect(page.locator(".is-stale")).to_have_count(0)
    page.select_option("#source", "pets")
    expect(stale).to_contain_text("words changed")
    draw(page, [120, 120, 200, 200])
    expect(stale).to_contain_text("1 region is new")
    ask(page)
    expect(stale).to_be_empty()


def test_an_answer_about_the_picture_of_before_is_dropped(
    open_page: OpenPage, picture: Path
) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", ", ".join(WORDS))
    page.route("**/v1/recognize", lambda route: None)
    page.click("#ask")
    choose(page, picture)
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#status")).to_be_empty()
    page.unroute("**/v1/recognize")
    draw(page, [10, 10, 60, 60])
    expect(regions(page).locator(".name")).to_have_text("Box, not asked yet")
    asked, answer = ask(page)
    assert asked["image"]
    assert_shown(page, answer)


def test_what_percentages_are_of_and_a_threshold(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", ", ".join(WORDS))
    _, answer = ask(page)
    expect(page.locator("#among")).to_contain_text("of these 4 words")
    row = page.locator(".bars li").first
    name, bar = row.locator(".name").bounding_box(), row.locator(".meter").bounding_box()
    assert name is not None and bar is not None  # one row
    assert bar["y"] <= name["y"] and name["y"] + name["height"] <= bar["y"] + bar["height"] + 1
    page.locator("#threshold").fill("95")
    score = answer["regions"][0]["score"]
    page.keyboard.press("Escape")
    expect(page.locator(".region.is-unsure")).to_have_count(int(score < 0.95))
    page.locator("#threshold").fill("0")
    expect(page.locator(".region.is-unsure")).to_have_count(0)
    page.select_option("#source", "pets")
    ask(page)
    expect(page.locator("#among")).to_contain_text("of the 2 words of pets")


def test_the_steps_say_what_comes_next(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    steps = page.locator("#steps li")

    def is_at(step: int) -> None:
        expect(page.locator("#steps [aria-current]")).to_have_count(1)
        expect(steps.nth(step)).to_have_attribute("aria-current", "step")

    is_at(0)
    expect(page.locator("#words")).to_be_disabled()
    expect(page.locator("#ask")).to_be_disabled()
    expect(page.locator("#current")).to_have_text("Choose a picture first.")
    choose(page, picture)
    is_at(1)
    expect(page.locator("#words")).to_be_enabled()
    expect(page.locator("#ask")).to_be_disabled()
    expect(page.locator("#add")).to_have_text(re.compile("Add box"))
    page.keyboard.press("p")
    expect(page.locator("#add")).to_have_text(re.compile("Add point"))
    page.keyboard.press("n")
    is_at(2)
    page.fill("#words", "toy, kitten")
    expect(page.locator("#steps [aria-current]")).to_have_count(0)
    expect(page.locator("#ask")).to_be_enabled()


def test_operators_find_the_runtime_in_a_corner(open_page: OpenPage) -> None:
    page = open_page()
    info = httpx.get(f"{page.url}v1/info").json()
    expect(page.locator("header")).not_to_contain_text(info["runtime"])
    page.click("#about-open")
    about = page.get_by_role("dialog")
    for fact in (info["model"], info["runtime"], info["precision"], "50 million pixels"):
        expect(about).to_contain_text(fact)
    page.keyboard.press("Escape")
    expect(about).to_be_hidden()


def test_the_words_of_a_vocabulary_are_listed_where_the_server_tells_them(
    open_page: OpenPage, picture: Path
) -> None:
    page = open_page()
    choose(page, picture)
    page.select_option("#source", "pets")
    expect(page.locator("#source option:checked")).to_have_text("pets (2 words)")
    expect(page.locator("#listed")).to_be_hidden()  # counts alone

    def with_words(route: Route) -> None:
        info = route.fetch().json()
        info["vocabularies"] = [{"name": "pets", "words": ["cat", "dog"]}]
        route.fulfill(json=info)

    page.route("**/v1/info", with_words)
    page.reload()
    page.locator("#model[data-state=up]").wait_for()
    choose(page, picture)
    page.select_option("#source", "pets")
    expect(page.locator("#source option:checked")).to_have_text("pets (2 words)")
    page.click("#listed summary")
    expect(page.locator("#listed-words li")).to_have_text(["cat", "dog"])


def test_a_wait_is_explained_after_a_second(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", ", ".join(WORDS))
    let_go = hold_the_answer(page)
    expect(page.locator("#status")).to_contain_text("learning 4 new words")
    expect(page.locator("#elapsed")).to_have_text(re.compile(r"^\d+ s$"))
    let_go()
    expect(page.locator("#elapsed")).to_be_empty()
    page.fill("#words", ", ".join([*WORDS, "kitten"]))
    let_go = hold_the_answer(page)
    expect(page.locator("#status")).to_contain_text("learning 1 new word.")
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    page.fill("#words", ", ".join(WORDS))
    let_go = hold_the_answer(page)
    expect(page.locator("#status")).to_contain_text("still working")
    let_go()


def test_results_are_taken_along(open_page: OpenPage, picture: Path, tmp_path: Path) -> None:
    page = open_page()
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", ", ".join(WORDS))
    page.check("#want-masks", force=True)
    expect(page.locator("#save-json")).to_be_disabled()
    _, answer = ask(page)
    with page.expect_download() as caught:
        page.click("#save-json")
    assert caught.value.suggested_filename == f"{picture.stem}.regions.json"
    caught.value.save_as(tmp_path / "regions.json")
    assert json.loads((tmp_path / "regions.json").read_text()) == answer
    with page.expect_download() as caught:
        page.click("#save-png")
    caught.value.save_as(tmp_path / "regions.png")
    with Image.open(tmp_path / "regions.png") as overlay, Image.open(picture) as photo:
        assert overlay.size == photo.size
        drawn, plain = [np.asarray(image.convert("RGB"), np.int32) for image in (overlay, photo)]
    changed = np.abs(drawn - plain).max(-1) > 2
    assert changed[40, 10]  # the box's edge
    assert not changed[150:, 150:].any()


NASTY = ["a 'quoted' toy of type=text/plain", 'a "doubled" toy \\ $HOME `id`', "a größer toy"]


@pytest.mark.parametrize("token", [None, TOKEN])
def test_the_question_as_curl_and_as_python(
    open_page: OpenPage, server: Any, picture: Path, tmp_path: Path, token: str | None
) -> None:
    """Both are run as they are copied, and answer what the page was answered."""
    name = 'it\'s "my" $toy.jpg'
    (tmp_path / name).write_bytes(picture.read_bytes())
    with gateway_process(server.ports.grpc_url, token=token) as url:
        state = "waiting" if token else "up"
        page = open_page(url, state, permissions=["clipboard-read", "clipboard-write"])
        if token:
            page.fill("#token", token)
            page.keyboard.press("Enter")
            page.locator("#model[data-state=up]").wait_for()
        choose(page, tmp_path / name)
        draw(page, [10, 10, 60, 60])
        page.keyboard.press("Escape")
        page.keyboard.press("p")
        page.keyboard.press("n")
        page.fill("#words", "\n".join(NASTY))
        _, answer = ask(page)
        expected = [(found["class"], pytest.approx(found["score"])) for found in answer["regions"]]
        environment = {
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C.UTF-8",
            "REGIONSPOT_TOKEN": token or "",
        }

        def run_copy(button: str, command: list[str]) -> str:
            page.click(button)
            expect(page.locator("#status")).to_contain_text("Copied")
            text = page.evaluate("navigator.clipboard.readText()")
            assert token is None or token not in text
            run = partial(subprocess.run, cwd=tmp_path, env=environment, timeout=60)
            return run([*command, text], stdout=subprocess.PIPE, text=True, check=True).stdout

        told = json.loads(run_copy("#copy-curl", ["bash", "-c"]))
        assert [(found["class"], found["score"]) for found in told["regions"]] == expected
        lines = run_copy("#copy-python", [sys.executable, "-c"]).splitlines()
        printed = [line.rpartition(" ") for line in lines]
        assert [(name, float(score)) for name, _, score in printed] == expected


def test_code_is_shown_where_it_cannot_be_copied(open_page: OpenPage, picture: Path) -> None:
    page = open_page()
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(Error()); }")
    choose(page, picture)
    draw(page, [10, 10, 60, 60])
    page.fill("#words", "toy, kitten")
    page.click("#copy-curl")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("As curl")
    assert page.locator("#code").input_value().startswith("curl --fail-with-body")


def test_on_a_phone_the_answer_is_in_reach(open_page: OpenPage, picture: Path) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    choose(page, picture)
    page.locator(".segments label", has_text="Point").tap()
    viewport = page.locator("#viewport").bounding_box()
    assert viewport is not None
    page.touchscreen.tap(
        viewport["x"] + viewport["width"] / 2, viewport["y"] + viewport["height"] / 2
    )
    page.fill("#words", ", ".join(WORDS))
    for place in ("0", "document.body.scrollHeight"):
        page.evaluate(f"window.scrollTo(0, {place})")
        for part in ("#ask", "#current"):
            box = page.locator(part).bounding_box()
            assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= 844
    page.evaluate("window.scrollTo(0, 0)")
    _, answer = ask(page, page.locator("#ask").tap)
    found = answer["regions"][0]
    expect(page.locator("#current .name")).to_have_text(found["class"])
    expect(page.locator("#current .score")).to_have_text(percent(found["score"]))
    page.locator("#current").tap()
    expect(regions(page)).to_be_in_viewport(ratio=1)
    item, dock = regions(page).bounding_box(), page.locator(".dock").bounding_box()
    assert item is not None and dock is not None and item["y"] + item["height"] <= dock["y"]

"""A browser, a gateway for it, and windows whose mistakes fail the test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serving.web.steps import RECORDED, OpenPage, gateway_process, is_our_fault

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
WAIT_MS = 60_000
"""A machine that is busy with other tests may take that long for what is a moment elsewhere."""

expect.set_options(timeout=WAIT_MS / 2)


@pytest.fixture(scope="module")
def address(server: Any) -> Iterator[str]:
    with gateway_process(server.ports.grpc_url) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[OpenPage]:
    """A function that opens the page in a window of its own. Scripts that fail and broken policies
    fail the test.
    """
    contexts, wrong = [], []

    def open_it(url: str = address, state: str = "up", **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce"} | options
        )
        contexts.append(context)
        context.add_init_script(RECORDED)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console", lambda message: wrong.append(message.text) if is_our_fault(message) else None
        )
        page.goto(url)
        page.locator(f"#model[data-state={state}]").wait_for()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not wrong

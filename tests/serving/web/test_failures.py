"""A proxy between the page and the gateway that answers in its place, or breaks off."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.serving.web.steps import WORDS, OpenPage, ask, assert_shown, choose, draw

HTML = b"<html><body><h1>An error of a proxy</h1></body></html>"


class Proxy:
    """A reverse proxy on loopback. Questions go through, or are answered by `instead`."""

    def __init__(self, upstream: str) -> None:
        self.instead: Any = None
        self.stopped = threading.Event()
        self.client = httpx.Client(base_url=upstream, timeout=60)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.pass_on(proxy.client.get(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if proxy.instead is not None:
                    proxy.instead(self)
                    return
                headers = {"Content-Type": self.headers["Content-Type"]}
                self.pass_on(proxy.client.post(self.path, content=body, headers=headers))

            def pass_on(self, response: httpx.Response) -> None:
                kept = ("content-type", "content-security-policy", "retry-after")
                headers = {
                    name: response.headers[name] for name in kept if name in response.headers
                }
                self.answer(response.status_code, response.content, headers)

            def answer(
                self, status: int, body: bytes, headers: dict[str, str], length: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def says(self, status: int, headers: dict[str, str] | None = None, body: bytes = HTML) -> None:
        told = {"Content-Type": "text/html"} | (headers or {})
        self.instead = lambda handler: handler.answer(status, body, told)

    def breaks_off(self, after: bytes) -> None:
        def answer(handler: Any) -> None:
            handler.answer(200, after, {"Content-Type": "application/json"}, length=10_000)
            handler.close_connection = True

        self.instead = answer

    def stalls(self) -> None:
        def answer(handler: Any) -> None:
            handler.answer(200, b'{"image": {', {"Content-Type": "application/json"}, length=10_000)
            self.stopped.wait(30)
            handler.close_connection = True

        self.instead = answer


@pytest.fixture
def proxy(address: str) -> Iterator[Proxy]:
    made = Proxy(address)
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.stopped.set()
    made.server.shutdown()
    made.server.server_close()
    made.client.close()
    thread.join(10)


@pytest.fixture
def page(open_page: OpenPage, proxy: Proxy, picture: Path) -> Page:
    """Ready to ask."""
    opened = open_page(proxy.url)
    choose(opened, picture)
    draw(opened, [10, 10, 60, 60])
    opened.fill("#words", ", ".join(WORDS))
    return opened


def problem_after_asking(page: Page) -> str:
    page.click("#ask")
    expect(page.locator("#problem")).not_to_be_empty()
    expect(page.locator("#cancel")).to_be_hidden()
    text = page.locator("#problem").text_content() or ""
    assert "Reload" not in text and "<" not in text
    return text


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (502, {}, "server behind it is not there (status 502)"),
        (504, {"Retry-After": "7"}, "Ask again in 7 seconds"),
        (413, {}, "refuses a request of this size"),
        (429, {"Retry-After": "1"}, "Too many requests at the moment. Ask again in a second."),
        (429, {}, "Too many requests at the moment. Ask again in 5 seconds."),
        (403, {}, "answered in its place (status 403)"),
        (500, {}, "answered in its place (status 500)"),
        (200, {}, "broke off on its way"),
    ],
)
def test_a_proxy_that_answers_in_the_gateways_place(
    page: Page, proxy: Proxy, status: int, headers: dict[str, str], said: str
) -> None:
    proxy.says(status, headers)
    assert said in problem_after_asking(page)
    proxy.instead = None
    _, answer = ask(page)
    assert_shown(page, answer)
    expect(page.locator("#problem")).to_be_empty()


def test_a_date_to_come_back_at(page: Page, proxy: Proxy) -> None:
    proxy.says(429, {"Retry-After": formatdate(time.time() + 30, usegmt=True)})
    text = problem_after_asking(page)
    seconds = int(text.split("again in ")[1].split()[0])
    assert 20 <= seconds <= 31


def test_a_code_that_the_page_does_not_know(page: Page, proxy: Proxy) -> None:
    body = b'{"error": {"code": "QUOTA", "message": "the words of this hour are used up"}}'
    proxy.says(429, {"Retry-After": "60", "Content-Type": "application/json"}, body)
    assert (
        problem_after_asking(page) == "The words of this hour are used up. Ask again in 60 seconds."
    )


@pytest.mark.parametrize("part", [b"", b'{"image": {"width": 3', b'{"image": null}'])
def test_an_answer_that_breaks_off(page: Page, proxy: Proxy, part: bytes) -> None:
    proxy.breaks_off(part)
    assert "broke off on its way" in problem_after_asking(page)


@pytest.mark.parametrize(
    "body", [b'{"image": {"width": 3', b"[]", b"null", b"{}", b'{"image": {}, "regions": []}']
)
def test_an_answer_that_is_not_whole(page: Page, proxy: Proxy, body: bytes) -> None:
    proxy.says(200, {"Content-Type": "application/json"}, body)
    assert "broke off on its way" in problem_after_asking(page)


def test_a_question_is_taken_back_while_its_answer_is_read(page: Page, proxy: Proxy) -> None:
    proxy.stalls()
    page.click("#ask")
    page.wait_for_timeout(300)
    page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#problem")).to_be_empty()

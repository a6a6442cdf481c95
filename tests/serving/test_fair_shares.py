"""What one caller asks costs the others no more than its share: requests that take long, and others
beside them, on the real server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from regionspot.serving.client import RegionClient
from regionspot.serving.contract import ServingError
from regionspot.serving.records import ServerRecord
from tests.serving.images import scan_bomb

OTHERS = 3
"""Requests that others have answered while a long one is at work."""

BOX = [[5.0, 5.0, 90.0, 90.0]]


class Beside:
    """Runs a request in a thread of its own. `error` is what it ended with."""

    def __init__(self, ask: Callable[[RegionClient], object], url: str) -> None:
        self.error: ServingError | None = None
        self._ask, self._url = ask, url
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with RegionClient(self._url, timeout_s=300) as client:
            try:
                self._ask(client)
            except ServingError as error:
                self.error = error

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    @property
    def at_work(self) -> bool:
        return self._thread.is_alive()


@pytest.fixture
def others(server: ServerRecord, picture: Path) -> Iterator[Callable[[], int]]:
    """Asks as others would, and counts those that were answered."""
    with RegionClient(server.ports.grpc_url) as client:
        image = client.encode(picture)
        answered = 0

        def ask() -> int:
            nonlocal answered
            assert len(client.recognize(image, BOX, "pets")) == 1
            answered += 1
            return answered

        yield ask


def count_while(beside: Beside, others: Callable[[], int]) -> int:
    answered = 0
    while beside.at_work:
        count = others()
        answered = count if beside.at_work else answered
    return answered


def test_new_words(server: ServerRecord, picture: Path, others: Callable[[], int]) -> None:
    words = [f"a phrase of some length, the {index}th" for index in range(60)]
    with Beside(
        lambda client: client.recognize(picture, BOX, words), server.ports.grpc_url
    ) as beside:
        assert count_while(beside, others) >= OTHERS
    assert beside.error is None


def test_an_image_that_takes_long_to_decode(
    server: ServerRecord, others: Callable[[], int]
) -> None:
    """Within the limit of scans; a limit of scans alone would not bound the time."""
    image = scan_bomb(7000, 40)
    with Beside(
        lambda client: client.recognize(image, BOX, "pets"), server.ports.grpc_url
    ) as beside:
        assert count_while(beside, others) >= OTHERS


def test_masks(server: ServerRecord, picture: Path, others: Callable[[], int]) -> None:
    many = np.tile(np.array(BOX, np.float32), (300, 1))
    with Beside(
        lambda client: client.recognize(picture, many, "pets", return_masks=True),
        server.ports.grpc_url,
    ) as beside:
        assert count_while(beside, others) >= OTHERS
    assert beside.error is None


def test_words_that_are_one_to_the_text_encoder(client: RegionClient, picture: Path) -> None:
    for pair in (("cat", "CAT"), ("cat", "cat "), ("hot dog", "hot  dog")):
        with pytest.raises(ServingError, match="are the same to the text encoder") as refused:
            client.recognize(picture, BOX, pair)
        assert refused.value.code == "VOCABULARY_INVALID"
    found = client.recognize(picture, BOX, ("hot", "hot-stuff", "hot-other"))
    assert len(set(found.top_scores[0].tolist())) > 1

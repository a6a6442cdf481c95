"""Who asks during a soak test: callers of every kind at once, each answer compared with the model's
own.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regionspot.benchmarks.questions import Picture, never_seen
from regionspot.masks import decode_rle
from regionspot.predictor import RegionPredictor
from regionspot.serving.address import Address
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import ServingError
from regionspot.structures import RegionPredictions
from regionspot.vocabulary import VocabularyEncoder

TIMEOUT_S = 60.0
"""Of a caller, retries included: longer than a server takes to be back."""

LATE_S = 5.0
"""How much later than its time-out a call may end."""

RETRIABLE = ("UNAVAILABLE", "OVERLOADED", "TIMEOUT")
"""What a caller may be told whose question is right."""

SCORE_TOLERANCE = 2e-3
MASK_TOLERANCE = 5e-3
"""Pixels that may differ, of the image's."""

WORD_LISTS, WORDS = 8, 12
VOCABULARY = "mini"


@dataclass(frozen=True, eq=False)
class Case:
    """A question, and what the model answers in this process."""

    image: bytes
    given: dict[str, Any]
    expected: RegionPredictions

    def ask(self, client: RegionClient, new: bool, timeout_s: float) -> RegionPredictions:
        """Asks a server.

        Args:
            new: with bytes that no server has seen.
        """
        image = never_seen(self.image) if new else self.image
        return client.recognize(image, timeout_s=timeout_s, **self.given)

    def is_right(self, found: RegionPredictions) -> bool:
        """Whether an answer is the model's, as far as rounding allows."""
        expected = self.expected
        if found.class_names != expected.class_names or len(found) != len(expected):
            return False
        if not np.allclose(found.top_scores, expected.top_scores, atol=SCORE_TOLERANCE):
            return False
        # classes whose scores are nearly equal may change places
        best = expected.top_scores
        clear = best[:, 0] - best[:, 1] > 2 * SCORE_TOLERANCE
        if (found.class_ids != expected.class_ids)[clear].any():
            return False
        return (found.masks is None) == (expected.masks is None) and _same_masks(found, expected)


def make_cases(
    predictor: RegionPredictor,
    pictures: Sequence[Picture],
    registered: Sequence[str],
    rng: random.Random,
) -> dict[str, list[Case]]:
    """Cases by the kind of caller that asks them: boxes and the vocabulary that is `registered` as
    VOCABULARY, some words of it, clicks, and masks.
    """
    encoder = VocabularyEncoder(predictor.pipeline.text_encoder)
    lists = [tuple(rng.sample(registered, WORDS)) for _ in range(WORD_LISTS)]
    encoded = {words: encoder.encode(words) for words in lists}
    whole = encoder.encode(tuple(registered))
    found: dict[str, list[Case]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        words = lists[index % WORD_LISTS]
        boxes = picture.boxes.tolist()
        clicks = ((picture.boxes[:, :2] + picture.boxes[:, 2:]) / 2).tolist()
        for kind, given, vocabulary in (
            ("vocabulary", {"boxes": boxes, "vocabulary": VOCABULARY}, whole),
            ("words", {"boxes": boxes, "vocabulary": words}, encoded[words]),
            ("clicks", {"points": clicks, "vocabulary": words}, encoded[words]),
            ("masks", {"boxes": boxes, "vocabulary": words, "return_masks": True}, encoded[words]),
        ):
            asked = {"return_masks": False, **given}
            del asked["vocabulary"]
            expected = predictor.predict(picture.encoded, vocabulary=vocabulary, **asked)
            found[kind].append(Case(picture.encoded, given, expected))
    return found


@dataclass(frozen=True)
class Mistake:
    """A question that must be refused, and the code of it."""

    image: bytes
    given: dict[str, Any]
    code: str


def make_mistakes(good: Case) -> list[Mistake]:
    image, given = good.image, {"boxes": [[1, 1, 20, 20]], "vocabulary": ["a toy", "a cup"]}
    return [
        Mistake(image[: len(image) // 2], given, "IMAGE_INVALID"),
        Mistake(b"\xff\xd8\xff" + b"\0" * 5000, given, "IMAGE_INVALID"),
        Mistake(image, given | {"boxes": [[-900, -900, -800, -800]]}, "REGION_INVALID"),
        Mistake(image, given | {"vocabulary": ["", "a"]}, "VOCABULARY_INVALID"),
        Mistake(image, given | {"vocabulary": "no-such-vocabulary"}, "VOCABULARY_UNKNOWN"),
        Mistake(image, given | {"boxes": [[1, 1, 20, 20]] * 2000}, "TOO_MANY_REGIONS"),
    ]


class Callers:
    """Callers of every kind, each in a thread of its own, for the duration of a `with` block.

    Attributes:
        codes: of each kind, how many calls ended in each code; "OK" is a right answer.
        seconds: of each kind, what the right answers took.
        faults: what must not be: wrong answers, calls that end long after their time-out, codes
            that a caller cannot do anything about. At most MAX_FAULTS are described.
    """

    MAX_FAULTS = 50

    def __init__(
        self, cases: dict[str, list[Case]], web_url: str, grpc_url: str, seed: int
    ) -> None:
        self.codes: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []
        self._web = Address.parse(web_url)
        self._cases, self._mistakes = cases, make_mistakes(cases["words"][0])
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._clients = [RegionClient(url, timeout_s=TIMEOUT_S) for url in (web_url, grpc_url)]
        web, grpc = self._clients
        asked: list[tuple[str, Callable[[random.Random], None]]] = [
            (f"{kind}, {name}", self._asks(f"{kind}, {name}", kind, client, new))
            for kind in cases
            for name, client, new in (("gateway", web, False), ("gateway, new image", web, True))
        ]
        asked.append(("words, gRPC", self._asks("words, gRPC", "words", grpc, True)))
        asked += [("mistakes", self._mistake), ("half requests", self._half_request)]
        self._threads = [
            threading.Thread(
                target=self._repeat, args=(act, random.Random(f"{seed} {name}")), daemon=True
            )
            for name, act in asked
        ]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S + 2 * LATE_S)
            if thread.is_alive():
                self.fault("a call has not ended")
        for client in self._clients:
            client.close()

    def _repeat(self, act: Callable[[random.Random], None], rng: random.Random) -> None:
        while not self._ended.wait(rng.uniform(0, 0.1)):
            try:
                act(rng)
            except Exception as error:  # not one that callers are promised
                self.fault(f"{type(error).__name__}: {error}")

    def _asks(
        self, kind: str, cases: str, client: RegionClient, new: bool
    ) -> Callable[[random.Random], None]:
        def act(rng: random.Random) -> None:
            case = rng.choice(self._cases[cases])
            began = time.monotonic()
            try:
                found = case.ask(client, new, TIMEOUT_S)
            except ServingError as error:
                code = error.code
                if code not in RETRIABLE:
                    self.fault(f"{kind}: {error}")
            else:
                code = "OK" if case.is_right(found) else "WRONG"
                if code == "WRONG":
                    self.fault(f"{kind}: a wrong answer")
            self._count(kind, code, time.monotonic() - began)

        return act

    def _mistake(self, rng: random.Random) -> None:
        mistake = rng.choice(self._mistakes)
        client = rng.choice(self._clients)
        began = time.monotonic()
        try:
            client.recognize(mistake.image, timeout_s=TIMEOUT_S, **mistake.given)
        except ServingError as error:
            code = error.code
            if code not in (mistake.code, *RETRIABLE):
                self.fault(f"{mistake.code} was wanted, not {error}")
        else:
            code = "OK"
            self.fault(f"{mistake.code} was wanted, and an answer was given")
        self._count("mistakes", code, time.monotonic() - began)

    def _half_request(self, rng: random.Random) -> None:
        """Begins an upload and leaves."""
        host, _, port = self._web.host.rpartition(":")
        head = b"POST /v1/recognize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
        head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        code = "LEFT"
        try:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(head[: rng.randrange(1, len(head))])
                time.sleep(rng.uniform(0, 1))
        except OSError:
            code = "UNAVAILABLE"
        self._count("half requests", code, 0.0)

    def _count(self, kind: str, code: str, seconds: float) -> None:
        with self._lock:
            self.codes[kind][code] += 1
            if code == "OK":
                self.seconds[kind].append(seconds)
        if seconds > TIMEOUT_S + LATE_S:
            self.fault(f"{kind}: a call ended after {seconds:.0f} s")

    def fault(self, text: str) -> None:
        """Takes down what must not be."""
        with self._lock:
            if len(self.faults) < self.MAX_FAULTS:
                self.faults.append(text)


def seconds_until_right(case: Case, url: str, at_most_s: float) -> float | None:
    """From now until a server answers a question rightly; None if it does not in time."""
    began = time.monotonic()
    with RegionClient(url, timeout_s=5, retry=False) as client:
        while time.monotonic() - began < at_most_s:
            with contextlib.suppress(ServingError):
                if case.is_right(case.ask(client, True, 5)):
                    return time.monotonic() - began
            time.sleep(0.1)
    return None


def _same_masks(found: RegionPredictions, expected: RegionPredictions) -> bool:
    pairs = zip(found.masks or (), expected.masks or (), strict=True)
    return all(a == b or np.mean(decode_rle(a) != decode_rle(b)) < MASK_TOLERANCE for a, b in pairs)

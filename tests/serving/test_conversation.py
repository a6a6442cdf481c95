"""What a client sends next, given the server's answers so far: without a server, and by both kinds
of client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pytest

from regionspot.serving.client import AsyncRegionClient, RegionClient
from regionspot.serving.contract import Limits, RequestError, ServingError
from regionspot.serving.conversation import (
    ConfigRequest,
    Conversation,
    HttpRequest,
    InferenceRequest,
    Request,
    Steps,
)
from regionspot.serving.messages import Answer, OtherWordsError, Question, RemoteImage
from regionspot.serving.protocols import NothingThereError
from regionspot.structures import RegionPredictions, as_prompts

PETS = ("cat", "dog")
FORGOTTEN = RequestError("IMAGE_UNKNOWN", "no such image: send it")
QUESTION = Question(b"a file", "pets", as_prompts([[1, 2, 3, 4]]))
KNOWN = RemoteImage("00ff", 40, 60, b"a file")


class Performer(Protocol):
    """Holds a conversation with scripted answers; its result, and the requests that were sent."""

    def __call__(
        self,
        answers: list[Any],
        begin: Callable[[Conversation], Steps[Any]],
        url: str = "unused:1",
    ) -> tuple[Any, list[Request]]: ...


def parameters(vocabularies: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Those of a public model's configuration."""
    values = {
        "model_info": {"name": "a model"},
        "runtime": "none",
        "precision": "fp32",
        "vocabularies": vocabularies,
        "limits": Limits().to_json(),
    }
    return {name: json.dumps(value) for name, value in values.items()}


def answered(words: tuple[str, ...] = PETS) -> dict[str, Any]:
    """The tensors of an answer about one region, of the second class."""
    ids, scores = np.array([[1, 0]]), np.array([[0.75, 0.25]], np.float32)
    boxes = np.array([[1, 2, 3, 4]], np.float32)
    found = RegionPredictions(40, 60, boxes, words, scores[:, 0], ids[:, 0], ids, scores)
    return Answer(found, RemoteImage("1234", 40, 60), False).to_tensors()


class Scripted:
    """In the place of connections: gives the next of its answers, or raises it, and keeps the
    requests.
    """

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.requests = list(answers), list[Request]()

    def send(self, request: Request) -> Any:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class AsyncScripted(Scripted):
    async def send(self, request: Request) -> Any:
        await asyncio.sleep(0)
        return super().send(request)


def by_threads(
    answers: list[Any], begin: Callable[[Conversation], Steps[Any]], url: str = "unused:1"
) -> tuple[Any, list[Request]]:
    scripted: Any = Scripted(answers)
    client = RegionClient(url)
    client._connections = scripted
    return client._hold(begin(client._conversation)), scripted.requests


def by_asyncio(
    answers: list[Any], begin: Callable[[Conversation], Steps[Any]], url: str = "unused:1"
) -> tuple[Any, list[Request]]:
    scripted: Any = AsyncScripted(answers)

    async def hold() -> Any:
        client = AsyncRegionClient(url)
        client._connections = scripted
        return await client._hold(begin(client._conversation))

    return asyncio.run(hold()), scripted.requests


@pytest.fixture(params=[by_threads, by_asyncio])
def perform(request: pytest.FixtureRequest) -> Performer:
    performer: Performer = request.param
    return performer


def names_of(requests: list[Request]) -> list[str]:
    """What each sends or asks for: an image, its handle, the configuration, or a path."""
    names = []
    for request in requests:
        if isinstance(request, HttpRequest):
            names.append(request.path)
        elif isinstance(request, ConfigRequest):
            names.append("config")
        else:
            names += [
                name.removeprefix("image_")
                for name in ("image", "image_handle")
                if name in request.tensors and request.tensors[name][0, 0]
            ]
    return names


def test_a_registered_vocabulary_is_looked_up_once(perform: Performer) -> None:
    def twice(conversation: Conversation) -> Steps[list[Answer]]:
        first = yield from conversation.ask(QUESTION, "number-7", 3.0)
        second = yield from conversation.ask(QUESTION)
        return [first, second]

    found, requests = perform([answered(), parameters({"pets": PETS}), answered()], twice)
    assert names_of(requests) == ["image", "config", "image"]
    assert isinstance(requests[0], InferenceRequest)
    assert (requests[0].request_id, requests[0].timeout_s) == ("number-7", 3.0)
    assert [answer.predictions.class_names for answer in found] == [PETS, PETS]
    assert found[0].image == RemoteImage("1234", 40, 60, b"a file")


def test_class_names_of_the_question_need_no_look_up(perform: Performer) -> None:
    found, requests = perform(
        [answered()], lambda talk: talk.ask(replace(QUESTION, vocabulary=PETS))
    )
    assert names_of(requests) == ["image"] and found.predictions.class_names == PETS


def test_a_forgotten_image_is_sent_again(perform: Performer) -> None:
    question = replace(QUESTION, image=KNOWN, vocabulary=PETS)
    found, requests = perform(
        [FORGOTTEN, answered()], lambda talk: talk.ask(question, "number-7", 3.0)
    )
    assert names_of(requests) == ["handle", "image"] and found.image.handle == "1234"
    assert isinstance(requests[1], InferenceRequest)
    assert (requests[1].request_id, requests[1].timeout_s) == ("number-7", 3.0)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (replace(KNOWN, encoded=None), FORGOTTEN),
        (KNOWN, RequestError("REGION_INVALID", "box 0 is inverted")),
        (KNOWN, ServingError("TIMEOUT", "no answer in time")),
        (KNOWN, KeyError("a bug")),
    ],
)
def test_other_errors_come_out(perform: Performer, image: RemoteImage, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        perform([error], lambda talk: talk.ask(replace(QUESTION, image=image)))
    assert raised.value is error


def test_an_image_that_is_forgotten_twice_is_an_error(perform: Performer) -> None:
    with pytest.raises(RequestError, match="no such image"):
        perform([FORGOTTEN, FORGOTTEN], lambda talk: talk.ask(replace(QUESTION, image=KNOWN)))


@pytest.mark.parametrize("before", [{}, {"pets": ("dog", "cat")}, {"pets": ("cat",)}])
def test_words_that_were_registered_later_are_looked_up_again(
    perform: Performer, before: dict[str, tuple[str, ...]]
) -> None:
    script = [answered(), parameters(before), parameters({"pets": PETS})]
    found, requests = perform(script, lambda talk: talk.ask(QUESTION))
    assert (
        names_of(requests) == ["image", "config", "config"]
        and found.predictions.class_names == PETS
    )


def test_a_server_that_contradicts_itself_is_an_error(perform: Performer) -> None:
    script = [answered(), parameters({"pets": ("dog", "cat")}), parameters({})]
    with pytest.raises(OtherWordsError):
        perform(script, lambda talk: talk.ask(QUESTION))


@pytest.mark.parametrize("vocabularies", [{}, {"pets": PETS}])
def test_encode_asks_about_no_region(
    perform: Performer, vocabularies: dict[str, tuple[str, ...]]
) -> None:
    row: Any = []
    table: Any = np.zeros((0, 1))
    none = RegionPredictions(40, 60, np.zeros((0, 4), np.float32), PETS, row, row, table, table)
    tensors = Answer(none, RemoteImage("1234", 40, 60), False).to_tensors()
    found, requests = perform(
        [parameters(vocabularies), tensors], lambda talk: talk.encode(b"a file")
    )
    assert found == RemoteImage("1234", 40, 60, b"a file")
    assert isinstance(requests[1], InferenceRequest) and requests[1].tensors["boxes"].shape == (
        1,
        0,
        4,
    )
    named = requests[1].tensors["vocabulary"][0, 0].decode()
    assert named == next(iter(vocabularies), "")


def test_info_is_asked_again_with_refresh(perform: Performer) -> None:
    def thrice(conversation: Conversation) -> Steps[list[Any]]:
        first = yield from conversation.info()
        second = yield from conversation.info()
        third = yield from conversation.info(refresh=True, timeout_s=2.0)
        return [first.vocabularies, second.vocabularies, third.vocabularies]

    found, requests = perform([parameters({}), parameters({"pets": PETS})], thrice)
    assert found == [{}, {}, {"pets": PETS}] and requests == [
        ConfigRequest(None),
        ConfigRequest(2.0),
    ]


# ------------------------------------------------------------------ by HTTP

HTTP = "http://unused:1"
NOTHING = NothingThereError("REQUEST_INVALID", "nothing there")
INFO = {
    "model": "a model",
    "runtime": "none",
    "precision": "fp32",
    "vocabularies": [{"name": "pets", "words": 2}, {"name": "a/b", "words": 1}],
    "limits": Limits().to_json() | {"max_body_bytes": 7},
}


def asked_twice(conversation: Conversation) -> Steps[list[Answer]]:
    first = yield from conversation.ask(QUESTION)
    second = yield from conversation.ask(QUESTION)
    return [first, second]


def test_a_gateway_is_recognized_once(perform: Performer) -> None:
    answer = Answer.from_tensors(answered(), PETS, False)
    content = answer.predictions.to_json("") | {"image_handle": "1234", "cached": False}
    content["regions"][0]["iou"] = 0.5
    words = [{"name": "pets", "words": list(PETS)}, {"name": "a/b", "words": ["c"]}]
    found, requests = perform([INFO, content, INFO, *words, content], asked_twice, HTTP)
    assert names_of(requests) == [
        "/v1/info",
        "/v1/recognize",
        "/v1/info",
        "/v1/vocabularies/pets",
        "/v1/vocabularies/a%2Fb",
        "/v1/recognize",
    ]
    assert [one.predictions.class_names for one in found] == [PETS, PETS]


def test_triton_s_own_http_is_recognized_once(perform: Performer) -> None:
    script = [NOTHING, {"name": "triton"}, answered(), parameters({"pets": PETS}), answered()]
    _, requests = perform(script, asked_twice, HTTP)
    assert names_of(requests) == ["/v1/info", "/v2", "image", "config", "image"]


def test_another_web_site_is_neither(perform: Performer) -> None:
    with pytest.raises(NothingThereError) as raised:
        perform(
            [NOTHING, NothingThereError("REQUEST_INVALID", "nor there")],
            lambda talk: talk.ask(QUESTION),
            HTTP,
        )
    assert raised.value is NOTHING


def test_a_gateway_that_is_not_recognized_yet_is_asked_again(perform: Performer) -> None:
    """What fails on the way proves nothing."""

    def twice(conversation: Conversation) -> Steps[Any]:
        with pytest.raises(ServingError, match="starting"):
            yield from conversation.info()
        return (yield from conversation.info())

    info = INFO | {"vocabularies": []}
    script = [ServingError("UNAVAILABLE", "starting"), info, info]
    found, requests = perform(script, twice, HTTP)
    assert names_of(requests) == ["/v1/info"] * 3 and found.model == "a model"

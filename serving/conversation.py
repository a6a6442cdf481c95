"""A client's side of the conversation with a server, without any I/O: what to send next, given the
answers so far.

A conversation is a generator. It yields requests, is sent the answer of each (or is thrown the
error), and returns what the caller wants to know. `RegionClient` and `AsyncRegionClient` send the
requests.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from regionspot.runtime.runner import Array
from regionspot.serving.contract import Limits, RequestError
from regionspot.serving.messages import Answer, OtherWordsError, Question, RemoteImage
from regionspot.structures import Prompts

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ServerInfo:
    """Describes the model that a server runs.

    Args:
        model: its name.
        runtime: name of the runtime.
        precision: name of the precision.
        vocabularies: name -> class names of each registered vocabulary.
        limits: of one request.
    """

    model: str
    runtime: str
    precision: str
    vocabularies: Mapping[str, tuple[str, ...]]
    limits: Limits

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServerInfo:
        """From the parameters of the public model's configuration."""
        values = {name: json.loads(text) for name, text in parameters.items()}
        return cls(
            model=values["model_info"]["name"],
            runtime=values["runtime"],
            precision=values["precision"],
            vocabularies={name: tuple(words) for name, words in values["vocabularies"].items()},
            limits=Limits.from_json(values["limits"]),
        )


@dataclass(frozen=True, eq=False)
class InferenceRequest:
    """Asks the public model; its answer is the output tensors by name. `timeout_s` None is the
    connection's.
    """

    tensors: Mapping[str, Array]
    request_id: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True)
class ConfigRequest:
    """Asks for the parameters of the public model's configuration; its answer is their texts by
    name.
    """

    timeout_s: float | None = None


Request = InferenceRequest | ConfigRequest
Steps = Generator[Request, Any, ResultT]


class Conversation:
    """With one server. `known` is what it last said of itself."""

    def __init__(self) -> None:
        self.known: ServerInfo | None = None

    def info(self, refresh: bool = False, timeout_s: float | None = None) -> Steps[ServerInfo]:
        """What the server runs: asked once, or again with `refresh`."""
        if self.known is None or refresh:
            self.known = ServerInfo.from_parameters((yield ConfigRequest(timeout_s)))
        return self.known

    def ask(
        self, question: Question, request_id: str = "", timeout_s: float | None = None
    ) -> Steps[Answer]:
        """The answer to a question. An image that the server no longer has is sent again if its
        bytes are at hand.
        """
        encoded = question.image if isinstance(question.image, bytes) else question.image.encoded
        try:
            tensors = yield InferenceRequest(question.to_tensors(), request_id, timeout_s)
        except RequestError as error:
            if error.code != "IMAGE_UNKNOWN" or encoded is None:
                raise
            tensors = yield InferenceRequest(
                replace(question, image=encoded).to_tensors(), request_id, timeout_s
            )
        answer = yield from self._read(question, tensors)
        return replace(answer, image=replace(answer.image, encoded=encoded))

    def encode(self, encoded: bytes, timeout_s: float | None = None) -> Steps[RemoteImage]:
        """Has the server read and encode an image, for questions later."""
        info = yield from self.info()
        vocabulary = next(iter(info.vocabularies), None) or ("a",)
        answer = yield from self.ask(
            Question(encoded, vocabulary, (Prompts.empty(),)), timeout_s=timeout_s
        )
        return answer.image

    def _read(self, question: Question, tensors: Mapping[str, Array]) -> Steps[Answer]:
        """Reads an answer by the class names of the question, or of the vocabulary that it
        names.
        """
        name, masks = question.vocabulary, question.return_masks
        if not isinstance(name, str):
            return Answer.from_tensors(tensors, name, masks)
        info = yield from self.info()
        try:
            return Answer.from_tensors(tensors, info.vocabularies.get(name), masks)
        except OtherWordsError:  # other words were registered since this client asked
            info = yield from self.info(refresh=True)
            return Answer.from_tensors(tensors, info.vocabularies.get(name), masks)

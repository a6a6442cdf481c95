"""A client's side of the conversation with a server, without any I/O: what to send next, given the
answers so far.

A conversation is a generator. It yields requests, is sent the answer of each (or is thrown the
error), and returns what the caller wants to know. `RegionClient` and `AsyncRegionClient` send the
requests.
"""

from __future__ import annotations

from dataclasses import replace

from regionspot.serving.contract import RequestError
from regionspot.serving.messages import Answer, OtherWordsError, Question, RemoteImage
from regionspot.serving.protocols import (
    ConfigRequest,
    HttpRequest,
    InferenceRequest,
    Reader,
    Request,
    ResultT,
    ServerInfo,
    ServerProtocol,
    Steps,
    recognized,
)
from regionspot.structures import Prompts

__all__ = [
    "ConfigRequest",
    "Conversation",
    "HttpRequest",
    "InferenceRequest",
    "Request",
    "ResultT",
    "ServerInfo",
    "Steps",
]


class Conversation:
    """With one server. `known` is what it last said of itself.

    Args:
        protocol: that the server speaks; None asks it first.
    """

    def __init__(self, protocol: ServerProtocol | None = None) -> None:
        self.known: ServerInfo | None = None
        self._protocol = protocol

    def info(self, refresh: bool = False, timeout_s: float | None = None) -> Steps[ServerInfo]:
        """What the server runs: asked once, or again with `refresh`."""
        if self.known is None or refresh:
            protocol = yield from self.protocol(timeout_s)
            self.known = yield from protocol.info(timeout_s)
        return self.known

    def ask(
        self, question: Question, request_id: str = "", timeout_s: float | None = None
    ) -> Steps[Answer]:
        """The answer to a question. An image that the server no longer has is sent again if its
        bytes are at hand.
        """
        protocol = yield from self.protocol(timeout_s)
        encoded = question.image if isinstance(question.image, bytes) else question.image.encoded
        try:
            read = yield from protocol.ask(question, request_id, timeout_s)
        except RequestError as error:
            if error.code != "IMAGE_UNKNOWN" or encoded is None:
                raise
            again = replace(question, image=encoded)
            read = yield from protocol.ask(again, request_id, timeout_s)
        answer = yield from self._read(question, read)
        return replace(answer, image=replace(answer.image, encoded=encoded))

    def encode(self, encoded: bytes, timeout_s: float | None = None) -> Steps[RemoteImage]:
        """Has the server read and encode an image, for questions later."""
        info = yield from self.info()
        vocabulary = next(iter(info.vocabularies), None) or ("a",)
        answer = yield from self.ask(
            Question(encoded, vocabulary, (Prompts.empty(),)), timeout_s=timeout_s
        )
        return answer.image

    def protocol(self, timeout_s: float | None) -> Steps[ServerProtocol]:
        """That the server speaks: asked for once."""
        if self._protocol is None:
            self._protocol = yield from recognized(timeout_s)
        return self._protocol

    def _read(self, question: Question, read: Reader) -> Steps[Answer]:
        """Reads an answer by the class names of the question, or of the vocabulary that it
        names.
        """
        name = question.vocabulary
        if not isinstance(name, str):
            return read(name)
        info = yield from self.info()
        try:
            return read(info.vocabularies.get(name))
        except OtherWordsError:  # other words were registered since this client asked
            info = yield from self.info(refresh=True)
            return read(info.vocabularies.get(name))

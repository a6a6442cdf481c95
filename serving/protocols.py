"""The requests by which a server is asked, and how its answers are read: Triton's tensors, or the
JSON of a gateway's HTTP API. Without any I/O.

Both protocols are generators, as `regionspot.serving.conversation` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from regionspot.runtime.runner import Array
from regionspot.serving.contract import Limits, RequestError, ServingError
from regionspot.serving.gateway_messages import QuestionForm, answer_from_json
from regionspot.serving.messages import Answer, Question

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
        version: of its content, see `regionspot.serving.contract.OUTPUTS`.
    """

    model: str
    runtime: str
    precision: str
    vocabularies: Mapping[str, tuple[str, ...]]
    limits: Limits
    version: str = ""

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
            version=values.get("model_version", ""),
        )


@dataclass(frozen=True, eq=False)
class InferenceRequest:
    """Asks Triton's public model; its answer is the output tensors by name. `timeout_s` None is the
    connection's.
    """

    tensors: Mapping[str, Array]
    request_id: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True)
class ConfigRequest:
    """Asks Triton for the parameters of the public model's configuration; its answer is their texts
    by name.
    """

    timeout_s: float | None = None


@dataclass(frozen=True, eq=False)
class HttpRequest:
    """Asks a server by HTTP; its answer is JSON. Without a form it is a GET, with one a POST.

    Args:
        path: behind the address, such as "/v1/info".
    """

    path: str
    form: QuestionForm | None = None
    request_id: str = ""
    timeout_s: float | None = None


Request = InferenceRequest | ConfigRequest | HttpRequest
Steps = Generator[Request, Any, ResultT]
Reader = Callable[[Sequence[str] | None], Answer]
"""Reads an answer by the class names of the question's vocabulary, None where they are not known.
Raises OtherWordsError where it names others.
"""


class NothingThereError(RequestError):
    """An HTTP server has nothing at a path."""


class ServerProtocol(Protocol):
    """How servers of one kind are asked."""

    def info(self, timeout_s: float | None) -> Steps[ServerInfo]:
        """What the server runs."""

    def ask(self, question: Question, request_id: str, timeout_s: float | None) -> Steps[Reader]:
        """The answer to a question."""


class TritonProtocol:
    """Triton itself, over gRPC or HTTP."""

    def info(self, timeout_s: float | None) -> Steps[ServerInfo]:
        return ServerInfo.from_parameters((yield ConfigRequest(timeout_s)))

    def ask(self, question: Question, request_id: str, timeout_s: float | None) -> Steps[Reader]:
        tensors = yield InferenceRequest(question.to_tensors(), request_id, timeout_s)
        masks = question.return_masks
        return lambda class_names: Answer.from_tensors(tensors, class_names, masks)


class GatewayProtocol:
    """The HTTP API of `regionspot-serve web`."""

    def info(self, timeout_s: float | None) -> Steps[ServerInfo]:
        told = yield HttpRequest("/v1/info", timeout_s=timeout_s)
        try:
            names = [one["name"] for one in told["vocabularies"]]
            vocabularies = {}
            for name in names:
                path = f"/v1/vocabularies/{quote(name, safe='')}"
                words = yield HttpRequest(path, timeout_s=timeout_s)
                vocabularies[name] = tuple(words["words"])
            return ServerInfo(
                told["model"],
                told["runtime"],
                told["precision"],
                vocabularies,
                Limits.from_json(told["limits"]),
                told.get("model_version", ""),
            )
        except (LookupError, TypeError, AttributeError) as error:
            raise ServingError(
                "INTERNAL", f"the gateway's description of its model lacks {error}"
            ) from error

    def ask(self, question: Question, request_id: str, timeout_s: float | None) -> Steps[Reader]:
        form = QuestionForm.of(question)
        content = yield HttpRequest("/v1/recognize", form, request_id, timeout_s)
        return lambda class_names: answer_from_json(content, question, class_names)


def recognized(timeout_s: float | None) -> Steps[ServerProtocol]:
    """Which of both an HTTP server speaks.

    Raises:
        RequestError: it speaks neither; UNAUTHORIZED, a gateway that wants a token.
    """
    try:
        yield HttpRequest("/v1/info", timeout_s=timeout_s)
        return GatewayProtocol()
    except NothingThereError as nothing:
        try:
            yield HttpRequest("/v2", timeout_s=timeout_s)
        except NothingThereError:
            raise nothing from None
        return TritonProtocol()

"""Ask a regionspot server about pictures: in three lines, from threads or from asyncio.

client = RegionClient("localhost:8001")
found = client.recognize("photo.jpg", boxes=[[10, 20, 200, 300]], vocabulary=["cat", "coffee cup"])
print(found.class_names[found.class_ids[0]], found.scores[0])

From outside, through a gateway: RegionClient("https://HOST", token="...").
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from regionspot.errors import InputError
from regionspot.images import ImageSource, read_image
from regionspot.serving.address import Address, Credentials
from regionspot.serving.contract import DEFAULT_TOP_K, MODEL, ServingError, base64_hint
from regionspot.serving.conversation import (
    ConfigRequest,
    Conversation,
    HttpRequest,
    Request,
    ResultT,
    ServerInfo,
    Steps,
)
from regionspot.serving.http_connection import AsyncHttpConnection, HttpConnection
from regionspot.serving.messages import Answer, Question, RemoteImage
from regionspot.serving.protocols import GatewayProtocol, TritonProtocol
from regionspot.serving.triton import DEFAULT_TIMEOUT_S, AsyncConnection, Connection
from regionspot.structures import RegionPredictions, UInt8Array, Vocabulary, as_prompts

_SENT_AS_IT_IS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG and PNG; WebP is RIFF....WEBP


class RegionClient:
    """A connection to a server, kept open. Use as a context manager, or call `close`.

    Safe for several threads at once over gRPC and to a gateway; over Triton's HTTP each thread
    needs a client of its own.

    Args:
        url: "HOST:PORT" of the server's gRPC port, with TLS "grpcs://HOST:PORT"; or of a gateway,
            "https://HOST", "https://HOST:PORT/PATH" or the same with http. Behind http and https
            may also be Triton's HTTP: the server is asked once.
        timeout_s: of one call, retries included. A server that cannot be reached, restarts or is
            overloaded is asked again until then, with growing pauses, or those that it asks for;
            nothing else is.
        retry: False asks once.
        token: that the gateway wants.
        ca_file: of grpcs and https, PEM certificates of the authorities to believe; None are those
            of the system.
        client_cert_file: the client's own certificate, PEM, where the server wants one.
        client_key_file: its key, PEM.
        server_name: of grpcs, the name in the server's certificate, where the URL has another, such
            as an IP address.

    Raises:
        InputError: no address, a file that cannot be read, credentials that the address has no use
            for.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: bool = True,
        *,
        token: str | None = None,
        ca_file: str | Path | None = None,
        client_cert_file: str | Path | None = None,
        client_key_file: str | Path | None = None,
        server_name: str | None = None,
    ) -> None:
        credentials = Credentials(token, ca_file, client_cert_file, client_key_file, server_name)
        self._connections = _Connections(Address.parse(url), timeout_s, retry, credentials)
        self._conversation = _conversation_at(self._connections.address)

    def recognize(
        self,
        image: ImageSource | RemoteImage,
        boxes: npt.ArrayLike | None = None,
        vocabulary: str | Sequence[str] | Vocabulary = (),
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        top_k: int = DEFAULT_TOP_K,
        return_masks: bool = False,
        timeout_s: float | None = None,
    ) -> RegionPredictions:
        """Recognises regions of an image. Regions of one call attend to each other, as in
        `RegionPredictor.predict`.

        Args:
            image: a file's path or bytes, a Pillow image, an (H, W, 3) uint8 RGB array, or the
                result of `encode`.
            boxes: (N, 4) xyxy in pixels of the upright image.
            vocabulary: the name of a vocabulary that is registered on the server, or class names.
            points: (N, 2) or (N, P, 2) xy in pixels of the upright image.
            point_labels: (N,) or (N, P), 1 for foreground and 0 for background; None is foreground
                throughout.
            top_k: number of best classes to return.
            return_masks: also return SAM's mask of each region.
            timeout_s: overrides the client's.

        Raises:
            RequestError: the image, the regions or the class names are invalid; see its `code` and
                message.
            ServingError: the server failed, did not respond in time, or cannot be reached.
            InputError: a file that does not exist, arrays of other shapes.
        """
        question = make_question(
            image,
            boxes,
            vocabulary,
            points=points,
            point_labels=point_labels,
            top_k=top_k,
            return_masks=return_masks,
        )
        return self.ask(question, timeout_s=timeout_s).predictions

    def ask(
        self, question: Question, *, request_id: str = "", timeout_s: float | None = None
    ) -> Answer:
        """As `recognize`, with what else the server says, and with a name for the request in the
        server's log.
        """
        return self._hold(self._conversation.ask(question, request_id, timeout_s))

    def encode(self, image: ImageSource, timeout_s: float | None = None) -> RemoteImage:
        """Has the server read and encode an image now, for questions later."""
        return self._hold(self._conversation.encode(encoded_picture(image), timeout_s))

    def info(self, refresh: bool = False, timeout_s: float | None = None) -> ServerInfo:
        """What the server runs; asked once, or again with `refresh`.

        Raises:
            ServingError: it cannot be reached.
        """
        return self._hold(self._conversation.info(refresh, timeout_s))

    def is_gateway(self, timeout_s: float | None = None) -> bool:
        """Whether a gateway answers, and not Triton itself.

        Raises:
            ServingError: it cannot be reached, or wants a token.
        """
        protocol = self._hold(self._conversation.protocol(timeout_s))
        return isinstance(protocol, GatewayProtocol)

    def _hold(self, steps: Steps[ResultT]) -> ResultT:
        """Sends the requests of a conversation; its result."""
        try:
            request = next(steps)
            while True:
                try:
                    answer = self._connections.send(request)
                except ServingError as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as end:
            result: ResultT = end.value
            return result

    def close(self) -> None:
        """Closes the connections. A later call opens others."""
        self._connections.close()

    def __enter__(self) -> RegionClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncRegionClient:
    """As `RegionClient`, for asyncio: hundreds of questions may be under way. Cancelling a task
    cancels its request.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: bool = True,
        *,
        token: str | None = None,
        ca_file: str | Path | None = None,
        client_cert_file: str | Path | None = None,
        client_key_file: str | Path | None = None,
        server_name: str | None = None,
    ) -> None:
        credentials = Credentials(token, ca_file, client_cert_file, client_key_file, server_name)
        self._connections = _AsyncConnections(Address.parse(url), timeout_s, retry, credentials)
        self._conversation = _conversation_at(self._connections.address)

    async def recognize(
        self,
        image: ImageSource | RemoteImage,
        boxes: npt.ArrayLike | None = None,
        vocabulary: str | Sequence[str] | Vocabulary = (),
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        top_k: int = DEFAULT_TOP_K,
        return_masks: bool = False,
        timeout_s: float | None = None,
    ) -> RegionPredictions:
        """See `RegionClient.recognize`."""
        question = make_question(
            image,
            boxes,
            vocabulary,
            points=points,
            point_labels=point_labels,
            top_k=top_k,
            return_masks=return_masks,
        )
        return (await self.ask(question, timeout_s=timeout_s)).predictions

    async def ask(
        self, question: Question, *, request_id: str = "", timeout_s: float | None = None
    ) -> Answer:
        """See `RegionClient.ask`."""
        return await self._hold(self._conversation.ask(question, request_id, timeout_s))

    async def encode(self, image: ImageSource, timeout_s: float | None = None) -> RemoteImage:
        """See `RegionClient.encode`."""
        return await self._hold(self._conversation.encode(encoded_picture(image), timeout_s))

    async def info(self, refresh: bool = False, timeout_s: float | None = None) -> ServerInfo:
        """See `RegionClient.info`."""
        return await self._hold(self._conversation.info(refresh, timeout_s))

    async def _hold(self, steps: Steps[ResultT]) -> ResultT:
        """See `RegionClient._hold`."""
        try:
            request = next(steps)
            while True:
                try:
                    answer = await self._connections.send(request)
                except ServingError as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as end:
            result: ResultT = end.value
            return result

    async def close(self) -> None:
        """See `RegionClient.close`."""
        await self._connections.close()

    async def __aenter__(self) -> AsyncRegionClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def make_question(
    image: ImageSource | RemoteImage,
    boxes: npt.ArrayLike | None = None,
    vocabulary: str | Sequence[str] | Vocabulary = (),
    *,
    points: npt.ArrayLike | None = None,
    point_labels: npt.ArrayLike | None = None,
    top_k: int = DEFAULT_TOP_K,
    return_masks: bool = False,
) -> Question:
    """The question that `RegionClient.recognize` asks; the same arguments.

    Raises:
        InputError: what can be told without the server.
    """
    if isinstance(vocabulary, Vocabulary):
        vocabulary = vocabulary.names
    return Question(
        image if isinstance(image, RemoteImage) else encoded_picture(image),
        vocabulary if isinstance(vocabulary, str) else tuple(vocabulary),
        as_prompts(boxes, points, point_labels),
        top_k,
        return_masks,
    )


def encoded_picture(image: ImageSource) -> bytes:
    """A picture as the server takes it: a JPEG, PNG or WebP file as it is, anything else as PNG,
    which loses nothing.

    Raises:
        InputError: the file does not exist, or is no picture.
    """
    content: bytes | None = None
    if isinstance(image, bytes):
        content = image
    elif isinstance(image, str | Path):
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            raise InputError(
                f"image {Path(image).name!r} cannot be read ({error.strerror}): check the path"
            ) from error
    if content is not None and (content.startswith(_SENT_AS_IT_IS) or content[8:12] == b"WEBP"):
        return content
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(_read(image if content is None else content, image)).save(
        encoded, "PNG", compress_level=1
    )
    return encoded.getvalue()


def _read(source: ImageSource, named: ImageSource) -> UInt8Array:
    """(H, W, 3) uint8 RGB. `source` may be the content of the file `named`: a pipe can be read once
    alone.
    """
    try:
        return read_image(source)
    except InputError as error:
        hint = base64_hint(source) if isinstance(source, bytes) else ""
        name = "" if isinstance(named, bytes) or source is named else f" ({named})"
        raise InputError(f"{error}{name}{hint}") from error


class _Connections:
    """To one server: Triton's client, or HTTP, each opened when it is first needed. Which one a
    request is for, the request says.
    """

    def __init__(
        self, address: Address, timeout_s: float, retry: bool, credentials: Credentials
    ) -> None:
        credentials.check_for(address)
        self.address = address
        self._limits, self._credentials = (timeout_s, retry), credentials
        self._lock = threading.Lock()
        self._triton: Connection | None = None
        self._http: HttpConnection | None = None

    def send(self, request: Request) -> Any:
        """The answer to a request. Raises ServingError."""
        if isinstance(request, HttpRequest):
            return self._to_http().send(request)
        triton = self._to_triton()
        if isinstance(request, ConfigRequest):
            return triton.config(timeout_s=request.timeout_s)
        return triton.infer(MODEL, request.tensors, request.request_id, request.timeout_s)

    def close(self) -> None:
        for connection in (self._triton, self._http):
            if connection is not None:
                connection.close()

    def _to_http(self) -> HttpConnection:
        with self._lock:
            if self._http is None:
                self._http = HttpConnection(self.address, *self._limits, self._credentials)
            return self._http

    def _to_triton(self) -> Connection:
        with self._lock:
            if self._triton is None:
                self._triton = Connection(
                    str(self.address), *self._limits, **self._credentials.of_grpc
                )
            return self._triton


class _AsyncConnections:
    """As `_Connections`, for asyncio."""

    def __init__(
        self, address: Address, timeout_s: float, retry: bool, credentials: Credentials
    ) -> None:
        credentials.check_for(address)
        self.address = address
        self._limits, self._credentials = (timeout_s, retry), credentials
        self._triton: AsyncConnection | None = None
        self._http: AsyncHttpConnection | None = None

    async def send(self, request: Request) -> Any:
        """See `_Connections.send`."""
        if isinstance(request, HttpRequest):
            return await self._to_http().send(request)
        triton = self._to_triton()
        if isinstance(request, ConfigRequest):
            return await triton.config(timeout_s=request.timeout_s)
        return await triton.infer(MODEL, request.tensors, request.request_id, request.timeout_s)

    async def close(self) -> None:
        for connection in (self._triton, self._http):
            if connection is not None:
                await connection.close()

    def _to_http(self) -> AsyncHttpConnection:
        if self._http is None:
            self._http = AsyncHttpConnection(self.address, *self._limits, self._credentials)
        return self._http

    def _to_triton(self) -> AsyncConnection:
        if self._triton is None:
            self._triton = AsyncConnection(
                str(self.address), *self._limits, **self._credentials.of_grpc
            )
        return self._triton


def _conversation_at(address: Address) -> Conversation:
    """gRPC is Triton's; behind HTTP may be a gateway, which is asked first."""
    return Conversation(TritonProtocol() if address.is_grpc else None)

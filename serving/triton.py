"""Talking to a Triton server: connections over gRPC or HTTP, its errors as ours, retries, a
`Runner` over its models.

The only module that imports a Triton client.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, TypeVar

import numpy as np

from regionspot.errors import ArtifactError, InputError, is_interrupt
from regionspot.runtime.artifacts import spec_from_json
from regionspot.runtime.graph_spec import GraphSpec, ModelInfo
from regionspot.runtime.pipeline import GPU_PROMPT_CHUNK, RegionPipeline
from regionspot.runtime.runner import Array, Tensors, check_feeds, check_outputs
from regionspot.runtime.text_encoder import TextInput
from regionspot.runtime.tokenizer import ClipTokenizer, tokenizer_json
from regionspot.serving.contract import (
    MODEL,
    RETRYABLE,
    RequestError,
    ServingError,
    error_of,
    from_text,
)

try:
    import tritonclient.grpc
    import tritonclient.grpc.aio
    from tritonclient.utils import InferenceServerException
except ImportError as error:
    raise InputError(
        f"a Triton client is needed ({error}): pip install 'regionspot[serving]'"
    ) from error

DEFAULT_TIMEOUT_S = 60.0
FIRST_DELAY_S, MAX_DELAY_S = 0.1, 2.0
MAX_DEATHS = 3
STUB_DIED = "is not healthy"  # Triton's words for it
_TYPES = {"b": "BOOL", "f": "FP32", "i": "INT32", "u": "UINT8", "O": "BYTES"}
_CHANNEL = [
    ("grpc.lb_policy_name", "round_robin"),  # one name may stand for several servers
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # gRPC's own is two minutes: too long for a server that was restarted
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_GONE = (
    *(
        "unavailable",
        "failed to connect",
        "connection refused",
        "connection reset",
        "connection closed",
    ),
    *(
        "is not healthy",
        "is not ready",
        "unknown model",
        "no available versions",
        "server exiting",
        "stub process",
    ),
    *(
        "connection dropped",
        "socket closed",
        "cannot connect",
        "server disconnected",
        "broken pipe",
        "is not found",
    ),
)
_PERHAPS_HTTP = ("http1.x server", "failed parsing http/2", "socket closed")
"""gRPC's words for an HTTP/1 server that answers it, or hangs up."""

_NO_HTTP = ("expected http/", "badstatusline")
"""HTTP clients' words for a gRPC server that answers them."""

PROBE_S = 1.0
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Address:
    """Where a server listens, and by which protocol.

    >>> Address.parse("localhost:8001").protocol
    'grpc'
    """

    protocol: str
    host: str

    def __str__(self) -> str:
        return f"{self.protocol}://{self.host}"

    @classmethod
    def parse(cls, url: str) -> Address:
        """From "HOST:PORT", which is gRPC, "grpc://HOST:PORT" or "http://HOST:PORT".

        Raises:
            InputError: anything else.
        """
        scheme, separator, host = url.rpartition("://")
        protocol = scheme if separator else "grpc"
        name, _, port = host.rstrip("/").rpartition(":")
        if (
            protocol not in ("grpc", "http")
            or not name
            or not port.isdecimal()
            or not 0 < int(port) < 65536
        ):
            raise InputError(
                f"{url!r} is no server's address: write HOST:PORT of its gRPC port, or "
                "http://HOST:PORT"
            )
        return cls(protocol, f"{name}:{port}")


class _Connector:
    """What connections of both kinds share: where the server is, how long to try, and Triton's
    calls.

    A call takes a client and the seconds left; over asyncio it gives something to await.
    """

    def __init__(self, url: str, timeout_s: float, retry: bool, for_asyncio: bool) -> None:
        self.address = Address.parse(url)
        self.timeout_s = timeout_s
        self._retry = retry
        self._library = _library(self.address, for_asyncio)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self.timeout_s if timeout_s is None else timeout_s, self._retry)

    def _inference(
        self, model: str, inputs: Mapping[str, Array], request_id: str
    ) -> Callable[[Any, float], Any]:
        def ask(client: Any, left_s: float) -> Any:
            tensors = _inputs(self._library, inputs)
            return client.infer(model, tensors, request_id=request_id, **self._limit(left_s))

        return ask

    def _model_config(self, model: str) -> Callable[[Any, float], Any]:
        options = {} if self.address.protocol == "http" else {"as_json": True}
        return lambda client, left_s: client.get_model_config(
            model, **options, **self._limit(left_s)
        )

    def _parameters(self, content: Mapping[str, Any]) -> dict[str, str]:
        """Of a model's configuration."""
        config = content if self.address.protocol == "http" else content["config"]
        return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}

    def _limit(self, left_s: float) -> dict[str, float]:
        return {"client_timeout": left_s} if self.address.protocol == "grpc" else {}


class Connection(_Connector):
    """To one server, kept open. Safe to share between threads; over HTTP each has a connection of
    its own.

    Args:
        timeout_s: of each call, retries included.
        retry: ask again where that may help.
    """

    def __init__(self, url: str, timeout_s: float = DEFAULT_TIMEOUT_S, retry: bool = True) -> None:
        super().__init__(url, timeout_s, retry, for_asyncio=False)
        self._open_client: Any = (
            SimpleNamespace() if self.address.protocol == "grpc" else threading.local()
        )
        self._lock = threading.Lock()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> dict[str, Array]:
        """One request, tried again while the server cannot be reached or is overloaded, until the
        time is over.

        A recognition changes nothing, so that it is safe to ask twice.

        Raises:
            ServingError: what `regionspot.serving.contract.CODES` lists.
        """
        return _outputs(
            self.call(self._inference(model, inputs, request_id), timeout_s), self.address
        )

    def call(self, ask: Callable[[Any, float], ResultT], timeout_s: float | None = None) -> ResultT:
        """`ask(client, seconds left)` with retries; errors as in `infer`."""
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return self._ask(ask, attempts.timeout_s, attempts.left_s)
            except Exception as error:
                if is_interrupt(error):
                    raise
                time.sleep(attempts.delay_after(self._translated(error)))

    def _ask(
        self, ask: Callable[[Any, float], ResultT], timeout_s: float, left_s: float
    ) -> ResultT:
        if self.address.protocol == "grpc":
            return _without_signals(lambda: ask(self._open(timeout_s), left_s))
        try:
            return ask(self._open(timeout_s), left_s)
        except BaseException:
            self.close()  # the next call must not read what is left of this one's answer
            raise

    def config(self, model: str = MODEL, timeout_s: float | None = None) -> dict[str, str]:
        """The parameters of a model's configuration.

        Raises:
            ServingError: UNAVAILABLE where no such model is ready.
        """
        return self._parameters(self.call(self._model_config(model), timeout_s))

    def statistics(self, model: str = MODEL) -> dict[str, Any]:
        """Triton's own: how many requests of a model succeeded and failed, and what their stages
        took.
        """
        return self.all_statistics(model)[model]

    def all_statistics(self, model: str = "") -> dict[str, dict[str, Any]]:
        """Of each model of the server, by its name; of one alone where it is named."""
        if self.address.protocol == "http":
            content = self.call(lambda client, _: client.get_inference_statistics(model))
        else:
            content = self.call(
                lambda client, left: client.get_inference_statistics(
                    model, as_json=True, **self._limit(left)
                )
            )
        return {found["name"]: dict(found) for found in content["model_stats"]}

    def close(self) -> None:
        """Closes the connection: over HTTP, the one of this thread. A later call opens another."""
        opened, self._open_client.client = getattr(self._open_client, "client", None), None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, timeout_s: float) -> Any:
        http, opened = self.address.protocol == "http", self._open_client
        # over HTTP it belongs to the connection
        if http and getattr(opened, "timeout_s", timeout_s) != timeout_s:
            self.close()
        with self._lock:
            if getattr(opened, "client", None) is None:
                limits = {"connection_timeout": min(timeout_s, 5.0), "network_timeout": timeout_s}
                options = limits if http else {"channel_args": _CHANNEL}
                opened.client = self._library.InferenceServerClient(self.address.host, **options)
                opened.timeout_s = timeout_s
            return opened.client

    def _translated(self, error: Exception) -> ServingError:
        return translated(error, self.address)


class AsyncConnection(_Connector):
    """As `Connection`, for asyncio. A task that is cancelled cancels its request."""

    def __init__(self, url: str, timeout_s: float = DEFAULT_TIMEOUT_S, retry: bool = True) -> None:
        super().__init__(url, timeout_s, retry, for_asyncio=True)
        self._client: Any = None

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> dict[str, Array]:
        """See `Connection.infer`."""
        return _outputs(
            await self.call(self._inference(model, inputs, request_id), timeout_s), self.address
        )

    async def config(self, model: str = MODEL, timeout_s: float | None = None) -> dict[str, str]:
        """See `Connection.config`."""
        return self._parameters(await self.call(self._model_config(model), timeout_s))

    async def call(
        self, ask: Callable[[Any, float], Awaitable[ResultT]], timeout_s: float | None = None
    ) -> ResultT:
        """See `Connection.call`."""
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return await asyncio.wait_for(ask(self._open(), attempts.left_s), attempts.left_s)
            except Exception as error:
                if is_interrupt(error):
                    raise
                # it may ask the port
                failure = await asyncio.to_thread(translated, error, self.address)
                await asyncio.sleep(attempts.delay_after(failure))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _open(self) -> Any:
        if self._client is None:
            options = {"channel_args": _CHANNEL} if self.address.protocol == "grpc" else {}
            self._client = self._library.InferenceServerClient(self.address.host, **options)
        return self._client


class Attempts:
    """How often and how long one call is tried: with growing, random pauses, until its time is
    over.

    A call that met the death of a model's process MAX_DEATHS times may be what kills it, and is not
    sent again.
    """

    def __init__(self, timeout_s: float, retry: bool = True) -> None:
        if not timeout_s > 0:
            raise InputError(f"a time-out must be more than 0 seconds, not {timeout_s}")
        self.timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._delays, self._retry, self._deaths = _delays(), retry, 0

    @property
    def left_s(self) -> float:
        """Until the deadline; never quite nothing."""
        return max(self._deadline - time.monotonic(), 0.001)

    def delay_after(self, error: ServingError) -> float:
        """Seconds to wait before the next attempt. Raises `error` if there is none."""
        delay_s = next(self._delays)
        self._deaths += STUB_DIED in str(error)
        if (
            not self._retry
            or error.code not in RETRYABLE
            or self.left_s <= delay_s
            or self._deaths > MAX_DEATHS
        ):
            raise error
        return delay_s


def translated(error: Exception, address: Address) -> ServingError:
    """What a Triton client raised, as ours."""
    if isinstance(error, ServingError):
        return error
    message = (
        error.message()
        if isinstance(error, InferenceServerException)
        else str(error) or type(error).__name__
    )
    status = (
        str(error.status() or "")
        if isinstance(error, InferenceServerException)
        else type(error).__name__
    )
    if (known := from_text(message)) is not None:
        return known
    text = f"{status} {message}".lower()
    if (misnamed := _misnamed(text, address)) is not None:
        return misnamed
    if "deadline" in text or "timeout" in text or "timed out" in text or "failed to obtain" in text:
        return error_of(
            "TIMEOUT", f"{address.host} gave no answer in time: allow more, or ask for less at once"
        )
    unreachable = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
        "aiohttp",
        "geventhttpclient",
    )
    if unreachable or any(sign in text for sign in _GONE):
        return error_of(
            "UNAVAILABLE",
            f"{address.host} cannot answer at the moment ({message}); `regionspot-serve up` "
            "starts a server",
        )
    if "invalid_argument" in text or status == "400":
        return error_of("REQUEST_INVALID", message)
    return error_of("INTERNAL", message)


def _misnamed(text: str, address: Address) -> ServingError | None:
    """The error to report where the server's other port was named; None where nothing speaks for
    that.
    """
    if (
        address.protocol == "grpc"
        and any(sign in text for sign in _PERHAPS_HTTP)
        and _speaks_http(address.host)
    ):
        return error_of(
            "REQUEST_INVALID",
            f"{address.host} is an HTTP port: name the server's gRPC port (8001 unless told "
            f"otherwise), or write http://{address.host}",
        )
    if address.protocol == "http" and any(sign in text for sign in _NO_HTTP):
        return error_of(
            "REQUEST_INVALID",
            f"{address.host} does not speak HTTP: name the server's HTTP port (8000 unless told "
            f"otherwise), or write {address.host} if it is the gRPC port",
        )
    return None


def _speaks_http(host: str) -> bool:
    """Whether a port answers HTTP/1, asked at most PROBE_S at a time."""
    name, _, port = host.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), PROBE_S) as probe:
            probe.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return probe.recv(5) == b"HTTP/"
    except OSError:
        return False


class TritonRunner:
    """A `Runner` over a graph's model in a Triton server, whatever runs it there.

    Args:
        connection: to the server; it stays open when the runner is closed.
        spec: of the graph; see `spec_from_server`.
    """

    def __init__(self, connection: Connection, spec: GraphSpec) -> None:
        self.connection, self.spec = connection, spec

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`. What is kept are arrays."""
        check_feeds(self.spec, feeds)
        try:
            outputs = self.connection.infer(self.spec.name, feeds)
        except RequestError as error:
            raise InputError(
                f"{self.connection.address.host} refused {self.spec.name}: {error}"
            ) from error
        if missing := [name for name in self.spec.output_names if name not in outputs]:
            raise ArtifactError(
                f"{self.connection.address.host} answered {self.spec.name} without "
                f"{', '.join(missing)}"
            )
        found = {name: outputs[name] for name in self.spec.output_names}
        check_outputs(self.spec, feeds, found, self.connection.address.host, "Triton")
        return found

    def close(self) -> None:
        """Nothing to give back: the connection is the caller's."""

    def __enter__(self) -> TritonRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class TritonPipeline(RegionPipeline):
    """A `RegionPipeline` that closes its connection too."""

    def __init__(self, connection: Connection) -> None:
        public = connection.config()
        self._connection = connection
        configs: dict[str, dict[str, str]] = {}

        def config_of(graph: str) -> dict[str, str]:
            if graph not in configs:
                configs[graph] = connection.config(graph)
            return configs[graph]

        super().__init__(
            ModelInfo.from_json(json.loads(public["model_info"])),
            lambda graph: TritonRunner(
                connection, spec_from_json(json.loads(config_of(graph)["spec"]))
            ),
            runtime="triton",
            precision=json.loads(public["precision"]),
            fingerprint=lambda graph: config_of(graph)["fingerprint"],
            prompt_chunk=GPU_PROMPT_CHUNK,  # a round trip for each
            reopen=partial(pipeline_from_triton, str(connection.address), connection.timeout_s),
            text_input=lambda: TextInput(
                ClipTokenizer(tokenizer_json()), tuple(json.loads(public["templates"]))
            ),
        )

    def close(self) -> None:
        super().close()
        self._connection.close()


def pipeline_from_triton(url: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> RegionPipeline:
    """The whole model, each graph run by a server; the server's configuration says all about them.

    Raises:
        ServingError: the server cannot be reached, or is none of ours.
    """
    connection = Connection(url, timeout_s)
    try:
        return TritonPipeline(connection)
    except KeyError as error:
        connection.close()
        raise ArtifactError(
            f"{url} serves no regionspot model that this release knows: no parameter {error}"
        ) from error


def _without_signals(call: Callable[[], ResultT]) -> ResultT:
    """`call()`, in a thread in which no signal handler runs.

    gRPC reports what a handler raises while it serializes or deserializes a message as an error of
    its own. An interrupted call goes on in its thread until its time-out; its answer is dropped.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    answer: Future[ResultT] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer.result()


def _library(address: Address, for_asyncio: bool) -> ModuleType:
    if address.protocol == "grpc":
        return tritonclient.grpc.aio if for_asyncio else tritonclient.grpc
    try:
        return import_module("tritonclient.http.aio" if for_asyncio else "tritonclient.http")
    except ImportError as error:
        raise InputError(
            f"HTTP needs more of the Triton client ({error}): pip install 'tritonclient[http]'"
        ) from error


def _inputs(library: ModuleType, arrays: Mapping[str, Array]) -> list[Any]:
    made = []
    for name, array in arrays.items():
        tensor = library.InferInput(name, list(array.shape), _TYPES[array.dtype.kind])
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        made.append(tensor)
    return made


def _outputs(result: Any, address: Address) -> dict[str, Array]:
    response = result.get_response()
    tensors = response["outputs"] if address.protocol == "http" else response.outputs
    names = [tensor["name"] if address.protocol == "http" else tensor.name for tensor in tensors]
    return {name: result.as_numpy(name) for name in names}


def _delays() -> Iterator[float]:
    delay_s = FIRST_DELAY_S
    while True:
        yield delay_s * random.uniform(0.5, 1.0)
        delay_s = min(2 * delay_s, MAX_DELAY_S)

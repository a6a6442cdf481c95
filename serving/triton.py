"""Talking to a Triton server: connections over gRPC or HTTP, its errors as ours, retries, a
`Runner` over its models.

The only module that imports a Triton client.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import numpy as np

from regionspot.errors import ArtifactError, InputError
from regionspot.runtime.artifacts import spec_from_json
from regionspot.runtime.graph_spec import GraphSpec, ModelInfo
from regionspot.runtime.pipeline import GPU_PROMPT_CHUNK, RegionPipeline
from regionspot.runtime.runner import Array, Tensors, check_feeds, check_outputs
from regionspot.runtime.text_encoder import TextInput
from regionspot.runtime.tokenizer import ClipTokenizer, tokenizer_json
from regionspot.serving import calls
from regionspot.serving.address import Address, Credentials
from regionspot.serving.calls import DEFAULT_TIMEOUT_S, STUB_DIED, Attempts, without_signals
from regionspot.serving.contract import MODEL, RequestError, ServingError
from regionspot.serving.tracing import trace_headers
from regionspot.serving.triton_errors import translated

try:
    import tritonclient.grpc
    import tritonclient.grpc.aio
except ImportError as error:
    raise InputError(
        f"a Triton client is needed ({error}): pip install 'regionspot[serving]'"
    ) from error

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "STUB_DIED",
    "AsyncConnection",
    "Connection",
    "TritonPipeline",
    "TritonRunner",
    "pipeline_from_triton",
]

REQUIRED_GRAPH = "region_head"
"""Every model has it."""

_TYPES = {"b": "BOOL", "f": "FP32", "i": "INT32", "u": "UINT8", "O": "BYTES"}
_CHANNEL = [
    ("grpc.lb_policy_name", "round_robin"),  # one name may stand for several servers
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # gRPC's own is two minutes: too long for a server that was restarted
    ("grpc.max_reconnect_backoff_ms", 1000),
]
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 15, 20
"""A server that is silent for so long is pinged, and given up if it then stays silent."""

SAFE_PINGS = 4
"""Of one silence. Triton takes more of a client's that come sooner than 5 minutes after each other
for an attack, unless told otherwise, and ends the connection with all requests on it."""

MAX_KEEPALIVE_S = 7200
ResultT = TypeVar("ResultT")


class _Connector:
    """What connections of both kinds share: where the server is, how long to try, and Triton's
    calls.

    A call takes a client and the seconds left; over asyncio it gives something to await.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        retry: bool,
        credentials: Credentials,
        for_asyncio: bool,
    ) -> None:
        self.address = Address.parse(url)
        credentials.check_for(self.address)
        self.timeout_s, self.credentials = timeout_s, credentials
        self._retry, self._for_asyncio = retry, for_asyncio
        self._library = _library(self.address, for_asyncio)
        self._grpc_clients: dict[int, Any] = {}  # by the interval of their pings

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self.timeout_s if timeout_s is None else timeout_s, self._retry)

    def _inference(
        self, model: str, inputs: Mapping[str, Array], request_id: str
    ) -> Callable[[Any, float], Any]:
        headers = trace_headers()

        def ask(client: Any, left_s: float) -> Any:
            tensors = _inputs(self._library, inputs)
            return client.infer(
                model, tensors, request_id=request_id, headers=headers, **self._limit(left_s)
            )

        return ask

    def _model_config(self, model: str) -> Callable[[Any, float], Any]:
        options = {"as_json": True} if self.address.is_grpc else {}
        return lambda client, left_s: client.get_model_config(
            model, **options, **self._limit(left_s)
        )

    def _parameters(self, content: Mapping[str, Any]) -> dict[str, str]:
        """Of a model's configuration."""
        config = content["config"] if self.address.is_grpc else content
        return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}

    def _translated(self, error: Exception) -> ServingError:
        return translated(error, self.address)

    def _limit(self, left_s: float) -> dict[str, float]:
        return {"client_timeout": left_s} if self.address.is_grpc else {}

    def _http_client(self, **limits: float) -> Any:
        """A new client of the library's; `limits` are of HTTP."""
        options = {**limits, **self._http_tls()}
        return self._made_client(options)

    def _grpc_client_for(self, timeout_s: float) -> Any:
        """The client for calls of that time-out: there is one unless time-outs differ much."""
        interval_s = keepalive_s(timeout_s)
        if interval_s not in self._grpc_clients:
            self._grpc_clients[interval_s] = self._grpc_client(interval_s)
        return self._grpc_clients[interval_s]

    def _grpc_client(self, interval_s: int) -> Any:
        """A new client that pings a silent server after `interval_s`."""
        keepalive = [
            ("grpc.keepalive_time_ms", interval_s * 1000),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
            # gRPC measures the bandwidth by pings, too; one that is lost counts for a minute
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
            ("grpc.http2.max_pings_without_data", 0),  # else the third waits for a minute
        ]
        name = self.credentials.server_name
        named = [] if name is None else [("grpc.ssl_target_name_override", name)]
        return self._made_client(
            {"channel_args": [*_CHANNEL, *keepalive, *named], **self._grpc_tls()}
        )

    def _made_client(self, options: Mapping[str, Any]) -> Any:
        return self._library.InferenceServerClient(
            f"{self.address.host}{self.address.path}", **options
        )

    def _grpc_tls(self) -> dict[str, Any]:
        if not self.address.is_tls:
            return {}
        files = self.credentials.files
        names = {
            "root_certificates": "ca_file",
            "certificate_chain": "client_cert_file",
            "private_key": "client_key_file",
        }
        given = {name: str(files[own]) for name, own in names.items() if own in files}
        return {"ssl": True, **given}

    def _http_tls(self) -> dict[str, Any]:
        if not self.address.is_tls:
            return {}
        if self._for_asyncio:
            return {"ssl": True, "ssl_context": self.credentials.ssl_context()}
        # geventhttpclient wants a context of gevent's, and hands its own authorities over
        return {
            "ssl": True,
            "ssl_context_factory": lambda **_: self.credentials.ssl_context(
                import_module("gevent.ssl")
            ),
        }


class Connection(_Connector):
    """To one server, kept open. Safe to share between threads; over HTTP each has a connection of
    its own.

    Args:
        timeout_s: of each call, retries included.
        retry: ask again where that may help.
        ca_file, client_cert_file, client_key_file: of grpcs and https, see `Credentials`.
        server_name: of grpcs, see `Credentials`.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: bool = True,
        *,
        ca_file: str | Path | None = None,
        client_cert_file: str | Path | None = None,
        client_key_file: str | Path | None = None,
        server_name: str | None = None,
    ) -> None:
        credentials = Credentials(None, ca_file, client_cert_file, client_key_file, server_name)
        super().__init__(url, timeout_s, retry, credentials, for_asyncio=False)
        self._opened = threading.local()  # over HTTP
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
        return calls.call(
            attempts, lambda left_s: self._ask(ask, attempts.timeout_s, left_s), self._translated
        )

    def _ask(
        self, ask: Callable[[Any, float], ResultT], timeout_s: float, left_s: float
    ) -> ResultT:
        if self.address.is_grpc:
            return without_signals(lambda: ask(self._open(timeout_s), left_s))
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

    def is_ready(self, model: str) -> bool:
        """Whether a model is loaded and answers."""
        return bool(
            self.call(lambda client, left: client.is_model_ready(model, **self._limit(left)))
        )

    def all_statistics(self, model: str = "") -> dict[str, dict[str, Any]]:
        """Of each model of the server, by its name; of one alone where it is named."""
        if self.address.is_grpc:
            content = self.call(
                lambda client, left: client.get_inference_statistics(
                    model, as_json=True, **self._limit(left)
                )
            )
        else:
            content = self.call(lambda client, _: client.get_inference_statistics(model))
        return {found["name"]: dict(found) for found in content["model_stats"]}

    def close(self) -> None:
        """Closes the connection: over HTTP, the one of this thread. A later call opens another."""
        if not self.address.is_grpc:
            self._close_http()
            return
        with self._lock:
            clients, self._grpc_clients = self._grpc_clients, {}
        for client in clients.values():
            client.close()

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
        with self._lock:
            if self.address.is_grpc:
                return self._grpc_client_for(timeout_s)
            opened = self._opened
            if getattr(opened, "timeout_s", timeout_s) != timeout_s:
                self._close_http()  # a time-out belongs to the connection
            if getattr(opened, "client", None) is None:
                opened.client = self._http_client(
                    connection_timeout=min(timeout_s, 5.0), network_timeout=timeout_s
                )
                opened.timeout_s = timeout_s
            return opened.client

    def _close_http(self) -> None:
        client, self._opened.client = getattr(self._opened, "client", None), None
        if client is not None:
            client.close()


class AsyncConnection(_Connector):
    """As `Connection`, for asyncio. A task that is cancelled cancels its request."""

    def __init__(
        self,
        url: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: bool = True,
        *,
        ca_file: str | Path | None = None,
        client_cert_file: str | Path | None = None,
        client_key_file: str | Path | None = None,
        server_name: str | None = None,
    ) -> None:
        credentials = Credentials(None, ca_file, client_cert_file, client_key_file, server_name)
        super().__init__(url, timeout_s, retry, credentials, for_asyncio=True)
        self._opened: Any = None  # over HTTP

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
        return await calls.call_async(
            attempts, lambda left_s: ask(self._open(attempts.timeout_s), left_s), self._translated
        )

    async def close(self) -> None:
        clients = [*self._grpc_clients.values(), self._opened]
        self._grpc_clients, self._opened = {}, None
        for client in clients:
            if client is not None:
                await client.close()

    def _open(self, timeout_s: float) -> Any:
        if self.address.is_grpc:
            return self._grpc_client_for(timeout_s)
        if self._opened is None:
            self._opened = self._http_client()
        return self._opened


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
            reopen=partial(
                pipeline_from_triton,
                str(connection.address),
                connection.timeout_s,
                **connection.credentials.files,
            ),
            text_input=lambda: TextInput(
                ClipTokenizer(tokenizer_json()), tuple(json.loads(public["templates"]))
            ),
        )

    def close(self) -> None:
        super().close()
        self._connection.close()


def pipeline_from_triton(
    url: str, timeout_s: float = DEFAULT_TIMEOUT_S, **tls_files: Any
) -> RegionPipeline:
    """The whole model, each graph run by a server; the server's configuration says all about them.

    Args:
        tls_files: ca_file, client_cert_file and client_key_file, as of `Connection`.

    Raises:
        InputError: the server has not loaded the graphs.
        ServingError: the server cannot be reached, or is none of ours.
    """
    connection = Connection(url, timeout_s, **tls_files)
    try:
        pipeline = TritonPipeline(connection)
        if not connection.is_ready(REQUIRED_GRAPH):
            pipeline.close()
            raise InputError(
                f"the server at {url} has not loaded the graphs as models of their own: start it "
                "with `regionspot-serve up --all-models`, or name a gateway in front of it, "
                "http://HOST:PORT"
            )
        return pipeline
    except KeyError as error:
        connection.close()
        raise ArtifactError(
            f"{url} serves no regionspot model that this release knows: no parameter {error}"
        ) from error


def keepalive_s(timeout_s: float) -> int:
    """After how many seconds of silence a server is pinged by calls of a time-out: so late that
    SAFE_PINGS last until then.
    """
    interval_s = KEEPALIVE_S
    while SAFE_PINGS * interval_s < timeout_s and interval_s < MAX_KEEPALIVE_S:
        interval_s *= 2
    return interval_s


def _library(address: Address, for_asyncio: bool) -> ModuleType:
    if address.is_grpc:
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
    if address.is_grpc:
        names = [tensor.name for tensor in response.outputs]
    else:
        names = [tensor["name"] for tensor in response["outputs"]]
    return {name: result.as_numpy(name) for name in names}

"""`regionspot-serve init|up|down|web`: a Triton model repository out of artefacts, and the server
over it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.errors import InputError
from regionspot.logs import JsonFormatter, log_to
from regionspot.runtime.tolerance import PRECISIONS

if TYPE_CHECKING:
    from regionspot.serving.ports import Ports
    from regionspot.serving.records import ServerRecord
    from regionspot.serving.server import ServerOptions, TritonServer

STDOUT = Path("-")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PYPI_HTTP_WARNING = (
    "warning: one HTTP request can crash this Triton, of PyPI (CVE-2025-23310, CVE-2025-23311): "
    "use --http-port for callers that you trust"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-serve",
        description="Serve a model with Triton Inference Server: on a laptop, and in production.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_init(commands)
    _add_up(commands)
    _add_down(commands)
    _add_web(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    run = {"init": _init, "up": _up, "down": _down, "web": _web}[arguments.command]
    return run(arguments)


def _add_init(commands: Any) -> None:
    init = commands.add_parser("init", help="make a model repository out of artefacts")
    init.add_argument("--artifacts", required=True, metavar="DIR", help="from regionspot-export")
    init.add_argument(
        "--out",
        required=True,
        metavar="REPO",
        help="the repository; another target may be added to one",
    )
    init.add_argument(
        "--target",
        default="cpu",
        metavar="cpu|tensorrt|onnxruntime",
        help="a CPU, or a GPU by Triton's backend of that name; several with commas (default: cpu)",
    )
    init.add_argument(
        "--runtime",
        choices=("openvino", "onnxruntime"),
        help="on a CPU (default: openvino if exported)",
    )
    init.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="default: fp32 on a CPU, fp16 on a GPU, or what was exported",
    )
    init.add_argument(
        "--vocabulary",
        metavar="NAME=WORDS|FILE|PRESET",
        action="append",
        dest="vocabularies",
        help="register words under a name, so that nobody need send them (default: mini's own "
        "with regionspot_mini)",
    )
    init.add_argument(
        "--drop-vocabulary",
        metavar="NAME",
        action="append",
        dest="drop_vocabularies",
        default=[],
        help="forget a vocabulary that the repository has; all others are kept",
    )
    init.add_argument(
        "--limit",
        metavar="NAME=N",
        action="append",
        dest="limits",
        default=[],
        help="change a limit of requests, such as max_regions=100 or image_cache_mb=4096",
    )
    init.add_argument(
        "--allow-unverified",
        action="store_true",
        help="also serve engines that were never compared with the model",
    )
    init.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="of the GPU that will serve, which everything must fit into (default: of this "
        "machine's, if it has one)",
    )
    init.add_argument(
        "--graphs",
        choices=("in_process", "triton"),
        help="on a CPU, where the public model runs its graphs: inside (default, faster) or as "
        "models of their own",
    )
    init.add_argument(
        "--flat",
        action="store_true",
        help="also write config.pbtxt files, for servers started without --model-config-name "
        "(KServe's)",
    )


def _add_up(commands: Any) -> None:
    up = commands.add_parser(
        "up", help="start the server, wait until it answers, and keep it answering"
    )
    up.add_argument(
        "--repository", required=True, metavar="REPO", help="from `regionspot-serve init`"
    )
    up.add_argument(
        "--target", metavar="NAME", help="of the repository (default: its only one, or cpu)"
    )
    up.add_argument(
        "--instances",
        type=int,
        metavar="N",
        help="of the model, that answer side by side on a CPU; each has a copy of the weights "
        "(default: up to 4, one for each core, as far as memory allows)",
    )
    up.add_argument(
        "--threads",
        type=int,
        metavar="M",
        help="of each instance (default: the cores are shared out, and an image that is alone gets "
        "all of them)",
    )
    up.add_argument(
        "--all-models",
        action="store_true",
        help="also load each graph as a model of its own, which regionspot-eval --runtime triton "
        "asks one by one",
    )
    up.add_argument(
        "--http-port",
        type=int,
        metavar="P",
        help="also listen for Triton's HTTP on this port, 0 for a free one (default: no HTTP)",
    )
    up.add_argument(
        "--grpc-port",
        type=int,
        default=8001,
        metavar="Q",
        help="0 for a free one (default: %(default)s)",
    )
    up.add_argument(
        "--metrics-port",
        type=int,
        metavar="M",
        help="0 for a free one (default: 8002, or a free one if that is in use)",
    )
    up.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on, of IPv4 or IPv6 (default: %(default)s, this machine alone)",
    )
    up.add_argument(
        "--allow-remote",
        action="store_true",
        help="allow a --host that other machines can reach: anybody who does may use the server, "
        "which has no authentication, and no TLS without --tls-cert",
    )
    tls = {
        "--tls-cert": "the gRPC port's certificate, for localhost too; also a client's",
        "--tls-key": "its key",
        "--tls-client-ca": "roots that vouch for it and for what clients must show",
    }
    for option, meaning in tls.items():
        up.add_argument(option, type=Path, metavar="FILE", help=meaning)
    up.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="of a collector of traces (OpenTelemetry's OTLP over HTTP), such as "
        "http://collector:4318; Triton traces every request (default: none)",
    )
    up.add_argument(
        "--detach", action="store_true", help="return once it answers, and leave it running"
    )
    up.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="the server's output; - is that of this command (default: in --home)",
    )
    _add_home(up)


def _add_down(commands: Any) -> None:
    down = commands.add_parser("down", help="stop servers that `up` started")
    down.add_argument(
        "--grpc-port", type=int, metavar="Q", help="only the one of this port (default: all)"
    )
    _add_home(down)


def _add_web(commands: Any) -> None:
    web = commands.add_parser(
        "web", help="a page to try the model, and a guarded HTTP API, in front of a server"
    )
    web.add_argument(
        "--url",
        default="127.0.0.1:8001",
        metavar="HOST:Q",
        help="the server's gRPC port; grpcs://HOST:Q over TLS; several with commas, or a name with "
        "several addresses: each image goes to one of them (%(default)s)",
    )
    web.add_argument(
        "--port", type=int, default=8080, metavar="W", help="to listen on (default: %(default)s)"
    )
    web.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    web.add_argument(
        "--concurrency",
        type=int,
        default=4,
        metavar="N",
        help="requests at the server at once (%(default)s)",
    )
    web.add_argument(
        "--max-waiting",
        type=int,
        default=32,
        metavar="N",
        help="others that may wait (%(default)s)",
    )
    web.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of one request (%(default)s)",
    )
    web.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="requests must bring its first line as a bearer token",
    )
    web.add_argument(
        "--vocabularies",
        type=Path,
        metavar="DIR",
        help="a folder of vocabularies, a file each: those that callers put are stored there, and "
        "files that change are read again (default: what callers put is kept in memory)",
    )
    web.add_argument(
        "--canary-url",
        metavar="HOST:Q",
        help="servers with another release of the model, which get a share of the images",
    )
    web.add_argument(
        "--canary-share",
        type=float,
        default=0.05,
        metavar="S",
        help="of the images, from 0 to 1 (default: %(default)s)",
    )
    web.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="of a collector of traces (OpenTelemetry's OTLP over HTTP), such as "
        "http://collector:4318 (default: that of OTEL_EXPORTER_OTLP_ENDPOINT, or none)",
    )
    _add_access(web)
    _add_tls(web)


def _add_access(web: argparse.ArgumentParser) -> None:
    """Who may ask the gateway, from where, and how much."""
    web.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="in place of --token-file: TOML with named tokens and their quotas "
        "(docs/serve/http.md)",
    )
    web.add_argument(
        "--metrics-token-file",
        type=Path,
        metavar="FILE",
        help="its first line is the token of /metrics, and of nothing else",
    )
    web.add_argument(
        "--allow-anonymous",
        action="store_true",
        help="without a token, also listen where other machines reach the gateway",
    )
    web.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        help="a name that requests may use for this gateway (default without a token: those of "
        "this machine)",
    )
    web.add_argument(
        "--trusted-proxy",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="a proxy, or a network of them, whose X-Forwarded-For is believed",
    )
    web.add_argument(
        "--max-connections",
        type=int,
        default=1024,
        metavar="N",
        help="open ones; beyond it, idle ones are closed (%(default)s)",
    )
    web.add_argument(
        "--buffer-mib",
        type=int,
        default=256,
        metavar="MIB",
        help="memory for requests that wait or are answered (%(default)s)",
    )


def _add_tls(web: argparse.ArgumentParser) -> None:
    ends = {
        "--tls-cert": "the gateway's certificate: it speaks https",
        "--tls-key": "its key",
        "--tls-client-ca": "callers must show a certificate that these roots vouch for",
        "--upstream-ca": "the roots that vouch for the server's certificate, with grpcs://",
        "--upstream-cert": "the certificate to show to the server",
        "--upstream-key": "its key",
    }
    for option, meaning in ends.items():
        web.add_argument(option, type=Path, metavar="FILE", help=meaning)


def _add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, metavar="DIR", help="where the Triton server and its logs are kept"
    )


def _init(arguments: argparse.Namespace) -> int:
    from regionspot.serving.contract import Limits
    from regionspot.serving.repository import RepositoryOptions, make_repository

    limits = Limits.from_json(Limits().to_json() | _limits(arguments.limits))
    vocabularies = None
    if arguments.vocabularies is not None:
        vocabularies = dict(
            _pair(text, "--vocabulary", 'NAME=WORDS, such as pets="cat,dog"')
            for text in arguments.vocabularies
        )
    gpu_memory_mib = _mebibytes(arguments.gpu_memory)
    if arguments.flat and "," in arguments.target:
        raise InputError("--flat is for one target: its configuration is the only one found")
    for target in arguments.target.split(","):
        options = RepositoryOptions(
            target=target.strip(),
            runtime=arguments.runtime if target.strip() == "cpu" else None,
            precision=arguments.precision,
            vocabularies=vocabularies,
            drop_vocabularies=arguments.drop_vocabularies,
            limits=limits,
            graphs=arguments.graphs if target.strip() == "cpu" else None,
            allow_unverified=arguments.allow_unverified,
            gpu_memory_mib=gpu_memory_mib,
            flat=arguments.flat,
        )
        names = make_repository(arguments.artifacts, arguments.out, options)
        print(f"{arguments.out} serves {len(names)} models on {options.target}: {', '.join(names)}")
        if options.target != "cpu":
            _tell_about_gpu(arguments.out, options.target)
    print(
        f"start it with\n  {shlex.join(['regionspot-serve', 'up', '--repository', arguments.out])}"
    )
    return 0


def _mebibytes(gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 < gib < 1e6:  # false for NaN, too
        raise InputError(f"--gpu-memory is the GPU's memory in GiB, such as 24, not {gib}")
    return int(gib * 1024)


def _tell_about_gpu(repository: str, target: str) -> None:
    """Prints the memory that a target takes, and warns of engines that will not load here."""
    from regionspot.serving.gpu import first_gpu
    from regionspot.serving.repository import graphs_on_gpu

    graphs = graphs_on_gpu(repository, target)
    print(f"it takes about {graphs.memory()}")
    gpu = first_gpu()
    for problem in graphs.why_not_loadable(gpu) if gpu else ():
        print(f"warning: on this machine the engine {problem}", file=sys.stderr)


def _limits(pairs: Sequence[str]) -> dict[str, int]:
    from regionspot.serving.contract import Limits

    known, found = Limits().to_json(), {}
    for text in pairs:
        name, value = _pair(text, "--limit", "NAME=N, such as max_regions=100")
        if name not in known or not value.isdecimal():
            raise InputError(
                f"--limit {text}: there is no such limit; they are whole numbers: "
                f"{', '.join(known)}"
            )
        found[name] = int(value)
    return found


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise InputError(f"{option} {text}: write {form}")
    return name, value


def server_options(arguments: argparse.Namespace, target: str | None) -> ServerOptions:
    """Of `up`, with the target that the repository is served for."""
    from regionspot.serving.server import ServerOptions
    from regionspot.serving.tls import ServerTls

    return ServerOptions(
        target,
        arguments.instances,
        arguments.threads,
        arguments.all_models,
        ServerTls.of(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca),
        arguments.otlp_endpoint,
    )


def _up(arguments: argparse.Namespace) -> int:
    from regionspot.locks import locked
    from regionspot.serving.environment import default_home, find_installation
    from regionspot.serving.leftovers import delete_unused
    from regionspot.serving.ports import Ports
    from regionspot.serving.processes import start_ticks
    from regionspot.serving.records import ServerRecord, start_detached
    from regionspot.serving.repository import check_repository
    from regionspot.serving.server import TritonServer, choose_target

    home = _absolute(arguments.home or default_home())
    target = choose_target(arguments.repository, arguments.target)
    options = server_options(arguments, target)
    ports = Ports(arguments.http_port, arguments.grpc_port, arguments.metrics_port, arguments.host)
    _check_host(ports, arguments.allow_remote)
    ports = ports.resolved()
    installation = find_installation(home)
    delete_unused(home, installation)
    if arguments.detach:
        began = time.perf_counter()
        found = start_detached(arguments.repository, home, ports, options, arguments.log)
        print(_where(found, time.perf_counter() - began))
        print("it runs until `regionspot-serve down`")
        return 0
    log = (
        None
        if arguments.log == STDOUT
        else _absolute(arguments.log or home / "logs" / f"{ports.key}.log")
    )
    running = ServerRecord(
        os.getpid(),
        start_ticks(os.getpid()) or 0,
        str(arguments.repository),
        target,
        str(log or STDOUT),
        ports,
        uses=installation.folders,
    )
    server = TritonServer(installation, arguments.repository, ports, log, options)
    check_repository(server.repository, target, server.models)
    if ports.http is not None and installation.folders:
        print(PYPI_HTTP_WARNING, file=sys.stderr)
    busy = (
        f"another server of gRPC port {ports.grpc} is starting or running: choose another "
        "--grpc-port"
    )
    with locked(home / "running" / f"port-{ports.key}", busy=busy):
        _serve(server, running, home)
    print("stopped", flush=True)
    return 0


def _check_host(ports: Ports, allow_remote: bool) -> None:
    if not ports.is_local and not allow_remote:
        raise InputError(
            f"--host {ports.host} can be reached by other machines, and the server has neither "
            "authentication nor TLS: whoever reaches its ports can use it and make it fail. Put "
            "`regionspot-serve web` in front of it and leave the server on 127.0.0.1; or add "
            "--allow-remote where a firewall or a network policy decides who gets through"
        )


def _absolute(path: Path) -> Path:
    """Without links, as far as there are any; a loop of them stays for whoever opens it to
    refuse.
    """
    return Path(os.path.realpath(path))


def _serve(server: TritonServer, running: ServerRecord, home: Path) -> None:
    """Until a signal comes."""
    from regionspot.serving.records import output_of
    from regionspot.serving.supervisor import Supervisor

    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)
    try:
        began = time.perf_counter()
        running.write(home)
        server.start()
        server.wait_ready()
        ready = replace(running, ready=True)
        ready.write(home)
        print(_where(ready, time.perf_counter() - began), flush=True)
        with log_to("stdout", JsonFormatter()):
            Supervisor(server, output_of(home, running.ports)).run()
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()
        running.remove(home)


def _interrupt(*_: object) -> None:
    """The first signal ends the work in hand; others must not interrupt the cleaning up."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _where(running: ServerRecord, seconds: float) -> str:
    ports = running.ports
    lines = [
        f"{running.repository} is served on {running.target}; ready after {seconds:.1f} s",
        f"  gRPC     {ports.grpc_url}   regionspot-query photo.jpg --url {ports.grpc_url} ...",
    ]
    if ports.http is not None:
        lines.append(f"  HTTP     {ports.http_url}")
    return "\n".join([*lines, f"  metrics  {ports.metrics_url}", f"  log      {running.log}"])


def _down(arguments: argparse.Namespace) -> int:
    from regionspot.serving.environment import default_home
    from regionspot.serving.records import ServerRecord, stop_server

    home = _absolute(arguments.home or default_home())
    found = [
        one for one in ServerRecord.read_all(home) if arguments.grpc_port in (None, one.ports.grpc)
    ]
    if not found:
        where = "" if arguments.grpc_port is None else f" of gRPC port {arguments.grpc_port}"
        print(f"no server{where} is running that `regionspot-serve up` started")
        return 0
    for running in found:
        stop_server(running)
        print(f"stopped {running.repository}, gRPC port {running.ports.grpc}")
    return 0


def _web(arguments: argparse.Namespace) -> int:
    from regionspot.serving.gateway import GatewaySettings, TlsFiles, run

    settings = GatewaySettings(
        url=arguments.url,
        canary_url=arguments.canary_url,
        canary_share=arguments.canary_share,
        vocabularies=arguments.vocabularies,
        concurrency=arguments.concurrency,
        max_waiting=arguments.max_waiting,
        timeout_s=arguments.timeout,
        max_buffered_bytes=arguments.buffer_mib << 20,
        token_file=arguments.token_file,
        tokens_file=arguments.tokens,
        metrics_token_file=arguments.metrics_token_file,
        allow_anonymous=arguments.allow_anonymous,
        allowed_hosts=_hosts(arguments),
        trusted_proxies=tuple(arguments.trusted_proxy),
        max_connections=arguments.max_connections,
        tls=TlsFiles(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca),
        upstream_tls=TlsFiles(
            arguments.upstream_cert, arguments.upstream_key, arguments.upstream_ca
        ),
        otlp_endpoint=arguments.otlp_endpoint,
    )
    run(settings, arguments.host, arguments.port)
    return 0


def _hosts(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """The names of the gateway; those of this machine are always among them."""
    from regionspot.serving.gateway.settings import LOOPBACK_HOSTS

    given = arguments.allowed_host
    return None if given is None else (*LOOPBACK_HOSTS, *given)

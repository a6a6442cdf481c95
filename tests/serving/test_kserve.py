"""What KServe is given: its two files against KServe's own models and our code, and a repository
that a plain Triton serves.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from regionspot.cli import serve
from regionspot.errors import InputError
from regionspot.serving import canary
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import ServingError
from regionspot.serving.environment import find_installation
from regionspot.serving.repository import RepositoryOptions, make_repository
from regionspot.serving.server import READY_TIMEOUT_S
from tests.serving.chart import CHART, DEPLOY

KSERVE = DEPLOY / "kserve"


@pytest.fixture(scope="module")
def runtime() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KSERVE / "servingruntime.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KSERVE / "inferenceservice.yaml").read_text())
    return found


def test_the_runtime_starts_what_we_have(runtime: dict[str, Any]) -> None:
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    words = [*container["command"], *container["args"]]
    assert words[0] == "regionspot-serve"
    arguments = serve.build_parser().parse_args(words[1:])
    assert (arguments.command, arguments.repository) == ("up", "/mnt/models")
    probe = container["readinessProbe"]["exec"]["command"]
    assert canary.main([*probe[3:], "--url", "127.0.0.1:9", "--timeout", "0.2"]) == 1
    assert f"127.0.0.1:{arguments.grpc_port}" in probe
    assert container["livenessProbe"]["grpc"] == {"port": arguments.grpc_port}
    annotations = runtime["spec"]["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(arguments.metrics_port)
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= READY_TIMEOUT_S


def test_the_service_finds_the_runtime(runtime: dict[str, Any], service: dict[str, Any]) -> None:
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    (supported,) = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"].items() <= supported.items()
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    (port,) = model["ports"]
    position = container["args"].index("--grpc-port")
    assert container["args"][position + 1] == str(port["containerPort"])


def test_the_runtime_s_pod_is_one_and_has_the_chart_s_sizes(runtime: dict[str, Any]) -> None:
    spec = runtime["spec"]
    pod = {"containers": spec["containers"], "volumes": spec["volumes"]}
    kubernetes = import_module("kubernetes_validate")
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}
    kubernetes.validate(document, kubernetes.latest_version(), strict=True)
    chart = yaml.safe_load((CHART / "values-cpu.yaml").read_text())["triton"]
    assert spec["containers"][0]["resources"] == chart["resources"]
    version = re.search(r'appVersion: "(.+)"', (CHART / "Chart.yaml").read_text())
    assert version
    image = f"REGISTRY/{chart['image']['repository']}:{version[1]}"
    assert spec["containers"][0]["image"] == image


@contextlib.contextmanager
def plain_triton(repository: Path, home: Path) -> Iterator[str]:
    """A Triton server as KServe starts one, with no option of ours; its gRPC address."""
    installation = find_installation(home)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(installation.executable), f"--model-store={repository}"]
    command += [f"--backend-directory={installation.backends}", f"--grpc-port={port}"]
    command += ["--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false"]
    log = repository.parent / "triton.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=installation.environment(), cwd="/"
        )
    try:
        _wait(process, f"127.0.0.1:{port}", log)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(ServingError), RegionClient(url, 5.0, retry=False) as client:
            client.info()
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_a_flat_repository_is_served_by_a_plain_triton(
    mini_artifacts_with_masks: Path, home: Path, tmp_path: Path, picture: Path, client: RegionClient
) -> None:
    flat = tmp_path / "flat"
    names = make_repository(
        mini_artifacts_with_masks,
        flat,
        RepositoryOptions(vocabularies={"pets": "cat,dog"}, flat=True),
    )
    for name in names:
        config = flat / name / "configs" / "cpu.pbtxt"
        assert (flat / name / "config.pbtxt").read_bytes() == config.read_bytes()
    with plain_triton(flat, home) as url, RegionClient(url) as plain:
        found = plain.recognize(picture, [[5, 5, 90, 90]], "pets", return_masks=True)
    expected = client.recognize(picture, [[5, 5, 90, 90]], "pets", return_masks=True)
    assert found.class_names == expected.class_names
    assert found.scores.tolist() == expected.scores.tolist()
    assert found.masks == expected.masks


def test_a_repository_is_flat_only_while_it_is_asked_for(
    mini_artifacts_with_masks: Path, tmp_path: Path
) -> None:
    words = ["init", "--artifacts", str(mini_artifacts_with_masks), "--out", str(tmp_path / "repo")]
    for options, count in ((["--flat"], 9), ([], 0)):
        assert serve.main([*words, *options]) == 0
        assert len(list((tmp_path / "repo").glob("*/config.pbtxt"))) == count
    with pytest.raises(InputError, match="--flat is for one target"):
        serve.main([*words, "--flat", "--target", "cpu,tensorrt"])

"""What monitoring is told: metrics that a real server and a real gateway show, the rules that
servers are scaled by, evaluated on what a busy server shows, and the dashboard.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from regionspot.serving.client import RegionClient
from regionspot.serving.gateway import GatewaySettings
from regionspot.serving.records import ServerRecord
from tests.serving.chart import CHART, DEPLOY, documents_of, one, run_helm, values_of
from tests.serving.test_gateway import running

promql: Any = import_module("promql_parser")
DASHBOARD = DEPLOY / "grafana" / "regionspot.json"
OF_GPUS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes"}
"""Triton shows them where there is a GPU (docs/user_guide/metrics.md of its 26.10 release)."""

WAITING = 30
AT_WORK = 6
"""Images that the server of these tests, with two instances, works on or decodes at once."""


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


def samples_of(text: str, **target_labels: str) -> list[Sample]:
    """Those of a page of metrics, as Prometheus keeps them: with the labels of their target, and by
    the names on the page, to which the parser adds `_total`.
    """
    names = set(re.findall(r"^[a-z0-9_]+", text, re.MULTILINE))

    def name_of(found: str) -> str:
        return found if found in names else found.removesuffix("_total")

    return [
        Sample(name_of(found.name), found.labels | target_labels, found.value)
        for family in text_string_to_metric_families(text)
        for found in family.samples
    ]


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def server_page(server: ServerRecord) -> str:
    return page(server.ports.metrics_url)


@pytest.fixture(scope="module")
def gateway_page(server: ServerRecord, picture: Path) -> str:
    """Of a gateway that has answered a question and refused one: labels come with their values."""
    question = json.dumps({"boxes": [[5, 5, 90, 90]], "vocabulary": "mini"})
    files: dict[str, Any] = {"request": (None, question)}
    with running(GatewaySettings(url=server.ports.grpc_url)) as gateway:
        assert gateway.post("/v1/recognize", files=files).status_code == 400
        files["image"] = ("toys.jpg", picture.read_bytes())
        assert gateway.post("/v1/recognize", files=files).status_code == 200
        return gateway.get("/metrics").text


def evaluate(query: str, samples: list[Sample]) -> dict[tuple[tuple[str, str], ...], float]:
    """What Prometheus answers to `sum [by (...)] (metric{...})`: labels -> value."""
    tree = promql.parse(query)
    assert isinstance(tree, promql.AggregateExpr) and str(tree.op) == "sum", query
    selector = tree.expr
    assert isinstance(selector, promql.VectorSelector), query
    wanted = [s for s in samples if s.name == selector.name and _match(selector, s.labels)]
    kept = tree.modifier.labels if tree.modifier is not None else []
    found: dict[tuple[tuple[str, str], ...], float] = {}
    for sample in wanted:
        key = tuple((name, sample.labels.get(name, "")) for name in kept)
        found[key] = found.get(key, 0.0) + sample.value
    return found


def _match(selector: Any, labels: dict[str, str]) -> bool:
    return all(
        _matches(labels.get(matcher.name, ""), matcher) for matcher in selector.matchers.matchers
    )


def _matches(value: str, matcher: Any) -> bool:
    if matcher.op == promql.MatchOp.Equal:
        return bool(value == matcher.value)
    assert matcher.op == promql.MatchOp.Re, matcher.op
    return re.fullmatch(matcher.value, value) is not None


def selectors(query: str) -> Iterator[Any]:
    """The vector selectors of a query."""
    waiting = [promql.parse(query)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, promql.VectorSelector):
            yield node
            continue
        for name in ("expr", "lhs", "rhs", "vs", "args", "vector_selector"):
            below = getattr(node, name, None)
            waiting += below if isinstance(below, list) else [below] if below is not None else []


@pytest.fixture(scope="module")
def queries() -> dict[str, str]:
    """How each way of scaling asks, in the namespace `prod`, of the release `demo`."""
    pytest.importorskip("helm_python", reason="helm-python-sdk has wheels for x86-64")
    adapter = {"metrics": {"adapterRule": {"enabled": True}}}
    answers = run_helm({**values_of(), **adapter}, values_of("keda"))["answers"]
    rule, keda = map(documents_of, answers)
    (config,) = yaml.safe_load(one(rule, "ConfigMap", "monitoring")["data"]["config.yaml"])["rules"]
    (trigger,) = one(keda, "ScaledObject", "triton")["spec"]["triggers"]
    by_pod = config["metricsQuery"].replace("<<.GroupBy>>", "pod")
    matchers = 'namespace="prod",pod=~"demo-triton-1-a|demo-triton-1-b"'
    return {
        "adapter": by_pod.replace("<<.LabelMatchers>>", matchers),
        "keda": trigger["metadata"]["query"],
    }


def test_requests_that_wait_raise_what_servers_are_scaled_by(
    server: ServerRecord, picture: Path, queries: dict[str, str]
) -> None:
    """Requests that take long keep others waiting, and those count."""
    many = np.tile(np.array([[5, 5, 90, 90]], np.float32), (300, 1))

    def ask() -> None:
        with RegionClient(server.ports.grpc_url, 300) as client:
            client.recognize(picture, many, "mini", return_masks=True)

    def scraped() -> list[Sample]:
        text = page(server.ports.metrics_url)
        busy = samples_of(text, namespace="prod", pod="demo-triton-1-a")
        # another server, an idle one, and one of another release
        idle = [Sample(s.name, s.labels | {"pod": "demo-triton-1-b"}, 0.0) for s in busy]
        foreign = [Sample(s.name, s.labels | {"pod": "other-triton-1-c"}, 1e3) for s in busy]
        return busy + idle + foreign

    assert evaluate(queries["keda"], scraped()) == {(): 0.0}
    callers = [threading.Thread(target=ask) for _ in range(WAITING + AT_WORK)]
    for caller in callers:
        caller.start()
    most: dict[str, Any] = {"keda": {(): 0.0}, "adapter": {}}
    while any(caller.is_alive() for caller in callers):
        samples = scraped()
        if evaluate(queries["keda"], samples)[()] > most["keda"][()]:
            most = {name: evaluate(query, samples) for name, query in queries.items()}
        time.sleep(0.05)
    waiting = most["keda"][()]
    assert WAITING / 2 < waiting <= len(callers)
    assert most["adapter"] == {
        (("pod", "demo-triton-1-a"),): waiting,
        (("pod", "demo-triton-1-b"),): 0.0,
    }
    assert evaluate(queries["keda"], scraped()) == {(): 0.0}
    target = yaml.safe_load((CHART / "values.yaml").read_text())["triton"]["autoscaling"]
    # two servers: more of them are wanted, and none while nothing waits
    assert waiting / 2 > target["targetPending"]


def test_health_checks_of_kubernetes_are_answered(server: ServerRecord) -> None:
    """`livenessProbe.grpc` asks grpc.health.v1, which Triton answers itself."""
    with grpc.insecure_channel(server.ports.grpc_url) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        assert check(b"", timeout=5) == b"\x08\x01"  # status: SERVING


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title of a panel, and a query with its variables put in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m")
            yield panel["title"], query.replace("$namespace", "prod")


def test_dashboards_and_readme_name_metrics_that_are_shown(
    dashboard: dict[str, Any],
    server_page: str,
    gateway_page: str,
    queries: dict[str, str],
) -> None:
    samples = [*samples_of(server_page), *samples_of(gateway_page)]
    shown = {sample.name for sample in samples}
    named = set()
    for title, query in [*expressions(dashboard), *queries.items()]:
        for selector in selectors(query):
            named.add(selector.name)
            assert selector.name in shown | OF_GPUS, (title, selector.name)
            own = [m for m in selector.matchers.matchers if m.name in ("model", "route")]
            for matcher in own:
                values = {s.labels.get(matcher.name) for s in samples if s.name == selector.name}
                assert matcher.value in values, (title, matcher.name)
    assert len(named) > 20
    prose = re.sub(r" *```sh\n.*?```", "", (CHART / "README.md").read_text(), flags=re.DOTALL)
    told = set(re.findall(r"\b(?:nv|regionspot)_[a-z0-9_]+\b", prose))
    assert len(told) >= 6
    assert told <= shown | {"regionspot_pending_requests"}


def test_the_dashboard_shows_all_metrics_of_ours(
    dashboard: dict[str, Any], server_page: str
) -> None:
    ours = {s.name for s in samples_of(server_page) if s.name.startswith("regionspot_")}
    queried = " ".join(query for _, query in expressions(dashboard))
    assert [name for name in sorted(ours) if not re.search(rf"\b{name}\b", queried)] == []


def test_the_dashboard_is_one(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("row", "timeseries")
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert place["x"] + place["w"] <= 24
        assert taken.isdisjoint(cells), panel["title"]
        taken |= cells
        targets = panel.get("targets", ())
        assert len({target["refId"] for target in targets}) == len(targets)
        assert (panel["type"] == "row") == (not targets)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", DASHBOARD.read_text())) == variables
    for title, query in expressions(dashboard):
        promql.parse(query), title

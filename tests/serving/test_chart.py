"""The chart with its options on and off: each alone, all together, and many mixtures of them.

What must hold whatever the options: names that refer to something refer to what is there, and the
locks stay locked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import pytest

from regionspot.cli import serve
from regionspot.serving import canary
from regionspot.serving.ports import Ports
from tests.serving.chart import (
    CUSTOM_KINDS,
    DIGEST,
    EXTRAS,
    HARDENED,
    OPTIONS,
    PARTS,
    Document,
    container,
    documents_of,
    of_kind,
    one,
    pod,
    run_helm,
    values_of,
)

pytest.importorskip("helm_python", reason="helm-python-sdk has wheels for x86-64")

EXCLUSIVE = (
    {"adapter", "keda"},
    {"https", "client certificates"},
    {"subPath", "init", "init of an image"},
    {"no policy", "nobody"},
)
"""Options of which a mixture has one at most."""

MIXTURES = 60


def _is_possible(mixture: frozenset[str]) -> bool:
    return all(len(mixture & some) <= 1 for some in EXCLUSIVE)


def _mixtures() -> list[frozenset[str]]:
    """None, each option alone, all that go together, each missing there, and random ones."""
    names = list(OPTIONS)
    rest = set().union(*EXCLUSIVE) - {"adapter", "client certificates", "init"}
    everything = frozenset(names) - rest - {"no budget"}
    found = [frozenset[str](), everything, *(frozenset({name}) for name in names)]
    found += [everything - {name} for name in everything]
    chosen = random.Random(0)
    while len(found) < len(names) + len(everything) + 2 + MIXTURES:
        mixture = frozenset(name for name in names if chosen.random() < 0.5)
        if _is_possible(mixture):
            found.append(mixture)
    return found


@cache
def renderings() -> list[tuple[frozenset[str], list[Document]]]:
    """Options -> what would be applied."""
    mixtures = _mixtures()
    ordered = [[name for name in OPTIONS if name in mixture] for mixture in mixtures]
    answers = run_helm(*(values_of(*names) for names in ordered))["answers"]
    return [
        (mixture, documents_of(files)) for mixture, files in zip(mixtures, answers, strict=True)
    ]


def alone(name: str) -> list[Document]:
    """With one option on."""
    return next(documents for mixture, documents in renderings() if mixture == {name})


def each() -> Iterator[tuple[str, list[Document]]]:
    for mixture, documents in renderings():
        yield ", ".join(sorted(mixture)) or "nothing", documents


def test_kubernetes_takes_every_mixture() -> None:
    kubernetes = import_module("kubernetes_validate")
    seen = set()
    for where, documents in each():
        names = [(d["kind"], d["metadata"]["name"]) for d in documents]
        assert len(names) == len(set(names)), where
        for document in documents:
            text = json.dumps(document, sort_keys=True)
            if document["kind"] not in CUSTOM_KINDS and text not in seen:
                seen.add(text)
                kubernetes.validate(document, kubernetes.latest_version(), strict=True)
    assert len(seen) > 100


def test_selectors_and_ports_refer_to_what_is_there() -> None:
    for where, documents in each():
        for part in PARTS:
            spec = one(documents, "Deployment", part)["spec"]
            labels = spec["template"]["metadata"]["labels"].items()
            ports = {port["name"] for port in container(documents, part)["ports"]}
            service = one(documents, "Service", part)
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, where
            selectors = [spec["selector"]["matchLabels"], service["spec"]["selector"]]
            for kind, field in (
                ("PodDisruptionBudget", "selector"),
                ("NetworkPolicy", "podSelector"),
            ):
                found = of_kind(documents, kind, part)
                selectors += [each_one["spec"][field]["matchLabels"] for each_one in found]
            for selector in selectors:
                assert selector.items() <= labels, where
                assert selector["app.kubernetes.io/component"] == part, where
            for policy in of_kind(documents, "NetworkPolicy", part):
                opened = {p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]}
                assert opened <= ports, where
            for monitor in of_kind(documents, "ServiceMonitor", part):
                (endpoint,) = monitor["spec"]["endpoints"]
                assert endpoint["port"] in {p["name"] for p in service["spec"]["ports"]}, where
            assert _probed(container(documents, part)) <= ports | {Ports().grpc}, where


def _probed(one_container: Document) -> set[str | int]:
    """Names and numbers of the ports that probes knock at."""
    probes = [one_container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
    kinds = ("httpGet", "tcpSocket", "grpc")
    return {probe[kind]["port"] for probe in probes for kind in kinds if kind in probe}


def test_policies_and_budgets_come_unless_they_are_off() -> None:
    for mixture, documents in renderings():
        for part in PARTS:
            policies = of_kind(documents, "NetworkPolicy", part)
            assert len(policies) == ("no policy" not in mixture), mixture
            budgets = of_kind(documents, "PodDisruptionBudget", part)
            assert len(budgets) == ("no budget" not in mixture), mixture
            for policy in policies:
                assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"], mixture
                # a rule without peers would let everybody in
                assert all(rule.get("from") for rule in policy["spec"]["ingress"]), mixture
                assert all(rule.get("to") for rule in policy["spec"]["egress"]), mixture


def test_volumes_and_mounts_belong_together() -> None:
    for where, documents in each():
        for part in PARTS:
            spec = pod(documents, part)
            names = [volume["name"] for volume in spec["volumes"]]
            assert len(names) == len(set(names)), where
            used = set()
            for one_container in [*spec["containers"], *spec.get("initContainers", ())]:
                mounts = one_container.get("volumeMounts", ())
                paths = [mount["mountPath"] for mount in mounts]
                assert len(paths) == len(set(paths)), where
                used |= {mount["name"] for mount in mounts}
            assert used == set(names), where
            assert not [volume for volume in spec["volumes"] if "hostPath" in volume], where


def test_the_chart_s_own_containers_are_locked_down() -> None:
    for where, documents in each():
        for part in PARTS:
            spec = pod(documents, part)
            assert spec["automountServiceAccountToken"] is False, where
            assert spec["securityContext"]["runAsNonRoot"] is True, where
            others = EXTRAS["initContainers"]
            own = [c for c in spec.get("initContainers", ()) if c not in others]
            for one_container in [*spec["containers"], *own]:
                assert one_container["securityContext"] == HARDENED, where
                assert one_container["resources"]["limits"]["memory"], where


def test_arguments_are_ones_that_we_have_and_name_files_that_are_mounted() -> None:
    parser = serve.build_parser()
    for where, documents in each():
        for part, command in zip(PARTS, ("up", "web"), strict=True):
            one_container = container(documents, part)
            words = one_container["args"]
            arguments = parser.parse_args([command, *_ENTRY[part], *words])
            files = [word for word in words if word.startswith("/run/")]
            mounts = {m["mountPath"]: m["name"] for m in one_container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod(documents, part)["volumes"]}
            for path in files:
                folder, _, name = path.rpartition("/")
                items = volumes[mounts[folder]]["secret"]["items"]
                assert name in {item["path"] for item in items}, (where, path)
            if part == "gateway":
                server = one(documents, "Service", "triton")["metadata"]["name"]
                secure = "--upstream-ca" in words
                assert arguments.url == f"{'grpcs://' if secure else ''}{server}:8001", where
                assert secure == ("--tls-cert" in container(documents, "triton")["args"]), where
                assert ("--token-file" in words) != ("--tokens" in words), where


_ENTRY = {"triton": ["--repository", "/models"], "gateway": []}


def test_images_by_digest() -> None:
    documents = alone("digest")
    for part in PARTS:
        assert container(documents, part)["image"] == f"regionspot-{part}@{DIGEST}"
    named = {part: {"image": {"repository": f"registry/{part}@{DIGEST}"}} for part in PARTS}
    (answer,) = run_helm({**values_of(), **named, **_token()})["answers"]
    for part in PARTS:
        assert container(documents_of(answer), part)["image"] == f"registry/{part}@{DIGEST}"


def _token() -> dict[str, Any]:
    gateway = values_of()["gateway"] | {"image": {"repository": f"registry/gateway@{DIGEST}"}}
    return {"gateway": gateway}


def test_numbers_may_be_given_as_numbers() -> None:
    resources = {
        "requests": {"cpu": 4, "memory": 8 << 30},
        "limits": {"cpu": 4.5, "memory": "16Gi"},
    }
    (answer,) = run_helm({**values_of(), "triton": {"resources": resources}})["answers"]
    found = container(documents_of(answer), "triton")["resources"]
    assert found["requests"]["cpu"] == 4
    assert float(found["requests"]["memory"]) == 8 << 30
    assert found["limits"]["cpu"] == 4.5


def test_extras_reach_the_pods() -> None:
    documents = alone("extras")
    for part in PARTS:
        template = one(documents, "Deployment", part)["spec"]["template"]
        assert EXTRAS["podLabels"].items() <= template["metadata"]["labels"].items()
        assert template["metadata"]["annotations"] == EXTRAS["podAnnotations"]
        for name in ("runtimeClassName", "priorityClassName", "initContainers"):
            assert template["spec"][name] == EXTRAS[name]
        one_container = container(documents, part)
        assert one_container["env"] == EXTRAS["env"]
        assert one_container["envFrom"] == EXTRAS["envFrom"]
        assert EXTRAS["extraVolumeMounts"][0] in one_container["volumeMounts"]
        assert EXTRAS["extraVolumes"][0] in template["spec"]["volumes"]


def test_a_priority_class_is_used_by_the_pods_that_name_no_other() -> None:
    for mixture, documents in renderings():
        classes = [d["metadata"]["name"] for d in documents if d["kind"] == "PriorityClass"]
        assert classes == ["prod-demo"] * ("priority" in mixture)
        wanted = "urgent" if "extras" in mixture else next(iter(classes), None)
        for part in PARTS:
            assert pod(documents, part).get("priorityClassName") == wanted, mixture


def test_routes_lead_to_the_gateway_s_service() -> None:
    (ingress,) = [d for d in alone("ingress") if d["kind"] == "Ingress"]
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] == "regions.example.org"
    assert ingress["spec"]["tls"] == [
        {"secretName": "public", "hosts": ["regions.example.org"]},
    ]
    (path,) = rule["http"]["paths"]
    (route,) = [d for d in alone("route") if d["kind"] == "HTTPRoute"]
    (route_rule,) = route["spec"]["rules"]
    (backend,) = route_rule["backendRefs"]
    service = one(alone("route"), "Service", "gateway")
    (port,) = service["spec"]["ports"]
    assert path["backend"]["service"] == {
        "name": service["metadata"]["name"],
        "port": {"name": port["name"]},
    }
    assert backend == {"name": service["metadata"]["name"], "port": port["port"]}
    web = serve.build_parser().parse_args(["web"])
    # an upload takes 60 s at most before that
    assert int(route_rule["timeouts"]["request"].removesuffix("s")) > web.timeout + 60


def test_probes_speak_as_the_container_does() -> None:
    cases = [
        ("https", "httpGet", "HTTPS"),
        ("client certificates", "tcpSocket", None),
        ("hosts", "httpGet", None),
    ]
    for name, kind, scheme in cases:
        found = container(alone(name), "gateway")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert found[probe][kind].get("scheme") == scheme, name
    secure = container(alone("mutual tls"), "triton")
    # the kubelet's gRPC probe cannot speak TLS
    assert secure["livenessProbe"]["httpGet"] == {"path": "/metrics", "port": "metrics"}
    words = secure["readinessProbe"]["exec"]["command"]
    assert words[:3] == ["python3", "-m", "regionspot.serving.canary"]
    assert "grpcs://localhost:8001" in words
    # 1 is no answer; it would exit with 2 where there is no such option
    assert canary.main([*words[3:], "--url", "127.0.0.1:9", "--timeout", "0.2"]) == 1


def test_init_makes_what_the_server_reads() -> None:
    for name in ("init", "init of an image"):
        spec = pod(alone(name), "triton")
        made = {c["name"]: c for c in spec["initContainers"]}
        words = [*made["init"]["command"][1:], *made["init"]["args"]]
        arguments = serve.build_parser().parse_args(words)
        assert made["init"]["command"][0] == "regionspot-serve"
        assert (arguments.command, arguments.target) == ("init", "tensorrt")
        mounts = {m["mountPath"]: m for m in made["init"]["volumeMounts"]}
        served = {m["mountPath"]: m for m in container(alone(name), "triton")["volumeMounts"]}
        assert mounts[arguments.out]["name"] == served["/models"]["name"]
        assert not mounts[arguments.out].get("readOnly")
        artifacts = mounts[arguments.artifacts]
        assert artifacts["readOnly"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == artifacts["name"]]
        if name == "init":
            assert volume["persistentVolumeClaim"] == {"claimName": "artifacts", "readOnly": True}
            assert artifacts["subPath"] == "mini"
            assert arguments.vocabularies == ["pets=cat,dog"]
        else:
            # copied by the image that holds them, before `init` runs
            assert [c["name"] for c in spec["initContainers"]] == ["artifacts", "init"]
            (staged,) = made["artifacts"]["volumeMounts"]
            assert staged["name"] == artifacts["name"]
            assert made["artifacts"]["command"] == ["cp", "-R", "/artifacts/.", "/staging/"]
            assert "emptyDir" in volume
    assert pod(alone("digest"), "triton")["shareProcessNamespace"] is True


def test_scalers_agree() -> None:
    """KEDA's autoscaler adds and removes servers as the other would."""
    hpa = one(alone("adapter"), "HorizontalPodAutoscaler", "triton")["spec"]
    keda = one(alone("keda"), "ScaledObject", "triton")["spec"]
    assert keda["scaleTargetRef"] == hpa["scaleTargetRef"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (1, 4)
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    (trigger,) = keda["triggers"]
    assert trigger["metricType"] == "AverageValue"
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    (metric,) = hpa["metrics"]
    assert metric["pods"]["target"] == {
        "type": "AverageValue",
        "averageValue": trigger["metadata"]["threshold"],
    }
    for name in ("adapter", "keda"):
        assert "replicas" not in one(alone(name), "Deployment", "triton")["spec"]
        kinds = [d["kind"] for d in alone(name)]
        assert ("HorizontalPodAutoscaler" in kinds) != ("ScaledObject" in kinds)

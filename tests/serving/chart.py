"""What Helm makes of the chart: rendered by Helm itself (its library, from helm-python-sdk), and
looked up by kind and part.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "serving" / "deploy"
CHART = DEPLOY / "helm" / "regionspot"
PARTS = ("triton", "gateway")
CUSTOM_KINDS = {"ServiceMonitor", "ScaledObject", "HTTPRoute"}
"""Of the Prometheus operator, KEDA and the Gateway API: Kubernetes itself does not know them."""

REQUIRED = {
    "modelRepository": {"existingClaim": "models"},
    "gateway": {"token": {"existingSecret": "token"}},
}
DIGEST = "sha256:" + 64 * "a"
HARDENED = {
    "allowPrivilegeEscalation": False,
    "privileged": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
"""The security context of every container of ours."""

EXTRAS: dict[str, Any] = {
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "vision"},
    "runtimeClassName": "nvidia",
    "priorityClassName": "urgent",
    "env": [{"name": "A", "value": "b"}],
    "envFrom": [{"configMapRef": {"name": "settings"}}],
    "extraVolumes": [{"name": "certificates", "configMap": {"name": "roots"}}],
    "extraVolumeMounts": [{"name": "certificates", "mountPath": "/etc/roots", "readOnly": True}],
    "initContainers": [{"name": "wait", "image": "busybox:1.37", "command": ["true"]}],
}
"""What operators add to the pods of either part."""

OPTIONS: dict[str, dict[str, Any]] = {
    "digest": {part: {"image": {"digest": DIGEST}} for part in PARTS},
    "pull secrets": {"imagePullSecrets": [{"name": "registry"}]},
    "subPath": {"modelRepository": {"subPath": "first"}},
    "extras": dict.fromkeys(PARTS, EXTRAS),
    "priority": {"priorityClass": {"enabled": True}},
    "placement": {
        "triton": {"nodeSelector": {"gpu": "h100"}},
        "gateway": {"affinity": {"podAffinity": {}}},
    },
    "monitors": {"metrics": {"serviceMonitor": {"enabled": "always", "labels": {"release": "x"}}}},
    "adapter": {
        "metrics": {"adapterRule": {"enabled": True}},
        "triton": {"autoscaling": {"enabled": True}},
    },
    "keda": {
        "triton": {
            "autoscaling": {"enabled": True, "by": "keda", "prometheusAddress": "http://p:9090"}
        }
    },
    "scaled gateways": {"gateway": {"autoscaling": {"enabled": True}}},
    "service": {"gateway": {"service": {"annotations": {"a": "b"}, "type": "LoadBalancer"}}},
    "ingress": {
        "gateway": {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "hosts": ["regions.example.org"],
                "tls": {"existingSecret": "public"},
            }
        }
    },
    "route": {
        "gateway": {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "public", "namespace": "gateways"}],
                "hostnames": ["regions.example.org"],
            }
        }
    },
    "https": {"gateway": {"tls": {"existingSecret": "gateway-cert"}}},
    "client certificates": {
        "gateway": {"tls": {"existingSecret": "gateway-cert", "clientCa": True}}
    },
    "mutual tls": {
        "triton": {"tls": {"existingSecret": "triton-cert"}},
        "gateway": {"upstreamTls": {"existingSecret": "client-cert"}},
    },
    "named tokens": {
        "gateway": {
            "token": {"existingSecret": ""},
            "tokens": {"existingSecret": "tokens"},
            "metricsToken": {"existingSecret": "prometheus"},
        }
    },
    "hosts": {
        "gateway": {
            "allowedHosts": ["regions.example.org"],
            "trustedProxies": ["10.0.0.0/8", "192.0.2.7"],
        }
    },
    "init": {
        "modelRepository": {
            "existingClaim": "",
            "init": {
                "enabled": True,
                "artifacts": {"existingClaim": "artifacts", "subPath": "mini"},
                "args": ["--vocabulary", "pets=cat,dog"],
            },
        }
    },
    "init of an image": {
        "modelRepository": {
            "existingClaim": "",
            "init": {"enabled": True, "artifacts": {"image": "registry/artifacts:1"}},
        }
    },
    "egress": {
        "networkPolicy": {
            f"{part}Egress": [
                {
                    "to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}],
                    "ports": [{"protocol": "TCP", "port": 4317}],
                }
            ]
            for part in PARTS
        }
    },
    "nobody": {"networkPolicy": {"gatewayFrom": [], "metricsFrom": []}},
    "no policy": {"networkPolicy": {"enabled": False}},
    "no budget": {"podDisruptionBudget": {"enabled": False}},
}
"""Each may be on or off, beside REQUIRED."""

# In a process of its own: Helm is written in Go, whose runtime would stay in this one.
_HELM = """
import json, sys
import helm_python as helm
chart, jobs = json.load(sys.stdin)
answers = []
with helm.Chart.load(chart) as loaded:
    for values in jobs:
        try:
            answers.append(loaded.render(values, name="demo", namespace="prod"))
        except helm.HelmError as error:
            answers.append(str(error))
json.dump({"lint": helm.lint(chart, jobs[0], strict=True), "answers": answers}, sys.stdout)
"""

Document = dict[str, Any]


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values over values, as Helm lays them."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def values_of(*options: str) -> dict[str, Any]:
    """REQUIRED, and some of OPTIONS over it."""
    return merged(REQUIRED, *(OPTIONS[name] for name in options))


def run_helm(*jobs: Mapping[str, Any]) -> dict[str, Any]:
    """Renders the chart once for each of some values.

    Returns:
        "answers", for each the files by their names, or why Helm refuses the values; and "lint",
        Helm's report on the first.
    """
    done = subprocess.run(
        [sys.executable, "-c", _HELM],
        input=json.dumps([str(CHART), jobs]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def documents_of(files: dict[str, str] | str) -> list[Document]:
    assert isinstance(files, dict), files
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(documents: list[Document], kind: str, part: str) -> list[Document]:
    """Those of a kind whose labels name a part."""
    label = "app.kubernetes.io/component"
    return [d for d in documents if d["kind"] == kind and d["metadata"]["labels"][label] == part]


def one(documents: list[Document], kind: str, part: str) -> Document:
    """The one of a kind whose labels name a part."""
    (found,) = of_kind(documents, kind, part)
    return found


def pod(documents: list[Document], part: str) -> Document:
    found: Document = one(documents, "Deployment", part)["spec"]["template"]["spec"]
    return found


def container(documents: list[Document], part: str) -> Document:
    (found,) = pod(documents, part)["containers"]
    assert isinstance(found, dict)
    return found


def quantity(text: str) -> int:
    """A Kubernetes or Compose size in bytes."""
    match = re.fullmatch(r"(\d+)([kmgKMG])(i|b)?", text)
    assert match, text
    return int(match[1]) << {"k": 10, "m": 20, "g": 30}[match[2].lower()]

"""Documents of kinds that Kubernetes itself does not know, against the schemas of those who do:
KEDA's, the Gateway API's and the Prometheus operator's by the npm packages made from them, KServe's
by its Python client. They are downloaded once into build/custom_kinds.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from regionspot.locks import locked
from tests.serving.chart import (
    CUSTOM_KINDS,
    DEPLOY,
    OPTIONS,
    ROOT,
    Document,
    documents_of,
    run_helm,
    values_of,
)

FOLDER = ROOT / "build" / "custom_kinds"
PACKAGES = {
    "ScaledObject": ("@kubernetes-models/keda", "2.0.0"),
    "HTTPRoute": ("@kubernetes-models/gateway-api", "2.0.0"),
    "ServiceMonitor": ("@kubernetes-models/prometheus-operator", "6.0.0"),
}
KSERVE_CLIENT = "kserve==0.21.0"
OPTIONS_OF_THEIRS = ("keda", "route", "monitors", "https", "named tokens")

# Reads documents as a JSON list, and prints what is wrong with each, or null.
_VALIDATE = """
let text = "";
for await (const chunk of process.stdin) text += chunk;
const answers = [];
for (const [module, document] of JSON.parse(text)) {
  const kinds = await import(module);
  try { new kinds[document.kind](document).validate(); answers.push(null); }
  catch (error) { answers.push(String(error.message)); }
}
console.log(JSON.stringify(answers));
"""


@pytest.fixture(scope="module")
def node() -> str:
    """A folder with the npm packages."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    with locked(FOLDER):
        if not (FOLDER / "node_modules").is_dir():
            wanted = [f"{name}@{version}" for name, version in PACKAGES.values()]
            command = [
                "npm",
                "install",
                "--prefix",
                str(FOLDER),
                "--no-audit",
                "--no-fund",
                *wanted,
            ]
            if subprocess.run(command, capture_output=True).returncode != 0:
                shutil.rmtree(FOLDER / "node_modules", ignore_errors=True)
                pytest.skip("npm's registry cannot be reached")
    return str(FOLDER)


def complaints(folder: str, documents: list[Document]) -> list[str | None]:
    """What is wrong with each document; None where nothing is."""
    jobs = [
        (f"{PACKAGES[document['kind']][0]}/{document['apiVersion']}", document)
        for document in documents
    ]
    done = subprocess.run(
        ["node", "--input-type=module", "-e", _VALIDATE],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    found: list[str | None] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Of the chart, one of each custom kind at least."""
    pytest.importorskip("helm_python", reason="helm-python-sdk has wheels for x86-64")
    assert set(OPTIONS_OF_THEIRS) <= OPTIONS.keys()
    answers = run_helm(values_of(), values_of(*OPTIONS_OF_THEIRS), values_of("monitors"))
    found = [d for files in answers["answers"] for d in documents_of(files)]
    return [document for document in found if document["kind"] in CUSTOM_KINDS]


def test_documents_are_of_their_kinds(node: str, documents: list[Document]) -> None:
    assert {document["kind"] for document in documents} == CUSTOM_KINDS == PACKAGES.keys()
    assert complaints(node, documents) == [None] * len(documents)


def test_wrong_documents_are_found(node: str, documents: list[Document]) -> None:
    broken = {document["kind"]: json.loads(json.dumps(document)) for document in documents}
    broken["ScaledObject"]["spec"]["maxReplicaCount"] = "4"
    broken["HTTPRoute"]["spec"]["rules"][0]["timeouts"]["request"] = "2 minutes"
    del broken["ServiceMonitor"]["spec"]["selector"]
    assert all(complaints(node, list(broken.values())))


@pytest.fixture(scope="module")
def kserve_types() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Model of KServe's client -> the types of its attributes, and their names in a document."""
    with locked(FOLDER):
        wheels = list(FOLDER.glob("kserve-*.whl"))
        if not wheels:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(FOLDER)]
            if subprocess.run([*command, KSERVE_CLIENT], capture_output=True).returncode != 0:
                pytest.skip("PyPI cannot be reached")
            wheels = list(FOLDER.glob("kserve-*.whl"))
    found = {}
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in wheel.namelist():
            text = wheel.read(name).decode() if name.startswith("kserve/models/v1") else ""
            model = re.search(r"^class (\w+)\(", text, re.MULTILINE)
            if model:
                found[model[1]] = (_table(text, "openapi_types"), _table(text, "attribute_map"))
    return found


def _table(text: str, name: str) -> dict[str, str]:
    block = re.search(rf"{name} = \{{(.*?)\}}", text, re.DOTALL)
    return dict(re.findall(r"'(\w+)': '(.+)'", block[1])) if block else {}


def unknown_fields(
    types: dict[str, tuple[dict[str, str], dict[str, str]]], model: str, content: Any, path: str
) -> Iterator[str]:
    """Where a document has a field that KServe's model has not. What is Kubernetes' own is checked
    as a pod, see test_kserve.py.
    """
    inner = re.fullmatch(r"list\[(\w+)\]", model)
    if inner:
        for index, one_of in enumerate(content):
            yield from unknown_fields(types, inner[1], one_of, f"{path}[{index}]")
    elif model in types:
        kinds, names = types[model]
        attributes = {shown: attribute for attribute, shown in names.items()}
        for name, value in content.items():
            if name not in attributes:
                yield f"{path}.{name}"
            else:
                yield from unknown_fields(types, kinds[attributes[name]], value, f"{path}.{name}")


def test_kserve_knows_every_field(
    kserve_types: dict[str, tuple[dict[str, str], dict[str, str]]],
) -> None:
    files = {
        "servingruntime.yaml": "V1alpha1ServingRuntime",
        "inferenceservice.yaml": "V1beta1InferenceService",
    }
    for name, model in files.items():
        assert model in kserve_types
        document = yaml.safe_load(Path(DEPLOY / "kserve" / name).read_text())
        assert list(unknown_fields(kserve_types, model, document, "")) == []
        document["spec"]["surprise"] = 1
        assert list(unknown_fields(kserve_types, model, document, "")) == [".spec.surprise"]

"""A real Triton server over regionspot_mini, started once for the run by the command that users
type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from regionspot.data.coco_json import CocoDataset
from regionspot.files import write_atomically
from regionspot.predictor import RegionPredictor
from regionspot.runtime.artifacts import TOKENIZER, GraphEntry, Manifest
from regionspot.runtime.engine_file import (
    DYNAMIC,
    BuildHost,
    EngineSidecar,
    EngineTensor,
    file_sha256,
    profile_of,
    write_engine,
)
from regionspot.runtime.opening import open_pipeline
from regionspot.serving.client import RegionClient
from regionspot.serving.records import ServerRecord, running_server
from regionspot.serving.repository import RepositoryOptions, make_repository
from regionspot.serving.server import ServerOptions
from regionspot.vocabulary import VocabularyEncoder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def repository(mini_artifacts_with_masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repositories") / "model_repository"
    make_repository(
        mini_artifacts_with_masks,
        out,
        RepositoryOptions(vocabularies={"mini": "mini", "pets": "cat,dog"}),
    )
    return out


@pytest.fixture(scope="session")
def home() -> Path:
    """The server's own environment outlives a run of the tests: it takes 600 MB to install."""
    return ROOT / "build" / "server"


@pytest.fixture(scope="session")
def server(repository: Path, home: Path) -> Iterator[ServerRecord]:
    """With two instances of the model, on any machine."""
    options = ServerOptions(instances=2, all_models=True)
    with running_server(repository, home, options) as record:
        yield record


@pytest.fixture
def client(server: ServerRecord) -> Iterator[RegionClient]:
    with RegionClient(server.ports.grpc_url) as connected:
        yield connected


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Held-out pictures of the mini world."""
    from regionspot.mini.dataset import build_dataset

    _, val = build_dataset(tmp_path_factory.mktemp("mini"), 1, 24, 0)
    return CocoDataset.load(val)


@pytest.fixture(scope="session")
def picture(dataset: CocoDataset) -> Path:
    return dataset.image_path(dataset.images[3])


@pytest.fixture(scope="session")
def boxes(dataset: CocoDataset) -> list[list[float]]:
    """The picture's own, xyxy."""
    return [
        list(annotation.box) for annotation in dataset.annotations_by_image[dataset.images[3].id]
    ]


@pytest.fixture(scope="session")
def predictor(mini_artifacts_with_masks: Path) -> RegionPredictor:
    """The same artefacts in this process: what every answer of a server is compared with."""
    return RegionPredictor(open_pipeline(mini_artifacts_with_masks, "onnxruntime"))


@pytest.fixture(scope="session")
def encoder(predictor: RegionPredictor) -> VocabularyEncoder:
    return VocabularyEncoder(predictor.pipeline.text_encoder)


SCRATCH_MIB = 100.0


def sidecar_of(entry: GraphEntry, plan: bytes) -> EngineSidecar:
    """As TensorRT 11.4 on an L4 would leave it."""
    profile = profile_of(entry.spec)
    shapes = {
        tensor.name: tuple(DYNAMIC if isinstance(axis, str) else axis for axis in tensor.shape)
        for tensor in (*entry.spec.inputs, *entry.spec.outputs)
    }
    return EngineSidecar(
        graph=entry.name,
        flavour="tensorrt",
        file=f"{entry.name}.plan",
        size_bytes=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
        versions={"tensorrt": "11.4.0.106"},
        compute_capabilities=(),
        device="NVIDIA L4",
        optimization_level=3,
        workspace_mib=None,
        build_s=1.0,
        inputs=tuple(
            EngineTensor(one.name, one.dtype, shapes[one.name], profile[one.name])
            for one in entry.spec.inputs
        ),
        outputs=tuple(
            EngineTensor(one.name, one.dtype, shapes[one.name]) for one in entry.spec.outputs
        ),
        onnx={},
        scratch_mib=SCRATCH_MIB,
        built_on=BuildHost(89, "580.95.05", "13.0"),
    )


@pytest.fixture(scope="session")
def engines(mini_artifacts_with_masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefacts as if they had been built by TensorRT, which no machine without its GPU can do:
    the files are not engines, and serve to see what is made of their names.
    """
    directory = tmp_path_factory.mktemp("engines")
    manifest = replace(Manifest.load(mini_artifacts_with_masks), directory=directory)
    write_atomically(directory / TOKENIZER, (mini_artifacts_with_masks / TOKENIZER).read_bytes())
    for entry in manifest.graphs:
        name = f"tensorrt/fp32/{entry.name}.plan"
        plan = b"not an engine: " + entry.name.encode()
        write_engine(directory / name, plan, sidecar_of(entry, plan))
        paths = (name, name.replace(".plan", ".json"))
        files = {path: file_sha256(directory / path) for path in paths}
        manifest = manifest.with_entry(replace(entry, format="tensorrt", file=name, files=files))
        text = entry.file if entry.name == "clip_text_encoder" else None
        if text is None:
            manifest = manifest.without(entry.key)
        else:
            write_atomically(directory / text, (mini_artifacts_with_masks / text).read_bytes())
    manifest.save()
    return directory

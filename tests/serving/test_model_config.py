"""Configurations: built as protobuf, written, parsed back, and what the lint finds in broken
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tritonclient.grpc import model_config_pb2 as pb

from regionspot.errors import ArtifactError
from regionspot.modeling.graphs import model_sizes
from regionspot.modeling.presets import create_model
from regionspot.runtime.artifacts import spec_from_json
from regionspot.runtime.cuda_options import ONNX_RUNTIME_CUDA
from regionspot.runtime.graph_spec import GraphSpec, Range
from regionspot.runtime.graphs import Ranges, gpu_graph_specs, graph_specs
from regionspot.serving.contract import CODES, INPUTS, MODEL, OUTPUTS, RETRYABLE, TARGETS
from regionspot.serving.gateway.errors import STATUS
from regionspot.serving.model_config import (
    can_batch,
    fields_of,
    graph_config,
    lint,
    parameters_of,
    pipeline_config,
    read_config,
    write_config,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def specs() -> dict[str, GraphSpec]:
    return graph_specs(model_sizes(create_model("regionspot_mini")))


@pytest.fixture
def folder(tmp_path: Path, specs: dict[str, GraphSpec]) -> Path:
    """A model's, with all files that its configuration names."""
    version = tmp_path / "region_head" / "1"
    version.mkdir(parents=True)
    for name in ("model.py", "region_head.onnx"):
        (version / name).touch()
    return version.parent


@pytest.mark.parametrize("target", TARGETS)
def test_every_graph_survives_text_and_lint(
    target: str, specs: dict[str, GraphSpec], tmp_path: Path
) -> None:
    import json

    for spec in specs.values():
        version = tmp_path / spec.name / "1"
        version.mkdir(parents=True)
        (version / "model.py").touch()
        (version / "graph.file").touch()
        config = graph_config(spec, target, "graph.file", target != "cpu")
        path = tmp_path / spec.name / "config.pbtxt"
        path.write_text(write_config(config))
        read = read_config(path)
        assert read == config and lint(read, path.parent) == []
        assert spec_from_json(json.loads(parameters_of(read)["spec"])) == spec
        whole = [
            ["batch", *tensor.dims] if read.max_batch_size else list(tensor.dims)
            for tensor in read.input
        ]
        assert [len(shape) for shape in whole] == [len(tensor.shape) for tensor in spec.inputs]


def test_only_graphs_with_images_in_front_are_batched(specs: dict[str, GraphSpec]) -> None:
    batched = {name for name, spec in specs.items() if can_batch(spec)}
    assert batched == {
        "sam_image_encoder",
        "clip_image_encoder",
        "sam_token_decoder_image",
        "sam_mask_prompt",
    }
    assert graph_config(specs["region_head"], "tensorrt", "x", True).max_batch_size == 0
    assert graph_config(specs["sam_image_encoder"], "tensorrt", "x", True).HasField(
        "dynamic_batching"
    )
    assert not graph_config(specs["sam_image_encoder"], "cpu", "x", False).HasField(
        "dynamic_batching"
    )


def test_an_axis_of_one_size_is_not_open() -> None:
    sizes = Ranges(batch=Range(1, 1, 1), words=Range(80, 80, 80))
    specs = graph_specs(model_sizes(create_model("regionspot_mini")), sizes)
    encoder = graph_config(specs["sam_image_encoder"], "tensorrt", "x", True)
    assert encoder.max_batch_size == 0 and list(encoder.input[0].dims) == [1, 256, 256, 3]
    head = graph_config(specs["region_head"], "tensorrt", "x", True)
    assert list(head.input[3].dims) == [80, 128] and list(head.output[0].dims) == [1, -1, 80]


def test_the_public_model() -> None:
    config = pipeline_config(True, {"runtime": "tensorrt"})
    assert [tensor.name for tensor in config.input] == [field.name for field in INPUTS]
    assert [tensor.name for tensor in config.output] == [field.name for field in OUTPUTS]
    assert all(tensor.optional for tensor in config.input) and config.name == MODEL
    ragged = {tensor.name for tensor in config.input if tensor.allow_ragged_batch}
    # requests of different sizes may go together
    assert ragged == {"boxes", "points", "point_labels", "words"}


def test_triton_runs_onnx_as_it_was_verified(specs: dict[str, GraphSpec]) -> None:
    """With our own runner's options: Triton's defaults are TF32 and a search for each shape."""
    config = graph_config(specs["region_head"], "onnxruntime", "x", True)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "cuda" and dict(accelerator.parameters) == dict(ONNX_RUNTIME_CUDA)


def test_cuda_graphs_of_what_is_asked_most() -> None:
    """Every batch of images, chunks of boxes; nothing of a graph whose sizes vary freely."""
    specs = gpu_graph_specs(model_sizes(create_model("regionspot_mini")))

    def captured(graph: str, tensor: str) -> list[tuple[int, ...]]:
        config = graph_config(specs[graph], "tensorrt", "x", True)
        return [
            (one.batch_size, *one.input[tensor].dim) for one in config.optimization.cuda.graph_spec
        ]

    images = [(batch, 256, 256, 3) for batch in range(1, 9)]
    assert captured("sam_image_encoder", "images") == images
    boxes = [(0, 1, prompts, 2, 2) for prompts in (8, 16, 24, 32)]
    assert captured("sam_token_decoder_prompts", "points") == boxes
    assert captured("sam_mask_decoder", "points") == boxes
    assert captured("region_head", "valid") == []
    for spec in specs.values():
        config = graph_config(spec, "tensorrt", "x", True)
        for one in config.optimization.cuda.graph_spec:  # Triton wants all inputs, of open axes too
            assert set(one.input) == set(spec.input_names)


def test_warm_up_at_the_best_and_the_largest_batch() -> None:
    specs = gpu_graph_specs(model_sizes(create_model("regionspot_mini")))
    encoder = graph_config(specs["sam_image_encoder"], "onnxruntime", "x", True)
    assert [one.batch_size for one in encoder.model_warmup] == [4, 8]
    head = graph_config(specs["region_head"], "tensorrt", "x", True)
    assert [one.batch_size for one in head.model_warmup] == [1]
    assert list(head.model_warmup[0].inputs["valid"].dims) == [1, 32]
    assert not graph_config(specs["region_head"], "cpu", "x", False).model_warmup


def _two_of_a_name(config: pb.ModelConfig) -> None:
    config.input[1].name = config.input[0].name


BROKEN: dict[str, tuple[Callable[[pb.ModelConfig], object], str]] = {
    "name": (
        lambda config: setattr(config, "name", "head"),
        "name 'head' is not that of its folder, 'region_head'",
    ),
    "file": (
        lambda config: setattr(config, "default_model_filename", "other"),
        "1/other is missing",
    ),
    "axis": (lambda config: config.input[0].dims.append(0), "mask_tokens has an axis of 0"),
    "type": (lambda config: setattr(config.output[0], "data_type", 0), "logits has no type"),
    "outputs": (lambda config: config.ClearField("output"), "has no inputs or no outputs"),
    "twice": (_two_of_a_name, "two tensors are called mask_tokens"),
    "gpus": (
        lambda config: config.instance_group[0].gpus.append(0),
        "names GPUs for instances on the CPU",
    ),
    "batches": (lambda config: config.dynamic_batching.SetInParent(), "with a max_batch_size of 0"),
    "preferred": (
        lambda config: config.dynamic_batching.preferred_batch_size.append(4),
        "prefers batches of more",
    ),
    "queue": (
        lambda config: setattr(config.dynamic_batching.default_queue_policy, "max_queue_size", 4),
        "some requests would wait for 500 ms",
    ),
    "warm-up": (
        lambda config: config.model_warmup.add(name="w").inputs["x"].dims.append(-1),
        "warm-up w leaves an axis open",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_lint_finds(case: str, specs: dict[str, GraphSpec], folder: Path) -> None:
    config = graph_config(specs["region_head"], "cpu", "region_head.onnx", False)
    assert lint(config, folder) == []
    spoil, expected = BROKEN[case]
    spoil(config)
    assert any(expected in problem for problem in lint(config, folder)), lint(config, folder)


def test_a_model_without_a_version(specs: dict[str, GraphSpec], tmp_path: Path) -> None:
    (tmp_path / "region_head").mkdir()
    assert lint(
        graph_config(specs["region_head"], "cpu", "x", False), tmp_path / "region_head"
    ) == ["has no version folder, such as 1/"]


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text("name: \nmax_batch")
    with pytest.raises(ArtifactError, match="is no model configuration of Triton"):
        read_config(tmp_path / "config.pbtxt")


@pytest.mark.parametrize("fields", [INPUTS, OUTPUTS])
def test_the_documentation_has_the_tables_of_the_contract(fields: tuple) -> None:
    assert fields_of(fields) in (ROOT / "docs/serve/wire-format.md").read_text(encoding="utf-8")


def test_the_documentation_has_the_codes_of_the_contract() -> None:
    table = (ROOT / "docs/serve/wire-format.md").read_text(encoding="utf-8")
    for code, meaning in CODES.items():
        assert (
            f"| `{code}` | {STATUS[code]} | {meaning} | {'retry' if code in RETRYABLE else ''}"
            in table
        )

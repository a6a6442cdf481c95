"""What an export would make, in which order, and how large."""

from __future__ import annotations

from pathlib import Path

import pytest

from regionspot.errors import InputError
from regionspot.export import plan
from regionspot.export.plan import (
    TRIAL_BYTES,
    Step,
    activation_bytes,
    affordable,
    check_libraries,
    choose_graphs,
    choose_precisions,
    estimate,
    format_plan,
    make_plan,
    sizing_model,
)
from regionspot.modeling.graphs import model_sizes
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.graph_spec import GraphSpec, Range
from regionspot.runtime.graphs import Ranges, gpu_graph_specs, graph_specs


@pytest.fixture(scope="module")
def mini() -> RegionSpot:
    return sizing_model("regionspot_mini")


@pytest.fixture(scope="module")
def specs(mini: RegionSpot) -> dict[str, GraphSpec]:
    return graph_specs(model_sizes(mini))


def test_sources_come_before_what_is_made_of_them(specs: dict[str, GraphSpec]) -> None:
    steps = make_plan(list(specs.values())[:2], ["openvino", "tensorrt-rtx"], ["int8", "fp16"])
    made: set[tuple[str, str, str]] = set()
    for step in steps:
        assert step.source is None or step.source.key in made
        made.add(step.key)
    kinds = [
        (step.format, step.precision) for step in steps if step.spec.name == "sam_image_encoder"
    ]
    assert kinds == [
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("openvino", "fp16"),
        ("onnx", "int8"),
        ("openvino", "int8"),
        ("onnx-gpu", "fp32"),
        ("onnx-gpu", "fp16"),
        ("tensorrt-rtx", "fp16"),
        ("onnx-gpu", "int8"),
        ("tensorrt-rtx", "int8"),
    ]
    assert len(made) == len(steps) == 20


def test_without_a_precision_each_format_takes_its_own(specs: dict[str, GraphSpec]) -> None:
    def kinds(*formats: str) -> list[tuple[str, str]]:
        steps = make_plan([specs["region_head"]], formats, None)
        return [(step.format, step.precision) for step in steps]

    assert kinds("onnx", "openvino") == [("onnx", "fp32"), ("openvino", "fp32")]
    assert kinds("tensorrt") == [
        ("onnx-gpu", "fp32"),
        ("onnx-gpu", "fp16"),
        ("tensorrt", "fp16"),
    ]
    assert kinds("onnx", "onnx-gpu") == [
        ("onnx", "fp32"),
        ("onnx-gpu", "fp32"),
        ("onnx-gpu", "fp16"),
    ]


def test_the_smallest_plan(specs: dict[str, GraphSpec]) -> None:
    head = specs["region_head"]
    assert make_plan([head], ["onnx"], ["fp32"]) == (Step(head, "onnx", "fp32"),)
    assert make_plan([head], ["onnx"], ["fp32"])[0].file == "onnx/fp32/region_head.onnx"
    assert make_plan([], ["onnx"], ["fp32"]) == ()


def test_engines_have_sizes_of_their_own(mini: RegionSpot, specs: dict[str, GraphSpec]) -> None:
    """Those that take prompts take one image, whatever batch the encoders take."""
    info = model_sizes(mini)
    ranges = Ranges.for_gpu(batch=Range(2, 2, 4))
    chosen = [specs["sam_image_encoder"], specs["sam_mask_decoder"]]
    steps = make_plan(chosen, ["onnx", "tensorrt"], None, gpu_graph_specs(info, ranges))
    sizes = {(step.spec.name, step.format): step.spec.ranges["batch"] for step in steps}
    assert sizes == {
        ("sam_image_encoder", "onnx"): Range(1, 1, 8),
        ("sam_image_encoder", "onnx-gpu"): Range(2, 2, 4),
        ("sam_image_encoder", "tensorrt"): Range(2, 2, 4),
        ("sam_mask_decoder", "onnx"): Range(1, 1, 8),
        ("sam_mask_decoder", "onnx-gpu"): Range(1, 1, 1),
        ("sam_mask_decoder", "tensorrt"): Range(1, 1, 1),
    }


def test_tensors_between_graphs_are_in_fp16_where_the_graphs_are(
    mini: RegionSpot, specs: dict[str, GraphSpec]
) -> None:
    graph = "sam_token_decoder_image"
    steps = make_plan(
        [specs[graph]],
        ["onnx", "tensorrt"],
        ["fp32", "fp16", "bf16", "int8"],
        gpu_graph_specs(model_sizes(mini)),
    )
    types = {
        (step.format, step.precision): tuple(
            one.dtype for one in (*step.spec.inputs, *step.spec.outputs)
        )
        for step in steps
    }
    half, single = ("float16", "float16", "float32"), ("float32",) * 3
    for precision, expected in (("fp32", single), ("fp16", half), ("bf16", single), ("int8", half)):
        assert types["onnx", precision] == single
        assert types["onnx-gpu", precision] == types["tensorrt", precision] == expected


def test_comparisons_that_fit_into_memory() -> None:
    """Fewer images and prompts of a large model; of a small one, and of what weighs little, all."""
    model = sizing_model("regionspot_bb")
    for spec in graph_specs(model_sizes(model)).values():
        largest = {axis: limits.max for axis, limits in spec.ranges.items()}
        found = affordable(spec, model, largest)
        least = {axis for axis in ("batch", "prompts") if axis in found}
        assert all(found[axis] == largest[axis] for axis in found.keys() - least)
        assert activation_bytes(spec, model, found) <= TRIAL_BYTES["cpu"] or {
            found[axis] for axis in least
        } == {1}
        if spec.name in ("region_head", "clip_image_encoder"):
            assert found == largest


def test_where_files_lie(specs: dict[str, GraphSpec]) -> None:
    steps = make_plan([specs["region_head"]], ["openvino", "tensorrt", "tensorrt-rtx"], ["fp32"])
    assert [step.file for step in steps] == [
        "onnx/fp32/region_head.onnx",
        "openvino/fp32/region_head.xml",
        "onnx-gpu/fp32/region_head.gpu.onnx",
        "tensorrt/fp32/region_head.plan",
        "tensorrt-rtx/fp32/region_head.engine",
    ]


def test_graphs_by_name(specs: dict[str, GraphSpec]) -> None:
    def names(text: str | None) -> list[str]:
        return [spec.name for spec in choose_graphs(specs, text)]

    assert names(None) == [name for name in specs if name != "region_recognizer"]
    assert names("all") == list(specs)
    assert names("region_head, sam_image_encoder") == ["sam_image_encoder", "region_head"]
    for wrong in ("heads", "region_head,heads", ""):
        with pytest.raises(InputError, match="choose of sam_image_encoder"):
            choose_graphs(specs, wrong)


def test_precisions() -> None:
    assert choose_precisions("int8, fp32") == ("fp32", "int8")
    for wrong in ("", "fp4", "fp32,fp4"):
        with pytest.raises(InputError, match="with commas between"):
            choose_precisions(wrong)


def test_fp8_is_made_for_gpus_alone(specs: dict[str, GraphSpec]) -> None:
    steps = make_plan([specs["clip_image_encoder"]], ["tensorrt-rtx"], ["fp8"])
    assert [(step.format, step.precision) for step in steps] == [
        ("onnx-gpu", "fp32"),
        ("onnx-gpu", "fp8"),
        ("tensorrt-rtx", "fp8"),
    ]
    for formats in (["onnx", "native"], ["openvino", "tensorrt"]):
        with pytest.raises(InputError, match=f"{formats[0]} graphs are for CPUs.*--trt-rtx alone"):
            make_plan(list(specs.values()), formats, ["fp16", "fp8"])


@pytest.mark.parametrize(
    ("missing", "asked", "message"),
    [
        ("onnx", ["openvino"], r"onnx artefacts need onnx: pip install 'regionspot\[export\]'"),
        (
            "openvino",
            ["openvino"],
            r"openvino artefacts need openvino: pip install 'regionspot\[export,openvino\]'",
        ),
        (
            "tensorrt",
            ["tensorrt"],
            r"tensorrt artefacts need tensorrt: .*https://pypi\.nvidia\.com.*stub",
        ),
        ("tensorrt_rtx_bindings", ["tensorrt-rtx"], r"pip install 'regionspot\[tensorrt-rtx\]'"),
    ],
)
def test_missing_libraries(
    missing: str, asked: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(InputError, match=message):
        check_libraries(asked)


def test_estimates_are_near_the_truth(
    mini: RegionSpot, specs: dict[str, GraphSpec], mini_artifacts: Path
) -> None:
    manifest = Manifest.load(mini_artifacts)
    names = [entry.name for entry in manifest.graphs]
    for one in estimate(make_plan([specs[name] for name in names], ["onnx"], ["fp32"]), mini):
        actual = manifest.find(*one.step.key).size_bytes
        assert 0.7 * actual < one.file_bytes + 700_000 and one.file_bytes < 1.3 * actual, (
            one.step.title
        )
        assert one.memory_bytes > 2 * one.file_bytes


def test_half_precision_is_half_as_large(mini: RegionSpot, specs: dict[str, GraphSpec]) -> None:
    sizes = {
        one.step.precision: one.file_bytes
        for one in estimate(
            make_plan([specs["region_head"]], ["onnx"], ["fp32", "fp16", "int8"]), mini
        )
    }
    assert sizes["fp16"] == sizes["fp32"] / 2 and sizes["int8"] < sizes["fp16"]


@pytest.mark.parametrize("name", ["regionspot_mini", "regionspot_bl_sam_h"])
def test_models_of_any_size_are_estimated_without_their_weights(name: str) -> None:
    model = sizing_model(name)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    table = format_plan(
        estimate(
            make_plan(list(graph_specs(model_sizes(model)).values()), ["onnx"], ["fp32"]), model
        )
    )
    lines = table.splitlines()
    assert lines[0].split() == [
        "graph",
        "format",
        "precision",
        "size",
        "made",
        "from",
        "memory",
        "file",
    ]
    assert len(lines) == 1 + 9 + 2 and lines[-1].startswith("9 artefacts, about")
    assert all(line == line.rstrip() for line in lines)

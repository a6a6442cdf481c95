"""The TensorRT runner: what it refuses, here; what it computes, where there is a GPU."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.errors import ArtifactError, InputError
from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.precision import write_half
from regionspot.export.quantization import quantize
from regionspot.export.trt_engine import build_engine
from regionspot.modeling.graphs import graph_module, model_info, model_sizes
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime import trt_runner
from regionspot.runtime.engine_file import (
    FLAVOURS,
    EngineSidecar,
    EngineTensor,
    profile_of,
    read_engine,
    sidecar_path,
    write_engine,
)
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.graphs import graph_specs, required_graphs
from regionspot.runtime.pipeline import SIZES_ON_GPU, RegionPipeline
from regionspot.runtime.tolerance import measure
from regionspot.runtime.torch_runner import TorchRunner
from regionspot.runtime.trt_library import listen, load_library, logger_of
from regionspot.runtime.trt_runner import TrtRunner, check_profile
from tests.runtime import gpu_checks
from tests.runtime.fake_cuda import FakeCuda

PLAN = b"the bytes of an engine" * 40
SPEC = GraphSpec(
    "doubled",
    "",
    (TensorSpec("x", "float32", ("batch", 4)),),
    (TensorSpec("y", "float32", ("batch", 4)),),
    {"batch": Range(1, 2, 8)},
)


def sidecar_of(spec: GraphSpec, flavour: str) -> EngineSidecar:
    return EngineSidecar(
        graph=spec.name,
        flavour=flavour,
        file=f"{spec.name}{FLAVOURS[flavour].suffix}",
        size_bytes=len(PLAN),
        sha256=hashlib.sha256(PLAN).hexdigest(),
        versions={FLAVOURS[flavour].module: "1.7.1.116"},
        compute_capabilities=(89,),
        device=None,
        optimization_level=3,
        workspace_mib=None,
        build_s=1.0,
        inputs=(EngineTensor("x", "float32", (-1, 4), profile_of(spec)["x"]),),
        outputs=(EngineTensor("y", "float32", (-1, 4)),),
        onnx={},
    )


@pytest.fixture(params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(tmp_path: Path, flavour: str) -> Path:
    path = tmp_path / f"doubled{FLAVOURS[flavour].suffix}"
    write_engine(path, PLAN, sidecar_of(SPEC, flavour))
    return path


@pytest.fixture
def any_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both flavours can be imported: the runner gets as far as asking for a GPU."""
    for flavour, version in (("tensorrt", "11.4.0.106"), ("tensorrt-rtx", "1.7.1.116")):
        module = ModuleType(FLAVOURS[flavour].module)
        module.__dict__["__version__"] = version
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("any_library")
def test_without_a_gpu(engine: Path, flavour: str) -> None:
    with pytest.raises(
        InputError,
        match=rf"running {engine.name} with TensorRT.* needs an NVIDIA GPU: PyTorch .*onnx",
    ):
        TrtRunner(engine, SPEC, flavour)


def test_what_is_wrong_with_the_file_is_said_first(engine: Path, flavour: str) -> None:
    """Whether or not there is a GPU, or TensorRT."""
    other = "tensorrt-rtx" if flavour == "tensorrt" else "tensorrt"
    with pytest.raises(InputError, match="open it with the runtime"):
        TrtRunner(engine, SPEC, other)
    renamed = replace(SPEC, outputs=(TensorSpec("z", "float32", ("batch", 4)),))
    with pytest.raises(ArtifactError, match="output z is missing"):
        TrtRunner(engine, renamed, flavour)
    engine.write_bytes(PLAN[1:])
    with pytest.raises(ArtifactError, match="is damaged"):
        TrtRunner(engine, SPEC, flavour)


def test_a_missing_library(engine: Path, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, FLAVOURS[flavour].module, None)
    with pytest.raises(InputError, match=r"cannot be imported.*pip install"):
        TrtRunner(engine, SPEC, flavour)


def test_an_old_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    module.__dict__["__version__"] = "8.6.1.post1"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(InputError, match=r"TensorRT 8\.6\.1\.post1 is too old, 10\.9 or later"):
        load_library("tensorrt")


def test_shapes_must_lie_in_the_profile() -> None:
    sidecar = sidecar_of(SPEC, "tensorrt-rtx")
    for batch in (1, 2, 8):
        check_profile(SPEC, sidecar, {"x": (batch, 4)})
    for shape in ((0, 4), (9, 4), (2, 5), (2,), (2, 4, 1)):
        with pytest.raises(
            InputError, match=r"x of shape .* out of the engine's range, \(1, 4\) to \(8, 4\)"
        ):
            check_profile(SPEC, sidecar, {"x": shape})


def test_a_fixed_input_has_its_own_shape() -> None:
    sidecar = replace(sidecar_of(SPEC, "tensorrt"), inputs=(EngineTensor("x", "float32", (2, 4)),))
    check_profile(SPEC, sidecar, {"x": (2, 4)})
    with pytest.raises(InputError, match="out of the engine's range"):
        check_profile(SPEC, sidecar, {"x": (3, 4)})


def test_axes_of_one_name_are_equally_long() -> None:
    """Kept tensors too, which `check_feeds` does not look into."""
    spec = replace(SPEC, inputs=(*SPEC.inputs, TensorSpec("z", "float32", ("batch",))))
    inputs = (
        EngineTensor("x", "float32", (-1, 4), ((1, 4),) * 2 + ((8, 4),)),
        EngineTensor("z", "float32", (-1,), ((1,), (1,), (8,))),
    )
    sidecar = replace(sidecar_of(SPEC, "tensorrt"), inputs=inputs)
    check_profile(spec, sidecar, {"x": (3, 4), "z": (3,)})
    with pytest.raises(InputError, match="batch is 4 in z, but 3 in the inputs before it"):
        check_profile(spec, sidecar, {"x": (3, 4), "z": (4,)})


def test_everyone_who_listens_is_told() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    log, first = logger_of(trt), listen(trt)
    assert logger_of(trt) is log and first.told() == ""
    log.log(trt.ILogger.VERBOSE, "chatter")
    log.log(trt.ILogger.WARNING, "careful")
    second = listen(trt)
    log.log(trt.ILogger.ERROR, "it\n  failed")
    log.log(trt.ILogger.ERROR, "it failed")
    assert (first.warnings, second.warnings) == (["careful"], [])
    assert first.told() == second.told() == "TensorRT says: it failed."
    first.clear()
    assert (first.told(), first.warnings, second.told()) == ("", [], "TensorRT says: it failed.")


# What it asks of CUDA and TensorRT, counted on ones that are none (tests/runtime/fake_cuda.py).


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with FakeCuda().installed(monkeypatch) as fake:
        yield fake


@pytest.fixture
def doubling(cuda: FakeCuda, tmp_path: Path) -> TrtRunner:
    path = cuda.write(tmp_path, SPEC, lambda inputs: {"y": 2 * inputs["x"]})
    return TrtRunner(path, SPEC)


def numbers(batch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 4)).astype(np.float32)


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("most", [1, 2, 16])
def test_every_answer_is_of_its_own_feeds(
    cuda: FakeCuda,
    doubling: TrtRunner,
    monkeypatch: pytest.MonkeyPatch,
    capturable: bool,
    most: int,
) -> None:
    """Run, captured and replayed, in turns with other shapes, more of them than are kept."""
    monkeypatch.setattr(trt_runner, "MAX_SHAPES", most)
    cuda.capturable = capturable
    kept = []
    for seed, batch in enumerate([3, 5, 3, 3, 5, 3, 5, 5, 1, 1, 1, 3, 5, 2, 2, 3]):
        x = numbers(batch, seed)
        np.testing.assert_array_equal(doubling.infer({"x": x})["y"], 2 * x)
        kept.append((x, doubling.infer({"x": x}, keep=("y",))["y"]))
    for (x, _), y in zip(kept, doubling.fetch([y for _, y in kept]), strict=True):
        np.testing.assert_array_equal(y, 2 * x)
    assert bool(cuda.counts["replay"]) is capturable
    assert cuda.counts["capture"] == 1 or capturable  # it is not tried again


def test_a_kept_tensor_is_copied_once_and_again_when_it_changes(
    cuda: FakeCuda, doubling: TrtRunner
) -> None:
    x = numbers(3, 0)
    kept = doubling.infer({"x": x}, keep=("y",))["y"]
    for factor in (4, 4, 40, 40):
        if factor == 40 and float(kept[0, 0]) == 2 * x[0, 0]:
            kept *= 10
        found = doubling.infer({"x": kept})["y"]
        np.testing.assert_allclose(found, factor * x, rtol=1e-6)
    np.testing.assert_array_equal(doubling.infer({"x": x})["y"], 2 * x)
    np.testing.assert_allclose(doubling.infer({"x": kept})["y"], 40 * x, rtol=1e-6)
    other = kept.clone() + 1
    np.testing.assert_allclose(doubling.infer({"x": other})["y"], 2 * other.numpy(), rtol=1e-6)
    with torch.inference_mode():  # such tensors cannot tell that they changed
        made = doubling.infer({"x": x}, keep=("y",))["y"]
        doubling.infer({"x": made})
        made *= 10
        np.testing.assert_allclose(doubling.infer({"x": made})["y"], 40 * x, rtol=1e-6)


def test_an_engine_brings_code_only_where_its_sidecar_says_so(
    cuda: FakeCuda, tmp_path: Path
) -> None:
    path = cuda.write(tmp_path, SPEC, lambda inputs: {"y": 2 * inputs["x"]}, True)
    x = numbers(3, 0)
    np.testing.assert_array_equal(TrtRunner(path, SPEC).infer({"x": x})["y"], 2 * x)
    content = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(content | {"version_compatible": False}))
    with pytest.raises(ArtifactError, match=r"doubled\.plan cannot be loaded on a fake\. .*Export"):
        TrtRunner(path, SPEC)


def test_why_an_engine_does_not_load_is_said(cuda: FakeCuda, tmp_path: Path) -> None:
    path = tmp_path / "doubled.plan"
    old = replace(sidecar_of(SPEC, "tensorrt"), versions={"tensorrt": "10.9.0.34"})
    write_engine(path, PLAN, replace(old, compute_capabilities=()))
    told = (
        r"on a fake: it was built by TensorRT 10\.9\.0\.34, and this is 11\.4\.0\.106\. .*Export it"
    )
    with pytest.raises(ArtifactError, match=told):
        TrtRunner(path, SPEC)


def test_a_run_waits_for_other_streams_only_where_kept_tensors_go_between(
    cuda: FakeCuda, doubling: TrtRunner
) -> None:
    """So that SAM's and CLIP's encoders, whose inputs are arrays, work at the same time."""
    x = numbers(3, 0)
    waits = []
    for feeds, keep in (({"x": x}, ()), ({"x": x}, ("y",)), ({"x": torch.from_numpy(x)}, ())):
        cuda.counts.clear()
        doubling.infer(feeds, keep=keep)
        waits.append((cuda.counts["wait"], cuda.counts["synchronize"]))
    assert waits == [(0, 1), (1, 0), (1, 1)]


def test_a_device_that_is_not_there(cuda: FakeCuda, tmp_path: Path) -> None:
    path = cuda.write(tmp_path, SPEC, lambda inputs: {"y": inputs["x"]})
    torch_here = trt_runner._torch_with_a_gpu("")
    torch_here.device = torch.device
    with pytest.raises(InputError, match="there is no cuda:1: PyTorch sees 1 CUDA devices"):
        trt_runner._device(torch_here, "cuda:1")
    assert str(trt_runner._device(torch_here, "cuda")) == "cuda:0"
    assert path.is_file()


def asked(pipeline: RegionPipeline, boxes: int) -> None:
    """A new image with so many boxes, and 80 words."""
    info = pipeline.info
    side = info.sam_image_size
    encoded = pipeline.encode_image(np.zeros((1, side, side, 3), np.uint8), [[side, side]])
    square = (1, info.clip_image_size, info.clip_image_size, 3)
    patches = pipeline.encode_clip(np.zeros(square, np.uint8))
    points = np.zeros((1, boxes, 2, 2), np.float32)
    labels = np.tile(np.array([2, 3], np.int32), (1, boxes, 1))
    tokens, _ = pipeline.mask_tokens(encoded, points, labels)
    pipeline.classify(tokens[:, :, 0], patches, None, np.zeros((80, info.embed_dim), np.float32))


@pytest.mark.parametrize(
    "boxes",
    [[20], [100], [300], [4, 10], [1, 60, 7, 33, 18]],
    ids=lambda boxes: "-".join(map(str, boxes)),
)
def test_nothing_is_prepared_anew_after_warm_up(
    cuda: FakeCuda, tmp_path: Path, boxes: list[int]
) -> None:
    """However the numbers of boxes change: no capture, no allocation of buffers, no shapes told to
    TensorRT, and the host waits three times for an image.
    """
    info = model_sizes(create_model("regionspot_mini", random_weights=0))
    specs = graph_specs(info)

    def zeros(spec: GraphSpec) -> Any:
        return lambda inputs: {}

    runners = {
        name: TrtRunner(cuda.write(tmp_path, spec, zeros(spec)), spec)
        for name, spec in specs.items()
        if name in required_graphs()
    }
    pipeline = RegionPipeline(
        info,
        runners,
        runtime="tensorrt",
        precision="fp16",
        fingerprint=lambda graph: graph,
        **SIZES_ON_GPU,
    )
    for count in 3 * boxes:
        asked(pipeline, count)
    cuda.counts.clear()
    for count in 4 * boxes:
        asked(pipeline, count)
    done = cuda.counts
    assert done["capture"] == done["allocation"] == done["shapes"] == done["run"] == 0, done
    assert done["synchronize"] == 3 * 4 * len(boxes)
    assert done["replay"] >= 5 * 4 * len(boxes)


# Engines of the mini model's graphs: built anywhere ahead of time, and where there is a GPU run
# beside PyTorch.


class Engines:
    """Builds and opens engines of the artefacts' graphs, and runs PyTorch beside them."""

    def __init__(self, flavour: str, model: RegionSpot, artifacts: Path, directory: Path) -> None:
        self.flavour = flavour
        self.model = model
        self.onnx = artifacts / "onnx" / "fp32"
        self.directory = directory
        self.inputs = GraphInputs(model)
        self.specs = self.inputs.specs

    def build(self, name: str, precision: str = "fp32") -> Path:
        source = self.onnx / f"{name}.onnx"
        out = self.directory / precision / f"{name}{FLAVOURS[self.flavour].suffix}"
        if out.exists():
            return out
        made = self.directory / f"{name}-{precision}.onnx"
        if precision == "int8":
            quantize(source, [self.inputs.seeded(self.specs[name])], made)
        elif precision != "fp32":
            write_half(source, made, precision)
        build_engine(
            source if precision == "fp32" else made,
            self.specs[name],
            out,
            self.flavour,
            optimization_level=0,
            timing_cache=self.directory / "timing.cache",
        )
        return out

    def open(self, name: str, **options: Any) -> TrtRunner:
        return TrtRunner(self.build(name), self.specs[name], self.flavour, **options)

    def feeds(self, name: str, seed: int = 0, **sizes: int) -> dict[str, Any]:
        spec = self.specs[name]
        smallest = {axis: allowed.min for axis, allowed in spec.ranges.items()}
        return dict(
            self.inputs.seeded(
                spec, seed, smallest | {a: n for a, n in sizes.items() if a in spec.ranges}
            )
        )

    def reference(self, name: str, feeds: dict[str, Any]) -> dict[str, Any]:
        return TorchRunner(graph_module(self.model, name), self.specs[name]).infer(feeds)


GRAPHS = (
    "sam_image_encoder",
    "clip_image_encoder",
    "sam_token_decoder_image",
    "sam_token_decoder_prompts",
    "sam_mask_decoder",
    "sam_mask_prompt",
    "region_head",
    "clip_text_encoder",
)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp16") for name in GRAPHS),
        ("region_head", "fp32"),
        ("sam_image_encoder", "int8"),
        ("sam_mask_decoder", "bf16"),
    ],
)
def test_every_graph_of_mini_builds_without_a_gpu(
    model: RegionSpot, artifacts: Path, tmp_path: Path, name: str, precision: str
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    engines = Engines("tensorrt-rtx", model, artifacts, tmp_path)
    plan, sidecar = read_engine(engines.build(name, precision), engines.specs[name], "tensorrt-rtx")
    assert len(plan) == sidecar.size_bytes and {
        tensor.name: tensor.profile for tensor in sidecar.inputs
    } == profile_of(engines.specs[name])
    assert not sidecar.warnings


@pytest.fixture(scope="module", params=list(FLAVOURS))
def on_gpu(
    request: pytest.FixtureRequest,
    model: RegionSpot,
    artifacts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engines:
    trt = pytest.importorskip(FLAVOURS[request.param].module)
    major, minor = torch.cuda.get_device_capability()
    if (
        request.param == "tensorrt-rtx"
        and f"SM{major}{minor}" not in trt.ComputeCapability.__members__
    ):
        pytest.skip(f"TensorRT-RTX does not know compute capability {major}.{minor}")
    return Engines(request.param, model, artifacts, tmp_path_factory.mktemp(request.param))


def assert_close(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype)
        assert measure(value, actual[name]).relative <= 1e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", GRAPHS)
def test_values(on_gpu: Engines, name: str) -> None:
    """Three runs of a shape (plain, captured, replayed), then of another, then the first again."""
    small = {"points": 2, "texts": 3, "text_length": 9}
    large = {**small, "batch": 2, "regions": 5, "prompts": 5, "tokens": 3, "words": 7}
    with on_gpu.open(name) as runner:
        for seed, sizes in enumerate((small, small, small, large, large, large, small)):
            feeds = on_gpu.feeds(name, seed, **sizes)
            assert_close(runner.infer(feeds), on_gpu.reference(name, feeds))
    with pytest.raises(InputError, match="closed"):
        runner.infer(feeds)


@pytest.mark.gpu
def test_graphs_change_nothing(on_gpu: Engines) -> None:
    feeds = on_gpu.feeds("region_head", regions=6, words=4)
    with (
        on_gpu.open("region_head") as captured,
        on_gpu.open("region_head", cuda_graphs=False) as plain,
    ):
        wanted = plain.infer(feeds)["logits"]
        for _ in range(4):
            np.testing.assert_allclose(captured.infer(feeds)["logits"], wanted, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_kept_tensors_go_from_runner_to_runner(on_gpu: Engines) -> None:
    """What is kept stays on the GPU, and stays what it was while the runner goes on."""
    with (
        on_gpu.open("sam_token_decoder_image") as image_part,
        on_gpu.open("sam_token_decoder_prompts") as prompt_part,
    ):
        first, second = (on_gpu.feeds("sam_token_decoder_image", seed) for seed in (0, 1))
        kept = image_part.infer(first, keep=image_part.spec.output_names)
        for _ in range(3):
            image_part.infer(second)
        assert all(isinstance(value, torch.Tensor) and value.is_cuda for value in kept.values())
        context = on_gpu.reference("sam_token_decoder_image", first)
        assert_close({name: value.cpu().numpy() for name, value in kept.items()}, context)
        prompts = on_gpu.feeds("sam_token_decoder_prompts", prompts=3, points=2) | context
        assert_close(
            prompt_part.infer(prompts | kept),
            on_gpu.reference("sam_token_decoder_prompts", prompts),
        )


@pytest.fixture(scope="module")
def whole(on_gpu: Engines) -> Iterator[RegionPipeline]:
    """A pipeline of engines."""
    with RegionPipeline(
        model_info(on_gpu.model),
        on_gpu.open,
        runtime=on_gpu.flavour,
        precision="fp32",
        fingerprint=lambda graph: graph,
        **SIZES_ON_GPU,
    ) as pipeline:
        yield pipeline


@pytest.mark.gpu
def test_a_whole_pipeline(whole: RegionPipeline, on_gpu: Engines) -> None:
    gpu_checks.check_predictions(whole, on_gpu.model)


@pytest.mark.gpu
def test_a_whole_pipeline_at_the_largest_sizes(whole: RegionPipeline, on_gpu: Engines) -> None:
    gpu_checks.check_largest_sizes(whole, on_gpu.model)


@pytest.mark.gpu
def test_three_threads_share_an_engine(on_gpu: Engines) -> None:
    """Each with shapes of its own, so that buffers and captured graphs change hands."""
    asked = [on_gpu.feeds("region_head", seed, regions=4 + seed, words=3) for seed in range(3)]
    wanted = [on_gpu.reference("region_head", feeds) for feeds in asked]
    with on_gpu.open("region_head") as runner, ThreadPoolExecutor(3) as pool:
        for _ in range(20):
            for found, expected in zip(pool.map(runner.infer, asked), wanted, strict=True):
                assert_close(found, expected)


@pytest.mark.gpu
def test_feeds_are_checked(on_gpu: Engines) -> None:
    with on_gpu.open("region_head") as runner:
        feeds = on_gpu.feeds("region_head", regions=4, words=3)
        with pytest.raises(InputError, match="needs valid too"):
            runner.infer({name: value for name, value in feeds.items() if name != "valid"})
        with pytest.raises(InputError, match="out of the engine's range"):
            runner.infer(on_gpu.feeds("region_head", regions=301))
        tokens = torch.from_numpy(feeds["mask_tokens"])
        with pytest.raises(InputError, match="kept on"):
            runner.infer(feeds | {"mask_tokens": tokens})
        with pytest.raises(InputError, match=r"must be float32, not torch\.float16"):
            runner.infer(feeds | {"mask_tokens": tokens.half().cuda()})
        assert_close(runner.infer(feeds), on_gpu.reference("region_head", feeds))


@pytest.mark.gpu
def test_an_engine_that_does_not_load(on_gpu: Engines, tmp_path: Path) -> None:
    path = tmp_path / f"doubled{FLAVOURS[on_gpu.flavour].suffix}"
    write_engine(path, PLAN, sidecar_of(SPEC, on_gpu.flavour))
    with pytest.raises(ArtifactError, match=r"cannot be loaded on .*Export it again"):
        TrtRunner(path, SPEC, on_gpu.flavour)


@pytest.mark.gpu
def test_an_engine_for_later_releases_and_other_gpus(on_gpu: Engines, tmp_path: Path) -> None:
    if on_gpu.flavour != "tensorrt":
        pytest.skip("TensorRT-RTX has other means")
    spec, path = on_gpu.specs["region_head"], tmp_path / "region_head.plan"
    sidecar = build_engine(
        on_gpu.onnx / "region_head.onnx",
        spec,
        path,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
    )
    assert sidecar.built_on is not None and sidecar.built_on.driver
    feeds = on_gpu.feeds("region_head")
    with TrtRunner(path, spec) as runner:
        assert_close(runner.infer(feeds), on_gpu.reference("region_head", feeds))

"""The graph of one layer that `regionspot doctor` runs in each runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from regionspot.cli import one_layer, probes
from regionspot.cli.findings import Finding
from regionspot.runtime.formats import has_nvidia_gpu

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HAS_CUDA = CUDA in onnxruntime.get_available_providers()

cpu_build = pytest.mark.skipif(HAS_CUDA, reason="for ONNX Runtime's CPU build")


@pytest.fixture
def claims_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ONNX Runtime, which says of a CUDA provider that it was compiled in."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    yield


def test_the_model_is_onnx() -> None:
    model = onnx.load_from_string(one_layer.MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]
    assert [tensor.name for tensor in (*model.graph.input, *model.graph.output)] == ["x", "y"]


def test_onnxruntime_runs_on_the_cpu() -> None:
    found = probes._try_providers(onnxruntime, has_gpu=False)
    assert isinstance(found, str)
    assert found.startswith(f"{onnxruntime.__version__}: runs on cpu")


@cpu_build
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_compiled_in_but_does_not_run(claims_cuda: None) -> None:
    """ONNX Runtime would take the CPU in its place."""
    found = probes._try_providers(onnxruntime, has_gpu=True)
    assert isinstance(found, Finding) and found.status == "WARN" and found.mend
    assert "runs on cpu; cuda does not run: " in found.detail
    assert "fallback to CPU EP has been explicitly disabled" in found.detail  # its own words


@cpu_build
def test_a_provider_for_gpus_is_not_tried_without_one(claims_cuda: None) -> None:
    found = probes._try_providers(onnxruntime, has_gpu=False)
    assert str(found).endswith("runs on cpu; cuda not tried: there is no NVIDIA GPU")


@cpu_build
def test_a_cpu_build_of_onnxruntime_beside_a_gpu() -> None:
    found = probes._try_providers(onnxruntime, has_gpu=True)
    assert isinstance(found, Finding) and found.status == "WARN"
    assert "it is a CPU build" in found.detail and "onnx-gpu" in found.mend


def test_both_wheels_of_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.31.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.1\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    found = probes.run("onnxruntime")
    assert found.status == "WARN"
    assert "both onnxruntime and onnxruntime-gpu are installed" in found.detail
    assert found.mend.startswith("pip uninstall onnxruntime onnxruntime-gpu")


def test_what_a_missing_library_is_called() -> None:
    """As onnxruntime-gpu 1.31.1 writes it; the exception says less."""
    log = (
        "2026-11-30 14:32:59.793893981 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 "
        "operator()] provider_bridge_ort.cc:2043 onnxruntime::ProviderLibrary::Get() "
        "[ONNXRuntimeError] : 1 : FAIL : Failed to load library "
        "/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so with error: "
        "libcublasLt.so.13: cannot open shared object file: No such file or directory\n"
    )
    assert one_layer._reason("fallback is disabled", log) == (
        "failed to load libonnxruntime_providers_cuda.so: libcublasLt.so.13: cannot open shared "
        "object file: No such file or directory"
    )
    assert one_layer._reason("an option\nis wrong", "chatter") == "an option is wrong"


@pytest.mark.skipif(has_nvidia_gpu(), reason="for a machine without a GPU")
def test_tensorrt_rtx_builds_ahead_of_time() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    found = probes.run("tensorrt_rtx")
    assert found.status == "WARN" and "there is no NVIDIA GPU to run engines" in found.detail
    assert "built an engine of one layer ahead of time" in found.detail


def test_a_failure_is_told_in_the_words_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_layer, "MODEL", one_layer.MODEL.replace(b"Add", b"Odd"))
    with pytest.raises(RuntimeError, match="No Op registered for Odd"):
        one_layer.run_in_onnxruntime(onnxruntime, CPU)
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    with pytest.raises(RuntimeError, match=r"refuses the graph\. TensorRT says: .*Odd"):
        one_layer.build_in_tensorrt(trt, probes.RTX_CAPABILITY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for PyTorch without CUDA")
def test_an_engine_that_pytorch_cannot_run() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    found = probes._build_and_run("tensorrt_rtx", trt)
    assert isinstance(found, Finding) and found.status == "WARN" and "CUDA" in found.mend
    assert found.detail.endswith(
        "built an engine of one layer, not run: PyTorch has no CUDA device here"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx_bindings"])
def test_tensorrt_builds_and_runs(module: str) -> None:
    trt = pytest.importorskip(module)
    one_layer.run_in_tensorrt(trt, torch, one_layer.build_in_tensorrt(trt))

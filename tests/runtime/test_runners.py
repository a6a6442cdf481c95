"""One small graph in PyTorch, ONNX Runtime and OpenVINO: the same answers, the same refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from torch import Tensor, nn

from regionspot.errors import ArtifactError, InputError
from regionspot.runtime.formats import open_graph
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.runtime.ort_runner import (
    FixedBuffers,
    OrtRunner,
    _tensorrt_options,
    engine_cache,
    profile_options,
)
from regionspot.runtime.runner import Runner
from regionspot.runtime.torch_runner import TorchRunner, evaluating
from tests.runtime.fake_cuda import FakeCuda

SPEC = GraphSpec(
    "small",
    "y = where(flags, x @ w, 0) and the counts, one up",
    (
        TensorSpec("x", "float32", ("batch", "n", 3)),
        TensorSpec("flags", "bool", ("batch", "n")),
        TensorSpec("counts", "int32", ("n",)),
    ),
    (TensorSpec("y", "float32", ("batch", "n", 2)), TensorSpec("more", "int32", ("n",))),
    {"batch": Range(1, 1, 4), "n": Range(1, 2, 8)},
)
WEIGHT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
GRAPH = """
<ir_version: 9, opset_import: ["" : 18]>
small (float[batch, n, 3] x, bool[batch, n] flags, int32[n] counts)
=> (float[batch, n, 2] y, int32[n] more)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}, float zero = {0}, int32 one = {1}, int64[1] last = {-1}>
{
  product = MatMul (x, w)
  mask = Unsqueeze (flags, last)
  y = Where (mask, product, zero)
  more = Add (counts, one)
}
"""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(WEIGHT))
        self.dropout = nn.Dropout(0.5)
        self.grad_mode: bool | None = None

    def forward(self, x: Tensor, flags: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        self.grad_mode = torch.is_grad_enabled()
        return torch.where(flags.unsqueeze(-1), self.dropout(x @ self.w), 0.0), counts + 1


class HalfInside(Small):
    """Answers in bf16."""

    def forward(self, x: Tensor, flags: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        y, more = super().forward(x, flags, counts)
        return y.bfloat16(), more


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(GRAPH), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


OpenRunner = Callable[..., Runner]


@pytest.fixture(params=["torch", "onnxruntime", "openvino"])
def open_runner(request: pytest.FixtureRequest, onnx_file: Path) -> OpenRunner:
    """Opens the small graph in one runtime after another."""
    if request.param == "torch":
        return lambda: TorchRunner(Small(), SPEC)
    runner_class: type[OrtRunner] | type[OpenVinoRunner]
    runner_class = OrtRunner if request.param == "onnxruntime" else OpenVinoRunner
    return lambda: runner_class(onnx_file, SPEC)


@pytest.fixture(params=[OrtRunner, OpenVinoRunner])
def file_runner(request: pytest.FixtureRequest) -> type[OrtRunner] | type[OpenVinoRunner]:
    runner_class: type[OrtRunner] | type[OpenVinoRunner] = request.param
    return runner_class


def fixed_size_file(folder: Path) -> tuple[Path, GraphSpec]:
    """The same graph for two images of four alone, and its spec."""
    graph = GRAPH.replace("batch, n, 3", "2, 4, 3").replace("batch, n] flags", "2, 4] flags")
    path = folder / "small.onnx"
    onnx.save(onnx.parser.parse_model(graph), path)
    return path, replace(SPEC, ranges={"batch": Range(2, 2, 2), "n": Range(4, 4, 4)})


def feeds_of(batch: int = 2, n: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, n, 3)).astype(np.float32),
        "flags": rng.random((batch, n)) < 0.5,
        "counts": rng.integers(0, 9, n, dtype=np.int32),
    }


def expected_of(feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(feeds["flags"][..., None], feeds["x"] @ WEIGHT, 0)


class TestEveryRunner:
    def test_values_shapes_and_dtypes(self, open_runner: OpenRunner) -> None:
        with open_runner() as runner:
            for size in ((1, 1), (2, 4), (4, 8), (2, 4)):
                feeds = feeds_of(*size)
                found = runner.infer(feeds)
                assert list(found) == ["y", "more"]
                assert found["y"].dtype == np.float32 and found["more"].dtype == np.int32
                np.testing.assert_allclose(found["y"], expected_of(feeds), atol=1e-5)
                np.testing.assert_array_equal(found["more"], feeds["counts"] + 1)

    def test_an_answer_outlives_later_runs_and_the_runner(self, open_runner: OpenRunner) -> None:
        runner, first, second = open_runner(), feeds_of(seed=1), feeds_of(seed=2)
        found = runner.infer(first)
        runner.infer(second)
        runner.close()
        del runner
        np.testing.assert_allclose(found["y"], expected_of(first), atol=1e-5)

    def test_inputs_are_left_alone(self, open_runner: OpenRunner) -> None:
        feeds = feeds_of()
        before = {name: array.copy() for name, array in feeds.items()}
        with open_runner() as runner:
            found = runner.infer(feeds)
            found["y"][:] = 7
        for name, array in before.items():
            np.testing.assert_array_equal(feeds[name], array)

    def test_arrays_in_any_memory_order(self, open_runner: OpenRunner) -> None:
        feeds = feeds_of()
        odd = {
            "x": np.asfortranarray(feeds["x"]),
            "flags": np.repeat(feeds["flags"], 2, axis=1)[:, ::2],
            "counts": np.frombuffer(feeds["counts"].tobytes(), np.int32),  # read-only
        }
        with open_runner() as runner:
            np.testing.assert_allclose(runner.infer(odd)["y"], expected_of(feeds), atol=1e-5)

    def test_what_is_kept_on_the_cpu_is_an_array_that_can_be_fed_again(
        self, open_runner: OpenRunner
    ) -> None:
        feeds = feeds_of(1, 3)
        with open_runner() as runner:
            kept = runner.infer(feeds, keep=["more"])["more"]
            assert isinstance(kept, np.ndarray)
            again = runner.infer({**feeds, "counts": kept})
        np.testing.assert_array_equal(again["more"], feeds["counts"] + 2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"counts": None}, "small needs counts too: its inputs are x, flags, counts"),
            ({"other": np.zeros(3)}, "small takes no other"),
            (
                {"x": np.zeros((2, 4, 3))},
                r"x must be float32 \('batch', 'n', 3\), not float64 \(2, 4, 3\)",
            ),
            ({"x": np.zeros((2, 4, 5), np.float32)}, r"x must be .*, not \(2, 4, 5\)"),
            (
                {"flags": np.zeros((2, 5), bool)},
                r"flags must be .*, not \(2, 5\): n is 4 in the inputs before it",
            ),
        ],
    )
    def test_refuses(
        self, open_runner: OpenRunner, change: dict[str, np.ndarray | None], message: str
    ) -> None:
        feeds = {
            name: array for name, array in {**feeds_of(), **change}.items() if array is not None
        }
        with open_runner() as runner, pytest.raises(InputError, match=message):
            runner.infer(feeds)


class TestFiles:
    def test_a_missing_file(self, file_runner: type[OrtRunner], tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"absent\.onnx does not exist: export it"):
            file_runner(tmp_path / "absent.onnx", SPEC)

    @pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
    def test_a_damaged_file(
        self, file_runner: type[OrtRunner], onnx_file: Path, damage: str
    ) -> None:
        content = onnx_file.read_bytes()
        onnx_file.write_bytes(
            {"cut": content[: len(content) // 2], "garbage": b"no graph" * 99, "empty": b""}[damage]
        )
        with pytest.raises(
            ArtifactError, match=r"(cannot load .*small\.onnx|is not the graph small)"
        ):
            file_runner(onnx_file, SPEC)

    def test_a_renamed_output(self, file_runner: type[OrtRunner], onnx_file: Path) -> None:
        graph = GRAPH.replace("[batch, n, 2] y", "[batch, n, 2] z").replace(
            "y = Where", "z = Where"
        )
        onnx.save(onnx.parser.parse_model(graph), onnx_file)
        with pytest.raises(
            ArtifactError, match="is not the graph small: output y is missing; output z is unknown"
        ):
            file_runner(onnx_file, SPEC)

    def test_another_graph(self, file_runner: type[OrtRunner], onnx_file: Path) -> None:
        wider = replace(
            SPEC, outputs=(TensorSpec("y", "float32", ("batch", "n", 7)), SPEC.outputs[1])
        )
        with pytest.raises(
            ArtifactError, match=r"output y is float32 \(.*2\) instead of float32 \(batch, n, 7\)"
        ):
            file_runner(onnx_file, wider)

    def test_closed(self, file_runner: type[OrtRunner], onnx_file: Path) -> None:
        runner = file_runner(onnx_file, SPEC)
        runner.close()
        runner.close()
        with pytest.raises(InputError, match=r"small\.onnx was closed: open it again"):
            runner.infer(feeds_of())

    def test_sizes_that_the_file_does_not_take(
        self, file_runner: type[OrtRunner], onnx_file: Path
    ) -> None:
        """A file whose axes are fixed refuses others by itself, in words of its own."""
        path, fixed = fixed_size_file(onnx_file.parent)
        with file_runner(path, fixed) as runner:
            runner.infer(feeds_of(2, 4))
            with pytest.raises(
                InputError,
                match=r"cannot run small of .*on x \(3, 4, 3\), .*: batch is 3, not in 2:2:2",
            ):
                runner.infer(feeds_of(3, 4))
            np.testing.assert_array_equal(
                runner.infer(feeds_of(2, 4))["more"], feeds_of(2, 4)["counts"] + 1
            )

    @pytest.mark.parametrize(
        ("module", "library", "advice"),
        [
            ("ort_runner", "onnxruntime", "pip install 'regionspot[onnx]'"),
            ("openvino_runner", "openvino", "pip install 'regionspot[openvino]'"),
        ],
    )
    def test_a_missing_library_is_named(self, module: str, library: str, advice: str) -> None:
        code = f"import sys; sys.modules['{library}'] = None; import regionspot.runtime.{module}"
        error = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        ).stderr.splitlines()[-1]
        assert error.startswith("regionspot.errors.InputError") and advice in error


class TestTorch:
    def test_evaluation_mode_while_it_runs_and_no_gradients(self) -> None:
        module = Small().train()
        module.dropout.eval()
        module.dropout.train()
        feeds = feeds_of()
        np.testing.assert_allclose(
            TorchRunner(module, SPEC).infer(feeds)["y"], expected_of(feeds), atol=1e-5
        )
        assert module.training and module.dropout.training and module.grad_mode is False

    def test_the_mode_is_put_back_after_an_error(self) -> None:
        module = Small().train()
        with pytest.raises(InputError):
            TorchRunner(module, SPEC).infer({})
        module.w = nn.Parameter(torch.zeros(4, 4))
        with pytest.raises(RuntimeError):
            TorchRunner(module, SPEC).infer(feeds_of())
        assert module.training and module.dropout.training

    def test_half_precision_answers_in_float32(self) -> None:
        feeds = feeds_of()
        found = TorchRunner(HalfInside(), SPEC).infer(feeds)
        assert found["y"].dtype == np.float32
        np.testing.assert_allclose(found["y"], expected_of(feeds), rtol=0.05, atol=0.05)

    def test_autocast_around_it_changes_nothing(self) -> None:
        feeds = feeds_of()
        runner = TorchRunner(Small(), SPEC)
        expected = runner.infer(feeds)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.warns(UserWarning, match="autocast has no effect"),
        ):
            found = runner.infer(feeds)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)

    def test_a_module_that_is_refused_is_not_run(self) -> None:
        def refuse() -> None:
            raise InputError("it changed")

        with pytest.raises(InputError, match="it changed"):
            TorchRunner(Small(), SPEC, check=refuse).infer(feeds_of())

    def test_no_dropout_while_any_thread_uses_the_module(self) -> None:
        """Two graphs share a module in training mode, and the run that began first ends first."""
        shared = Small().train()
        first, second = nn.Sequential(shared), nn.Sequential(shared)
        runs = [evaluating(first), evaluating(second)]
        for run in runs:
            run.__enter__()
            assert not shared.training
        runs[0].__exit__(None, None, None)
        assert not shared.training and not shared.dropout.training
        runs[1].__exit__(None, None, None)
        assert shared.training and shared.dropout.training
        assert [first.training, second.training] == [True, True]

    def test_it_goes_where_the_module_goes(self) -> None:
        module = Small()
        runner = TorchRunner(module, SPEC)
        assert runner.device.type == "cpu"
        module.to("meta")
        assert runner.device.type == "meta"

    def test_what_was_kept_on_a_cpu_is_fetched_as_it_is(self) -> None:
        runner = TorchRunner(Small(), SPEC)
        kept = runner.infer(feeds_of(), keep=SPEC.output_names)
        (fetched,) = runner.fetch([kept["y"]])
        assert np.shares_memory(fetched, kept["y"])

    def test_compiled(self) -> None:
        """By inductor, which needs a C++ compiler; of two sizes, and in another thread too."""
        torch.compiler.reset()
        runner = TorchRunner(Small().train(), SPEC, compiled=True)
        for n in (3, 5, 7):
            feeds = feeds_of(2, n)
            found = runner.infer(feeds)
            np.testing.assert_allclose(found["y"], expected_of(feeds), atol=1e-5)
            np.testing.assert_array_equal(found["more"], feeds["counts"] + 1)
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(runner.infer, feeds).result()
        np.testing.assert_array_equal(again["y"], found["y"])
        assert runner.module.training

    def test_waits_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted on a CUDA that is none: one wait for a run, none if all is kept, one to fetch;
        for the caller's stream only where the weights changed, or kept tensors come or go.
        """
        fake, module = FakeCuda(), Small()
        runner = TorchRunner(module, SPEC, torch.device("cuda", 0), own_stream=True)
        feeds, counts = feeds_of(), []
        with fake.installed_for_torch(monkeypatch):

            def counted(feeds: Any, keep: tuple[str, ...] = ()) -> Any:
                fake.counts.clear()
                found = runner.infer(feeds, keep)
                counts.append((fake.counts["wait"], fake.counts["synchronize"]))
                return found

            runs = [counted(feeds), counted(feeds)]
            kept = counted(feeds, SPEC.output_names)
            more = counted({**feeds, "counts": kept["more"]})
            with torch.no_grad():
                module.w.mul_(1)
            counted(feeds)
            fake.counts.clear()
            arrays = runner.fetch([kept["y"], kept["more"]])
            counts.append((fake.counts["wait"], fake.counts["synchronize"]))
        assert counts == [(1, 1), (0, 1), (1, 0), (1, 1), (1, 1), (1, 1)]
        for found in (*(one["y"] for one in runs), arrays[0], more["y"]):
            np.testing.assert_allclose(found, expected_of(feeds), atol=1e-5)
        np.testing.assert_array_equal(more["more"], feeds["counts"] + 2)

    @pytest.mark.gpu
    def test_what_is_kept_stays_on_the_gpu(self) -> None:
        runner, feeds = TorchRunner(Small().cuda(), SPEC), feeds_of(1, 3)
        kept = runner.infer(feeds, keep=["more"])["more"]
        assert kept.device.type == "cuda"
        np.testing.assert_array_equal(
            runner.infer({**feeds, "counts": kept})["more"], feeds["counts"] + 2
        )


class TestOnnxRuntime:
    def test_a_graph_that_fails(self, onnx_file: Path) -> None:
        rows_of_three = (
            "rows = Reshape (counts, threes)\n  flat = Reshape (rows, last)\n  more = Add (flat, "
            "one)"
        )
        graph = GRAPH.replace("more = Add (counts, one)", rows_of_three).replace(
            "last = {-1}", "last = {-1}, int64[2] threes = {-1, 3}"
        )
        onnx.save(onnx.parser.parse_model(graph), onnx_file)
        with OrtRunner(onnx_file, SPEC) as runner:
            runner.infer(feeds_of(2, 3))
            with pytest.raises(
                ArtifactError,
                match=r"cannot run small of .* on x \(2, 4, 3\), .*ask for less at a time",
            ):
                runner.infer(feeds_of(2, 4))

    @pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
    def test_a_provider_that_is_not_there(self, onnx_file: Path, provider: str) -> None:
        import onnxruntime

        name = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
        if name in onnxruntime.get_available_providers():
            pytest.skip(f"{name} is there")
        with pytest.raises(
            InputError, match=rf"has no {name} .*pip install 'regionspot\[onnx-gpu\]'"
        ):
            OrtRunner(onnx_file, SPEC, provider)

    def test_an_unknown_provider(self, onnx_file: Path) -> None:
        with pytest.raises(
            InputError, match="no provider 'abacus': choose one of cpu, cuda, tensorrt"
        ):
            OrtRunner(onnx_file, SPEC, "abacus")

    def test_threads(self, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def threads(runner: OrtRunner) -> int:
            assert runner._session is not None
            return int(runner._session.get_session_options().intra_op_num_threads)

        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert threads(OrtRunner(onnx_file, SPEC)) == 2
        assert threads(OrtRunner(onnx_file, SPEC, threads=1)) == 1

    @pytest.mark.parametrize(
        ("precision", "level"),
        [("fp32", "ALL"), ("int8", "ALL"), ("fp16", "BASIC"), ("fp8", "BASIC")],
    )
    def test_half_precision_without_the_last_optimisations(
        self, onnx_file: Path, precision: str, level: str
    ) -> None:
        session = OrtRunner(onnx_file, SPEC, precision=precision)._session
        assert session is not None
        assert session.get_session_options().graph_optimization_level.name == f"ORT_ENABLE_{level}"

    def test_tensorrts_profiles_are_the_specs_ranges(self) -> None:
        assert profile_options(SPEC) == {
            "trt_profile_min_shapes": "x:1x1x3,flags:1x1,counts:1",
            "trt_profile_opt_shapes": "x:1x2x3,flags:1x2,counts:2",
            "trt_profile_max_shapes": "x:4x8x3,flags:4x8,counts:8",
        }

    def test_tensorrts_engines_are_those_of_one_file(
        self, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """ONNX Runtime names an engine after the graph's structure: other weights would get the
        first file's engine.
        """
        monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path / "cache"))
        first = engine_cache(onnx_file)
        assert first == engine_cache(onnx_file)
        options = _tensorrt_options(onnx_file, SPEC, 0)
        assert options["trt_engine_cache_path"] == str(first) and first.is_dir()
        (tmp_path / "small.onnx.data").write_bytes(b"weights")
        second = engine_cache(onnx_file)
        (tmp_path / "small.onnx.data").write_bytes(b"Weights")
        third = engine_cache(onnx_file)
        onnx.save(onnx.parser.parse_model(GRAPH.replace("{1, 2, 3,", "{1, 2, 9,")), onnx_file)
        assert len({first, second, third, engine_cache(onnx_file)}) == 4

    @pytest.mark.parametrize(
        "device", ["cuda:x", "cpu:7", "cuda:", "cuda:-1", "abacus", "cuda:1:2", ""]
    )
    def test_devices_that_are_none(self, onnx_file: Path, device: str) -> None:
        with pytest.raises(
            InputError, match=f"onnxruntime works on auto, cpu, cuda, .*, not on {device}$"
        ):
            open_graph(onnx_file, SPEC, "onnxruntime", "fp32", device)

    def test_a_cuda_graph_can_be_asked_for(self, onnx_file: Path) -> None:
        with pytest.raises(
            InputError, match="small cannot be captured as a CUDA graph: its shapes are dynamic"
        ):
            open_graph(onnx_file, SPEC, "onnxruntime", "fp32", "cuda", cuda_graph=True)
        with pytest.raises(
            InputError, match="cuda_graph is an option of onnxruntime, not of openvino"
        ):
            open_graph(onnx_file, SPEC, "openvino", "fp32", cuda_graph=True)

    def test_a_cuda_graph_needs_fixed_shapes_and_cuda(self, onnx_file: Path) -> None:
        with pytest.raises(InputError, match=r"its shapes are dynamic \(batch 1:1:4, n 1:2:8\)"):
            OrtRunner(onnx_file, SPEC, "cuda", cuda_graph=True)
        fixed = replace(SPEC, ranges={"batch": Range(2, 2, 2), "n": Range(4, 4, 4)})
        with pytest.raises(InputError, match="the provider is cpu, not cuda"):
            OrtRunner(onnx_file, fixed, "cpu", cuda_graph=True)

    def test_buffers_that_stay_where_they_are(self, onnx_file: Path) -> None:
        """What a CUDA graph runs on, here without one: the same addresses in every run, kept
        outputs apart.
        """
        fixed = replace(SPEC, ranges={"batch": Range(2, 2, 2), "n": Range(4, 4, 4)})
        session = OrtRunner(onnx_file, fixed)._session
        assert session is not None
        buffers = FixedBuffers(session, fixed, ("cpu", 0))
        addresses = [
            value.data_ptr() for value in (*buffers._inputs.values(), *buffers._outputs.values())
        ]
        first, second = feeds_of(seed=1), feeds_of(seed=2)
        kept = buffers.infer(first, keep=["more"])["more"]
        found = buffers.infer({**second, "counts": kept}, keep=[])
        np.testing.assert_allclose(found["y"], expected_of(second), atol=1e-5)
        np.testing.assert_array_equal(found["more"], first["counts"] + 2)
        np.testing.assert_array_equal(kept.numpy(), first["counts"] + 1)
        assert addresses == [
            value.data_ptr() for value in (*buffers._inputs.values(), *buffers._outputs.values())
        ]


class TestOpenVino:
    @pytest.mark.parametrize(("precision", "name"), [(None, "f32"), ("bf16", "bf16")])
    def test_precision_is_what_was_asked_for(
        self, onnx_file: Path, precision: str | None, name: str
    ) -> None:
        """Of its own accord OpenVINO takes bf16 where the CPU has it."""
        runner = (
            OpenVinoRunner(onnx_file, SPEC)
            if precision is None
            else OpenVinoRunner(onnx_file, SPEC, precision)
        )
        assert runner._request is not None
        hint = runner._request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
        assert (
            hint.get_type_name() == name or "avx512_bf16" not in Path("/proc/cpuinfo").read_text()
        )

    def test_threads(self, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def threads(runner: OpenVinoRunner) -> int:
            assert runner._request is not None
            return int(runner._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS"))

        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert threads(OpenVinoRunner(onnx_file, SPEC)) == 1
        if len(os.sched_getaffinity(0)) > 1:
            assert threads(OpenVinoRunner(onnx_file, SPEC, threads=2)) == 2

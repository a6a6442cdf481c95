"""How fast a graph could be: its arithmetic and its traffic against what this machine does at best.

Arithmetic is counted over the graph's module on PyTorch's "meta" device, which computes nothing:
products, convolutions and attention, two operations for each multiply-add. Traffic is the least
there can be: weights, inputs and outputs once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regionspot.benchmarks.flops import count_flops
from regionspot.benchmarks.timing import cuda_clock, repeat, wall_clock
from regionspot.export.plan import sizing_model
from regionspot.modeling.graphs import graph_module, model_sizes
from regionspot.runtime.graphs import graph_specs

GEMM_SIDE, GPU_GEMM_SIDE = 2048, 8192
COPY_BYTES, GPU_COPY_BYTES = 1 << 28, 1 << 30
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class Cost:
    """Of one run: floating-point operations, and bytes that must be moved at least."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> Cost:
        return Cost(self.flops * count, self.bytes * count)


class GraphCosts:
    """Of a preset's graphs at any size; no weights are needed.

    Args:
        model: the preset's name.
    """

    def __init__(self, model: str) -> None:
        self._model = sizing_model(model)
        self._model.sam.fused_attention = False  # it takes more arithmetic than is needed
        self._specs = graph_specs(model_sizes(self._model))
        self._count = functools.cache(self._count_once)

    def of(self, graph: str, sizes: Mapping[str, int], precision: str = "fp32") -> Cost:
        """Of one run of a graph.

        Args:
            sizes: of each of its dynamic axes.
            precision: of its weights; inputs and outputs are as the graph's spec says.
        """
        spec = self._specs[graph]
        flops, weights = self._count(graph, tuple((axis, sizes[axis]) for axis in spec.ranges))
        moved = sum(
            torch.empty(
                tensor.resolved(sizes), dtype=getattr(torch, tensor.dtype), device="meta"
            ).nbytes
            for tensor in (*spec.inputs, *spec.outputs)
        )
        return Cost(flops, moved + weights * WEIGHT_BYTES[precision])

    def _count_once(self, graph: str, sizes: tuple[tuple[str, int], ...]) -> tuple[int, int]:
        """Operations and the number of weights."""
        # the head's graph reads its value
        self._model.clip.clip.logit_scale = torch.nn.Parameter(torch.zeros(()), False)
        module = graph_module(self._model, graph).to("meta")
        feeds = [
            torch.zeros(
                tensor.resolved(dict(sizes)), dtype=getattr(torch, tensor.dtype), device="meta"
            )
            for tensor in self._specs[graph].inputs
        ]
        with torch.inference_mode(), _UsedWeights(module) as used:
            flops = count_flops(lambda: module(*feeds))
        return flops, used.count


class _UsedWeights(TorchDispatchMode):
    """Which of a module's parameters an operation sees: a graph shares its module with graphs that
    use others.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._sizes = {id(weight): weight.numel() for weight in module.parameters()}
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        return sum(self._sizes[key] for key in self._seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self._sizes:
                self._seen.add(id(value))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Rates:
    """What a machine was measured to do.

    Args:
        gemm: precision -> operations a second of a square matrix product of GEMM_SIDE, or
            GPU_GEMM_SIDE.
        copy: bytes a second, read and written bytes both counted.
    """

    gemm: Mapping[str, float]
    copy: float

    def least_seconds(self, cost: Cost, precision: str) -> float | None:
        """The roofline's time; None where no product was measured in that precision."""
        rate = self.gemm.get(precision)
        return None if rate is None else max(cost.flops / rate, cost.bytes / self.copy)


def measure_rates(device: str = "cpu", threads: int | None = None) -> Rates:
    """Of this machine, through PyTorch: products in single precision, in half precisions and in
    int8, a large copy.

    A half precision that is slower than single here is left out: what claims it is computed in
    single precision.
    """
    if threads:
        torch.set_num_threads(threads)
    on_cpu = device == "cpu"
    side, moved = (GEMM_SIDE, COPY_BYTES) if on_cpu else (GPU_GEMM_SIDE, GPU_COPY_BYTES)
    flops = 2 * side**3
    dtypes = {"fp32": torch.float32}
    if not on_cpu:
        dtypes |= {"fp16": torch.float16, "bf16": torch.bfloat16}
    gemm = {
        name: flops / _best(_product(dtype, device, side), device) for name, dtype in dtypes.items()
    }
    with contextlib.suppress(RuntimeError):  # GPUs and builds without products in int8
        gemm["int8"] = flops / _best(_int8_product(device, side), device)
    source = torch.ones(moved // 4, device=device)
    target = torch.empty_like(source)
    return Rates(gemm, 2 * moved / _best(lambda: target.copy_(source), device))


def _product(dtype: torch.dtype, device: str, side: int) -> Callable[[], object]:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right


def _int8_product(device: str, side: int) -> Callable[[], object]:
    shape = (side, side)
    if device != "cpu":
        left, right = (torch.randint(-9, 9, shape, device=device).to(torch.int8) for _ in range(2))
        return lambda: torch._int_mm(left, right)
    rows = torch.quantize_per_tensor(torch.randn(shape), 0.05, 128, torch.quint8)
    weights = torch.quantize_per_tensor(torch.randn(shape), 0.05, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weights, None)
    return lambda: torch.ops.quantized.linear(rows, packed, 0.1, 128)


def _best(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several runs: what the machine can do, not what it did in the
    mean.
    """
    run()
    return min(repeat(run, enough_s=1.0, clock=wall_clock if device == "cpu" else cuda_clock))

"""What TensorRT made of a graph: the kernels of an engine after fusion, from the builder's own log.

A machine without a GPU cannot load an engine and ask it, but the builder prints the list of layers
when it is asked for details, and the scratch memory that they need.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

FUSED_ATTENTION = "_gemm_mha"
"""What TensorRT-RTX's compiler calls a kernel that does a whole attention: products and softmax."""

BYTES = {
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Int8": 1,
    "UInt8": 1,
    "FP8": 1,
    "Bool": 1,
    "Int32": 4,
    "Int64": 8,
}
_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<tensors>.*)")
_TENSOR = re.compile(r"Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_CONSTANTS = re.compile(r"Constants: \[.*?\](?=, Outputs: )")
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine.

    Args:
        name, kind: TensorRT's.
        inputs, outputs: data types of its activations, without repetition.
        activation_bytes: read and written; None where an axis is dynamic.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    activation_bytes: int | None

    @property
    def is_attention(self) -> bool:
        return FUSED_ATTENTION in self.name


@dataclass(frozen=True)
class LayerReport:
    """An engine's kernels in figures.

    Args:
        fused_attentions: kernels that do a whole attention.
        kernels: how many there are.
        activation_gb: that they read and write in one run, weights apart; None where an axis is
            dynamic.
        scratch_mib: for the largest shapes of the profile; None where the log does not say.
        types: "kind inputs->outputs", such as "gemm Half->Half", and how many are so.
    """

    fused_attentions: int
    kernels: int
    activation_gb: float | None
    scratch_mib: float | None
    types: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_detail(message: str) -> bool:
    """Whether a line of the builder's log is one that `report_of` reads."""
    return "LayerType: " in message or "Max Scratch Memory: " in message


def report_of(details: Iterable[str]) -> LayerReport | None:
    """The report from the builder's log, or None where it lists no layers."""
    layers: dict[str, Layer] = {}
    scratch = None
    for line in details:
        if (layer := _layer(line)) is not None:
            layers[layer.name] = layer
        elif (found := _SCRATCH.search(line)) is not None:
            scratch = round(int(found[1]) / 2**20, 1)
    if not layers:
        return None
    moved = _total(layer.activation_bytes for layer in layers.values())
    types = Counter(
        f"{layer.kind} {'+'.join(layer.inputs)}->{'+'.join(layer.outputs)}"
        for layer in layers.values()
    )
    return LayerReport(
        sum(layer.is_attention for layer in layers.values()),
        len(layers),
        None if moved is None else round(moved / 1e9, 3),
        scratch,
        dict(types.most_common()),
    )


def _layer(line: str) -> Layer | None:
    found = _LAYER.search(line)
    if found is None:
        return None
    inputs, _, outputs = _CONSTANTS.sub("", found["tensors"]).partition("Outputs: ")
    sides = [_TENSOR.findall(side.split("Metadata: ")[0]) for side in (inputs, outputs)]
    read, written = (tuple(dict.fromkeys(dtype for _, dtype in side)) for side in sides)
    moved = _total(_bytes(shape, dtype) for side in sides for shape, dtype in side)
    return Layer(found["name"], found["kind"], read, written, moved)


def _total(sizes: Iterable[int | None]) -> int | None:
    """None if one is not known."""
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


def _bytes(shape: str, dtype: str) -> int | None:
    sizes = [int(size) for size in shape.split(",") if size]
    return None if min(sizes, default=1) < 0 else math.prod(sizes) * BYTES.get(dtype, 4)

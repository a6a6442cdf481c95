"""Large linear layers by our own kernel, inside an OpenVINO graph.

On shared cores with AVX-512 ours take a tenth to a third less time (`regionspot/native/matrix.inl` says why). Where a
graph that is being loaded holds a product of many rows with constant weights, one operation takes the place of it, of
its bias and of a GELU. Files stay OpenVINO's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import DiscreteTypeInfo, Model, Node, Output, Type
from openvino.utils import replace_node

from regionspot import _native
from regionspot.runtime.openvino_operation import NativeOperation, is_constant, only_user

GRAIN = 16
"""Inputs and outputs must be multiples of it."""

LARGE = 2_000_000_000
"""Products of numbers in a layer. With fewer, as in CLIP's, starting threads beside OpenVINO's costs what is saved."""


class NativeLinear(NativeOperation):
    """x (..., inputs) to (..., outputs), single precision.

    Its weights are no inputs, but packed within: OpenVINO would keep a copy of its own.

    Args:
        layer: the weights.
        width: its outputs.
    """

    class_type_info = DiscreteTypeInfo("NativeLinear", "regionspot")

    def __init__(
        self,
        inputs: list[Output] | None = None,
        threads: int = 1,
        alive: list[Any] | None = None,
        layer: _native.LinearLayer | None = None,
        width: int = 0,
    ) -> None:
        self.layer, self.width = layer, width
        super().__init__(inputs, threads, alive)

    def validate_and_infer_types(self) -> None:
        shape = self.get_input_partial_shape(0)
        shape[len(shape) - 1] = self.width
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def clone_with_new_inputs(self, new_inputs: list[Output]) -> NativeLinear:
        return NativeLinear(new_inputs, self.threads, self.alive, self.layer, self.width)

    def visit_attributes(self, visitor: Any) -> bool:
        """With one that says whose weights it has: OpenVINO makes one operation of two that differ in nothing."""
        visitor.on_attributes({"layer": id(self.layer)})
        return super().visit_attributes(visitor)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        assert self.layer is not None
        x = inputs[0].data
        outputs[0].shape = (*x.shape[:-1], self.width)
        y = outputs[0].data
        self.layer.apply(x.reshape(-1, x.shape[-1]), y.reshape(-1, self.width), threads=self.threads)
        return True


def use_own_linear_layers(model: Model, threads: int, alive: list[Any]) -> None:
    """Replace every linear layer that our kernel does faster in a graph that is about to be compiled.

    Args:
        alive: takes what must be kept while the graph is used.
    """
    if not pays():
        return
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and (found := _layer_from(node)) is not None:
            layer = _native.LinearLayer(found.weight, found.bias, gelu=found.gelu)
            own = NativeLinear([node.input_value(0)], threads, alive, layer, found.bias.size)
            own.set_friendly_name(found.last.get_friendly_name())
            replace_node(found.last, own)


def pays() -> bool:
    """Whether this processor is of those that the kernel was written for."""
    return _native.LinearLayer.lanes == 16


@dataclass(frozen=True)
class _Layer:
    """Weights (inputs, outputs) and bias (outputs,), and the last operation of what a `NativeLinear` replaces."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    gelu: bool
    last: Node


def _layer_from(product: Node) -> _Layer | None:
    """The layer that begins with a product, if the kernel can do it and that pays, else None."""
    with_bias, transposed = only_user(product), product.get_attributes()
    if with_bias is None or with_bias.get_type_name() != "Add" or transposed["transpose_a"]:
        return None
    constants = product.input_value(1), with_bias.input_value(1)
    if not all(is_constant(value) and value.get_element_type() == Type.f32 for value in constants):
        return None
    weight, bias = (value.get_node().data for value in constants)
    if weight.ndim != 2:
        return None
    if transposed["transpose_b"]:
        weight = weight.T
    tokens = list(product.input_value(0).get_partial_shape())[:-1]
    rows = math.prod(size.get_length() for size in tokens if size.is_static)
    if (
        [bias.size, *bias.shape[-1:]] != [weight.shape[1]] * 2
        or any(size % GRAIN for size in weight.shape)
        or rows * weight.size < LARGE
    ):
        return None
    gelu = _gelu_of(with_bias)
    return _Layer(np.ascontiguousarray(weight), bias.reshape(-1), gelu is not None, gelu or with_bias)


def _gelu_of(node: Node) -> Node | None:
    """The GELU that alone reads a node."""
    after = only_user(node)
    if after is None or after.get_type_name() != "Gelu":
        return None
    return after if after.get_attributes()["approximation_mode"].upper() == "ERF" else None

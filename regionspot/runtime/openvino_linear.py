"""Large linear layers by our own kernel, inside an OpenVINO graph.

On shared cores with AVX-512 ours take a tenth to a third less time (`regionspot/native/matrix.inl`
says why). Where a graph that is being loaded holds a product of many rows with constant weights,
one operation takes the place of it, of its bias and of a GELU, or CLIP's QuickGELU. Files stay
OpenVINO's.
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
from regionspot.runtime.openvino_operation import (
    NativeOperation,
    NativeOperations,
    is_constant,
    only_user,
    readers_of,
)

GRAIN = 16
"""Inputs and outputs must be multiples of it."""

LARGE = 250_000_000
"""Products of numbers in a layer. With fewer, starting threads beside OpenVINO's costs what is
saved.
"""

QUICK = 1.702
"""QuickGELU is x sigmoid(1.702 x)."""


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
        operations: NativeOperations | None = None,
        layer: _native.LinearLayer | None = None,
        width: int = 0,
    ) -> None:
        self.layer, self.width = layer, width
        super().__init__(inputs, operations)

    def validate_and_infer_types(self) -> None:
        shape = self.get_input_partial_shape(0)
        shape[len(shape) - 1] = self.width
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def with_inputs(self, inputs: list[Output]) -> NativeLinear:
        return NativeLinear(inputs, self.operations, self.layer, self.width)

    def visit_attributes(self, visitor: Any) -> bool:
        """With one that says whose weights it has: OpenVINO makes one operation of two that differ
        in nothing.
        """
        visitor.on_attributes({"layer": id(self.layer)})
        return super().visit_attributes(visitor)

    def compute(self, outputs: list[Any], inputs: list[Any]) -> None:
        assert self.layer is not None
        x = inputs[0].data
        outputs[0].shape = (*x.shape[:-1], self.width)
        x, y = x.reshape(-1, x.shape[-1]), outputs[0].data.reshape(-1, self.width)
        for span in [slice(None)] if self.worked is None else self.worked.spans():
            self.layer.apply(x[span], y[span], threads=self.threads)


def use_own_linear_layers(model: Model, operations: NativeOperations) -> None:
    """Replaces every linear layer that our kernel does faster in a graph that is about to be
    compiled.

    Args:
        operations: takes the new operations.
    """
    if not is_profitable():
        return
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and (found := _layer_from(node)) is not None:
            layer = _native.LinearLayer(found.weight, found.bias, activation=found.activation)
            own = NativeLinear([node.input_value(0)], operations, layer, found.bias.size)
            own.set_friendly_name(found.last.get_friendly_name())
            replace_node(found.last, own)


def is_profitable() -> bool:
    """Whether this processor is of those that the kernel was written for."""
    return _native.LinearLayer.lanes == 16


@dataclass(frozen=True)
class _Layer:
    """Weights (inputs, outputs) and bias (outputs,), and the last operation of what a
    `NativeLinear` replaces.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    activation: _native.Activation
    last: Node


def _layer_from(product: Node) -> _Layer | None:
    """The layer that begins with a product, if the kernel can do it and that pays, else None."""
    transposed, constant = product.get_attributes(), _constant(product.input_value(1))
    if transposed["transpose_a"] or constant is None or constant.ndim != 2:
        return None
    weight = constant.T if transposed["transpose_b"] else constant
    tokens = list(product.input_value(0).get_partial_shape())[:-1]
    rows = math.prod(size.get_length() for size in tokens if size.is_static)
    if any(size % GRAIN for size in weight.shape) or rows * weight.size < LARGE:
        return None
    bias, last = np.zeros(weight.shape[1], np.float32), product
    after = only_user(product)
    if after is not None and after.get_type_name() == "Add":
        added = _constant(after.input_value(1))
        if added is not None and [added.size, *added.shape[-1:]] == [bias.size] * 2:
            bias, last = added.reshape(-1), after
    return _Layer(np.ascontiguousarray(weight), bias, *_activation_after(last))


def _constant(value: Output) -> NDArray[np.float32] | None:
    if not is_constant(value) or value.get_element_type() != Type.f32:
        return None
    array: NDArray[np.float32] = value.get_node().data
    return array


def _activation_after(node: Node) -> tuple[_native.Activation, Node]:
    """What alone reads a node, and the last operation of that; the node itself where it is no
    activation of ours.
    """
    after = only_user(node)
    if after is not None and after.get_type_name() == "Gelu":
        exact = after.get_attributes()["approximation_mode"].upper() == "ERF"
        return (_native.Activation.GELU, after) if exact else (_native.Activation.NONE, node)
    readers = {reader.get_friendly_name(): reader for reader in readers_of(node)}
    scaled = next((reader for reader in readers.values() if _is_scaled(reader)), None)
    gate = None if scaled is None else only_user(scaled)
    last = only_user(gate) if gate is not None and gate.get_type_name() == "Sigmoid" else None
    if scaled is None or last is None or last.get_type_name() != "Multiply":
        return _native.Activation.NONE, node
    gated = set(readers) == {scaled.get_friendly_name(), last.get_friendly_name()}
    return (_native.Activation.QUICK_GELU, last) if gated else (_native.Activation.NONE, node)


def _is_scaled(node: Node) -> bool:
    """Whether it is 1.702 of its first input."""
    factor = _constant(node.input_value(1)) if node.get_type_name() == "Multiply" else None
    return (
        factor is not None and factor.size == 1 and math.isclose(factor.item(), QUICK, rel_tol=1e-6)
    )

"""Large linear layers by our own kernel, inside an OpenVINO graph.

On shared cores with AVX-512 ours take a tenth to a third less time (`regionspot/native/matrix.inl` says why). Where a
graph that is being loaded holds a product of many rows with constant weights, one operation takes the place of it, of
its bias and of a GELU. Files stay OpenVINO's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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
    for product in model.get_ordered_ops():
        if product.get_type_name() == "MatMul" and (last := _last_of_layer(product)) is not None:
            own = NativeLinear([product.input_value(0)], threads, alive, *_layer(product, last))
            own.set_friendly_name(last.get_friendly_name())
            replace_node(last, own)


def pays() -> bool:
    """Whether this processor is of those that the kernel was written for."""
    return _native.LinearLayer.lanes == 16


def _last_of_layer(product: Node) -> Node | None:
    """The last operation of the layer that begins with a product, if the kernel can do it and that pays, else None."""
    weight, attributes = product.input_value(1), product.get_attributes()
    if not is_constant(weight) or attributes["transpose_a"] or len(weight.get_shape()) != 2:
        return None
    rows = math.prod(
        size.get_length() for size in list(product.input_value(0).get_partial_shape())[:-1] if size.is_static
    )
    outputs = list(weight.get_shape())[0 if attributes["transpose_b"] else 1]
    with_bias = only_user(product)
    if with_bias is None or with_bias.get_type_name() != "Add" or not is_constant(with_bias.input_value(1)):
        return None
    bias = with_bias.input_value(1)
    if (
        weight.get_element_type() != Type.f32
        or bias.get_element_type() != Type.f32
        or [math.prod(bias.get_shape()), *list(bias.get_shape())[-1:]] != [outputs, outputs]
        or any(size % GRAIN for size in weight.get_shape())
        or rows * math.prod(weight.get_shape()) < LARGE
    ):
        return None
    after = only_user(with_bias)
    return after if after is not None and _is_gelu(after) else with_bias


def _is_gelu(node: Node) -> bool:
    return bool(node.get_type_name() == "Gelu" and node.get_attributes()["approximation_mode"].upper() == "ERF")


def _layer(product: Node, last: Node) -> tuple[_native.LinearLayer, int]:
    """The weights of a layer, packed, and its outputs."""
    weight: Any = product.input_value(1).get_node()
    bias: Any = only_user(product).input_value(1).get_node()  # type: ignore[union-attr]
    turned = weight.data.T if product.get_attributes()["transpose_b"] else weight.data
    layer = _native.LinearLayer(
        np.ascontiguousarray(turned), np.ascontiguousarray(bias.data.reshape(-1)), gelu=_is_gelu(last)
    )
    return layer, turned.shape[1]

"""The attention of SAM's image encoder by our own kernel, inside an OpenVINO graph.

OpenVINO writes out the scores of all pairs of image tokens, 64 MiB for each head of ViT-B's global
layers, goes over them again for positions and softmax, and moves tokens into windows and back.
Where a graph that is being loaded holds such an attention as `regionspot.modeling.image_encoder`
exports it, one operation takes the place of everything between the projection to queries, keys and
values and the one back (`regionspot/native/attention.hpp`). Files stay OpenVINO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from openvino import DiscreteTypeInfo, Model, Node, Output, Type
from openvino.utils import replace_node

from regionspot import _native
from regionspot.runtime.openvino_operation import (
    NativeOperation,
    NativeOperations,
    is_constant,
    only_user,
)

GRAIN = 16
"""A head's channels must be a multiple of it."""

LARGE = 1024
"""Tokens of an image. With fewer, the threads' start takes longer than the kernel saves."""


class GridAttention(NativeOperation):
    """What the heads of a layer find.

    Inputs, single precision: projected (B, h, w, 3 D), queries, keys and values of all heads;
    padding (3 D,), the same of a token outside the image; relative_rows (r, d, r) and
    relative_columns (c, d, c), embeddings of the distances in a window of r x c tokens. Output: (B,
    h, w, D).
    """

    class_type_info = DiscreteTypeInfo("GridAttention", "regionspot")

    def validate_and_infer_types(self) -> None:
        shape = self.get_input_partial_shape(0)
        shape[3] = shape[3].get_length() // 3
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def compute(self, outputs: list[Any], inputs: list[Any]) -> None:
        projected, padding, relative_rows, relative_columns = (tensor.data for tensor in inputs)
        outputs[0].shape = (*projected.shape[:3], projected.shape[3] // 3)
        worked = projected.shape[1:3] if self.worked is None else self.worked.size
        _native.grid_attention(
            projected,
            padding,
            relative_rows,
            relative_columns,
            outputs[0].data,
            worked=worked,
            threads=self.threads,
        )


def use_own_attention(model: Model, operations: NativeOperations) -> None:
    """Replaces every attention that our kernel can do in a graph that is about to be compiled.

    Args:
        operations: takes the new operations.
    """
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Softmax" and (attention := _attention_around(node)) is not None:
            found[attention.last.get_friendly_name()] = (
                attention  # heads exported one by one have it in common
            )
    for attention in found.values():
        own = GridAttention(attention.inputs, operations)
        own.set_friendly_name(attention.last.get_friendly_name())
        replace_node(attention.last, own)


@dataclass(frozen=True)
class _Attention:
    """The inputs of `GridAttention`, and the last operation of what it replaces."""

    inputs: list[Output]
    last: Node


def _attention_around(softmax: Node) -> _Attention | None:
    """What a softmax belongs to, if that is an attention as `image_encoder._attention` writes it,
    else None.

    Scores take the shape (..., r, c); those with rows are added as (..., r, 1), those with columns
    as (..., 1, c).
    """
    with_both = _above(_above(softmax, 0, "Reshape"), 0, "Add")
    with_rows = _above(with_both, 0, "Add")
    scores = _above(_above(with_rows, 0, "Reshape"), 0, "MatMul")
    query = _above(scores, 0, "Multiply")
    products = [
        _product(_above(with_rows, 1, "Unsqueeze"), -1),
        _product(_above(with_both, 1, "Unsqueeze"), -2),
    ]
    mixed, last = only_user(softmax), _last_move(softmax)
    if (
        scores is None
        or query is None
        or with_both is None
        or mixed is None
        or last is None
        or None in products
    ):
        return None
    of_rows, of_columns = (product for product in products if product is not None)
    # queries, keys, values
    sources = [query.input_value(0), scores.input_value(1), mixed.input_value(1)]
    sources += [of_rows.input_value(0), of_columns.input_value(0)]  # and queries
    projections = [_moved_from(source.get_node()) for source in sources]
    parts = [_part(source) for source in sources]
    projected = projections[0]
    table_of_rows = of_rows.input_value(1)
    table_of_columns = of_columns.input_value(1)
    if len({node.get_friendly_name() for node in projections}) > 1 or parts != [0, 1, 2, 0, 0]:
        return None
    padding = projected.input_value(1) if projected.get_type_name() == "Add" else None
    if padding is None or not all(map(is_constant, (padding, table_of_rows, table_of_columns))):
        return None
    inputs = [projected.output(0), padding, table_of_rows, table_of_columns]
    return _Attention(inputs, last) if _fits(inputs, last, with_both, query) else None


def _fits(inputs: list[Output], last: Node, with_both: Node, query: Node) -> bool:
    """Whether sizes, precision and scale are those of an attention that the kernel does."""
    shape, output = inputs[0].get_partial_shape(), last.get_output_partial_shape(0)
    cells = with_both.get_output_partial_shape(0)
    shapes = [list(one.get_shape()) for one in inputs[1:]]
    if len(shape) != 4 or len(output) != 4 or [len(one) for one in shapes] != [1, 3, 3]:
        return False
    (width,), (rows, channels, _), (columns, _, _) = shapes
    return (
        shapes[1:] == [[rows, channels, rows], [columns, channels, columns]]
        and [_length(cells[len(cells) - 2]), _length(cells[len(cells) - 1])] == [rows, columns]
        and _length(shape[3]) == 3 * _length(output[3]) == width
        and _length(output[3]) % channels == 0
        and channels % GRAIN == 0
        and all(_length(shape[axis]) == _length(output[axis]) > 0 for axis in (1, 2))
        and _length(shape[1]) * _length(shape[2]) >= LARGE
        and all(one.get_element_type() == Type.f32 for one in inputs)
        and np.allclose(_constant(query.input_value(1)), channels**-0.5)
    )


_MOVES = (
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "VariadicSplit",
    "Concat",
)
"""What only puts values elsewhere."""


def _above(node: Node | None, index: int, kind: str) -> Node | None:
    """What gives a node's input, if it is of a kind."""
    found = None if node is None else node.input_value(index).get_node()
    return found if found is not None and found.get_type_name() == kind else None


def _product(unsqueezed: Node | None, axis: int) -> Node | None:
    """The product of queries with a table that was given a new axis for the scores' other one."""
    if unsqueezed is None:
        return None
    asked = _constant(unsqueezed.input_value(1))
    if not np.isin(asked, [axis, len(unsqueezed.get_output_partial_shape(0)) + axis]).all():
        return None
    node = _moved_from(unsqueezed)
    return node if node.get_type_name() == "MatMul" else None


def _part(moved: Output) -> int | None:
    """Which of queries (0), keys (1) and values (2) was taken: the first slice of three that takes
    one.
    """
    node, part = moved.get_node(), None
    while node.get_type_name() in _MOVES:
        if (
            node.get_type_name() == "Slice"
            and _length(node.input_value(0).get_partial_shape()[0]) == 3
        ):
            part = int(np.ravel(_constant(node.input_value(1)))[0])
        node = node.input_value(0).get_node()
    return part


def _moved_from(node: Node) -> Node:
    """The first operation above that does more than to put values elsewhere, along first inputs."""
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node


def _last_move(softmax: Node) -> Node | None:
    """Below the product with the values: the last operation that only puts values elsewhere."""
    below = only_user(softmax)
    last = None
    while below is not None and (
        below.get_type_name() in _MOVES or (last is None and below.get_type_name() == "MatMul")
    ):
        last, below = below, only_user(below)
    return last


def _length(dimension: Any) -> int:
    """-1 of a dynamic one."""
    return dimension.get_length() if dimension.is_static else -1


def _constant(value: Output) -> Any:
    """Its value; NaN of what is none."""
    node: Any = value.get_node()
    return node.data if is_constant(value) else np.nan

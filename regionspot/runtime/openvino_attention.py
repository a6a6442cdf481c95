"""The attention of SAM's image encoder by our own kernel, inside an OpenVINO graph.

OpenVINO writes out the scores of all pairs of image tokens, 64 MiB for each head of ViT-B's global layers, goes over
them again for positions and softmax, and moves tokens into windows and back. Where a graph that is being loaded holds
such an attention as `regionspot.modeling.image_encoder` exports it, one operation takes the place of everything between
the projection to queries, keys and values and the one back (`regionspot/native/attention.hpp`). Files stay OpenVINO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from openvino import Model, Node, Op, Output
from openvino.utils import replace_node

from regionspot import _native

GRAIN = 16
"""A head's channels must be a multiple of it."""

LARGE = 1024
"""Tokens of an image. With fewer, the threads' start takes longer than the kernel saves."""


class GridAttention(Op):
    """What the heads of a layer find.

    Inputs, single precision: projected (B, h, w, 3 D), queries, keys and values of all heads; padding (3 D,), the same
    of a token outside the image; relative_rows (r, d, r) and relative_columns (c, d, c), embeddings of the distances in
    a window of r x c tokens. Output: (B, h, w, D).

    Args:
        inputs: None where OpenVINO makes one only to ask what it is.
        threads: to work on.
    """

    def __init__(self, inputs: list[Output] | None = None, threads: int = 1) -> None:
        super().__init__(self)
        self.threads = threads
        if inputs is not None:
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        shape = self.get_input_partial_shape(0)
        shape[3] = shape[3].get_length() // 3
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def clone_with_new_inputs(self, new_inputs: list[Output]) -> GridAttention:
        return GridAttention(new_inputs, self.threads)

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes({"threads": self.threads})
        return True

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        projected, padding, relative_rows, relative_columns = (tensor.data for tensor in inputs)
        outputs[0].shape = (*projected.shape[:3], projected.shape[3] // 3)
        _native.grid_attention(
            projected, padding, relative_rows, relative_columns, outputs[0].data, threads=self.threads
        )
        return True


def use_own_attention(model: Model, threads: int) -> int:
    """Replace every attention that our kernel can do in a graph that is about to be compiled; how many there were."""
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Softmax" and (attention := _attention_around(node)) is not None:
            found[attention.last.get_friendly_name()] = (
                attention  # heads that were exported one by one have it in common
            )
    for attention in found.values():
        own = GridAttention(attention.inputs, threads)
        own.set_friendly_name(attention.last.get_friendly_name())
        replace_node(attention.last, own)
    return len(found)


@dataclass(frozen=True)
class _Attention:
    """The inputs of `GridAttention`, and the last operation of what it replaces."""

    inputs: list[Output]
    last: Node


def _attention_around(softmax: Node) -> _Attention | None:
    """What a softmax belongs to, if that is an attention as `image_encoder._attention` writes it, else None.

    Scores take the shape (..., r, c); those with rows are added as (..., r, 1), those with columns as (..., 1, c).
    """
    with_both = _above(_above(softmax, 0, "Reshape"), 0, "Add")
    with_rows = _above(with_both, 0, "Add")
    scores = _above(_above(with_rows, 0, "Reshape"), 0, "MatMul")
    query = _above(scores, 0, "Multiply")
    tables = [_table(_above(with_rows, 1, "Unsqueeze")), _table(_above(with_both, 1, "Unsqueeze"))]
    if query is None or with_both is None:
        return None
    projected, padding = _projection(query.input_value(0))
    last = _last_move(softmax)
    if projected is None or padding is None or last is None or any(table is None for table in tables):
        return None
    found = [table.get_shape() for table in tables if table is not None]
    (rows, channels, _), (columns, _, _) = found
    cells = with_both.get_output_partial_shape(0)
    shape, output = projected.get_partial_shape(), last.get_output_partial_shape(0)
    fits = (
        found == [[rows, channels, rows], [columns, channels, columns]]
        and [_length(cells[len(cells) - 2]), _length(cells[len(cells) - 1])] == [rows, columns]
        and len(shape) == len(output) == 4
        and _length(shape[3]) == 3 * _length(output[3]) == padding.get_shape()[0]
        and _length(output[3]) % channels == 0
        and channels % GRAIN == 0
        and all(_length(shape[axis]) == _length(output[axis]) > 0 for axis in (1, 2))
        and _length(shape[1]) * _length(shape[2]) >= LARGE
        and np.allclose(_constant(query.input_value(1)), channels**-0.5)
    )
    return _Attention([projected, padding, *(table for table in tables if table is not None)], last) if fits else None


_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "VariadicSplit", "Concat")
"""What only puts values elsewhere."""


def _above(node: Node | None, index: int, kind: str) -> Node | None:
    """What gives a node's input, if it is of a kind."""
    found = None if node is None else node.input_value(index).get_node()
    return found if found is not None and found.get_type_name() == kind else None


def _table(unsqueezed: Node | None) -> Output | None:
    """The constant (size, d, size) that queries were multiplied with."""
    if unsqueezed is None:
        return None
    node = _moved_from(unsqueezed)
    if node.get_type_name() != "MatMul":
        return None
    table = node.input_value(1)
    return table if table.get_node().get_type_name() == "Constant" and len(table.get_shape()) == 3 else None


def _projection(moved: Output) -> tuple[Output | None, Output | None]:
    """The sum of a projection and its bias that queries were taken from, and that bias."""
    node = _moved_from(moved.get_node())
    bias = node.input_value(1) if node.get_type_name() == "Add" else None
    if bias is None or bias.get_node().get_type_name() != "Constant" or len(bias.get_shape()) != 1:
        return None, None
    return node.output(0), bias


def _moved_from(node: Node) -> Node:
    """The first operation above that does more than to put values elsewhere, along first inputs."""
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node


def _last_move(softmax: Node) -> Node | None:
    """Below the product with the values: the last operation that only puts values elsewhere."""
    below = _only_user(softmax)
    last = None
    while below is not None and (
        below.get_type_name() in _MOVES or (last is None and below.get_type_name() == "MatMul")
    ):
        last, below = below, _only_user(below)
    return last


def _only_user(node: Node) -> Node | None:
    users = [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]
    return users[0] if len(users) == 1 else None


def _length(dimension: Any) -> int:
    """-1 of a dynamic one."""
    return dimension.get_length() if dimension.is_static else -1


def _constant(value: Output) -> Any:
    """Its value; NaN of what is none."""
    node: Any = value.get_node()
    return node.data if node.get_type_name() == "Constant" else np.nan

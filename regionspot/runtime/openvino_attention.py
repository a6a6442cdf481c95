"""SAM's attention over a whole image by our own kernel, inside an OpenVINO graph.

OpenVINO writes out the scores of all pairs of image tokens, 64 MiB for each head of ViT-B, and goes over them again for
the positions and the softmax. Where a graph that is being loaded holds this pattern at such a size, one operation takes
its place that keeps a tile of scores in a core's cache (`regionspot/native/attention.hpp`). Files stay OpenVINO's own.
"""

from __future__ import annotations

from typing import Any

from openvino import Model, Node, Op, Output
from openvino.utils import replace_node

from regionspot import _native

LARGE = 1 << 20
"""Pairs of a head's tokens. Those in SAM's windows are fewer, and OpenVINO is good at them."""

GRAIN = 16
"""What the kernel works on side by side: a grid's width, and a head's channels, must be multiples of it."""


class GridAttention(Op):
    """softmax(query key^T + with_rows + with_columns) value, of all heads of all images.

    Inputs, single precision: query, key and value (B, H, M, d); with_rows (B, H, M, r) and with_columns (B, H, M, c),
    where M = r * c and key j lies in row j // c and column j % c. Output: as value.

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
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, new_inputs: list[Output]) -> GridAttention:
        return GridAttention(new_inputs, self.threads)

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes({"threads": self.threads})
        return True

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        outputs[0].shape = inputs[0].shape
        query, key, value, with_rows, with_columns = (tensor.data for tensor in inputs)
        _native.grid_attention(query, key, value, with_rows, with_columns, outputs[0].data, self.threads)
        return True


def use_own_attention(model: Model, threads: int) -> int:
    """Replace what our kernel does better in a graph that is about to be compiled; how many there were."""
    count = 0
    for node in model.get_ordered_ops():
        inputs = _grid_attention(node)
        if inputs is not None:
            own = GridAttention(inputs, threads)
            own.set_friendly_name(node.get_friendly_name())
            replace_node(node, own)
            count += 1
    return count


def _grid_attention(node: Node) -> list[Output] | None:
    """The inputs of `GridAttention` if `node` is the last operation of one that is large, else None.

    As `regionspot.modeling.image_encoder._attend` is exported: scores (B, H, M, M) take the shape (B, H, M, r, c), to
    which with_rows is added as (B, H, M, r, 1) and with_columns as (B, H, M, 1, c).
    """
    softmax = _operand(node, 0, "Softmax") if node.get_type_name() == "MatMul" else None
    flat = _operand(softmax, 0, "Reshape")
    with_both = _operand(flat, 0, "Add")
    with_first = _operand(with_both, 0, "Add")
    scores = _operand(_operand(with_first, 0, "Reshape"), 0, "MatMul")
    columns, rows = _operand(with_both, 1, "Unsqueeze"), _operand(with_first, 1, "Unsqueeze")
    if scores is None or rows is None or columns is None or with_both is None:
        return None
    turned = _operand(scores, 1, "Transpose")
    if turned is None:
        return None
    inputs = [scores.input_value(0), turned.input_value(0), node.input_value(1)]
    inputs += [rows.input_value(0), columns.input_value(0)]
    cells = with_both.get_output_partial_shape(0)  # (B, H, M, r, c)
    shapes = [one.get_partial_shape() for one in inputs]
    if cells.rank != 5 or any(shape.rank != 4 for shape in shapes) or any(cells[axis].is_dynamic for axis in (2, 3, 4)):
        return None
    tokens, height, width = (cells[axis].get_length() for axis in (2, 3, 4))
    channels = shapes[0][3]
    if channels.is_dynamic or channels.get_length() % GRAIN or width % GRAIN or tokens != height * width:
        return None
    fits = all(shape[3] == channels for shape in shapes[:3]) and [shapes[3][3], shapes[4][3]] == [height, width]
    return inputs if fits and tokens**2 >= LARGE else None


def _operand(node: Node | None, index: int, kind: str) -> Node | None:
    """What gives a node's input, if it is of a kind and feeds nothing else."""
    if node is None:
        return None
    source = node.input_value(index)
    found = source.get_node()
    return found if found.get_type_name() == kind and len(source.get_target_inputs()) == 1 else None

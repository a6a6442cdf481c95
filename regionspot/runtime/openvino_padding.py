"""SAM's first layers only as far as the picture reaches, inside an OpenVINO graph.

Until the first global layer of SAM's image encoder no window sees another. What comes of a window
that lies wholly in the padding of the square frame follows from the weights alone: it is kept from
the first image that has such a window, and of later ones our operations leave it out. Of a picture
of 16:9, that is a third of the tokens in the layers before; nothing of any picture is kept, and
results are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from openvino import DiscreteTypeInfo, Model, Node

from regionspot.runtime.openvino_attention import GridAttention
from regionspot.runtime.openvino_operation import (
    ActiveTokens,
    NativeOperation,
    NativeOperations,
    is_constant,
)


class PaddingWindows(ActiveTokens):
    """Which windows of the next image are worked on, and what comes of those that no picture
    reaches.

    Runs of one graph share it, so a runner must do one run at a time.

    Args:
        grid: (h, w) tokens of an image.
        window: (r, c) tokens of a window.
        patch: side of a token in pixels.
    """

    def __init__(self, grid: tuple[int, int], window: tuple[int, int], patch: int) -> None:
        super().__init__(grid)
        self._window, self._patch = window, patch
        self._padding = np.zeros(grid, np.bool_)  # of the image at hand
        self._known = np.zeros(grid, np.bool_)
        self._tokens: npt.NDArray[np.float32] | None = None  # (h, w, D), where they are known

    def begin(self, input_size: npt.ArrayLike) -> None:
        """An image whose part that is not padding has so many rows and columns of pixels."""
        of_window = np.multiply(self._window, self._patch)
        reached = np.minimum(
            -(-np.asarray(input_size, np.int64) // of_window) * self._window, self.grid
        )
        self._padding[:] = True
        self._padding[: reached[0], : reached[1]] = False
        known = self._known[self._padding].all()
        self.size = (int(reached[0]), int(reached[1])) if known else self.grid

    def complete(self, tokens: npt.NDArray[np.float32]) -> None:
        """Put into (h, w, D) what was left out, or keep what was not known."""
        if self._tokens is None:
            self._tokens = np.empty_like(tokens)
        if self.size == self.grid:
            self._tokens[self._padding] = tokens[self._padding]
            self._known |= self._padding
        else:
            tokens[self._padding] = self._tokens[self._padding]


class CompletedTokens(NativeOperation):
    """Tokens (1, h w, D), those that were left out put in."""

    class_type_info = DiscreteTypeInfo("CompletedTokens", "regionspot")

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def compute(self, outputs: list[Any], inputs: list[Any]) -> None:
        assert isinstance(self.worked, PaddingWindows)
        outputs[0].shape = inputs[0].shape
        tokens = outputs[0].data
        tokens[:] = inputs[0].data
        self.worked.complete(tokens.reshape(*self.worked.grid, -1))


def leave_out_padding(model: Model, operations: NativeOperations) -> PaddingWindows | None:
    """Makes the operations of a graph's first layers leave out windows that hold no picture.

    Args:
        model: of one image at a time, with our operations in it.
        operations: these operations; takes one more.

    Returns:
        What must be told of each image; None if the graph does not begin with layers of windows
        that are all ours.
    """
    ordered = model.get_ordered_ops()
    layers = [
        node for node in ordered if node.get_type_name() == GridAttention.class_type_info.name
    ]
    globals_ = [node for node in layers if _window_of(node) == _grid_of(node)]
    if not globals_ or globals_[0].get_friendly_name() == layers[0].get_friendly_name():
        return None
    tokens = _residual_above(globals_[0])
    above = {} if tokens is None else _with_ancestors(tokens)
    kinds = [node.get_type_name() for node in above.values()]
    windowed = [
        node
        for node in above.values()
        if node.get_type_name() == GridAttention.class_type_info.name
    ]
    patches = {_patch_of(node) for node in above.values() if node.get_type_name() == "Convolution"}
    places = {(_grid_of(node), _window_of(node)) for node in windowed}
    patch = patches.pop() if len(patches) == 1 else None
    if (
        tokens is None
        or patch is None
        or len(places) != 1
        or "MatMul" in kinds
        or "Softmax" in kinds
    ):
        return None
    worked = PaddingWindows(*places.pop(), patch)
    for operation in operations.alive:
        if operation.get_friendly_name() in above:
            operation.worked = worked
    readers = tokens.output(0).get_target_inputs()
    completed = CompletedTokens([tokens.output(0)], operations)
    completed.worked = worked
    for reader in readers:
        reader.replace_source_output(completed.output(0))
    return worked


def _grid_of(attention: Node) -> tuple[int, int]:
    shape = attention.get_output_partial_shape(0)
    return shape[1].get_length(), shape[2].get_length()


def _window_of(attention: Node) -> tuple[int, int]:
    rows, columns = (attention.get_input_shape(index)[0] for index in (2, 3))
    return rows, columns


def _residual_above(attention: Node) -> Node | None:
    """The sum whose LayerNorm a layer begins with: the first along first inputs that is read more
    than once.
    """
    node = attention.input_value(0).get_node()
    while node.get_input_size():
        if node.get_type_name() == "Add" and len(node.output(0).get_target_inputs()) > 1:
            return node
        node = node.input_value(0).get_node()
    return None


def _with_ancestors(node: Node) -> dict[str, Node]:
    """All that a node depends on, and itself, by name."""
    found, left = {}, [node]
    while left:
        node = left.pop()
        if node.get_friendly_name() not in found:
            found[node.get_friendly_name()] = node
            left += [value.get_node() for value in node.input_values()]
    return found


def _patch_of(convolution: Node) -> int | None:
    """The side of square patches, where each result sees its own and no other."""
    weights, how = convolution.input_value(1), convolution.get_attributes()
    kernel = list(weights.get_shape())[2:] if is_constant(weights) else []
    apart = (
        list(how["strides"]) == kernel and not any(how["pads_begin"]) and not any(how["pads_end"])
    )
    return kernel[0] if apart and len(set(kernel)) == 1 else None

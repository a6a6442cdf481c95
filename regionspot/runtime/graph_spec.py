"""What describes a graph and a model: tensors, ranges of dynamic axes, sizes.
`regionspot.runtime.graphs` lists them.

Free of PyTorch, so that a server can import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from regionspot.errors import InputError

NUM_PROJECTIONS = 11
NUM_STATISTICS = 3
"""Rows of what the token decoder computes once for an image, see
`regionspot.modeling.token_decoder`.
"""

KEPT_IN_HALF = ("image_embeddings", "image_projections")
"""Tensors that stay on a GPU between graphs: in fp16 where these compute in fp16, which halves what
an encoded image takes there and what is copied.
"""

NUM_MASK_TOKENS = 4
"""SAM's mask tokens: 0 for the single mask, 1 to 3 for whole, part and subpart."""


Bound = Literal["min", "opt", "max"]
BOUNDS: tuple[Bound, ...] = ("min", "opt", "max")
"""Of a range, in TensorRT's order."""


@dataclass(frozen=True)
class Range:
    """How large a dynamic axis may be, and where to be fastest."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 < self.min <= self.opt <= self.max:
            raise InputError(f"a range is min:opt:max with 1 <= min <= opt <= max, not {self}")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    @classmethod
    def parse(cls, text: str) -> Range:
        """From "1:8:64", or "4" for a fixed size.

        Raises:
            InputError: anything else.
        """
        try:
            numbers = [int(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3):
            raise InputError(f"{text!r} is not min:opt:max, such as 1:8:64, nor one number")
        return cls(*numbers) if len(numbers) == 3 else cls(*numbers * 3)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a graph. An axis that is a string is dynamic; axes of one name are equally
    long.
    """

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]

    def resolved(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the dynamic axes' sizes put in."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its tensors in the order of the arguments and results of the module behind it.

    Args:
        optional: what a runner of it can make use of beside its inputs.
    """

    name: str
    description: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, Range]
    optional: tuple[TensorSpec, ...] = ()

    def sizes(self, bound: Bound) -> dict[str, int]:
        """The smallest, the best or the largest size of each dynamic axis."""
        return {axis: getattr(limits, bound) for axis, limits in self.ranges.items()}

    def sizes_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The size of each dynamic axis in inputs of these shapes, by name."""
        return {
            axis: size
            for tensor in self.inputs
            for axis, size in zip(tensor.shape, shapes[tensor.name], strict=True)
            if isinstance(axis, str)
        }

    def with_half_tensors(self) -> GraphSpec:
        """The graph with the tensors of `KEPT_IN_HALF` in fp16."""

        def halved(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(
                replace(tensor, dtype="float16") if tensor.name in KEPT_IN_HALF else tensor
                for tensor in tensors
            )

        return replace(self, inputs=halved(self.inputs), outputs=halved(self.outputs))

    @property
    def half_tensors(self) -> tuple[str, ...]:
        """The names of inputs and outputs in fp16."""
        tensors = (*self.inputs, *self.outputs)
        return tuple(tensor.name for tensor in tensors if tensor.dtype == "float16")

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)


@dataclass(frozen=True)
class ModelInfo:
    """What the graphs' shapes and the code around them depend on, without the weights.

    Args:
        name: the preset.
        sam_image_size, clip_image_size: side of each encoder's square input in pixels.
        embedding_size: (h, w) of SAM's image embedding; masks are (4h, 4w).
        token_dim: C, channels of the image embedding and of a mask token.
        num_patch_tokens, clip_width: L and D of CLIP's feature map.
        embed_dim: E of CLIP's common space.
        context_length: most tokens of a text.
        logit_scale: what cosines are multiplied by.
        text_fingerprint: changes with the text encoder's weights or its tokenizer
            (`ClipBackbone.fingerprint`).
        multimask: whether the head was trained on SAM's three multimask tokens instead of the
            single-mask token.
        known_tokens: those that the text encoder has seen in training, where these are few; None
            stands for all.
    """

    name: str
    sam_image_size: int
    clip_image_size: int
    embedding_size: tuple[int, int]
    token_dim: int
    num_patch_tokens: int
    clip_width: int
    embed_dim: int
    context_length: int
    logit_scale: float
    text_fingerprint: str
    multimask: bool = False
    known_tokens: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ModelInfo:
        """From what `dataclasses.asdict` and JSON made of it. Raises KeyError or TypeError where
        that is damaged.
        """
        known = content.get("known_tokens")
        tuples = {
            "embedding_size": tuple(content["embedding_size"]),
            "known_tokens": None if known is None else tuple(known),
        }
        return cls(**{**content, **tuples})

    @property
    def mask_size(self) -> tuple[int, int]:
        """(4h, 4w) of the low-resolution masks."""
        return 4 * self.embedding_size[0], 4 * self.embedding_size[1]

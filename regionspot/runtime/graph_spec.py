"""The contract: every graph's name, its tensors, and how large their dynamic axes may be.

ONNX names, TensorRT profiles, Triton's configuration, the parity check and the benchmarks all read this one table.
Free of PyTorch, so that a server can import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regionspot.errors import InputError

NUM_PROJECTIONS = 11
NUM_STATISTICS = 3
"""Rows of what the token decoder computes once for an image, see `regionspot.modeling.token_decoder`."""

NUM_MASK_TOKENS = 4
"""SAM's mask tokens: 0 for the single mask, 1 to 3 for whole, part and subpart."""


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
    """A tensor of a graph. An axis that is a string is dynamic; axes of one name are equally long."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]

    def resolved(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the dynamic axes' sizes put in."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


INPUT_SIZES = TensorSpec("input_sizes", "int32", ("batch", 2))
"""Height and width of the part of each image that is not padding."""


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
        text_fingerprint: changes with the text encoder's weights or its tokenizer (`ClipBackbone.fingerprint`).
        multimask: whether the head was trained on SAM's three multimask tokens instead of the single-mask token.
        known_tokens: those that the text encoder has seen in training, where these are few; None stands for all.
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
        """From what `dataclasses.asdict` and JSON made of it. Raises KeyError or TypeError where that is damaged."""
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


@dataclass(frozen=True)
class Ranges:
    """Sizes of the dynamic axes: images, regions of an image, prompts, points of each, mask tokens, words, texts.

    The head must see all regions of an image at once. Prompts do not see each other: callers send them in chunks, and a
    small range bounds what TensorRT sets aside, which is quadratic in the points.
    """

    batch: Range = field(default_factory=lambda: Range(1, 1, 8))
    regions: Range = field(default_factory=lambda: Range(1, 32, 300))
    prompts: Range = field(default_factory=lambda: Range(1, 32, 64))
    points: Range = field(default_factory=lambda: Range(1, 2, 16))
    tokens: Range = field(default_factory=lambda: Range(1, 1, NUM_MASK_TOKENS))
    words: Range = field(default_factory=lambda: Range(1, 80, 2048))
    texts: Range = field(default_factory=lambda: Range(1, 80, 256))


def graph_specs(info: ModelInfo, ranges: Ranges | None = None) -> dict[str, GraphSpec]:
    """All graphs of a model, by name, in the order in which data flows through them."""
    ranges = ranges or Ranges()
    sam, clip, (h, w) = info.sam_image_size, info.clip_image_size, info.embedding_size
    c, half, cells = info.token_dim, info.token_dim // 2, h * w

    images = TensorSpec("images", "uint8", ("batch", sam, sam, 3))
    clip_images = TensorSpec("clip_images", "uint8", ("batch", clip, clip, 3))
    image_embeddings = TensorSpec("image_embeddings", "float32", ("batch", c, h, w))
    projections = TensorSpec("image_projections", "float32", ("batch", NUM_PROJECTIONS, half, cells))
    statistics = TensorSpec("image_statistics", "float32", ("batch", NUM_STATISTICS, cells))
    points = TensorSpec("points", "float32", ("batch", "prompts", "points", 2))
    labels = TensorSpec("labels", "int32", ("batch", "prompts", "points"))
    token_ids = TensorSpec("token_ids", "int32", ("tokens",))
    mask_tokens = TensorSpec("mask_tokens", "float32", ("batch", "prompts", "tokens", c))
    iou_predictions = TensorSpec("iou_predictions", "float32", ("batch", "prompts", "tokens"))
    low_res_masks = TensorSpec("low_res_masks", "float32", ("batch", "prompts", "tokens", *info.mask_size))
    mask_inputs = TensorSpec("mask_inputs", "float32", ("batch", "prompts", 1, *info.mask_size))
    prompted = TensorSpec("prompted_embeddings", "float32", ("batch", "prompts", c, h, w))
    region_tokens = TensorSpec("mask_tokens", "float32", ("batch", "regions", c))
    patch_tokens = TensorSpec("patch_tokens", "float32", ("batch", info.num_patch_tokens, info.clip_width))
    valid = TensorSpec("valid", "bool", ("batch", "regions"))
    text_embeddings = TensorSpec("text_embeddings", "float32", ("words", info.embed_dim))
    logits = TensorSpec("logits", "float32", ("batch", "regions", "words"))
    boxes = TensorSpec("boxes", "float32", ("batch", "regions", 4))
    scores = TensorSpec("scores", "float32", ("batch", "regions", "words"))
    tokens = TensorSpec("tokens", "int32", ("texts", "text_length"))
    embeddings = TensorSpec("embeddings", "float32", ("texts", info.embed_dim))

    length = Range(min(2, info.context_length), min(16, info.context_length), info.context_length)
    sizes = {**{name: getattr(ranges, name) for name in ranges.__dataclass_fields__}, "text_length": length}

    def spec(name: str, description: str, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> GraphSpec:
        used = {axis for tensor in inputs for axis in tensor.shape if isinstance(axis, str)}
        return GraphSpec(
            name, description, tuple(inputs), tuple(outputs), {axis: sizes[axis] for axis in sizes if axis in used}
        )

    every = [
        spec("sam_image_encoder", "SAM's image encoder, for each image", [images, INPUT_SIZES], [image_embeddings]),
        spec("clip_image_encoder", "CLIP's feature map, for each image", [clip_images], [patch_tokens]),
        spec(
            "sam_token_decoder_image",
            "the token decoder's image part, for each image",
            [image_embeddings],
            [projections, statistics],
        ),
        spec(
            "sam_token_decoder_prompts",
            "the token decoder's prompt part, for each set of prompts",
            [projections, statistics, points, labels, token_ids],
            [mask_tokens, iou_predictions],
        ),
        spec(
            "sam_mask_decoder",
            "the prompt part with masks, for each set of prompts whose masks are wanted",
            [image_embeddings, projections, statistics, points, labels, token_ids],
            [low_res_masks, mask_tokens, iou_predictions],
        ),
        spec(
            "sam_mask_prompt",
            "the image embedding as each mask prompt changes it, for each set of prompts that are masks",
            [image_embeddings, mask_inputs],
            [prompted],
        ),
        spec(
            "region_head",
            "RegionSpot's head and the cosines, for each set of regions and vocabulary",
            [region_tokens, patch_tokens, valid, text_embeddings],
            [logits],
        ),
        spec("clip_text_encoder", "CLIP's text embeddings, for each new vocabulary", [tokens], [embeddings]),
        spec(
            "region_recognizer",
            "everything in one: both images, boxes and words to scores",
            [images, INPUT_SIZES, clip_images, boxes, valid, text_embeddings],
            [scores],
        ),
    ]
    return {one.name: one for one in every}

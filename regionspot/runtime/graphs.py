"""The register of the model's graphs.

Whatever depends on a graph reads its row here: ONNX names, TensorRT profiles, Triton's
configuration, the parity check and the benchmarks. A new graph is a row, a module behind it
(`regionspot.modeling.graphs`) and a method that runs it. A package outside of regionspot adds its
rows by an entry point of the group `regionspot.graphs` (docs/how-to/add-a-graph.md). Free of
PyTorch, so that a server can import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum

from regionspot.errors import InputError
from regionspot.registers import Plugins, Register
from regionspot.runtime.graph_spec import (
    NUM_MASK_TOKENS,
    NUM_PROJECTIONS,
    NUM_STATISTICS,
    GraphSpec,
    ModelInfo,
    Range,
    TensorSpec,
)

INPUT_SIZES = TensorSpec("input_sizes", "int32", ("batch", 2))
"""Height and width of the part of each image that is not padding."""


class Role(Enum):
    """What a graph is needed for."""

    REQUIRED = "every prediction runs it"
    ON_DEMAND = "a prediction runs it if the request asks for what it computes"
    COMBINED = (
        "it repeats what other graphs compute; it is exported only if it is named, and not served"
    )


class ModelTensors:
    """The tensors that graphs exchange, at the sizes of one model."""

    def __init__(self, info: ModelInfo) -> None:
        sam, clip, channels = info.sam_image_size, info.clip_image_size, info.token_dim
        height, width = info.embedding_size
        self.input_sizes = INPUT_SIZES
        self.images = TensorSpec("images", "uint8", ("batch", sam, sam, 3))
        self.clip_images = TensorSpec("clip_images", "uint8", ("batch", clip, clip, 3))
        self.image_embeddings = TensorSpec(
            "image_embeddings", "float32", ("batch", channels, height, width)
        )
        self.projections = TensorSpec(
            "image_projections",
            "float32",
            ("batch", NUM_PROJECTIONS, channels // 2, height * width),
        )
        self.statistics = TensorSpec(
            "image_statistics", "float32", ("batch", NUM_STATISTICS, height * width)
        )
        self.points = TensorSpec("points", "float32", ("batch", "prompts", "points", 2))
        self.labels = TensorSpec("labels", "int32", ("batch", "prompts", "points"))
        self.token_ids = TensorSpec("token_ids", "int32", ("tokens",))
        self.mask_tokens = TensorSpec(
            "mask_tokens", "float32", ("batch", "prompts", "tokens", channels)
        )
        self.iou_predictions = TensorSpec(
            "iou_predictions", "float32", ("batch", "prompts", "tokens")
        )
        self.low_res_masks = TensorSpec(
            "low_res_masks", "float32", ("batch", "prompts", "tokens", *info.mask_size)
        )
        self.mask_inputs = TensorSpec(
            "mask_inputs", "float32", ("batch", "prompts", 1, *info.mask_size)
        )
        self.prompted_embeddings = TensorSpec(
            "prompted_embeddings", "float32", ("batch", "prompts", channels, height, width)
        )
        self.region_tokens = TensorSpec("mask_tokens", "float32", ("batch", "regions", channels))
        self.patch_tokens = TensorSpec(
            "patch_tokens", "float32", ("batch", info.num_patch_tokens, info.clip_width)
        )
        self.valid = TensorSpec("valid", "bool", ("batch", "regions"))
        self.text_embeddings = TensorSpec("text_embeddings", "float32", ("words", info.embed_dim))
        self.logits = TensorSpec("logits", "float32", ("batch", "regions", "words"))
        self.boxes = TensorSpec("boxes", "float32", ("batch", "regions", 4))
        self.scores = TensorSpec("scores", "float32", ("batch", "regions", "words"))
        self.tokens = TensorSpec("tokens", "int32", ("texts", "text_length"))
        self.embeddings = TensorSpec("embeddings", "float32", ("texts", info.embed_dim))


TensorsOf = Callable[[ModelTensors], tuple[TensorSpec, ...]]


@dataclass(frozen=True)
class Graph:
    """A graph of the model.

    Args:
        name: of artefacts, of Triton's models and in reports.
        description: what it computes, and how often it runs.
        inputs: its input tensors, in the order of the arguments of the module's `forward`.
        outputs: its output tensors, in the order of the results of `forward`.
        module: "module:class" of the `regionspot.modeling.graphs.GraphModule` behind it. Imported
            when it is needed.
        weights: parts of the model whose weights change what it computes: "sam", "clip" (the image
            tower), "text" (the text tower), "head".
        role: what it is needed for.
        quantized: whether its int8 version holds int8 layers; without any it is in single
            precision.
    """

    name: str
    description: str
    inputs: TensorsOf
    outputs: TensorsOf
    module: str
    weights: tuple[str, ...]
    role: Role = Role.REQUIRED
    quantized: bool = True

    def spec(self, tensors: ModelTensors, sizes: Mapping[str, Range]) -> GraphSpec:
        """Returns the graph at a model's sizes, with the range of each dynamic axis of its
        inputs.
        """
        inputs = self.inputs(tensors)
        used = {axis for tensor in inputs for axis in tensor.shape if isinstance(axis, str)}
        ranges = {axis: allowed for axis, allowed in sizes.items() if axis in used}
        return GraphSpec(self.name, self.description, inputs, self.outputs(tensors), ranges)


def register_graph(*graphs: Graph) -> None:
    """Adds rows to the register. Raises InputError for a name that is taken."""
    for graph in graphs:
        GRAPHS.add(graph)


GRAPHS: Register[Graph] = Register("graph", Plugins("regionspot.graphs", register_graph))
"""By name, in the order in which data flows through them."""


def graph_named(name: str) -> Graph:
    """Returns a row of the register. Raises InputError for an unknown name."""
    if name not in GRAPHS:
        raise InputError(f"there is no graph {name!r}: choose one of {', '.join(GRAPHS)}")
    return GRAPHS[name]


def required_graphs() -> tuple[str, ...]:
    """Returns the names of the graphs that every prediction runs."""
    return tuple(graph.name for graph in GRAPHS.values() if graph.role is Role.REQUIRED)


def served_graphs() -> tuple[str, ...]:
    """Returns the names of the graphs of which a server runs those that were exported; the required
    ones first.
    """
    on_demand = tuple(graph.name for graph in GRAPHS.values() if graph.role is Role.ON_DEMAND)
    return (*required_graphs(), *on_demand)


@dataclass(frozen=True)
class Ranges:
    """Sizes of the dynamic axes: images, regions of an image, prompts, points of each, mask tokens,
    words, texts.

    The head must see all regions of an image at once. Prompts do not see each other: callers send
    them in chunks.
    """

    batch: Range = field(default_factory=lambda: Range(1, 1, 8))
    regions: Range = field(default_factory=lambda: Range(1, 32, 300))
    prompts: Range = field(default_factory=lambda: Range(1, 32, 64))
    points: Range = field(default_factory=lambda: Range(1, 2, 16))
    tokens: Range = field(default_factory=lambda: Range(1, 1, NUM_MASK_TOKENS))
    words: Range = field(default_factory=lambda: Range(1, 80, 2048))
    texts: Range = field(default_factory=lambda: Range(1, 80, 256))

    @classmethod
    def for_gpu(cls, **given: Range) -> Ranges:
        """Returns the ranges of engines and of Triton's models on a GPU, but for those that are
        `given`.

        Engines set scratch memory aside for the largest sizes, and are tuned for the best ones: a
        server sends batches of images to the encoders, and prompts in chunks.
        """
        return cls(**{"batch": Range(1, 4, 8), "prompts": Range(1, 32, 32), **given})

    def by_axis(self, context_length: int) -> dict[str, Range]:
        """Returns the range of each axis. That of "text_length" follows from the most tokens of a
        text.
        """
        lengths = Range(min(2, context_length), min(16, context_length), context_length)
        return {axis.name: getattr(self, axis.name) for axis in fields(self)} | {
            "text_length": lengths
        }


def graph_specs(info: ModelInfo, ranges: Ranges | None = None) -> dict[str, GraphSpec]:
    """Returns all graphs of a model, by name, in the order of `GRAPHS`."""
    tensors = ModelTensors(info)
    sizes = (ranges or Ranges()).by_axis(info.context_length)
    return {name: graph.spec(tensors, sizes) for name, graph in GRAPHS.items()}


def gpu_graph_specs(info: ModelInfo, ranges: Ranges | None = None) -> dict[str, GraphSpec]:
    """Returns all graphs as they are exported for GPUs: those that take prompts or regions of
    encoded images take one image.

    A server asks about one image at a time, and a batch would multiply the scratch memory that
    TensorRT sets aside.

    Args:
        ranges: None stands for `Ranges.for_gpu()`.
    """
    specs = graph_specs(info, ranges or Ranges.for_gpu())
    return {
        name: replace(spec, ranges={**spec.ranges, "batch": Range(1, 1, 1)})
        if {"prompts", "regions"} & set(spec.ranges) and "images" not in spec.input_names
        else spec
        for name, spec in specs.items()
    }


_MODULES = "regionspot.modeling.graphs"

register_graph(
    Graph(
        "sam_image_encoder",
        "SAM's image encoder, for each image",
        inputs=lambda t: (t.images, t.input_sizes),
        outputs=lambda t: (t.image_embeddings,),
        module=f"{_MODULES}:SamImageEncoder",
        weights=("sam",),
    ),
    Graph(
        "clip_image_encoder",
        "CLIP's feature map, for each image",
        inputs=lambda t: (t.clip_images,),
        outputs=lambda t: (t.patch_tokens,),
        module=f"{_MODULES}:ClipImageEncoder",
        weights=("clip",),
    ),
    Graph(
        "sam_token_decoder_image",
        "the token decoder's image part, for each image",
        inputs=lambda t: (t.image_embeddings,),
        outputs=lambda t: (t.projections, t.statistics),
        module=f"{_MODULES}:SamTokenDecoderImage",
        weights=("sam",),
        quantized=False,
    ),
    Graph(
        "sam_token_decoder_prompts",
        "the token decoder's prompt part, for each set of prompts",
        inputs=lambda t: (t.projections, t.statistics, t.points, t.labels, t.token_ids),
        outputs=lambda t: (t.mask_tokens, t.iou_predictions),
        module=f"{_MODULES}:SamTokenDecoderPrompts",
        weights=("sam",),
    ),
    Graph(
        "sam_mask_decoder",
        "the prompt part with masks, for each set of prompts whose masks are wanted",
        inputs=lambda t: (
            t.image_embeddings,
            t.projections,
            t.statistics,
            t.points,
            t.labels,
            t.token_ids,
        ),
        outputs=lambda t: (t.low_res_masks, t.mask_tokens, t.iou_predictions),
        module=f"{_MODULES}:SamMaskDecoder",
        weights=("sam",),
        role=Role.ON_DEMAND,
    ),
    Graph(
        "sam_mask_prompt",
        "the image embedding as each mask prompt changes it, for each set of prompts that are "
        "masks",
        inputs=lambda t: (t.image_embeddings, t.mask_inputs),
        outputs=lambda t: (t.prompted_embeddings,),
        module=f"{_MODULES}:SamMaskPrompt",
        weights=("sam",),
        role=Role.ON_DEMAND,
        quantized=False,
    ),
    Graph(
        "region_head",
        "RegionSpot's head and the cosines, for each set of regions and vocabulary",
        inputs=lambda t: (t.region_tokens, t.patch_tokens, t.valid, t.text_embeddings),
        outputs=lambda t: (t.logits,),
        module=f"{_MODULES}:RegionHeadLogits",
        weights=("head",),
        quantized=False,
    ),
    Graph(
        "clip_text_encoder",
        "CLIP's text embeddings, for each new vocabulary",
        inputs=lambda t: (t.tokens,),
        outputs=lambda t: (t.embeddings,),
        module=f"{_MODULES}:ClipTextEncoder",
        weights=("text",),
        role=Role.ON_DEMAND,
    ),
    Graph(
        "region_recognizer",
        "everything in one: both images, boxes and words to scores",
        inputs=lambda t: (
            t.images,
            t.input_sizes,
            t.clip_images,
            t.boxes,
            t.valid,
            t.text_embeddings,
        ),
        outputs=lambda t: (t.scores,),
        module=f"{_MODULES}:RegionRecognizer",
        weights=("sam", "clip", "head"),
        role=Role.COMBINED,
    ),
)

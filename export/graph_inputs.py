"""Inputs for any graph: drawn from a seed at any sizes, or real ones, from pictures through the
model itself.

Parity is judged on both; int8's ranges are taken from real ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from regionspot.errors import InputError
from regionspot.export.pictures import Pictures
from regionspot.modeling.graphs import graph_module, model_info
from regionspot.modeling.pipelines import ANY_SIZE
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.graphs import graph_specs, required_graphs
from regionspot.runtime.prepared import ImagePreparation, PreparedBatch
from regionspot.runtime.runner import Array
from regionspot.runtime.torch_runner import TorchRunner
from regionspot.structures import POINT_LABELS, FloatArray, IntArray, Prompts
from regionspot.transforms import SamTransform

Feeds = dict[str, Array]

PROMPT = "a photo of a {}."
# how many mask tokens are wanted -> which
TOKEN_IDS = {1: (0,), 2: (0, 2), 3: (1, 2, 3), 4: (0, 1, 2, 3)}


class GraphInputs:
    """Inputs of a model's graphs.

    Args:
        model: what stands before a graph is computed by it, on its device.
        pictures: for real inputs; None where only seeded ones are asked for.
    """

    def __init__(self, model: RegionSpot, pictures: Pictures | None = None) -> None:
        self.model, self.pictures = model, pictures
        self.specs = graph_specs(model_info(model))
        # of an input that another graph computes
        self._producers = {
            tensor.name: name for name in required_graphs() for tensor in self.specs[name].outputs
        }
        self._encoded: dict[tuple[str, int], Feeds] = {}

    def seeded(
        self, spec: GraphSpec, seed: int = 0, sizes: Mapping[str, int] | None = None
    ) -> Feeds:
        """Inputs drawn at random, in the ranges that real ones have.

        Args:
            sizes: of the dynamic axes; those left out are as the spec is best at.
        """
        rng = np.random.default_rng([seed, *spec.name.encode()])
        chosen = spec.sizes("opt") | dict(sizes or {})
        feeds = {tensor.name: self._drawn(tensor, chosen, rng) for tensor in spec.inputs}
        # they and the statistics must be of one image: a variance is made of them
        if "image_projections" in feeds:
            (embeddings,) = self.specs["sam_token_decoder_image"].inputs
            drawn = feeds.get(embeddings.name, self._drawn(embeddings, chosen, rng))
            feeds |= self._run("sam_token_decoder_image", {embeddings.name: drawn})
        return feeds

    def real(self, spec: GraphSpec, count: int | None = None) -> list[Feeds]:
        """Inputs from the first `count` pictures, or all: as many at a time as the spec's smallest
        batch.

        Images with fewer regions than others beside them are padded. CLIP's text tower takes all
        words at once.

        Raises:
            InputError: there are no pictures.
        """
        if self.pictures is None or not self.pictures.pictures:
            raise InputError("real inputs need pictures: name a data set, or a folder of them")
        if "tokens" in spec.input_names:
            return [{"tokens": self._tokens(spec.ranges)}]
        batch = spec.ranges["batch"].min
        available = len(self.pictures.pictures[:count])
        starts = range(0, max(available - batch, 0) + 1, batch)
        return [
            self._real(spec, [i % available for i in range(start, start + batch)])
            for start in starts
        ]

    def _real(self, spec: GraphSpec, indices: Sequence[int]) -> Feeds:
        sources = self._sources(indices, spec.ranges)
        if "mask_inputs" in spec.input_names:
            sources["mask_inputs"] = self._mask_prompts(indices, sources["labels"].shape[1])
        return {
            tensor.name: self._produced(tensor, indices, sources)
            if tensor.name in self._producers
            else sources[tensor.name]
            for tensor in spec.inputs
        }

    def _produced(self, tensor: TensorSpec, indices: Sequence[int], sources: Feeds) -> Array:
        """An input that another graph computes of pictures; `sources` holds what no graph computes
        of them.
        """
        graph = self._producers[tensor.name]
        # an encoder: of each image by itself
        if not self._producers.keys() & set(self.specs[graph].input_names):
            return np.concatenate([self._encode(graph, index)[tensor.name] for index in indices])
        feeds = {
            one.name: self._produced(one, indices, sources)
            if one.name in self._producers
            else sources[one.name]
            for one in self.specs[graph].inputs
        }
        produced = self._run(graph, feeds)[tensor.name]
        # the head takes one token of a region
        return produced[:, :, 0] if tensor.name == "mask_tokens" else produced

    def _encode(self, graph: str, index: int) -> Feeds:
        """What an encoder says of a picture, computed once."""
        if (graph, index) not in self._encoded:
            sources = self._sources([index], {})
            feeds = {name: sources[name] for name in self.specs[graph].input_names}
            self._encoded[graph, index] = self._run(graph, feeds)
        return self._encoded[graph, index]

    def _run(self, graph: str, feeds: Feeds) -> Feeds:
        with TorchRunner(graph_module(self.model, graph), self.specs[graph]) as runner:
            return runner.infer(feeds)

    def _sources(self, indices: Sequence[int], ranges: Mapping[str, Range]) -> Feeds:
        """All inputs that no graph computes, of a batch of pictures."""
        assert self.pictures is not None
        preparation = ImagePreparation(self.model.sam.image_size, self.model.clip.image_size)
        pictures = [self.pictures.pictures[index] for index in indices]
        limits = ranges.get("regions", ranges.get("prompts", ANY_SIZE))
        most = max(len(picture.boxes) for picture in pictures)
        batch = PreparedBatch.stack(
            [
                preparation.prepare(picture.image, Prompts.from_boxes(picture.boxes))
                for picture in pictures
            ],
            num_regions=min(max(most, limits.min), limits.max),
        )
        assert batch.clip_images is not None
        sources: Feeds = {
            "images": batch.sam_images,
            "input_sizes": batch.input_sizes,
            "clip_images": batch.clip_images,
            "points": batch.points,
            "labels": batch.labels,
            "token_ids": np.zeros(1, np.int32),
            "boxes": batch.points.reshape(*batch.points.shape[:2], 4),
            "valid": batch.valid,
        }
        if "words" in ranges:
            sources["text_embeddings"] = self._text_embeddings(ranges["words"])
        return sources

    def _mask_prompts(self, indices: Sequence[int], count: int) -> FloatArray:
        """Mask logits (B, N, 1, 4h, 4w) that are inside in each picture's first boxes; of padding
        nothing is.
        """
        assert self.pictures is not None
        transform, size = SamTransform(self.model.sam.image_size), self.model.sam.mask_size
        masks = np.zeros((len(indices), count, 1, *size), np.float32)
        for row, picture in enumerate(self.pictures.pictures[index] for index in indices):
            drawn = np.zeros((min(count, len(picture.boxes)), *picture.image.shape[:2]), bool)
            for mask, (x0, y0, x1, y1) in zip(
                drawn, np.round(picture.boxes[:count]).astype(int), strict=True
            ):
                mask[y0:y1, x0:x1] = True
            masks[row, : len(drawn)] = transform.apply_masks(drawn, size)
        return masks

    def _text_embeddings(self, limits: Range) -> FloatArray:
        """(V, E) unit rows of the pictures' words, each in one phrase."""
        texts = {
            "texts": ANY_SIZE,
            "text_length": self.specs["clip_text_encoder"].ranges["text_length"],
        }
        rows = self._run("clip_text_encoder", {"tokens": self._tokens(texts)})[
            "embeddings"
        ]  # (V, E)
        rows = rows[np.arange(min(max(len(rows), limits.min), limits.max)) % len(rows)]
        unit: FloatArray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    def _tokens(self, ranges: Mapping[str, Range]) -> IntArray:
        """(n, T) of the pictures' words, T reaching the last end token where the ranges let it."""
        assert self.pictures is not None
        texts, lengths = ranges["texts"], ranges["text_length"]
        words = self.pictures.words
        count = min(max(len(words), texts.min), texts.max)
        clip = self.model.clip
        tokens = clip.tokenizer(
            [PROMPT.format(words[index % len(words)]) for index in range(count)],
            context_length=clip.context_length,
        )
        used = int((tokens != 0).any(0).nonzero().max()) + 1
        return tokens[:, : min(max(used, lengths.min), lengths.max)].numpy().astype(np.int32)

    def _drawn(
        self, tensor: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator
    ) -> Array:
        """A random value of one input."""
        drawn: Array
        shape, side = tensor.resolved(sizes), self.model.sam.image_size
        if tensor.name == "input_sizes":
            drawn = rng.integers(side // 2, side + 1, shape)
            drawn[:, 0] = side
        elif tensor.name == "labels":
            drawn = rng.choice(POINT_LABELS, shape)
        elif tensor.name == "token_ids":
            drawn = np.array(TOKEN_IDS[shape[0]])
        elif tensor.name == "tokens":
            drawn = _random_texts(shape, self.model.clip.clip.vocab_size, rng)
        elif tensor.name == "boxes":
            drawn = np.sort(rng.uniform(0, side, (*shape[:2], 2, 2)), axis=2).reshape(shape)
        elif tensor.name == "points":
            drawn = rng.uniform(0, side, shape)
        elif tensor.name == "text_embeddings":
            drawn = rng.normal(size=shape)
            drawn = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
        elif tensor.dtype == "bool":
            drawn = rng.random(shape) < 0.8
            drawn[:, 0] = True
        elif tensor.dtype == "uint8":
            drawn = rng.integers(0, 256, shape)
        else:
            drawn = rng.normal(size=shape)
        return drawn.astype(tensor.dtype)


def _random_texts(shape: tuple[int, ...], vocab_size: int, rng: np.random.Generator) -> Array:
    """(n, T) tokens: the start token, random ones, the end token somewhere, zeros."""
    tokens = rng.integers(1, vocab_size - 2, shape)
    tokens[:, 0] = vocab_size - 2
    ends = rng.integers(1, shape[1], shape[0])[:, None]
    positions = np.arange(shape[1])
    return np.where(positions < ends, tokens, np.where(positions == ends, vocab_size - 1, 0))

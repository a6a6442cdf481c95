"""What artefacts are compared on, and what int8 is calibrated with: trials of each graph and of the
whole pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from regionspot.errors import InputError
from regionspot.export.graph_inputs import Feeds, GraphInputs
from regionspot.export.pictures import NUM_PICTURES, Pictures, load_pictures
from regionspot.export.plan import affordable
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.run_graph import recognize
from regionspot.runtime.runner import Array
from regionspot.runtime.torch_runner import TorchRunner
from regionspot.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PADDING

ODD_SIZES = {
    "batch": 2,
    "regions": 5,
    "prompts": 6,
    "points": 3,
    "tokens": 3,
    "words": 7,
    "texts": 3,
    "text_length": 9,
}
"""Sizes of dynamic axes that no graph is made for in particular, and no two of which are alike but
by intent.
"""


@dataclass(frozen=True, eq=False)
class Trial:
    """Inputs, and the outputs that the model gives for them.

    Args:
        real: made from pictures; False if drawn from a seed.
    """

    feeds: Feeds
    expected: Mapping[str, Array]
    real: bool


class ParityInputs:
    """Trials of a model's graphs, computed when first asked for. The same pictures and seed give
    the same trials.

    Args:
        model: gives the expected outputs, on its device.
        source: of the pictures, see `regionspot.export.pictures.load_pictures`.
        parity_images: how many pictures to compare on. Others, up to NUM_PICTURES, calibrate int8;
            where there are too few for both, the same do.
        seed: of drawn inputs and of which pictures are taken.
    """

    def __init__(
        self, model: RegionSpot, source: str | None = None, parity_images: int = 4, seed: int = 0
    ) -> None:
        if parity_images < 1:
            raise InputError(f"parity needs one picture or more, not {parity_images}")
        self.model, self.seed = model, seed
        self.pictures = load_pictures(source, parity_images + NUM_PICTURES, seed)
        every = self.pictures.pictures
        held_out, rest = every[:parity_images], every[parity_images:] or every
        self._parity = GraphInputs(
            model, Pictures(self.pictures.source, held_out, self.pictures.words)
        )
        self._calibration = GraphInputs(
            model, Pictures(self.pictures.source, rest, self.pictures.words)
        )
        self._trials: dict[tuple[str, str], list[Trial]] = {}

    @property
    def specs(self) -> Mapping[str, GraphSpec]:
        """Of all graphs of the model."""
        return self._parity.specs

    @property
    def num_images(self) -> int:
        """How many pictures are compared on."""
        assert self._parity.pictures is not None
        return len(self._parity.pictures.pictures)

    @property
    def num_calibration_images(self) -> int:
        """How many pictures int8 and fp8 are calibrated on."""
        assert self._calibration.pictures is not None
        return len(self._calibration.pictures.pictures)

    def trials(self, spec: GraphSpec) -> list[Trial]:
        """Seeded ones at the sizes that the graph is best at, at odd sizes, at the smallest and at
        the largest, then real ones. All numbers are in single precision.
        """
        key = spec.name, repr(spec.ranges)
        spec = self._in_single(spec)
        if key not in self._trials:
            seeded = [
                self._parity.seeded(spec, self.seed + i, sizes)
                for i, sizes in enumerate(_sizes(spec, self.model))
            ]
            real = self._parity.real(spec)
            with TorchRunner(graph_module(self.model, spec.name), spec) as runner:
                self._trials[key] = [
                    Trial(feeds, runner.infer(feeds), is_real)
                    for of_kind, is_real in ((seeded, False), (real, True))
                    for feeds in of_kind
                ]
        return self._trials[key]

    def _in_single(self, spec: GraphSpec) -> GraphSpec:
        """The graph as the model has it, at the sizes of an artefact's."""
        return replace(self._parity.specs[spec.name], ranges=spec.ranges)

    def forget(self, graph: str) -> None:
        """Free the memory that a graph's trials take, at any sizes."""
        for key in [key for key in self._trials if key[0] == graph]:
            del self._trials[key]

    def calibration(self, spec: GraphSpec) -> list[Feeds]:
        """Real inputs to take int8's ranges from."""
        return self._calibration.real(self._in_single(spec))

    def calibration_fingerprint(self) -> str:
        """Changes with the pictures, boxes and words that int8 is calibrated on."""
        digest = xxhash.xxh3_128(repr((self.seed, self.pictures.words)).encode())
        for picture in self.pictures.pictures:
            digest.update(np.ascontiguousarray(picture.image).data)
            digest.update(np.ascontiguousarray(picture.boxes).data)
        return digest.hexdigest()

    def pipeline_trials(self, spec: GraphSpec, with_text: bool) -> list[Trial]:
        """Pictures and their regions for `regionspot.runtime.run_graph.recognize`.

        Args:
            spec: of `region_recognizer`, whose ranges limit how many regions there are.
            with_text: words come as tokens, so that the text encoder is part of it, and not as
                their embeddings.
        """
        key = f"pipeline {with_text}", repr(spec.ranges)
        if key not in self._trials:
            pipeline = pipeline_from_model(self.model)
            samples = [self._pipeline_sample(feeds, with_text) for feeds in self._parity.real(spec)]
            self._trials[key] = [
                Trial(sample, recognize(pipeline, sample), True) for sample in samples
            ]
        return self._trials[key]

    def _pipeline_sample(self, feeds: Feeds, with_text: bool) -> Feeds:
        valid = feeds["valid"]
        sample = {name: feeds[name] for name in ("images", "input_sizes", "clip_images", "valid")}
        sample["points"] = feeds["boxes"].reshape(*valid.shape, 2, 2)  # (B, N, 2, 2)
        corners = np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32)
        sample["labels"] = np.where(valid[:, :, None], corners, np.int32(PADDING))  # (B, N, 2)
        if with_text:
            return sample | self._parity.real(self._parity.specs["clip_text_encoder"])[0]
        return sample | {"text_embeddings": feeds["text_embeddings"]}


def _sizes(spec: GraphSpec, model: RegionSpot) -> list[dict[str, int]]:
    """Sizes of the dynamic axes for each seeded trial, none twice.

    The smallest keeps its words: a single logit may lie near zero, where its relative error says
    nothing.
    """
    best = spec.sizes("opt")
    odd = {
        axis: min(max(ODD_SIZES[axis], limits.min), limits.max)
        for axis, limits in spec.ranges.items()
    }
    smallest = spec.sizes("min")
    if "words" in best:
        smallest["words"] = best["words"]
    largest = affordable(spec, model, spec.sizes("max"))
    found: list[dict[str, int]] = []
    for sizes in (affordable(spec, model, best), odd, smallest, largest):
        if sizes not in found:
            found.append(sizes)
    return found

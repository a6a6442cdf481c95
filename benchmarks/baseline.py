"""What `regionspot-benchmark peers` measures: anything that recognises the regions of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from regionspot.benchmarks.stages import Stages
from regionspot.masks import Rle
from regionspot.structures import FloatArray


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result for one image.

    Args:
        scores: (N, V) of N regions and V words. A detector's N regions are those that it found.
        masks: N, or none where masks were not asked for.
    """

    scores: FloatArray
    masks: tuple[Rle, ...] = ()


class Baseline(Protocol):
    """From an encoded image and (N, 4) boxes, xyxy in its pixels, to scores, and to masks if it was
    made for them.

    `stages` are the times of the last call; `in_torch` tells whether its arithmetic can be counted
    by PyTorch.
    """

    stages: Stages
    in_torch: bool

    def __call__(self, picture: bytes, boxes: FloatArray) -> Outcome: ...

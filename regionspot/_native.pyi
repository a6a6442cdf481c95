from collections.abc import Mapping, Sequence
from enum import Enum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

HIGHEST_LEVEL: int

def level() -> int: ...
def rle_encode(mask: NDArray[np.uint8]) -> str: ...
def rle_decode(counts: str, height: int, width: int) -> NDArray[np.bool_]: ...
def masks_from_logits(
    logits: NDArray[np.float32],
    frame: int,
    valid: tuple[int, int],
    picture: tuple[int, int],
    threads: int,
) -> tuple[list[str], list[int], list[tuple[int, int, int, int]]]: ...
def resize_rgb(
    image: NDArray[np.uint8], targets: Sequence[NDArray[np.uint8]], threads: int
) -> None: ...
def rle_area(counts: str, height: int, width: int) -> int: ...
def grid_attention(
    projected: NDArray[np.float32],
    padding: NDArray[np.float32],
    relative_rows: NDArray[np.float32],
    relative_columns: NDArray[np.float32],
    output: NDArray[np.float32],
    worked: tuple[int, int],
    threads: int,
) -> None: ...

class Activation(Enum):
    NONE = ...
    GELU = ...
    QUICK_GELU = ...

class LinearLayer:
    lanes: ClassVar[int]
    def __init__(
        self, weight: NDArray[np.float32], bias: NDArray[np.float32], activation: Activation = ...
    ) -> None: ...
    def apply(self, x: NDArray[np.float32], y: NDArray[np.float32], threads: int) -> None: ...

class PackedImage: ...

class TokenDecoder:
    def __init__(self, weights: Mapping[str, NDArray[np.float32]]) -> None: ...
    @property
    def channels(self) -> int: ...
    @property
    def cells(self) -> int: ...
    def pack(
        self,
        projections: NDArray[np.float32],
        statistics: NDArray[np.float32],
        embedding: NDArray[np.float32] | None,
        threads: int,
    ) -> PackedImage: ...
    def decode(
        self,
        image: PackedImage,
        prompts: NDArray[np.float32],
        wanted: Sequence[int],
        width: int,
        drawn: tuple[int, int],
        tokens: NDArray[np.float32],
        iou_predictions: NDArray[np.float32],
        masks: NDArray[np.float32] | None,
        threads: int,
    ) -> None: ...

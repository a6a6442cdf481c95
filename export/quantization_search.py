"""How to quantise a linear layer to int8 or fp8: where to clip what it reads, and how much to move
into its weights.

Found by trial, by how much of the layer's output survives on calibration inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

ROWS = 256
"""Input vectors of a layer that recipes are judged on; ranges are taken from all."""

CLIPPING = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SMOOTHING = (0.0, 0.5, 0.7, 0.85)
"""What is tried: the share of the largest input that the grid reaches, and SmoothQuant's
exponent.
"""


@dataclass(frozen=True)
class Grid:
    """The numbers that a layer's inputs and weights are rounded to: those of `dtype` up to
    `largest`, times a scale.

    Args:
        scale_type: what scales are stored in.
    """

    dtype: Any
    largest: float
    scale_type: type[np.floating[Any]] = np.float32

    def scales(self, largest: npt.ArrayLike) -> FloatArray:
        """The scales at which `largest` is the largest number of the grid; never 0."""
        smallest = np.finfo(self.scale_type).smallest_subnormal
        stored = (np.asarray(largest) / self.largest).astype(self.scale_type)
        return np.maximum(stored, smallest).astype(np.float32)

    def channel_scales(self, weights: FloatArray) -> FloatArray:
        """(K, N) to (1, N): the scale of each output channel."""
        largest = np.abs(weights).max(0, keepdims=True)
        return self.scales(np.where(largest > 0, largest, 1.0))

    def rounded(self, x: FloatArray, scale: FloatArray | float) -> FloatArray:
        """What `x` is in units of `scale`: numbers of the grid."""
        units = x / np.float32(scale)
        if np.issubdtype(self.dtype, np.integer):
            units = np.rint(units)
        within = np.clip(units, -self.largest, self.largest)
        return within.astype(self.dtype).astype(np.float32)


GRIDS = {"int8": Grid(np.int8, 127.0), "fp8": Grid(ml_dtypes.float8_e4m3fn, 448.0)}
"""By precision."""


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """What calibration showed of a tensor: the largest value of each of its K channels, and some of
    its vectors.
    """

    channel_max: FloatArray
    rows: FloatArray


@dataclass(frozen=True, eq=False)
class Recipe:
    """`scale` of the inputs after division by `smoothing` (K,)."""

    scale: float
    smoothing: FloatArray
    sqnr_db: float


def find_recipe(
    observed: CalibrationStats, weights: FloatArray, smoothable: bool, grid: Grid
) -> Recipe:
    """The best of SMOOTHING and CLIPPING, by the SQNR of the product with `weights` (K, N)."""
    wanted = observed.rows @ weights
    best: Recipe | None = None
    for exponent in SMOOTHING if smoothable else SMOOTHING[:1]:
        smoothing = _smoothing(observed.channel_max, np.abs(weights).max(1), exponent)
        rows = observed.rows / smoothing
        scaled = weights * smoothing[:, None]
        scales = grid.channel_scales(scaled)
        quantized = grid.rounded(scaled, scales) * scales
        largest = float((observed.channel_max / smoothing).max())
        for clipping in CLIPPING:
            scale = grid.scales(max(largest * clipping, 1e-6))
            sqnr_db = _sqnr_db(wanted, grid.rounded(rows, scale) * scale @ quantized)
            if best is None or sqnr_db > best.sqnr_db:
                best = Recipe(float(scale), smoothing, sqnr_db)
    assert best is not None
    return best


def _smoothing(inputs: FloatArray, weights: FloatArray, exponent: float) -> FloatArray:
    """(K,) what to divide each channel by, from the largest inputs and weights of each; 1 on
    average.
    """
    if not exponent:
        return np.ones_like(inputs)
    factors = np.maximum(inputs, 1e-5) ** exponent / np.maximum(weights, 1e-5) ** (1 - exponent)
    factors /= np.exp(np.log(factors).mean())
    return factors.astype(np.float32)


def _sqnr_db(wanted: FloatArray, found: FloatArray) -> float:
    signal, noise = float(np.square(wanted).sum()), float(np.square(found - wanted).sum())
    return 10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30)))

"""How to quantise a linear layer: where to clip what it reads, and how much to move into its
weights.

Found by trial, by how much of the layer's output survives on calibration inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

ROWS = 256
"""Input vectors of a layer that recipes are judged on; ranges are taken from all."""

CLIPPING = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SMOOTHING = (0.0, 0.5, 0.7, 0.85)
"""What is tried: the share of the largest input that int8 reaches, and SmoothQuant's exponent."""

LEVELS = 127


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


def find_recipe(observed: CalibrationStats, weights: FloatArray, smoothable: bool) -> Recipe:
    """The best of SMOOTHING and CLIPPING, by the SQNR of the product with `weights` (K, N)."""
    wanted = observed.rows @ weights
    best: Recipe | None = None
    for exponent in SMOOTHING if smoothable else SMOOTHING[:1]:
        smoothing = _smoothing(observed.channel_max, np.abs(weights).max(1), exponent)
        rows = observed.rows / smoothing
        scaled = weights * smoothing[:, None]
        quantized = rounded(scaled, channel_scales(scaled)) * channel_scales(scaled)
        largest = float((observed.channel_max / smoothing).max())
        for clipping in CLIPPING:
            scale = max(largest * clipping, 1e-6) / LEVELS
            sqnr_db = _sqnr_db(wanted, rounded(rows, scale) * np.float32(scale) @ quantized)
            if best is None or sqnr_db > best.sqnr_db:
                best = Recipe(scale, smoothing, sqnr_db)
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


def channel_scales(weights: FloatArray) -> FloatArray:
    """(K, N) to (1, N): the scale of each output channel."""
    largest = np.abs(weights).max(0, keepdims=True)
    return (np.where(largest > 0, largest, 1.0) / LEVELS).astype(np.float32)


def rounded(x: FloatArray, scale: FloatArray | float) -> FloatArray:
    return np.clip(np.rint(x / np.float32(scale)), -LEVELS, LEVELS)


def _sqnr_db(wanted: FloatArray, found: FloatArray) -> float:
    signal, noise = float(np.square(wanted).sum()), float(np.square(found - wanted).sum())
    return 10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30)))

"""How far two runtimes may be apart: measured differences, and the named classes of parity that
judge them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regionspot.runtime.runner import Array

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
QUANTIZED = ("int8", "fp8")
"""Those in which linear layers are quantised, with ranges that are taken from images."""

GPU_ONLY = ("fp8",)
"""Those that no format for CPUs is made in: GPUs of compute capability 8.9 and later compute it."""

SQNR_CAP_DB = 200.0
"""The signal-to-noise ratio of equal arrays, which has no bound."""


@dataclass(frozen=True)
class Difference:
    """Between a reference and what another runtime gives.

    Args:
        max_abs_diff: the largest difference, in the tensor's own unit.
        max_abs_reference: the largest value of the reference, that says what is much.
        cosine: of the two, taken as one vector each.
        sqnr_db: energy of the reference over the energy of the difference, in decibel.
    """

    max_abs_diff: float
    max_abs_reference: float
    cosine: float
    sqnr_db: float

    @property
    def relative(self) -> float:
        """The largest difference over the largest value, where that is above 1."""
        return self.max_abs_diff / max(1.0, self.max_abs_reference)

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure(reference: Array, actual: Array) -> Difference:
    """The difference of two arrays of one shape, both finite."""
    import numpy as np  # not needed to read the classes below, as the command line does

    wanted, found = (array.astype(np.float64).ravel() for array in (reference, actual))
    if not wanted.size:
        return Difference(0.0, 0.0, 1.0, SQNR_CAP_DB)
    error = found - wanted
    signal, noise, energy = (float(vector @ vector) for vector in (wanted, error, found))
    if signal > 0 and energy > 0:
        cosine = float(wanted @ found) / math.sqrt(signal * energy)
    else:
        cosine = 1.0 if noise == 0 else 0.0
    sqnr_db = (
        SQNR_CAP_DB
        if noise == 0
        else 10 * math.log10(signal / noise)
        if signal > 0
        else -SQNR_CAP_DB
    )
    return Difference(
        max_abs_diff=float(np.abs(error).max()),
        max_abs_reference=float(np.abs(wanted).max()),
        cosine=min(cosine, 1.0),
        sqnr_db=min(max(sqnr_db, -SQNR_CAP_DB), SQNR_CAP_DB),
    )


def worst(differences: Sequence[Difference]) -> Difference:
    """The largest difference, the smallest cosine and the smallest ratio of several."""
    return Difference(
        max(difference.max_abs_diff for difference in differences),
        max(difference.max_abs_reference for difference in differences),
        min(difference.cosine for difference in differences),
        min(difference.sqnr_db for difference in differences),
    )


@dataclass(frozen=True)
class Tolerance:
    """A class of parity. None: that figure is not judged.

    Args:
        max_relative: of `Difference.relative`.
        min_cosine, min_sqnr_db: for each output.
        min_top1_agreement: end to end, the share of regions whose best class is the same; regions
            whose two best classes are as good as equal in the reference are not counted against it.
        max_score_difference: end to end, of a probability.
        real_only: values are judged on inputs from pictures alone: int8's ranges are theirs, noise
            lies beyond them.
    """

    name: str
    max_relative: float | None = None
    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    min_top1_agreement: float = 1.0
    max_score_difference: float | None = None
    real_only: bool = False

    def breaches(self, difference: Difference) -> list[str]:
        """What of a difference is beyond this class, in words; nothing if all is well."""
        found = []
        if self.max_relative is not None and not difference.relative <= self.max_relative:
            found.append(
                f"max|Δ| {difference.max_abs_diff:.2g} is {difference.relative:.2g} > "
                f"{self.max_relative:g}"
            )
        if self.min_cosine is not None and not difference.cosine >= self.min_cosine:
            found.append(f"cosine {difference.cosine:.5f} < {self.min_cosine:g}")
        if self.min_sqnr_db is not None and not difference.sqnr_db >= self.min_sqnr_db:
            found.append(f"SQNR {difference.sqnr_db:.1f} dB < {self.min_sqnr_db:g} dB")
        return found

    def end_to_end_breaches(self, top1_agreement: float, score_difference: float) -> list[str]:
        """As `breaches`, of the whole pipeline."""
        found = []
        if not top1_agreement >= self.min_top1_agreement:
            found.append(f"top-1 agreement {top1_agreement:.4f} < {self.min_top1_agreement:g}")
        if (
            self.max_score_difference is not None
            and not score_difference <= self.max_score_difference
        ):
            found.append(f"score difference {score_difference:.2g} > {self.max_score_difference:g}")
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


REFACTORED = Tolerance("refactored", max_relative=1e-6)
RUNTIME_FP32 = Tolerance("runtime fp32", max_relative=1e-4, max_score_difference=1e-3)
TENSORRT_FP32 = Tolerance("tensorrt fp32", max_relative=1e-3, max_score_difference=1e-2)
HALF = Tolerance("half precision", min_cosine=0.999, min_sqnr_db=25.0, min_top1_agreement=0.99)
INT8 = Tolerance("int8", min_cosine=0.98, min_sqnr_db=14.0, min_top1_agreement=0.9, real_only=True)
FP8 = Tolerance("fp8", min_cosine=0.98, min_sqnr_db=14.0, min_top1_agreement=0.85, real_only=True)
"""For each graph as int8's. Three bits of mantissa lose 5 to 8 dB more than int8 in the graphs of
regionspot_mini, to 28 dB at the worst, and 6 of 100 regions got another of its many similar
classes.
"""

TOLERANCES = {
    tolerance.name: tolerance
    for tolerance in (REFACTORED, RUNTIME_FP32, TENSORRT_FP32, HALF, INT8, FP8)
}

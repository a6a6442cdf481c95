"""How much arithmetic a run in PyTorch takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def _of_baddbmm(_total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """Of the shapes (b, m, k) and (b, k, n)."""
    return 2 * math.prod(left) * right[-1]


IN_PLACE = {torch.ops.aten.baddbmm_: _of_baddbmm}
"""What the shared-image token decoder uses, and the counter does not know."""


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of matrix products, convolutions and attention, two for each multiply-add. `run`
    is slower than usual.

    Attention is made to run as the matrix products that it is: of its fused forms the counter knows
    only those of GPUs.
    """
    with _unfused(), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def _unfused() -> Iterator[None]:
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def extrapolate(first: Sequence[int], count: int) -> int:
    """What `count` regions take, given what 1, 2 and 3 take.

    Each region adds the same, and each pair of regions, which see each other in the head, adds the
    same. What a decoder repeats for each chunk of its prompts, thousands of operations among
    billions, is left out.
    """
    one, two, three = first
    of_pairs = three - 2 * two + one
    return one + (count - 1) * (two - one) + (count - 1) * (count - 2) // 2 * of_pairs

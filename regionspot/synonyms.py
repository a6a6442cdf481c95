"""Class names that a text encoder cannot tell apart: unknown words, spellings that it reads alike,
names cut short.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from regionspot.errors import shown
from regionspot.structures import BoolArray, FloatArray, Vocabulary

SAME_COSINE = 0.999
"""Embeddings with a larger cosine stand for one meaning: their classes share every score."""

_BLOCK = 512
_AXES = 64
_ROUNDING = 1e-5  # of squared distances in single precision, generously


def same_meaning(vocabulary: Vocabulary) -> list[tuple[str, ...]]:
    """Groups of names whose embeddings have a cosine above SAME_COSINE, in the order of the
    vocabulary.

    A name belongs to a group if it is that close to any other of the group. Memory grows with V,
    not with its square.
    """
    labels = _labels(vocabulary.embeddings)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    groups = [group for group in np.split(order, starts[1:]) if len(group) > 1]
    return [tuple(vocabulary.names[index] for index in group) for group in groups]


def describe_groups(vocabulary: Vocabulary, groups: list[tuple[str, ...]], most: int = 5) -> str:
    """The first groups for a message, with the cosine of each group's first two names."""
    place = {name: index for index, name in enumerate(vocabulary.names)}
    texts = []
    for group in groups[:most]:
        first, second = (
            vocabulary.embeddings[place[name]].astype(np.float64) for name in group[:2]
        )
        more = f" and {len(group) - 4} more" if len(group) > 4 else ""
        texts.append(f"{' and '.join(map(shown, group[:4]))}{more} (cosine {first @ second:.4f})")
    rest = len(groups) - most
    return "; ".join(texts) + (f"; and {rest} more groups" if rest > 0 else "")


def _labels(embeddings: FloatArray) -> npt.NDArray[np.int64]:
    """(V,) a number for each name, the same for all names of a group: the index of the group's
    first name.
    """
    labels = np.arange(len(embeddings))
    projected = _projected(embeddings)
    for start in range(0, len(embeddings), _BLOCK):
        end = min(start + _BLOCK, len(embeddings))
        rows = start + np.flatnonzero(_near_earlier(projected, start, end))
        close = embeddings[rows] @ embeddings[:end].T > SAME_COSINE  # (rows, end)
        for row, with_row in zip(rows, close, strict=True):
            joined = np.union1d(labels[:row][with_row[:row]], labels[row])
            if len(joined) > 1:
                labels[np.isin(labels, joined)] = joined[0]
    return labels


def _projected(embeddings: FloatArray) -> FloatArray:
    """(V, E) on a few orthonormal axes: no distance grows by that."""
    width = embeddings.shape[1]
    axes = np.random.default_rng(0).standard_normal((width, min(_AXES, width)))
    projected: FloatArray = embeddings @ np.linalg.qr(axes)[0].astype(np.float32)
    return projected


def _near_earlier(projected: FloatArray, start: int, end: int) -> BoolArray:
    """(end - start,) which rows may be close to an earlier one; most are ruled out, at little
    cost.
    """
    norms = (projected[:end] ** 2).sum(axis=1)
    # squared
    distances = norms[start:, None] + norms - 2 * projected[start:end] @ projected[:end].T
    near: BoolArray = np.tril(distances < 2 * (1 - SAME_COSINE) + _ROUNDING, start - 1).any(axis=1)
    return near

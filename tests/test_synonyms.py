"""Names with one meaning are found whatever their number, and described in a few words."""

from __future__ import annotations

import numpy as np
import pytest

from regionspot.structures import Vocabulary
from regionspot.synonyms import SAME_COSINE, describe_groups, same_meaning


def vocabulary(embeddings: np.ndarray) -> Vocabulary:
    return Vocabulary(
        tuple(f"w{index}" for index in range(len(embeddings))),
        embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True),
    )


def reference(words: Vocabulary) -> list[tuple[str, ...]]:
    """Connected components, one name after the other."""
    close = (
        words.embeddings.astype(np.float64) @ words.embeddings.astype(np.float64).T > SAME_COSINE
    )
    groups: list[set[int]] = []
    for index in range(len(words)):
        joined = [group for group in groups if close[index, list(group)].any()]
        groups = [group for group in groups if group not in joined] + [{index}.union(*joined)]
    ordered = sorted(sorted(group) for group in groups if len(group) > 1)
    return [tuple(words.names[index] for index in group) for group in ordered]


@pytest.mark.parametrize("width", [2, 24, 100])
@pytest.mark.parametrize("count", [1, 5, 400, 1300])
def test_equals_all_pairs(count: int, width: int) -> None:
    rng = np.random.default_rng(count + width)
    embeddings = rng.standard_normal((count, width)) + 1
    for source, target in rng.integers(0, count, (count // 8, 2)):
        embeddings[target] = embeddings[source] + rng.choice([0, 0.01, 0.03]) * rng.standard_normal(
            width
        )
    words = vocabulary(embeddings)
    assert same_meaning(words) == reference(words)


def test_a_chain_is_one_group_in_any_order() -> None:
    # neighbours have a cosine of 0.99986
    angles = np.random.default_rng(0).permutation(np.linspace(0, 1, 60))
    words = vocabulary(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert same_meaning(words) == [words.names]


def test_descriptions_stay_short() -> None:
    words = vocabulary(np.repeat(np.eye(8, 9), 100, axis=0))
    text = describe_groups(words, same_meaning(words))
    assert text.startswith(
        "'w0' and 'w1' and 'w2' and 'w3' and 96 more (cosine 1.0000); 'w100' and "
    )
    assert text.endswith("; and 3 more groups") and len(text) < 400

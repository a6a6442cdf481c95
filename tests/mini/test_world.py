"""The mini world: its categories, its scenes, and what is drawn of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from regionspot.mini.render import MIN_VISIBLE_FRACTION, render_scene
from regionspot.mini.world import (
    BASE_WEIGHTS,
    CAPTION_WORDS,
    CATEGORIES,
    SHAPES,
    TAIL_WEIGHTS,
    UNIFORM_WEIGHTS,
    Scene,
    Toy,
    sample_crowd,
    sample_portrait,
    sample_scene,
)


def test_categories_are_patterns_and_ordered_colour_pairs() -> None:
    assert len({category.name for category in CATEGORIES}) == len(CATEGORIES) == 410
    assert [category.id for category in CATEGORIES] == list(range(1, 411))
    assert all(category.base != category.detail for category in CATEGORIES)
    assert Counter(category.novelty for category in CATEGORIES) == {
        None: 300,
        "pair": 60,
        "word": 50,
    }


def test_names_have_the_right_article() -> None:
    names = " ".join(category.name for category in CATEGORIES)
    assert "with an orange border" in names and "with a red border" in names
    assert "a orange" not in names and "an red" not in names


def test_novel_categories_are_never_drawn_for_training() -> None:
    rng = np.random.default_rng(0)
    for weights in (BASE_WEIGHTS, TAIL_WEIGHTS):
        assert all(
            (weight == 0) == category.novel
            for weight, category in zip(weights, CATEGORIES, strict=True)
        )
        drawn = {toy.category for _ in range(300) for toy in sample_scene(rng, weights).toys}
        assert not any(CATEGORIES[index].novel for index in drawn)


def test_novelty_is_a_new_pair_of_known_words_or_a_new_word() -> None:
    base = [category for category in CATEGORIES if not category.novel]
    known = {word for category in base for word in category.name.split()}
    assert known.isdisjoint(CAPTION_WORDS)
    for category in CATEGORIES:
        words = set(category.name.split())
        if category.novelty == "pair":
            assert any(b.base == category.base and b.pattern == category.pattern for b in base)
            assert any(b.detail == category.detail and b.pattern == category.pattern for b in base)
        if category.novelty == "word":
            assert words & set(CAPTION_WORDS)
        assert category.novelty == "word" or words <= known


def test_the_training_world_has_a_long_tail() -> None:
    weights = Counter(category.tail_weight for category in CATEGORIES if not category.novel)
    assert len(weights) == 3 and min(weights.values()) == 100
    assert max(weights) / min(weights) > 40


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = (
        render_scene(sample_scene(np.random.default_rng([7, 1, 3]), UNIFORM_WEIGHTS))
        for _ in range(2)
    )
    assert np.array_equal(first[0], second[0])
    assert [category for category, _ in first[1]] == [category for category, _ in second[1]]


def test_masks_are_disjoint_and_lie_where_the_picture_shows_the_toy() -> None:
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed), UNIFORM_WEIGHTS)
        picture, visible = render_scene(scene)
        assert picture.shape == (scene.height, scene.width, 3) and picture.dtype == np.uint8
        assert np.sum([mask for _, mask in visible], axis=0).max() <= 1
        assert all(mask.sum() >= 16 for _, mask in visible)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_toy_has_its_colour_over_its_whole_mask(shape: str) -> None:
    red = next(
        index for index, category in enumerate(CATEGORIES) if category.name == "plain red toy"
    )
    toy = Toy(red, shape, (64.0, 64.0), 40.0, 0.2, 0.0, (0.0, 0.0))
    picture, [(category, mask)] = render_scene(Scene(128, 128, (toy,), texture_seed=1))
    assert category == red
    inside = picture[mask].astype(int)
    assert (inside[:, 0] > inside[:, 1] + 60).mean() > 0.97  # red beyond its antialiased edge
    assert 0.2 < mask.mean() < 0.35 or shape in ("star", "cross", "triangle")


def test_a_hidden_toy_is_not_annotated() -> None:
    behind = Toy(0, "disc", (64.0, 64.0), 20.0, 0.0, 0.0, (0.0, 0.0))
    front = Toy(1, "disc", (66.0, 64.0), 40.0, 0.0, 0.0, (0.0, 0.0))
    _, visible = render_scene(Scene(128, 128, (behind, front), texture_seed=1))
    assert [category for category, _ in visible] == [1]


def test_a_half_hidden_toy_is_annotated_by_what_shows() -> None:
    behind = Toy(0, "square", (50.0, 64.0), 30.0, 0.0, 0.0, (0.0, 0.0))
    front = Toy(1, "square", (80.0, 64.0), 30.0, 0.0, 0.0, (0.0, 0.0))
    _, [(_, shown), (_, whole)] = render_scene(Scene(128, 128, (behind, front), texture_seed=1))
    assert MIN_VISIBLE_FRACTION < shown.sum() / whole.sum() < 0.75


def test_a_portrait_has_one_toy() -> None:
    scene = sample_portrait(np.random.default_rng(0), UNIFORM_WEIGHTS, 64)
    assert len(scene.toys) == 1 and (scene.width, scene.height) == (64, 64)


def test_a_toy_shows_through_a_ring() -> None:
    inside = Toy(0, "disc", (64.0, 64.0), 20.0, 0.0, 0.0, (0.0, 0.0))
    ring = Toy(1, "ring", (64.0, 64.0), 50.0, 0.0, 0.0, (0.0, 0.0))
    _, [(first, shown), (second, around)] = render_scene(
        Scene(128, 128, (inside, ring), texture_seed=1)
    )
    assert (first, second) == (0, 1)
    rows, columns = np.nonzero(around)
    assert not around[64, 64] and shown[64, 64]
    assert rows.min() < np.nonzero(shown)[0].min() and columns.max() > np.nonzero(shown)[1].max()


def test_a_crowd_has_many_small_toys_that_are_nearly_all_visible() -> None:
    for seed in range(5):
        scene = sample_crowd(np.random.default_rng(seed), UNIFORM_WEIGHTS)
        assert 20 <= len(scene.toys) <= 100
        _, visible = render_scene(scene)
        assert len(visible) > 0.9 * len(scene.toys)
        assert max(toy.radius for toy in scene.toys) < 0.08 * min(scene.width, scene.height)


def test_some_toys_lie_inside_others() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, UNIFORM_WEIGHTS) for _ in range(200)]
    nested = [
        any(
            np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]) + a.radius * 0.9
            < b.radius
            for a in scene.toys
            for b in scene.toys
            if a is not b
        )
        for scene in scenes
    ]
    assert 0.05 < np.mean(nested) < 0.5

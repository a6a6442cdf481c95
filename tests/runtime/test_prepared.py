"""Images and their regions in the frames of a model, and batches of them."""

from __future__ import annotations

import numpy as np
import pytest

from regionspot.runtime.prepared import ImagePreparation, PreparedBatch
from regionspot.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PADDING, Prompts


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def test_boxes_are_taken_into_the_sam_frame() -> None:
    prepared = ImagePreparation(64, 32).prepare(
        image_of(50, 100), Prompts.from_boxes([[10, 20, 60, 40]])
    )
    assert prepared.sam_image.shape == (64, 64, 3) and prepared.input_size == (32, 64)
    assert prepared.clip_image is not None and prepared.clip_image.shape == (32, 32, 3)
    np.testing.assert_allclose(prepared.points, [[[6.4, 12.8], [38.4, 25.6]]], rtol=1e-6)


def test_clip_is_left_out_where_it_is_not_wanted() -> None:
    with_clip = ImagePreparation(64, 32).prepare(image_of(50, 100), Prompts.empty())
    without = ImagePreparation(64, None).prepare(image_of(50, 100), Prompts.empty())
    assert without.clip_image is None and PreparedBatch.stack([without]).clip_images is None
    assert np.array_equal(without.sam_image, with_clip.sam_image)


@pytest.mark.parametrize(("num_regions", "seen"), [(None, 2), (1, 1), (4, 4)])
def test_a_batch_is_padded_or_cut_to_one_number_of_regions(
    num_regions: int | None, seen: int
) -> None:
    preparation = ImagePreparation(64, 32)
    one = preparation.prepare(image_of(64, 64), Prompts.from_boxes([[1, 2, 3, 4]]))
    two = preparation.prepare(image_of(32, 64), Prompts.from_boxes([[5, 6, 7, 8], [9, 10, 11, 12]]))
    batch = PreparedBatch.stack([one, two], num_regions)
    assert batch.sam_images.shape == (2, 64, 64, 3) and batch.input_sizes.tolist() == [
        [64, 64],
        [32, 64],
    ]
    assert batch.points.shape == (2, seen, 2, 2) and batch.labels.shape == batch.valid.shape + (
        2,
    ) == (2, seen, 2)
    assert batch.valid.sum(1).tolist() == [1, min(2, seen)]
    assert (batch.labels[batch.valid] == (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)).all()
    assert (batch.labels[~batch.valid] == PADDING).all() and (batch.points[~batch.valid] == 0).all()
    assert batch.points[0, 0].tolist() == [[1, 2], [3, 4]]

"""What a pipeline on a GPU must give: what the model gives on the CPU, of usual and of the largest
sizes. Test files of each runtime call these.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.predictor import RegionPredictor
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.structures import FOREGROUND, Vocabulary

MAX_IMAGES, MAX_REGIONS, MAX_POINTS, MAX_WORDS = 8, 300, 16, 2048
"""Of the default ranges of exported graphs."""

NEAR = 2e-3
"""Of the scale of the numbers, in single precision with other kernels."""


def unit_rows(count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    rows = rng.standard_normal((count, width)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def check_predictions(pipeline: RegionPipeline, model: RegionSpot) -> None:
    """Images of three shapes with 1 to 60 boxes and masks, serially and from three threads."""
    rng = np.random.default_rng(0)
    embeddings = unit_rows(5, pipeline.info.embed_dim, rng)
    words = Vocabulary(tuple("abcde"), embeddings)
    found, expected = RegionPredictor(pipeline), RegionPredictor(model)
    asked = []
    for (height, width), count in (((240, 320), 1), ((320, 200), 9), ((128, 128), 60)):
        low = rng.uniform(0, 90, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(12, 36, (count, 2))], axis=1)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        options: dict[str, Any] = {"boxes": boxes, "vocabulary": words, "top_k": 5}
        asked.append((image, options))
    wanted = [expected.predict(image, **options) for image, options in asked]
    with ThreadPoolExecutor(3) as pool:
        together = [pool.submit(found.predict, image, **options) for image, options in asked]
        answers = [found.predict(image, **options) for image, options in asked]
        answers += [one.result() for one in together]
    for answer, right in zip(answers, [*wanted, *wanted], strict=True):
        np.testing.assert_allclose(answer.scores, right.scores, atol=NEAR)
        assert answer.iou_predictions is not None and right.iou_predictions is not None
        np.testing.assert_allclose(answer.iou_predictions, right.iou_predictions, atol=NEAR)
        assert answer.masks is not None and len(answer.masks) == len(answer.scores)


def check_largest_sizes(pipeline: RegionPipeline, model: RegionSpot) -> None:
    """8 images with 300 regions of one point; 64 prompts of 16 points; 2048 words."""
    rng = np.random.default_rng(1)
    info, reference = pipeline.info, pipeline_from_model(model)
    side, clip_side = info.sam_image_size, info.clip_image_size
    images = rng.integers(0, 256, (MAX_IMAGES, side, side, 3), dtype=np.uint8)
    clip_images = rng.integers(0, 256, (MAX_IMAGES, clip_side, clip_side, 3), dtype=np.uint8)
    words = unit_rows(MAX_WORDS, info.embed_dim, rng)
    sizes = np.full((MAX_IMAGES, 2), side)

    def answers(one: RegionPipeline) -> list[np.ndarray]:
        encoded, maps = one.encode(images, sizes, clip_images)
        found = []
        for count, num_points in ((MAX_REGIONS, 2), (64, MAX_POINTS)):
            points = (
                np.random.default_rng(2)
                .uniform(0, side, (MAX_IMAGES, count, num_points, 2))
                .astype(np.float32)
            )
            labels = np.full(points.shape[:3], FOREGROUND, np.int32)
            tokens, _ = one.mask_tokens(encoded, points, labels)
            found.append(tokens)
        found.append(one.classify(found[0][:, :, 0], maps, None, words))
        return found

    for found, expected in zip(answers(pipeline), answers(reference), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=NEAR * np.abs(expected).max())

"""Resizes and frames equal Pillow's and segment_anything's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regionspot.errors import InputError
from regionspot.masks import decode_rle, encode_mask_logits, mask_to_box
from regionspot.modeling.torchvision_shim import import_safely
from regionspot.transforms import (
    ClipTransform,
    SamTransform,
    crop_boxes,
    flip_boxes,
    model_inputs,
    resize_image,
    scale_points,
)

import_safely()
from segment_anything.modeling import Sam  # noqa: E402
from segment_anything.utils.transforms import ResizeLongestSide  # noqa: E402

SIZES = [
    (480, 640),
    (640, 480),
    (333, 500),
    (1, 7),
    (1023, 511),
    (256, 256),
    (90, 300),
    (1500, 1001),
]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: smooth colours with noise, so that a wrong filter or an offset shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, height)[:, None] * np.linspace(0.2, 1, width)
    return np.clip(
        np.stack([ramp, 1 - ramp, ramp**2], -1) * 200 + rng.integers(0, 55, (height, width, 3)),
        0,
        255,
    ).astype(np.uint8)


def blobs(size: int) -> np.ndarray:
    """Logits of discs, some of which reach over the edge."""
    y, x = np.mgrid[:size, :size] / size
    centres = [(0.5, 0.5, 0.3), (0.1, 0.9, 0.25), (0.7, 0.2, 0.05)]
    return np.stack([20 * (r - np.hypot(x - cx, y - cy)) for cx, cy, r in centres]).astype(
        np.float32
    )


LOGITS: dict[str, Callable[[int], np.ndarray]] = {
    "noise": lambda size: np.random.default_rng(2).normal(size=(2, size, size)).astype(np.float32),
    "blobs": blobs,
    "outside": lambda size: -blobs(size),
}


def pillow_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def same(side: int) -> st.SearchStrategy[int]:
    """Any size of a target, and often that of the source."""
    return st.one_of(st.just(side), st.integers(1, 100))


# Up to its version 12 Pillow always resized the width first; of pictures that become much less high
# some bytes differ.
@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason="this Pillow resizes tall pictures in another order",
)
class TestResize:
    """Every byte is Pillow's: what RESIZE promises of caches and artefacts that Pillow's own
    numbers went into.
    """

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_any_sizes(self, data: st.DataObject) -> None:
        height, width = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100))
        to_height, to_width = data.draw(same(height)), data.draw(same(width))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        low = data.draw(st.sampled_from([0, 250]))
        image = rng.integers(low, 256, (height, width, 3), np.uint8)
        np.testing.assert_array_equal(
            resize_image(image, to_height, to_width), pillow_resize(image, to_height, to_width)
        )

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ((1, 1), (1024, 1024)),
            ((1, 5000), (1, 256)),
            ((1, 5000), (224, 224)),
            ((5000, 1), (224, 224)),
            ((3, 70_000), (2, 100)),  # too wide to be turned
            ((70_000, 3), (100, 2)),
            ((70_000, 3), (69_000, 1)),
            ((480, 640), (768, 1024)),
            ((480, 640), (480, 224)),
            ((480, 640), (224, 640)),
            ((480, 640), (480, 640)),
            ((1080, 1920), (576, 1024)),
            ((1080, 1920), (224, 224)),
            ((2400, 1080), (1024, 461)),  # of the height first, as the next
            ((2400, 1080), (224, 224)),
            ((1333, 2001), (1, 1)),
        ],
    )
    @pytest.mark.parametrize("threads", [1, 3])
    def test_pictures_and_slivers(
        self, source: tuple[int, int], target: tuple[int, int], threads: int
    ) -> None:
        image = photo(*source)
        np.testing.assert_array_equal(
            resize_image(image, *target, threads=threads), pillow_resize(image, *target)
        )

    @pytest.mark.parametrize("value", [0, 1, 254, 255])
    def test_one_colour_stays(self, value: int) -> None:
        image = np.full((37, 1234, 3), value, np.uint8)
        assert (resize_image(image, 224, 224) == value).all()

    @pytest.mark.parametrize(
        "view",
        [
            lambda image: image[::2],
            lambda image: image[::-1],
            lambda image: image[:, ::-1],
            lambda image: image[:, 5:-7],
            lambda image: image[:, ::300],
            lambda image: image[..., ::-1],
            lambda image: image.transpose(1, 0, 2),
            lambda image: np.asfortranarray(image),
            lambda image: image[:1, ::999],
        ],
    )
    def test_any_memory_order(self, view: Callable[[np.ndarray], np.ndarray]) -> None:
        image = view(photo(90, 300))
        image.flags.writeable = False
        expected = pillow_resize(np.array(image, order="C"), 31, 41)
        np.testing.assert_array_equal(resize_image(image, 31, 41), expected)

    def test_grey(self) -> None:
        grey = photo(90, 300)[..., 0]
        np.testing.assert_array_equal(resize_image(grey, 31, 41), pillow_resize(grey, 31, 41))

    @pytest.mark.parametrize(
        ("height", "width"), [(0, 5), (5, 0), (-1, 5), (5, 1.5), ("5", 5), (2**40, 2**40)]
    )
    def test_no_size(self, height: Any, width: Any) -> None:
        with pytest.raises(InputError):
            resize_image(photo(4, 4), height, width)

    @pytest.mark.parametrize(
        "image",
        [
            None,
            [[1]],
            np.zeros((4, 4, 3)),
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((0, 4), np.uint8),
        ],
    )
    def test_no_image(self, image: Any) -> None:
        with pytest.raises(InputError, match="an image must be"):
            resize_image(image, 4, 4)


class TestModelInputs:
    @pytest.mark.parametrize(("height", "width"), [*SIZES, (900, 200)])
    def test_are_those_of_the_two_transforms(self, height: int, width: int) -> None:
        image, sam, clip = photo(height, width), SamTransform(256), ClipTransform(128)
        frame, valid, square = model_inputs(image, sam, clip, threads=2)
        expected, expected_valid = sam.apply_image(image)
        np.testing.assert_array_equal(frame, expected)
        assert valid == expected_valid
        np.testing.assert_array_equal(square, clip.apply_image(image))


class TestSamTransform:
    @pytest.mark.parametrize("size", [256, 1024])
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_image_equals_segment_anything(self, height: int, width: int, size: int) -> None:
        image = photo(height, width)
        frame, (valid_height, valid_width) = SamTransform(size).apply_image(image)
        expected = ResizeLongestSide(size).apply_image(image)
        assert frame.shape == (size, size, 3)
        assert expected.shape == (valid_height, valid_width, 3)
        np.testing.assert_array_equal(frame[:valid_height, :valid_width], expected)
        assert not frame[valid_height:].any()
        assert not frame[:, valid_width:].any()

    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_points_equal_segment_anything(self, height: int, width: int) -> None:
        points = np.random.default_rng(1).uniform(0, 1, (5, 2, 2)) * [width, height]
        expected = ResizeLongestSide(1024).apply_coords(points, (height, width)).astype(np.float32)
        np.testing.assert_array_equal(
            SamTransform(1024).apply_points(points, height, width), expected
        )

    def test_no_points(self) -> None:
        assert SamTransform(1024).apply_points(np.zeros((0, 2, 2)), 3, 4).shape == (0, 2, 2)

    def test_a_sliver_keeps_one_pixel(self) -> None:
        frame, input_size = SamTransform(256).apply_image(photo(1, 5000))
        assert input_size == (1, 256)
        assert frame[0].any()


class TestEncodeMasks:
    def test_none(self) -> None:
        masks = SamTransform(256).encode_masks(np.zeros((0, 64, 64), np.float32), 30, 40)
        assert (masks.rles, masks.areas.shape, masks.boxes.shape) == ((), (0,), (0, 4))

    @pytest.mark.parametrize(("height", "width"), SIZES)
    @pytest.mark.parametrize("kind", ["noise", "blobs", "outside"])
    def test_equals_segment_anything(self, height: int, width: int, kind: str) -> None:
        """To the last bit where PyTorch's kernels fuse products and sums; elsewhere but for pixels
        near zero.
        """
        size, low_res = 256, 64
        transform = SamTransform(size)
        logits = LOGITS[kind](low_res)
        sam = Sam.__new__(Sam)  # its postprocessing alone: it reads one attribute of the encoder
        torch.nn.Module.__init__(sam)
        sam.image_encoder = torch.nn.Module()
        sam.image_encoder.img_size = size
        upscaled = sam.postprocess_masks(
            torch.from_numpy(logits)[:, None], transform.input_size(height, width), (height, width)
        )[:, 0].numpy()
        expected = upscaled > 0
        masks = transform.encode_masks(logits, height, width)
        found = np.stack([decode_rle(rle) for rle in masks.rles])
        fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
        certain = np.ones_like(expected) if fused else np.abs(upscaled) > 1e-5
        assert certain.mean() > 0.999
        np.testing.assert_array_equal(found[certain], expected[certain])
        np.testing.assert_array_equal(masks.areas, found.sum((1, 2)))
        np.testing.assert_array_equal(masks.boxes, [mask_to_box(mask) for mask in found])

    def test_any_number_of_threads_gives_the_same(self) -> None:
        logits = LOGITS["noise"](64)
        one, many = (
            encode_mask_logits(logits, 256, (144, 256), (270, 480), threads) for threads in (1, 5)
        )
        assert one.rles == many.rles

    @pytest.mark.parametrize(
        ("logits", "valid", "picture"),
        [
            (np.zeros((64, 64), np.float32), (64, 64), (9, 9)),
            (np.zeros((1, 64, 64)), (64, 64), (9, 9)),
            (np.zeros((1, 64, 0), np.float32), (64, 64), (9, 9)),
            (np.zeros((1, 64, 64), np.float32), (64, 257), (9, 9)),
            (np.zeros((1, 64, 64), np.float32), (0, 64), (9, 9)),
            (np.zeros((1, 64, 64), np.float32), (64, 64), (9, 0)),
        ],
    )
    def test_what_is_no_mask(
        self, logits: np.ndarray, valid: tuple[int, int], picture: tuple[int, int]
    ) -> None:
        with pytest.raises(InputError):
            encode_mask_logits(logits, 256, valid, picture)


class TestMaskPrompts:
    def test_none(self) -> None:
        assert SamTransform(256).apply_masks(np.zeros((0, 30, 40), bool), (64, 64)).shape == (
            0,
            1,
            64,
            64,
        )

    @pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 100), (64, 64), (300, 299)])
    def test_survives_the_way_back(self, height: int, width: int) -> None:
        mask = np.zeros((height, width), bool)
        mask[height // 4 : height // 2, width // 3 : -width // 8] = True
        transform = SamTransform(256)
        logits = transform.apply_masks(mask[None], (64, 64))
        assert logits.dtype == np.float32
        assert np.abs(logits).max() == pytest.approx(np.log(999), rel=1e-4)
        back = decode_rle(transform.encode_masks(logits[:, 0], height, width).rles[0])
        assert (back & mask).sum() / (back | mask).sum() > 0.93

    def test_padding_is_background(self) -> None:
        logits = SamTransform(256).apply_masks(np.ones((1, 50, 100), bool), (64, 64))[0, 0]
        assert (logits[:32] > 0).all()
        assert (logits[32:] < 0).all()


class TestOtherFrames:
    def test_clip_does_not_keep_the_aspect_ratio(self) -> None:
        image = photo(90, 300)
        expected = np.array(Image.fromarray(image).resize((128, 128), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(ClipTransform(128).apply_image(image), expected)
        np.testing.assert_array_equal(resize_image(image, 128, 128), expected)

    def test_scale_points(self) -> None:
        assert scale_points(np.zeros((0, 2)), (3, 4), (6, 8)).shape == (0, 2)
        np.testing.assert_allclose(scale_points([[10, 20]], (100, 200), (50, 400)), [[20, 10]])

    def test_crop_boxes(self) -> None:
        image = photo(40, 60)
        assert crop_boxes(image, np.zeros((0, 4))) == []
        plain, scaled, clipped, tiny, border = crop_boxes(
            image,
            [
                [10.0, 20, 30, 30],
                [0.0, 0, 0, 0],
                [50.0, 30, 90, 90],
                [5.2, 5.2, 5.4, 5.4],
                [60.0, 40, 60, 40],
            ],
        )
        np.testing.assert_array_equal(plain, image[20:30, 10:30])
        np.testing.assert_array_equal(clipped, image[30:, 50:])
        assert scaled.shape == tiny.shape == border.shape == (1, 1, 3)
        (larger,) = crop_boxes(image, [[10, 20, 30, 30]], scale=1.3)
        np.testing.assert_array_equal(larger, image[18:32, 7:33])

    @pytest.mark.parametrize(
        "boxes", [[[1, 2, 3]], [1, 2, 3, 4], [["1", "2", "3", "4"]], [[1, 2, 3, np.nan]], None]
    )
    def test_what_is_no_box(self, boxes: Any) -> None:
        for use in (lambda: crop_boxes(photo(4, 4), boxes), lambda: flip_boxes(boxes, 4)):
            with pytest.raises(InputError, match="boxes must be"):
                use()

    @pytest.mark.parametrize("points", [[[1, 2, 3]], 5, [["1", "2"]], None, [[1j, 2]]])
    def test_what_is_no_point(self, points: Any) -> None:
        with pytest.raises(InputError, match="points must be"):
            scale_points(points, (3, 4), (6, 8))

    @pytest.mark.parametrize("transform", [SamTransform, ClipTransform])
    def test_what_is_no_size(self, transform: Any) -> None:
        for size in (0, 1.5, "256", None):
            with pytest.raises(InputError, match="image_size must be a whole number"):
                transform(size)

    def test_flip_boxes(self) -> None:
        assert flip_boxes([], 60).shape == (0, 4)
        boxes = np.array([[1, 2, 10, 20]], np.float32)
        np.testing.assert_array_equal(flip_boxes(boxes, 60), [[50, 2, 59, 20]])
        np.testing.assert_array_equal(flip_boxes(flip_boxes(boxes, 60), 60), boxes)

"""What must hold of an overlay that no eye has seen: places, sizes, colours. Its beauty was judged by looking."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import ImageDraw

from regionspot import visualize
from regionspot.errors import InputError
from regionspot.masks import decode_rle, encode_rle
from regionspot.structures import RegionPredictions, Rle
from regionspot.visualize import PALETTE, _chip, _class_colours, _place_chips, _style, draw_predictions

NAMES = ("cat", "dog", "a very long class name that nobody would write but somebody will in the end")


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def predictions(
    height: int,
    width: int,
    boxes: Sequence[Sequence[float]],
    class_ids: list[int] | None = None,
    masks: bool = True,
    names: tuple[str, ...] = NAMES,
) -> RegionPredictions:
    ids = np.array(class_ids if class_ids is not None else [0] * len(boxes), int)
    scores = np.full(len(boxes), 0.5, np.float32)
    rles = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros((height, width), bool)
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
        rles.append(encode_rle(mask))
    return RegionPredictions(
        height,
        width,
        np.array(boxes, np.float32).reshape(-1, 4),
        names,
        scores,
        ids,
        ids[:, None],
        scores[:, None],
        tuple(rles) if masks else None,
    )


class TestSize:
    @pytest.mark.parametrize("masks", [True, False])
    def test_no_region(self, masks: bool) -> None:
        image = grey(800, 600)
        np.testing.assert_array_equal(draw_predictions(image, predictions(800, 600, [], masks=masks)), image)

    @pytest.mark.parametrize(
        ("height", "width", "min_long_side", "expected"),
        [
            (256, 256, 768, (768, 768)),
            (128, 256, 768, (384, 768)),
            (256, 256, 0, (256, 256)),
            (900, 700, 768, (900, 700)),
            (1, 1, 768, (768, 768)),
            (8, 3000, 768, (8, 3000)),
        ],
    )
    def test_small_pictures_are_enlarged(
        self, height: int, width: int, min_long_side: int, expected: tuple[int, int]
    ) -> None:
        image = grey(height, width)
        drawn = draw_predictions(
            image, predictions(height, width, [[0, 0, width, height]]), min_long_side=min_long_side
        )
        assert drawn.shape == (*expected, 3)
        assert drawn.dtype == np.uint8
        assert (image == 128).all()  # the picture itself is not drawn on

    def test_refuses_the_predictions_of_another_image(self) -> None:
        with pytest.raises(InputError, match=r"image is 9 x 8 pixels but the predictions are of one of 8 x 9"):
            draw_predictions(grey(8, 9), predictions(9, 8, []))


class TestDrawing:
    def test_inside_is_tinted_and_outside_is_not(self) -> None:
        shown = predictions(800, 800, [[300, 300, 500, 500]], [1])
        drawn = draw_predictions(grey(800, 800), shown).astype(int)
        colour = np.array(_class_colours(shown)[0])
        np.testing.assert_allclose(drawn[400, 400], 0.7 * 128 + 0.3 * colour, atol=2)
        assert (drawn[600:, :] == 128).all()
        assert (drawn[:, :200] == 128).all()
        assert (np.abs(drawn - colour).max(-1) < 3).sum() > 4 * 200  # contour and box
        without = draw_predictions(grey(800, 800), shown, masks=False)
        assert (without[400, 400] == 128).all()

    def test_enlarged_box_stays_in_place(self) -> None:
        drawn = draw_predictions(grey(96, 96), predictions(96, 96, [[24, 24, 72, 72]], masks=False)).astype(int)
        changed = (drawn != 128).any(-1)
        rows, columns = np.flatnonzero(changed[:, 384]), np.flatnonzero(changed[384])
        assert abs(rows[-1] - 72 * 8) <= 2
        assert abs(columns[0] - 24 * 8) <= 2
        assert abs(columns[-1] - 72 * 8) <= 2

    @pytest.mark.parametrize(
        "box", [[0, 0, 900, 800], [-0.0, 0, 1, 1], [899, 799, 900, 800], [450, 400, 450, 400], [10, 10, 10, 300]]
    )
    @pytest.mark.parametrize("masks", [True, False])
    def test_odd_boxes(self, box: list[float], masks: bool) -> None:
        drawn = draw_predictions(grey(800, 900), predictions(800, 900, [box], [2], masks=masks))
        assert (drawn != 128).any()

    def test_a_dot_without_a_recent_pillow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(ImageDraw.ImageDraw, "circle", raising=False)  # new in Pillow 10.4
        drawn = draw_predictions(grey(800, 800), predictions(800, 800, [[400, 400, 400, 400]], masks=False))
        assert (drawn[397:404, 397:404] != 128).any(-1).all()

    def test_one_mask_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded: list[weakref.ref[np.ndarray]] = []

        def counted(rle: Rle) -> np.ndarray:
            assert all(mask() is None for mask in decoded)
            mask = decode_rle(rle)
            decoded.append(weakref.ref(mask))
            return mask

        monkeypatch.setattr(visualize, "decode_rle", counted)
        boxes = [[10, 10, 300, 300], [50, 60, 200, 90], [700, 700, 800, 800]]
        draw_predictions(grey(800, 800), predictions(800, 800, boxes))
        assert len(decoded) == 6

    def test_forty_regions(self) -> None:
        rng = np.random.default_rng(0)
        corners = rng.uniform(0, 500, (40, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(20, 200, (40, 2))], axis=1)
        drawn = draw_predictions(grey(700, 700), predictions(700, 700, boxes.tolist(), [i % 3 for i in range(40)]))
        assert drawn.shape == (768, 768, 3)


class TestColours:
    def test_a_class_keeps_its_colour(self) -> None:
        boxes = [[0, 0, 5, 5], [5, 5, 9, 9]]
        first = _class_colours(predictions(10, 10, boxes, [0, 1]))
        second = _class_colours(predictions(10, 10, boxes, [1, 0]))
        other_words = _class_colours(predictions(10, 10, boxes, [2, 1], names=("x", "dog", "cat")))
        assert first == second[::-1] == other_words

    def test_classes_of_one_picture_differ_while_colours_last(self) -> None:
        count = len(PALETTE)
        names = tuple(f"class {index}" for index in range(count + 5))
        boxes = [[0, 0, 5, 5]] * len(names)
        few = _class_colours(predictions(10, 10, boxes[:count], list(range(count)), names=names))
        assert len(set(few)) == count
        many = _class_colours(predictions(10, 10, boxes, list(range(len(names))), names=names))
        assert len(set(many)) == count


class TestLabels:
    def test_long_names_are_shortened(self) -> None:
        style = _style(768, 768, 1)
        assert _chip(NAMES[2], "0.50", PALETTE[0], style, 300).width <= 300
        assert _chip("", "0.50", PALETTE[0], style, 300).width < 100
        assert _chip("cat", "0.50", PALETTE[0], style, 1).height > style.font_size  # never none at all

    def test_no_chip(self) -> None:
        assert _place_chips(np.zeros((0, 4), int), [], (100, 100)) == []

    @pytest.mark.parametrize("copies", [1, 12])
    def test_chips_stay_inside_and_apart(self, copies: int) -> None:
        grid = [[x, y, x + 110, y + 110] for x in range(0, 800, 160) for y in range(0, 800, 160)]
        boxes = np.array(grid if copies == 1 else [[400, 400, 500, 500]] * copies)
        size = (150, 24)
        places = np.array(_place_chips(boxes, [size] * len(boxes), (800, 800)))
        assert (places >= 0).all()
        assert (places + size <= 800).all()
        for index, place in enumerate(places):
            apart = (np.abs(places - place) >= size).any(1)
            apart[index] = True
            assert apart.all()

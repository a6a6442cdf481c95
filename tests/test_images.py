"""Every kind of picture becomes upright RGB or a clear error."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFile

from regionspot.errors import InputError
from regionspot.images import IMAGE_FORMATS, read_image, read_mask


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


class TestReadImage:
    """Each source against the pixels that it stands for."""

    def test_array_and_pillow_and_path_and_bytes(self, tmp_path: Path) -> None:
        image = photo(6, 9)
        Image.fromarray(image).save(tmp_path / "a.png")
        for source in (
            image,
            Image.fromarray(image),
            tmp_path / "a.png",
            (tmp_path / "a.png").read_bytes(),
        ):
            np.testing.assert_array_equal(read_image(source), image)
        np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), image)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
    def test_exif_orientation(self, orientation: int, file_format: str) -> None:
        upright = photo(6, 9)
        # how the camera stored it: the inverse of what the tag asks the reader to do (EXIF 2.32,
        # table 6)
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: np.rot90(upright.transpose(1, 0, 2), 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if file_format == "WEBP" else {}
        file = encoded(
            Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, **options
        )
        np.testing.assert_array_equal(read_image(file), upright)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    def test_exif_rubbish_is_ignored(self, file_format: str) -> None:
        image = Image.fromarray(photo(6, 9))
        exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12 rubbish"
        plain = encoded(image, file_format, quality=100)
        np.testing.assert_array_equal(
            read_image(encoded(image, file_format, quality=100, exif=exif)),
            np.asarray(Image.open(io.BytesIO(plain))),
        )

    @pytest.mark.filterwarnings("error")
    def test_tiff_tags_that_cannot_be_read_are_ignored(self) -> None:
        image = photo(6, 9)
        file = bytearray(
            encoded(Image.fromarray(image), "TIFF", tiffinfo={270: "a description", 315: "x" * 300})
        )
        at = file.index(struct.pack("<HHI", 315, 2, 301))
        file[at + 4 : at + 8] = struct.pack("<I", 10**6)  # more than the file holds
        np.testing.assert_array_equal(read_image(bytes(file)), image)

    def test_warnings_of_other_code_come_through_while_a_picture_is_read(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def told(image: Any) -> Image.Image:
            warnings.warn("of other code", stacklevel=1)
            return Image.new("RGB", (2, 1))

        monkeypatch.setattr("regionspot.images._upright", told)
        filters = list(warnings.filters)
        with pytest.warns(UserWarning, match="of other code"):
            read_image(encoded(Image.new("RGB", (2, 1)), "PNG"))
        assert warnings.filters == filters

    def test_many_threads_read(self) -> None:
        files = [encoded(Image.fromarray(photo(30, 40, seed)), "TIFF") for seed in range(4)]
        filters = list(warnings.filters)
        failures: list[int] = []

        def read(index: int) -> None:
            right = [
                np.array_equal(read_image(files[index]), photo(30, 40, index)) for _ in range(50)
            ]
            failures.extend(number for number, each in enumerate(right) if not each)

        threads = [threading.Thread(target=read, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and warnings.filters == filters

    def test_bytes_of_any_kind_and_file_objects(self, tmp_path: Path) -> None:
        image = photo(6, 9)
        content = encoded(Image.fromarray(image), "PNG")
        (tmp_path / "a").write_bytes(content)
        file = io.BytesIO(content)
        file.seek(5)  # somebody looked at it
        with open(tmp_path / "a", "rb") as opened:
            for source in (
                bytearray(content),
                memoryview(content),
                np.bytes_(content + b"."),
                file,
                opened,
            ):
                np.testing.assert_array_equal(read_image(source), image)

    def test_a_pipe(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        content = encoded(Image.fromarray(photo(6, 9)), "JPEG")
        # which is read several times
        writer = threading.Thread(target=pipe.write_bytes, args=(content[:-2],))
        writer.start()
        np.testing.assert_array_equal(read_image(pipe), read_image(content))
        writer.join()

    @pytest.mark.parametrize("source", [np.ma.array(photo(6, 9)), photo(6, 9).view(np.recarray)])
    def test_arrays_of_other_types(self, source: Any) -> None:
        found = read_image(source)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, photo(6, 9))

    def test_grey(self) -> None:
        grey = photo(6, 9)[..., 0]
        np.testing.assert_array_equal(
            read_image(encoded(Image.fromarray(grey), "PNG")), np.dstack([grey] * 3)
        )

    def test_one_bit(self) -> None:
        bits = photo(6, 9)[..., 0] > 100
        image = read_image(encoded(Image.fromarray(bits), "PNG"))
        np.testing.assert_array_equal(image, np.dstack([bits * np.uint8(255)] * 3))

    @pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
    def test_sixteen_bits(self, file_format: str) -> None:
        samples = np.array([[0, 257, 128 * 257, 65535, 32768, 60000]], np.uint16)
        image = read_image(encoded(Image.fromarray(samples), file_format))
        np.testing.assert_array_equal(image[0, :, 0], [0, 1, 128, 255, 128, 233])

    def test_big_endian_sixteen_bits(self) -> None:
        file = encoded(Image.frombytes("I;16B", (2, 1), b"\xff\xff\x80\x80"), "TIFF")
        np.testing.assert_array_equal(read_image(file)[0, :, 0], [255, 128])

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_alpha_over_white(self, mode: str) -> None:
        colours = 3 if mode == "RGBA" else 1
        image = Image.new(mode, (3, 1))
        for column, (value, alpha) in enumerate([(200, 255), (0, 0), (0, 128)]):
            image.putpixel((column, 0), (value,) * colours + (alpha,))
        np.testing.assert_array_equal(
            read_image(encoded(image, "PNG"))[0], [[200] * 3, [255] * 3, [127] * 3]
        )

    @pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA"])
    def test_mask(self, mode: str) -> None:
        image = Image.new("RGBA", (4, 1))
        for column, (value, alpha) in enumerate([(255, 255), (0, 255), (255, 0), (0, 0)]):
            image.putpixel((column, 0), (value,) * 3 + (alpha,))
        expected = [True, False, mode != "RGBA", False]  # the transparent white one is outside
        np.testing.assert_array_equal(read_mask(encoded(image.convert(mode), "PNG")), [expected])

    @pytest.mark.parametrize("colour", ["red", "lime", "blue", "white", (0, 128, 0)])
    def test_a_mask_in_any_colour(self, colour: Any) -> None:
        image = Image.new("RGB", (3, 1))
        image.putpixel((1, 0), ImageColor.getrgb(colour) if isinstance(colour, str) else colour)
        np.testing.assert_array_equal(read_mask(encoded(image, "PNG")), [[False, True, False]])

    @pytest.mark.parametrize(
        ("pixel", "brightest"),
        [
            ((0, 0, 0, 255), 0),
            ((1, 1, 1, 255), 1),
            ((100, 100, 100, 255), 100),
            ((0, 9, 0, 255), 9),
        ],
    )
    def test_a_dark_mask(self, pixel: tuple[int, ...], brightest: int, tmp_path: Path) -> None:
        image = Image.new("RGBA", (4, 4))  # transparent
        image.putpixel((1, 2), pixel)
        image.save(tmp_path / "mask.png")
        with pytest.raises(
            InputError,
            match=rf"/mask.png' is empty: its brightest value is {brightest}, and white \(255",
        ):
            read_mask(tmp_path / "mask.png")
        with pytest.raises(InputError, match="the mask is empty"):
            read_mask((tmp_path / "mask.png").read_bytes())

    def test_palette(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putdata([0, 1])
        np.testing.assert_array_equal(
            read_image(encoded(image, "PNG"))[0], [[10, 20, 30], [200, 100, 50]]
        )
        transparent = read_image(encoded(image, "PNG", transparency=1))
        np.testing.assert_array_equal(transparent[0], [[10, 20, 30], [255, 255, 255]])

    def test_cmyk(self) -> None:
        image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        red = read_image(encoded(image, "JPEG", quality=100))
        assert np.abs(red.astype(int) - [255, 0, 0]).max() < 6

    def test_animation_gives_its_first_frame(self) -> None:
        frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
        file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(read_image(file), np.full((3, 4, 3), [255, 0, 0]))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and brings hardly any."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


class TestReadImageRefuses:
    @pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (13_400, 13_300)])
    def test_too_many_pixels_before_decoding(
        self, width: int, height: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
        with pytest.raises(InputError, match=r"too large.*scale it down"):
            read_image(png_header(width, height))

    @pytest.mark.parametrize("background", ["no colour", None, 7])
    def test_a_background_that_is_no_colour(self, background: Any) -> None:
        with pytest.raises(InputError, match="background must be a colour's name"):
            read_image(photo(2, 2), background=background)

    def test_a_limit_of_ones_own(self) -> None:
        assert read_image(encoded(Image.new("RGB", (10, 10)), "PNG"), max_pixels=100).shape == (
            10,
            10,
            3,
        )
        with pytest.raises(InputError, match="too large: 10 x 10 pixels, at most 99"):
            read_image(encoded(Image.new("RGB", (10, 10)), "PNG"), max_pixels=99)

    @pytest.mark.parametrize("file_format", IMAGE_FORMATS)
    def test_no_warning_of_what_is_accepted(
        self, file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Image.init()
        if file_format not in Image.SAVE:
            pytest.skip("not in this Pillow")
        (tmp_path / "a").write_bytes(encoded(Image.new("RGB", (10, 6)), file_format))
        # Pillow warns from here on, and refuses twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        filters = list(warnings.filters)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(tmp_path / "a").shape == (6, 10, 3)
        assert (Image.MAX_IMAGE_PIXELS, warnings.filters) == (50, filters)

    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    @pytest.mark.parametrize("restarts", [0, 1, 3])
    def test_a_jpeg_without_its_end_marker(
        self, progressive: bool, mode: str, restarts: int
    ) -> None:
        image = Image.fromarray(photo(57, 90)).convert(mode)
        for quality in (8, 90):
            options: dict[str, Any] = {
                "progressive": progressive,
                "quality": quality,
                "restart_marker_blocks": restarts,
            }
            content = encoded(image, "JPEG", **options)
            whole = read_image(content)
            for cut in (1, 2):
                np.testing.assert_array_equal(read_image(content[:-cut]), whole)
            for cut in (*range(3, 14), 40, 200):
                with suppress(InputError):  # but where nothing was cut that pixels depend on
                    np.testing.assert_array_equal(read_image(content[:-cut]), whole)
            with pytest.raises(InputError, match=r"[Tt]runcated"):
                read_image(content[: len(content) // 2])

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
    def test_truncated(self, file_format: str, tmp_path: Path) -> None:
        file = encoded(Image.fromarray(photo(300, 300)), file_format)
        (tmp_path / "cut.img").write_bytes(file[: len(file) // 2])
        with pytest.raises(InputError, match=rf"image '{tmp_path}/cut.img'"):
            read_image(tmp_path / "cut.img")

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (
                lambda folder: folder / "none.jpg",
                "image '/.*/none.jpg' does not exist: no such file",
            ),
            (
                lambda folder: "https://example.com/a.jpg?x=1",
                "image 'https://example.com/a.jpg.x=1' is a URL: URLs are",
            ),
            (lambda folder: Path("s3://bucket/a.jpg"), "is a URL: URLs are not fetched; download"),
            (
                lambda folder: f"data:image/png;base64,{'A' * 9999}",
                "AAA' cannot be opened .File name too long",
            ),
            (lambda folder: "C:/a.jpg", "does not exist"),
            (lambda folder: "caf\udce9.jpg", r"image 'caf\\udce9.jpg' does not exist"),
            (
                lambda folder: io.StringIO("text"),
                "a file of str, not of bytes: open it with mode 'rb'",
            ),
            (lambda folder: closed_file(), "cannot be read .I/O operation on closed file"),
            (lambda folder: bytearray(b"hello world"), "not a picture"),
            (lambda folder: b"/tmp/a.png", "not a picture"),
            (lambda folder: torch.zeros(4, 4, 3, dtype=torch.uint8), "not a Tensor"),
            (lambda folder: None, "not a NoneType"),
            (lambda folder: np.ma.array(photo(2, 2), mask=True), "masked elements"),
            (lambda folder: np.zeros((4, 4, 3), object), r"got \(4, 4, 3\) object"),
            (lambda folder: folder, "cannot be opened"),
            (lambda folder: b"", "not a picture"),
            (lambda folder: b"P", "not a picture"),
            (lambda folder: [[1]], "an image is a path, a file's bytes, .* not a list"),
            (lambda folder: "a\0.png", "cannot be opened"),
            (lambda folder: b"hello world", "not a picture that can be read: give one of JPEG"),
            (
                lambda folder: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
                "not a picture",
            ),
            (lambda folder: encoded(Image.new("F", (3, 3)), "TIFF"), "unknown range"),
            (
                lambda folder: encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"),
                "unknown range",
            ),
            (
                lambda folder: np.zeros((4, 4), np.uint8),
                r"\(H, W, 3\) uint8 RGB, got \(4, 4\) uint8",
            ),
            (lambda folder: np.zeros((4, 4, 3)), r"got \(4, 4, 3\) float64"),
            (lambda folder: np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\) uint8"),
            (lambda folder: Image.new("RGB", (0, 4)), "has no pixels: 0 x 4"),
        ],
    )
    def test_others(self, source: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            read_image(source(tmp_path))


def test_a_mask_of_class_indices_with_a_white_border_is_refused(tmp_path: Path) -> None:
    """As VOC's: 0 outside, 1 on the object, 255 around it. Antialiased masks, with some grey, are
    read.
    """
    indices = np.zeros((20, 30), np.uint8)
    indices[4:16, 4:26], indices[6:14, 6:24] = 255, 1
    Image.fromarray(indices).save(tmp_path / "voc.png")
    with pytest.raises(
        InputError, match=r"more of mask .*voc.png.* is grey than white \(144 and 120 pixels\)"
    ):
        read_mask(tmp_path / "voc.png")
    soft = np.zeros((20, 30), np.uint8)
    soft[4:16, 4:26], soft[3, 4:26] = 255, 90
    Image.fromarray(soft).save(tmp_path / "soft.png")
    assert read_mask(tmp_path / "soft.png").sum() == 12 * 22

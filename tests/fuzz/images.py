"""Pictures, whole and damaged, through `read_image` and `read_mask`."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from regionspot.errors import RegionSpotError
from regionspot.images import MAX_PIXELS, read_image, read_mask
from regionspot.structures import UInt8Array
from tests.fuzz.target import attempt, check, fail, write
from tests.fuzz.trees import Note, mutate_bytes

HEAD_BYTES = 200
SIZE = (48, 40)  # width and height: not the same, so that a transposed picture is noticed
READ_EXIF = tuple(range(1, 9))


@dataclass(frozen=True)
class Sample:
    """An undamaged file.

    Args:
        pixels: what it must be read as where that is known without a reader: the pixels that were
            saved losslessly.
        known: whether its format is one that is opened.
    """

    name: str
    content: bytes
    pixels: UInt8Array | None = None
    known: bool = True


class Images:
    """The target."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._samples = _samples()

    def run(self, rng: random.Random, note: Note) -> bool:
        cases: tuple[Callable[[random.Random, Note], bool], ...] = (
            *[self._damaged] * 10,
            *[self._png_chunks] * 3,
            *[self._truncated] * 3,
            *[self._whole] * 2,
            *[self._exif] * 2,
            self._with_appendix,
            self._spliced,
            self._array,
            self._pillow_image,
        )
        return rng.choice(cases)(rng, note)

    def _whole(self, rng: random.Random, note: Note) -> bool:
        sample = self._sample(rng, note, known=rng.random() < 0.8)
        pixels = self._read(sample.content, rng, note, limits=(MAX_PIXELS, SIZE[0] * SIZE[1]))
        if not sample.known:
            check(pixels is None, "a format that is not opened was read")
            return False
        if pixels is None:
            fail("an undamaged picture is refused")
        check(
            sample.pixels is None or np.array_equal(pixels, sample.pixels),
            "other pixels than were saved",
        )
        return True

    def _damaged(self, rng: random.Random, note: Note) -> bool:
        sample = self._sample(rng, note)
        return self._read(mutate_bytes(sample.content, rng, HEAD_BYTES), rng, note) is not None

    def _truncated(self, rng: random.Random, note: Note) -> bool:
        """A picture that lacks its end is refused, unless the pixels are all there."""
        sample = self._sample(rng, note)
        keep = rng.choice(
            (rng.randrange(len(sample.content)), len(sample.content) - rng.randrange(1, 40))
        )
        note(f"the first {keep} of {len(sample.content)} bytes")
        pixels = self._read(sample.content[: max(keep, 0)], rng, note)
        check(
            pixels is None or np.array_equal(pixels, read_image(sample.content)),
            "half a picture was accepted",
        )
        return pixels is not None

    def _with_appendix(self, rng: random.Random, note: Note) -> bool:
        """What stands behind a picture, as cameras and phones leave it, changes nothing."""
        sample = self._sample(rng, note)
        appendix = rng.choice((b"\0" * 8, rng.randbytes(200), self._sample(rng, note).content))
        pixels = self._read(sample.content + appendix, rng, note)
        check(
            pixels is None or np.array_equal(pixels, read_image(sample.content)),
            "an appendix changes the pixels",
        )
        return pixels is not None

    def _spliced(self, rng: random.Random, note: Note) -> bool:
        first, second = self._sample(rng, note), self._sample(rng, note)
        cut = rng.randrange(min(len(first.content), len(second.content)))
        return self._read(first.content[:cut] + second.content[cut:], rng, note) is not None

    def _png_chunks(self, rng: random.Random, note: Note) -> bool:
        """Chunks changed, dropped, repeated and exchanged, with the right checksums, so that they
        are looked into.
        """
        sample = rng.choice([sample for sample in self._samples if sample.name.startswith("PNG")])
        note(sample.name)
        chunks = _png_chunks(sample.content)
        for _ in range(rng.choice((1, 1, 2))):
            index = rng.randrange(len(chunks))
            kind, data = chunks[index]
            change = rng.choice(
                ("change", "change", "inflate", "drop", "repeat", "exchange", "add")
            )
            note(f"{change} {kind!r}")
            if change == "change":
                chunks[index] = (kind, mutate_bytes(data, rng))
            elif change == "inflate" and kind == b"IDAT":
                chunks[index] = (kind, _deflated_anew(data, rng))
            elif change == "drop" and len(chunks) > 1:
                del chunks[index]
            elif change == "repeat":
                chunks.insert(index, chunks[index])
            elif change == "exchange":
                other = rng.randrange(len(chunks))
                chunks[index], chunks[other] = chunks[other], chunks[index]
            elif change == "add":
                chunks.insert(index, _png_extra(rng))
        return self._read(_png_file(chunks), rng, note) is not None

    def _exif(self, rng: random.Random, note: Note) -> bool:
        """Whatever EXIF says, the picture is itself or one of its seven mirrored and turned
        forms.
        """
        source = Image.fromarray(_scene(3)).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = rng.choice((*READ_EXIF, 0, 9, 255, 65535))
        data = exif.tobytes()
        if rng.random() < 0.7:
            data = data[:6] + mutate_bytes(data[6:], rng)
        file_format = rng.choice(("JPEG", "PNG", "WEBP"))
        note(f"{file_format} with EXIF {data.hex()}")
        options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
        content = _saved(source, file_format, exif=data, **options)
        pixels = self._read(content, rng, note)
        if pixels is None:
            return False
        plain = read_image(_saved(source, file_format, **options))
        turned = [
            np.rot90(mirrored, turns) for mirrored in (plain, plain[:, ::-1]) for turns in range(4)
        ]
        check(any(np.array_equal(pixels, form) for form in turned), "EXIF changes the pixels")
        return True

    def _array(self, rng: random.Random, note: Note) -> bool:
        dtype = rng.choice(
            (
                "uint8",
                "uint8",
                "uint8",
                "bool",
                "int8",
                "float32",
                "uint16",
                "int64",
                "O",
                "S1",
                ">u2",
            )
        )
        shape = rng.choice(
            (
                (8, 9, 3),
                (8, 9, 3),
                (8, 9),
                (8, 9, 4),
                (8, 9, 1),
                (0, 9, 3),
                (3, 8, 9),
                (1, 8, 9, 3),
                (),
            )
        )
        array = (
            np.zeros(shape, dtype)
            if dtype in ("O", "S1")
            else (np.arange(1, 1 + np.prod(shape)) % 251).astype(dtype).reshape(shape)
        )
        if array.ndim and rng.random() < 0.5:
            array = rng.choice(
                (array[::-1], array[..., ::-1], np.asfortranarray(array), array.swapaxes(0, -1))
            )
        if rng.random() < 0.2:
            array.flags.writeable = False
        if rng.random() < 0.1 and array.dtype != object:
            array = np.ma.masked_array(array, array == 0)
        note(
            f"an array {array.shape} {array.dtype}, strides {array.strides}, {type(array).__name__}"
        )
        pixels = attempt(lambda: read_image(array))
        if isinstance(pixels, RegionSpotError):
            return False
        _check_pixels(pixels)
        check(np.array_equal(pixels, np.asarray(array)), "an array's pixels change")
        return True

    def _pillow_image(self, rng: random.Random, note: Note) -> bool:
        modes = (
            "1",
            "L",
            "LA",
            "La",
            "P",
            "PA",
            "RGB",
            "RGBA",
            "RGBa",
            "RGBX",
            "CMYK",
            "YCbCr",
            "LAB",
            "HSV",
            "I",
            "F",
        )
        mode = rng.choice((*modes, "I;16", "I;16B", "I;16L"))
        size = rng.choice((SIZE, (1, 1), (1, 300), (0, 5), (5, 0)))
        image = Image.new(mode, size, rng.choice((0, 1)))
        note(f"a Pillow image of mode {mode} and size {size}")
        pixels = attempt(lambda: read_image(image))
        if isinstance(pixels, RegionSpotError):
            return False
        _check_pixels(pixels)
        check(pixels.shape[:2] == size[::-1], f"{pixels.shape} instead of {size}")
        return True

    def _sample(self, rng: random.Random, note: Note, known: bool = True) -> Sample:
        sample = rng.choice([sample for sample in self._samples if sample.known == known])
        note(sample.name)
        return sample

    def _read(
        self,
        content: bytes,
        rng: random.Random,
        note: Note,
        limits: tuple[int, ...] = (MAX_PIXELS, MAX_PIXELS, 1000),
    ) -> UInt8Array | None:
        """The pixels, or None where the file is refused; from its path and from its bytes it must
        be the same.
        """
        limit = rng.choice(limits)
        note(f"at most {limit} pixels")
        path = write(self._directory, rng.choice(("picture", "picture.jpg", "bild é.png")), content)
        with warnings.catch_warnings(record=True) as noise:
            warnings.simplefilter("always")
            from_path = attempt(lambda: read_image(rng.choice((path, str(path))), limit))
            from_bytes = attempt(lambda: read_image(content, limit))
            mask = (
                attempt(lambda: read_mask(path))
                if limit == MAX_PIXELS and rng.random() < 0.3
                else None
            )
        check(not noise, f"a warning comes through: {noise[0].message if noise else ''}")
        if isinstance(from_path, RegionSpotError) or isinstance(from_bytes, RegionSpotError):
            both = isinstance(from_path, RegionSpotError) and isinstance(
                from_bytes, RegionSpotError
            )
            check(both, f"from a path and from bytes: {from_path!r:.200} and {from_bytes!r:.200}")
            check(
                mask is None or isinstance(mask, RegionSpotError),
                "a picture is refused and its mask is read",
            )
            return None
        _check_pixels(from_path)
        check(
            from_path.shape[0] * from_path.shape[1] <= limit,
            f"{from_path.shape} is beyond {limit} pixels",
        )
        check(np.array_equal(from_path, from_bytes), "other pixels from a path than from bytes")
        if isinstance(mask, np.ndarray):  # a dark one is refused
            check(
                mask.dtype == bool and mask.shape == from_path.shape[:2] and bool(mask.any()),
                "a mask of another form",
            )
        return from_path


def _check_pixels(pixels: npt.NDArray[np.generic]) -> None:
    check(
        type(pixels) is np.ndarray and pixels.dtype == np.uint8,
        f"{type(pixels).__name__} of {pixels.dtype}",
    )
    check(
        pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0,
        f"an image of the shape {pixels.shape}",
    )


def _scene(channels: int, seed: int = 0) -> UInt8Array:
    """Smooth colours with noise, (H, W, channels)."""
    width, height = SIZE
    rows, columns = np.mgrid[:height, :width]
    waves = [
        np.sin(rows / (3 + c)) * 60 + np.cos(columns / (4 + c)) * 60 + 127 for c in range(channels)
    ]
    noise = np.random.default_rng(seed).integers(-8, 8, (height, width, channels))
    return np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _samples() -> list[Sample]:
    colours, grey = _scene(3), _scene(1)[..., 0]
    rgb, flat = Image.fromarray(colours), Image.fromarray(grey)
    as_grey = np.repeat(grey[..., None], 3, -1)
    bits = np.where(grey > 127, 255, 0).astype(np.uint8)
    as_bits = np.repeat(bits[..., None], 3, -1)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    opaque = Image.fromarray(np.dstack([colours, np.full(grey.shape, 255, np.uint8)]))
    clear = Image.fromarray(np.dstack([colours, np.zeros(grey.shape, np.uint8)]))
    white = np.full_like(colours, 255)
    palette = rgb.quantize(60)
    as_palette = np.array(palette.convert("RGB"))
    samples = [
        Sample("JPEG", _saved(rgb, "JPEG")),
        Sample("JPEG progressive", _saved(rgb, "JPEG", progressive=True, quality=95)),
        Sample("JPEG grey", _saved(flat, "JPEG", quality=60, restart_marker_rows=1)),
        Sample("JPEG CMYK", _saved(rgb.convert("CMYK"), "JPEG")),
        Sample(
            "JPEG comment", _saved(rgb, "JPEG", comment=b"c" * 300, subsampling=0, dpi=(72, 72))
        ),
        Sample("PNG", _saved(rgb, "PNG"), colours),
        Sample("PNG grey", _saved(flat, "PNG"), as_grey),
        Sample("PNG 16 bit", _saved(deep, "PNG"), as_grey),
        Sample("PNG 1 bit", _saved(Image.fromarray(bits).convert("1"), "PNG"), as_bits),
        Sample("PNG palette", _saved(palette, "PNG", transparency=255), as_palette),
        Sample("PNG opaque", _saved(opaque, "PNG"), colours),
        Sample("PNG clear", _saved(clear, "PNG"), white),
        Sample(
            "PNG animated",
            _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
            colours,
        ),
        Sample("WEBP", _saved(rgb, "WEBP")),
        Sample("WEBP lossless", _saved(rgb, "WEBP", lossless=True), colours),
        Sample(
            "WEBP animated",
            _saved(rgb, "WEBP", lossless=True, save_all=True, append_images=[flat]),
            colours,
        ),
        Sample("BMP", _saved(rgb, "BMP"), colours),
        Sample("BMP palette", _saved(palette, "BMP"), as_palette),
        Sample("BMP 1 bit", _saved(Image.fromarray(bits).convert("1"), "BMP"), as_bits),
        Sample("GIF", _saved(palette, "GIF"), as_palette),
        Sample(
            "GIF animated", _saved(palette, "GIF", save_all=True, append_images=[flat]), as_palette
        ),
        Sample("TIFF", _saved(rgb, "TIFF"), colours),
        Sample("TIFF 16 bit", _saved(deep, "TIFF"), as_grey),
        Sample("TIFF float", _saved(Image.fromarray(grey.astype(np.float32)), "TIFF"), known=False),
        *[
            Sample(f"TIFF {how}", _saved(rgb, "TIFF", compression=how), colours)
            for how in ("tiff_lzw", "tiff_deflate")
        ],
        Sample("TIFF packbits", _saved(flat, "TIFF", compression="packbits"), as_grey),
        Sample(
            "TIFF group4",
            _saved(Image.fromarray(bits).convert("1"), "TIFF", compression="group4"),
            as_bits,
        ),
        Sample("TIFF CMYK", _saved(rgb.convert("CMYK"), "TIFF")),
        Sample("PPM", _saved(rgb, "PPM"), colours),
        Sample("PGM", _saved(flat, "PPM"), as_grey),
        Sample("PBM", _saved(Image.fromarray(bits).convert("1"), "PPM"), as_bits),
        *[
            Sample(name, _saved(rgb, name), known=False)
            for name in ("EPS", "PDF", "ICO", "TGA", "SGI", "PCX", "DIB")
        ],
        *[
            Sample(f"no picture {n}", content, known=False)
            for n, content in enumerate((b"", b"\0", b"<svg/>", b"BM"))
        ],
    ]
    if features.check("jpg_2000"):
        samples.append(Sample("JPEG2000", _saved(rgb, "JPEG2000"), colours))
    if features.check("avif"):
        samples.append(Sample("AVIF", _saved(rgb, "AVIF")))
    return samples


def _png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _deflated_anew(data: bytes, rng: random.Random) -> bytes:
    """The compressed rows of a PNG with other content; as they are where an earlier change made
    them unreadable.
    """
    try:
        return zlib.compress(mutate_bytes(zlib.decompress(data), rng))
    except zlib.error:
        return data


def _png_extra(rng: random.Random) -> tuple[bytes, bytes]:
    bomb = zlib.compress(bytes(rng.choice((100, 80_000_000))), 9)
    extras = (
        (b"iCCP", b"p\0\0" + bomb),
        (b"zTXt", b"k\0\0" + bomb),
        (b"iTXt", b"k\0\1\0\0\0" + bomb),
        (b"tRNS", rng.randbytes(rng.choice((1, 2, 6, 300)))),
        (b"eXIf", rng.randbytes(30)),
        (b"gAMA", rng.randbytes(4)),
        (b"acTL", rng.randbytes(8)),
        (b"fcTL", rng.randbytes(26)),
        (b"pHYs", rng.randbytes(9)),
        (b"PLTE", rng.randbytes(rng.choice((3, 4, 900)))),
    )
    return rng.choice(extras)

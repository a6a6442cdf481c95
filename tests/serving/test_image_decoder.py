"""Images are decoded in processes of their own: as in this one, and within limits."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from regionspot.images import read_image
from regionspot.serving.backends import image_decoder
from regionspot.serving.backends.budget import Budget
from regionspot.serving.backends.image_decoder import DecoderSettings, ImageDecoder
from regionspot.serving.contract import ServingError
from regionspot.transforms import ClipTransform, EncoderInputs, SamTransform
from tests.serving.images import scan_bomb

SAM, CLIP = 128, 64
MAX_PIXELS = 20_000_000
BOMB = scan_bomb(4000, 1000)


@pytest.fixture(scope="module")
def decoder() -> Iterator[ImageDecoder]:
    with ImageDecoder(DecoderSettings(SAM, CLIP, MAX_PIXELS, 1.0)) as opened:
        opened.decode(png(), Budget(60))  # it has started, and answers within its limit from now on
        yield opened


def png(width: int = 60, height: int = 40) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def child_of(decoder: ImageDecoder) -> psutil.Process:
    (process,) = decoder._all
    assert process._child is not None
    return psutil.Process(process._child.pid)


@contextmanager
def killing(decoder: ImageDecoder, times: int) -> Iterator[None]:
    """Kills the process so often, each time 0.2 s after it has begun to work."""
    (process,) = decoder._all

    def kill() -> None:
        for _ in range(times):
            while not process._is_ready:
                time.sleep(0.01)
            time.sleep(0.2)
            child = process._child
            assert child is not None
            child.kill()
            child.wait()
            while process._child is child:
                time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    killer.join(30)
    assert not killer.is_alive()


def check_works(decoder: ImageDecoder, image: bytes) -> None:
    found = decoder.decode(image, Budget(60))
    expected = EncoderInputs.of(read_image(image), SamTransform(SAM), ClipTransform(CLIP))
    assert (found.height, found.width) == (expected.height, expected.width)
    assert found.input_size == expected.input_size
    assert np.array_equal(found.sam_image, expected.sam_image)
    assert np.array_equal(found.clip_image, expected.clip_image)


@pytest.mark.parametrize("size", [(60, 40), (1, 300), (700, 200)])
def test_as_in_this_process(decoder: ImageDecoder, size: tuple[int, int]) -> None:
    check_works(decoder, png(*size))


def test_what_is_refused_costs_nothing_else(decoder: ImageDecoder) -> None:
    child = child_of(decoder)
    for image, code, message in (
        (b"", "IMAGE_INVALID", "not a picture"),
        (png()[:100], "IMAGE_INVALID", "the image"),
        (png(5000, 4001), "IMAGE_TOO_LARGE", "5000 x 4001 pixels"),
    ):
        with pytest.raises(ServingError, match=message) as refused:
            decoder.decode(image, Budget(60))
        assert refused.value.code == code
    check_works(decoder, png())
    assert child_of(decoder) == child


def test_an_image_that_takes_too_long(decoder: ImageDecoder) -> None:
    child = child_of(decoder)
    with pytest.raises(ServingError, match="more than 1 s to decode") as refused:
        decoder.decode(BOMB, Budget(60))
    assert refused.value.code == "IMAGE_TOO_LARGE"
    assert not child.is_running()
    check_works(decoder, png())


def test_a_request_that_is_cancelled_ends_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoder, "PATIENCE_S", 0.1)
    with ImageDecoder(DecoderSettings(SAM, CLIP, MAX_PIXELS, 60.0)) as decoder:
        check_works(decoder, png())
        child = child_of(decoder)
        began = time.monotonic()
        with pytest.raises(ServingError, match="was cancelled"):
            decoder.decode(BOMB, Budget(60, lambda: time.monotonic() - began > 0.5))
        assert not child.is_running()
        check_works(decoder, png())


def test_a_decoder_that_crashes_costs_its_own_image(decoder: ImageDecoder) -> None:
    with killing(decoder, 2), pytest.raises(ServingError, match="its decoder failed") as refused:
        decoder.decode(BOMB, Budget(60))
    assert refused.value.code == "IMAGE_INVALID"
    check_works(decoder, png())
    child_of(decoder).kill()  # while it has nothing to do
    child_of(decoder).wait()
    check_works(decoder, png())


def test_an_image_whose_decoder_was_killed_is_decoded_again() -> None:
    image = scan_bomb(2000, 200)
    with ImageDecoder(DecoderSettings(SAM, CLIP, MAX_PIXELS, 60.0)) as decoder:
        check_works(decoder, png())
        with killing(decoder, 1):
            check_works(decoder, image)


def test_a_decoder_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_decoder, "_RUN", "import sys; sys.exit(3)")
    with (
        ImageDecoder(DecoderSettings(SAM, CLIP, MAX_PIXELS, 60.0)) as decoder,
        pytest.raises(ServingError, match="no image can be decoded"),
    ):
        decoder.decode(png(), Budget(60))


def test_one_bomb_holds_up_no_other_image() -> None:
    with ImageDecoder(DecoderSettings(SAM, CLIP, MAX_PIXELS, 60.0), processes=2) as decoder:
        check_works(decoder, png())
        over = threading.Event()

        def attack() -> None:
            with pytest.raises(ServingError, match="was cancelled"):
                decoder.decode(BOMB, Budget(60, over.is_set))

        attacker = threading.Thread(target=attack)
        attacker.start()
        for _ in range(20):
            check_works(decoder, png())
        assert attacker.is_alive()
        over.set()
        attacker.join()


def test_decoders_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import os, time\n"
        "from regionspot.serving.backends.image_decoder import DecoderSettings, ImageDecoder\n"
        f"decoder = ImageDecoder(DecoderSettings({SAM}, {CLIP}, 1000, 1.0))\n"
        "print(decoder._all[0]._child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    child.wait(60)


def test_memory_is_bounded() -> None:
    program = (
        "import numpy as np\n"
        "from regionspot.serving.backends.decoder_process import BYTES_PER_PIXEL, _limit_memory\n"
        "_limit_memory(10_000_000)\n"
        "kept = np.ones(10_000_000 * BYTES_PER_PIXEL, np.uint8)\n"
        "try:\n"
        "    np.ones(1 << 30, np.uint8)\n"
        "except MemoryError:\n"
        "    print('bounded')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "bounded\n", done.stderr

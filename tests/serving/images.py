"""Encoded images that are made to be refused."""

from __future__ import annotations

import io

from PIL import Image

SOS, EOI = 0xDA, 0xD9


def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG of one colour whose last scan is repeated: a few bytes each, and a pass
    over all coefficients to decode.
    """
    encoded = io.BytesIO()
    Image.new("RGB", (side, side), (120, 130, 140)).save(encoded, "JPEG", progressive=True)
    content = encoded.getvalue()
    last = content.rindex(bytes([0xFF, SOS]))
    end = content.rindex(bytes([0xFF, EOI]))
    return content[:end] + scans * content[last:end] + content[end:]

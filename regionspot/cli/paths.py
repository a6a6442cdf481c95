"""Paths as the words of a command line."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # one letter alone is a drive of Windows


def local_path(text: str) -> Path:
    """A file or folder of this machine; for argparse's `type`."""
    if _URL.match(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is a URL, and nothing is fetched: download it, and name the file"
        )
    return Path(text)

"""A small real question: a server is ready when it answers this, not when it says so.

    python -m regionspot.serving.canary --url 127.0.0.1:8001 --timeout 10

exits with 0 if it does, for the probes of a container. It also does if the server answered others
while the canary waited: under load the canary stands in the same queue as everybody.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from regionspot.errors import RegionSpotError
from regionspot.serving.client import RegionClient
from regionspot.serving.contract import ServingError
from regionspot.serving.conversation import ServerInfo
from regionspot.serving.messages import Answer, Question
from regionspot.serving.triton import Connection
from regionspot.structures import Prompts

SIDE = 64
BOX = (8.0, 8.0, 56.0, 56.0)
WORDS = ("a", "b")
BUSY = ("TIMEOUT", "OVERLOADED")
"""Codes with which a busy server fails the canary, and a server that hangs."""

TLS_FILES = {
    "ca_file": "roots that vouch for the server, with --url grpcs://...",
    "client_cert_file": "the certificate to show to it",
    "client_key_file": "its key",
}
STATISTICS_S = 1.5
"""How long the number of answers may take: Triton knows it without asking the model."""


@cache
def picture() -> bytes:
    """A PNG of a bright square on a gradient."""
    pixels = np.linspace(0, 120, SIDE * SIDE * 3).reshape(SIDE, SIDE, 3).astype(np.uint8)
    pixels[8:56, 8:56] = (240, 200, 40)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def question_for(info: ServerInfo, return_masks: bool = False) -> Question:
    """What to ask a server: registered words need no text encoder."""
    vocabulary = next(iter(info.vocabularies), None) or WORDS
    return Question(
        picture(), vocabulary, (Prompts.from_boxes([BOX]),), top_k=1, return_masks=return_masks
    )


def check(client: RegionClient, timeout_s: float, return_masks: bool = False) -> None:
    """Ask, and look at the answer.

    Raises:
        ServingError: no answer, or a wrong one.
    """
    judge(client.ask(question_for(client.info(), return_masks), timeout_s=timeout_s))


def judge(answer: Answer) -> None:
    """Raises ServingError unless an answer to the canary is one."""
    found = answer.predictions
    if len(found) != 1 or not (np.isfinite(found.scores).all() and 0 < found.scores[0] <= 1):
        raise ServingError(
            "INTERNAL", f"the server answers the canary with scores {found.scores.tolist()}"
        )


def executions_so_far(url: str, timeout_s: float = STATISTICS_S, **files: Any) -> int | None:
    """Returns how often the public model has worked on requests, refused ones and the canary's own
    included; None if the server does not say. Requests that were cancelled while they waited do not
    count, so that a model that hangs makes no progress. `files` are those of `RegionClient`, for
    TLS.
    """
    try:
        with Connection(url, timeout_s, retry=False, **files) as connection:
            return int(connection.statistics().get("execution_count", 0))
    except RegionSpotError:
        return None


def check_progress(url: str, timeout_s: float, **files: Any) -> str:
    """Asks the canary's question, and looks at who else was answered meanwhile. `files` are those
    of `RegionClient`, for TLS.

    Returns:
        A sentence on how the server does.

    Raises:
        ServingError: It answers the canary wrongly, or nobody.
    """
    before = executions_so_far(url, **files)
    try:
        with RegionClient(url, timeout_s, **files) as client:
            check(client, timeout_s)
    except ServingError as error:
        after = executions_so_far(url, **files)
        if error.code not in BUSY or before is None or after is None or after <= before:
            raise
        return "busy: others were answered while the canary waited"
    return "ready"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.serving.canary", description="Does a server answer?"
    )
    parser.add_argument(
        "--url", default="127.0.0.1:8001", help="its gRPC port (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="default: %(default)s"
    )
    for option, meaning in TLS_FILES.items():
        parser.add_argument(f"--{option.replace('_', '-')}", metavar="FILE", help=meaning)
    arguments = parser.parse_args(argv)
    files = {option: getattr(arguments, option) for option in TLS_FILES}
    given = {option: path for option, path in files.items() if path is not None}
    try:
        state = check_progress(arguments.url, arguments.timeout, **given)
    except RegionSpotError as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1
    print(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())

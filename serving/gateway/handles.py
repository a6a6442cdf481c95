"""Image handles that belong to one caller.

The server knows an image by the SHA-256 of its file, so that whoever has a file could ask whether
others sent it: by its handle, by `cached`, or by how fast the answer comes. A gateway with named
callers therefore adds a few bytes behind the end of each image, which decoders do not read and
which differ from caller to caller: the server keeps the image once for each of them. The handle
that the caller gets carries a code that the gateway alone can make, for this caller.

Both come from the file of tokens, so that gateways with the same file understand each other's
handles and nothing has to be stored.
"""

from __future__ import annotations

import hmac

from regionspot.serving.contract import RequestError

_CODE_CHARACTERS = 32


class HandleSeal:
    """Of one caller.

    Args:
        key: its `Caller.handle_key`; None leaves images and handles as they are.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    @property
    def suffix(self) -> bytes:
        """What to add to an image's file; ASCII, without any marker of a format."""
        return b"" if self._key is None else self._code(b"image")

    def seal(self, handle: str) -> str:
        """The caller's handle for one of the server's."""
        if self._key is None:
            return handle
        return f"{handle}.{self._code(handle.encode()).decode()}"

    def open(self, sealed: str) -> str:
        """The server's handle for one of the caller's.

        Raises:
            RequestError: IMAGE_UNKNOWN, it was not made for this caller.
        """
        if self._key is None:
            return sealed
        handle, _, code = sealed.rpartition(".")
        if not hmac.compare_digest(code.encode(), self._code(handle.encode())):
            raise RequestError(
                "IMAGE_UNKNOWN",
                "the server keeps no picture of this handle (any more): send the picture",
            )
        return handle

    def _code(self, content: bytes) -> bytes:
        assert self._key is not None
        return hmac.new(self._key, content, "sha256").hexdigest()[:_CODE_CHARACTERS].encode()


PLAIN = HandleSeal(None)

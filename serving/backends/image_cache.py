"""Pictures that were encoded, by the hash of their bytes: a later question about one skips both
encoders.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from regionspot.predictor import EncodedPicture


class ImageCache:
    """The pictures that were asked about last, up to a number of bytes. Safe for several threads at
    once.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._kept: OrderedDict[str, EncodedPicture] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, handle: str) -> EncodedPicture | None:
        with self._lock:
            if handle in self._kept:
                self._kept.move_to_end(handle)
            return self._kept.get(handle)

    def put(self, handle: str, picture: EncodedPicture) -> None:
        """Keep a picture, and forget the ones that nobody has asked about for longest. One that is
        larger than the whole cache is not kept.
        """
        if picture.nbytes > self._capacity:
            return
        with self._lock:
            if handle in self._kept:
                return
            self._kept[handle] = picture
            self.size_bytes += picture.nbytes
            while self.size_bytes > self._capacity:
                _, forgotten = self._kept.popitem(last=False)
                self.size_bytes -= forgotten.nbytes
                self.evictions += 1

    def clear(self) -> bool:
        """Forgets all pictures, where memory is short. Returns whether there was any."""
        with self._lock:
            forgotten = len(self._kept)
            self._kept.clear()
            self.size_bytes = 0
            self.evictions += forgotten
        return forgotten > 0

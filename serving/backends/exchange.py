"""One request of Triton's, from when it is taken on to its one response, whichever thread comes to
that.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from regionspot.serving.backends.recognizer import Counts
from regionspot.serving.backends.requests import answer_of, id_of, log, refusal_of
from regionspot.serving.messages import Answer


class Exchange:
    """A request and what has been found for its pictures. Safe for several threads at once.

    Triton frees a request's tensors when `execute` returns: read them before.

    Attributes:
        counts: what happened so far, for all of its pictures.
    """

    def __init__(self, request: Any) -> None:
        self.counts = Counts()
        self._request, self._sender = request, request.get_response_sender()
        self._found: list[Answer | Exception | None] = []
        self._missing = 0
        self._lock = Lock()

    def expect(self, pictures: int) -> None:
        """Says how many pictures the request is about."""
        self._found, self._missing = [None] * pictures, pictures

    def complete(self, index: int, found: Answer | Exception) -> bool:
        """Takes the answer about one picture, and responds after the last one. Of several pictures
        that fail, the first one's error is the response.

        Returns:
            Whether it was the last one.
        """
        with self._lock:
            self._found[index] = found
            self._missing -= 1
            if self._missing:
                return False
        answers = [found for found in self._found if isinstance(found, Answer)]
        errors = [found for found in self._found if isinstance(found, Exception)]
        if errors:
            self.refuse(errors[0])
            return True
        try:
            tensors = [answer.to_tensors() for answer in answers]
            outputs = {name: np.concatenate([one[name] for one in tensors]) for name in tensors[0]}
            response = answer_of(outputs, self._request)
        except Exception as error:
            self.refuse(error)
        else:
            self._send(response)
        return True

    def refuse(self, error: Exception) -> None:
        """Responds with what went wrong."""
        self.counts.add("refusals")
        self._send(refusal_of(error, self._request))

    def is_cancelled(self) -> bool:
        """Returns whether nobody waits for the response any more."""
        return bool(self._sender.is_cancelled())

    def _send(self, response: Any) -> None:
        try:
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # Triton's errors share no base class of their own
            log("unsent", request_id=id_of(self._request), reason=str(error))

"""Between Triton's requests and arrays: the same for every model that runs in its Python
backend.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from regionspot.errors import InputError
from regionspot.logs import JsonFormatter, install_handler
from regionspot.runtime.runner import Array
from regionspot.serving.contract import NO_SHARED_MEMORY, ServingError, as_text, error_of

logger = logging.getLogger(__name__)
# Triton alone imports this module, in a process of its own
install_handler("stderr", JsonFormatter())

MAX_LOGGED_ID = 128
INTERNAL_MESSAGE = "the server failed; its log says why"


def arrays_of(request: Any, names: Sequence[str]) -> dict[str, Array]:
    """The inputs that were sent, as arrays of their own: Triton reuses the memory behind them."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {
        name: tensor.as_numpy().copy() for name, tensor in tensors.items() if tensor is not None
    }


def answer_of(outputs: dict[str, Array], request: Any) -> Any:
    """A response with the outputs that the request wants."""
    wanted = request.requested_output_names()
    tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in wanted]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def id_of(request: Any) -> str:
    """What a caller names its request, as far as the log takes it; "?" for bytes that are not
    UTF-8, which Triton passes on.
    """
    try:
        return str(request.request_id())[:MAX_LOGGED_ID]
    except Exception:  # pybind11's, which share no base class of their own
        return "?"


def refusal_of(error: BaseException, request: Any) -> Any:
    """A response that says what went wrong: to the caller its code and a sentence, to the log all
    of it.
    """
    if isinstance(error, ServingError):
        coded = error
    elif re.match(NO_SHARED_MEMORY, str(error)):
        coded = error_of("UNAVAILABLE", "the server has no shared memory left: retry later")
    elif isinstance(error, InputError):
        coded = error_of("REQUEST_INVALID", str(error))
    else:
        coded = ServingError("INTERNAL", INTERNAL_MESSAGE)
    details = "".join(traceback.format_exception(error)) if coded.code == "INTERNAL" else None
    log(
        "refused",
        request_id=id_of(request),
        code=coded.code,
        message=as_text(coded).removeprefix(f"{coded.code}: "),
        details=details,
    )
    kinds = {
        "INTERNAL": pb_utils.TritonError.INTERNAL,
        "UNAVAILABLE": pb_utils.TritonError.UNAVAILABLE,
    }
    code = kinds.get(coded.code, pb_utils.TritonError.INVALID_ARG)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(as_text(coded), code))


def log(event: str, **fields: Any) -> None:
    """Writes a line of JSON to the server's log."""
    logger.info(event, extra={"fields": {"event": event, **fields}})

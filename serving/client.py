"""Ask a regionspot server about pictures: in three lines, from threads or from asyncio.

client = RegionClient("localhost:8001")
found = client.recognize("photo.jpg", boxes=[[10, 20, 200, 300]], vocabulary=["cat", "coffee cup"])
print(found.class_names[found.class_ids[0]], found.scores[0])
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from regionspot.errors import InputError
from regionspot.runtime.runner import Array
from regionspot.serving.contract import DEFAULT_TOP_K, MODEL, Limits, RequestError, ServingError, base64_hint, to_utf8
from regionspot.serving.triton import DEFAULT_TIMEOUT_S, AsyncConnection, Connection
from regionspot.structures import FloatArray, RegionPredictions, Rle, Vocabulary
from regionspot.transforms import ImageSource, UInt8Array, read_image

_SENT_AS_IT_IS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG and PNG; WebP is RIFF....WEBP


@dataclass(frozen=True)
class RemoteImage:
    """An image that a server has cached. Pass it instead of the image, which then need not be sent or encoded again.

    Args:
        handle: the server's identifier of it.
        height: of the upright image, in pixels.
        width: of the upright image, in pixels.
        encoded: the image file's bytes, sent again if the server no longer has it; None if they are not available.
    """

    handle: str
    height: int
    width: int
    encoded: bytes | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """A server's response. `cached`: the image was cached, so both image encoders were skipped."""

    predictions: RegionPredictions
    image: RemoteImage
    cached: bool


@dataclass(frozen=True)
class ServerInfo:
    """Describes the model that a server runs.

    Args:
        model: its name.
        runtime: name of the runtime.
        precision: name of the precision.
        vocabularies: name -> class names of each registered vocabulary.
        limits: of one request.
    """

    model: str
    runtime: str
    precision: str
    vocabularies: Mapping[str, tuple[str, ...]]
    limits: Limits

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServerInfo:
        """From the parameters of the public model's configuration."""
        values = {name: json.loads(text) for name, text in parameters.items()}
        return cls(
            model=values["model_info"]["name"],
            runtime=values["runtime"],
            precision=values["precision"],
            vocabularies={name: tuple(words) for name, words in values["vocabularies"].items()},
            limits=Limits.from_json(values["limits"]),
        )


class RegionClient:
    """A connection to a server, kept open. Use as a context manager, or call `close`.

    Safe for several threads at once over gRPC; over HTTP each thread needs a client of its own.

    Args:
        url: "HOST:PORT" of the server's gRPC port, or "http://HOST:PORT".
        timeout_s: of one call, retries included. A server that cannot be reached, restarts or is overloaded is asked
            again until then, with growing pauses; nothing else is.
        retry: False asks once.
    """

    def __init__(self, url: str, timeout_s: float = DEFAULT_TIMEOUT_S, retry: bool = True) -> None:
        self._connection = Connection(url, timeout_s, retry)
        self._info: ServerInfo | None = None

    def recognize(
        self,
        image: ImageSource | RemoteImage,
        boxes: npt.ArrayLike | None = None,
        vocabulary: str | Sequence[str] | Vocabulary = (),
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        top_k: int = DEFAULT_TOP_K,
        return_masks: bool = False,
        timeout_s: float | None = None,
    ) -> RegionPredictions:
        """Recognises regions of an image. Regions of one call attend to each other, as in `RegionPredictor.predict`.

        Args:
            image: a file's path or bytes, a Pillow image, an (H, W, 3) uint8 RGB array, or the result of `encode`.
            boxes: (N, 4) xyxy in pixels of the upright image.
            vocabulary: the name of a vocabulary that is registered on the server, or class names.
            points: (N, 2) or (N, P, 2) xy in pixels of the upright image.
            point_labels: (N,) or (N, P), 1 for foreground and 0 for background; None is foreground throughout.
            top_k: number of best classes to return.
            return_masks: also return SAM's mask of each region.
            timeout_s: overrides the client's.

        Raises:
            RequestError: the image, the regions or the class names are invalid; see its `code` and message.
            ServingError: the server failed, did not respond in time, or cannot be reached.
            InputError: a file that does not exist, arrays of other shapes.
        """
        regions = {"boxes": boxes, "points": points, "point_labels": point_labels}
        return self.ask(
            image, vocabulary, regions, top_k=top_k, return_masks=return_masks, timeout_s=timeout_s
        ).predictions

    def ask(
        self,
        image: ImageSource | RemoteImage,
        vocabulary: str | Sequence[str] | Vocabulary,
        regions: Mapping[str, npt.ArrayLike | None],
        *,
        top_k: int = DEFAULT_TOP_K,
        return_masks: bool = False,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Answer:
        """As `recognize`, with what else the server says; `regions` holds `boxes`, `points` and `point_labels`."""
        call = Call(image, vocabulary, regions, top_k, return_masks)
        try:
            outputs = self._connection.infer(MODEL, call.inputs(), request_id, timeout_s)
        except RequestError as error:
            if not call.may_send_picture(error):
                raise
            outputs = self._connection.infer(MODEL, call.inputs(with_picture=True), request_id, timeout_s)
        if not isinstance(vocabulary, str):
            return call.answer(outputs)
        known = self.info().vocabularies.get(vocabulary)
        if not call.agrees(outputs, known):  # other words were registered since this client asked
            known = self.info(refresh=True).vocabularies.get(vocabulary)
        return call.answer(outputs, known)

    def encode(self, image: ImageSource, timeout_s: float | None = None) -> RemoteImage:
        """Have the server read and encode a picture now, for questions later."""
        vocabulary = next(iter(self.info().vocabularies), None) or ("a",)
        return self.ask(image, vocabulary, {"boxes": np.zeros((0, 4))}, timeout_s=timeout_s).image

    def info(self, refresh: bool = False, timeout_s: float | None = None) -> ServerInfo:
        """What the server runs; asked once, or again with `refresh`.

        Raises:
            ServingError: it cannot be reached.
        """
        if self._info is None or refresh:
            self._info = ServerInfo.from_parameters(self._connection.config(timeout_s=timeout_s))
        return self._info

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> RegionClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncRegionClient:
    """As `RegionClient`, for asyncio: hundreds of questions may be under way. Cancelling a task cancels its request."""

    def __init__(self, url: str, timeout_s: float = DEFAULT_TIMEOUT_S, retry: bool = True) -> None:
        self._connection = AsyncConnection(url, timeout_s, retry)
        self._info: ServerInfo | None = None

    async def recognize(
        self,
        image: ImageSource | RemoteImage,
        boxes: npt.ArrayLike | None = None,
        vocabulary: str | Sequence[str] | Vocabulary = (),
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        top_k: int = DEFAULT_TOP_K,
        return_masks: bool = False,
        timeout_s: float | None = None,
    ) -> RegionPredictions:
        """See `RegionClient.recognize`."""
        regions = {"boxes": boxes, "points": points, "point_labels": point_labels}
        answer = await self.ask(image, vocabulary, regions, top_k=top_k, return_masks=return_masks, timeout_s=timeout_s)
        return answer.predictions

    async def ask(
        self,
        image: ImageSource | RemoteImage,
        vocabulary: str | Sequence[str] | Vocabulary,
        regions: Mapping[str, npt.ArrayLike | None],
        *,
        top_k: int = DEFAULT_TOP_K,
        return_masks: bool = False,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Answer:
        """See `RegionClient.ask`."""
        call = Call(image, vocabulary, regions, top_k, return_masks)
        try:
            outputs = await self._connection.infer(MODEL, call.inputs(), request_id, timeout_s)
        except RequestError as error:
            if not call.may_send_picture(error):
                raise
            outputs = await self._connection.infer(MODEL, call.inputs(with_picture=True), request_id, timeout_s)
        if not isinstance(vocabulary, str):
            return call.answer(outputs)
        known = (await self.info()).vocabularies.get(vocabulary)
        if not call.agrees(outputs, known):
            known = (await self.info(refresh=True)).vocabularies.get(vocabulary)
        return call.answer(outputs, known)

    async def encode(self, image: ImageSource, timeout_s: float | None = None) -> RemoteImage:
        """See `RegionClient.encode`."""
        vocabulary = next(iter((await self.info()).vocabularies), None) or ("a",)
        return (await self.ask(image, vocabulary, {"boxes": np.zeros((0, 4))}, timeout_s=timeout_s)).image

    async def info(self, refresh: bool = False) -> ServerInfo:
        """See `RegionClient.info`."""
        if self._info is None or refresh:
            self._info = ServerInfo.from_parameters(await self._connection.config())
        return self._info

    async def close(self) -> None:
        await self._connection.close()

    async def __aenter__(self) -> AsyncRegionClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class Call:
    """One question in the tensors of `regionspot.serving.contract`, and its answer out of them.

    Raises:
        InputError: what can be told without the server.
    """

    def __init__(
        self,
        image: ImageSource | RemoteImage,
        vocabulary: str | Sequence[str] | Vocabulary,
        regions: Mapping[str, npt.ArrayLike | None],
        top_k: int,
        return_masks: bool,
    ) -> None:
        self._remote = image if isinstance(image, RemoteImage) else None
        self._encoded = image.encoded if isinstance(image, RemoteImage) else encoded_picture(image)
        self._return_masks = return_masks
        self._words: tuple[str, ...] | None = None
        self._inputs: dict[str, Array] = {
            "top_k": np.array([[top_k]], np.int32),
            "return_masks": np.array([[return_masks]]),
        }
        if isinstance(vocabulary, str):
            self._inputs["vocabulary"] = _bytes([to_utf8(vocabulary, "the vocabulary's name")])
        else:
            self._words = vocabulary.names if isinstance(vocabulary, Vocabulary) else tuple(vocabulary)
            self._inputs["words"] = _bytes([to_utf8(word, f"word {i}") for i, word in enumerate(self._words)])
        for name, values in regions.items():
            if values is not None:
                self._inputs[name] = _regions(name, values)[None]

    def inputs(self, with_picture: bool = False) -> dict[str, Array]:
        """The request's tensors: with the handle of a picture that the server knows, else with its bytes."""
        if self._remote is not None and not with_picture:
            return self._inputs | {"image_handle": _bytes([to_utf8(self._remote.handle, "the picture's handle")])}
        assert self._encoded is not None
        return self._inputs | {"image": _bytes([self._encoded])}

    def may_send_picture(self, error: RequestError) -> bool:
        """Whether the server has forgotten a picture whose bytes are at hand."""
        return error.code == "IMAGE_UNKNOWN" and self._remote is not None and self._encoded is not None

    def agrees(self, outputs: Mapping[str, Array], names: Sequence[str] | None) -> bool:
        """Whether these are the words of the vocabulary that the server answered from, as far as its answer shows."""
        if names is None:
            return False
        pairs = zip(outputs["top_class_ids"].flat, outputs["top_class_names"].flat, strict=True)
        return all(index < len(names) and names[index] == name.decode() for index, name in pairs)

    def answer(self, outputs: Mapping[str, Array], names: Sequence[str] | None = None) -> Answer:
        """The outputs of one picture. `names`: of a registered vocabulary.

        Raises:
            ServingError: INTERNAL; the server names other classes than its own description does.
        """
        names = self._words if self._words is not None else names
        if names is None or not self.agrees(outputs, names):
            raise ServingError("INTERNAL", "the server's answer and its description name different classes: ask again")
        found = {name: array[0] for name, array in outputs.items()}
        height, width = (int(side) for side in found["image_size"])
        masks = None
        if self._return_masks:
            masks = tuple(Rle(size=[height, width], counts=counts.decode("ascii")) for counts in found["masks"])
        predictions = RegionPredictions(
            image_height=height,
            image_width=width,
            boxes=found["boxes"].reshape(-1, 4),
            class_names=tuple(names),
            scores=found["scores"],
            class_ids=found["class_ids"],
            top_class_ids=found["top_class_ids"],
            top_scores=found["top_scores"],
            masks=masks,
            iou_predictions=found["iou_predictions"],
        )
        image = RemoteImage(found["image_handle"][0].decode("ascii"), height, width, self._encoded)
        return Answer(predictions, image, bool(found["cached"][0]))


def encoded_picture(image: ImageSource) -> bytes:
    """A picture as the server takes it: a JPEG, PNG or WebP file as it is, anything else as PNG, which loses nothing.

    Raises:
        InputError: the file does not exist, or is no picture.
    """
    content: bytes | None = None
    if isinstance(image, bytes):
        content = image
    elif isinstance(image, str | Path):
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            raise InputError(f"image {Path(image).name!r} cannot be read ({error.strerror}): check the path") from error
    if content is not None and (content.startswith(_SENT_AS_IT_IS) or content[8:12] == b"WEBP"):
        return content
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(_read(image if content is None else content, image)).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def _read(source: ImageSource, named: ImageSource) -> UInt8Array:
    """(H, W, 3) uint8 RGB. `source` may be the content of the file `named`: a pipe can be read once alone."""
    try:
        return read_image(source)
    except InputError as error:
        hint = base64_hint(source) if isinstance(source, bytes) else ""
        name = "" if isinstance(named, bytes) or source is named else f" ({named})"
        raise InputError(f"{error}{name}{hint}") from error


def _regions(name: str, values: npt.ArrayLike) -> Array:
    """Boxes (N, 4), points (N, K, 2) or labels (N, K)."""
    try:
        array: FloatArray = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be a rectangular array of numbers: {error}") from error
    if name == "boxes":
        array = array.reshape(0, 4) if array.size == 0 else array
        good = array.ndim == 2 and array.shape[1] == 4
    elif name == "points":
        array = array.reshape(0, 1, 2) if array.size == 0 else array[:, None] if array.ndim == 2 else array
        good = array.ndim == 3 and array.shape[2] == 2
    else:
        array = array.reshape(0, 1) if array.size == 0 else array[:, None] if array.ndim == 1 else array
        good = array.ndim == 2
        if good and not np.isin(array, (0, 1)).all():
            raise InputError(f"point labels must be 1 (foreground) or 0 (background), got {np.unique(array).tolist()}")
        return _checked(name, array, good).astype(np.int32)
    return _checked(name, array, good)


def _checked(name: str, array: Array, good: bool) -> Array:
    forms = {"boxes": "(N, 4)", "points": "(N, 2) or (N, K, 2)", "point_labels": "(N,) or (N, K)"}
    if not good:
        raise InputError(f"{name} must have shape {forms[name]}, got {array.shape}")
    return array


def _bytes(values: Sequence[bytes]) -> npt.NDArray[Any]:
    """(1, n) of Triton's BYTES."""
    array = np.empty((1, len(values)), np.object_)
    array[0, :] = values
    return array

"""A question and its answer as a gateway's HTTP API says them: the client's side of
`regionspot.serving.gateway.form` and of `RegionPredictions.to_json`.

Nothing is lost on the way: a float32 is written with as many digits as give it back to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regionspot.errors import InputError
from regionspot.serving.contract import ServingError, coded, to_utf8
from regionspot.serving.messages import (
    Answer,
    OtherWordsError,
    Question,
    RemoteImage,
    tensors_of_regions,
)
from regionspot.structures import RegionPredictions, Rle


@dataclass(frozen=True, eq=False)
class QuestionForm:
    """The parts of the form that `POST /v1/recognize` takes: JSON, and an image file or None."""

    request: bytes
    image: bytes | None

    @classmethod
    def of(cls, question: Question) -> QuestionForm:
        """Raises RequestError for what JSON cannot carry: coordinates that are no numbers, a handle
        that is no Unicode text, regions that are neither boxes nor points.
        """
        with coded("REGION_INVALID"):
            for part in question.prompts:
                part.check_finite()
        with coded():
            regions = tensors_of_regions(question.prompts)
            content: dict[str, Any] = {name: array[0].tolist() for name, array in regions.items()}
            if not regions:
                content["boxes"] = []
            if isinstance(question.image, RemoteImage):
                to_utf8(question.image.handle, "the image's handle")
                content["image_handle"] = question.image.handle
        named = isinstance(question.vocabulary, str)
        content["vocabulary" if named else "words"] = question.vocabulary
        if question.top_k is not None:
            content["top_k"] = question.top_k
        content["masks"] = question.return_masks
        image = question.image if isinstance(question.image, bytes) else None
        return cls(json.dumps(content, ensure_ascii=False).encode(), image)


def answer_from_json(content: Any, question: Question, class_names: Sequence[str] | None) -> Answer:
    """Reads what a gateway answered.

    Args:
        content: the answer's JSON. Keys of a later release are passed over.
        class_names: of the question's vocabulary; None if they are not known.

    Raises:
        OtherWordsError: the answer names a class that is not among `class_names`.
        ServingError: INTERNAL, it is no such answer.
    """
    if class_names is None:
        raise OtherWordsError
    try:
        return _answer(content, question, class_names)
    except (LookupError, TypeError, ValueError) as error:  # InputError is a ValueError
        raise ServingError(
            "INTERNAL", f"the gateway's answer cannot be used: {_reason(error)}"
        ) from error


def _answer(content: Any, question: Question, class_names: Sequence[str]) -> Answer:
    regions = content["regions"]
    if len(regions) != question.num_regions:
        raise InputError(f"{len(regions)} regions for a question about {question.num_regions}")
    ids = {name: index for index, name in enumerate(class_names)}
    if any(name not in ids for region in regions for name, _ in region["top"]):
        raise OtherWordsError
    width, height = (int(content["image"][side]) for side in ("width", "height"))
    num_top = min(question.wanted_top_k, len(class_names))  # as many as a server names, if there
    shape = (len(regions), len(regions[0]["top"]) if regions else num_top)  # is no region to say it
    top = [pair for region in regions for pair in region["top"]]
    predictions = RegionPredictions(
        image_height=height,
        image_width=width,
        boxes=_floats([region["box"] for region in regions]).reshape(-1, 4),
        class_names=tuple(class_names),
        scores=_floats([region["score"] for region in regions]),
        class_ids=np.array([ids[region["class"]] for region in regions], np.int32),
        top_class_ids=np.array([ids[name] for name, _ in top], np.int32).reshape(shape),
        top_scores=_floats([score for _, score in top]).reshape(shape),
        masks=_masks(regions) if question.return_masks else None,
        iou_predictions=_floats([region["iou"] for region in regions]),
    )
    handle = content["image_handle"]
    version = content.get("model_version", "")
    if not isinstance(handle, str) or not isinstance(version, str):
        raise InputError("its image_handle or its model_version is no text")
    return Answer(predictions, RemoteImage(handle, height, width), bool(content["cached"]), version)


def _floats(values: list[Any]) -> Any:
    return np.array(values, np.float32)


def _masks(regions: Sequence[Mapping[str, Any]]) -> tuple[Rle, ...]:
    masks = [region["mask"] for region in regions]
    return tuple(Rle(size=list(mask["size"]), counts=mask["counts"]) for mask in masks)


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)

"""Recognises regions of an image: encode it once, then ask any number of times, with any regions
and any words.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from regionspot.arrays import checked_count
from regionspot.errors import ArtifactError, InputError
from regionspot.images import ImageSource, read_image
from regionspot.masks import Rle
from regionspot.runtime.pipeline import EncodedImages, RegionPipeline
from regionspot.runtime.scores import best_classes, best_reading, softmax
from regionspot.structures import (
    BOX_TOP_LEFT,
    FloatArray,
    Prompts,
    RegionPredictions,
    Vocabulary,
    as_class_names,
    as_prompts,
)
from regionspot.transforms import ClipTransform, EncoderInputs, SamTransform
from regionspot.vocabulary import VocabularyEncoder, parse_vocabulary

if TYPE_CHECKING:
    from regionspot.modeling.regionspot import RegionSpot

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """An image as both encoders see it. Only the model that made it can use it.

    Args:
        height, width: of the image, upright, in pixels.
        encoded: SAM's side, one image, with the fingerprint of the SAM that encoded it.
        patch_tokens: (1, L, D) CLIP's feature map.
        clip_fingerprint: of the CLIP that made it, see `RegionPipeline.clip_fingerprint`.
    """

    height: int
    width: int
    encoded: EncodedImages
    patch_tokens: FloatArray
    clip_fingerprint: str

    @property
    def nbytes(self) -> int:
        """What it holds, on whatever device."""
        return self.patch_tokens.nbytes + self.encoded.nbytes


@dataclass(frozen=True, eq=False)
class _Regions:
    """What SAM says about n prompts, T tokens each."""

    tokens: FloatArray  # (n, T, C)
    iou_predictions: FloatArray  # (n, T)
    boxes: FloatArray  # (n * T, 4)
    masks: tuple[Rle, ...]  # n * T, or none

    @classmethod
    def concatenate(cls, parts: Sequence[_Regions]) -> _Regions:
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.iou_predictions for part in parts]),
            np.concatenate([part.boxes for part in parts]),
            sum((part.masks for part in parts), ()),
        )

    def best(self) -> _Regions:
        """The reading of each prompt with the highest predicted IoU: T = 1."""
        count, readings = self.iou_predictions.shape
        rows, best = np.arange(count), self.iou_predictions.argmax(1)
        flat = rows * readings + best
        return _Regions(
            self.tokens[rows, best][:, None],
            self.iou_predictions[rows, best][:, None],
            self.boxes[flat],
            tuple(self.masks[index] for index in flat) if self.masks else (),
        )


class RegionPredictor:
    """Recognises regions of images.

    Thread-safe: each result is that of a serial call. `set_image` sets the image for the calling
    thread; threads that set none use the one that the creating thread has set. A pickled copy has
    no image set.

    Args:
        model: a model on any device, which does the work there, or a pipeline of exported graphs.
        cache_dir: where embeddings of class names are cached, see `VocabularyEncoder`.
        clean_coco_suffixes: remove COCO's `-other`, `-merged` and `-stuff` from class names, see
            `VocabularyEncoder`.

    Examples:
        >>> predictor = RegionPredictor(model)
        >>> predictor.predict("photo.jpg", boxes=[[10, 20, 200, 300]], vocabulary=["cat", "cup"])
        >>> predictor.set_image("photo.jpg").predict(points=[[80, 90]], vocabulary=["cat", "cup"])
    """

    def __init__(
        self,
        model: RegionSpot | RegionPipeline,
        cache_dir: str | Path | None = None,
        clean_coco_suffixes: bool = False,
    ) -> None:
        self.model = model
        self.pipeline = as_pipeline(model)
        self._cache_dir, self._clean_coco_suffixes = cache_dir, clean_coco_suffixes
        self._sam_transform = SamTransform(self.pipeline.info.sam_image_size)
        self._clip_transform = ClipTransform(self.pipeline.info.clip_image_size)
        self._vocabulary: tuple[str, Vocabulary] | None = (
            None  # the last one, and of which text tower
        )
        self._encoder: tuple[str, VocabularyEncoder] | None = None
        self._image: EncodedPicture | None = None  # set by the thread that made this predictor
        self._of_thread = threading.local()
        self._of_thread.is_maker = (
            True  # not the thread's number, which a later thread may have again
        )

    def __reduce__(
        self,
    ) -> tuple[type[RegionPredictor], tuple[RegionSpot | RegionPipeline, str | Path | None, bool]]:
        return type(self), (self.model, self._cache_dir, self._clean_coco_suffixes)

    def encode(self, image: ImageSource | EncoderInputs) -> EncodedPicture:
        """Reads an image (see `read_image`) and runs both encoders on it, for `predict` or
        `set_image`, now or later.

        Args:
            image: also one that was resized before, perhaps in another process; its sizes must be
                this model's.

        Raises:
            InputError: the image cannot be used.
        """
        if not isinstance(image, EncoderInputs):
            with self.pipeline.observer("preprocess"):
                image = EncoderInputs.of(
                    read_image(image), self._sam_transform, self._clip_transform
                )
        encoded, patch_tokens = self.pipeline.encode(
            image.sam_image[None], [image.input_size], image.clip_image[None]
        )
        return EncodedPicture(
            height=image.height,
            width=image.width,
            encoded=encoded,
            patch_tokens=patch_tokens,
            clip_fingerprint=self.pipeline.clip_fingerprint(),
        )

    def set_image(self, image: ImageSource | EncodedPicture) -> RegionPredictor:
        """Sets the image that this thread asks about from now on; returns self.

        Raises:
            InputError: as `encode`, or encoded by another model. An image that was set before
                stays.
        """
        encoded = self._encoded(image)
        self._of_thread.image = encoded
        if getattr(self._of_thread, "is_maker", False):
            self._image = encoded
        return self

    def predict(
        self,
        image: ImageSource | EncodedPicture | None = None,
        *,
        vocabulary: Sequence[str] | str | Vocabulary,
        boxes: npt.ArrayLike | None = None,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        masks: npt.ArrayLike | None = None,
        prompts: Prompts | Sequence[Prompts] | None = None,
        top_k: int = 5,
        multimask: bool = False,
        return_masks: bool = True,
        mask_chunk: int = 16,
    ) -> RegionPredictions:
        """Recognises regions of an image.

        All regions of one call attend to each other in the head, so the scores of a region depend
        on the other regions of the call. Coordinates are pixels of the original image.

        Args:
            image: a path, bytes, an array or a Pillow image (see `read_image`), or the result of
                `encode`; None uses the image of `set_image`. Does not affect later calls.
            vocabulary: class names to choose from: a list, one string ("cat,dog", a file or a
                preset, see `parse_vocabulary`), or a `Vocabulary` with its embeddings.
            boxes: (N, 4) xyxy; parts outside the image are clipped.
            points: (N, 2), or (N, P, 2) for P points on each region.
            point_labels: (N,) or (N, P), 1 for foreground (the default), 0 for background.
            masks: (N, H, W) bool, at the image's size.
            prompts: instead of boxes, points and masks: the regions as `Prompts`, or several of
                them in a list, since the regions of one have the same number of points. Those that
                `Prompts.validated` has checked for an image of this size are not checked again.
            top_k: number of best classes to return.
            multimask: classify all three of SAM's masks of each prompt (whole, part, subpart): each
                prompt has three results in a row. The same mask token of all prompts is classified
                together. Without it, a head that was trained on these tokens classifies the one
                with the highest predicted IoU.
            return_masks: also return SAM's mask of each region. Recognition does not need it.
            mask_chunk: number of prompts whose masks are decoded at once; bounds memory and changes
                no result.

        Returns:
            Regions in the order boxes, points, masks, or in that of `prompts`. The box of a point
            is the box of its mask if masks are returned, otherwise the point itself.

        Raises:
            InputError: no image given or set, an image that another model encoded, no prompt, an
                invalid prompt (see `Prompts.validated`), invalid class names; with exported graphs
                also more regions than they accept, or masks as prompts.
            ArtifactError: the model's output is NaN.
        """
        top_k, mask_chunk = checked_count(top_k, "top_k"), checked_count(mask_chunk, "mask_chunk")
        given = _given_prompts(prompts, boxes, points, point_labels, masks)
        encoded = self._encoded(self._image_of_this_thread() if image is None else image)
        valid = [part.validated(encoded.height, encoded.width) for part in given]
        self.pipeline.check_num_regions(sum(map(len, valid)))
        if any(len(part) and part.mask_inputs is not None for part in valid):
            self.pipeline.check_mask_prompts()
        words = self._encode_vocabulary(vocabulary)
        readings = multimask or self.pipeline.info.multimask
        parts = [self._no_regions(readings)]
        for kind in valid:
            step = mask_chunk if return_masks else max(len(kind), 1)
            chunks = [kind[start : start + step] for start in range(0, len(kind), step)]
            parts += [self._decode(encoded, chunk, readings, return_masks) for chunk in chunks]
        found = _Regions.concatenate(parts)
        logits = self._classify(encoded, found.tokens, words)  # (N, T, V)
        if readings and not multimask:
            logits = best_reading(logits, found.iou_predictions)[:, None]
            found = found.best()  # T is 1 now
        top_scores, top_class_ids = best_classes(
            softmax(logits.reshape(-1, len(words))), top_k
        )  # (N * T, K)
        return RegionPredictions(
            image_height=encoded.height,
            image_width=encoded.width,
            boxes=found.boxes,
            class_names=words.names,
            scores=top_scores[:, 0],
            class_ids=top_class_ids[:, 0],
            top_class_ids=top_class_ids,
            top_scores=top_scores,
            masks=found.masks if return_masks else None,
            iou_predictions=found.iou_predictions.flatten(),  # (N * T,)
        )

    def _encoded(self, image: ImageSource | EncodedPicture) -> EncodedPicture:
        """Encodes what is not encoded yet. Raises InputError for what another model encoded."""
        if not isinstance(image, EncodedPicture):
            return self.encode(image)
        self.pipeline.check_encoded(image.encoded)
        if image.clip_fingerprint != self.pipeline.clip_fingerprint():
            raise InputError(
                "this image was encoded by another CLIP, or by other weights, precision or "
                "runtime, than this model's: encode it again with this predictor"
            )
        return image

    def _image_of_this_thread(self) -> EncodedPicture:
        image = getattr(self._of_thread, "image", None) or self._image
        if image is None:
            raise InputError(
                "no image is set for this thread: call predict(image, ...), or set_image(image) in "
                "this thread before"
            )
        return image

    def _vocabulary_encoder(self, fingerprint: str) -> VocabularyEncoder:
        """The encoder of the text tower with this fingerprint, by which its store is found."""
        last = self._encoder  # read once: another thread may replace it
        if last is None or last[0] != fingerprint:
            encoder = VocabularyEncoder(
                self.model.text_encoder,
                self._cache_dir,
                clean_coco_suffixes=self._clean_coco_suffixes,
            )
            self._encoder = last = fingerprint, encoder
        return last[1]

    def _encode_vocabulary(self, vocabulary: Sequence[str] | str | Vocabulary) -> Vocabulary:
        if isinstance(vocabulary, Vocabulary):
            if vocabulary.embeddings.shape[1] != self.pipeline.info.embed_dim:
                raise InputError(
                    f"the vocabulary's embeddings have {vocabulary.embeddings.shape[1]} numbers "
                    f"each, this model needs {self.pipeline.info.embed_dim}: encode the words with "
                    "this model's own CLIP"
                )
            return vocabulary
        names = (
            parse_vocabulary(vocabulary)
            if isinstance(vocabulary, str)
            else as_class_names(vocabulary)
        )
        fingerprint = self.pipeline.fingerprint("clip_text_encoder")
        last = self._vocabulary  # read once: another thread may replace it
        if last is None or last[0] != fingerprint or last[1].names != names:
            self._vocabulary = last = (
                fingerprint,
                self._vocabulary_encoder(fingerprint).encode(names),
            )
        return last[1]

    def _no_regions(self, multimask: bool) -> _Regions:
        tokens = np.zeros((0, 3 if multimask else 1, self.pipeline.info.token_dim), np.float32)
        return _Regions(tokens, tokens[..., 0], np.zeros((0, 4), np.float32), ())

    def _decode(
        self, image: EncodedPicture, prompts: Prompts, multimask: bool, return_masks: bool
    ) -> _Regions:
        transform, mask_inputs = self._sam_transform, None
        points = transform.apply_points(prompts.points, image.height, image.width)  # (n, P, 2)
        if prompts.mask_inputs is not None:
            mask_inputs = transform.apply_masks(prompts.mask_inputs, self.pipeline.info.mask_size)[
                None
            ]
        asked = (image.encoded, points[None], prompts.labels[None], multimask, mask_inputs)
        if not return_masks:
            tokens, ious = self.pipeline.mask_tokens(*asked)
            return _Regions(tokens[0], ious[0], _repeat(prompts.boxes, ious.shape[2]), ())
        low_res_masks, tokens, ious = self.pipeline.low_res_masks(*asked)  # (1, n, T, 4h, 4w)
        boxes, masks = self._draw_masks(image, prompts, low_res_masks[0])
        return _Regions(tokens[0], ious[0], boxes, masks)

    def _draw_masks(
        self, image: EncodedPicture, prompts: Prompts, low_res_masks: FloatArray
    ) -> tuple[FloatArray, tuple[Rle, ...]]:
        """(n, T, 4h, 4w) to boxes (n * T, 4) and masks; where a prompt has no box, that of its mask
        if there is one.
        """
        readings = low_res_masks.shape[1]
        with self.pipeline.observer("encode_masks"):
            masks = self._sam_transform.encode_masks(
                low_res_masks.reshape(-1, *low_res_masks.shape[2:]), image.height, image.width
            )
        of_prompts = _repeat(prompts.boxes, readings)
        has_box = _repeat((prompts.labels == BOX_TOP_LEFT).any(1), readings)
        keep = has_box | (masks.areas == 0)
        return np.where(keep[:, None], of_prompts, masks.boxes), masks.rles

    def _classify(self, image: EncodedPicture, tokens: FloatArray, words: Vocabulary) -> FloatArray:
        """(N, T, C) to logits (N, T, V). Raises ArtifactError where they are not finite."""
        logits: FloatArray = self.pipeline.classify_readings(
            tokens[None], image.patch_tokens, None, words.embeddings
        )[0]
        if not np.isfinite(logits).all():
            raise ArtifactError(
                "the model answers with NaN: its weights are damaged, or half precision overflowed"
            )
        return logits


def _repeat(rows: npt.NDArray[Scalar], times: int) -> npt.NDArray[Scalar]:
    """(n, ...) to (n * times, ...), the repetitions of a row side by side."""
    return np.repeat(rows, times, axis=0)


def _given_prompts(
    prompts: Prompts | Sequence[Prompts] | None,
    boxes: npt.ArrayLike | None,
    points: npt.ArrayLike | None,
    point_labels: npt.ArrayLike | None,
    masks: npt.ArrayLike | None,
) -> tuple[Prompts, ...]:
    """The regions of a call, whichever way they are given."""
    if prompts is None:
        return as_prompts(boxes, points, point_labels, masks)
    arrays = (boxes, points, point_labels, masks)
    if any(array is not None for array in arrays):
        raise InputError(
            "regions were given as prompts and as arrays: give prompts, or boxes, points and masks"
        )
    parts = [prompts] if isinstance(prompts, Prompts) else prompts
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Prompts) for part in parts):
        raise InputError(
            "prompts must be Prompts or a list of them: build them with from_boxes, from_points, "
            "from_masks"
        )
    return tuple(parts)


def as_pipeline(model: RegionSpot | RegionPipeline) -> RegionPipeline:
    """A pipeline over a model, for which PyTorch is loaded; a pipeline as it is. Raises as
    `pipeline_from_model`.
    """
    if isinstance(model, RegionPipeline):
        return model
    from regionspot.modeling.pipelines import pipeline_from_model

    return pipeline_from_model(model)

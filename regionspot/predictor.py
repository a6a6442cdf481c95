"""Recognise regions of a picture: encode it once, then ask as often as you like, with any regions and any words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regionspot.errors import ArtifactError, InputError
from regionspot.masks import encode_rle, mask_to_box
from regionspot.modeling.regionspot import RegionSpot
from regionspot.structures import BOX_TOP_LEFT, FloatArray, Prompts, RegionPredictions, Rle, Vocabulary
from regionspot.transforms import ClipTransform, ImageSource, SamTransform, UInt8Array, read_image
from regionspot.vocabulary import VocabularyEncoder, parse_vocabulary

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class _EncodedImage:
    height: int
    width: int
    image_embeddings: Tensor  # (1, C, h, w)
    patch_tokens: Tensor  # (1, L, D)


@dataclass(frozen=True, eq=False)
class _Regions:
    """What SAM says about n prompts, T tokens each."""

    tokens: Tensor  # (n, T, C)
    iou_predictions: Tensor  # (n, T)
    boxes: FloatArray  # (n * T, 4)
    masks: tuple[Rle, ...]  # n * T, or none


class RegionPredictor:
    """Names regions of one picture after another.

    >>> predictor = RegionPredictor(model).set_image("photo.jpg")  # doctest: +SKIP
    >>> predictor.predict(boxes=[[10, 20, 200, 300]], vocabulary=["cat", "coffee cup"])  # doctest: +SKIP

    Args:
        model: on any device; the work is done there.
        cache_dir: where embeddings of class names are kept, see `VocabularyEncoder`.
    """

    def __init__(self, model: RegionSpot, cache_dir: str | Path | None = None) -> None:
        self.model = model
        self._cache_dir = cache_dir
        self._sam_transform = SamTransform(model.sam.image_size)
        self._clip_transform = ClipTransform(model.clip.image_size)
        self._image: _EncodedImage | None = None
        self._vocabulary: Vocabulary | None = None

    def set_image(self, image: ImageSource) -> RegionPredictor:
        """Read a picture (see `read_image`) and run both encoders on it; returns self.

        Raises:
            InputError: the picture cannot be used. One that was set before stays.
        """
        pixels = read_image(image)
        sam_image, input_size = self._sam_transform.apply_image(pixels)
        with self.model.inference():
            self._image = _EncodedImage(
                height=pixels.shape[0],
                width=pixels.shape[1],
                image_embeddings=self.model.sam.encode_image(
                    self._as_batch(sam_image), torch.tensor([input_size], device=self.model.device)
                ),
                patch_tokens=self.model.clip.encode_image(self._as_batch(self._clip_transform.apply_image(pixels))),
            )
        return self

    def predict(
        self,
        *,
        vocabulary: Sequence[str] | str | Vocabulary,
        boxes: npt.ArrayLike | None = None,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        masks: npt.ArrayLike | None = None,
        top_k: int = 5,
        multimask: bool = False,
        return_masks: bool = True,
        mask_chunk: int = 16,
    ) -> RegionPredictions:
        """Name regions of the picture that was set.

        All regions of one call see each other in the head's self-attention, so the scores of a region depend on the
        company it is in. Coordinates are pixels of the original picture.

        Args:
            vocabulary: the words to choose from: a list, one string ("cat,dog", a file or a preset, see
                `parse_vocabulary`), or a `Vocabulary` with its embeddings.
            boxes: (N, 4) xyxy; parts outside the picture are cut off.
            points: (N, 2), or (N, K, 2) for K clicks on each region.
            point_labels: (N,) or (N, K), 1 for foreground (the default), 0 for background.
            masks: (N, H, W) bool, at the picture's size.
            top_k: how many of the best classes to report.
            multimask: ask SAM for three readings of each prompt (whole, part, subpart) and name each: there are three
                results in a row for each prompt. The same reading of all prompts is classified together.
            return_masks: also draw SAM's mask of each region. Recognition does not need it.
            mask_chunk: how many prompts' masks are decoded at once; it bounds memory and changes no result.

        Returns:
            Regions in the order boxes, points, masks. The box of a point is that of its mask where masks are returned,
            else the point itself.

        Raises:
            InputError: no picture set, no prompt given, an impossible one (see `Prompts.validated`), bad words.
        """
        image = self._image
        if image is None:
            raise InputError("no image is set: call set_image(image) before predict(...)")
        if top_k < 1 or mask_chunk < 1:
            raise InputError(f"top_k and mask_chunk must be 1 or more, got {top_k} and {mask_chunk}")
        prompts = [part.validated(image.height, image.width) for part in _prompts(boxes, points, point_labels, masks)]
        words = self._encode_vocabulary(vocabulary)
        with self.model.inference():
            parts = [self._no_regions(multimask)]
            for kind in prompts:
                step = mask_chunk if return_masks else max(len(kind), 1)
                chunks = [kind[start : start + step] for start in range(0, len(kind), step)]
                parts += [self._decode(image, chunk, multimask, return_masks) for chunk in chunks]
            logits = self._classify(image, torch.cat([part.tokens for part in parts]), words)  # (N * T, V)
            ious = torch.cat([part.iou_predictions for part in parts]).flatten()  # (N * T,)
        top_scores, top_class_ids = logits.softmax(-1).topk(min(top_k, len(words)))  # (N * T, K)
        return RegionPredictions(
            image_height=image.height,
            image_width=image.width,
            boxes=np.concatenate([part.boxes for part in parts]),
            class_names=words.names,
            scores=top_scores[:, 0].cpu().numpy(),
            class_ids=top_class_ids[:, 0].cpu().numpy(),
            top_class_ids=top_class_ids.cpu().numpy(),
            top_scores=top_scores.cpu().numpy(),
            masks=sum((part.masks for part in parts), ()) if return_masks else None,
            iou_predictions=ious.float().cpu().numpy(),
        )

    @cached_property
    def _vocabulary_encoder(self) -> VocabularyEncoder:
        return VocabularyEncoder(self.model.clip, self._cache_dir)

    def _as_batch(self, pixels: UInt8Array) -> Tensor:
        return torch.from_numpy(pixels).to(self.model.device).permute(2, 0, 1)[None]  # (1, 3, S, S)

    def _encode_vocabulary(self, vocabulary: Sequence[str] | str | Vocabulary) -> Vocabulary:
        if isinstance(vocabulary, Vocabulary):
            if vocabulary.embeddings.shape[1] != self.model.clip.embed_dim:
                raise InputError(
                    f"the vocabulary's embeddings have {vocabulary.embeddings.shape[1]} numbers each, this model needs "
                    f"{self.model.clip.embed_dim}: encode the words with this model's own CLIP"
                )
            return vocabulary
        names = parse_vocabulary(vocabulary) if isinstance(vocabulary, str) else tuple(vocabulary)
        if self._vocabulary is None or self._vocabulary.names != names:
            self._vocabulary = self._vocabulary_encoder.encode(names)
        return self._vocabulary

    def _no_regions(self, multimask: bool) -> _Regions:
        tokens = torch.zeros(0, 3 if multimask else 1, self.model.sam.token_dim, device=self.model.device)
        return _Regions(tokens, tokens[..., 0], np.zeros((0, 4), np.float32), ())

    def _decode(self, image: _EncodedImage, prompts: Prompts, multimask: bool, return_masks: bool) -> _Regions:
        sam, transform, size = self.model.sam, self._sam_transform, (image.height, image.width)
        points = torch.from_numpy(transform.apply_points(prompts.points, *size)).to(self.model.device)  # (n, P, 2)
        labels = torch.from_numpy(prompts.labels).to(self.model.device)  # (n, P)
        mask_inputs = None
        if prompts.mask_inputs is not None:
            mask_logits = transform.apply_masks(prompts.mask_inputs, sam.mask_size)  # (n, 1, 4h, 4w)
            mask_inputs = torch.from_numpy(mask_logits).to(self.model.device)[None]
        asked = (image.image_embeddings, points[None], labels[None], multimask, mask_inputs)
        if not return_masks:
            found = sam.mask_tokens(*asked)
            return _Regions(
                found.tokens[0], found.iou_predictions[0], _repeat(prompts.boxes, found.tokens.shape[2]), ()
            )
        low_res_masks, found = sam.low_res_masks(*asked)  # (1, n, T, 4h, 4w)
        boxes, masks = self._draw_masks(image, prompts, low_res_masks[0])
        return _Regions(found.tokens[0], found.iou_predictions[0], boxes, masks)

    def _draw_masks(
        self, image: _EncodedImage, prompts: Prompts, low_res_masks: Tensor
    ) -> tuple[FloatArray, tuple[Rle, ...]]:
        """(n, T, 4h, 4w) to boxes (n * T, 4) and masks, one at a time: at the picture's size they may be large."""
        readings = low_res_masks.shape[1]
        boxes = _repeat(prompts.boxes, readings)
        has_box = _repeat((prompts.labels == BOX_TOP_LEFT).any(1), readings)
        masks: list[Rle] = []
        low_res = low_res_masks.flatten(0, 1).float().cpu().numpy()  # (n * T, 4h, 4w)
        for index, mask in enumerate(self._sam_transform.upscale_masks(low_res, image.height, image.width)):
            masks.append(encode_rle(mask))
            if not has_box[index] and mask.any():
                boxes[index] = mask_to_box(mask)
        return boxes, tuple(masks)

    def _classify(self, image: _EncodedImage, tokens: Tensor, words: Vocabulary) -> Tensor:
        """(N, T, C) to logits (N * T, V). Each of the T readings is a set of regions of its own."""
        readings = tokens.transpose(0, 1)  # (T, N, C)
        patch_tokens = image.patch_tokens.expand(len(readings), -1, -1)  # (T, L, D)
        text_embeddings = torch.from_numpy(words.embeddings).to(self.model.device)  # (V, E)
        logits = self.model.classify(readings, patch_tokens, text_embeddings)  # (T, N, V)
        if not logits.isfinite().all():
            raise ArtifactError("the model answers with NaN: its weights are damaged, or half precision overflowed")
        return logits.transpose(0, 1).flatten(0, 1)  # (N * T, V)


def _repeat(rows: npt.NDArray[Scalar], times: int) -> npt.NDArray[Scalar]:
    """(n, ...) to (n * times, ...), the repetitions of a row side by side."""
    return np.repeat(rows, times, axis=0)


def _prompts(
    boxes: npt.ArrayLike | None,
    points: npt.ArrayLike | None,
    point_labels: npt.ArrayLike | None,
    masks: npt.ArrayLike | None,
) -> list[Prompts]:
    """One Prompts for each kind that was given."""
    if boxes is None and points is None and masks is None:
        raise InputError("no region was asked for: give boxes, points or masks (an empty list is fine)")
    if point_labels is not None and points is None:
        raise InputError("point_labels were given without points: give both, or neither")
    prompts = []
    if boxes is not None:
        prompts.append(Prompts.from_boxes(boxes))
    if points is not None:
        prompts.append(Prompts.from_points(points, point_labels))
    if masks is not None:
        prompts.append(Prompts.from_masks(masks))
    return prompts

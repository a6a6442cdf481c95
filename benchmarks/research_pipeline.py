"""RegionSpot as research code runs it, on `segment_anything`'s own predictor, and CLIP on box crops
beside it.

The only file of benchmarks/ that imports `segment_anything` and `pycocotools`. The weights are the
same modules that RegionSpot's own predictor uses; what differs is how the work is put.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regionspot.benchmarks.baseline import Outcome
from regionspot.benchmarks.stages import Stages
from regionspot.evaluation.baselines import CropSetting
from regionspot.images import read_image
from regionspot.masks import Rle
from regionspot.modeling.losses import region_logits
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone  # makes segment_anything importable
from regionspot.structures import FloatArray, UInt8Array
from regionspot.transforms import ClipTransform, crop_boxes

# isort: split
from segment_anything import SamPredictor

CROP_BATCH = 32
"""Crops that go through CLIP together."""


class SegmentAnything:
    """`SamPredictor` as its users call it: all boxes of a picture in one batch, their masks at the
    picture's size.

    Hooks take the mask tokens, and tell its stages apart. Masks are drawn and enlarged whether they
    are wanted or not.
    """

    def __init__(self, sam: SamBackbone, stages: Stages) -> None:
        self.predictor, self.stages = SamPredictor(sam.sam), stages
        self._tokens: list[Tensor] = []
        encoder, transformer = sam.sam.image_encoder, sam.sam.mask_decoder.transformer
        encoder.register_forward_pre_hook(lambda *_: stages.begin("sam_encoder"))
        encoder.register_forward_hook(lambda *_: stages.end())
        transformer.register_forward_hook(self._after_transformer)

    def set_image(self, picture: UInt8Array) -> None:
        """Resize and encode a picture (H, W, 3)."""
        with self.stages.of("decode_resize"):
            self.predictor.set_image(picture)

    def segment(self, boxes: FloatArray) -> tuple[Tensor, Tensor]:
        """Mask tokens (N, C) and masks (N, H, W) bool of boxes (N, 4) in the picture's pixels."""
        asked = self.predictor.transform.apply_boxes_torch(
            torch.from_numpy(boxes), self.predictor.original_size
        )
        with self.stages.of("token_decoder"):  # until the transformer's hook
            masks, _, _ = self.predictor.predict_torch(
                None, None, boxes=asked, multimask_output=False
            )
        return self._tokens.pop(), masks[:, 0]

    def _after_transformer(self, _module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._tokens.append(output[0][:, 1].clone())  # (N, C); row 0 is the IoU token
        self.stages.switch("masks")


class Research:
    """The research pipeline: SAM's predictor, CLIP's feature map and the head, eager and in
    float32.
    """

    in_torch = True

    def __init__(self, model: RegionSpot, words: FloatArray, draw: bool) -> None:
        self.stages = Stages()
        self.model, self.words, self.draw = model, torch.from_numpy(words), draw
        self.sam = SegmentAnything(model.sam, self.stages)
        self.clip_transform = ClipTransform(model.clip.image_size)

    def __call__(self, picture: bytes, boxes: FloatArray) -> Outcome:
        with self.model.inference(), self.stages.of("other"):
            tokens, masks, patch_tokens = self._look(picture, boxes)
            with self.stages.of("head"):
                logits = self.model.classify(tokens[None], patch_tokens, self.words)[0]  # (N, V)
                scores = logits.softmax(-1).numpy()
            return Outcome(scores, self._encode(masks))

    def mask_tokens(self, picture: bytes, boxes: FloatArray) -> Tensor:
        """(N, C): what goes into the head."""
        with self.model.inference(), self.stages.of("other"):
            return self._look(picture, boxes)[0]

    def _look(self, picture: bytes, boxes: FloatArray) -> tuple[Tensor, Tensor, Tensor]:
        """Mask tokens (N, C), masks (N, H, W), CLIP's tokens (1, L, D)."""
        with self.stages.of("decode_resize"):
            pixels = read_image(picture)
            clip_image = self.clip_transform.apply_image(pixels)
        self.sam.set_image(pixels)
        tokens, masks = self.sam.segment(boxes)
        with self.stages.of("clip_encoder"):
            patch_tokens = self.model.clip.encode_image(_stack([clip_image]))
        return tokens, masks, patch_tokens

    def _encode(self, masks: Tensor) -> tuple[Rle, ...]:
        with self.stages.of("masks"):
            return encode_masks(masks) if self.draw else ()


class ClipCrops:
    """CLIP's image embedding of each box, cut out 1.3 times as large; where masks are wanted, SAM's
    predictor draws.
    """

    in_torch = True

    def __init__(self, model: RegionSpot, words: FloatArray, draw: bool) -> None:
        self.stages = Stages()
        self.clip, self.words, self.draw = model.clip, torch.from_numpy(words), draw
        self.sam = SegmentAnything(model.sam, self.stages) if draw else None
        self.transform = ClipTransform(model.clip.image_size)

    @torch.inference_mode()
    def __call__(self, picture: bytes, boxes: FloatArray) -> Outcome:
        with self.stages.of("other"):
            with self.stages.of("decode_resize"):
                pixels = read_image(picture)
            crops = crop_boxes(pixels, boxes, CropSetting().scale)
            batches = [
                crops[start : start + CROP_BATCH] for start in range(0, len(crops), CROP_BATCH)
            ]
            scores = torch.cat([self._classify(batch) for batch in batches])
            return Outcome(scores.numpy(), self._draw(pixels, boxes))

    def _classify(self, crops: list[UInt8Array]) -> Tensor:
        """Scores (n, V) of a batch of crops."""
        with self.stages.of("decode_resize"):
            images = _stack([self.transform.apply_image(crop) for crop in crops])
        with self.stages.of("clip_encoder"):
            embeddings = self.clip.pool(self.clip.encode_image(images))  # (n, E)
            return region_logits(embeddings, self.words, self.clip.logit_scale).softmax(-1)

    def _draw(self, pixels: UInt8Array, boxes: FloatArray) -> tuple[Rle, ...]:
        if self.sam is None:
            return ()
        self.sam.set_image(pixels)
        _, masks = self.sam.segment(boxes)
        with self.stages.of("masks"):
            return encode_masks(masks)


def encode_masks(masks: Tensor) -> tuple[Rle, ...]:
    """(N, H, W) bool to COCO's run lengths, by the COCO API."""
    from pycocotools import mask as coco

    found = (coco.encode(np.asfortranarray(mask)) for mask in masks.to(torch.uint8).numpy())
    return tuple(
        {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in found
    )


def _stack(images: list[UInt8Array]) -> Tensor:
    """Pictures (S, S, 3) to one tensor (n, 3, S, S)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

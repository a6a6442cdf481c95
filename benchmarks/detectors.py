"""Open-vocabulary detectors to compare with, of the true sizes, with random weights: time and
memory need no others.

The only file that imports `transformers`. Pictures are prepared as its own processors do, without
their torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regionspot.benchmarks.baseline import Outcome
from regionspot.benchmarks.stages import Stages
from regionspot.images import read_image
from regionspot.modeling.torchvision_shim import import_safely
from regionspot.structures import FloatArray, UInt8Array
from regionspot.transforms import resize_image

import_safely()

from transformers import (  # noqa: E402
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
)

SHORTEST_SIDE, LONGEST_SIDE = 800, 1333
"""Grounding DINO's pictures: the shortest side is this long, unless the longest would exceed the
other.
"""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OWL_SIDE = 960
OWL_PADDING = 128  # mid-grey

BERT_CLS, BERT_SEP, BERT_STOP = 101, 102, 1012
BERT_WORDS = (2000, 30000)  # ids of ordinary words
TOKENS_OF_A_WORD = 3
"""Two and a full stop: COCO's 80 names take 195 tokens in all."""


def build(
    name: str, seed: int, **config: Any
) -> GroundingDinoForObjectDetection | Owlv2ForObjectDetection:
    """A detector with random weights: Grounding DINO with Swin-T, or OWLv2 base with patches of 16
    pixels at 960 x 960.

    Args:
        name: "grounding_dino" or "owlv2".
        config: what is to differ from that, for tests.
    """
    torch.manual_seed(seed)
    if name == "grounding_dino":
        return GroundingDinoForObjectDetection(GroundingDinoConfig(**config)).eval()
    return Owlv2ForObjectDetection(
        Owlv2Config(**{"vision_config": {"image_size": OWL_SIDE}, **config})
    ).eval()


class Detector:
    """From a picture's bytes to scores (N, V) of the N regions that it finds, whatever boxes it is
    given.

    Args:
        model: from `build`.
        words: V. Their tokens are random, of the right number; Grounding DINO takes them in several
            passes where they are too many for its text.
    """

    in_torch = True

    def __init__(self, model: Any, words: int, seed: int) -> None:
        self.stages = Stages()
        self.model, self.words = model, words
        self.detect: Callable[[UInt8Array], Tensor]
        rng = np.random.default_rng(seed)
        if isinstance(model, GroundingDinoForObjectDetection):
            self.detect = self._grounding_dino
            self.texts = grounding_texts(words, model.config.max_text_len, rng)
        else:
            embeddings = torch.from_numpy(
                rng.standard_normal((1, words, model.config.projection_dim), np.float32)
            )
            self.detect = self._owlv2
            self.queries = embeddings / embeddings.norm(dim=-1, keepdim=True)

    @torch.inference_mode()
    def __call__(self, picture: bytes, boxes: FloatArray) -> Outcome:
        with self.stages.of("decode_resize"):
            pixels = read_image(picture)
            scores = self.detect(pixels).sigmoid()
        return Outcome(scores.numpy())

    def _grounding_dino(self, pixels: UInt8Array) -> Tensor:
        """(900, V) logits, of a word its first token's. Text is fused with the picture, so it is
        encoded here.
        """
        image = _normalised(
            resize_image(pixels, *grounding_size(*pixels.shape[:2])), IMAGENET_MEAN, IMAGENET_STD
        )
        found = []
        with self.stages.of("detector"):
            for tokens in self.texts:
                logits = self.model(pixel_values=image, input_ids=tokens).logits[0]  # (900, 256)
                found.append(logits[:, 1 : tokens.shape[1] - 1 : TOKENS_OF_A_WORD])
        return torch.cat(found, dim=1)

    def _owlv2(self, pixels: UInt8Array) -> Tensor:
        """(M, V) logits of M patches, with the words' embeddings given; boxes and objectness are
        computed as well.
        """
        side = self.model.config.vision_config.image_size
        image = _normalised(
            resize_image(_padded_to_square(pixels), side, side), CLIP_MEAN, CLIP_STD
        )
        with self.stages.of("detector"):
            feature_map, _ = self.model.image_embedder(pixel_values=image)
            patches = feature_map.flatten(1, 2)  # (1, M, width)
            logits, _ = self.model.class_predictor(
                patches, self.queries, torch.ones(1, self.words, dtype=torch.bool)
            )
            self.model.objectness_predictor(patches)
            self.model.box_predictor(patches, feature_map)
        return logits[0]


def grounding_texts(words: int, longest: int, rng: np.random.Generator) -> list[Tensor]:
    """Token ids (1, T) of so many passes as V words take, T at most `longest`."""
    of_a_pass = (longest - 2) // TOKENS_OF_A_WORD
    texts = []
    for start in range(0, words, of_a_pass):
        ids = rng.integers(*BERT_WORDS, (min(of_a_pass, words - start), TOKENS_OF_A_WORD))
        ids[:, -1] = BERT_STOP
        texts.append(torch.tensor([[BERT_CLS, *ids.ravel().tolist(), BERT_SEP]]))
    return texts


def grounding_size(height: int, width: int) -> tuple[int, int]:
    """Height and width to which Grounding DINO resizes a picture."""
    scale = min(SHORTEST_SIDE / min(height, width), LONGEST_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _padded_to_square(pixels: UInt8Array) -> UInt8Array:
    """Right or below, as OWLv2 was trained."""
    height, width = pixels.shape[:2]
    square = np.full((max(height, width),) * 2 + (3,), OWL_PADDING, np.uint8)
    square[:height, :width] = pixels
    return square


def _normalised(pixels: UInt8Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(H, W, 3) to (1, 3, H, W) float."""
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return scaled.permute(2, 0, 1)[None].contiguous()

"""The whole model: two frozen towers and the head between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regionspot.errors import InputError
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.head import RegionHead
from regionspot.modeling.losses import region_logits
from regionspot.modeling.sam import SamBackbone
from regionspot.runtime.torch_runner import evaluating


class RegionSpot(nn.Module):
    """A frozen SAM, a frozen CLIP and the trained head (arXiv 2311.01373, figure 2).

    `train()` switches only the head to training mode; only the head's parameters require gradients.

    Args:
        sam: frozen image encoder and mask decoder.
        clip: frozen image and text encoders.
        head: made for these two by `RegionHead(sam.token_dim, clip.width, clip.embed_dim)`.
        name: name of this model in reports and artefacts.

    Raises:
        InputError: the head was made for other widths.
    """

    def __init__(
        self, sam: SamBackbone, clip: ClipBackbone, head: RegionHead, name: str = "regionspot"
    ) -> None:
        super().__init__()
        expected = (sam.token_dim, clip.width, clip.embed_dim)
        actual = (head.token_dim, head.clip_width, head.embed_dim)
        if expected != actual:
            raise InputError(
                f"the head takes {actual[0]}-d mask tokens and {actual[1]}-d CLIP tokens to "
                f"{actual[2]}-d embeddings, but these towers need {expected[0]}, {expected[1]} and "
                f"{expected[2]}: it was made for other backbones"
            )
        self.sam = sam
        self.clip = clip
        self.head = head
        self.name = name

    @property
    def text_encoder(self) -> ClipBackbone:
        """What `regionspot.vocabulary.VocabularyEncoder` encodes class names with."""
        return self.clip

    def classify(
        self,
        mask_tokens: Tensor,
        patch_tokens: Tensor,
        text_embeddings: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, N, V) of N regions of each of B images over V words.

        Args:
            mask_tokens: (B, N, C) from `sam.mask_tokens`, all regions of an image together.
            patch_tokens: (B, L, D) from `clip.encode_image`.
            text_embeddings: (V, E) unit rows.
            valid: (B, N) bool, False for padding; None if there is none.
        """
        region_embeddings = self.head(mask_tokens, patch_tokens, valid)  # (B, N, E)
        return region_logits(region_embeddings, text_embeddings, self.clip.logit_scale)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients and no dropout while it lasts; the head's mode is put back afterwards."""
        with torch.inference_mode(), evaluating(self.head):
            yield

    @property
    def device(self) -> torch.device:
        """Where the head's parameters are."""
        return next(self.head.parameters()).device

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The head's parameters, and nothing else."""
        return self.head.parameters()

"""SAM as RegionSpot uses it: an image encoder, and the mask decoder's tokens as position-aware region features.

The only module that imports `segment_anything`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regionspot.errors import InputError
from regionspot.modeling.freezing import Frozen, freeze
from regionspot.modeling.torchvision_shim import import_safely
from regionspot.modeling.weights import load_strictly, read_checkpoint

import_safely()

from segment_anything import sam_model_registry  # noqa: E402
from segment_anything.modeling import (  # noqa: E402
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

PADDING_LABEL = -1


class MaskTokens(NamedTuple):
    """What SAM's mask decoder says about each prompt.

    Attributes:
        tokens: (B, N, T, C) the decoder transformer's output at the mask-token rows, before the hypernetworks.
        iou_predictions: (B, N, T) the predicted IoU of the mask that belongs to each token.
    """

    tokens: Tensor
    iou_predictions: Tensor


class SamBackbone(Frozen):
    """A frozen Sam of any size.

    All coordinates are pixels of the SAM frame: the image resized so that its longest side is `image_size`, then
    padded right and bottom to a square (see `regionspot.transforms.SamTransform`).

    Args:
        sam: a `segment_anything` model. It is frozen in place.
        prompt_chunk: how many prompts go through the decoder at once. Each holds its own copy of the image tokens
            (4 MiB for a full-size SAM, several times over), so this bounds the memory; it changes no result.
    """

    def __init__(self, sam: Sam, prompt_chunk: int = 64) -> None:
        super().__init__()
        self.sam = freeze(sam)
        self.prompt_chunk = prompt_chunk

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.sam.image_encoder.img_size

    @property
    def token_dim(self) -> int:
        """C: channels of the image embedding and of each mask token."""
        return self.sam.mask_decoder.transformer_dim

    @property
    def embedding_size(self) -> tuple[int, int]:
        """(h, w) of the image embedding."""
        return self.sam.prompt_encoder.image_embedding_size

    @property
    def mask_size(self) -> tuple[int, int]:
        """(4h, 4w) of the low-resolution masks, as output and as prompt."""
        return self.sam.prompt_encoder.mask_input_size

    def encode_image(self, images: Tensor, input_sizes: Tensor) -> Tensor:
        """Image embeddings of padded images, normalised first and padded with zeros after, as SAM does.

        Args:
            images: (B, 3, S, S) uint8 or float RGB in 0..255, S = `image_size`.
            input_sizes: (B, 2) int, height and width of the part of each image that is not padding.

        Returns:
            (B, C, h, w).
        """
        return self.sam.image_encoder(normalise(self.sam, images, input_sizes))

    def mask_tokens(
        self,
        image_embeddings: Tensor,
        points: Tensor,
        labels: Tensor,
        multimask: bool = False,
        mask_inputs: Tensor | None = None,
    ) -> MaskTokens:
        """The position-aware token of each prompt (arXiv 2311.01373, section 3.2), without upscaling any mask.

        Unlike `segment_anything`'s own decoder, which is right for one image at a time, any (B, N) works, N = 0 too.

        Args:
            image_embeddings: (B, C, h, w) from `encode_image`.
            points: (B, N, P, 2) float xy in SAM-frame pixels.
            labels: (B, N, P) int in the convention of SAM's ONNX export: 1 foreground, 0 background, 2 and 3 a box's
                top-left and bottom-right corner, -1 padding. A prompt without a box carries at least one padding
                point, as SAM was trained.
            multimask: return mask tokens 1 to 3 (whole, part, subpart) instead of token 0 alone.
            mask_inputs: (B, N, 1, 4h, 4w) mask logits as dense prompts, or None.

        Returns:
            T = 3 tokens for each prompt with `multimask`, else 1.
        """
        tokens, iou_predictions = [], []
        for chunk in self._chunks(image_embeddings, points, labels, mask_inputs):
            decoded, _ = self._transform(*chunk)
            tokens.append(self._wanted(decoded[:, 1:], multimask))
            iou_predictions.append(self._predict_iou(decoded, multimask))
        return _gather(labels, tokens, iou_predictions)

    def low_res_masks(
        self,
        image_embeddings: Tensor,
        points: Tensor,
        labels: Tensor,
        multimask: bool = False,
        mask_inputs: Tensor | None = None,
    ) -> tuple[Tensor, MaskTokens]:
        """Masks beside the tokens; arguments as in `mask_tokens`.

        Returns:
            (B, N, T, 4h, 4w) float logits in the SAM frame at a quarter of the patch size, above 0 inside, and the
            tokens they were made from.
        """
        masks, tokens, iou_predictions = [], [], []
        for chunk in self._chunks(image_embeddings, points, labels, mask_inputs):
            decoded, image_tokens = self._transform(*chunk)
            tokens.append(self._wanted(decoded[:, 1:], multimask))
            iou_predictions.append(self._predict_iou(decoded, multimask))
            masks.append(self._draw_masks(tokens[-1], image_tokens, multimask))
        all_masks = torch.cat(masks).unflatten(0, labels.shape[:2])  # (B, N, T, 4h, 4w)
        return all_masks, _gather(labels, tokens, iou_predictions)

    def _chunks(
        self, image_embeddings: Tensor, points: Tensor, labels: Tensor, mask_inputs: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """All B * N prompts, each with its image embedding, `prompt_chunk` at a time; one empty chunk if N = 0."""
        batch, count, num_points = labels.shape
        image_index = torch.arange(batch, device=labels.device).unsqueeze(1).expand(batch, count).reshape(batch * count)
        points = points.reshape(batch * count, num_points, 2)
        labels = labels.reshape(batch * count, num_points)
        if mask_inputs is not None:
            mask_inputs = mask_inputs.reshape(batch * count, 1, *self.mask_size)
        for start in range(0, max(batch * count, 1), self.prompt_chunk):
            rows = slice(start, start + self.prompt_chunk)
            masks = None if mask_inputs is None else mask_inputs[rows]
            yield image_embeddings[image_index[rows]], points[rows], labels[rows], masks

    def _transform(
        self, image_embeddings: Tensor, points: Tensor, labels: Tensor, mask_inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """SAM's decoder transformer for n prompts: (n, 1 + 4 + P, C) IoU, mask and prompt tokens, (n, h*w, C) image."""
        encoder, decoder = self.sam.prompt_encoder, self.sam.mask_decoder
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])  # (1 + 4, C)
        output_tokens = output_tokens.expand(labels.shape[0], -1, -1)  # (n, 1 + 4, C)
        tokens = torch.cat([output_tokens, self._embed_points(points, labels)], dim=1)  # (n, 1 + 4 + P, C)
        if mask_inputs is None:
            dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        else:
            dense = encoder.mask_downscaling(mask_inputs)  # (n, C, h, w)
        return decoder.transformer(image_embeddings + dense, encoder.get_dense_pe(), tokens)

    def _embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """(n, P, 2), (n, P) to (n, P, C): SAM's `_embed_points` and `_embed_boxes` in one, in a form that traces."""
        encoder = self.sam.prompt_encoder
        positions = encoder.pe_layer._pe_encoding((points + 0.5) / self.image_size)  # (n, P, C), at pixel centres
        positions = torch.where((labels == PADDING_LABEL).unsqueeze(-1), 0.0, positions)
        kinds = [encoder.not_a_point_embed.weight, *(kind.weight for kind in encoder.point_embeddings)]
        return positions + torch.cat(kinds)[labels.long() - PADDING_LABEL]

    def _predict_iou(self, decoded: Tensor, multimask: bool) -> Tensor:
        return self._wanted(self.sam.mask_decoder.iou_prediction_head(decoded[:, 0]), multimask)

    def _wanted(self, of_masks: Tensor, multimask: bool) -> Tensor:
        """(n, 4 or more, ...) to (n, T, ...): what belongs to the mask tokens that were asked for."""
        return of_masks[:, 1 : self.sam.mask_decoder.num_mask_tokens] if multimask else of_masks[:, :1]

    def _draw_masks(self, tokens: Tensor, image_tokens: Tensor, multimask: bool) -> Tensor:
        """(n, T, C) and (n, h*w, C) to (n, T, 4h, 4w), through SAM's upscaling and the wanted tokens' hypernetworks."""
        decoder = self.sam.mask_decoder
        image = image_tokens.transpose(1, 2).unflatten(2, self.embedding_size)  # (n, C, h, w)
        upscaled = decoder.output_upscaling(image)  # (n, C / 8, 4h, 4w)
        networks = decoder.output_hypernetworks_mlps[1:] if multimask else decoder.output_hypernetworks_mlps[:1]
        weights = torch.stack([network(tokens[:, i]) for i, network in enumerate(networks)], dim=1)  # (n, T, C / 8)
        return (weights @ upscaled.flatten(2)).unflatten(2, self.mask_size)


def normalise(sam: Sam, images: Tensor, input_sizes: Tensor) -> Tensor:
    """SAM's pixels: normalised first, zero beyond each image's valid part after. Arguments as in `encode_image`.

    Returns:
        (B, 3, S, S).
    """
    pixels = (images.to(sam.pixel_mean.dtype) - sam.pixel_mean) / sam.pixel_std
    positions = torch.arange(images.shape[-1], device=images.device)
    rows = positions < input_sizes[:, :1]  # (B, S)
    columns = positions < input_sizes[:, 1:]  # (B, S)
    return pixels * (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def _gather(labels: Tensor, tokens: list[Tensor], iou_predictions: list[Tensor]) -> MaskTokens:
    shape = labels.shape[:2]
    return MaskTokens(torch.cat(tokens).unflatten(0, shape), torch.cat(iou_predictions).unflatten(0, shape))


def build_sam(size: str) -> Sam:
    """A `segment_anything` model with random weights.

    Args:
        size: "vit_b", "vit_l" or "vit_h".
    """
    if size not in ("vit_b", "vit_l", "vit_h"):
        raise InputError(f"there is no SAM of size {size!r}: choose vit_b, vit_l or vit_h")
    return sam_model_registry[size]()


def compose_sam(
    *,
    image_size: int,
    width: int,
    depth: int,
    num_heads: int,
    global_attention: Sequence[int],
    window_size: int,
    token_dim: int,
    decoder_mlp_dim: int,
    iou_head_dim: int,
    patch_size: int = 16,
) -> Sam:
    """A `segment_anything` model of sizes that its registry does not have, with random weights.

    Args:
        image_size, patch_size: pixels; the image embedding has `image_size / patch_size` cells a side.
        width, depth, num_heads: of the image encoder.
        global_attention: which of its blocks attend to the whole image; the others to windows of `window_size` cells.
        token_dim: channels of the image embedding, prompts and mask tokens.
        decoder_mlp_dim, iou_head_dim: hidden widths in the mask decoder.
    """
    cells = (image_size // patch_size, image_size // patch_size)
    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        out_chans=token_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window_size,
        global_attn_indexes=tuple(global_attention),
    )
    decoder = MaskDecoder(
        transformer_dim=token_dim,
        transformer=TwoWayTransformer(depth=2, embedding_dim=token_dim, num_heads=8, mlp_dim=decoder_mlp_dim),
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=iou_head_dim,
    )
    return Sam(encoder, PromptEncoder(token_dim, cells, (image_size, image_size), mask_in_chans=16), decoder)


def load_sam_weights(sam: nn.Module, path: str | Path) -> None:
    """Load SAM's official `.pth`, or the same state dict as `.safetensors`, into `sam`.

    Raises:
        ArtifactError: the file is missing, damaged, or made for another size; names the keys that differ.
    """
    load_strictly(sam, read_checkpoint(path), path)

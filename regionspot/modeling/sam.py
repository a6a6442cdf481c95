"""SAM as RegionSpot uses it: an image encoder, and the mask decoder's tokens as position-aware
region features.

The only module that imports `segment_anything`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from regionspot.errors import InputError
from regionspot.modeling.freezing import freeze
from regionspot.modeling.image_encoder import LARGE, encode_image
from regionspot.modeling.precision import PartlyHalf, in_dtype, in_single
from regionspot.modeling.token_decoder import PADDING_LABEL as PADDING_LABEL
from regionspot.modeling.token_decoder import ImageContext, MaskTokens, TokenDecoder
from regionspot.modeling.torchvision_shim import import_safely
from regionspot.modeling.weights import load_strictly, read_checkpoint
from regionspot.runtime.pipeline import CPU_PROMPT_CHUNK, GPU_PROMPT_CHUNK
from regionspot.runtime.torch_runner import without_autocast

import_safely()

from segment_anything import sam_model_registry  # noqa: E402
from segment_anything.modeling import (  # noqa: E402
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

SAMS: dict[str, Callable[[], Sam]] = {
    size: sam_model_registry[size] for size in ("vit_b", "vit_l", "vit_h")
}
"""Builders of SAMs with random weights, by name. See docs/how-to/add-an-encoder.md."""


class SamBackbone(PartlyHalf):
    """A frozen Sam of any size.

    All coordinates are pixels of the SAM frame: the image resized so that its longest side is
    `image_size`, then padded right and bottom to a square (see
    `regionspot.transforms.SamTransform`).

    Args:
        sam: a `segment_anything` model with its weights loaded. It is frozen in place. Weights that
            come later must come through this module's `load_state_dict`, or that of a model around
            it. Its `image_encoder` may be any module from normalised pixels (B, 3, S, S) to
            embeddings (B, C, h, w) of the sizes that its prompt encoder has; SAM's own ViT runs as
            in `regionspot.modeling.image_encoder`.
        fused_attention: let large attentions of SAM's own ViT run in one kernel, see
            `image_encoder.encode_image`.
        prompt_chunk: how many prompts go through the decoder at once. Each needs a few MiB beside a
            full-size SAM, more with masks, so this bounds the memory and keeps it in the caches; it
            changes no result. None chooses for the device.
    """

    def __init__(
        self, sam: Sam, prompt_chunk: int | None = None, fused_attention: bool = True
    ) -> None:
        super().__init__()
        self.sam = freeze(sam)
        self.restore_single()
        self.token_decoder = freeze(TokenDecoder(sam))
        self._prompt_chunk, self.fused_attention = prompt_chunk, fused_attention
        self.register_load_state_dict_post_hook(_fold_again)

    def halvable(self) -> dict[str, nn.Module]:
        """The image encoder; see `PartlyHalf`."""
        return {"SAM's image encoder": self.sam.image_encoder}

    @property
    def prompt_chunk(self) -> int:
        """How many prompts go through the decoder at once: as set, or what suits the device."""
        if self._prompt_chunk is not None:
            return self._prompt_chunk
        return GPU_PROMPT_CHUNK if self.sam.device.type == "cuda" else CPU_PROMPT_CHUNK

    @prompt_chunk.setter
    def prompt_chunk(self, count: int | None) -> None:
        self._prompt_chunk = count

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.sam.prompt_encoder.input_image_size[0]

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

    def encode_image(
        self, images: Tensor, input_sizes: Tensor, export_for_gpu: bool = False
    ) -> Tensor:
        """Image embeddings of padded images, normalised first and padded with zeros after, as SAM
        does.

        Args:
            images: (B, 3, S, S) uint8 or float RGB in 0..255, S = `image_size`.
            input_sizes: (B, 2) int, height and width of the part of each image that is not padding.
            export_for_gpu: while it is exported, write every attention of SAM's own ViT so that one
                kernel can do it.

        Returns:
            (B, C, h, w), in single precision also where the encoder works in half precision.

        Raises:
            InputError: an image encoder other than SAM's ViT gives embeddings of other sizes.
        """
        encoder = self.sam.image_encoder
        pixels = in_dtype(
            normalise(self.sam, images, input_sizes), next(encoder.parameters()).dtype
        )
        if isinstance(encoder, ImageEncoderViT):
            if torch.compiler.is_exporting():
                fuse_from = 0 if export_for_gpu else None
            else:
                fuse_from = LARGE if self.fused_attention else None
            return encode_image(encoder, pixels, fuse_from)
        embeddings = in_single(encoder(pixels))
        found, wanted = tuple(embeddings.shape[1:]), (self.token_dim, *self.embedding_size)
        if found != wanted:
            raise InputError(
                f"{type(encoder).__name__} makes embeddings of shape {found} of an image of "
                f"{self.image_size} pixels: this SAM's decoder needs {wanted}"
            )
        return embeddings

    def mask_tokens(
        self,
        image_embeddings: Tensor,
        points: Tensor,
        labels: Tensor,
        multimask: bool = False,
        mask_inputs: Tensor | None = None,
        predict_iou: bool = True,
    ) -> MaskTokens:
        """The position-aware token of each prompt (arXiv 2311.01373, section 3.2), without
        upscaling any mask.

        Unlike `segment_anything`'s own decoder, which is right for one image at a time, any (B, N)
        works, N = 0 too.

        Args:
            image_embeddings: (B, C, h, w) from `encode_image`.
            points: (B, N, P, 2) float xy in SAM-frame pixels.
            labels: (B, N, P) int in the convention of SAM's ONNX export: 1 foreground, 0
                background, 2 and 3 a box's top-left and bottom-right corner, -1 padding. A prompt
                without a box carries at least one padding point, as SAM was trained.
            multimask: return mask tokens 1 to 3 (whole, part, subpart) instead of token 0 alone.
            mask_inputs: (B, N, 1, 4h, 4w) mask logits as dense prompts, or None.
            predict_iou: also read the IoU token, which is as much work as one more mask token.

        Returns:
            T = 3 tokens for each prompt with `multimask`, else 1.
        """
        token_ids = self._token_ids(multimask)

        def decode(
            _: Tensor, context: ImageContext, points: Tensor, labels: Tensor
        ) -> tuple[Tensor, ...]:
            return self.token_decoder.prompt_part(context, points, labels, token_ids, predict_iou)

        return MaskTokens(*self._in_chunks(decode, image_embeddings, points, labels, mask_inputs))

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
            (B, N, T, 4h, 4w) float logits in the SAM frame at a quarter of the patch size, above 0
            inside, and the tokens they were made from.
        """
        token_ids = self._token_ids(multimask)

        def decode(
            images: Tensor, context: ImageContext, points: Tensor, labels: Tensor
        ) -> tuple[Tensor, ...]:
            masks, found = self.token_decoder.masks(images, context, points, labels, token_ids)
            return masks, *found

        masks, *found = self._in_chunks(decode, image_embeddings, points, labels, mask_inputs)
        return masks, MaskTokens(*found)

    def prompted_embeddings(self, image_embeddings: Tensor, mask_inputs: Tensor) -> Tensor:
        """The image embedding that each mask prompt sees, less what the decoder adds for "no mask".

        Args:
            image_embeddings: (B, C, h, w) from `encode_image`.
            mask_inputs: (B, N, 1, 4h, 4w) mask logits.

        Returns:
            (B, N, C, h, w), which stand for B * N images of one prompt each.
        """
        encoder = self.sam.prompt_encoder
        dense = encoder.mask_downscaling(mask_inputs.flatten(0, 1)).unflatten(
            0, mask_inputs.shape[:2]
        )
        return (
            image_embeddings.unsqueeze(1) + dense - encoder.no_mask_embed.weight[0, :, None, None]
        )

    def _token_ids(self, multimask: bool) -> Tensor:
        return torch.tensor([1, 2, 3] if multimask else [0], device=self.sam.device)

    def _in_chunks(
        self,
        decode: Callable[..., tuple[Tensor, ...]],
        image_embeddings: Tensor,
        points: Tensor,
        labels: Tensor,
        mask_inputs: Tensor | None,
    ) -> list[Tensor]:
        """`decode(image_embeddings, context, points, labels)` of `prompt_chunk` prompts at a time,
        joined along N.
        """
        step = max(1, self.prompt_chunk // len(labels))
        chunks = [slice(start, start + step) for start in range(0, max(labels.shape[1], 1), step)]
        if mask_inputs is None:
            context = self.token_decoder.image_part(image_embeddings)
            parts = [
                decode(image_embeddings, context, points[:, rows], labels[:, rows])
                for rows in chunks
            ]
        else:
            asked = ((points[:, rows], labels[:, rows], mask_inputs[:, rows]) for rows in chunks)
            parts = [
                self._decode_with_masks(decode, image_embeddings, *of_chunk) for of_chunk in asked
            ]
        return [torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)]

    def _decode_with_masks(
        self,
        decode: Callable[..., tuple[Tensor, ...]],
        image_embeddings: Tensor,
        points: Tensor,
        labels: Tensor,
        mask_inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """B images with n prompts become B * n images with one each."""
        shape = labels.shape[:2]
        with without_autocast(mask_inputs.device.type):
            own = self.prompted_embeddings(image_embeddings, mask_inputs).flatten(
                0, 1
            )  # (B * n, C, h, w)
        prompts = (
            tensor.flatten(0, 1).unsqueeze(1) for tensor in (points, labels)
        )  # (B * n, 1, P, 2), (B * n, 1, P)
        decoded = decode(own, self.token_decoder.image_part(own), *prompts)
        return tuple(tensor.squeeze(1).unflatten(0, shape) for tensor in decoded)


def _fold_again(backbone: SamBackbone, _: object) -> None:
    backbone.token_decoder.fold()


def normalise(sam: Sam, images: Tensor, input_sizes: Tensor) -> Tensor:
    """SAM's pixels: normalised first, zero beyond each image's valid part after. Arguments as in
    `encode_image`.

    Returns:
        (B, 3, S, S).
    """
    pixels = (images.to(sam.pixel_mean.dtype) - sam.pixel_mean) / sam.pixel_std
    positions = torch.arange(images.shape[-1], device=images.device)
    rows = positions < input_sizes[:, :1]  # (B, S)
    columns = positions < input_sizes[:, 1:]  # (B, S)
    return pixels * (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def build_sam(size: str) -> Sam:
    """A `segment_anything` model with random weights.

    Args:
        size: a name in `SAMS`: "vit_b", "vit_l" or "vit_h".
    """
    if size not in SAMS:
        raise InputError(f"there is no SAM of size {size!r}: choose {', '.join(SAMS)}")
    return SAMS[size]()


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
        image_size, patch_size: pixels; the image embedding has `image_size / patch_size` cells a
            side.
        width, depth, num_heads: of the image encoder.
        global_attention: which of its blocks attend to the whole image; the others to windows of
            `window_size` cells.
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
        transformer=TwoWayTransformer(
            depth=2, embedding_dim=token_dim, num_heads=8, mlp_dim=decoder_mlp_dim
        ),
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=iou_head_dim,
    )
    return Sam(
        encoder,
        PromptEncoder(token_dim, cells, (image_size, image_size), mask_in_chans=16),
        decoder,
    )


def load_sam_weights(sam: nn.Module, path: str | Path) -> None:
    """Load SAM's official `.pth`, or the same state dict as `.safetensors`, into `sam`.

    Raises:
        ArtifactError: the file is missing, damaged, or made for another size; names the keys that
            differ.
    """
    load_strictly(sam, read_checkpoint(path), path)

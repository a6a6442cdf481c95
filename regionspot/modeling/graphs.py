"""The model's graphs as modules: tensors in, tensors out, in the order of `regionspot.runtime.graph_spec`.

They only flatten arguments; everything that is computed stands in the parts of the model. Images are (B, S, S, 3), as
image decoders give them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from regionspot.errors import InputError
from regionspot.modeling.losses import region_logits
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.token_decoder import ImageContext
from regionspot.runtime.graph_spec import ModelInfo
from regionspot.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT


def model_info(model: RegionSpot) -> ModelInfo:
    """What the graphs' shapes depend on; hashes the text tower's weights."""
    return replace(
        model_sizes(model),
        logit_scale=model.clip.logit_scale,
        text_fingerprint=model.clip.fingerprint(),
        known_tokens=model.clip.known_tokens(),
    )


def model_sizes(model: RegionSpot) -> ModelInfo:
    """`model_info` of a model without weights in memory (on the device "meta"): what depends on them is left blank."""
    sam, clip = model.sam, model.clip
    return ModelInfo(
        name=model.name,
        sam_image_size=sam.image_size,
        clip_image_size=clip.image_size,
        embedding_size=sam.embedding_size,
        token_dim=sam.token_dim,
        num_patch_tokens=clip.num_tokens,
        clip_width=clip.width,
        embed_dim=clip.embed_dim,
        context_length=clip.context_length,
        logit_scale=0.0,
        text_fingerprint="",
        multimask=model.head.multimask,
    )


def graph_module(model: RegionSpot, name: str) -> nn.Module:
    """The module behind a graph, sharing the model's parameters, in evaluation mode.

    Its `forward` takes the inputs of the graph's spec in their order, and returns a tuple of the outputs in theirs.

    Raises:
        InputError: no graph has that name, or it does not suit the model's head.
    """
    if name not in GRAPH_MODULES:
        raise InputError(f"there is no graph {name!r}: choose one of {', '.join(GRAPH_MODULES)}")
    if name == "region_recognizer" and model.head.multimask:
        raise InputError(
            "region_recognizer reads SAM's single-mask token, and this head was trained on the three multimask tokens: "
            "use the other graphs, which take either"
        )
    return GRAPH_MODULES[name](model).eval()


class SamImageEncoder(nn.Module):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.sam = model.sam

    def forward(self, images: Tensor, input_sizes: Tensor) -> tuple[Tensor]:
        return (self.sam.encode_image(channels_first(images), input_sizes),)


class ClipImageEncoder(nn.Module):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.clip = model.clip

    def forward(self, clip_images: Tensor) -> tuple[Tensor]:
        return (self.clip.encode_image(channels_first(clip_images)),)


class SamTokenDecoderImage(nn.Module):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.decoder = model.sam.token_decoder

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        context = self.decoder.image_part(image_embeddings)
        return context.projections, context.statistics


class SamTokenDecoderPrompts(nn.Module):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.decoder = model.sam.token_decoder

    def forward(
        self, image_projections: Tensor, image_statistics: Tensor, points: Tensor, labels: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        context = ImageContext(image_projections, image_statistics)
        found = self.decoder.prompt_part(context, points, labels, token_ids)
        return found.tokens, found.iou_predictions


class SamMaskDecoder(nn.Module):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.decoder = model.sam.token_decoder

    def forward(
        self,
        image_embeddings: Tensor,
        image_projections: Tensor,
        image_statistics: Tensor,
        points: Tensor,
        labels: Tensor,
        token_ids: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        context = ImageContext(image_projections, image_statistics)
        low_res_masks, found = self.decoder.masks(image_embeddings, context, points, labels, token_ids)
        return low_res_masks, found.tokens, found.iou_predictions


class SamMaskPrompt(nn.Module):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.sam = model.sam

    def forward(self, image_embeddings: Tensor, mask_inputs: Tensor) -> tuple[Tensor]:
        return (self.sam.prompted_embeddings(image_embeddings, mask_inputs),)


class RegionHeadLogits(nn.Module):
    """`RegionSpot.classify`; the logit scale becomes a constant of exported graphs, and follows the model elsewhere."""

    logit_scale: Tensor

    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.head = model.head
        self.register_buffer("logit_scale", torch.tensor(model.clip.logit_scale), persistent=False)
        self._clip = (model.clip,)  # in a tuple, so that it is not this module's own

    def forward(
        self, mask_tokens: Tensor, patch_tokens: Tensor, valid: Tensor, text_embeddings: Tensor
    ) -> tuple[Tensor]:
        region_embeddings = self.head(mask_tokens, patch_tokens, valid)  # (B, N, E)
        exporting = torch.compiler.is_exporting()
        scale = self.logit_scale if exporting else self._clip[0].clip.logit_scale.float().exp()
        return (region_logits(region_embeddings, text_embeddings, scale),)


class ClipTextEncoder(nn.Module):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.clip = model.clip

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.clip.encode_tokens(tokens),)


class RegionRecognizer(nn.Module):
    """All in one: boxes (B, N, 4) are pixels of the SAM frame, scores a softmax over the words."""

    def __init__(self, model: RegionSpot) -> None:
        super().__init__()
        self.sam = model.sam
        self.clip = model.clip
        self.classify = RegionHeadLogits(model)

    def forward(
        self,
        images: Tensor,
        input_sizes: Tensor,
        clip_images: Tensor,
        boxes: Tensor,
        valid: Tensor,
        text_embeddings: Tensor,
    ) -> tuple[Tensor]:
        decoder = self.sam.token_decoder
        context = decoder.image_part(self.sam.encode_image(channels_first(images), input_sizes))
        corners = boxes.unflatten(2, (2, 2))  # (B, N, 2, 2)
        labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], dtype=torch.int32, device=boxes.device)
        token_ids = torch.zeros(1, dtype=torch.int32, device=boxes.device)
        found = decoder.prompt_part(context, corners, labels.expand(corners.shape[:3]), token_ids)
        patch_tokens = self.clip.encode_image(channels_first(clip_images))  # (B, L, D)
        (logits,) = self.classify(found.tokens[:, :, 0], patch_tokens, valid, text_embeddings)
        return (logits.softmax(-1),)


GRAPH_MODULES: dict[str, type[nn.Module]] = {
    "sam_image_encoder": SamImageEncoder,
    "clip_image_encoder": ClipImageEncoder,
    "sam_token_decoder_image": SamTokenDecoderImage,
    "sam_token_decoder_prompts": SamTokenDecoderPrompts,
    "sam_mask_decoder": SamMaskDecoder,
    "sam_mask_prompt": SamMaskPrompt,
    "region_head": RegionHeadLogits,
    "clip_text_encoder": ClipTextEncoder,
    "region_recognizer": RegionRecognizer,
}


def channels_first(images: Tensor) -> Tensor:
    """(B, H, W, 3) to (B, 3, H, W) float. Cast first: TensorRT takes uint8 inputs, but nothing except their Cast."""
    return images.float().permute(0, 3, 1, 2)

"""The model's graphs as modules: tensors in, tensors out, in the order of
`regionspot.runtime.graphs`.

They only flatten arguments; everything that is computed stands in the parts of the model. Images
are (B, S, S, 3), as image decoders give them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from regionspot.errors import InputError
from regionspot.modeling.losses import region_logits
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.token_decoder import ImageContext
from regionspot.registers import load_object
from regionspot.runtime.formats import CPU, GPU
from regionspot.runtime.graph_spec import ModelInfo
from regionspot.runtime.graphs import graph_named
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
    """`model_info` of a model without weights in memory (on the device "meta"): what depends on
    them is left blank.
    """
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


def graph_module(model: RegionSpot, name: str, target: str = CPU) -> GraphModule:
    """Returns the module behind a graph, sharing the model's parameters, in evaluation mode.

    Args:
        target: see `GraphModule.target`.

    Raises:
        InputError: no graph has that name, or it does not suit the model's head.
    """
    module = module_class(name)(model).eval()
    module.target = target
    return module


def module_class(name: str) -> type[GraphModule]:
    """Returns the class behind a graph. Raises InputError for an unknown name."""
    found: type[GraphModule] = load_object(graph_named(name).module)
    return found


class GraphModule(nn.Module):
    """A graph of the model.

    `forward` takes the inputs of the graph's spec in their order, and returns a tuple of the
    outputs in theirs.

    Attributes:
        target: CPU or GPU, what an exported graph is laid out for. A module may write the same
            numbers in other operators for each.
    """

    target: str = CPU

    def __init__(self, model: RegionSpot) -> None:
        super().__init__()

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        """Returns the modules whose weights the exported graph holds."""
        raise NotImplementedError

    @staticmethod
    def activation_elements(model: RegionSpot, sizes: Mapping[str, int]) -> int:
        """Returns the number of elements of its large activations at some sizes of the dynamic
        axes, roughly.

        These are attention probabilities and upscaled masks; 0 if there is nothing larger than
        inputs and outputs.
        """
        return 0


class SamImageEncoder(GraphModule):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.sam = model.sam

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [model.sam.sam.image_encoder]

    @staticmethod
    def activation_elements(model: RegionSpot, sizes: Mapping[str, int]) -> int:
        return _sam_attention(model, sizes)

    def forward(self, images: Tensor, input_sizes: Tensor) -> tuple[Tensor]:
        return (self.sam.encode_image(channels_first(images), input_sizes, self.target == GPU),)


class ClipImageEncoder(GraphModule):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.clip = model.clip

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [model.clip.clip.visual]

    @staticmethod
    def activation_elements(model: RegionSpot, sizes: Mapping[str, int]) -> int:
        return _clip_attention(model, sizes)

    def forward(self, clip_images: Tensor) -> tuple[Tensor]:
        return (self.clip.encode_image(channels_first(clip_images)),)


class SamTokenDecoderImage(GraphModule):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.decoder = model.sam.token_decoder

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [
            layer.cross_attn_token_to_image
            for layer in model.sam.sam.mask_decoder.transformer.layers
        ]

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        context = self.decoder.image_part(image_embeddings)
        return context.projections, context.statistics


class SamTokenDecoderPrompts(GraphModule):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.decoder = model.sam.token_decoder

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [model.sam.sam.mask_decoder]

    @staticmethod
    def activation_elements(model: RegionSpot, sizes: Mapping[str, int]) -> int:
        return _decoder_attention(model, sizes)

    def forward(
        self,
        image_projections: Tensor,
        image_statistics: Tensor,
        points: Tensor,
        labels: Tensor,
        token_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        context = ImageContext(image_projections, image_statistics)
        found = self.decoder.prompt_part(context, points, labels, token_ids)
        return found.tokens, found.iou_predictions


class SamMaskDecoder(GraphModule):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.decoder = model.sam.token_decoder

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [model.sam.sam.mask_decoder]

    @staticmethod
    def activation_elements(model: RegionSpot, sizes: Mapping[str, int]) -> int:
        return _decoder_attention(model, sizes) + _upscaled_masks(model, sizes)

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
        low_res_masks, found = self.decoder.masks(
            image_embeddings, context, points, labels, token_ids
        )
        return low_res_masks, found.tokens, found.iou_predictions


class SamMaskPrompt(GraphModule):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.sam = model.sam

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [model.sam.sam.prompt_encoder.mask_downscaling]

    def forward(self, image_embeddings: Tensor, mask_inputs: Tensor) -> tuple[Tensor]:
        return (self.sam.prompted_embeddings(image_embeddings, mask_inputs),)


class RegionHeadLogits(GraphModule):
    """`RegionSpot.classify`; the logit scale becomes a constant of exported graphs, and follows the
    model elsewhere.
    """

    logit_scale: Tensor

    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.head = model.head
        self.register_buffer("logit_scale", torch.tensor(model.clip.logit_scale), persistent=False)
        self._clip = (model.clip,)  # in a tuple, so that it is not this module's own

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [model.head]

    def forward(
        self, mask_tokens: Tensor, patch_tokens: Tensor, valid: Tensor, text_embeddings: Tensor
    ) -> tuple[Tensor]:
        region_embeddings = self.head(mask_tokens, patch_tokens, valid)  # (B, N, E)
        exporting = torch.compiler.is_exporting()
        scale = self.logit_scale if exporting else self._clip[0].clip.logit_scale.float().exp()
        return (region_logits(region_embeddings, text_embeddings, scale),)


class ClipTextEncoder(GraphModule):
    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        self.clip = model.clip

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [module for name, module in model.clip.clip.named_children() if name != "visual"]

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.clip.encode_tokens(tokens),)


class RegionRecognizer(GraphModule):
    """All in one: boxes (B, N, 4) are pixels of the SAM frame, scores a softmax over the words."""

    def __init__(self, model: RegionSpot) -> None:
        super().__init__(model)
        if model.head.multimask:
            raise InputError(
                "region_recognizer reads SAM's single-mask token, and this head was trained on the "
                "three multimask tokens: use the other graphs, which take either"
            )
        self.sam = model.sam
        self.clip = model.clip
        self.classify = RegionHeadLogits(model)

    @staticmethod
    def weights(model: RegionSpot) -> list[nn.Module]:
        return [
            model.sam.sam.image_encoder,
            model.sam.sam.mask_decoder,
            model.clip.clip.visual,
            model.head,
        ]

    @staticmethod
    def activation_elements(model: RegionSpot, sizes: Mapping[str, int]) -> int:
        return (
            _sam_attention(model, sizes)
            + _clip_attention(model, sizes)
            + _decoder_attention(model, sizes)
        )

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
        embeddings = self.sam.encode_image(channels_first(images), input_sizes, self.target == GPU)
        context = decoder.image_part(embeddings)
        corners = boxes.unflatten(2, (2, 2))  # (B, N, 2, 2)
        labels = torch.tensor(
            [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], dtype=torch.int32, device=boxes.device
        )
        token_ids = torch.zeros(1, dtype=torch.int32, device=boxes.device)
        found = decoder.prompt_part(context, corners, labels.expand(corners.shape[:3]), token_ids)
        patch_tokens = self.clip.encode_image(channels_first(clip_images))  # (B, L, D)
        (logits,) = self.classify(found.tokens[:, :, 0], patch_tokens, valid, text_embeddings)
        return (logits.softmax(-1),)


def channels_first(images: Tensor) -> Tensor:
    """(B, H, W, 3) to (B, 3, H, W) float. Cast first: TensorRT takes uint8 inputs, but nothing
    except their Cast.
    """
    return images.float().permute(0, 3, 1, 2)


def _sam_attention(model: RegionSpot, sizes: Mapping[str, int]) -> int:
    """Probabilities of one global attention layer of SAM's own ViT; 0 for another image encoder."""
    height, width = model.sam.embedding_size
    blocks = getattr(model.sam.sam.image_encoder, "blocks", None)
    num_heads = getattr(getattr(blocks[0], "attn", None), "num_heads", 0) if blocks else 0
    return int(sizes["batch"] * num_heads * (height * width) ** 2)


def _clip_attention(model: RegionSpot, sizes: Mapping[str, int]) -> int:
    """Probabilities of one layer of CLIP's image tower."""
    num_heads = model.clip.clip.visual.transformer.resblocks[0].attn.num_heads
    return int(sizes["batch"] * num_heads * model.clip.num_tokens**2)


def _decoder_attention(model: RegionSpot, sizes: Mapping[str, int]) -> int:
    """Probabilities between prompt tokens and image tokens, of both layers of the token decoder."""
    height, width = model.sam.embedding_size
    decoder = model.sam.sam.mask_decoder
    tokens = 1 + decoder.num_mask_tokens + sizes.get("points", 2)
    return int(2 * _num_prompts(sizes) * decoder.transformer.num_heads * tokens * height * width)


def _upscaled_masks(model: RegionSpot, sizes: Mapping[str, int]) -> int:
    """The image tokens of each prompt, and the same upscaled to the masks' size with an eighth of
    the channels.
    """
    height, width = model.sam.embedding_size
    channels = model.sam.token_dim
    return _num_prompts(sizes) * height * width * (channels + 16 * channels // 8)


def _num_prompts(sizes: Mapping[str, int]) -> int:
    return sizes["batch"] * sizes.get("prompts", sizes.get("regions", 0))

"""CLIP as RegionSpot uses it: a feature map of the whole image, and text embeddings.

The only module that imports `open_clip`.
"""

from __future__ import annotations

import copy
import difflib
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.freezing import freeze
from regionspot.modeling.precision import PartlyHalf, in_dtype, in_own_precision, in_single
from regionspot.modeling.torchvision_shim import import_safely
from regionspot.modeling.weights import load_strictly, read_checkpoint, without_prefix

import_safely()

import open_clip  # noqa: E402
from open_clip import CLIP as CLIP  # noqa: E402
from open_clip.transformer import VisionTransformer, text_global_pool  # noqa: E402

Tokenizer = Callable[..., Tensor]
"""Called as `tokenizer(texts, context_length=T)`, returns (n, T) int64, zero after the end
token.
"""

tokenize: Tokenizer = open_clip.tokenize
"""OpenAI's byte-pair encoding."""

IMAGE_MEAN = open_clip.OPENAI_DATASET_MEAN
IMAGE_STD = open_clip.OPENAI_DATASET_STD

IMAGENET_TEMPLATES: tuple[str, ...] = tuple(
    template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
)
"""CLIP's 80 prompt templates for ImageNet, with `{}` for the class name."""

TEMPLATES = (*IMAGENET_TEMPLATES, "{}.")
"""What a class name's embedding is the mean of: the 80, and the bare name."""

IMAGENET_CLASS_NAMES: tuple[str, ...] = tuple(open_clip.IMAGENET_CLASSNAMES)
"""CLIP's names of the 1000 ImageNet classes, in the order of their labels; some stand for two
classes.
"""

OPENAI_VOCABULARY_SIZE = 49408

_TEXT_TOWER = (
    "transformer",
    "token_embedding",
    "positional_embedding",
    "ln_final",
    "text_projection",
)
_TOKENIZER_PROBES = [
    *IMAGENET_TEMPLATES,
    "A caf\u00e9's 42 UPPER and lower_case toys, \u00bd-inch &amp; \u5317\u4eac",
    " ".join(string.punctuation),
]
# numbers that OpenAI's archives hold as tensors
_NOT_PARAMETERS = ("input_resolution", "context_length", "vocab_size")


class ClipBackbone(PartlyHalf):
    """A frozen open_clip model with a plain vision transformer.

    Args:
        clip: an `open_clip.CLIP`. It is frozen in place.
        tokenizer: what the model was trained with; None stands for OpenAI's byte-pair encoding.
        position_table: makes the position embedding (1 + g * g, D) of a grid of g x g patches,
            where a formula does.

    Raises:
        InputError: an image tower without a class token in its feature map (ResNet, timm, attention
            pooling), or no tokenizer for a model with a vocabulary of its own.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        clip: open_clip.CLIP,
        tokenizer: Tokenizer | None = None,
        position_table: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        visual = getattr(clip, "visual", None)
        if (
            not isinstance(clip, open_clip.CLIP)
            or not isinstance(visual, VisionTransformer)
            or visual.attn_pool
        ):
            raise InputError(
                "RegionSpot needs an open_clip.CLIP whose image tower is a plain vision "
                f"transformer, not a {type(clip).__name__} with a {type(visual).__name__}"
            )
        if tokenizer is None and clip.vocab_size != OPENAI_VOCABULARY_SIZE:
            raise InputError(
                f"this CLIP has a vocabulary of {clip.vocab_size} tokens of its own: pass its "
                "tokenizer"
            )
        self.clip = freeze(clip)
        self.restore_single()
        self.tokenizer: Tokenizer = tokenizer or tokenize
        self.position_table = position_table
        self.register_buffer(
            "image_mean", torch.tensor(IMAGE_MEAN).view(-1, 1, 1) * 255, persistent=False
        )
        self.register_buffer(
            "image_std", torch.tensor(IMAGE_STD).view(-1, 1, 1) * 255, persistent=False
        )

    def halvable(self) -> dict[str, nn.Module]:
        """Both towers, without what comes before and after the text transformer; see
        `PartlyHalf`.
        """
        text = nn.ModuleList([self.clip.token_embedding, self.clip.transformer])
        return {"CLIP's image tower": self.clip.visual, "CLIP's text tower": text}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        return state | {"tokenizer": None} if self.tokenizer is tokenize else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state["tokenizer"] is None:
            self.tokenizer = tokenize

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        size = self.clip.visual.image_size
        return size[0] if isinstance(size, tuple) else size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.clip.visual.conv1.kernel_size[0])

    @property
    def width(self) -> int:
        """D: channels of the feature map."""
        return self.clip.visual.conv1.out_channels

    @property
    def embed_dim(self) -> int:
        """E: length of image and text embeddings."""
        return self.clip.visual.output_dim

    @property
    def num_tokens(self) -> int:
        """L: patches and the class token."""
        return self.clip.visual.positional_embedding.shape[0]

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by, already exponentiated: 100 for OpenAI's weights."""
        return float(self.clip.logit_scale.exp())

    @property
    def context_length(self) -> int:
        """Most tokens of one text, start and end token among them; longer texts are cut."""
        return self.clip.context_length

    def encode_image(self, images: Tensor) -> Tensor:
        """The feature map: all tokens of the visual transformer before `ln_post` and the
        projection.

        Args:
            images: (B, 3, S, S) uint8 or float RGB in 0..255, S = `image_size`, the whole image
                without keeping its aspect ratio (see `regionspot.transforms.ClipTransform`).

        Returns:
            (B, L, D), class token first, then the patches row by row; in the precision of the
            tower.
        """
        return self._after_layer(images, -1)

    def encode_patches_without_mixing(self, images: Tensor) -> Tensor:
        """The patches' tokens (B, L - 1, D), row by row, with a last layer in which each patch
        attends to itself alone.

        MaskCLIP (arXiv 2112.01071) reads local features so from a CLIP that was trained with
        captions of whole images.
        """
        layers = self.clip.visual.transformer.resblocks
        if len(layers) < 2:
            raise InputError("this image tower has one layer: there is none before the last")
        itself = torch.full(
            (self.num_tokens, self.num_tokens), -torch.inf, device=self.image_mean.device
        )
        tokens = self._after_layer(images, -2)
        return layers[-1](tokens, attn_mask=itself.fill_diagonal_(0))[:, 1:]

    def _after_layer(self, images: Tensor, layer: int) -> Tensor:
        """All tokens (B, L, D) of (B, 3, S, S) images behind a layer, counted from the last, which
        is -1.
        """
        visual: VisionTransformer = self.clip.visual
        pixels = (images.to(self.image_mean.dtype) - self.image_mean) / self.image_std
        output = visual.forward_intermediates(
            in_dtype(pixels, visual.conv1.weight.dtype),
            indices=[len(visual.transformer.resblocks) + layer],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat(
            [output["image_intermediates_prefix"][-1], output["image_intermediates"][-1]], dim=1
        )

    def at_size(self, size: int) -> ClipBackbone:
        """This model for images of another size: it has a position embedding of its own and shares
        all other weights.

        The embedding is that of `position_table`, or interpolated where there is none.

        Raises:
            InputError: the size is no multiple of the patches' side.
        """
        patch = self.patch_size
        if size < patch or size % patch:
            raise InputError(
                f"this CLIP cuts images into patches of {patch} px: {size} px is no multiple of "
                "that"
            )
        own = self.clip.visual.positional_embedding
        other = copy.deepcopy(
            self, {id(weight): weight for weight in self.parameters() if weight is not own}
        )
        resized = other.clip.visual
        table = self._positions(size // patch).to(own)
        resized.positional_embedding = nn.Parameter(table, requires_grad=False)
        resized.image_size, resized.grid_size = (size, size), (size // patch, size // patch)
        return other

    def _positions(self, grid: int) -> Tensor:
        """(1 + grid * grid, D), the class token's first."""
        if self.position_table is not None:
            return self.position_table(grid)
        table, old = self.clip.visual.positional_embedding, math.isqrt(self.num_tokens - 1)
        patches = (
            in_single(table[1:]).unflatten(0, (old, old)).permute(2, 0, 1)[None]
        )  # (1, D, old, old)
        resized = (
            F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)[0].flatten(1).T
        )
        return torch.cat([in_single(table[:1]), resized])

    def pool(self, patch_tokens: Tensor) -> Tensor:
        """CLIP's own embedding of the image, un-normalised: (B, L, D) from `encode_image` to (B,
        E).

        For OpenAI's and most other models this is `ln_post` of the first token, projected: with L =
        1 it embeds any pooled token. Models trained with average pooling (CLIPA) average the
        patches instead. `patch_tokens` may be in any precision; embeddings are in single precision
        also where the tower works in half precision.
        """
        visual: VisionTransformer = self.clip.visual
        pooled, _ = visual._pool(in_dtype(patch_tokens, visual.proj.dtype))
        return in_single(pooled) @ in_single(visual.proj)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Un-normalised embeddings (n, E) of n texts, on the model's device, in single precision.

        Padding behind the longest text is cut off before the encoder.
        """
        if not texts:
            return self.image_mean.new_zeros(0, self.embed_dim)
        tokens = self._cut_padding(self.tokenizer(texts, context_length=self.context_length))
        return self.encode_tokens(tokens.to(self.image_mean.device))

    @in_own_precision
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Un-normalised embeddings (n, E) of (n, T) int tokens, T at most `context_length`.

        They are computed without `torch.autocast`: they are cached, under a fingerprint of the
        tower's own precision. With a causal text tower T need only reach the last end token: no
        token sees a later one, and the embedding is read at the end token, so cutting the padding
        changes nothing.
        """
        return encode_tokens(self.clip, tokens)

    def _cut_padding(self, tokens: Tensor) -> Tensor:
        """(n, context_length) to (n, T), T reaching the last end token; whole where that would not
        be exact.
        """
        if self.clip.attn_mask is None or self.clip.text_pool_type not in ("argmax", "eos"):
            return tokens
        is_end = (
            tokens
            if self.clip.text_pool_type == "argmax"
            else (tokens == self.clip.text_eos_id).int()
        )
        return tokens[:, : int(is_end.argmax(dim=-1).max()) + 1]

    @property
    def templates(self) -> tuple[str, ...]:
        """See `regionspot.vocabulary.TextEncoder`."""
        return TEMPLATES

    def known_tokens(self) -> tuple[int, ...] | None:
        """The tokens whose embedding is not zero, where these are few; None stands for all.

        regionspot_mini's text tower has seen the words of its own world alone, and zeros stand for
        all others.
        """
        rows = self.clip.token_embedding.weight
        known = (
            rows[:, 0] != 0
        )  # (vocabulary,) nearly all of a tower that has seen all words: no need to read further
        known[~known] = rows[~known].any(dim=1)
        return None if 2 * int(known.sum()) > len(known) else tuple(known.nonzero()[:, 0].tolist())

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with the text tower's weights, their precision, or the
        tokenizer.
        """
        digest = xxhash.xxh3_128(repr(self.clip.transformer).encode())  # its layers and activation
        for name, tensor in self.clip.state_dict().items():
            if name.split(".")[0] in _TEXT_TOWER:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(
            self.tokenizer(_TOKENIZER_PROBES, context_length=self.context_length).numpy().data
        )
        return digest.hexdigest()


def encode_tokens(clip: CLIP, tokens: Tensor) -> Tensor:
    """Un-normalised embeddings (n, E) of (n, T) int tokens; see `ClipBackbone.encode_tokens`."""
    length = tokens.shape[1]
    mask = None if clip.attn_mask is None else clip.attn_mask[:length, :length]
    hidden = clip.token_embedding(tokens) + clip.positional_embedding[:length]  # (n, T, width)
    # that of the transformer, which may be half precision
    hidden = in_dtype(hidden, clip.token_embedding.weight.dtype)
    hidden = clip.ln_final(in_single(clip.transformer(hidden, attn_mask=mask)))  # (n, T, width)
    pooled = text_global_pool(
        hidden, tokens, clip.text_pool_type, eos_token_id=clip.text_eos_id
    )  # (n, width)
    if clip.text_projection is None:
        return pooled
    if isinstance(clip.text_projection, nn.Linear):
        return clip.text_projection(pooled)
    return pooled @ clip.text_projection


def build_clip(name: str, quick_gelu: bool = False) -> open_clip.CLIP:
    """A model with random weights from open_clip's own configurations, made without asking any
    model hub.

    Args:
        name: such as "ViT-B-16" or "ViT-L-14-336" (`open_clip.list_models()`).
        quick_gelu: the activation that OpenAI's weights, and some others, were trained with. Names
            that end in "-quickgelu" imply it.

    Raises:
        InputError: an unknown name, or a model that is not a plain `open_clip.CLIP`.
    """
    if name not in open_clip.list_models():
        close = (
            ", ".join(difflib.get_close_matches(name, open_clip.list_models(), n=3))
            or "ViT-B-16, ViT-L-14"
        )
        raise InputError(f"open_clip has no model {name!r}; did you mean {close}?")
    config: dict[str, Any] = open_clip.get_model_config(name)
    towers = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    if (
        config.get("custom_text")
        or "multimodal_cfg" in config
        or "timm_model_name" in config["vision_cfg"]
        or "hf_model_name" in config["text_cfg"]
    ):
        raise InputError(
            f"open_clip's {name} is not a plain CLIP (custom, timm or Hugging Face tower): choose "
            "a ViT-*"
        )
    return open_clip.CLIP(**towers, quick_gelu=quick_gelu or config.get("quick_gelu", False))


def compose_clip(
    embed_dim: int, vision: dict[str, Any], text: dict[str, Any], quick_gelu: bool
) -> open_clip.CLIP:
    """A CLIP of sizes that open_clip has no name for, with random weights.

    Args:
        vision, text: fields of open_clip's `CLIPVisionCfg` and `CLIPTextCfg`.
    """
    return open_clip.CLIP(
        embed_dim, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu
    )


def load_clip_weights(clip: open_clip.CLIP, path: str | Path) -> None:
    """Load OpenAI's `.pt` (TorchScript, read without running it) or open_clip's `.pt`, `.bin` or
    `.safetensors`.

    Half-precision weights are converted to the precision of `clip`.

    Raises:
        ArtifactError: the file is missing, damaged, or made for another model; names the keys that
            differ.
    """
    content = read_checkpoint(path)
    state_dict = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    state_dict = without_prefix(state_dict, "module.", path)
    for key in (*_NOT_PARAMETERS, "attn_mask"):
        state_dict.pop(key, None)
    if "text_model.embeddings.token_embedding.weight" in state_dict:
        raise ArtifactError(
            f"{path} holds CLIP in the layout of Hugging Face transformers. Use OpenAI's .pt file, "
            "or a file of the same model for open_clip (usually called "
            "open_clip_model.safetensors)."
        )
    scale = state_dict.get("logit_scale")
    if isinstance(scale, Tensor) and scale.layout == torch.strided and scale.numel() == 1:
        state_dict["logit_scale"] = scale.reshape(clip.logit_scale.shape)
    load_strictly(clip, state_dict, path)

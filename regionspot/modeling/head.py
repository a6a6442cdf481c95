"""RegionSpot's trained part: a decoder in which mask tokens read CLIP's feature map (arXiv
2311.01373, section 3).

Module and parameter names are those of the authors' checkpoints.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regionspot.errors import InputError
from regionspot.modeling.precision import in_dtype, in_single


class RegionHead(nn.Module):
    """Turns SAM's position-aware tokens and CLIP's feature map into region embeddings in CLIP's
    text space.

    A post-norm transformer decoder without positional encoding. The regions of one image see each
    other, so an image's regions belong into one call, and padding needs `valid`.

    Args:
        token_dim: C, channels of a mask token (256 for full-size SAM).
        clip_width: D, channels of CLIP's feature map, and of this decoder.
        embed_dim: E, length of CLIP's text embeddings.
        multimask: whether the head was trained on SAM's three multimask tokens of a prompt, each as
            its own region, instead of the single-mask token. The forward pass does not depend on
            it; prediction and evaluation do.
    """

    def __init__(
        self,
        token_dim: int,
        clip_width: int,
        embed_dim: int,
        num_layers: int = 3,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
        multimask: bool = False,
    ) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.clip_width = clip_width
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.feedforward_dim = feedforward_dim
        self.dropout = dropout
        self.multimask = multimask
        self.to_clip = nn.Linear(token_dim, clip_width)
        self.decoder = Decoder(num_layers, clip_width, num_heads, feedforward_dim, dropout)
        self.projector = nn.Linear(clip_width, embed_dim)

    def forward(
        self, mask_tokens: Tensor, patch_tokens: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Embed N regions of each of B images.

        Args:
            mask_tokens: (B, N, C) from `SamBackbone.mask_tokens`; N may be 0.
            patch_tokens: (B, L, D) from `ClipBackbone.encode_image`.
            valid: (B, N) bool, False for padding; None if there is none.

        Returns:
            (B, N, E), not normalised. Rows of padding hold finite numbers without meaning and
            change no other row. Inputs are converted to the precision of the weights, and half
            precision comes out as single precision.
        """
        dtype = self.to_clip.weight.dtype
        tokens = self.to_clip(in_dtype(mask_tokens, dtype))  # (B, N, D)
        tokens = self.decoder(tokens, in_dtype(patch_tokens, dtype), attendable(valid))  # (B, N, D)
        return in_single(self.projector(tokens))  # (B, N, E)


def attendable(valid: Tensor | None) -> Tensor | None:
    """(B, N) validity to the (B, 1, 1, N) mask of keys that queries may see.

    An image of padding alone sees its padding: a softmax over nothing would be NaN.
    """
    if valid is None:
        return None
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None, :]


class Decoder(nn.Module):
    """`num_layers` decoder layers and a final LayerNorm."""

    def __init__(
        self, num_layers: int, width: int, num_heads: int, feedforward_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, num_heads, feedforward_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, regions: Tensor, patches: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            regions = layer(regions, patches, mask)
        return self.norm(regions)


class DecoderLayer(nn.Module):
    """Self-attention among regions, cross-attention to patches, feed-forward; a LayerNorm after
    each residual sum.
    """

    def __init__(self, width: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, num_heads, dropout)
        self.multihead_attn = Attention(width, num_heads, dropout)
        self.linear1 = nn.Linear(width, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, regions: Tensor, patches: Tensor, mask: Tensor | None) -> Tensor:
        regions = self.norm1(regions + self.dropout(self.self_attn(regions, regions, mask)))
        regions = self.norm2(regions + self.dropout(self.multihead_attn(regions, patches)))
        hidden = self.dropout(F.relu(self.linear1(regions)))
        return self.norm3(regions + self.dropout(self.linear2(hidden)))


class Attention(nn.Module):
    """Multi-head attention with `nn.MultiheadAttention`'s parameters and initialisation, in a form
    that exports.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if width % num_heads:
            raise InputError(f"{num_heads} attention heads do not divide a width of {width}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) queries over (B, M, D) context; `mask` (B, 1, 1, M) is True where they may
        look.
        """
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        if self.training and mask is None and self._few(queries, context):
            return self.out_proj(
                self._attend_unprojected(F.linear(queries, w_q, b_q), context, w_k, w_v, b_v)
            )
        attended = F.scaled_dot_product_attention(
            self._split_heads(F.linear(queries, w_q, b_q)),
            self._split_heads(F.linear(context, w_k, b_k)),
            self._split_heads(F.linear(context, w_v, b_v)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )  # (B, H, N, D / H)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, N, D)

    def _few(self, queries: Tensor, context: Tensor) -> bool:
        """Tells whether there are so few queries that `_attend_unprojected` takes fewer
        multiplications.
        """
        count, (length, width) = queries.shape[1], context.shape[1:]
        return 0 < count * (self.num_heads * length + width) < width * length

    def _attend_unprojected(
        self, queries: Tensor, context: Tensor, w_k: Tensor, w_v: Tensor, b_v: Tensor
    ) -> Tensor:
        """Attends without projecting the context, which has many more rows than there are queries.

        Projections are linear, so a head's scores `q (X W_k^T)^T` are `(q W_k) X^T`, and its output
        `P (X W_v^T + b_v)` is `(P X) W_v^T + b_v` times the sum of P, which dropout changes. The
        bias of the keys adds the same to all scores of a query, and a softmax does not see that.

        Args:
            queries: (B, N, D), projected.
            context: (B, M, D).

        Returns:
            (B, N, D), before the output projection.
        """
        batch, count, width = queries.shape
        by_head = (self.num_heads, -1, width)  # (H, d, D)
        scaled = queries * (width // self.num_heads) ** -0.5
        rows = (
            scaled.unflatten(2, (self.num_heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
        )  # (H, BN, d)
        rows = rows @ w_k.view(by_head)  # (H, BN, D)
        rows = rows.unflatten(1, (batch, count)).transpose(0, 1).flatten(1, 2)  # (B, HN, D)
        weights = F.dropout(
            (rows @ context.transpose(1, 2)).softmax(dim=2), self.dropout
        )  # (B, HN, M)
        mixed = (
            (weights @ context).unflatten(1, (self.num_heads, count)).transpose(0, 1).flatten(1, 2)
        )  # (H, BN, D)
        found = mixed @ w_v.view(by_head).transpose(1, 2)  # (H, BN, d)
        found = found.unflatten(1, (batch, count)).permute(1, 2, 0, 3)  # (B, N, H, d)
        total = (
            weights.sum(dim=2).unflatten(1, (self.num_heads, count)).transpose(1, 2).unsqueeze(3)
        )  # (B, N, H, 1)
        return (found + total * b_v.unflatten(0, (self.num_heads, -1))).flatten(2)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, M, D / H)


@torch.no_grad()
def fold_input_standardization(
    head: RegionHead, token_mean: Tensor, token_std: Tensor, patch_mean: Tensor, patch_std: Tensor
) -> RegionHead:
    """A head that takes raw inputs and computes what `head` computes of standardised ones, `(x -
    mean) / std`.

    Exact up to rounding: both inputs enter through linear maps alone, `to_clip` and the keys and
    values of every cross-attention, whose weights absorb the scale and whose biases absorb the
    shift.

    Args:
        token_mean, token_std: (C,) statistics of mask tokens.
        patch_mean, patch_std: (D,) statistics of CLIP's tokens.
    """
    for name, std in (("token_std", token_std), ("patch_std", patch_std)):
        if not bool((std > 0).all()):
            raise InputError(f"{name} must be positive everywhere: leave a constant channel at 1")
    folded = copy.deepcopy(head)
    _absorb(folded.to_clip.weight, folded.to_clip.bias, token_mean, token_std)
    keys_and_values = slice(head.clip_width, None)
    for layer in folded.decoder.layers:
        attention: Attention = layer.multihead_attn  # type: ignore[assignment]
        weight = attention.in_proj_weight[keys_and_values]
        bias = attention.in_proj_bias[keys_and_values]
        _absorb(weight, bias, patch_mean, patch_std)
    return folded


def _absorb(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> None:
    scaled = weight.double() / std.to(weight.device, torch.float64)
    bias.copy_(bias.double() - scaled @ mean.to(weight.device, torch.float64))
    weight.copy_(scaled)

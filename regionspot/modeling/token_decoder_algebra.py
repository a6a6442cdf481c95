"""The algebra of `regionspot.modeling.token_decoder`: products with matrices that all prompts of an
image share, and the variances of LayerNorms over sums that are never formed.

B images, N prompts each, H heads of c channels, T tokens, R = H * T, M image tokens. Each product
has two forms: in place, which is what eager PyTorch runs fastest, and without writing to an input
or copying a shared factor, which is what an exported graph needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FirstVariance(nn.Module):
    """One over the standard deviation in layer 0's LayerNorm of the image, Xc + P0 U0, without
    forming that.

    A module of its own, as `SecondVariance`, because sums cancel here: in half-precision graphs it
    stays in float32.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, length: Tensor, p0: Tensor, u0: Tensor, along: Tensor) -> Tensor:
        """To (B, N, 1, M).

        Args:
            length: (B, 1, 1, M) |Xc|^2.
            p0, u0: (B, N, R, M) and (B, N, R, C).
            along: (B, N, R, M) twice Xc U0; it may be overwritten.
        """
        squares = length + dot(add_product(along, u0 @ u0.mT, p0), p0)
        return (squares / u0.shape[-1] + self.eps).rsqrt()


class SecondVariance(nn.Module):
    """The same of layer 1, a0 * (Y + P0 W0) + d + P1 U1."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self,
        length: Tensor,
        along_drift: Tensor,
        drift: Tensor,
        a0: Tensor,
        p0: Tensor,
        w0: Tensor,
        along0: Tensor,
        p1: Tensor,
        u1: Tensor,
        along1: Tensor,
    ) -> Tensor:
        """To (B, N, 1, M).

        Args:
            length, along_drift: (B, 1, 1, M) |Y|^2 and Y d.
            drift: (C,) d.
            a0: (B, N, 1, M) from `FirstVariance`.
            p0, p1, w0, u1: (B, N, R, M) and (B, N, R, C).
            along0, along1: (B, N, R, M) twice Y W0 and twice Y U1; they may be overwritten.
        """
        both0 = length + dot(add_product(along0, w0 @ w0.mT, p0), p0)
        along_drift = along_drift + (w0 @ drift).unsqueeze(2) @ p0
        cross = scale(add_product(along1, 2 * u1 @ w0.mT, p0), a0)
        both1 = dot(add_product(cross, u1 @ u1.mT, p1), p1) + 2 * (u1 @ drift).unsqueeze(2) @ p1
        squares = a0 * (a0 * both0 + 2 * along_drift) + both1 + drift @ drift
        return (squares / drift.shape[0] + self.eps).rsqrt()


def by_head(vectors: Tensor, image: Tensor, onto: Tensor | None = None) -> Tensor:
    """(B, N, H, T, c) times (B, H, c, M), which all N share, to (B, N, H * T, M); added to `onto`,
    which it overwrites.

    To broadcast the shared factor, eager PyTorch would copy it N times, which costs more than all
    the rest. On a CPU each prompt has its own product, in place; on a GPU, where each would be a
    launch, and in compiled code, where each would be traced, all have one, which is copied.
    """
    if torch.compiler.is_exporting():
        product = flatten_heads(vectors @ image.unsqueeze(1))
        return product if onto is None else onto + product
    if vectors.is_cuda or torch.compiler.is_compiling():
        product = by_head_at_once(vectors, image)
        return product if onto is None else onto.add_(product)
    heads, length = vectors.shape[2:4]
    total = (
        vectors.new_empty(*vectors.shape[:2], heads * length, image.shape[3])
        if onto is None
        else onto
    )
    for of_image, shared, out in zip(
        vectors, image.expand(len(vectors), -1, -1, -1), total, strict=True
    ):
        for of_prompt, out_of_prompt in zip(
            of_image, out.unflatten(1, (heads, length)), strict=True
        ):
            if onto is None:
                torch.bmm(of_prompt, shared, out=out_of_prompt)
            else:
                out_of_prompt.baddbmm_(of_prompt, shared)
    return total


def by_head_at_once(vectors: Tensor, image: Tensor) -> Tensor:
    return flatten_heads(
        torch.einsum("bnhtc,bhcm->bnhtm", vectors, image.expand(len(vectors), -1, -1, -1))
    )


def sum_by_head_at_once(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bnhtm,bhcm->bnhtc", weights, values)


def sum_by_head(weights: Tensor, values: Tensor) -> Tensor:
    """(B, N, H * T, M) weights of values (B, H, c, M), which all N share, to (B, N, H, T, c)."""
    weights = weights.unflatten(2, (values.shape[1], -1))
    if torch.compiler.is_exporting():
        return weights @ values.mT.unsqueeze(1)
    if weights.is_cuda or torch.compiler.is_compiling():
        return sum_by_head_at_once(weights, values)
    sums = weights.new_empty(*weights.shape[:4], values.shape[2])
    for of_image, shared, out in zip(weights, values.mT, sums, strict=True):
        for of_prompt, out_of_prompt in zip(of_image, out, strict=True):
            torch.bmm(of_prompt, shared, out=out_of_prompt)
    return sums


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right for (B, N, ...) matrices; `total` is overwritten where nothing is
    traced.
    """
    if torch.compiler.is_exporting():
        return total + left @ right
    total.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
    return total


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor; `x` is overwritten where nothing is traced."""
    return x * factor if torch.compiler.is_exporting() else x.mul_(factor)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """(B, N, R, M) twice, to the sum of products over R, (B, N, 1, M); `x` may be overwritten."""
    return scale(x, y).sum(2, keepdim=True)


def self_attention(attention: Any, queries: Tensor, values: Tensor) -> Tensor:
    """`segment_anything`'s attention of (B, N, T, C) tokens of a prompt to each other."""
    queries, flat = queries.flatten(0, 1), values.flatten(0, 1)
    return attention(q=queries, k=queries, v=flat).unflatten(0, values.shape[:2])


def center(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def project(linear: nn.Linear, image: Tensor) -> Tensor:
    """A linear layer over (..., C, M), channels first."""
    return linear.weight @ image + linear.bias[:, None]


def flatten_heads(x: Tensor) -> Tensor:
    """(B, N, H, T, X) to (B, N, H * T, X)."""
    return x.flatten(2, 3)


def join_heads(x: Tensor) -> Tensor:
    """(B, N, H, T, c) to (B, N, T, H * c)."""
    return x.transpose(2, 3).flatten(3)

"""SAM's image encoder, its weights and its results, with less work.

`segment_anything` pads the image tokens to whole windows before it projects them, and writes out
the attention between all pairs of tokens, 800 MB for each of ViT-B's four global layers. Here

- queries, keys and values are projected before the padding, and outputs after it is cut off: a
  padded token is zero, so its projection is the bias, which is put there (3 % of ViT-B's arithmetic
  is saved);
- the relative positions become further channels of queries and keys, so that one fused attention
  does the rest: a query's products with the embeddings of all relative rows, and of all columns,
  meet a key's one-hot row and column;
- where that does not pay, scores of a large layer are written out for one head at a time.

Functions, since there is no state: whatever weights the encoder has are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regionspot.modeling.precision import in_dtype, in_single

LARGE = 1 << 22
"""Scores of an image in one layer, 16 MiB: on two cores the fused attention wins from about
there.
"""


def encode_image(encoder: Any, pixels: Tensor, fuse_from: int | None) -> Tensor:
    """What `encoder(pixels)` gives.

    Args:
        encoder: `segment_anything`'s `ImageEncoderViT`.
        pixels: (B, 3, S, S), normalised.
        fuse_from: take `scaled_dot_product_attention` in layers with at least so many scores of an
            image: more arithmetic, and less time than moving all scores takes. With None no layer
            takes it, and large global layers go head by head, which is what exported graphs do
            best on CPUs; with 0 every layer does, which GPUs compile to one kernel each.

    Returns:
        (B, C, h, w), in single precision also where the weights are in half precision.
    """
    tokens = encoder.patch_embed(pixels)  # (B, h, w, D)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    grid = tokens.shape[1:3]
    # between layers; of four axes, OpenVINO would move the channels at each layer
    tokens = tokens.flatten(1, 2)
    for block in encoder.blocks:
        normed = block.norm1(tokens).unflatten(1, grid)
        tokens = tokens + _attention(block.attn, normed, block.window_size, fuse_from).flatten(1, 2)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return _neck(encoder.neck, tokens.unflatten(1, grid).permute(0, 3, 1, 2))


def _neck(layers: nn.Sequential, tokens: Tensor) -> Tensor:
    """Convolutions in the weights' precision, and between them norms in single precision, whose
    squares are large.
    """
    for layer in layers:
        tokens = layer(
            in_dtype(tokens, layer.weight.dtype)
            if isinstance(layer, nn.Conv2d)
            else in_single(tokens)
        )
    return tokens


def _attention(attention: Any, tokens: Tensor, window: int, fuse_from: int | None) -> Tensor:
    """One layer's attention (B, h, w, D), within windows of `window` cells, or over the whole image
    if that is 0.
    """
    height, width = tokens.shape[1:3]
    projected = attention.qkv(tokens)  # (B, h, w, 3D)
    rows, columns = (window, window) if window else (height, width)
    if window:
        projected = _pad(projected, -height % window, -width % window, attention.qkv.bias)
    padded = projected.shape[1:3]
    windows = (
        projected.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
    )  # (B, n, m, r, c, 3D)
    grid = windows.shape[:3]
    heads = (
        windows.flatten(0, 2).flatten(1, 2).unflatten(2, (3, attention.num_heads, -1))
    )  # (Bnm, rc, 3, H, d)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (Bnm, H, rc, d) each
    relative = _relative_positions(attention, query, rows, columns, by_axis=fuse_from == 0)
    scores = attention.num_heads * padded[0] * padded[1] * rows * columns
    if fuse_from is not None and scores >= fuse_from:
        attend = _attend_fused
    else:
        attend = _attend_by_head if scores >= LARGE and not window else _attend
    found = attend(query, key, value, attention.scale, relative)  # (Bnm, H, rc, d)
    joined = (
        found.transpose(1, 2).flatten(2).unflatten(1, (rows, columns)).unflatten(0, grid)
    )  # (B, n, m, r, c, D)
    image = joined.transpose(2, 3).reshape(tokens.shape[0], *padded, -1)[
        :, :height, :width
    ]  # (B, h, w, D)
    output: Tensor = attention.proj(image)
    return output


def _pad(tokens: Tensor, below: int, right: int, value: Tensor | None) -> Tensor:
    """(B, h, w, E) to (B, h + below, w + right, E), filled with `value` (E,)."""
    if value is None:
        return F.pad(tokens, (0, 0, 0, right, 0, below))
    value = value.to(tokens.dtype)
    if right:
        tokens = torch.cat([tokens, value.expand(*tokens.shape[:2], right, -1)], dim=2)
    if below:
        tokens = torch.cat(
            [tokens, value.expand(tokens.shape[0], below, tokens.shape[2], -1)], dim=1
        )
    return tokens


def _relative_positions(
    attention: Any, query: Tensor, rows: int, columns: int, by_axis: bool
) -> tuple[Tensor, ...]:
    """Scores (b, H, r, c, r) and (b, H, r, c, c) of each query (b, H, rc, d) with every row and
    every column.

    Nothing of a model without relative positions.

    Args:
        by_axis: move the axis that the embeddings have in front, so that they are not broadcast
            over images and heads, for which TensorRT copies them in every run.
    """
    if not attention.use_rel_pos:
        return ()
    cells = query.unflatten(2, (rows, columns))  # (b, H, r, c, d)
    of_rows = _embeddings(attention.rel_pos_h, rows)  # (r, d, r)
    of_columns = _embeddings(attention.rel_pos_w, columns)  # (c, d, c)
    if not by_axis:
        return cells @ of_rows, (cells.transpose(2, 3) @ of_columns).transpose(2, 3)
    images_and_heads = query.shape[:2]
    with_rows = cells.permute(2, 0, 1, 3, 4).flatten(1, 3) @ of_rows  # (r, bHc, r)
    with_columns = cells.permute(3, 0, 1, 2, 4).flatten(1, 3) @ of_columns  # (c, bHr, c)
    return (
        with_rows.unflatten(1, (*images_and_heads, columns)).permute(1, 2, 0, 3, 4),
        with_columns.unflatten(1, (*images_and_heads, rows)).permute(1, 2, 3, 0, 4),
    )


def _embeddings(relative: Tensor, size: int) -> Tensor:
    """(2 size - 1, d) embeddings of the distances to (size, d, size): for each position, of all
    others.
    """
    positions = torch.arange(size, device=relative.device)
    distances = positions[:, None] - positions + size - 1
    return relative[distances].transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, relative: tuple[Tensor, ...]
) -> Tensor:
    """(b, H, rc, d) each to (b, H, rc, d), all scores written out."""
    scores = (query * scale) @ key.transpose(2, 3)  # (b, H, rc, rc)
    if relative:
        with_rows, with_columns = relative
        cells = scores.unflatten(3, (with_rows.shape[4], with_columns.shape[4]))  # (b, H, rc, r, c)
        scores = (
            cells + with_rows.flatten(2, 3).unsqueeze(4) + with_columns.flatten(2, 3).unsqueeze(3)
        ).flatten(3)
    return scores.softmax(dim=3) @ value


def _attend_by_head(
    query: Tensor, key: Tensor, value: Tensor, scale: float, relative: tuple[Tensor, ...]
) -> Tensor:
    """As `_attend`, one head after the other, whose scores take one head's memory."""
    heads = zip(*(tensor.split(1, dim=1) for tensor in (query, key, value, *relative)), strict=True)
    return torch.cat([_attend(q, k, v, scale, tuple(rest)) for q, k, v, *rest in heads], dim=1)


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, relative: tuple[Tensor, ...]
) -> Tensor:
    """As `_attend`; the kernels want values as wide as the widened queries, so they are padded with
    zeros.
    """
    if not relative:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    with_rows, with_columns = relative
    rows, columns = (
        torch.eye(scores.shape[4], dtype=key.dtype, device=key.device) for scores in relative
    )
    places = torch.cat(
        [rows.repeat_interleave(len(columns), 0), columns.repeat(len(rows), 1)], dim=1
    )  # (rc, r + c)
    query = torch.cat([query * scale, with_rows.flatten(2, 3), with_columns.flatten(2, 3)], dim=3)
    key = torch.cat([key, places.expand(*key.shape[:3], -1)], dim=3)
    padded = F.pad(value, (0, places.shape[1]))
    return F.scaled_dot_product_attention(query, key, padded, scale=1.0)[..., : value.shape[3]]

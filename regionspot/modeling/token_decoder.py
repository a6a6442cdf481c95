"""SAM's mask decoder for many prompts of one image, in exact algebra that never copies the image
for a prompt.

`segment_anything` gives each prompt its own copy of the image's M x C tokens, projects every copy,
and upscales masks that nobody asked for. But all prompts see the same image, and image-to-token
attention changes it by a matrix of rank R = heads x tokens (56 for a box). So the image tokens X
after layer 0 are

    a0 * (Xc + P0 U0) * gamma0 + beta0

    Xc          X + bias, centred over C
    P0 (M, R)   the probabilities of all heads
    U0 (R, C)   value times output projection, centred
    a0 (M)      1 / std

and what later layers need of them, projections and the variance of a LayerNorm, are products of P0
with small matrices, added to projections of Xc that all prompts share. The latter are the image
part, computed once for an image. The prompt part works on (R, M) matrices; tokens in all other
layers are few. Results are those of SAM's decoder up to rounding.

In layer 1, `Y = center(gamma0 * Xc)`, `W0 = center(gamma0 * U0)`, and the LayerNorm is of

    a0 * (Y + P0 W0) + d + P1 U1

where `d` holds the biases. Matrices of an image are kept channels first, (C / 2, M).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from regionspot.modeling.precision import in_dtype, in_own_precision
from regionspot.modeling.token_decoder_algebra import (
    FirstVariance,
    SecondVariance,
    add_product,
    by_head,
    center,
    flatten_heads,
    join_heads,
    project,
    scale,
    self_attention,
    sum_by_head,
)
from regionspot.runtime.graph_spec import NUM_PROJECTIONS, NUM_STATISTICS

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

PADDING_LABEL = -1


class MaskTokens(NamedTuple):
    """What SAM's mask decoder says about each prompt.

    Attributes:
        tokens: (B, N, T, C) the decoder transformer's output at the mask-token rows, before the
            hypernetworks.
        iou_predictions: (B, N, T) the predicted IoU of the mask that belongs to each token; (B, N,
            0) if not asked for.
    """

    tokens: Tensor
    iou_predictions: Tensor


class ImageContext(NamedTuple):
    """What all prompts of an image share.

    Attributes:
        projections: (B, 11, C / 2, M), see `TokenDecoder.image_part`.
        statistics: (B, 3, M): |Xc|^2, |Y|^2 and Y d of each image token.
    """

    projections: Tensor
    statistics: Tensor


class _FirstChange(NamedTuple):
    """What n prompts did to the image in layer 0: it is now `a0 * (Xc + P0 U0)`, scaled.

    Attributes:
        p0: (B, n, R, M) the probabilities of the image-to-token attention.
        a0: (B, n, 1, M) one over the standard deviation in the LayerNorm behind it.
        u0: (B, n, R, C) what a unit of probability adds.
        w0: (B, n, R, C) the same after the LayerNorm's scale, centred.
        v0: (B, n, H, T, c) the values that u0 is made of.
    """

    p0: Tensor
    a0: Tensor
    u0: Tensor
    w0: Tensor
    v0: Tensor


class _Change(NamedTuple):
    """What n prompts did to the image in both layers: it is now `a1 * (a0 * (Y + P0 W0) + d + P1
    U1)`, scaled.

    Attributes:
        p0, p1: (B, n, R, M) the probabilities of each layer's image-to-token attention.
        a0, a1: (B, n, 1, M) one over the standard deviation in the LayerNorm behind it.
        w0, u1: (B, n, R, C) what a unit of probability adds.
    """

    p0: Tensor
    a0: Tensor
    w0: Tensor
    p1: Tensor
    a1: Tensor
    u1: Tensor


class Projections(NamedTuple):
    """What the image part computes of each image token, in the order of the exported graphs and of
    the native decoder: (B, C / 2, M) each, or by head (B, H, c, M).
    """

    key0: Tensor
    value0: Tensor
    query0: Tensor
    out0: Tensor
    key1: Tensor
    value1: Tensor
    query1: Tensor
    out0_scaled: Tensor
    out1: Tensor
    final_key: Tensor
    final_value: Tensor


class TokenDecoder(nn.Module):
    """The decoder of a frozen `segment_anything` model with two layers, as all of Meta's have.

    Args:
        sam: with its weights loaded, in the precision to work in. It is not changed; its modules
            are shared. Products of its weights are kept: call `fold` when they change.
    """

    first: Any  # the two layers, and attentions, are `segment_anything`'s own
    second: Any
    final: Any
    positional_encoding: Any
    point_kinds: Tensor
    output_tokens: Tensor
    no_mask: Tensor
    gamma0: Tensor
    drift: Tensor
    out0: Tensor
    out0_scaled: Tensor
    out1: Tensor
    position_key0: Tensor
    position_query0: Tensor
    position_key1: Tensor
    position_query1: Tensor
    position_final_key: Tensor
    key1: Tensor
    query1: Tensor
    value1: Tensor
    value1_bias: Tensor
    final_key: Tensor
    final_value: Tensor
    final_value_bias: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        encoder, decoder = sam.prompt_encoder, sam.mask_decoder
        transformer = decoder.transformer
        self.image_size: int = encoder.input_image_size[0]
        self.embedding_size: tuple[int, int] = encoder.image_embedding_size
        self.num_heads: int = transformer.num_heads
        self.positional_encoding = encoder.pe_layer
        self.first, self.second = transformer.layers
        self.final = transformer.final_attn_token_to_image
        self.norm_final = transformer.norm_final_attn
        self.iou_prediction_head = decoder.iou_prediction_head
        self.output_upscaling = decoder.output_upscaling
        self.hypernetworks = decoder.output_hypernetworks_mlps
        self.variance0 = FirstVariance(self.first.norm4.eps)
        self.variance1 = SecondVariance(self.second.norm4.eps)
        self._folded_from = encoder, decoder  # in a tuple, so that they are not this module's own
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Compute again what depends on weights alone."""
        encoder, decoder = self._folded_from
        kinds = [
            encoder.not_a_point_embed.weight,
            *(kind.weight for kind in encoder.point_embeddings),
        ]
        self._constant("point_kinds", torch.cat(kinds))  # (5, C), of the labels -1 to 3
        self._constant(
            "output_tokens", torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        )  # (1 + 4, C)
        self._constant("no_mask", encoder.no_mask_embed.weight.T)  # (C, 1)
        self._fold_layers(self._cell_positions())

    def _constant(self, name: str, value: Tensor) -> None:
        if hasattr(self, name):
            self.get_buffer(name).copy_(value)
        else:
            self.register_buffer(name, value.detach().clone(), persistent=False)

    def _cell_positions(self) -> Tensor:
        """SAM's `get_dense_pe` in any precision: (C, M), the encoding of each image token's
        centre.
        """
        of_sides = [
            (torch.arange(size, dtype=self.no_mask.dtype) + 0.5) / size
            for size in self.embedding_size
        ]
        y, x = torch.meshgrid(*of_sides, indexing="ij")
        centres = torch.stack([x, y], dim=-1).to(self.no_mask.device)  # (h, w, 2)
        return self.positional_encoding._pe_encoding(centres).flatten(0, 1).T

    def _fold_layers(self, positions: Tensor) -> None:
        """Products of weights with each other, and with the positional encoding (C, M)."""
        read0, write0 = self.first.cross_attn_token_to_image, self.first.cross_attn_image_to_token
        read1, write1 = self.second.cross_attn_token_to_image, self.second.cross_attn_image_to_token
        gamma0, beta0 = self.first.norm4.weight, self.first.norm4.bias  # (C,)
        gamma1, beta1 = self.second.norm4.weight, self.second.norm4.bias
        out0 = center(write0.out_proj.weight.T, -1)  # (C / 2, C)
        self._constant("gamma0", gamma0)
        self._constant("drift", center(beta0 + write1.out_proj.bias, 0))  # d, (C,)
        self._constant("out0", out0)
        self._constant("out0_scaled", center(out0 * gamma0, -1))  # (C / 2, C)
        self._constant("out1", center(write1.out_proj.weight.T, -1))  # (C / 2, C)
        # What positions and biases add to keys and queries of the image: (C / 2, M).
        self._constant("position_key0", project(read0.k_proj, positions))
        self._constant("position_query0", project(write0.q_proj, positions))
        self._constant("position_key1", project(read1.k_proj, positions + beta0[:, None]))
        self._constant("position_query1", project(write1.q_proj, positions + beta0[:, None]))
        self._constant("position_final_key", project(self.final.k_proj, positions + beta1[:, None]))
        # Projections that take in the LayerNorm's scale: (C / 2, C). And what its bias comes to: (C
        # / 2,).
        self._constant("key1", read1.k_proj.weight * gamma0)
        self._constant("query1", write1.q_proj.weight * gamma0)
        self._constant("value1", read1.v_proj.weight * gamma0)
        self._constant("value1_bias", read1.v_proj(beta0))
        self._constant("final_key", self.final.k_proj.weight * gamma1)
        self._constant("final_value", self.final.v_proj.weight * gamma1)
        self._constant("final_value_bias", self.final.v_proj(beta1))

    @in_own_precision
    def image_part(self, image_embeddings: Tensor) -> ImageContext:
        """What all prompts of an image share.

        Args:
            image_embeddings: (B, C, h, w) from SAM's image encoder. The embedding that stands for
                "no mask" is added here.
        """
        read, write = self.first.cross_attn_token_to_image, self.first.cross_attn_image_to_token
        image = self._flat(image_embeddings) + self.no_mask  # (B, C, M)
        centred, rescaled = self._normalised(image)  # Xc and Y, (B, C, M)
        projections = Projections(
            key0=read.k_proj.weight @ image + self.position_key0,
            value0=project(read.v_proj, image),
            query0=write.q_proj.weight @ image + self.position_query0,
            out0=self.out0 @ centred,
            key1=self.key1 @ centred,
            value1=self.value1 @ centred,
            query1=self.query1 @ centred,
            out0_scaled=self.out0_scaled @ rescaled,
            out1=self.out1 @ rescaled,
            final_key=self.final_key @ rescaled,
            final_value=self.final_value @ rescaled,
        )
        # (B, M); of a vector's product TensorRT thinks B = 1
        along_drift = (self.drift[None] @ rescaled)[:, 0]
        statistics = [centred.square().sum(1), rescaled.square().sum(1), along_drift]
        assert len(projections) == NUM_PROJECTIONS and len(statistics) == NUM_STATISTICS
        return ImageContext(torch.stack(projections, 1), torch.stack(statistics, 1))

    @in_own_precision
    def prompt_part(
        self,
        context: ImageContext,
        points: Tensor,
        labels: Tensor,
        token_ids: Tensor,
        predict_iou: bool = True,
    ) -> MaskTokens:
        """The tokens of N prompts of each of B images.

        Args:
            context: from `image_part`.
            points: (B, N, P, 2) float xy in SAM-frame pixels.
            labels: (B, N, P) int, see `SamBackbone.mask_tokens`.
            token_ids: (T,) int, the mask tokens that are wanted: 0 is the single mask's, 1 to 3 are
                whole, part and subpart.
            predict_iou: also read the IoU token, which is as much work as one more mask token.
        """
        return self._decode(context, points, labels, token_ids, predict_iou)[0]

    @in_own_precision
    def masks(
        self,
        image_embeddings: Tensor,
        context: ImageContext,
        points: Tensor,
        labels: Tensor,
        token_ids: Tensor,
    ) -> tuple[Tensor, MaskTokens]:
        """The masks of N prompts of each of B images; arguments as in `image_part` and
        `prompt_part`.

        Returns:
            (B, N, T, 4h, 4w) float logits, above 0 inside, and the tokens they were made from.
        """
        found, change = self._decode(context, points, labels, token_ids)
        _, rescaled = self._normalised(self._flat(image_embeddings) + self.no_mask)  # Y, (B, C, M)
        image_tokens = self._image_tokens(rescaled, change)  # (B, N, C, M)
        upscaled = self.output_upscaling(
            image_tokens.flatten(0, 1).unflatten(2, self.embedding_size)
        )
        filters = torch.stack(
            [network(found.tokens) for network in self.hypernetworks], 3
        )  # (B, N, T, 4, C / 8)
        own = token_ids.long()[:, None, None].expand(*filters.shape[:3], 1, filters.shape[4])
        filters = filters.gather(3, own).squeeze(3)  # (B, N, T, C / 8)
        masks = filters.flatten(0, 1) @ upscaled.flatten(2)  # (B * N, T, 16 * M)
        return masks.unflatten(2, upscaled.shape[2:]).unflatten(0, labels.shape[:2]), found

    def _flat(self, image_embeddings: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, M), in the decoder's precision."""
        return in_dtype(image_embeddings, self.no_mask.dtype).flatten(2)

    def _normalised(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Xc and Y of image tokens (B, C, M)."""
        centred = center(image + self.first.cross_attn_image_to_token.out_proj.bias[:, None], 1)
        return centred, center(self.gamma0[:, None] * centred, 1)

    def _decode(
        self,
        context: ImageContext,
        points: Tensor,
        labels: Tensor,
        token_ids: Tensor,
        predict_iou: bool = True,
    ) -> tuple[MaskTokens, _Change]:
        shared = Projections(
            *(matrix.unflatten(1, (self.num_heads, -1)) for matrix in context.projections.unbind(1))
        )
        statistics = context.statistics[:, :, None, None].unbind(1)  # (B, 1, 1, M) each
        prompts = self._prompt_tokens(points, labels)  # (B, N, 1 + 4 + P, C)
        tokens, first = self._first_layer(shared, statistics[0], prompts)
        tokens, change = self._second_layer(shared, statistics, prompts, tokens, first)
        wanted = token_ids.long() + 1
        if not predict_iou:
            found = self._read_wanted(shared, change, tokens[:, :, wanted], prompts[:, :, wanted])
            return MaskTokens(found, found.new_zeros(*labels.shape[:2], 0)), change
        wanted = torch.cat([wanted.new_zeros(1), wanted])  # (1 + T,), the IoU token first
        found = self._read_wanted(shared, change, tokens[:, :, wanted], prompts[:, :, wanted])
        iou_predictions = self.iou_prediction_head(found[:, :, 0])  # (B, N, 4)
        return MaskTokens(found[:, :, 1:], iou_predictions[:, :, token_ids.long()]), change

    def _first_layer(
        self, shared: Projections, length: Tensor, prompts: Tensor
    ) -> tuple[Tensor, _FirstChange]:
        """Tokens (B, N, T, C) after the first layer, and what they did to the image.

        Args:
            length: (B, 1, 1, M) |Xc|^2.
            prompts: (B, N, T, C) tokens before it.
        """
        layer = self.first
        read, write = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        # self-attention, without positions in this layer
        tokens = layer.norm1(self_attention(layer.self_attn, prompts, prompts))
        # tokens attend to the image; MLP
        weights = by_head(self._queries(read.q_proj, tokens + prompts), shared.key0).softmax(-1)
        tokens = self._read(layer, tokens, self._sum_over_image(weights, shared.value0))
        # the image attends to tokens
        keys = self._queries(write.k_proj, tokens + prompts)
        p0 = self._over_tokens(by_head(keys, shared.query0))  # (B, N, R, M)
        v0 = self._heads(write.v_proj(tokens))  # (B, N, H, T, c)
        u0 = self._rank_one(v0, self.out0)  # (B, N, R, C)
        w0 = center(u0 * self.gamma0, -1)
        a0 = self.variance0(length, p0, u0, by_head(2 * v0, shared.out0))  # (B, N, 1, M)
        return tokens, _FirstChange(p0, a0, u0, w0, v0)

    def _second_layer(
        self,
        shared: Projections,
        statistics: tuple[Tensor, ...],
        prompts: Tensor,
        tokens: Tensor,
        first: _FirstChange,
    ) -> tuple[Tensor, _Change]:
        """As `_first_layer`; the image that it reads is the one that the first layer changed.

        Args:
            statistics: (B, 1, 1, M) each, see `ImageContext`.
        """
        layer = self.second
        read, write = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        p0, a0, u0, w0, v0 = first
        # self-attention
        tokens = layer.norm1(tokens + self_attention(layer.self_attn, tokens + prompts, tokens))
        # tokens attend to the image; MLP
        queries = self._queries(read.q_proj, tokens + prompts)
        scores = self._scores(queries, shared.key1, self.position_key1, u0 @ self.key1.T, p0, a0)
        weights = scale(scores.softmax(-1), a0)  # (B, N, R, M)
        values = self._sum_over_image(weights, shared.value1) + self._mix(
            weights @ p0.mT, u0 @ self.value1.T
        )
        tokens = self._read(layer, tokens, values + self.value1_bias)
        # the image attends to tokens
        keys = self._queries(write.k_proj, tokens + prompts)
        p1 = self._over_tokens(
            self._scores(keys, shared.query1, self.position_query1, u0 @ self.query1.T, p0, a0)
        )
        v1 = self._heads(write.v_proj(tokens))
        u1 = self._rank_one(v1, self.out1)
        along0 = by_head(2 * v0, shared.out0_scaled)  # (B, N, R, M)
        along1 = by_head(2 * v1, shared.out1)
        _, length, along_drift = statistics
        a1 = self.variance1(length, along_drift, self.drift, a0, p0, w0, along0, p1, u1, along1)
        return tokens, _Change(p0, a0, w0, p1, a1, u1)

    def _read_wanted(
        self, shared: Projections, change: _Change, tokens: Tensor, prompts: Tensor
    ) -> Tensor:
        """The last attention to the image, for the tokens (B, N, T, C) that are wanted alone."""
        p0, a0, w0, p1, a1, u1 = change
        drift = self.drift.expand(1, 1, 1, -1)  # (1, 1, 1, C)
        queries = self._queries(self.final.q_proj, tokens + prompts)
        scores = self._scores(queries, shared.final_key, None, w0 @ self.final_key.T, p0, a0)
        scores = add_product(scores, self._along(queries, u1 @ self.final_key.T), p1)
        scores = scale(scores + self._along(queries, drift @ self.final_key.T), a1)  # (B, N, R, M)
        scores = by_head(queries, self._shared_heads(self.position_final_key), onto=scores)
        weights = scale(scores.softmax(-1), a1)
        values = self._mix(weights @ p1.mT, u1 @ self.final_value.T)
        values = values + self._mix(weights.sum(-1, keepdim=True), drift @ self.final_value.T)
        weights = scale(weights, a0)
        values = values + self._mix(weights @ p0.mT, w0 @ self.final_value.T)
        values = values + self._sum_over_image(weights, shared.final_value)
        return self.norm_final(tokens + self.final.out_proj(values + self.final_value_bias))

    def _image_tokens(self, rescaled: Tensor, change: _Change) -> Tensor:
        """The image after both layers: Y (B, C, M) to (B, N, C, M)."""
        p0, a0, w0, p1, a1, u1 = change
        image = (
            (rescaled.unsqueeze(1) + w0.mT @ p0) * a0 + self.drift[:, None] + u1.mT @ p1
        )  # (B, N, C, M)
        norm = self.second.norm4
        return image * a1 * norm.weight[:, None] + norm.bias[:, None]

    def _prompt_tokens(self, points: Tensor, labels: Tensor) -> Tensor:
        """(B, N, P, 2), (B, N, P) to (B, N, 1 + 4 + P, C): IoU and mask tokens, and SAM's embedding
        of each point.

        SAM's `_embed_points` and `_embed_boxes` in one.
        """
        # at pixel centres
        positions = self.positional_encoding._pe_encoding((points + 0.5) / self.image_size)
        positions = torch.where(
            (labels == PADDING_LABEL).unsqueeze(-1), 0.0, positions
        )  # (B, N, P, C)
        embedded = positions + self.point_kinds[labels.long() - PADDING_LABEL]
        return torch.cat([self.output_tokens.expand(*labels.shape[:2], -1, -1), embedded], dim=2)

    def _read(self, layer: Any, tokens: Tensor, values: Tensor) -> Tensor:
        """Add to tokens (B, N, T, C) what they read from the image (B, N, T, C / 2); then the
        MLP.
        """
        tokens = layer.norm2(tokens + layer.cross_attn_token_to_image.out_proj(values))
        return layer.norm3(tokens + layer.mlp(tokens))

    def _scores(
        self,
        queries: Tensor,
        image: Tensor,
        positions: Tensor | None,
        changes: Tensor,
        p0: Tensor,
        a0: Tensor,
    ) -> Tensor:
        """Scores of tokens with the image after layer 0: (B, N, H, T, c) to (B, N, R, M).

        Args:
            image: (B, H, c, M) projections of the image before it.
            positions: (C / 2, M) projections of what is added after the LayerNorm.
            changes: (B, N, R, C / 2) projections of what a unit of p0 adds.
        """
        scores = add_product(by_head(queries, image), self._along(queries, changes), p0)
        scores = scale(scores, a0)
        return (
            scores
            if positions is None
            else by_head(queries, self._shared_heads(positions), onto=scores)
        )

    def _along(self, queries: Tensor, changes: Tensor) -> Tensor:
        """(B, N, H, T, c) and (B, N, R, C / 2) to their products by head (B, N, H * T, R)."""
        return flatten_heads(queries @ self._heads(changes).mT)

    def _mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """(B, N, H * T, R) weights of values (B, N, R, C / 2), by head, to (B, N, T, C / 2)."""
        return join_heads(weights.unflatten(2, (self.num_heads, -1)) @ self._heads(values))

    def _sum_over_image(self, weights: Tensor, values: Tensor) -> Tensor:
        """(B, N, H * T, M) weights of values (B, H, c, M) to (B, N, T, C / 2)."""
        return join_heads(sum_by_head(weights, values))

    def _over_tokens(self, scores: Tensor) -> Tensor:
        """Softmax over the T tokens of each head: (B, N, H * T, M)."""
        return flatten_heads(scores.unflatten(2, (self.num_heads, -1)).softmax(-2))

    def _rank_one(self, values: Tensor, out: Tensor) -> Tensor:
        """(B, N, H, T, c) through the output projection (C / 2, C), each head by itself: (B, N, R,
        C).
        """
        return flatten_heads(values @ out.unflatten(0, (self.num_heads, -1)))

    def _queries(self, projection: Any, tokens: Tensor) -> Tensor:
        """(B, N, T, C) to (B, N, H, T, c), over the square root of c."""
        queries = self._heads(projection(tokens))
        return queries * queries.shape[-1] ** -0.5

    def _heads(self, x: Tensor) -> Tensor:
        """(..., T, C / 2) to (..., H, T, c)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _shared_heads(self, x: Tensor) -> Tensor:
        """(C / 2, M) to (1, H, c, M)."""
        return x.unflatten(0, (self.num_heads, -1)).unsqueeze(0)

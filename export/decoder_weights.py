"""SAM's token decoder as one file of weights, for `regionspot.runtime.native_runner`.

What depends on weights alone is multiplied out here, in double precision. Letters are those of
`regionspot.modeling.token_decoder`. U0, what a unit of probability of layer 0 changes, is a
prompt's values (T, C / 2) times the centred output projection, head by head. So every product with
U0 is one of those values with a (C / 2, C / 2) matrix that all prompts share; likewise of W0 and
U1.
"""

from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from regionspot.export.making import Making
from regionspot.files import write_atomically
from regionspot.modeling.sam import SamBackbone
from regionspot.modeling.token_decoder import TokenDecoder

Arrays = dict[str, npt.NDArray[np.float32]]


def make(making: Making) -> None:
    """Writes the weights of the model's token decoder."""
    write_decoder_weights(making.model.sam, making.path)


def write_decoder_weights(sam: SamBackbone, path: str | Path) -> None:
    """Write `decoder_weights` as NumPy's .npz, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    arrays: dict[str, Any] = {**decoder_weights(sam)}
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


@torch.no_grad()
def decoder_weights(sam: SamBackbone) -> Arrays:
    """All arrays by name. Linear layers are (out, in), as PyTorch keeps them; factors of scores are
    in the queries.
    """
    parts = {
        name: deepcopy(getattr(sam.sam, name)).double().cpu()
        for name in ("prompt_encoder", "mask_decoder")
    }
    sam_in_double: Any = SimpleNamespace(**parts)
    exact = TokenDecoder(sam_in_double)
    tensors = {**_prompts(exact), **_tokens(exact), **_image(exact), **_masks(exact)}
    return {name: np.ascontiguousarray(tensor.float().numpy()) for name, tensor in tensors.items()}


def _prompts(decoder: TokenDecoder) -> dict[str, Tensor]:
    """What becomes of points, and sizes that no other array tells."""
    return {
        "gaussian": decoder.positional_encoding.positional_encoding_gaussian_matrix,  # (2, C / 2)
        "point_kinds": decoder.point_kinds,
        "output_tokens": decoder.output_tokens,
        "num_heads": torch.tensor([decoder.num_heads]),
        "image_size": torch.tensor([decoder.image_size]),
        "epsilons": torch.tensor(
            [
                decoder.norm_final.eps,
                decoder.variance0.eps,
                decoder.variance1.eps,
                decoder.output_upscaling[1].eps,
            ]
        ),
    }


def _tokens(decoder: TokenDecoder) -> dict[str, Tensor]:
    """The layers that tokens alone go through."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate((decoder.first, decoder.second)):
        own = layer.self_attn
        read = layer.cross_attn_token_to_image
        write = layer.cross_attn_image_to_token
        name = f"layer{index}"
        found |= _linear(f"{name}.self.query", own.q_proj, _scale(own)) | _linear(
            f"{name}.self.key", own.k_proj
        )
        found |= _linear(f"{name}.self.value", own.v_proj) | _linear(
            f"{name}.self.out", own.out_proj
        )
        found |= _linear(f"{name}.read.query", read.q_proj, _scale(read)) | _linear(
            f"{name}.read.out", read.out_proj
        )
        found |= _linear(f"{name}.write.key", write.k_proj, _scale(write))
        found |= _linear(f"{name}.write.value", write.v_proj)
        found |= _linear(f"{name}.mlp.0", layer.mlp.lin1) | _linear(f"{name}.mlp.1", layer.mlp.lin2)
        for norm in ("norm1", "norm2", "norm3"):
            found |= _linear(f"{name}.{norm}", getattr(layer, norm))
    final = decoder.final
    found |= _linear("final.query", final.q_proj, _scale(final)) | _linear(
        "final.out", final.out_proj
    )
    found |= _linear("final.norm", decoder.norm_final)
    for index, linear in enumerate(decoder.iou_prediction_head.layers):
        found |= _linear(f"iou.{index}", linear)
    return found


def _image(decoder: TokenDecoder) -> dict[str, Tensor]:
    """What meets the image's projections: positions (C / 2, M), products (C / 2, C / 2), and biases
    (C / 2,).
    """
    of0, of0_scaled, of1 = (
        decoder.out0,
        decoder.out0_scaled,
        decoder.out1,
    )  # (C / 2, C), of U0, W0 and U1
    drift, final_key, final_value = decoder.drift, decoder.final_key, decoder.final_value
    return {
        "position_key1": decoder.position_key1,
        "position_query1": decoder.position_query1,
        "position_final_key": decoder.position_final_key,
        "u0.u0": of0 @ of0.T,
        "key1.u0": decoder.key1 @ of0.T,
        "u0.value1": of0 @ decoder.value1.T,
        "query1.u0": decoder.query1 @ of0.T,
        "w0.w0": of0_scaled @ of0_scaled.T,
        "u1.w0": of1 @ of0_scaled.T,
        "u1.u1": of1 @ of1.T,
        "final_key.w0": final_key @ of0_scaled.T,
        "final_key.u1": final_key @ of1.T,
        "w0.final_value": of0_scaled @ final_value.T,
        "u1.final_value": of1 @ final_value.T,
        "w0.drift": of0_scaled @ drift,
        "u1.drift": of1 @ drift,
        "drift.drift": (drift @ drift)[None],
        "final_key.drift": final_key @ drift,
        "drift.final_value": final_value @ drift,
        "value1_bias": decoder.value1_bias,
        "final_value_bias": decoder.final_value_bias,
    }


def _masks(decoder: TokenDecoder) -> dict[str, Tensor]:
    """SAM's upscaling. Its first convolution is linear in the image after layer 1, which is never
    formed.

    Rows of both convolutions are (row, column, channel) of what a cell becomes.
    """
    first, norm, _, second, _ = decoder.output_upscaling
    channels = decoder.gamma0.shape[0]
    unscaled = _rows_of(first)  # (C, C)
    scaled = unscaled * decoder.second.norm4.weight
    centre = torch.eye(channels, dtype=scaled.dtype) - 1 / channels
    of_image = scaled @ centre @ (decoder.gamma0[:, None] * centre)  # of the image embedding: of Y
    offset = decoder.no_mask[:, 0] + decoder.first.cross_attn_image_to_token.out_proj.bias
    found = {
        "upscale.image": of_image,
        "upscale.image_offset": of_image @ offset,
        "upscale.w0": scaled @ decoder.out0_scaled.T,
        "upscale.u1": scaled @ decoder.out1.T,
        "upscale.drift": scaled @ decoder.drift,
        "upscale.bias": unscaled @ decoder.second.norm4.bias + first.bias.repeat(4),
        "upscale.norm.weight": norm.weight,
        "upscale.norm.bias": norm.bias,
        "upscale.second.weight": _rows_of(second),  # (C / 2, C / 4)
        "upscale.second.bias": second.bias.repeat(4),
    }
    for token, network in enumerate(decoder.hypernetworks):
        for index, linear in enumerate(network.layers):
            found |= _linear(f"filter{token}.{index}", linear)
    return found


def _linear(name: str, layer: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    """Of a linear layer or a LayerNorm."""
    weight, bias = (getattr(layer, part) for part in ("weight", "bias"))
    return {f"{name}.weight": weight * factor, f"{name}.bias": bias * factor}


def _scale(attention: Any) -> float:
    """What scores are multiplied by."""
    return float((attention.internal_dim // attention.num_heads) ** -0.5)


def _rows_of(convolution: Any) -> Tensor:
    """The (in, out, 2, 2) weight of a transposed convolution of stride 2 as a matrix (2 * 2 * out,
    in).
    """
    return convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)

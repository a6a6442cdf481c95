"""The model's own modules as a `RegionPipeline`, and fingerprints of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

import numpy as np
import torch
import xxhash
from torch import nn

from regionspot.errors import InputError
from regionspot.modeling.clip import ClipBackbone, Tokenizer
from regionspot.modeling.graphs import graph_module, model_info
from regionspot.modeling.head import RegionHead
from regionspot.modeling.precision import DTYPES, precision_of, working_dtypes
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone
from regionspot.runtime.graph_spec import Range
from regionspot.runtime.graphs import Ranges, graph_named, graph_specs, required_graphs
from regionspot.runtime.pipeline import SIZES_ON_GPU, RegionPipeline
from regionspot.runtime.text_encoder import TextInput
from regionspot.runtime.torch_runner import TorchRunner, evaluating, weights_state
from regionspot.structures import IntArray

ANY_SIZE = Range(1, 1, 1 << 30)
"""Of an axis that PyTorch sets no bounds to."""

COMPILED_STEPS = {step: SIZES_ON_GPU[step] for step in ("prompt_step", "region_step")}
"""What numbers of prompts and regions are padded to where code is compiled for a few of them."""


def pipeline_from_model(model: RegionSpot, compiled: bool = False) -> RegionPipeline:
    """Over the model's own modules: it follows the model to another device, and sees when its
    weights change.

    Its work is chunked as `SamBackbone.prompt_chunk` says. It computes in the precision of the
    model's weights, and `torch.autocast` around it changes nothing. On a GPU CLIP's image encoder
    has a CUDA stream of its own, on which it works beside SAM's.

    Args:
        compiled: run what every prediction needs through `torch.compile`. The first image takes a
            minute or more, and so does the first with another number of regions or words; later
            ones are faster on a GPU, most of all in half precision. Numbers change by rounding.

    Raises:
        InputError: weights in different precisions, or in another than float32, bfloat16 and
            float16.
    """
    reopen = partial(pipeline_from_model, model, compiled)
    return _pipeline(model, partial(graph_module, model), reopen, compiled)


def pipeline_from_backbones(
    sam: SamBackbone, clip: ClipBackbone, name: str = "regionspot"
) -> RegionPipeline:
    """As `pipeline_from_model`, of the towers alone: it encodes, and raises InputError where it
    should classify.
    """
    with torch.random.fork_rng(devices=[]):
        # stands where one must
        no_head = RegionHead(sam.token_dim, clip.width, clip.embed_dim, num_layers=0)
    (dtype,) = working_dtypes(sam)
    model = RegionSpot(sam, clip, no_head.to(dtype), name)

    def module(graph: str) -> nn.Module:
        if "head" in graph_named(graph).weights:
            raise InputError(
                f"{graph} needs a head, and there are only SAM and CLIP here: train one, or load "
                "one"
            )
        return graph_module(model, graph)

    return _pipeline(model, module, partial(pipeline_from_backbones, sam, clip, name))


def _pipeline(
    model: RegionSpot,
    module: Callable[[str], nn.Module],
    reopen: Callable[[], RegionPipeline],
    compiled: bool = False,
) -> RegionPipeline:
    precision = precision_of(model)
    info = model_info(model)
    specs = graph_specs(info, Ranges(*[ANY_SIZE] * len(fields(Ranges))))

    def check_precision() -> None:
        if working_dtypes(model.sam, model.clip, model.head) != {DTYPES[precision]}:
            raise InputError(
                f"the model was converted after this pipeline was made of it in {precision}: make "
                "another pipeline, or another RegionPredictor"
            )

    def open_runner(graph: str) -> TorchRunner:
        # making the module switches what it shares with the model to evaluation
        with evaluating(model):
            return TorchRunner(
                module(graph),
                specs[graph],
                check=check_precision,
                compiled=compiled and graph in required_graphs(),
                own_stream=graph == "clip_image_encoder",
            )

    return RegionPipeline(
        info,
        open_runner,
        runtime="torch",
        precision=precision,
        fingerprint=graph_fingerprints(model),
        prompt_chunk=model.sam.prompt_chunk,
        **(COMPILED_STEPS if compiled else {}),
        reopen=reopen,
        text_input=lambda: TextInput(partial(_tokens, model.clip.tokenizer), model.clip.templates),
    )


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> IntArray:
    return tokenizer(list(texts), context_length=context_length).numpy().astype(np.int32)


def graph_fingerprints(model: RegionSpot) -> Callable[[str], str]:
    """A function of a graph's name to the fingerprint of the weights behind it, the same on every
    machine.

    Of SAM's graphs it is SAM's own weights: what the token decoder derives from them differs in its
    last digits from machine to machine. Weights are hashed when first asked for, each part of the
    model once, and again after they changed.
    """
    hashed: dict[tuple[str, ...], tuple[tuple[tuple[int, int], ...], str]] = {}

    def of_parts(parts: tuple[str, ...]) -> str:
        tensors = tensors_of(parts)
        state = weights_state(*tensors.values())
        kept = hashed.get(parts)
        if kept is None or kept[0] != state:
            fingerprint = (
                model.clip.fingerprint() if parts == ("text",) else weights_fingerprint(**tensors)
            )
            hashed[parts] = kept = (state, fingerprint)
        return kept[1]

    def tensors_of(parts: tuple[str, ...]) -> dict[str, nn.Module | torch.Tensor]:
        clip = model.clip
        by_part: dict[str, dict[str, nn.Module | torch.Tensor]] = {
            "sam": {"sam": model.sam.sam},
            "clip": {"visual": clip.clip.visual, "mean": clip.image_mean, "std": clip.image_std},
            "head": {"head": model.head, "logit_scale": clip.clip.logit_scale},
            "text": {"text": clip.clip},
        }
        return {name: tensor for part in parts for name, tensor in by_part[part].items()}

    return lambda graph: of_parts(graph_named(graph).weights)


def weights_fingerprint(**parts: nn.Module | torch.Tensor) -> str:
    """32 hexadecimal digits that change with any number of these, buffers that are not saved
    included.
    """
    digest = xxhash.xxh3_128()
    for part, content in parts.items():
        named = [("", content)] if isinstance(content, torch.Tensor) else _tensors(content)
        for name, tensor in named:
            digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            )
    return digest.hexdigest()


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]

"""The ways to get SAM's mask tokens that `regionspot.benchmarks.decoder` compares, each run in a
process of its own.

`python -m regionspot.benchmarks.decoder_variants NAME DIR` reads DIR/request.json and
DIR/inputs.npz, prints a line of JSON for each number of boxes, and writes the tokens to
DIR/NAME-BOXES.npy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from regionspot.benchmarks.memory import PeakMemory
from regionspot.benchmarks.timing import median, repeat
from regionspot.modeling.graphs import model_info
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone
from regionspot.runtime.formats import FORMATS, NATIVE, RUNTIMES, open_graph
from regionspot.runtime.graphs import graph_specs
from regionspot.runtime.pipeline import NATIVE_PROMPT_CHUNK
from regionspot.runtime.runner import Array
from regionspot.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT

REFERENCE_BATCH = 64
"""Boxes that go through `segment_anything`'s decoder together, as in its automatic mask
generator.
"""

Decode = Callable[[Array], Array]
"""(N, 2, 2) corners of boxes in the SAM frame to (N, C) tokens, for the one image."""

GRAPHS = ("sam_token_decoder_image", "sam_token_decoder_prompts")


@dataclass(frozen=True)
class Request:
    """What to measure: arguments of `create_model`, box counts, and how ours is cut into chunks."""

    model: dict[str, Any]
    boxes: list[int]
    threads: int
    prompt_chunk: int

    def create_model(self) -> RegionSpot:
        return create_model(**self.model)


def decode_by_segment_anything(sam: SamBackbone, embeddings: Array) -> Decode:
    """Its prompt encoder and mask decoder, masks and all; a hook takes the tokens."""
    decoder, encoder = sam.sam.mask_decoder, sam.sam.prompt_encoder
    image, seen = torch.from_numpy(embeddings), list[torch.Tensor]()
    decoder.transformer.register_forward_hook(lambda _m, _i, output: seen.append(output[0][:, 1]))

    def decode(corners: Array) -> Array:
        seen.clear()
        for boxes in torch.from_numpy(corners).flatten(1).split(REFERENCE_BATCH):
            sparse, dense = encoder(points=None, boxes=boxes, masks=None)
            decoder(
                image_embeddings=image,
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
        return torch.cat(seen).numpy()

    return decode


def decode_tokens_only(sam: SamBackbone, embeddings: Array) -> Decode:
    """Its transformer as it is, without the masks: what a port that only drops the upscaling
    gets.
    """
    decoder, encoder = sam.sam.mask_decoder, sam.sam.prompt_encoder
    image = torch.from_numpy(embeddings)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])  # (1 + 4, C)

    def decode(corners: Array) -> Array:
        found = []
        for boxes in torch.from_numpy(corners).flatten(1).split(REFERENCE_BATCH):
            sparse, dense = encoder(points=None, boxes=boxes, masks=None)
            tokens = torch.cat([output_tokens.expand(len(boxes), -1, -1), sparse], dim=1)
            hidden, _ = decoder.transformer(
                image + dense, encoder.get_dense_pe().expand_as(dense), tokens
            )
            found.append(hidden[:, 1])
        return torch.cat(found).numpy()

    return decode


def decode_by_torch(sam: SamBackbone, embeddings: Array) -> Decode:
    """Ours: the image part once, then the prompts in the backbone's own chunks."""
    image = torch.from_numpy(embeddings)
    labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])

    def decode(corners: Array) -> Array:
        points = torch.from_numpy(corners)[None]
        found = sam.mask_tokens(image, points, labels.expand(points.shape[:3]))
        return found.tokens[0, :, 0].numpy()

    return decode


def decode_by_runtimes(
    runtimes: Sequence[str], request: Request, embeddings: Array, folder: Path
) -> Decode:
    """Ours: what runs the image part, and what the prompts."""
    specs = graph_specs(model_info(request.create_model()))
    image_part, prompt_part = (
        open_graph(
            folder / f"{name}{FORMATS[RUNTIMES[runtime].opens[0]].suffix}",
            specs[name],
            runtime,
            "fp32",
            "cpu",
            request.threads,
        )
        for name, runtime in zip(GRAPHS, runtimes, strict=True)
    )
    chunk = NATIVE_PROMPT_CHUNK if NATIVE in runtimes else request.prompt_chunk
    token_ids = np.zeros(1, np.int32)

    def decode(corners: Array) -> Array:
        context = image_part.infer(
            {"image_embeddings": embeddings}, keep=image_part.spec.output_names
        )
        found = []
        for start in range(0, len(corners), chunk):
            points = corners[None, start : start + chunk]
            labels = np.broadcast_to(
                np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32), points.shape[:3]
            ).copy()
            feeds = {**context, "points": points, "labels": labels, "token_ids": token_ids}
            found.append(prompt_part.infer(feeds)["mask_tokens"][0, :, 0])
        return np.concatenate(found)

    return decode


TORCH_VARIANTS = {
    "segment_anything": decode_by_segment_anything,
    "tokens_only": decode_tokens_only,
    "ours_torch": decode_by_torch,
}
RUNTIME_VARIANTS = {
    "ours_onnxruntime": ("onnxruntime", "onnxruntime"),
    "ours_openvino": ("openvino", "openvino"),
    "ours_native": ("openvino", NATIVE),
}
VARIANTS = (*TORCH_VARIANTS, *RUNTIME_VARIANTS)


def start(variant: str, request: Request, embeddings: Array, folder: Path) -> Decode:
    if variant in RUNTIME_VARIANTS:
        return decode_by_runtimes(RUNTIME_VARIANTS[variant], request, embeddings, folder)
    torch.set_num_threads(request.threads)
    return TORCH_VARIANTS[variant](request.create_model().sam, embeddings)


@torch.inference_mode()
def main(variant: str, folder: Path) -> None:
    request = Request(**json.loads((folder / "request.json").read_text()))
    with np.load(folder / "inputs.npz") as inputs:
        embeddings, corners = inputs["image_embeddings"], inputs["corners"]
    decode = start(variant, request, embeddings, folder)
    memory = PeakMemory()
    decode(corners[:1])  # warm-up
    for count in request.boxes:
        memory.start()
        # the first of a size also makes the runtimes' buffers
        tokens: npt.NDArray[Any] = decode(corners[:count])
        seconds = repeat(partial(decode, corners[:count]))
        np.save(folder / f"{variant}-{count}.npy", tokens)
        found = {
            "boxes": count,
            "seconds": median(seconds),
            "repetitions": len(seconds),
            "peak_mb": memory.peak_mb(),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Models that are pickled, copied, or sent to another process: the same answers, and still one set
of weights.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from regionspot.modeling.clip import ClipBackbone, tokenize
from regionspot.modeling.head import RegionHead
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone

# a child that is spawned imports this file, and regionspot must import these libraries first
if TYPE_CHECKING:
    from open_clip import CLIP
    from segment_anything.modeling import Sam


@pytest.fixture
def model(tiny_sam: Sam, tiny_clip: CLIP) -> RegionSpot:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head = RegionHead(32, 48, 24, feedforward_dim=16)
    return RegionSpot(
        SamBackbone(tiny_sam, prompt_chunk=3), ClipBackbone(tiny_clip), head, "tiny"
    ).eval()


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@torch.inference_mode()
def answers(model: RegionSpot) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 64, 64), generator=generator)
    points = torch.rand(1, 5, 3, 2, generator=generator) * 64
    embeddings = model.sam.encode_image(images, torch.tensor([[64, 40]]))
    masks, found = model.sam.low_res_masks(embeddings, points, torch.ones(1, 5, 3).int())
    patches = model.clip.encode_image(images[..., ::2, ::2])
    words = model.clip.encode_text(["a cat", "a red dog"])
    logits = model.classify(
        found.tokens[:, :, 0], patches, torch.nn.functional.normalize(words, dim=-1)
    )
    return [masks.numpy(), found.tokens.numpy(), logits.numpy()]


WAYS = [pickled, saved, copy.deepcopy]


@pytest.mark.parametrize("send", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_answers(
    model: RegionSpot, send: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    received = send(model.to(dtype))
    assert (
        received.name == "tiny"
        and received.sam.prompt_chunk == 3
        and received.clip.tokenizer is tokenize
    )
    for expected, found in zip(answers(model), answers(received), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("send", WAYS)
def test_backbones_and_decoders_by_themselves(
    model: RegionSpot, send: Callable[[Any], Any]
) -> None:
    for part in (model.sam, model.clip, model.head, model.sam.token_decoder):
        received = send(part)
        for name, tensor in part.state_dict().items():
            assert torch.equal(received.state_dict()[name], tensor)


@pytest.mark.parametrize("send", WAYS)
def test_the_decoder_shares_its_weights_and_is_folded_again(
    model: RegionSpot, send: Callable[[Any], Any]
) -> None:
    received = send(model).sam
    assert received.token_decoder.first is received.sam.mask_decoder.transformer.layers[0]
    others = {name: tensor + 0.1 for name, tensor in model.sam.state_dict().items()}
    received.load_state_dict(others)
    model.sam.load_state_dict(others)
    for name, constant in model.sam.token_decoder.named_buffers():
        assert torch.equal(received.token_decoder.get_buffer(name), constant)


def test_a_tokenizer_of_its_own_goes_along(tiny_clip: CLIP) -> None:
    assert pickled(ClipBackbone(tiny_clip, words_to_ones)).tokenizer is words_to_ones


def words_to_ones(texts: list[str], context_length: int) -> torch.Tensor:
    return torch.ones(len(texts), context_length, dtype=torch.int64)


def test_in_a_child_that_was_spawned(model: RegionSpot) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(answers, model).result()
    for expected, of_child in zip(answers(model), found, strict=True):
        np.testing.assert_allclose(of_child, expected, rtol=1e-5, atol=1e-5)

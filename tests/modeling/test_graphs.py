"""The graphs' modules: tensors as their spec says, and what the model itself computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip import CLIP
from segment_anything.modeling import Sam
from torch import Tensor

from regionspot.errors import InputError
from regionspot.export.graph_inputs import Feeds, GraphInputs
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.graphs import graph_module, model_info
from regionspot.modeling.head import RegionHead
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone
from regionspot.runtime.graphs import GRAPHS, graph_specs
from regionspot.runtime.torch_runner import TorchRunner

SIZES = {
    "batch": 2,
    "regions": 5,
    "prompts": 6,
    "points": 3,
    "tokens": 3,
    "words": 7,
    "texts": 4,
    "text_length": 9,
}


@pytest.fixture
def model(tiny_sam: Sam, tiny_clip: CLIP) -> RegionSpot:
    sam, clip = SamBackbone(tiny_sam), ClipBackbone(tiny_clip)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head = RegionHead(sam.token_dim, clip.width, clip.embed_dim, feedforward_dim=64)
    return RegionSpot(sam, clip, head, "tiny").eval()


def run(model: RegionSpot, graph: str, feeds: Feeds) -> dict[str, np.ndarray]:
    return TorchRunner(graph_module(model, graph), graph_specs(model_info(model))[graph]).infer(
        feeds
    )


def nchw(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def assert_equal(actual: np.ndarray, expected: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_graph_is_refused(model: RegionSpot) -> None:
    with pytest.raises(InputError, match="no graph 'sam'"):
        graph_module(model, "sam")


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
def test_outputs_are_as_the_spec_says(model: RegionSpot, graph: str, smallest: bool) -> None:
    spec = graph_specs(model_info(model))[graph]
    sizes = {axis: spec.ranges[axis].min if smallest else SIZES[axis] for axis in spec.ranges}
    outputs = run(model, graph, GraphInputs(model).seeded(spec, sizes=sizes))
    for tensor in spec.outputs:
        assert outputs[tensor.name].shape == tensor.resolved(sizes)
        assert outputs[tensor.name].dtype == tensor.dtype
        assert np.isfinite(outputs[tensor.name]).all()


def test_model_info(model: RegionSpot) -> None:
    info = model_info(model)
    assert (info.name, info.sam_image_size, info.clip_image_size) == ("tiny", 64, 32)
    assert (info.embedding_size, info.mask_size, info.token_dim) == ((8, 8), (32, 32), 32)
    assert (info.num_patch_tokens, info.clip_width, info.embed_dim, info.context_length) == (
        17,
        48,
        24,
        77,
    )
    assert info.logit_scale == model.clip.logit_scale
    assert info.text_fingerprint == model.clip.fingerprint()


@torch.no_grad()
def test_graph_after_graph_is_the_model(model: RegionSpot) -> None:
    specs, inputs = graph_specs(model_info(model)), GraphInputs(model)
    feeds = inputs.seeded(specs["region_recognizer"], sizes={"batch": 2, "regions": 5, "words": 7})
    images, sizes = feeds["images"], feeds["input_sizes"]
    embeddings = model.sam.encode_image(nchw(images), torch.from_numpy(sizes))
    embedded = run(model, "sam_image_encoder", {"images": images, "input_sizes": sizes})[
        "image_embeddings"
    ]
    assert_equal(embedded, embeddings)
    shared = run(model, "sam_token_decoder_image", {"image_embeddings": embedded})
    prompts = {
        "points": feeds["boxes"].reshape(2, 5, 2, 2),
        "labels": np.full((2, 5, 2), (2, 3), np.int32),
    }
    points, labels = (torch.from_numpy(array) for array in prompts.values())
    for multimask, token_ids in ((False, [0]), (True, [1, 2, 3])):
        asked = {**shared, **prompts, "token_ids": np.array(token_ids, np.int32)}
        masks, found = model.sam.low_res_masks(embeddings, points, labels, multimask)
        decoded = run(model, "sam_token_decoder_prompts", asked)
        drawn = run(model, "sam_mask_decoder", {"image_embeddings": embedded, **asked})
        assert_equal(drawn["low_res_masks"], masks)
        for outputs in (decoded, drawn):
            assert_equal(outputs["mask_tokens"], found.tokens)
            assert_equal(outputs["iou_predictions"], found.iou_predictions)
    tokens = model.sam.mask_tokens(embeddings, points, labels).tokens[:, :, 0]
    patches = model.clip.encode_image(nchw(feeds["clip_images"]))
    assert_equal(
        run(model, "clip_image_encoder", {"clip_images": feeds["clip_images"]})["patch_tokens"],
        patches,
    )
    words, valid = torch.from_numpy(feeds["text_embeddings"]), torch.from_numpy(feeds["valid"])
    logits = model.classify(tokens, patches, words, valid)
    asked = {
        "mask_tokens": tokens.numpy(),
        "patch_tokens": patches.numpy(),
        "valid": feeds["valid"],
    }
    answer = run(model, "region_head", asked | {"text_embeddings": feeds["text_embeddings"]})
    assert_equal(answer["logits"][feeds["valid"]], logits[valid])
    scores = run(model, "region_recognizer", feeds)["scores"]
    assert_equal(scores[feeds["valid"]], logits.softmax(-1)[valid])


@torch.no_grad()
def test_texts(model: RegionSpot) -> None:
    texts = ["a cat", "a photo of two dogs on a bench"]
    tokens = model.clip.tokenizer(texts, context_length=model.clip.context_length)
    feeds = {"tokens": tokens[:, :12].numpy().astype(np.int32)}
    assert_equal(
        run(model, "clip_text_encoder", feeds)["embeddings"], model.clip.encode_text(texts)
    )


def test_padded_regions_change_nothing(model: RegionSpot) -> None:
    spec = graph_specs(model_info(model))["region_head"]
    feeds = GraphInputs(model).seeded(spec, sizes={"batch": 1, "regions": 6, "words": 4})
    feeds["valid"] = np.array([[True, True, True, False, False, False]])
    padded = run(model, "region_head", feeds)["logits"]
    cut = {**feeds, "mask_tokens": feeds["mask_tokens"][:, :3], "valid": feeds["valid"][:, :3]}
    np.testing.assert_allclose(
        run(model, "region_head", cut)["logits"], padded[:, :3], rtol=1e-5, atol=1e-5
    )


def test_the_head_is_left_in_evaluation_mode_alone(model: RegionSpot) -> None:
    model.train()
    module = graph_module(model, "region_head")
    assert not any(part.training for part in module.modules())
    assert next(module.parameters()) is next(model.head.parameters())

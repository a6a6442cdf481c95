"""Inputs for graphs: of the spec's dtypes and shapes, the same for the same seed, and real ones
through the model.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from regionspot.errors import InputError
from regionspot.export.graph_inputs import GraphInputs
from regionspot.export.pictures import Pictures
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.graph_spec import GraphSpec, Range
from regionspot.runtime.graphs import GRAPHS
from regionspot.runtime.runner import check_feeds
from regionspot.structures import PADDING

SIZES = {
    "batch": 2,
    "regions": 4,
    "prompts": 4,
    "points": 3,
    "tokens": 2,
    "words": 6,
    "texts": 5,
    "text_length": 7,
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_seeded(graph_inputs: GraphInputs, specs: dict[str, GraphSpec], graph: str) -> None:
    spec = specs[graph]
    sizes = {axis: SIZES[axis] for axis in spec.ranges}
    feeds, again, other = (graph_inputs.seeded(spec, seed, sizes) for seed in (0, 0, 1))
    check_feeds(spec, feeds)
    for tensor in spec.inputs:
        assert feeds[tensor.name].shape == tensor.resolved(sizes)
        np.testing.assert_array_equal(feeds[tensor.name], again[tensor.name])
    assert any(not np.array_equal(feeds[name], other[name]) for name in spec.input_names)
    best = graph_inputs.seeded(spec)
    for tensor in spec.inputs:
        assert best[tensor.name].shape == tensor.resolved(
            {axis: size.opt for axis, size in spec.ranges.items()}
        )


@pytest.mark.parametrize("graph", GRAPHS)
def test_real(graph_inputs: GraphInputs, specs: dict[str, GraphSpec], graph: str) -> None:
    assert graph_inputs.pictures is not None
    feeds = graph_inputs.real(specs[graph], 3)
    assert len(feeds) == (1 if graph == "clip_text_encoder" else 3)
    for feed in feeds:
        check_feeds(specs[graph], feed)
    for axis in {"regions", "prompts"} & set(specs[graph].ranges):
        name = next(tensor.name for tensor in specs[graph].inputs if axis in tensor.shape)
        counts = [len(picture.boxes) for picture in graph_inputs.pictures.pictures[:3]]
        assert [feed[name].shape[1] for feed in feeds] == counts


@torch.no_grad()
def test_the_chain_is_the_model(
    mini: RegionSpot, graph_inputs: GraphInputs, specs: dict[str, GraphSpec]
) -> None:
    (encoder,) = graph_inputs.real(specs["sam_image_encoder"], 1)
    (prompts,) = graph_inputs.real(specs["sam_token_decoder_prompts"], 1)
    (head,) = graph_inputs.real(specs["region_head"], 1)
    images = torch.from_numpy(encoder["images"]).permute(0, 3, 1, 2)
    embeddings = mini.sam.encode_image(images, torch.from_numpy(encoder["input_sizes"]))
    points, labels = torch.from_numpy(prompts["points"]), torch.from_numpy(prompts["labels"])
    tokens = mini.sam.mask_tokens(embeddings, points, labels).tokens[:, :, 0]
    torch.testing.assert_close(torch.from_numpy(head["mask_tokens"]), tokens, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(head["text_embeddings"], axis=1), 1, atol=1e-5)
    assert head["valid"].all() and set(prompts["labels"].ravel()) == {2, 3}


def test_batches_are_padded_and_ranges_kept(
    graph_inputs: GraphInputs, specs: dict[str, GraphSpec]
) -> None:
    assert graph_inputs.pictures is not None
    counts = [len(picture.boxes) for picture in graph_inputs.pictures.pictures]
    spec = replace(
        specs["region_recognizer"],
        ranges={**specs["region_recognizer"].ranges, "batch": Range(2, 2, 2)},
    )
    feeds = graph_inputs.real(spec, 5)
    assert len(feeds) == 2  # the fifth has no other to go with
    for start, feed in zip((0, 2), feeds, strict=True):
        assert feed["valid"].sum(1).tolist() == counts[start : start + 2]
        assert feed["valid"].shape == (2, max(counts[start : start + 2]))
    ranges = {**specs["region_head"].ranges, "regions": Range(2, 2, 2), "words": Range(1, 1, 5)}
    for feed in graph_inputs.real(replace(specs["region_head"], ranges=ranges), 4):
        assert feed["valid"].shape == (1, 2) and len(feed["text_embeddings"]) == 5
    ranges = {**specs["sam_token_decoder_prompts"].ranges, "prompts": Range(20, 20, 30)}
    feed = graph_inputs.real(replace(specs["sam_token_decoder_prompts"], ranges=ranges), 1)[0]
    assert (feed["labels"][0, :, 0] != PADDING).sum() == counts[0] and feed["labels"].shape == (
        1,
        20,
        2,
    )


def test_words_within_the_ranges(graph_inputs: GraphInputs, specs: dict[str, GraphSpec]) -> None:
    text = specs["clip_text_encoder"]
    tokens = graph_inputs.real(text)[0]["tokens"]
    assert len(tokens) == 80 and tokens.dtype == np.int32
    assert (tokens != 0).any(0).all()  # no column of padding alone
    cut = replace(text, ranges={"texts": Range(1, 4, 10), "text_length": Range(5, 5, 5)})
    assert graph_inputs.real(cut)[0]["tokens"].shape == (10, 5)


def test_no_pictures(mini: RegionSpot, specs: dict[str, GraphSpec]) -> None:
    for pictures in (None, Pictures("nothing", (), ("toy",))):
        with pytest.raises(InputError, match="real inputs need pictures"):
            GraphInputs(mini, pictures).real(specs["region_head"])

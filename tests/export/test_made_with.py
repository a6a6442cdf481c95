"""Fingerprints, preprocessing and versions that go into a manifest."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.errors import ArtifactError
from regionspot.export.made_with import build_host, preprocessing_of, versions
from regionspot.modeling.pipelines import graph_fingerprints
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.provenance import version_of
from regionspot.runtime.engine_file import BuildHost
from regionspot.runtime.nvidia import read_driver
from regionspot.runtime.preprocessing import Preprocessing
from regionspot.transforms import RESIZE, resize_image


@pytest.fixture(scope="module")
def model() -> RegionSpot:
    return create_model("regionspot_mini")


def test_preprocessing_of_a_model(model: RegionSpot) -> None:
    found = preprocessing_of(model)
    np.testing.assert_allclose(found.sam_mean, [123.675, 116.28, 103.53])
    np.testing.assert_allclose(
        np.array(found.clip_std) / 255, [0.26862954, 0.26130258, 0.27577711], rtol=1e-6
    )
    assert found.resize == RESIZE and found.upright
    found.check("here")
    assert Preprocessing.from_json(found.to_json()) == found


def test_a_preprocessing_of_another_release_is_refused(model: RegionSpot) -> None:
    own = preprocessing_of(model)
    for field, value in asdict(own).items():
        if field.endswith(("mean", "std")):
            continue
        change: dict[str, Any] = {
            field: not value if isinstance(value, bool) else f"{value} once more"
        }
        other = replace(own, **change)
        assert other.fingerprint() != own.fingerprint()
        with pytest.raises(
            ArtifactError, match=f"manifest.json was made for another preprocessing.*{field}"
        ):
            other.check("manifest.json")


def test_the_resize_is_the_one_that_is_named() -> None:
    """What a manifest promises: antialiased, on uint8; not what OpenCV or torch without antialias
    would give.
    """
    stripes = np.tile(np.array([0, 255], np.uint8), (8, 32))[..., None].repeat(3, axis=2)
    assert (
        "antialiased" in RESIZE
        and np.abs(resize_image(stripes, 2, 8).astype(int) - 128).max() <= 32
    )


def own_tensor(model: RegionSpot, name: str) -> torch.Tensor:
    return dict([*model.named_parameters(), *model.named_buffers()])[name]


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        ("head.to_clip.weight", "region_head"),
        ("clip.clip.logit_scale", "region_head"),
        ("sam.sam.mask_decoder.iou_token.weight", "sam_token_decoder_prompts"),
        ("sam.sam.pixel_mean", "sam_image_encoder"),  # not in the state
        ("clip.image_std", "clip_image_encoder"),
        ("clip.clip.visual.proj", "region_recognizer"),
    ],
)
def test_a_fingerprint_changes_with_any_number(model: RegionSpot, name: str, graph: str) -> None:
    before = graph_fingerprints(model)(graph)
    tensor = own_tensor(model, name)
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.view(-1)[-1] += 1
        assert graph_fingerprints(model)(graph) != before
        tensor.copy_(kept)
    assert graph_fingerprints(model)(graph) == before


def test_what_is_derived_from_weights_does_not_count(model: RegionSpot) -> None:
    """Its last digits differ between machines, and artefacts are moved between them."""
    before = graph_fingerprints(model)("sam_token_decoder_image")
    tensor = model.sam.token_decoder.out0_scaled
    kept = tensor.clone()
    tensor.mul_(1 + 1e-6)
    assert graph_fingerprints(model)("sam_token_decoder_image") == before
    tensor.copy_(kept)


def test_other_graphs_keep_theirs(model: RegionSpot) -> None:
    own, other = graph_fingerprints(model), graph_fingerprints(replace_head(model))
    assert own("clip_image_encoder") == other("clip_image_encoder")
    assert own("region_head") != other("region_head")


def replace_head(model: RegionSpot) -> RegionSpot:
    return RegionSpot(
        model.sam, model.clip, create_model("regionspot_mini", random_weights=1).head, model.name
    )


def test_versions() -> None:
    onnx = versions("onnx")
    assert {"regionspot", "python", "torch", "onnx", "onnxruntime"} <= set(onnx)
    assert onnx["torch"] == version_of("torch") and "openvino" not in onnx
    assert set(versions("openvino")) == {*onnx, "openvino"}


def test_where_an_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build_host() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    driver = read_driver()
    found = driver.version if driver else None
    assert build_host() == BuildHost(120, found, torch.version.cuda)

"""Presets: which files they ask for, and what they build without them."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from regionspot.errors import ArtifactError, InputError
from regionspot.modeling import presets
from regionspot.modeling.checkpoint import save_head
from regionspot.modeling.clip import build_clip
from regionspot.modeling.head import RegionHead
from regionspot.modeling.presets import create_backbones, create_model, list_presets


def test_names() -> None:
    names = list_presets()
    assert len(names) == len(set(names)) == 10
    assert {"regionspot_mini", "regionspot_bb", "regionspot_bl_336", "regionspot_bl_sam_h"} <= set(
        names
    )
    with pytest.raises(
        InputError, match=r"no model 'regionspot_xl': choose one of regionspot_mini"
    ):
        create_model("regionspot_xl")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("regionspot_bb", ("sam_vit_b_01ec64.pth", "/ViT-B-16.pt")),
        ("regionspot_bl_sam_l", ("sam_vit_l_0b3195.pth", "/ViT-L-14.pt")),
        ("regionspot_bl_336_sam_h", ("sam_vit_h_4b8939.pth", "/ViT-L-14-336px.pt")),
    ],
)
def test_missing_weights_say_which_and_where(name: str, files: tuple[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        create_model(name)
    message = str(caught.value)
    for part in (
        *files,
        "https://dl.fbaipublicfiles.com",
        "https://openaipublic",
        "SHA-256",
        "regionspot convert",
    ):
        assert part in message
    with pytest.raises(InputError) as caught:
        create_backbones(name, clip_weights=__file__)
    assert "sam_weights" in str(caught.value) and "head_weights" not in str(caught.value)


def test_openai_urls_are_those_that_open_clip_knows() -> None:
    import open_clip

    for name, file in presets.CLIP_FILES.items():
        assert open_clip.get_pretrained_url(name, "openai") == file.url


def test_absent_files_are_found_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "build_sam", lambda _: pytest.fail("built too early"))
    with pytest.raises(
        ArtifactError,
        match=r"sam_weights .*absent\.pth does not exist; regionspot_bb takes sam_vit_b",
    ):
        create_model("regionspot_bb", tmp_path / "absent.pth", __file__, __file__)


@pytest.fixture
def small_bb(monkeypatch: pytest.MonkeyPatch) -> None:
    """regionspot_bb with a quarter of its CLIP."""
    monkeypatch.setitem(presets.PRESETS, "regionspot_bb", presets.Preset("vit_b", "ViT-S-16"))
    monkeypatch.setitem(
        presets.CLIP_FILES, "ViT-S-16", presets.WeightFile("ViT-S-16.pt", "nowhere", "0")
    )


@pytest.mark.usefixtures("small_bb")
def test_random_weights_follow_the_seed_and_leave_the_global_generator() -> None:
    state = torch.get_rng_state()
    first, second = (create_model("regionspot_bb", random_weights=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name == "regionspot_bb" and not first.training and not first.head.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.head.to_clip.weight, first_head_weight(seed=4))


def first_head_weight(seed: int) -> torch.Tensor:
    with presets._seeded(seed):
        return RegionHead(256, 384, 384).to_clip.weight


@pytest.mark.usefixtures("small_bb")
def test_head_of_another_preset_is_refused(tmp_path: Path) -> None:
    save_head(RegionHead(256, 64, 16, feedforward_dim=8), tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="made for other backbones"):
        create_model("regionspot_bb", head_weights=tmp_path / "head.safetensors", random_weights=0)


@pytest.mark.usefixtures("small_bb")
def test_weights_of_unknown_origin_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CLIP that others trained has the same names and shapes, and another activation and
    normalisation.
    """
    clip, path = build_clip("ViT-S-16"), tmp_path / "laion.safetensors"
    save_file(clip.state_dict(), path)
    with pytest.warns(presets.UnknownWeightsWarning) as caught:
        create_backbones("regionspot_bb", clip_weights=path, random_weights=0)
    (message,) = (str(one.message) for one in caught)
    for part in (
        f"clip_weights {path} is not ViT-S-16.pt as published",
        "QuickGELU",
        "LAION",
        presets.TRUST,
    ):
        assert part in message
    official = presets.WeightFile(
        "ViT-S-16.pt", "nowhere", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setenv(presets.TRUST, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_backbones("regionspot_bb", clip_weights=path, random_weights=0)
        monkeypatch.delenv(presets.TRUST)
        monkeypatch.setitem(presets.CLIP_FILES, "ViT-S-16", official)
        create_backbones("regionspot_bb", clip_weights=path, random_weights=0)


def test_mini_takes_no_foreign_towers() -> None:
    with pytest.raises(InputError, match="brings its own SAM and CLIP"):
        create_model("regionspot_mini", sam_weights="sam.pth")


def test_random_mini_runs_end_to_end() -> None:
    model = create_model("regionspot_mini", random_weights=1)
    images = torch.zeros(1, 3, model.sam.image_size, model.sam.image_size, dtype=torch.uint8)
    embeddings = model.sam.encode_image(images, torch.tensor([[200, 256]]))
    tokens = model.sam.mask_tokens(
        embeddings, torch.tensor([[[[5.0, 5.0], [90.0, 80.0]]]]), torch.tensor([[[2, 3]]])
    )
    patch_tokens = model.clip.encode_image(images[..., :192, :192])
    assert (model.sam.token_dim, model.clip.num_tokens, model.clip.width, model.clip.embed_dim) == (
        128,
        145,
        192,
        128,
    )
    assert model.classify(tokens.tokens[:, :, 0], patch_tokens, torch.eye(128)[:3]).shape == (
        1,
        1,
        3,
    )

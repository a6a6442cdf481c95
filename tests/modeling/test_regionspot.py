"""The composed model: frozen is frozen, parts must fit, and the logits are the specification's."""

from __future__ import annotations

import pytest
import torch
from open_clip import CLIP
from segment_anything.modeling import Sam
from torch.nn import functional as F

from regionspot.errors import InputError
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.head import RegionHead
from regionspot.modeling.losses import sigmoid_focal_loss
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone


@pytest.fixture
def model(tiny_sam: Sam, tiny_clip: CLIP) -> RegionSpot:
    sam, clip = SamBackbone(tiny_sam), ClipBackbone(tiny_clip)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head = RegionHead(sam.token_dim, clip.width, clip.embed_dim, feedforward_dim=64)
    return RegionSpot(sam, clip, head)


def training_step(model: RegionSpot, generator: torch.Generator) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    corners = (64 * torch.rand(2, 3, 2, 2, generator=generator)).sort(dim=2).values
    embeddings = model.sam.encode_image(images, torch.tensor([[64, 64], [40, 64]]))
    tokens, _ = model.sam.mask_tokens(embeddings, corners, torch.tensor([2, 3]).expand(2, 3, 2))
    patch_tokens = model.clip.encode_image(images[..., ::2, ::2])
    words = F.normalize(model.clip.encode_text(["cat", "dog", "cup", "tree"]), dim=-1)
    logits = model.classify(
        tokens.squeeze(2), patch_tokens, words, torch.tensor([[True] * 3, [True, True, False]])
    )
    loss = sigmoid_focal_loss(logits, torch.tensor([[0, 1, 2], [3, 0, 0]]))
    # given every parameter, on purpose
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loss.backward()
    optimizer.step()


def test_frozen_is_frozen_after_a_training_step(
    model: RegionSpot, generator: torch.Generator
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    training_step(model, generator)
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {f"head.{name}" for name, _ in model.head.named_parameters()}
    for tower in (model.sam, model.clip):
        assert all(
            parameter.grad is None and not parameter.requires_grad
            for parameter in tower.parameters()
        )


def test_train_switches_only_the_head(model: RegionSpot) -> None:
    model.train()
    assert model.training and all(module.training for module in model.head.modules())
    for tower in (model.sam, model.clip):
        assert not any(module.training for module in tower.modules())
        tower.train()
        assert not any(module.training for module in tower.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_trainable_parameters_are_the_heads(model: RegionSpot) -> None:
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in model.trainable_parameters()} == trainable
    assert len(trainable) == len(list(model.head.parameters()))


def test_towers_build_no_graph(model: RegionSpot) -> None:
    patch_tokens = model.clip.encode_image(torch.zeros(1, 3, 32, 32))
    assert not patch_tokens.requires_grad and patch_tokens.grad_fn is None


@torch.no_grad()
def test_logits_are_scaled_cosines(model: RegionSpot, generator: torch.Generator) -> None:
    model.eval()
    mask_tokens, patch_tokens = (
        torch.randn(2, *shape, generator=generator) for shape in ((3, 32), (17, 48))
    )
    words = F.normalize(torch.randn(5, 24, generator=generator), dim=-1)
    logits = model.classify(mask_tokens, patch_tokens, words)
    regions = F.normalize(model.head(mask_tokens, patch_tokens), dim=-1)
    torch.testing.assert_close(
        logits, model.clip.clip.logit_scale.exp() * regions @ words.T, rtol=1e-4, atol=1e-4
    )


def test_no_regions(model: RegionSpot) -> None:
    logits = model.classify(torch.zeros(1, 0, 32), torch.zeros(1, 17, 48), torch.eye(24)[:4])
    assert logits.shape == (1, 0, 4)


def test_head_of_other_towers_is_refused(model: RegionSpot) -> None:
    with pytest.raises(
        InputError, match="takes 256-d mask tokens and 48-d CLIP tokens to 24-d embeddings"
    ):
        RegionSpot(model.sam, model.clip, RegionHead(256, 48, 24))

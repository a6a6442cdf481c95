"""Input statistics against numpy, and folded into a head."""

from __future__ import annotations

import numpy as np
import torch

from regionspot.data.collate import Batch
from regionspot.modeling.head import RegionHead, fold_input_standardization
from regionspot.training.standardize import InputStatistics


class Batches:
    """Batches of different padding, far from zero, with a channel that is constant."""

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        valid = torch.rand(3, 2 + step, generator=generator) < 0.7
        tokens = (
            torch.randn(3, 2 + step, 4, generator=generator) * torch.tensor([1.0, 5, 0.1, 0]) + 30
        )
        patches = torch.randn(3, 5, 8, generator=generator) * 3 - 7
        return Batch(
            0,
            tokens * valid[..., None],
            patches,
            torch.zeros(valid.shape, dtype=torch.int64),
            valid,
        )


def test_padding_does_not_count_and_a_constant_channel_keeps_its_scale() -> None:
    statistics = InputStatistics.measure(Batches(), 6)
    batches = [Batches().batch(step) for step in range(6)]
    tokens = np.concatenate([b.mask_tokens[b.valid].numpy() for b in batches])
    patches = np.concatenate([b.patch_tokens.flatten(0, 1).numpy() for b in batches])
    np.testing.assert_allclose(statistics.token_mean, tokens.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.token_std[:3], tokens.std(0)[:3], rtol=1e-4)
    assert statistics.token_std[3] == 1
    np.testing.assert_allclose(statistics.patch_mean, patches.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.patch_std, patches.std(0), rtol=1e-5)


def test_the_folded_head_on_raw_inputs_is_the_head_on_standardised_ones() -> None:
    torch.manual_seed(0)
    head = RegionHead(4, 8, 6, num_layers=2, num_heads=2, feedforward_dim=16).double().eval()
    statistics, raw = InputStatistics.measure(Batches(), 6), Batches().batch(1)
    standardised = statistics.apply(raw)
    assert abs(float(standardised.patch_tokens.mean())) < 0.5
    folded = fold_input_standardization(head, **statistics.to_tensors())
    with torch.no_grad():
        expected = head(
            standardised.mask_tokens.double(), standardised.patch_tokens.double(), raw.valid
        )
        actual = folded(raw.mask_tokens.double(), raw.patch_tokens.double(), raw.valid)
    torch.testing.assert_close(actual[raw.valid], expected[raw.valid], rtol=1e-5, atol=1e-5)

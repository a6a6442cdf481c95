"""The head against a second formulation from `torch.nn` blocks alone, and what padding may and may
not do.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regionspot.errors import InputError
from regionspot.modeling.head import Attention, RegionHead, fold_input_standardization

TOKEN_DIM, WIDTH, EMBED_DIM = 20, 48, 24


class ReferenceHead(nn.Module):
    """The specification in `nn.TransformerDecoder`; its parameter names are those of the authors'
    checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_clip = nn.Linear(TOKEN_DIM, WIDTH)
        layer = nn.TransformerDecoderLayer(
            WIDTH, 8, dim_feedforward=2048, dropout=0.1, batch_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, num_layers=3, norm=nn.LayerNorm(WIDTH))
        self.projector = nn.Linear(WIDTH, EMBED_DIM)

    def forward(
        self, mask_tokens: Tensor, patch_tokens: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        padding = None if valid is None else ~valid
        return self.projector(
            self.decoder(self.to_clip(mask_tokens), patch_tokens, tgt_key_padding_mask=padding)
        )


@pytest.fixture
def head() -> RegionHead:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        head = RegionHead(TOKEN_DIM, WIDTH, EMBED_DIM)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return head.eval()


@pytest.fixture
def mask_tokens(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 6, TOKEN_DIM, generator=generator)


@pytest.fixture
def patch_tokens(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 17, WIDTH, generator=generator)


def reference(head: RegionHead) -> ReferenceHead:
    module = ReferenceHead().eval()
    module.load_state_dict(head.state_dict())
    return module


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_equals_torch_transformer_decoder(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    assert_close(head(mask_tokens, patch_tokens), reference(head)(mask_tokens, patch_tokens))


def test_equals_torch_transformer_decoder_with_padding(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    valid = torch.arange(6) < torch.tensor([[6], [1], [4]])
    actual = head(mask_tokens, patch_tokens, valid)
    assert_close(actual[valid], reference(head)(mask_tokens, patch_tokens, valid)[valid])


def test_gradients_equal_torch_transformer_decoder(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    other = reference(head)
    for module in (head, other):
        module(mask_tokens, patch_tokens).square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(
            head.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4
        )


def test_padding_equals_no_padding(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    counts = (6, 1, 4)
    valid = torch.arange(6) < torch.tensor(counts)[:, None]
    padded = head(mask_tokens, patch_tokens, valid)
    for image, count in enumerate(counts):
        rows = slice(image, image + 1)
        assert_close(padded[image, :count], head(mask_tokens[rows, :count], patch_tokens[rows])[0])


def test_what_stands_in_the_padding_does_not_matter(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    valid = torch.arange(6) < torch.tensor([[5], [1], [4]])
    other = torch.where(valid.unsqueeze(-1), mask_tokens, 100 * mask_tokens + 7)
    assert_close(
        head(other, patch_tokens, valid)[valid], head(mask_tokens, patch_tokens, valid)[valid]
    )


def test_regions_see_each_other(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    alone = head(mask_tokens[:, :1], patch_tokens)
    assert not torch.allclose(alone, head(mask_tokens, patch_tokens)[:, :1], atol=1e-3)


def test_order_of_regions_does_not_matter(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(
        head(mask_tokens[:, order], patch_tokens), head(mask_tokens, patch_tokens)[:, order]
    )


@pytest.mark.parametrize("valid", [None, torch.zeros(3, 0, dtype=torch.bool)])
def test_no_regions(head: RegionHead, patch_tokens: Tensor, valid: Tensor | None) -> None:
    assert head(torch.zeros(3, 0, TOKEN_DIM), patch_tokens, valid).shape == (3, 0, EMBED_DIM)


@pytest.mark.parametrize("training", [False, True])
def test_image_of_padding_alone_stays_finite(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor, training: bool
) -> None:
    valid = torch.tensor([[True] * 6, [False] * 6, [True] * 3 + [False] * 3])
    with torch.random.fork_rng():
        embeddings = head.train(training)(mask_tokens, patch_tokens, valid)
    assert embeddings.isfinite().all()
    embeddings[valid].square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in head.parameters()
    )


def test_dropout_only_in_training(
    head: RegionHead, mask_tokens: Tensor, patch_tokens: Tensor
) -> None:
    with torch.random.fork_rng():
        head.train()
        assert not torch.equal(head(mask_tokens, patch_tokens), head(mask_tokens, patch_tokens))
        head.eval()
        assert torch.equal(head(mask_tokens, patch_tokens), head(mask_tokens, patch_tokens))


def test_folded_standardization_takes_raw_inputs(
    head: RegionHead, generator: torch.Generator
) -> None:
    token_mean, patch_mean = (
        3 * torch.randn(size, generator=generator) for size in (TOKEN_DIM, WIDTH)
    )
    token_std, patch_std = (
        0.5 + 2 * torch.rand(size, generator=generator) for size in (TOKEN_DIM, WIDTH)
    )
    tokens = torch.randn(2, 5, TOKEN_DIM, generator=generator) * token_std + token_mean
    patches = torch.randn(2, 9, WIDTH, generator=generator) * patch_std + patch_mean
    expected = head((tokens - token_mean) / token_std, (patches - patch_mean) / patch_std)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    folded = fold_input_standardization(head, token_mean, token_std, patch_mean, patch_std)
    assert_close(folded(tokens, patches), expected)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_folding_a_constant_channel_is_refused(head: RegionHead) -> None:
    zeros, ones = torch.zeros(TOKEN_DIM), torch.ones(WIDTH)
    with pytest.raises(InputError, match="token_std must be positive"):
        fold_input_standardization(head, zeros, zeros, ones, ones)


@pytest.mark.parametrize(("width", "embed_dim", "millions"), [(768, 512, 24.2), (1024, 768, 38.9)])
def test_published_sizes(width: int, embed_dim: int, millions: float) -> None:
    with torch.device("meta"):
        head = RegionHead(256, width, embed_dim)
    count = sum(parameter.numel() for parameter in head.parameters())
    assert round(count / 1e6, 1) == millions


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="8 attention heads do not divide a width of 50"):
        RegionHead(16, 50, 8)


class TestFewRegions:
    """In training, few regions attend to the patches without projecting them."""

    @pytest.fixture
    def attention(self, generator: torch.Generator) -> Attention:
        attention = Attention(WIDTH, 8, dropout=0.0).double()
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
                )
        return attention

    def _inputs(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        queries = torch.randn(
            3, count, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True
        )
        return queries, torch.randn(3, 17, WIDTH, generator=generator, dtype=torch.float64)

    @pytest.mark.parametrize("count", [1, 4])
    def test_values_and_gradients_are_the_same(
        self, attention: Attention, generator: torch.Generator, count: int
    ) -> None:
        queries, context = self._inputs(count, generator)
        assert attention._few(queries, context)
        found = []
        for training in (True, False):
            output = attention.train(training)(queries, context)
            found.append(
                (
                    output,
                    *torch.autograd.grad(output.square().sum(), [queries, *attention.parameters()]),
                )
            )
        for few, usual in zip(*found, strict=True):
            torch.testing.assert_close(few, usual, rtol=1e-10, atol=1e-10)

    def test_dropped_weights_take_their_share_of_the_bias_along(
        self, attention: Attention, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queries, context = self._inputs(2, generator)
        kept = torch.rand(3, 8 * 2, 17, generator=generator) < 0.5  # (B, HN, M)
        monkeypatch.setattr(
            "regionspot.modeling.head.F.dropout", lambda weights, rate: weights * kept
        )
        found = attention.train()(queries, context)
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
        split = [
            attention._split_heads(part) for part in (queries @ w_q.T + b_q, context @ w_k.T + b_k)
        ]
        weights = (split[0] @ split[1].transpose(2, 3) / 6**0.5).softmax(3) * kept.unflatten(
            1, (8, 2)
        )
        expected = weights @ attention._split_heads(context @ w_v.T + b_v)  # (B, H, N, d)
        torch.testing.assert_close(found, attention.out_proj(expected.transpose(1, 2).flatten(2)))

    def test_many_regions_project_the_patches_once(
        self, attention: Attention, generator: torch.Generator
    ) -> None:
        assert not attention._few(*self._inputs(6, generator))

"""Learning rates against PyTorch's own schedulers, and the optimiser's state through a round
trip.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regionspot.config import OptimizerConfig
from regionspot.errors import InputError
from regionspot.modeling.head import RegionHead
from regionspot.training.optim import (
    Precision,
    WeightAverage,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)

CPU = torch.device("cpu")


def test_the_multistep_schedule_is_the_recipe() -> None:
    """spec.md: 2.5e-5, warm-up 1000 iterations from a factor of 0.01, x0.1 at 350 k and 420 k of
    450 k.
    """
    config = OptimizerConfig()
    rates = {
        step: learning_rate(step, 450_000, config)
        for step in (0, 500, 1000, 349_999, 350_000, 420_000, 449_999)
    }
    expected = [2.5e-7, 2.5e-5 * 0.505, 2.5e-5, 2.5e-5, 2.5e-6, 2.5e-7, 2.5e-7]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-12)


def test_schedules_equal_pytorchs() -> None:
    config = OptimizerConfig(learning_rate=1.0, milestones=(6, 8), warmup_steps=0, decay_factor=0.3)
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=0)
    warm = OptimizerConfig(learning_rate=1.0, milestones=(), warmup_steps=4, warmup_factor=0.2)
    for ours, scheduler in [
        (config, lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [6, 8], 0.3)),
        (cosine, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)),
        (warm, lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.2, 1.0, 4)),
    ]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs, rates = scheduler(optimizer), []
        for _ in range(10):
            rates.append(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()
        assert [learning_rate(step, 10, ours) for step in range(10)] == pytest.approx(
            rates, rel=1e-6
        )


def test_optimizer_state_survives_a_round_trip() -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(3, 2), nn.Linear(3, 2)]
    modules[1].load_state_dict(modules[0].state_dict())
    first, second = (
        build_optimizer(module, OptimizerConfig(learning_rate=0.1)) for module in modules
    )

    def step(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    step(modules[0], first)
    assert optimizer_tensors(second, modules[1]) == {}
    tensors = {
        name: tensor.clone() for name, tensor in optimizer_tensors(first, modules[0]).items()
    }
    assert set(tensors) == {
        f"{p}.{s}" for p in ("weight", "bias") for s in ("step", "exp_avg", "exp_avg_sq")
    }
    modules[1].load_state_dict(modules[0].state_dict())
    load_optimizer_tensors(second, modules[1], tensors)
    step(modules[0], first)
    step(modules[1], second)
    assert torch.equal(modules[0].weight, modules[1].weight) and torch.equal(
        modules[0].bias, modules[1].bias
    )


def test_the_average_follows_slowly() -> None:
    head = RegionHead(4, 8, 4, num_layers=1, num_heads=2, feedforward_dim=8)
    average = WeightAverage(head, 0.75, ramp=False)
    before = head.projector.bias.detach().clone()
    with torch.no_grad():
        head.projector.bias.add_(4)
    average.update(head, 0)
    torch.testing.assert_close(average.head.projector.bias, before + 1)
    assert not any(p.requires_grad for p in average.head.parameters())


def test_the_average_forgets_the_initial_weights_within_its_first_steps() -> None:
    """At a decay of 0.9998 without a ramp, 96 % of the average would be the initial weights after
    200 steps.
    """
    head = RegionHead(4, 8, 4, num_layers=1, num_heads=2, feedforward_dim=8)
    average = WeightAverage(head, 0.9998)
    initial = head.projector.bias.detach().clone()
    with torch.no_grad():
        head.projector.bias.copy_(initial + 1)
    for step in range(200):
        average.update(head, step)
    assert (average.head.projector.bias - initial).min() > 0.999
    assert [average.decay_of(step) for step in (0, 10, 10**6)] == [0.1, 0.55, 0.9998]


def test_precision() -> None:
    assert Precision.resolve("auto", CPU).dtype is None  # bf16 is slower than float32 on most CPUs
    assert Precision.resolve("off", torch.device("cuda")).dtype is None
    assert Precision.resolve("bf16", CPU).dtype is torch.bfloat16
    assert not Precision.resolve("bf16", CPU).scaler().is_enabled()
    with pytest.raises(InputError, match="amp=fp16 needs a GPU"):
        Precision.resolve("fp16", CPU)


@pytest.mark.gpu
def test_precision_on_a_gpu() -> None:
    assert Precision.resolve("auto", torch.device("cuda")).dtype in (torch.bfloat16, torch.float16)
    assert Precision.resolve("fp16", torch.device("cuda")).scaler().is_enabled()

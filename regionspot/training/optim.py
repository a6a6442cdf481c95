"""The optimiser, the learning rate of each step, mixed precision and the moving average of
weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regionspot.config import OptimizerConfig
from regionspot.errors import InputError
from regionspot.modeling.head import RegionHead


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of a step, counted from 0: a pure function, so a resumed run needs no state
    for it.

    The base rate times a linear warm-up from `warmup_factor` to 1 over `warmup_steps`, times the
    schedule: "multistep" is `decay_factor` for each milestone that is past; "cosine" is half a
    cosine from 1 to 0 over all steps.
    """
    rate = config.learning_rate
    if step < config.warmup_steps:
        progress = step / config.warmup_steps
        rate *= config.warmup_factor * (1 - progress) + progress
    if config.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return rate * config.decay_factor ** sum(step >= milestone for milestone in config.milestones)


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all of a module's parameters, in its fused form: one kernel for all of them."""
    return torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


@dataclass(frozen=True)
class Precision:
    """What the forward pass computes in. `dtype` None is float32 throughout."""

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def resolve(cls, amp: str, device: torch.device) -> Precision:
        """From the configuration's "auto", "off", "bf16" or "fp16".

        "auto" is off on the CPU, where bf16 is slower than float32.

        Raises:
            InputError: fp16 on the CPU, which would need a scaler that does not exist there.
        """
        if amp == "off" or (amp == "auto" and device.type != "cuda"):
            return cls(device, None)
        if amp == "fp16" and device.type == "cpu":
            raise InputError(
                "amp=fp16 needs a GPU: use amp=off (or amp=bf16, which is slower on most CPUs)"
            )
        if amp == "auto":
            amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return cls(device, torch.bfloat16 if amp == "bf16" else torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        return (
            contextlib.nullcontext()
            if self.dtype is None
            else torch.autocast(self.device.type, self.dtype)
        )

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where float16 gradients would vanish, and does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


class WeightAverage:
    """An exponential moving average of a head's weights.

    Args:
        decay: the fraction of the average that remains after a step.
        ramp: use at most (1 + step) / (10 + step), so that the average forgets the initial weights
            within a few steps instead of within 1 / (1 - decay). It depends on the step alone: a
            resumed run needs no state for it.
    """

    def __init__(self, head: RegionHead, decay: float, ramp: bool = True) -> None:
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.decay, self.ramp = decay, ramp

    def decay_of(self, step: int) -> float:
        """The decay of a step, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, head: RegionHead, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        weight_of_new = 1 - self.decay_of(step)
        for average, weight in zip(self.head.parameters(), head.parameters(), strict=True):
            average.lerp_(weight, weight_of_new)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: {"to_clip.weight.exp_avg": …}."""
    names = [name for name, _ in module.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}.{key}": value
        for index, entry in state.items()
        for key, value in entry.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    names = [name for name, _ in module.named_parameters()]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        state.setdefault(names.index(name), {})[entry] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )

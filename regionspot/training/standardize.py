"""Training on inputs of mean 0 and deviation 1. The head that is saved takes raw inputs all the
same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from regionspot.data.collate import Batch, BatchSource

CONSTANT = 1e-6
"""A channel that deviates less is left at its own scale."""


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Mean and standard deviation of each channel: (C,) of mask tokens, (D,) of CLIP's tokens,
    class token included.
    """

    token_mean: Tensor
    token_std: Tensor
    patch_mean: Tensor
    patch_std: Tensor

    @classmethod
    def measure(cls, batches: BatchSource, num_batches: int) -> InputStatistics:
        """From the first `num_batches` batches, as training will see them."""
        tokens, patches = _Moments(), _Moments()
        for step in range(num_batches):
            batch = batches.batch(step)
            tokens.add(batch.mask_tokens[batch.valid])  # (r, C)
            patches.add(batch.patch_tokens.flatten(0, 1))  # (B * L, D)
        return cls(*tokens.mean_and_std(), *patches.mean_and_std())

    def to_tensors(self) -> dict[str, Tensor]:
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}

    def to(self, device: torch.device) -> InputStatistics:
        return InputStatistics(
            **{name: tensor.to(device) for name, tensor in self.to_tensors().items()}
        )

    def apply(self, batch: Batch) -> Batch:
        """The batch with standardised inputs."""
        return Batch(
            batch.dataset,
            (batch.mask_tokens - self.token_mean) / self.token_std,
            (batch.patch_tokens - self.patch_mean) / self.patch_std,
            batch.class_ids,
            batch.valid,
        )


class _Moments:
    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self.sum) / self.count
        std = (torch.as_tensor(self.squares) / self.count - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(std < CONSTANT, 1.0, std).float()

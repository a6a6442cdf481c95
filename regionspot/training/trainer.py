"""One step after another: the head, its optimiser, and the state that a checkpoint keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regionspot.data.collate import BatchSource
from regionspot.data.dataset import step_seed
from regionspot.modeling.head import RegionHead, fold_input_standardization
from regionspot.modeling.losses import region_logits, sigmoid_focal_loss
from regionspot.training.optim import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from regionspot.training.resume import Checkpoint
from regionspot.training.setup import Setup
from regionspot.training.standardize import InputStatistics

STATISTICS_BATCHES = 64


@dataclass(frozen=True, eq=False)
class StepReport:
    """What a step did; `step` counts from 1. `loss` and `grad_norm` (before clipping) are scalars
    on the device.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    num_images: int


class Trainer:
    """The head, its optimiser and everything else that a step reads or changes.

    Args:
        checkpoint: what to go on from; None to begin.
    """

    def __init__(
        self, setup: Setup, batches: BatchSource, checkpoint: Checkpoint | None = None
    ) -> None:
        self.config, self.device, self.precision = setup.config, setup.device, setup.precision
        self.batches = batches
        self.logit_scale = setup.clip.logit_scale
        embeddings = [vocabulary.embeddings for vocabulary in setup.vocabularies]
        self.text_embeddings = [
            torch.from_numpy(of_set).to(self.device) for of_set in embeddings
        ]  # (V, E) each
        self.head = setup.build_head().train()
        self.optimizer = build_optimizer(self.head, self.config.optimizer)
        self.scaler = self.precision.scaler()
        optimizer = self.config.optimizer
        decay = optimizer.ema_decay
        self.average = WeightAverage(self.head, decay, optimizer.ema_ramp) if decay else None
        self.statistics: InputStatistics | None = None
        if checkpoint is not None:
            self._load(checkpoint.tensors)
        elif self.config.standardize_inputs:
            self.statistics = InputStatistics.measure(batches, STATISTICS_BATCHES).to(self.device)

    def step(self, step: int) -> StepReport:
        """Do the step `step`, counted from 0."""
        torch.manual_seed(step_seed(self.config.seed, step))
        batch = self.batches.batch(step).to(self.device)
        if self.statistics is not None:
            batch = self.statistics.apply(batch)
        rate = learning_rate(step, self.config.steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.precision.autocast():
            embeddings = self.head(batch.mask_tokens, batch.patch_tokens, batch.valid)  # (B, N, E)
        logits = region_logits(
            embeddings.float(), self.text_embeddings[batch.dataset], self.logit_scale
        )  # (B, N, V)
        loss = sigmoid_focal_loss(
            logits, batch.class_ids, batch.valid, reduction=self.config.loss_reduction
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.head.parameters(), self.config.optimizer.max_grad_norm
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.head, step)
        return StepReport(step + 1, loss.detach(), norm, rate, batch.num_images)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, but for the step's number."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "head": self.head.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.head),
            "average": self.average.head.state_dict() if self.average else {},
            "inputs": self.statistics.to_tensors() if self.statistics else {},
            "scaler": {
                k: torch.tensor(v, dtype=torch.float64) for k, v in self.scaler.state_dict().items()
            },
        }
        return {
            f"{part}.{name}": tensor
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def finished_head(self) -> RegionHead:
        """The head as it is used: averaged if asked for, on the CPU, in evaluation mode, for raw
        inputs.
        """
        head = copy.deepcopy(self.average.head if self.average else self.head).cpu().eval()
        if self.statistics is None:
            return head
        return fold_input_standardization(
            head, **self.statistics.to(torch.device("cpu")).to_tensors()
        )

    def _load(self, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        self.head.load_state_dict(parts["head"])
        load_optimizer_tensors(self.optimizer, self.head, parts.get("optimizer", {}))
        if self.average is not None:
            self.average.head.load_state_dict(parts["average"])
        if self.config.standardize_inputs:
            self.statistics = InputStatistics(**parts["inputs"]).to(self.device)
        if self.scaler.is_enabled():
            old = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {k: type(old[k])(v.item()) for k, v in parts["scaler"].items()}
            )

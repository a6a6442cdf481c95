"""The optimiser's side of both pretrainings: AdamW, the learning rate, checkpoints to go on from,
lines of progress.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regionspot.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """A learning rate that rises for `warmup` steps, stays, and falls to nothing over the last
    `decay` steps.

    While it stays, a run may be given more steps: nothing before the fall depends on their number.
    """

    lr: float
    steps: int
    warmup: int = 150
    decay: float = 0.3  # of the steps

    def rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * rise * min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))


class Stepper:
    """Takes the steps of one training, and keeps a checkpoint of it.

    Randomness is the caller's: what a step draws must follow from the seed and the step's number,
    so that a run which goes on from its checkpoint sees what it would have seen.

    Args:
        module: trained where it is; parameters that need no gradient stay as they are.
        checkpoint: a file, written every `every` steps and read if it is there: training goes on
            behind it.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        weight_decay: float,
        name: str,
        checkpoint: Path | None = None,
        every: int = 200,
    ) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.98), fused=True)
        self._module, self._schedule, self._name = module, schedule, name
        self._checkpoint, self._every, self.step = checkpoint, every, 0
        self._restore()
        self._began, self._start = time.perf_counter(), self.step

    @property
    def done(self) -> bool:
        return self.step >= self._schedule.steps

    def __call__(self, loss: Tensor, detail: str = "") -> None:
        """One step down the gradient of `loss`, clipped to a norm of 1."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        if self.step % 100 == 0:
            pace = (time.perf_counter() - self._began) / (self.step - self._start)
            to_go = (
                f"{pace:.2f} s a step, {pace * (self._schedule.steps - self.step) / 60:.0f} min to "
                "go"
            )
            logger.info(
                f"{self._name} {self.step}/{self._schedule.steps}  loss {loss.item():.3f}  "
                f"{detail}  {to_go}"
            )
        if self._checkpoint is not None and (self.done or self.step % self._every == 0):
            state = {"name": self._name, "step": self.step, "module": self._module.state_dict()}
            aside = self._checkpoint.with_suffix(".tmp")
            torch.save(state | {"optimizer": self._optimizer.state_dict()}, aside)
            os.replace(aside, self._checkpoint)

    def _restore(self) -> None:
        if self._checkpoint is None or not self._checkpoint.exists():
            return
        state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        try:
            self._module.load_state_dict(state["module"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{self._checkpoint} is of another architecture: delete it to begin anew"
            ) from error
        self.step = int(state["step"])
        logger.info(f"{self._name} goes on behind step {self.step} of {self._checkpoint}")


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where the processor multiplies it natively: elsewhere it is slower than single
    precision.
    """
    native = (
        device.type == "cuda"
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=native)

"""Run by a test: `python train_and_die.py CONFIG STEP` trains with `--resume auto`, and kills
itself after a step.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from regionspot.config import load_config
from regionspot.modeling.presets import create_backbones
from regionspot.training.loop import train
from regionspot.training.trainer import StepReport


def main(config: str, last_step: int) -> None:
    torch.set_num_threads(1)

    def die(report: StepReport) -> None:
        if report.step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(
        load_config(config),
        die,
        resume="auto",
        backbones=create_backbones("regionspot_mini", random_weights=0),
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""The recipe of mini's head, `configs/mini.yaml`, for other data, seeds and lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from regionspot.config import TrainConfig, load_config

CONFIG = Path(__file__).parents[1] / "configs" / "mini.yaml"


def head_recipe(
    annotations: Path,
    output_dir: Path,
    name: str,
    seed: int,
    steps: int | None = None,
    features: str = "features",
) -> TrainConfig:
    """The packaged recipe, with the run and its features under `output_dir`.

    Args:
        annotations: of the training pictures.
        name: of the run.
        steps: None stands for the recipe's own.
        features: name of the directory of cached features.
    """
    shipped = load_config(CONFIG)
    return replace(
        shipped,
        name=name,
        output_dir=str(output_dir),
        seed=seed,
        steps=shipped.steps if steps is None else steps,
        datasets=(replace(shipped.datasets[0], annotations=str(annotations)),),
        features=replace(shipped.features, cache_dir=str(output_dir / features)),
    )

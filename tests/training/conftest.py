"""Pictures with coloured squares, regionspot_mini's towers with random weights, and a run small
enough to repeat.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regionspot.config import TrainConfig, config_from_dict
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.presets import create_backbones
from regionspot.modeling.sam import SamBackbone

CLASSES = ("red square", "green square", "blue square")


def write_data(directory: Path, num_images: int = 10, seed: int = 0) -> Path:
    """Write `num_images` PNGs of 1 to 4 squares each, in classes 0 to 2, and a COCO file; its
    path.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(num_images):
        pixels = rng.integers(0, 60, (96, 128, 3)).astype(np.uint8)
        for _ in range(rng.integers(1, 5)):
            x, y, colour = rng.integers(0, 96), rng.integers(0, 64), rng.integers(0, 3)
            pixels[y : y + 32, x : x + 32, colour] = 220
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(colour) + 10,
                    "bbox": [int(x), int(y), 32, 32],
                    "area": 1024,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(directory / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 128, "height": 96})
    categories = [{"id": index + 10, "name": name} for index, name in enumerate(CLASSES)]
    path = directory / "train.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


@pytest.fixture(scope="session")
def backbones() -> tuple[SamBackbone, ClipBackbone]:
    return create_backbones("regionspot_mini", random_weights=0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_config(tmp_path: Path, data: Path) -> Callable[..., TrainConfig]:
    """A function of overrides, such as `steps=3, optimizer={"schedule": "cosine"}`."""

    def make(**changes: Any) -> TrainConfig:
        tree: dict[str, Any] = {
            "name": "run",
            "output_dir": str(tmp_path / "runs"),
            "device": "cpu",
            "datasets": [{"name": "squares", "annotations": str(data)}],
            "steps": 6,
            "batch_size": 4,
            "standardize_inputs": True,
            "model": {"preset": "regionspot_mini", "num_layers": 1, "feedforward_dim": 32},
            "features": {"dtype": "float32", "images_per_shard": 4, "batch_size": 4, "workers": 1},
            "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2},
            "checkpoints": {"every": 2, "keep": 2},
            "logging": {"every": 2, "tensorboard": False},
        }
        for key, value in changes.items():
            tree[key] = (
                {**tree[key], **value} if isinstance(tree.get(key), dict) and value else value
            )
        return config_from_dict(tree)

    return make

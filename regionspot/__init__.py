"""RegionSpot: recognise regions of an image by a small head on a frozen SAM and a frozen CLIP
(arXiv 2311.01373).

`import regionspot` is cheap: PyTorch is loaded when `load_head` or `create_model` is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regionspot.modeling.checkpoint import load_head
    from regionspot.modeling.presets import create_model
    from regionspot.predictor import RegionPredictor
    from regionspot.runtime.opening import open_pipeline

__version__ = "0.1.0"
__all__ = ["RegionPredictor", "__version__", "create_model", "load_head", "open_pipeline"]

_HOMES = {
    "load_head": "regionspot.modeling.checkpoint",
    "create_model": "regionspot.modeling.presets",
    "RegionPredictor": "regionspot.predictor",
    "open_pipeline": "regionspot.runtime.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regionspot' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from regionspot.errors import InputError
        from regionspot.extras import install_hint

        if (hint := install_hint(error)) is None:
            raise
        raise InputError(hint) from error


def __dir__() -> list[str]:
    return sorted(__all__)

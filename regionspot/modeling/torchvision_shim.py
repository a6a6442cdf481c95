"""Make `segment_anything` and `open_clip` importable where torchvision and torch do not match.

Both libraries import torchvision at module level, though regionspot uses nothing of it. A
torchvision wheel that was linked against CUDA fails beside a CPU-only torch with "operator
torchvision::nms does not exist": its compiled operators never load, and its Python code then
describes operators that are not there. Declaring those two operators (without implementing them) is
enough for the import to succeed.
"""

from __future__ import annotations

import importlib
import sys

import torch

_SYMPTOM = "operator torchvision::"
_SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# an operator lives only as long as the Library that declared it
_declared: list[torch.library.Library] = []


def import_safely() -> None:
    """Import torchvision; if its operators are missing, declare them and import it again.

    Does nothing where torchvision imports by itself, and leaves every other failure (such as a
    torchvision that is not installed) to the library that needs it.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
        _declare_operators()
        _forget_failed_import()
        importlib.import_module("torchvision")


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for signature in _SIGNATURES:
        library.define(signature)
    _declared.append(library)


def _forget_failed_import() -> None:
    for name in [
        name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")
    ]:
        del sys.modules[name]

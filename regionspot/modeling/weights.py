"""Read weight files that others made, without running anything in them, and load them without silence."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from regionspot.errors import ArtifactError
from regionspot.modeling import torchscript

MAX_NAMED_KEYS = 6


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content, on the CPU, of a `.safetensors` file, a pickled `.pth`, `.pt` or `.bin`, or a TorchScript archive.

    Pickles are read with `weights_only=True`, and TorchScript archives (such as OpenAI's CLIP) by a reader that knows
    tensors and nothing else, so no code in the file runs.

    Raises:
        ArtifactError: the file is missing, unreadable, damaged, or holds more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"weight file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if torchscript.is_archive(path):
            return torchscript.read_state_dict(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is refused: it holds Python objects other than weights, and unpickling those can run code, or it "
            f"is no PyTorch file ({_first_line(error)}). Save its state dict alone, from a process that you trust, and "
            "use that file."
        ) from error
    except OSError as error:
        raise ArtifactError(f"weight file {path} cannot be read: {error.strerror or error}") from error
    except (safetensors.SafetensorError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{path} cannot be read as weights, it is damaged or not a weight file ({_first_line(error)}). "
            "Download it again and compare its checksum."
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_strictly(module: nn.Module, state_dict: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load `state_dict`, read from `source`, into `module`; every key and every shape must fit.

    Raises:
        ArtifactError: it does not fit; names the missing, unexpected and misshapen keys. `module` is then unchanged.
    """
    expected = module.state_dict()
    problems = [
        _describe("missing", [key for key in expected if key not in state_dict]),
        _describe("unexpected", [key for key in state_dict if key not in expected]),
        _describe(
            "of another shape",
            [
                f"{key} {_shape(state_dict[key])} instead of {_shape(tensor)}"
                for key, tensor in expected.items()
                if key in state_dict and _shape(state_dict[key]) != _shape(tensor)
            ],
        ),
    ]
    if any(problems):
        raise ArtifactError(
            f"{source} does not fit this {type(module).__name__}: {'; '.join(filter(None, problems))}. "
            "Was it made for another model size?"
        )
    module.load_state_dict(state_dict)


def _describe(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    rest = f" and {len(keys) - MAX_NAMED_KEYS} more" if len(keys) > MAX_NAMED_KEYS else ""
    return f"{what}: {', '.join(keys[:MAX_NAMED_KEYS])}{rest}"


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

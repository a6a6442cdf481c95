"""Read weight files that others made, without running anything in them, and load them without
silence.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from regionspot.errors import ArtifactError, first_few, is_interrupt
from regionspot.modeling import torchscript

MAX_NAMED_KEYS = 6
MAX_UNPACKED_CODE = 1 << 24
"""Bytes by which a TorchScript archive's code may grow when it is unpacked."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.safetensors` file, a pickled `.pth`, `.pt` or `.bin`, or a TorchScript archive,
    onto the CPU.

    Pickles are read with `weights_only=True`, and TorchScript archives (such as OpenAI's CLIP) by a
    reader that knows tensors and nothing else, so no code in the file runs.

    Raises:
        ArtifactError: the file is missing, unreadable, damaged, or holds more than weights.
    """
    path = Path(path)
    check_is_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            _check_unpacked_size(path)
        if torchscript.is_archive(path):
            return torchscript.read_state_dict(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is refused: it holds Python objects other than weights, and unpickling those "
            f"can run code, or it is no PyTorch file ({first_line(error)}). Save its state dict "
            "alone, from a process that you trust, and use that file."
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"weight file {path} cannot be read: {error.strerror or error}"
        ) from error
    except (
        Exception
    ) as error:  # of whatever type: the readers of pickles and archives believe what a file says
        if isinstance(error, MemoryError) or is_interrupt(error):
            raise
        raise ArtifactError(
            f"{path} cannot be read as weights, it is damaged or not a weight file "
            f"({first_line(error)}). Download it again and compare its checksum."
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _check_unpacked_size(path: Path) -> None:
    """Raises ValueError for an archive much larger than its file: PyTorch compresses code, and no
    tensors.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size + MAX_UNPACKED_CODE:
        raise ValueError("it is a compressed archive, which could fill the memory")


def check_is_file(path: str | Path) -> None:
    """Raises ArtifactError, which says what is there instead, unless a path is that of a file."""
    try:
        if Path(path).is_file():
            return
        what = "is a folder: name the file in it" if Path(path).is_dir() else "does not exist"
        if Path(path).exists() and not Path(path).is_dir():
            what = "is no regular file: write it to the disk first"
    except (OSError, ValueError) as error:
        what = f"cannot be read: {first_line(error)}"
    raise ArtifactError(f"weight file {path} {what}")


def load_strictly(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str | Path
) -> None:
    """Load `state_dict`, read from `source`, into `module`; every key and every shape must fit.

    Raises:
        ArtifactError: it does not fit; names the missing, unexpected and misshapen keys, and those
            that hold anything but dense real numbers. `module` is then unchanged.
    """
    check_fits(module, state_dict, source)
    module.load_state_dict(state_dict)


def check_fits(module: nn.Module, state_dict: Mapping[str, Any], source: str | Path) -> None:
    """Raises what `load_strictly` raises. `module` may be on the device "meta"."""
    expected = module.state_dict()
    there = {key: state_dict[key] for key in expected if key in state_dict}
    problems = [
        _describe("missing", [key for key in expected if key not in state_dict]),
        _describe("unexpected", [str(key) for key in state_dict if key not in expected]),
        _describe(
            "of another shape",
            [
                f"{key} {_shape(tensor)} instead of {_shape(expected[key])}"
                for key, tensor in there.items()
                if _shape(tensor) != _shape(expected[key])
            ],
        ),
        _describe(
            "not dense real numbers",
            [key for key, tensor in there.items() if not _is_plain(tensor)],
        ),
    ]
    if any(problems):
        raise ArtifactError(
            f"{source} does not fit this {type(module).__name__}: "
            f"{'; '.join(filter(None, problems))}. Was it made for another model size?"
        )


def _is_plain(value: Any) -> bool:
    """Tells whether a value is a tensor that can be copied into a parameter without losing part of
    it.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
    )


def without_prefix(weights: Mapping[Any, Any], prefix: str, source: str | Path) -> dict[str, Any]:
    """Takes a prefix off the names that have it.

    Raises:
        ArtifactError: two weights then have one name.
    """
    renamed = {str(key).removeprefix(prefix): value for key, value in weights.items()}
    if len(renamed) < len(weights):
        raise ArtifactError(
            f"{source} has weights of one name with and without {prefix!r}: it is unclear which to "
            "take"
        )
    return renamed


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Counts the bytes behind tensors, those that several share once: a small file can describe
    huge tensors.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _describe(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    return f"{what}: {first_few(keys, MAX_NAMED_KEYS)}"


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__

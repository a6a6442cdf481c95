"""The tensors of a TorchScript archive, without TorchScript.

OpenAI publishes CLIP as TorchScript archives. `torch.jit.load` would compile, and may run, the code
inside, and `torch.load(weights_only=True)` refuses them; but the tensors themselves lie in a zip
file as plain bytes, indexed by a pickle of nested attributes. This reader follows that pickle with
a whitelist of what it may construct: empty placeholders for the archive's own classes, and tensors.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


def is_archive(path: str | Path) -> bool:
    """Whether `path` is a TorchScript archive, as opposed to what `torch.save` writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensor attributes of an archive's modules, on the CPU, under the dotted names that
    `state_dict()` gives them.

    Non-persistent buffers are among them, since an archive does not tell them from parameters.

    Raises:
        zipfile.BadZipFile: a damaged archive (each member's CRC is checked).
        pickle.UnpicklingError: an archive whose pickle asks for anything but modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [
            name
            for name in archive.namelist()
            if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} members named data.pkl, expected one")
        root = _Unpickler(archive, pickles[0]).load()
    return dict(_named_tensors(root))


class _Module:
    """Stands for any class of the archive; unpickling fills its `__dict__` with attributes."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, member: str) -> None:
        super().__init__(io.BytesIO(archive.read(member)))
        self._archive = archive
        self._folder = member.removesuffix("data.pkl") + "data/"

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return list
        raise pickle.UnpicklingError(f"the archive asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, _, length = pid
        if length == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(
            bytearray(self._archive.read(f"{self._folder}{key}")), dtype=dtype, count=length
        )


def _rebuild_tensor(
    storage: torch.Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    return storage.as_strided(shape, stride, offset)


def _named_tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named_tensors(value, f"{prefix}{name}.")

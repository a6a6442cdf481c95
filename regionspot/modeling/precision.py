"""Half precision: which parts of a model it changes, and what a model works in.

`.half()`, `.bfloat16()` and `.to(dtype)` reach both image encoders, CLIP's text transformer and
RegionSpot's head: all but a few per cent of the weights and of the arithmetic. The rest stays in
single precision, because sums with cancellation and positions would suffer there: SAM's prompt
encoder and mask decoder (with the token decoder that is made of them), the statistics of pixels,
and the scale and projection of CLIP's embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from regionspot.errors import InputError
from regionspot.modeling.freezing import Frozen
from regionspot.runtime.torch_runner import without_autocast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions that a model can work in, by the names that command lines and artefacts use."""

HALF = (torch.bfloat16, torch.float16)

P = ParamSpec("P")
R = TypeVar("R")


def resolve_dtype(name: str | torch.dtype | None) -> torch.dtype:
    """Returns the type of a precision's name; None stands for single precision.

    Raises:
        InputError: anything but a key or a value of `DTYPES`.
    """
    if name is None:
        return torch.float32
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a tensor. Unlike `Tensor.to`, it leaves no trace in an exported graph where there is
    nothing to do.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_single(tensor: Tensor) -> Tensor:
    """Converts half precision to single precision, and leaves other types as they are."""
    return tensor.float() if tensor.dtype in HALF else tensor


class PartlyHalf(Frozen):
    """A frozen tower of which conversions to half precision reach only the modules in `halvable`.

    Moves to other devices, and conversions to other precisions, reach everything.
    """

    def halvable(self) -> dict[str, nn.Module]:
        """The parts that half precision may reach, by their names in messages."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartlyHalf:
        super()._apply(_unless_it_halves(fn), recurse)
        for part in self.halvable().values():
            part._apply(fn)
        return self

    def restore_single(self) -> None:
        """Brings a tower that was built in half precision into the form that conversions would have
        given it.
        """
        halved = [
            (part, dtype)
            for part in self.halvable().values()
            if (dtype := _only(_dtypes(part))) in HALF
        ]
        super()._apply(in_single)
        for part, dtype in halved:
            part.to(dtype)


def _unless_it_halves(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        if converted.dtype in HALF and tensor.dtype not in HALF:
            return tensor.to(converted.device)
        return converted

    return apply


class HasPrecision(Protocol):
    """Two towers and a head, as in `RegionSpot`."""

    @property
    def sam(self) -> PartlyHalf: ...
    @property
    def clip(self) -> PartlyHalf: ...
    @property
    def head(self) -> nn.Module: ...


def precision_of(model: HasPrecision) -> str:
    """Returns the key of `DTYPES` that names what a model works in.

    Raises:
        InputError: its parts have weights in different precisions, or in one that it cannot work
            in.
    """
    halvable = {**model.sam.halvable(), **model.clip.halvable(), "the head": model.head}
    found = {name: _dtypes(part) for name, part in halvable.items()}
    halved = {id(tensor) for part in halvable.values() for tensor in _floats(part)}
    found["SAM's decoder"] = {
        tensor.dtype for tensor in _floats(model.sam) if id(tensor) not in halved
    }
    found["CLIP's scale and projection"] = {
        tensor.dtype for tensor in _floats(model.clip) if id(tensor) not in halved
    }
    works_in = _only(set().union(*(found[name] for name in halvable)))
    rest = set().union(*(dtypes for name, dtypes in found.items() if name not in halvable))
    for name, dtype in DTYPES.items():
        if works_in == dtype and rest <= {torch.float32}:
            return name
    raise InputError(
        f"the model has weights in {_listed(found)}; it can work in float32, bfloat16 or float16 "
        "throughout: call model.float(), model.bfloat16() or model.half()"
    )


def _listed(found: Mapping[str, set[torch.dtype]]) -> str:
    """The precision that all parts have, or that of each."""
    if (shared := _only(set().union(*found.values()))) is not None:
        return _named(shared)
    return ", ".join(
        f"{' and '.join(sorted(map(_named, dtypes)))} ({name})"
        for name, dtypes in found.items()
        if dtypes
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _floats(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module.parameters(), module.buffers()):
        yield from (tensor for tensor in tensors if tensor.is_floating_point())


def _dtypes(module: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in _floats(module)}


def _only(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The one that there is; None where there are several, or none."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else None


def working_dtypes(*modules: PartlyHalf | nn.Module) -> set[torch.dtype]:
    """Returns the types that towers and heads work in, going by the first weight of each part: see
    `precision_of`.
    """
    parts = [
        part
        for one in modules
        for part in (one.halvable().values() if isinstance(one, PartlyHalf) else (one,))
    ]
    return {next(part.parameters()).dtype for part in parts}


def in_own_precision(method: Callable[P, R]) -> Callable[P, R]:
    """Decorates a method that computes in the precision of its tensors, also within
    `torch.autocast`.
    """

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (tensor for argument in args for tensor in _tensors_in(argument))
        device_type = next((tensor.device.type for tensor in tensors), "cpu")
        with without_autocast(device_type):
            return method(*args, **kwargs)

    return wrapper


def _tensors_in(argument: object) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, tuple):
        yield from (item for item in argument if isinstance(item, Tensor))

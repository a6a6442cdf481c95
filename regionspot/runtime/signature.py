"""What a runtime says about a graph that it loaded, held against the graph's spec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regionspot.errors import ArtifactError
from regionspot.runtime.graph_spec import GraphSpec, TensorSpec


def check_signature(
    spec: GraphSpec, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], path: str | Path
) -> None:
    """Raises ArtifactError unless a loaded graph has the spec's tensors: names, dtypes, sizes of
    fixed axes.

    Args:
        inputs, outputs: as the runtime describes them, in any order. An axis whose size it does not
            know is a string.
        path: the graph's file, for the message.
    """
    problems = []
    for kind, wanted, found in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        by_name = {tensor.name: tensor for tensor in found}
        problems += [
            f"{kind} {tensor.name} is missing" for tensor in wanted if tensor.name not in by_name
        ]
        known = {tensor.name for tensor in wanted}
        problems += [f"{kind} {name} is unknown" for name in by_name if name not in known]
        problems += [
            f"{kind} {tensor.name} is {_describe(by_name[tensor.name])} instead of "
            f"{_describe(tensor)}"
            for tensor in wanted
            if tensor.name in by_name and not _fits(spec, tensor, by_name[tensor.name])
        ]
    if problems:
        raise ArtifactError(
            f"{path} is not the graph {spec.name}: {'; '.join(problems)}. It was changed, or made "
            "by another release: export it again."
        )


def _fits(spec: GraphSpec, wanted: TensorSpec, found: TensorSpec) -> bool:
    if found.dtype != wanted.dtype or len(found.shape) != len(wanted.shape):
        return False
    for axis, size in zip(wanted.shape, found.shape, strict=True):
        if isinstance(size, str):
            continue
        allowed = spec.ranges[axis] if isinstance(axis, str) else None
        if size != axis and (allowed is None or not allowed.min == size == allowed.max):
            return False
    return True


def _describe(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} ({', '.join(map(str, tensor.shape))})"

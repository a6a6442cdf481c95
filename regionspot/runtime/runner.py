"""What runs one graph, whatever the runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from regionspot.errors import ArtifactError, InputError, RegionSpotError
from regionspot.runtime.graph_spec import GraphSpec

Array = npt.NDArray[Any]
Tensors = Mapping[str, Any]
"""Name -> numpy array, or what a runner of the same runtime left on its device."""


class Runner(Protocol):
    """One graph in one runtime. Use as a context manager, or call `close`.

    Safe to share between threads: every answer belongs to its own feeds. An exception that
    interrupts a run, such as KeyboardInterrupt or one that a signal handler raises, comes out
    unchanged, and later runs are right.

    A runner that works apart from the host may also have `fetch(kept) -> arrays`, which copies
    outputs that it kept to the host in one wait. `RegionPipeline` then keeps the results of all
    chunks of prompts, and waits once for all of them. On a GPU such a runner's `infer` waits for
    nothing if all outputs are kept, and a run of arrays does not wait for other runners: the GPU
    then does what several of them were asked at the same time. One that always waits for its GPU
    says so by `waits_for_gpu = True`, and gets a thread where that gives the same.

    What is kept can be cut along its first axis as an array can, `kept[1:2]`, unless the runner has
    an attribute `cuts_kept` that is False.
    """

    spec: GraphSpec

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """Run the graph once.

        Args:
            feeds: every input by name, and optional ones: numpy arrays of the spec's dtypes, or
                outputs that a runner of the same runtime kept.
            keep: names of outputs that stay on the device, in a form that only runners of this
                runtime take. On a CPU that is a numpy array like the others.

        Returns:
            Every output by name.

        Raises:
            InputError: an input is missing, unknown, or of another dtype or shape than the spec
                says.
            ArtifactError: the runtime fails, for want of memory or on a damaged file.
            MemoryError: Python or our own kernels are out of memory.
        """
        ...

    def close(self) -> None:
        """Give back what the runtime holds."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def check_feeds(spec: GraphSpec, feeds: Tensors) -> None:
    """Raises InputError unless the feeds are what `spec` asks for; the axes that share a name must
    agree.
    """
    if missing := [name for name in spec.input_names if name not in feeds]:
        raise InputError(
            f"{spec.name} needs {', '.join(missing)} too: its inputs are "
            f"{', '.join(spec.input_names)}"
        )
    given = [*spec.inputs, *(tensor for tensor in spec.optional if tensor.name in feeds)]
    if unknown := feeds.keys() - {tensor.name for tensor in given}:
        raise InputError(
            f"{spec.name} takes no {', '.join(unknown)}: its inputs are "
            f"{', '.join(spec.input_names)}"
        )
    sizes: dict[str, int] = {}
    for tensor in given:
        value = feeds[tensor.name]
        if not isinstance(value, np.ndarray):
            continue
        expected = f"{tensor.dtype} {tensor.shape}"
        if value.dtype != np.dtype(tensor.dtype) or value.ndim != len(tensor.shape):
            raise InputError(
                f"{spec.name}: {tensor.name} must be {expected}, not {value.dtype} {value.shape}"
            )
        for axis, size in zip(tensor.shape, value.shape, strict=True):
            wanted = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            if size != wanted:
                raise InputError(
                    f"{spec.name}: {tensor.name} must be {expected}, not {value.shape}"
                    + (
                        f": {axis} is {wanted} in the inputs before it"
                        if isinstance(axis, str)
                        else ""
                    )
                )


def in_half_where_wanted(spec: GraphSpec, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Returns arrays in single precision as float16 where the graph takes that, and the others as
    they are.
    """
    return {
        name: array.astype(np.float16)
        if name in spec.half_tensors and array.dtype == np.float32
        else array
        for name, array in feeds.items()
    }


def check_outputs(
    spec: GraphSpec, feeds: Tensors, outputs: Tensors, source: str | Path, runtime: str
) -> None:
    """Raises ArtifactError unless arrays have the shapes that follow from the feeds: they would be
    of another run.

    Args:
        source, runtime: the file or the server, and the runtime, as messages call them.
    """
    sizes = spec.sizes_of({name: _shape(feeds[name]) for name in spec.input_names})
    for tensor in spec.outputs:
        shape = _shape(outputs[tensor.name])
        wanted = tuple(
            sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in tensor.shape
        )
        if len(shape) != len(wanted) or any(
            size != axis for size, axis in zip(shape, wanted, strict=True) if isinstance(axis, int)
        ):
            raise ArtifactError(
                f"{runtime} gave {tensor.name} of {spec.name} the shape {shape} instead of "
                f"{wanted}: {source} is not that graph; export it again"
            )


def failed_run(
    spec: GraphSpec, feeds: Tensors, path: Path, runtime: str, reason: str
) -> RegionSpotError:
    """What to raise where a runtime could not run a graph: InputError if a size is out of the
    spec's ranges.

    Args:
        runtime, reason: how messages call the runtime, and what it said.
    """
    shapes = {name: _shape(value) for name, value in feeds.items()}
    sizes = spec.sizes_of(shapes)
    outside = [
        f"{axis} is {sizes[axis]}, not in {allowed}"
        for axis, allowed in spec.ranges.items()
        if sizes.get(axis, allowed.min) not in allowed
    ]
    fed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    message = f"{runtime} cannot run {spec.name} of {path} on {fed}: "
    if outside:
        return InputError(
            f"{message}{'; '.join(outside)} ({reason}). Send sizes in that range, or export with "
            "wider ranges."
        )
    return ArtifactError(
        f"{message}{reason}. Where memory is short, ask for less at a time; else export the graph "
        "again, or choose another runtime."
    )


def _shape(value: Any) -> tuple[int, ...]:
    """Of an array, or of what a runtime keeps."""
    return tuple(value.shape() if callable(value.shape) else value.shape)

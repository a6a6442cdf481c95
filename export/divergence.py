"""Where two ONNX files of one graph part: their tensors of one name, compared in the order in which
they are computed.

Values keep their names in all precisions of a graph; what smoothing for int8 divides has another
one (`regionspot.export.quantization`). Graphs that are laid out for different targets differ within
some modules, and there equal names may stand for different things: of those modules nothing is
compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from onnxscript import ir

from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.ort_runner import open_session
from regionspot.runtime.runner import Array
from regionspot.runtime.tolerance import SQNR_CAP_DB, Difference, Tolerance, measure

FIRST = 10
"""How many tensors that breach are looked for."""

CHUNK_BYTES = 256 * 2**20
"""How much of the tensors of one file is held at a time."""

AS_GOOD_AS_EQUAL_DB = 80.0
"""Drops are counted from here: rounding to half precision alone costs more."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PRECISION_OPS = ("Cast", "QuantizeLinear", "DequantizeLinear", "Split")


@dataclass(frozen=True)
class TensorRow:
    """One tensor that both files have.

    Args:
        name: of the tensor.
        op: the operator that computes it, in the file of the first side.
        difference: None where one side alone is not finite.
        drop_db: by how much its SQNR is below the lowest of the tensors that it is computed from.
        breaches: what is beyond the tolerance, in words.
    """

    name: str
    op: str
    difference: Difference | None
    drop_db: float
    breaches: tuple[str, ...]

    @property
    def sqnr_db(self) -> float:
        return self.difference.sqnr_db if self.difference else -SQNR_CAP_DB

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.name,
            "op": self.op,
            "max_abs_diff": self.difference.max_abs_diff if self.difference else None,
            "sqnr_db": self.difference.sqnr_db if self.difference else None,
            "drop_db": self.drop_db,
            "breaches": list(self.breaches),
        }


@dataclass(frozen=True)
class Divergence:
    """What comparing the tensors of a graph came to.

    Args:
        first: the first tensors that breach the tolerance, in the order in which they are
            computed; FIRST or a few more.
        largest_drop: where the SQNR falls most, of all that was compared.
        compared: how many tensors were compared before the search ended.
        left_out: how many tensors of the first file could not be compared with the second.
    """

    tolerance: Tolerance
    first: tuple[TensorRow, ...]
    largest_drop: TensorRow | None
    compared: int
    left_out: int

    def to_json(self) -> dict[str, Any]:
        drop = self.largest_drop
        return {
            "tolerance": self.tolerance.name,
            "first": [row.to_json() for row in self.first],
            "largest_drop": drop.to_json() if drop else None,
            "compared": self.compared,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class OnnxSide:
    """An ONNX file and how to run it; see `regionspot.runtime.ort_runner.OrtRunner`."""

    path: Path
    precision: str
    device: str = "cpu"
    threads: int | None = None


def find_divergence(
    a: OnnxSide, b: OnnxSide, spec: GraphSpec, feeds: Mapping[str, Array], tolerance: Tolerance
) -> Divergence:
    """Compares the tensors of two files on one set of inputs, until FIRST of them breach.

    Each file is run several times, with some of its tensors as outputs each time: what ONNX
    Runtime would fuse around a tensor is computed apart there.

    Raises:
        ArtifactError: a file cannot be loaded.
    """
    models = [ir.load(side.path) for side in (a, b)]
    targets = {model.metadata_props.get("target") for model in models}
    graph = models[0].graph
    shared = comparable(graph, models[1].graph, same_layout=len(targets) == 1)
    sizes = spec.sizes_of({name: feeds[name].shape for name in spec.input_names})
    lowest: dict[str, float] = {}
    rows: list[TensorRow] = []
    nodes = {str(value.name): node for node in graph for value in node.outputs}
    with TemporaryDirectory(prefix="regionspot-") as folder:
        for chunk in chunks(shared, sizes):
            names = [str(value.name) for value in chunk]
            pair = [
                # with the file's own suffix, which says what it is laid out for
                _values(side, spec, names, feeds, Path(folder, f"{index}-{side.path.name}"))
                for index, side in enumerate((a, b))
            ]
            for name in names:
                if pair[0][name].shape == pair[1][name].shape:
                    row = _row(nodes[name], name, pair[0][name], pair[1][name], lowest, tolerance)
                    lowest[name] = row.sqnr_db
                    rows.append(row)
            if sum(bool(row.breaches) for row in rows) >= FIRST:
                break
    breaching = tuple(row for row in rows if row.breaches)
    drop = max(rows, key=lambda row: row.drop_db, default=None)
    total = sum(value.dtype in _FLOATS for node in graph for value in node.outputs)
    return Divergence(tolerance, breaching, drop, len(rows), total - len(shared))


def comparable(a: ir.Graph, b: ir.Graph, same_layout: bool) -> list[ir.Value]:
    """The computed floating-point values of `a` that `b` has by the same name, in the order in
    which they are computed.

    Args:
        same_layout: whether both are laid out for the same target. Otherwise only modules that
            consist of the same nodes in both are looked at.
    """
    there = {value.name: value for node in b for value in node.outputs}
    scopes = [_nodes_by_scope(graph) for graph in (a, b)]
    found = []
    for node in a:
        scope = _scope(node)
        if not same_layout and scopes[0][scope] != scopes[1].get(scope):
            continue
        for value in node.outputs:
            other = there.get(value.name)
            if other is not None and value.dtype in _FLOATS and other.dtype in _FLOATS:
                found.append(value)
    return found


def chunks(values: Sequence[ir.Value], sizes: Mapping[str, int]) -> Iterator[list[ir.Value]]:
    """The values in their order, as many at a time as CHUNK_BYTES hold in single precision, one at
    least.
    """
    chunk: list[ir.Value] = []
    held = 0
    for value in values:
        size = 4 * _elements(value, sizes)
        if chunk and held + size > CHUNK_BYTES:
            yield chunk
            chunk = []
            held = 0
        chunk.append(value)
        held += size
    if chunk:
        yield chunk


def _elements(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """How many numbers a value has; an axis of unknown size counts as the largest known one."""
    most = max(sizes.values(), default=1)
    axes = () if value.shape is None else tuple(value.shape)
    return prod(axis if isinstance(axis, int) else sizes.get(str(axis), most) for axis in axes)


def _scope(node: ir.Node) -> str:
    return (node.name or "").rpartition("/")[0]


def _nodes_by_scope(graph: ir.Graph) -> dict[str, list[tuple[str | None, str]]]:
    """The nodes of each module by name and operator, but for those that a precision adds."""
    found: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for node in graph:
        if node.op_type not in _PRECISION_OPS:
            found[_scope(node)].append((node.name, node.op_type))
    return found


def _values(
    side: OnnxSide, spec: GraphSpec, names: Sequence[str], feeds: Mapping[str, Array], probed: Path
) -> dict[str, Array]:
    """Values of a file by name, in single precision."""
    model = ir.load(side.path)
    exposed = _expose(model.graph, names)
    ir.save(model, probed, external_data=f"{probed.name}.data")
    device, _, index = side.device.partition(":")
    session = open_session(probed, spec, device, side.threads, side.precision, int(index or 0))
    half = {one.name for one in session.get_inputs() if one.type == "tensor(float16)"}
    fed = {
        name: feeds[name].astype(np.float16) if name in half else feeds[name]
        for name in spec.input_names
    }
    found = session.run(exposed, fed)
    return dict(zip(names, found, strict=True))


def _expose(graph: ir.Graph, names: Sequence[str]) -> list[str]:
    """Adds outputs that carry values in single precision, and returns their names."""
    values = {value.name: value for node in graph for value in node.outputs}
    exposed = []
    for name in names:
        node = ir.node("Cast", [values[name]], {"to": ir.DataType.FLOAT}, name=f"{name}/Exposed")
        (output,) = node.outputs
        output.name, output.dtype = f"{name}.exposed", ir.DataType.FLOAT
        output.shape = values[name].shape
        graph.append(node)
        graph.outputs.append(output)
        exposed.append(output.name)
    return exposed


def _row(
    node: ir.Node,
    name: str,
    wanted: Array,
    found: Array,
    lowest: dict[str, float],
    tolerance: Tolerance,
) -> TensorRow:
    """Compares one tensor, and passes on the lowest SQNR before it where nothing was measured."""
    before = min((_before(value, lowest) for value in node.inputs if value), default=SQNR_CAP_DB)
    finite = np.isfinite(wanted)
    if (finite != np.isfinite(found)).any():
        drop = min(before, AS_GOOD_AS_EQUAL_DB) + SQNR_CAP_DB
        return TensorRow(name, node.op_type, None, drop, ("NaN or infinite on one side alone",))
    difference = measure(wanted[finite], found[finite])
    drop = min(before, AS_GOOD_AS_EQUAL_DB) - min(difference.sqnr_db, AS_GOOD_AS_EQUAL_DB)
    breaches = tuple(tolerance.breaches(difference))
    return TensorRow(name, node.op_type, difference, drop, breaches)


def _before(value: ir.Value, lowest: dict[str, float]) -> float:
    """The SQNR of a value, or the lowest of those that it is computed from."""
    name = str(value.name)
    if name not in lowest:
        producer = value.producer()
        inputs = [] if producer is None else [one for one in producer.inputs if one is not None]
        lowest[name] = min((_before(one, lowest) for one in inputs), default=SQNR_CAP_DB)
    return lowest[name]

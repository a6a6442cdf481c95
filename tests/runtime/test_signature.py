"""A graph that is not what its spec says is refused when it is opened."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regionspot.errors import ArtifactError
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.signature import check_signature

X = TensorSpec("x", "float32", ("batch", "n", 3))
FLAGS = TensorSpec("flags", "bool", ("batch",))
Y = TensorSpec("y", "float32", ("batch", 5))
SPEC = GraphSpec(
    "graph", "for tests", (X, FLAGS), (Y,), {"batch": Range(2, 2, 2), "n": Range(1, 4, 8)}
)


@pytest.mark.parametrize(
    "found",
    [
        X,
        replace(X, shape=("anything", "s12", 3)),
        replace(X, shape=(2, "n", 3)),  # an axis of one size may have become a number
        replace(X, shape=("batch", "n", "unknown")),
    ],
)
def test_what_fits(found: TensorSpec) -> None:
    check_signature(SPEC, [FLAGS, found], [Y], "graph.onnx")


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([X], [Y], "graph.onnx is not the graph graph: input flags is missing. It was changed"),
        ([X, FLAGS], [replace(Y, name="z")], "output y is missing; output z is unknown"),
        (
            [X, replace(FLAGS, dtype="int32")],
            [Y],
            r"input flags is int32 \(batch\) instead of bool \(batch\)",
        ),
        (
            [replace(X, shape=("batch", "n", 4)), FLAGS],
            [Y],
            r"input x is float32 \(batch, n, 4\) instead of",
        ),
        ([replace(X, shape=("batch", 4, 3)), FLAGS], [Y], r"input x is float32 \(batch, 4, 3\)"),
        ([replace(X, shape=(1, "n", 3)), FLAGS], [Y], r"input x is float32 \(1, n, 3\)"),
        ([X, FLAGS], [replace(Y, shape=(5,))], r"output y is float32 \(5\)"),
    ],
)
def test_what_does_not(inputs: list[TensorSpec], outputs: list[TensorSpec], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_signature(SPEC, inputs, outputs, "graph.onnx")

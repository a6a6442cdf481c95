"""What our operations inside an OpenVINO graph have in common."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from openvino import DiscreteTypeInfo, Node, Op, Output


class ActiveTokens:
    """How much of an image's tokens operations work on; what they give of others is not read.

    Args:
        grid: (h, w) tokens of an image.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = self.size = grid

    def spans(self) -> list[slice]:
        """The tokens, in pieces that lie side by side."""
        (rows, columns), width = self.size, self.grid[1]
        if columns == width:
            return [slice(0, rows * width)]
        return [slice(row * width, row * width + columns) for row in range(rows)]


class NativeOperations:
    """The operations of our own kernels in one compiled graph: keeps them alive and collects what
    they raise.

    OpenVINO turns whatever an operation raises, KeyboardInterrupt included, into a RuntimeError of
    its own. The runner finds the original in `errors`.

    Args:
        threads: number of threads that each operation uses.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.alive: list[NativeOperation] = []
        self.errors: list[BaseException] = []

    def raise_first_error(self) -> None:
        """Raises the first exception since the last call unchanged, if there was one."""
        errors, self.errors = self.errors, []
        if errors:
            raise errors[0]


class NativeOperation(Op):
    """An operation of our own kernels, in single precision. A subclass gives its output's type and
    `compute`.

    OpenVINO never releases its reference to an operation written in Python, nor to what that is
    connected to. So it gets a weak one, and `NativeOperations` keeps the operations alive as long
    as the graph is used.

    Args:
        inputs: None where OpenVINO makes one only to ask what it is.
        operations: takes the operation, and every copy that OpenVINO makes of it.
    """

    class_type_info: ClassVar[DiscreteTypeInfo]

    def __init__(
        self, inputs: list[Output] | None = None, operations: NativeOperations | None = None
    ) -> None:
        super().__init__(weakref.proxy(self))
        self.operations = NativeOperations() if operations is None else operations
        self.operations.alive.append(self)
        self.worked: ActiveTokens | None = None  # None for all
        if inputs is not None:
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

    def get_type_info(self) -> DiscreteTypeInfo:
        return self.class_type_info

    def clone_with_new_inputs(self, new_inputs: list[Output]) -> NativeOperation:
        copy = self.with_inputs(new_inputs)
        copy.worked = self.worked
        return copy

    def with_inputs(self, inputs: list[Output]) -> NativeOperation:
        """One that does the same."""
        return type(self)(inputs, self.operations)

    @property
    def threads(self) -> int:
        return self.operations.threads

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes({"threads": self.threads})
        return True

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Runs `compute`, and keeps what it raises for the runner."""
        try:
            self.compute(outputs, inputs)
        except BaseException as error:
            self.operations.errors.append(error)
            raise
        return True

    def compute(self, outputs: list[Any], inputs: list[Any]) -> None:
        """Fills OpenVINO's output tensors from its input tensors."""
        raise NotImplementedError


def readers_of(node: Node) -> list[Node]:
    """What reads a node; what reads it twice is there twice."""
    return [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]


def only_user(node: Node) -> Node | None:
    """What reads a node, if that is one node."""
    users = readers_of(node)
    return users[0] if len(users) == 1 else None


def is_constant(value: Output) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")

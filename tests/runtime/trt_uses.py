"""What our code uses of TensorRT's Python API, and whether a version of TensorRT has it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OBJECTS = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "prepared.context": "IExecutionContext",
    "engine": "ICudaEngine",
    "self.engine": "ICudaEngine",
    "self.runtime": "Runtime",
    "graphs": "CudaGraphStrategy",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "self._kernels": "IRuntimeCache",
    "_context_config.config": "IRuntimeConfig",
    "_network_tensors.tensor": "ITensor",
    "_as_engine_tensor.tensor": "ITensor",
    "_refuse_misread_shapes.tensor": "ITensor",
    "_parser_error.error": "ParserError",
    "settings.engine": "",  # options of ours
}
"""Variable, or function and variable -> the class of TensorRT that it is an object of; "" for
none.
"""

FILES = {
    "export/trt_engine.py": OBJECTS,
    "export/trt_progress.py": {},
    "regionspot/cli/one_layer.py": OBJECTS,
    "regionspot/cli/probes.py": {},
    "regionspot/runtime/trt_library.py": {"engine": "ICudaEngine", "runtime": "Runtime"},
    "regionspot/runtime/trt_runner.py": OBJECTS,
}
"""The files that use TensorRT, and their objects."""

RTX_ONLY = re.compile(
    r"ComputeCapability|CudaGraphStrategy|IRuntimeConfig|IRuntimeCache|ICudaEngine.create_runtime_"
    r"config|IBuilderConfig.(num_compute_capabilities|set_compute_capability)"
)
"""What only TensorRT-RTX is asked for."""

MODULE = r"(?:self\.)?trt\."
"""A pattern of how our code names the module."""

LOOK_UP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for name in json.load(sys.stdin):
    value = module
    for part in name.split("."):
        value = getattr(value, part, found)
    if value is not found:
        found[name] = getattr(value, "__doc__", None) or ""
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Use:
    """One use of the API.

    Args:
        name: below the module: "Builder.create_network".
        place: file and line.
        arguments: how many positional ones it is called with; None where it is not called.
        keywords: names of the others.
    """

    name: str
    place: str
    arguments: int | None = None
    keywords: tuple[str, ...] = ()


def uses_of(source: str, objects: Mapping[str, str], place: str = "") -> list[Use]:
    """Returns what a module of ours uses of the module `trt` and of objects of its classes."""
    return list(_visit(ast.parse(source), "", objects, place))


def unknown_objects(source: str, objects: Mapping[str, str]) -> list[str]:
    """Returns variables that TensorRT gave and whose attributes are used, but that have no class in
    `objects`.
    """
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [
        f"{function.name}.{name}"
        for function in functions
        for name in _given(function, objects) & _asked(function)
        if name not in objects and f"{function.name}.{name}" not in objects
    ]


def all_uses() -> list[Use]:
    """Returns the uses of all FILES."""
    return [
        use
        for path, objects in FILES.items()
        for use in uses_of((ROOT / path).read_text(), objects, path)
    ]


def complaints(
    uses: list[Use], module: str, variables: Mapping[str, str] | None = None
) -> list[str]:
    """Returns what a TensorRT lacks of our uses, or takes with other arguments.

    Args:
        module: its Python module, which a process of its own imports.
        variables: of that process's environment.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOOK_UP, module],
        input=json.dumps([use.name for use in uses]),
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    wrong = []
    for use in uses:
        if use.name not in found:
            wrong.append(f"{use.place}: {module} has no {use.name}")
        elif use.arguments is not None and not _accepts(found[use.name], use):
            first = found[use.name].strip().splitlines()[0]
            wrong.append(f"{use.place}: {use.name} takes other arguments: {first}")
    return wrong


def _visit(node: ast.AST, function: str, objects: Mapping[str, str], place: str) -> Iterator[Use]:
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.ClassDef):
        yield from _overridden(node, place)
    called = node.func if isinstance(node, ast.Call) else node
    if isinstance(called, ast.Attribute):
        name = _name(ast.unparse(called), function, objects)
        if name is not None and called is node:
            yield Use(name, f"{place}:{node.lineno}")
        elif name is not None and isinstance(node, ast.Call):
            keywords = tuple(keyword.arg or "" for keyword in node.keywords)
            method = f"{name}.__init__" if "." not in name else name
            yield Use(method, f"{place}:{node.lineno}", len(node.args), keywords)
    for child in ast.iter_child_nodes(node):
        if child is not called:
            yield from _visit(child, function, objects, place)
    if called is not node:  # its object may be a use itself
        yield from _visit(getattr(called, "value", called), function, objects, place)


def _given(function: ast.FunctionDef, objects: Mapping[str, str]) -> set[str]:
    """Returns the variables to which a function assigns what a call of TensorRT returns."""
    assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    return {
        ast.unparse(node.targets[0])
        for node in assignments
        if isinstance(node.value, ast.Call)
        and _name(ast.unparse(node.value.func), function.name, objects)
    }


def _asked(function: ast.FunctionDef) -> set[str]:
    """Returns the variables that a function takes attributes of."""
    attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return {ast.unparse(node.value) for node in attributes}


def _name(dotted: str, function: str, objects: Mapping[str, str]) -> str | None:
    """Returns "Builder.create_network" for "builder.create_network"; None for what is not
    TensorRT's.
    """
    if of_module := re.fullmatch(rf"{MODULE}((?!__)\w+(\.(?!__)\w+)*)(\.__\w+__)?", dotted):
        return of_module[1]
    if of_new_object := re.fullmatch(rf"{MODULE}(\w+)\(.*\)\.(\w+)", dotted):
        return f"{of_new_object[1]}.{of_new_object[2]}"
    value, _, attribute = dotted.rpartition(".")
    wanted = objects.get(f"{function}.{value}", objects.get(value))
    return f"{wanted}.{attribute}" if wanted else None


def _overridden(node: ast.ClassDef, place: str) -> Iterator[Use]:
    """Yields the methods that a class of ours overrides of one of TensorRT's."""
    bases = [_name(ast.unparse(base), "", {}) for base in node.bases]
    for base in filter(None, bases):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                yield Use(f"{base}.{method.name}", f"{place}:{method.lineno}")


def _accepts(doc: str, use: Use) -> bool:
    """Tells whether one of the signatures in a docstring of pybind11 takes the arguments."""
    name = use.name.rpartition(".")[2]
    signatures = re.findall(rf"^(?:\d+\. )?{name}\((self.*)\) ->", doc, re.MULTILINE)
    return any(_fits(signature, use) for signature in signatures)


def _fits(signature: str, use: Use) -> bool:
    """Tells whether "self: Builder, flags: int = 0" takes the arguments."""
    parameters = [part.partition(":") for part in _split(signature)[1:]]
    optional = {name.strip() for name, _, rest in parameters if " = " in rest}
    names = [name.strip() for name, _, _ in parameters]
    given = {*names[: use.arguments or 0], *use.keywords}
    return (use.arguments or 0) <= len(names) and given <= {*names} and {*names} - given <= optional


def _split(signature: str) -> list[str]:
    """Returns the parameters, cut at commas outside of brackets."""
    parts = [""]
    depth = 0
    for letter in signature:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts

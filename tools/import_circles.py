"""Finds the modules of regionspot that import each other, directly or through others.

A module's imports are all that its file states: at the top, inside functions, and under `if
TYPE_CHECKING`. The folders export/, serving/ and benchmarks/ count by their installed names, such
as `regionspot.export`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "regionspot"
FOLDERS = (PACKAGE, "export", "serving", "benchmarks")


@dataclass(frozen=True)
class Arrow:
    """One module imports another. It is lazy if it is not followed when the first module loads."""

    source: str
    target: str
    path: str  # of the importing file, from the root of the checkout
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}{' (lazy)' if self.lazy else ''}"


def python_files(root: Path) -> list[Path]:
    """Returns the Python files of a checkout's package; symbolic links are not followed."""
    return [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def module_name(path: Path, root: Path) -> str:
    """Returns the name by which a file is imported: `export/plan.py` is
    `regionspot.export.plan`.
    """
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] != PACKAGE:
        parts.insert(0, PACKAGE)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def arrows(root: Path) -> list[Arrow]:
    """Returns the imports between modules of the package: one for each two modules, lazy only if
    all are.
    """
    files = {module_name(path, root): path for path in python_files(root)}
    modules = {*files, *(module_name(path, root) for path in (root / PACKAGE).rglob("*.pyi"))}
    found: dict[tuple[str, str], Arrow] = {}
    for source, path in files.items():
        relative = path.relative_to(root).as_posix()
        for name, line, lazy in _imports(ast.parse(path.read_text(encoding="utf-8")), lazy=False):
            target = name if name in modules else name.rpartition(".")[0]
            if target not in modules or target == source:
                continue
            known = found.get((source, target))
            if known is None or known.lazy > lazy:
                found[source, target] = Arrow(source, target, relative, line, lazy)
    return list(found.values())


def _imports(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
    """Dotted name, line and laziness of each import below a node; `from a import b` names a.b."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, lazy) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        yield from ((f"{node.module}.{alias.name}", node.lineno, lazy) for alias in node.names)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        lazy = True
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        lazy = True
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _imports(child, lazy)


def circles(imports: list[Arrow]) -> list[list[Arrow]]:
    """Returns, for each set of modules that all reach each other, the arrows between them."""
    targets: dict[str, set[str]] = {}
    for arrow in imports:
        targets.setdefault(arrow.source, set()).add(arrow.target)
    reached = {module: _reached(module, targets) for module in targets}
    sets = {
        frozenset(other for other in reached[module] if module in reached.get(other, ()))
        for module in targets
        if module in reached[module]
    }
    return [
        [arrow for arrow in imports if arrow.source in modules and arrow.target in modules]
        for modules in sorted(sets, key=sorted)
    ]


def _reached(start: str, targets: Mapping[str, set[str]]) -> set[str]:
    """All modules that imports lead to from one; the module itself only if they lead back to it."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in targets.get(waiting.pop(), set()) - found:
            found.add(target)
            waiting.append(target)
    return found

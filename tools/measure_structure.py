"""Measures the structure of a checkout and prints one table.

    python -m tools.measure_structure                    # this checkout
    python -m tools.measure_structure --against 999b19f  # that commit beside this checkout
    python -m tools.measure_structure --details          # also what is behind the counts

The code that is measured is the Python of regionspot/, export/, serving/ and benchmarks/, without
tests.

files that name ...     A new runtime, graph, encoder or data-set format may need a line in each
                        file that names the existing ones. Names are those in `KINDS`, as strings or
                        identifiers in code; prose in docstrings and comments does not count. The
                        same names are looked for in every checkout.
modules in circles      Modules that import each other, directly or through others: by what runs
                        when a module loads, and by all imports, those inside functions and under
                        TYPE_CHECKING included.
modules unseen by mypy  Modules that lie where mypy does not find them by their installed names, so
                        that whatever is imported from them is `Any`.
functions with more ... Lines of the body, without signature and docstring.
code lines              Lines that are not empty, a comment or part of a docstring.
lines over 100 columns  Their share of all lines.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from regionspot.tables import markdown_table
from tools.import_circles import Arrow, arrows, circles, module_name, python_files

MAX_BODY = 40
MAX_COLUMNS = 100
ROOT = Path(__file__).resolve().parents[1]

GRAPHS = (
    "sam_image_encoder|clip_image_encoder|clip_text_encoder|sam_token_decoder_image|"
    "sam_token_decoder_prompts|sam_mask_decoder|sam_mask_prompt|region_head|region_recognizer"
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Kind:
    """Something that a developer adds, and how code names the existing ones.

    `strings` is searched in string literals; `identifiers` is compared with names, attributes and
    `owner.attribute`.
    """

    name: str
    strings: str
    identifiers: str

    def is_named(self, strings: set[str], identifiers: set[str]) -> bool:
        """Tells whether code with these strings and identifiers names an existing thing of the
        kind.
        """
        if any(re.search(self.strings, string) for string in strings):
            return True
        return any(re.fullmatch(self.identifiers, name) for name in identifiers)


KINDS = (
    Kind(
        "a runtime or format",
        strings=r"^(onnx|onnxruntime|openvino|native|tensorrt|tensorrt-rtx)$",
        identifiers=r"ONNX|ONNXRUNTIME|OPENVINO|NATIVE|TENSORRT|TENSORRT_RTX",
    ),
    Kind("a graph", strings=rf"\b({GRAPHS})\b", identifiers=rf"(?i:{GRAPHS})"),
    Kind(
        "SAM's image encoder",
        strings=r"^vit_[blh]$",
        identifiers=r"ImageEncoderViT|patch_embed|img_size|image_encoder\.\w+",
    ),
    Kind("the loader of a data-set format", strings=r"(?!)", identifiers=r"CocoDataset\.load"),
)


@dataclass
class Measures:
    """What was measured. Counts are lengths of lists, whose items `--details` prints."""

    files: int = 0
    naming: dict[str, list[str]] = field(default_factory=lambda: {kind.name: [] for kind in KINDS})
    in_circles_at_load: list[str] = field(default_factory=list)
    in_circles: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    long_functions: list[str] = field(default_factory=list)
    comprehensions: int = 0
    lines: int = 0
    wide_lines: int = 0
    code_lines: int = 0
    code_columns: int = 0
    readme_words: int = 0

    def counts(self) -> dict[str, list[str]]:
        """Returns the items behind each count."""
        naming = {f"files that name {name}": files for name, files in self.naming.items()}
        return {
            **naming,
            "modules in import circles at load time": self.in_circles_at_load,
            "modules in import circles, lazy imports included": self.in_circles,
            "modules unseen by mypy": self.unseen,
            f"functions with more than {MAX_BODY} lines": self.long_functions,
        }

    def rows(self) -> dict[str, str]:
        """Returns the column of the table."""
        code_lines = max(self.code_lines, 1)
        return {
            "Python files": str(self.files),
            **{name: str(len(items)) for name, items in self.counts().items()},
            "comprehensions per 1000 code lines": f"{1000 * self.comprehensions / code_lines:.0f}",
            "mean columns of a code line": f"{self.code_columns / code_lines:.1f}",
            f"lines over {MAX_COLUMNS} columns": (
                f"{100 * self.wide_lines / max(self.lines, 1):.1f} %"
            ),
            "words in the README": str(self.readme_words),
        }


def measure(root: Path) -> Measures:
    """Measures a checkout."""
    result = Measures()
    for path in python_files(root):
        _measure_file(result, path, root)
    imports = arrows(root)
    result.in_circles_at_load = _circle_members([arrow for arrow in imports if not arrow.lazy])
    result.in_circles = _circle_members(imports)
    readme = root / "README.md"
    if readme.is_file():
        result.readme_words = len(readme.read_text(encoding="utf-8").split())
    return result


def _circle_members(imports: list[Arrow]) -> list[str]:
    """One item for each module in a circle, with its imports of other members."""
    members = []
    for circle in circles(imports):
        for module in sorted({arrow.source for arrow in circle}):
            own = [str(arrow) for arrow in circle if arrow.source == module]
            members.append("; ".join(own))
    return members


def _measure_file(result: Measures, path: Path, root: Path) -> None:
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    relative = path.relative_to(root).as_posix()
    result.files += 1
    docstrings = _docstrings(nodes)
    strings = _strings(nodes, docstrings)
    identifiers = {name for node in nodes for name in _identifiers(node)}
    for kind in KINDS:
        if kind.is_named(strings, identifiers):
            result.naming[kind.name].append(relative)
    name = module_name(path, root)
    if not _is_found(name, root):
        result.unseen.append(name)
    for node in nodes:
        result.comprehensions += isinstance(node, COMPREHENSIONS)
        if isinstance(node, FUNCTIONS) and _body_lines(node) > MAX_BODY:
            result.long_functions.append(
                f"{relative}:{node.lineno} {node.name}: {_body_lines(node)} lines"
            )
    _measure_lines(result, text, docstrings)


def _measure_lines(result: Measures, text: str, docstrings: set[ast.Constant]) -> None:
    prose = {
        line for string in docstrings for line in range(string.lineno, (string.end_lineno or 0) + 1)
    }
    for number, line in enumerate(text.splitlines(), start=1):
        result.lines += 1
        result.wide_lines += len(line) > MAX_COLUMNS
        stripped = line.strip()
        if stripped and not stripped.startswith("#") and number not in prose:
            result.code_lines += 1
            result.code_columns += len(line)


def _docstrings(nodes: list[ast.AST]) -> set[ast.Constant]:
    """The strings that stand as statements: docstrings, and those below a constant or a field."""
    statements = (node.value for node in nodes if isinstance(node, ast.Expr))
    return {
        value
        for value in statements
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


def _strings(nodes: list[ast.AST], docstrings: set[ast.Constant]) -> set[str]:
    constants = (
        node for node in nodes if isinstance(node, ast.Constant) and node not in docstrings
    )
    return {node.value for node in constants if isinstance(node.value, str)}


def _identifiers(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
        owner = (
            node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
        )
        yield f"{owner}.{node.attr}"
    elif isinstance(node, ast.alias):
        yield node.name
    elif isinstance(node, ast.keyword | ast.arg):
        yield node.arg or ""


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def _is_found(name: str, root: Path) -> bool:
    """Whether mypy, run in the root, finds a module: links to folders of the checkout count."""
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """A worktree of a commit, removed at the end."""
    git = ["git", "-C", str(root), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "worktree"
        subprocess.run(
            [*git, "add", "--detach", str(path), commit], check=True, capture_output=True
        )
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def table(columns: dict[str, Measures]) -> str:
    """Formats measures as a Markdown table, a column each."""
    cells = [measures.rows() for measures in columns.values()]
    rows = [[name, *(column[name] for column in cells)] for name in cells[0]]
    return markdown_table(["", *columns], rows, right=range(1, 1 + len(columns)))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the checkout to measure (default: this one)"
    )
    parser.add_argument("--against", metavar="COMMIT", help="a commit to show beside it")
    parser.add_argument("--details", action="store_true", help="list what was counted")
    options = parser.parse_args(arguments)
    columns = {}
    if options.against:
        with worktree(options.root, options.against) as path:
            columns[options.against] = measure(path)
    now = columns["now"] = measure(options.root)
    print(table(columns))
    if options.details:
        for name, items in now.counts().items():
            print("", f"{name}:", *(f"  {item}" for item in items), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

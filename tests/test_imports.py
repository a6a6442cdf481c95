"""The direction of imports, the fences around third-party libraries, and what an import must not
load.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.import_circles import arrows, circles

ROOT = Path(__file__).resolve().parents[1]
# folders of the checkout, installed as regionspot.export and so on
MAPPED = ("export", "serving", "benchmarks")

# What is imported when a module loads comes from a lower layer, or from the same component of its
# own. An import inside a function may reach up (a preset builds the mini model), except across
# MAPPED.
LAYERS = (
    {"errors", "extras", "_native", "_version", "cgroups"},
    {
        "files",
        "logs",
        "progress",
        "tables",
        "child_process",
        "provenance",
        "threads",
        "mapped_files",
    }
    | {"arrays", "jpeg_end", "fonts", "label_places", "registers"},
    {"masks", "config", "locks"},
    {"structures"},
    {"images", "transforms", "synonyms", "vocabulary_files"},
    {"runtime"},
    {"vocabulary", "visualize"},
    {"modeling"},
    {"data", "predictor"},
    {"training", "evaluation", "mini"},
    {"cli"},
    {"export"},
    {"serving"},
    {"benchmarks"},
)
RANK = {component: rank for rank, layer in enumerate(LAYERS) for component in layer}

# Each library's home.
FENCES = {
    "segment_anything": ("regionspot/modeling/sam.py", "benchmarks/research_pipeline.py"),
    "open_clip": ("regionspot/modeling/clip.py",),
    "torchvision": (),
    "timm": (),
    "hotcoco": ("regionspot/evaluation/",),
    "pycocotools": ("benchmarks/mask_encoding.py", "benchmarks/research_pipeline.py"),
    "lvis": (),
    "transformers": ("benchmarks/detectors.py",),
    "matplotlib": ("benchmarks/plots.py",),
    "jinja2": ("benchmarks/page.py",),
    "onnx": ("export/",),
    "onnxscript": ("export/",),
    "onnxruntime": ("regionspot/runtime/ort_runner.py", "export/quantization.py"),
    "openvino": (
        "regionspot/runtime/openvino_runner.py",
        "regionspot/runtime/openvino_operation.py",
        "regionspot/runtime/openvino_attention.py",
        "regionspot/runtime/openvino_linear.py",
        "regionspot/runtime/openvino_padding.py",
        "export/openvino_ir.py",
    ),
    "tensorrt": ("export/trt_engine.py", "regionspot/runtime/trt_library.py"),
    "tensorrt_rtx": ("export/trt_engine.py", "regionspot/runtime/trt_library.py"),
    "tensorrt_rtx_bindings": ("export/trt_engine.py", "regionspot/runtime/trt_library.py"),
    "httpx2": ("serving/http_connection.py",),
    "psutil": ("serving/processes.py", "benchmarks/soak_service.py"),
    "opentelemetry": ("serving/tracing.py", "serving/gateway/tracing.py"),
    "filelock": ("regionspot/locks.py", "regionspot/data/feature_cache.py"),
    "tritonclient": ("serving/triton.py", "serving/model_config.py"),
}


@dataclass(frozen=True)
class Import:
    path: str  # of the importing file, from the root
    line: int
    name: str  # the dotted name, one level deeper for `from package import module`
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file that runs: those under `if TYPE_CHECKING` don't."""
    relative = path.relative_to(ROOT).as_posix()

    def visit(node: ast.AST, inside_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            yield from (
                Import(relative, node.lineno, alias.name, inside_function) for alias in node.names
            )
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative}:{node.lineno}: relative import"
            yield from (
                Import(relative, node.lineno, f"{node.module}.{alias.name}", inside_function)
                for alias in node.names
            )
        inside_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside_function)

    yield from visit(ast.parse(path.read_text()), False)


def all_imports() -> list[Import]:
    files = [
        path for folder in ("regionspot", *MAPPED) for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return [item for path in files for item in imports_of(path)]


IMPORTS = all_imports()


def component_of_file(path: str) -> str:
    """`regionspot/modeling/sam.py` -> modeling, `export/graphs.py` -> export,
    `regionspot/__init__.py` -> "".
    """
    parts = Path(path).with_suffix("").parts
    name = parts[0] if parts[0] in MAPPED else parts[1]
    return "" if name == "__init__" else name


def component_of_name(name: str) -> str | None:
    """The component that an import names, "" for the package itself, None for another library."""
    parts = name.split(".")
    if parts[0] != "regionspot":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in RANK else ""


def test_every_file_has_a_layer() -> None:
    components = {
        component_of_file(path.relative_to(ROOT).as_posix())
        for path in (ROOT / "regionspot").rglob("*.py")
    }
    assert components - {""} <= set(RANK), "add the new component to LAYERS, at its place"


def test_imports_go_down() -> None:
    wrong = []
    for item in IMPORTS:
        source, target = component_of_file(item.path), component_of_name(item.name)
        if not target or target == source or item.inside_function:
            continue
        if source == "" or RANK[target] >= RANK[source]:
            wrong.append(str(item))
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_each_other() -> None:
    """Also through others, inside functions, or for a type's name: each module can be read before
    those that use it.
    """
    found = circles(arrows(ROOT))
    assert not found, "\n\n".join("\n".join(str(arrow) for arrow in circle) for circle in found)


def test_the_model_knows_nothing_of_export_serving_benchmarks() -> None:
    order = ("", *MAPPED)
    wrong = []
    for item in IMPORTS:
        source, target = component_of_file(item.path), component_of_name(item.name)
        if source == "cli" or target not in MAPPED:
            continue
        if order.index(target) > (order.index(source) if source in MAPPED else 0):
            wrong.append(str(item))
    assert not wrong, "\n".join(wrong)


def test_every_public_name_exists() -> None:
    import regionspot

    assert all(getattr(regionspot, name) is not None for name in regionspot.__all__)


def test_mapped_folders_are_imported_by_their_installed_names() -> None:
    wrong = [str(item) for item in IMPORTS if item.name.split(".")[0] in MAPPED]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", FENCES)
def test_fence(library: str) -> None:
    outside = [
        str(item)
        for item in IMPORTS
        if item.name.split(".")[0] == library
        and not item.path.startswith(tuple(FENCES[library]) or ("nowhere",))
    ]
    assert not outside, "\n".join(
        [f"{library} belongs in {FENCES[library] or 'no file'}", *outside]
    )


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in run.stdout.splitlines()[-1].split()}


HEAVY = {"torch", "torchvision", "open_clip", "segment_anything", "hotcoco"}
HEAVY |= {"onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx_bindings", "tritonclient"}


@pytest.mark.parametrize(
    "module",
    [
        "regionspot",
        "regionspot.images",
        "regionspot.transforms",
        "regionspot.structures",
        "regionspot.masks",
    ],
)
def test_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_the_package_itself_loads_no_numpy() -> None:
    assert not loaded_by("import regionspot") & {"numpy", "PIL", "yaml"}


@pytest.mark.parametrize(
    "command",
    [
        "",
        "predict",
        "train",
        "eval",
        "export",
        "parity",
        "serve",
        "serve up",
        "query",
        "convert",
        "mini",
        "demo",
        "doctor",
    ],
)
def test_help_loads_nothing_heavy(command: str) -> None:
    call = (
        f"from regionspot.cli.main import main\ntry: main({[*command.split(), '--help']})\nexcept "
        "SystemExit: pass"
    )
    assert not loaded_by(call) & HEAVY


def test_public_names() -> None:
    import regionspot
    from regionspot.modeling.checkpoint import load_head
    from regionspot.modeling.presets import create_model
    from regionspot.predictor import RegionPredictor

    assert regionspot.load_head is load_head
    assert regionspot.create_model is create_model
    assert regionspot.RegionPredictor is RegionPredictor
    assert {"load_head", "create_model", "RegionPredictor", "__version__"} <= set(dir(regionspot))
    with pytest.raises(AttributeError, match="load_heads"):
        _ = regionspot.load_heads


def test_mypy_follows_every_module_of_ours() -> None:
    """A name of ours that it cannot find would be `Any`, and whatever is done with it unchecked."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert options["files"] == ["regionspot", "tests", "tools"]
    assert all((ROOT / "regionspot" / folder).resolve() == ROOT / folder for folder in MAPPED)
    assert not [
        name
        for table in options["overrides"]
        for name in table["module"]
        if name.startswith("regionspot")
    ]


def test_mapped_folders_are_found_in_a_checkout() -> None:
    code = (
        "import regionspot.export, regionspot.serving, regionspot.benchmarks; "
        "print(regionspot.export.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(run.stdout.strip()).resolve() == ROOT / "export" / "__init__.py"

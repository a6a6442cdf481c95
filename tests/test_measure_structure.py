"""`tools/measure_structure.py` on a small checkout with known faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.import_circles import arrows, circles
from tools.measure_structure import KINDS, Measures, measure

ROOT = Path(__file__).resolve().parents[1]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two modules import each other when they load, two more lazily; mypy cannot see the latter."""
    body = "".join(f"    x = {number}\n" for number in range(41))
    typing = (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import regionspot.export.plan\n"
    )
    files = {
        "regionspot/__init__.py": '"""Not openvino, only prose."""\n',
        "regionspot/above.py": "from regionspot.below import f\n\ng = [x for x in f]\n",
        "regionspot/below.py": "from regionspot import above\n\nf = above\n",
        "regionspot/apart.py": "import regionspot.above\n# a comment\n",
        "export/__init__.py": "",
        "export/plan.py": 'def make():\n    """One.\n\n    Two."""\n'
        f"    from regionspot.export import made\n{body}",
        "export/made.py": typing + 'RUNTIME = "openvino"\n',
        "README.md": "three short words\n",
    }
    return write(tmp_path, files)


@pytest.fixture
def measures(checkout: Path) -> Measures:
    return measure(checkout)


def test_circles_are_found_at_load_time_and_among_lazy_imports(
    checkout: Path, measures: Measures
) -> None:
    assert measures.in_circles_at_load == [
        "regionspot/above.py:1 imports regionspot.below",
        "regionspot/below.py:1 imports regionspot.above",
    ]
    assert measures.in_circles == [
        *measures.in_circles_at_load,
        "export/made.py:4 imports regionspot.export.plan (lazy)",
        "export/plan.py:5 imports regionspot.export.made (lazy)",
    ]
    write(checkout, {"regionspot/below.py": "f = ()\n", "export/made.py": "f = ()\n"})
    assert circles(arrows(checkout)) == []


def test_a_circle_through_a_third_module_is_one(tmp_path: Path) -> None:
    text = {"a": "b", "b": "c", "c": "a", "d": "a"}
    root = write(
        tmp_path,
        {f"regionspot/{name}.py": f"import regionspot.{to}\n" for name, to in text.items()},
    )
    (circle,) = circles(arrows(root))
    assert {arrow.source for arrow in circle} == {"regionspot.a", "regionspot.b", "regionspot.c"}


def test_a_body_is_long_without_its_docstring(checkout: Path, measures: Measures) -> None:
    assert measures.long_functions == ["export/plan.py:1 make: 42 lines"]
    forty = "def make():\n" + 40 * "    x = 1\n"
    write(checkout, {"export/plan.py": forty})
    assert measure(checkout).long_functions == []


def test_names_count_in_code_and_not_in_prose(checkout: Path, measures: Measures) -> None:
    assert measures.naming["a runtime or format"] == ["export/made.py"]
    write(
        checkout,
        {"regionspot/apart.py": "from regionspot.runtime.formats import NATIVE\n\nuse(NATIVE)\n"},
    )
    assert measure(checkout).naming["a runtime or format"] == [
        "regionspot/apart.py",
        "export/made.py",
    ]


def test_every_kind_is_named_in_this_checkout() -> None:
    """Names that the code has given up would make a count zero."""
    naming = measure(ROOT).naming
    assert [kind.name for kind in KINDS if not naming[kind.name]] == []


def test_modules_that_mypy_does_not_find(checkout: Path, measures: Measures) -> None:
    assert measures.unseen == [
        "regionspot.export",
        "regionspot.export.made",
        "regionspot.export.plan",
    ]
    (checkout / "regionspot/export").symlink_to("../export")
    assert measure(checkout).unseen == []
    assert measure(checkout).files == measures.files == 7


def test_the_table_shows_a_commit_beside_the_checkout(checkout: Path) -> None:
    git = ["git", "-C", str(checkout), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for arguments in (
        ["init", "--quiet"],
        ["add", "."],
        ["commit", "--quiet", "--message", "First"],
    ):
        subprocess.run([*git, *arguments], check=True)
    write(checkout, {"README.md": "short\n"})
    command = [
        sys.executable,
        "-m",
        "tools.measure_structure",
        "--root",
        str(checkout),
        "--against",
        "HEAD",
        "--details",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "|  | HEAD | now |" in printed
    assert "| words in the README | 3 | 1 |" in printed
    assert "  export/plan.py:1 make: 42 lines" in printed
    trees = subprocess.run(
        [*git, "worktree", "list"], capture_output=True, text=True, check=True
    ).stdout
    assert len(trees.splitlines()) == 1

"""A small share of `make fuzz`, and the harness itself: it must notice every kind of fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.kinds import FAULTY, KINDS
from tests.fuzz.parent import Child, run_kinds
from tests.fuzz.report import print_report, write_json
from tests.fuzz.target import make_rng

FAULTS = (
    "accepted",
    "refused",
    "crash",
    "hang",
    "out of memory",
    "untyped exception",
    "wrong answer",
    "wrong answer",
)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """One process for all kinds, so that PyTorch is imported once."""
    child = Child(tmp_path_factory.mktemp("fuzz"))
    yield child
    child.close()


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.few])
def test_strange_inputs_are_refused_in_one_line_or_answered_rightly(
    kind: str, child: Child
) -> None:
    report = child.run(kind, range(KINDS[kind].few))
    if report.failures:
        print_report([report])
    assert not report.failures
    assert report.outcomes["accepted"] > 0 < report.outcomes["refused"]
    assert report.outcomes.total() == KINDS[kind].few


def test_every_kind_of_fault_is_noticed_and_costs_no_other_case(tmp_path: Path) -> None:
    child = Child(tmp_path, case_seconds=2)
    outcomes = [child.run("faulty", range(case, case + 1)) for case in range(FAULTY.cases)]
    together = child.run("faulty", range(FAULTY.cases))
    child.close()
    assert [next(iter(report.outcomes)) for report in outcomes] == list(FAULTS)
    assert [failure.case for failure in together.failures] == list(range(2, 8))
    by_case = {failure.case: failure for failure in together.failures}
    assert "SIGSEGV" in by_case[2].detail and "ctypes" in by_case[2].detail
    assert "time.sleep" in by_case[3].detail or "in run" in by_case[3].detail
    assert by_case[5].detail == "KeyError: 'boxes'" and by_case[5].where.startswith("faulty.py")


def test_a_case_depends_on_its_number_alone() -> None:
    assert make_rng("images", 7).random() == make_rng("images", 7).random()
    drawn = {
        make_rng(kind, case, seed).random()
        for kind in KINDS
        for case in range(20)
        for seed in (1, 2)
    }
    assert len(drawn) == len(KINDS) * 40


def test_figures_are_written_with_what_they_depend_on(tmp_path: Path) -> None:
    reports = run_kinds(tmp_path, {"faulty": range(2), "proposals": range(20)}, workers=2)
    write_json(str(tmp_path / "robustness.json"), reports, seed=15)
    figures = json.loads((tmp_path / "robustness.json").read_text())
    assert [kind["cases"] for kind in figures["kinds"]] == [2, 20]
    assert {"seed", "case_seconds_limit", "processor", "python", "pillow"} <= set(
        figures["conditions"]
    )

"""`python -m regionspot.benchmarks.gpu_check`: its stages, tried on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from regionspot.benchmarks.comparison import load_report
from regionspot.benchmarks.gpu_check import ENDED, Report, main, run_stages
from regionspot.benchmarks.gpu_stages import Plan, Stage, _outcomes, _parity, stages
from regionspot.child_process import ModuleRun
from regionspot.errors import InputError


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "gpu_x.json", {}, {"model": "regionspot_mini", "words": 3})


def states(report: Report) -> dict[str, str]:
    return {
        name: stage["state"]
        for name, stage in json.loads(report.path.read_text())["stages"].items()
    }


def test_what_hangs_crashes_or_is_not_there_is_a_row(report: Report) -> None:
    hanging = Stage("hangs", "http.server", ("0", "--bind", "127.0.0.1"), 2.0)
    listed = [
        hanging,
        Stage("fails", "json.tool", ("no such file",), 30.0),
        Stage("lacks", "platform", (), 30.0, modules=("json", "no_such_module")),
        Stage("speaks", "timeit", ("-n", "1", "-r", "1", 'print(\'{"graph": "x"}\')'), 30.0),
        Stage("garbles", "timeit", ("-n", "1", "-r", "1", "print('{x')"), 30.0),
    ]
    began = time.monotonic()
    run_stages(report, listed, began + 100)
    assert time.monotonic() - began < 60
    assert states(report) == {
        "hangs": "failed",
        "fails": "failed",
        "lacks": "not installed",
        "speaks": "ok",
        "garbles": "failed",
    }
    rows = {row["stage"]: row for row in load_report(report.path)["rows"]}
    assert rows["hangs"]["note"] == "did not end in 2 s"
    assert rows["lacks"]["note"] == "there is no Python module no_such_module"
    assert rows["speaks"]["graph"] == "x"
    assert "cannot be read" in rows["garbles"]["note"]
    assert "| speaks | x |" in report.path.with_suffix(".md").read_text().replace("  ", " ")


def test_time_that_ran_out_and_what_resume_does(report: Report) -> None:
    """What was interrupted, or found no time, runs again; what ended does not."""

    def interrupted(_: ModuleRun) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    first, second = (
        Stage(name, "timeit", ("-n", "1", "-r", "1", "print('{}')"), 30.0) for name in "ab"
    )
    cut = Stage("b", second.module, second.arguments, 30.0, interrupted)
    late = Stage("c", "http.server", ("0", "--bind", "127.0.0.1"), 30.0)
    with pytest.raises(KeyboardInterrupt):
        run_stages(report, [first, cut], time.monotonic() + 100)
    assert states(report) == {"a": "ok"}
    said: list[str] = []
    again = Report.load(report.path)
    run_stages(again, [first, second, late], time.monotonic() + 6, said.append)
    assert said[0] == "a: kept" and states(report)["c"] == "out of time"
    run_stages(again, [first, late], time.monotonic(), said.append)
    assert again.stages["c"]["note"] == "no time was left: go on with --resume"


def test_what_another_commit_did_is_not_kept(report: Report) -> None:
    report.stages = {"a": {"state": "ok"}}
    report.conditions = {"model": "m", "commit": "1"}
    for commit, kept in (("1", {"a": {"state": "ok"}}), ("2", {})):
        later = Report(report.path, {}, {"model": "m", "commit": commit})
        later.take_over(report)
        assert later.stages == kept


def test_a_report_that_is_none_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "gpu_x.json").write_text("[]")
    with pytest.raises(InputError, match="is no report of gpu_check"):
        Report.load(tmp_path / "gpu_x.json")


def test_stages_of_a_gpu(tmp_path: Path) -> None:
    model = {"name": "regionspot_bl", "random_weights": 0}
    listed = {one.name: one for one in stages(Plan(model, tmp_path / "made", True, work=tmp_path))}
    assert list(listed)[:7] == [
        "device",
        "doctor",
        "rates",
        "latency torch_fp32",
        "latency torch_bf16",
        "latency torch-compile_bf16",
        "gpu tests",
    ]
    for runtime in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert {f"latency {runtime}", f"parity {runtime}"} <= set(listed)
    requests = json.loads((tmp_path / "latency torch_bf16.json").read_text())
    assert [one["batches"] for one in requests] == [[1, 8], [1]]
    assert requests[1]["regions"] == [20, 100, 300] and "whole path" in requests[1]["graphs"]
    made_before = stages(Plan(model, tmp_path / "made", False, work=tmp_path))
    assert not [one for one in made_before if one.name.startswith("export")]


def test_what_tests_and_parity_printed(tmp_path: Path) -> None:
    lines = (
        "tests/a.py::test_x PASSED [ 50%]",
        "tests/a.py::TestY::test_z[1-b] FAILED [ 75%]",
        "tests/b.py::test_u SKIPPED (needs a CUDA device) [100%]",
        "FAILED tests/a.py::TestY::test_z[1-b]",
    )
    found = _outcomes(ModuleRun("\n".join(lines).encode(), None))
    assert found == [
        {"result": "1 passed, 1 failed, 1 skipped"},
        {"graph": "a.py::TestY::test_z[1-b]", "result": "FAILED"},
    ]
    path = tmp_path / "parity.json"
    assert _parity(ModuleRun(b"", "crashed"), path) == []
    graphs = [{"name": "g", "passed": True}, {"name": "h", "passed": False, "reason": "far"}]
    path.write_text(json.dumps({"graphs": graphs, "end_to_end": None}))
    assert [row["result"] for row in _parity(ModuleRun(b"", None), path)] == [
        "passed",
        "FAILED",
        "not compared",
    ]


def test_a_dry_run_on_the_cpu(mini_artifacts: Path, tmp_path: Path) -> None:
    """Every stage, in small; then nothing is left to do."""
    options = ["--dry-run", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    options += ["--artifacts", str(mini_artifacts)]
    main(options)  # the doctor may find something that this machine lacks
    path = tmp_path / "gpu_cpu_dry_run.json"
    report = load_report(path)
    found = {name: stage["state"] for name, stage in report["stages"].items()}
    failed = [name for name, state in found.items() if state != "ok" and name != "doctor"]
    assert failed == [], report["stages"]
    assert list(found) == [
        "device",
        "doctor",
        "rates",
        "latency torch_fp32",
        "gpu tests",
        "latency onnxruntime",
        "parity onnxruntime",
    ]
    timed = [row for row in report["rows"] if "p50_ms" in row]
    assert {row["runtime"] for row in timed} == {"torch", "onnxruntime"}
    assert all(row["roofline"] > 0 and row["gflop"] > 0 for row in timed)
    parity = [row for row in report["rows"] if row["stage"] == "parity onnxruntime"]
    assert {row["result"] for row in parity} == {"passed"}
    before = report["stages"]
    began = time.monotonic()
    main([*options, "--resume"])
    after = load_report(path)["stages"]
    assert after == before and time.monotonic() - began < 60
    assert set(found.values()) <= set(ENDED)

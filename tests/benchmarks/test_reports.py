"""What is done with reports: tables, gates, comparison, pages."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from regionspot.benchmarks.comparison import compare, load_report
from regionspot.benchmarks.gates import check
from regionspot.benchmarks.kinds import KINDS
from regionspot.benchmarks.page import html_page
from regionspot.benchmarks.tables import markdown, text
from regionspot.cli.main import main
from regionspot.errors import InputError

Report = dict[str, Any]


def latency(p50_ms: float = 10.0, note: str = "") -> Report:
    target = {"runtime": "openvino", "precision": "fp32"}
    rows: list[dict[str, Any]] = [
        {
            **target,
            "graph": "whole path",
            "batch": 1,
            "regions": count,
            "n": 5,
            "p50_ms": p50_ms * count,
            "roofline": 0.5,
        }
        for count in (1, 10)
    ]
    rows.append(
        {
            **target,
            "graph": "region_head",
            "batch": 1,
            "regions": 10,
            "n": 5,
            "p50_ms": 0.25,
            "peak_mb": None,
        }
    )
    if note:
        rows.append({"runtime": "openvino", "precision": "int8", "graph": None, "note": note})
    return {
        "benchmark": "latency",
        "rows": rows,
        "conditions": {"processor": "one", "cpus": 2, "commit": "abc"},
    }


def accuracy(ap: float = 72.0, distance: float | None = 0.0) -> Report:
    row = {"runtime": "openvino", "precision": "fp32", "AP": ap, "dAP": distance, "agreement": 1.0}
    return {"benchmark": "accuracy", "rows": [row], "conditions": {"protocol": {"rules": "lvis"}}}


def both() -> Report:
    return {"benchmark": "report", "reports": [latency(), accuracy()]}


class TestTables:
    def test_columns_without_figures_are_left_out(self) -> None:
        lines = text(latency()).splitlines()
        assert lines[0] == "Latency"
        assert lines[1].split() == [
            "runtime",
            "precision",
            "graph",
            "batch",
            "regions",
            "n",
            "p50",
            "ms",
            "roofline",
        ]
        assert lines[3].split() == [
            "openvino",
            "fp32",
            "whole",
            "path",
            "1",
            "10",
            "5",
            "100.00",
            "50%",
        ]
        assert lines[4].split()[-1] == "0.25"

    def test_markdown_has_conditions(self) -> None:
        page = markdown(both())
        assert "## Latency" in page and "## Accuracy" in page
        assert "| openvino | fp32 | whole path | 1 | 10 | 5 | 100.00 | 50% |" in page
        assert "- protocol.rules: lvis" in page

    def test_no_rows(self) -> None:
        assert text({"benchmark": "latency", "rows": []}) == "Latency\n"


class TestGates:
    @pytest.mark.parametrize(
        ("expression", "failing"),
        [
            ("p50_ms>50", 1),
            ("p50_ms >= 10", 2),
            ("p50_ms<0.3", 1),
            ("p50_ms==0.25", 1),
            ("p50_ms>1e3", 0),
            ("dAP>0.1", 0),
        ],
    )
    def test_rows_for_which_it_holds(self, expression: str, failing: int) -> None:
        assert len(check(expression, both())) == failing

    def test_what_was_not_measured_cannot_pass(self) -> None:
        (failure,) = check("p50_ms>1000", latency(note="not measured: it crashed"))
        assert "int8" in failure and "it crashed" in failure
        (failure,) = check("dAP>0.1", accuracy(distance=None))
        assert "cannot be judged" in failure

    @pytest.mark.parametrize(
        "expression", ["", "dAP", "dAP>", ">1", "dAP>x", "dAP>1.2.3", "dAP=1", "os.system>1"]
    )
    def test_no_expression(self, expression: str) -> None:
        with pytest.raises(InputError, match="operator and a number"):
            check(expression, accuracy())

    def test_no_such_figure(self) -> None:
        with pytest.raises(InputError, match="there are AP, dAP, agreement"):
            check("mAP>1", accuracy())


class TestCompare:
    def test_ratio_and_distance(self) -> None:
        report = compare(latency(10.0), latency(15.0))
        row = next(row for row in report["rows"] if row["row"] == "openvino fp32 whole path 1 10")
        assert (row["old"], row["new"], row["ratio"], row["p50_ms_ratio"], row["dp50_ms"]) == (
            100,
            150,
            1.5,
            1.5,
            50,
        )
        assert len(check("p50_ms_ratio>1.4", report)) == 2

    def test_rows_of_one_alone(self) -> None:
        report = compare(latency(), latency(note="not measured"))
        assert report["rows"][-1] == {
            "kind": "latency",
            "row": "openvino int8",
            "note": "only in the new one",
        }
        assert check("p50_ms_ratio>1.4", report) == [
            "p50_ms_ratio>1.4 cannot be judged of compare latency openvino int8: only in the new "
            "one"
        ]

    def test_collections_are_compared_by_kind(self) -> None:
        new = {"benchmark": "report", "reports": [accuracy(71.5), latency()]}
        report = compare(both(), new)
        (row,) = (row for row in report["rows"] if row.get("figure") == "AP")
        assert row["dAP"] == pytest.approx(0.5)

    def test_another_machine_is_said(self) -> None:
        other = latency() | {"conditions": {"processor": "two", "cpus": 2}}
        assert "processor differ" in compare(latency(), other)["conditions"]["machines"]

    def test_nothing_in_common(self) -> None:
        with pytest.raises(InputError, match="nothing to compare"):
            compare(latency(), accuracy())


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[Path, Path]:
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        old.write_text(json.dumps(latency(10.0)))
        new.write_text(json.dumps(latency(15.0)))
        return old, new

    def test_compare(self, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        command = ["benchmark", "compare", *map(str, files)]
        assert main(command) == 0
        assert main([*command, "--fail-if", "p50_ms_ratio>1.6"]) == 0
        assert (
            main([*command, "--fail-if", "p50_ms_ratio>1.6", "--fail-if", "p50_ms_ratio>1.4"]) == 1
        )
        output = capsys.readouterr()
        assert "1.500" in output.out and output.err.count("failed: ") == 2

    def test_report(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "accuracy.json").write_text(json.dumps(accuracy()))
        outputs = [tmp_path / "report.json", tmp_path / "report.html", tmp_path / "report.md"]
        options = [
            part
            for name, path in zip(("json", "html", "markdown"), outputs, strict=True)
            for part in (f"--{name}", str(path))
        ]
        assert (
            main(["benchmark", "report", str(files[0]), str(tmp_path / "accuracy.json"), *options])
            == 0
        )
        assert [one["benchmark"] for one in load_report(outputs[0])["reports"]] == [
            "latency",
            "accuracy",
        ]
        assert (
            outputs[1].read_text().startswith("<!doctype html>")
            and "## Accuracy" in outputs[2].read_text()
        )

    @pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
    def test_only_a_page_needs_libraries_of_the_extra(
        self,
        library: str,
        files: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setitem(sys.modules, library, None)
        for name in ("page", "plots"):
            monkeypatch.delitem(sys.modules, f"regionspot.benchmarks.{name}")
        command = ["benchmark", "report", str(files[0])]
        assert main(command) == 0
        assert main([*command, "--html", str(tmp_path / "page.html")]) == 2
        output = capsys.readouterr()
        assert (
            "pip install 'regionspot[benchmark]'" in output.err and output.out.count("Latency") == 1
        )

    def test_two_of_one_kind(
        self, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["benchmark", "report", *map(str, files)]) == 2
        assert "two reports of latency" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "content",
        ["{", "[]", "{}", '{"benchmark": "latency"}', '{"benchmark": "latency", "rows": 3}'],
    )
    def test_no_report(
        self, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file.json").write_text(content)
        assert main(["benchmark", "report", str(tmp_path / "file.json")]) == 2
        assert capsys.readouterr().err.startswith("error: ")

    def test_missing_file_and_unknown_kind(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["benchmark", "report", str(tmp_path / "none.json")]) == 2
        assert main(["benchmark", "latencies"]) == 2
        assert "Did you mean latency?" in capsys.readouterr().err


class Ids(HTMLParser):
    """Ids, links and tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        if "id" in named:
            self.ids.add(str(named["id"]))
        self.links += [str(named[name]) for name in ("href", "xlink:href", "src") if name in named]


PEERS = [
    {
        "way": way,
        "regions": count,
        "masks": False,
        "seconds": seconds * count,
        "total_mb": 300.0,
        "peak_mb": 100.0,
    }
    | {"ours": way != "research", "stages": {"sam_encoder": seconds, "head": seconds}}
    for way, seconds in (("research", 2.0), ("openvino_fp32", 0.5))
    for count in (1, 10)
]
LOAD = [
    {
        "mode": "closed",
        "concurrency": 2,
        "offered_per_s": None,
        "achieved_per_s": 9.0,
        "p50_ms": 5.0,
        "p99_ms": 9.0,
    },
    {
        "mode": "open",
        "concurrency": None,
        "offered_per_s": 4.0,
        "achieved_per_s": 4.0,
        "p50_ms": 4.0,
        "p99_ms": 8.0,
    },
    {
        "mode": "open",
        "concurrency": None,
        "offered_per_s": 9.0,
        "achieved_per_s": 0.0,
        "p50_ms": None,
        "p99_ms": None,
    },
]
TRAIN = [{"what": "extraction", "runtime": "torch", "batch": 8, "n": 3, "images_per_s": 3.0}]


class TestPage:
    def test_every_kind_and_no_other_file(self) -> None:
        reports = [latency(), accuracy()]
        reports += [
            {"benchmark": kind, "rows": rows}
            for kind, rows in (("peers", PEERS), ("load", LOAD), ("train", TRAIN))
        ]
        page = html_page({"benchmark": "report", "reports": reports})
        parser = Ids()
        parser.feed(page)
        assert {"latency", "accuracy", "peers", "load", "train"} <= parser.ids
        assert parser.tags.count("figure") == 8
        assert parser.tags.count("table") == 5
        assert not [link for link in parser.links if not link.startswith("#")]

    def test_what_a_row_says_is_text(self) -> None:
        page = html_page(latency(note="not measured: <script>alert(1)</script>"))
        assert "<script>" not in page and "&lt;script&gt;" in page

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_no_rows(self, kind: str) -> None:
        assert KINDS[kind].title in html_page({"benchmark": kind, "rows": []})

"""The load benchmark: its loops on made-up servers, its sweep on the real one, `perf_analyzer` on a
made-up one.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regionspot.benchmarks import loops, perf_analyzer
from regionspot.benchmarks.load import FRACTIONS, line_of
from regionspot.benchmarks.loops import Ask, closed_loop, open_loop, poisson_arrivals, row_of
from regionspot.benchmarks.questions import Picture, never_seen, pictures_of
from regionspot.benchmarks.server_statistics import work_between
from regionspot.cli.benchmark import load
from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.serving.contract import ServingError, error_of
from regionspot.serving.records import ServerRecord


def measured(*options: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    load.add_options(parser)
    report: dict[str, Any] = json.loads(json.dumps(load.run(parser.parse_args(options))))
    return report


def one_by_one(*seconds: float) -> Ask:
    """A server that answers requests in turn, each in so many seconds; the last of them is that of
    all that follow.
    """
    turn, times = asyncio.Lock(), list(seconds)

    async def ask() -> bool:
        async with turn:
            await asyncio.sleep(times.pop(0) if len(times) > 1 else times[0])
        return False

    return ask


def test_a_stall_is_seen_by_all_who_were_due_in_it() -> None:
    async def loaded() -> loops.Tally:
        return await open_loop(one_by_one(0.4, 0.0), np.linspace(0, 0.3, 31))

    tally = asyncio.run(loaded())
    row = row_of(tally, 0.4, 31 / 0.3)
    assert row["n"] == 31 and row["errors"] == row["not_sent"] == 0
    assert row["p50_ms"] >= 200, (
        "half of the requests were due 0.25 s or more before the server went on"
    )
    assert min(tally.late) >= 0


def test_an_open_loop_past_what_the_server_can_do() -> None:
    async def loaded() -> tuple[loops.Tally, loops.Tally]:
        arrivals = poisson_arrivals(200, 0.5, np.random.default_rng(0))
        return await open_loop(one_by_one(0.01), arrivals), await closed_loop(
            one_by_one(0.01), 4, 0.3
        )

    opened, closed = asyncio.run(loaded())
    row = row_of(opened, opened.answered[-1], 200.0)
    assert row["n"] == 100 and row["saturated"] and row["achieved_per_s"] <= 101
    row = row_of(closed, closed.answered[-1], None)
    assert row["saturated"] is None and row["late_p99_ms"] is None
    assert row["achieved_per_s"] <= 101 and row["p50_ms"] >= 40, "each waits for the other three"


def test_slow_answers_are_not_saturation() -> None:
    async def answer() -> bool:
        await asyncio.sleep(0.3)
        return True

    arrivals = np.linspace(0, 0.5, 25)
    tally = asyncio.run(open_loop(answer, arrivals))
    assert tally.cached == len(tally.latencies) == 25
    # as if nothing else had been on this machine
    tally.answered = list(arrivals + 0.3)
    tally.latencies = [0.3] * 25
    row = row_of(tally, 0.8, 50.0)
    assert row["saturated"] is False and row["achieved_per_s"] == 50.0


def test_errors_are_counted_and_those_in_flight_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse() -> bool:
        raise error_of("OVERLOADED", "too many wait")

    row = row_of(asyncio.run(open_loop(refuse, np.zeros(20))), 0.1, 10.0)
    assert (row["n"], row["errors"], row["error_codes"]) == (0, 20, {"OVERLOADED": 20})
    assert row["p99_ms"] is None and row["achieved_per_s"] == 0 and row["saturated"]
    assert 1 <= len(asyncio.run(closed_loop(refuse, 1, 0.1)).late) <= 3, (
        "who is refused waits a little"
    )

    async def answer() -> bool:
        await asyncio.sleep(0.1)
        return False

    monkeypatch.setattr(loops, "MAX_IN_FLIGHT", 3)
    row = row_of(asyncio.run(open_loop(answer, np.zeros(8))), 0.1, 80.0)
    assert (row["n"], row["not_sent"], row["errors"]) == (3, 5, 0)
    assert row["saturated"] is None, "eight requests are too few to tell"

    async def broken() -> bool:
        raise AssertionError("a mistake of ours")

    with pytest.raises(AssertionError, match="ours"):
        asyncio.run(open_loop(broken, np.zeros(2)))


def test_arrivals() -> None:
    arrivals = poisson_arrivals(30, 2, np.random.default_rng(1))
    assert (
        arrivals.shape == (60,)
        and arrivals.min() >= 0
        and arrivals.max() <= 2
        and (np.diff(arrivals) >= 0).all()
    )
    assert np.array_equal(arrivals, poisson_arrivals(30, 2, np.random.default_rng(1)))
    many = np.diff(poisson_arrivals(1000, 50, np.random.default_rng(2)))
    assert abs(many.std() / many.mean() - 1) < 0.05, (
        "the pauses of a Poisson process are exponential"
    )


def test_pictures(dataset: CocoDataset) -> None:
    files, drawn = pictures_of(dataset.path, 0), pictures_of(None, 0)
    assert len(files) == len(drawn) == len(dataset.images)
    for one, other in zip(files, drawn, strict=True):
        assert one.encoded == other.encoded and np.array_equal(one.boxes, other.boxes)
    new = never_seen(files[0].encoded)
    assert len({new, never_seen(files[0].encoded), files[0].encoded}) == 3
    before, after = (
        np.asarray(Image.open(io.BytesIO(encoded))) for encoded in (files[0].encoded, new)
    )
    assert np.array_equal(before, after)
    with pytest.raises(InputError, match="--picture known"):
        never_seen(b"\x89PNG")


def test_regions_of_a_picture() -> None:
    picture = Picture(b"", 100, 80, np.array([[0, 0, 20, 20], [60, 50, 100, 80]], np.float32))
    assert np.array_equal(picture.regions(None), picture.boxes)
    assert picture.regions(1).tolist() == [[0, 0, 20, 20]]
    many = picture.regions(300)
    assert many.shape == (300, 4) and many.dtype == np.float32
    assert many[2].tolist() == [1, 1, 21, 21] and many[5].tolist() == [58, 48, 98, 78]
    assert (
        (many[:, :2] >= 0).all()
        and (many[:, 2:] <= (100, 80)).all()
        and (many[:, 2:] > many[:, :2]).all()
    )


def test_work_of_a_server() -> None:
    def read(count: int, executions: int, milliseconds: int) -> dict[str, Any]:
        stage = {"count": str(count), "ns": str(milliseconds * 10**6)}
        stages = {"success": stage, "queue": stage, "compute_infer": stage, "fail": {}}
        return {"execution_count": str(executions), "inference_stats": stages}

    found = work_between(
        {"a": read(2, 2, 10), "b": read(3, 3, 9)}, {"a": read(6, 4, 30), "b": read(3, 3, 9)}
    )
    assert list(found) == ["a"]
    assert (found["a"]["requests"], found["a"]["executions"], found["a"]["failed"]) == (4, 2, 0)
    assert (
        found["a"]["queue_ms"],
        found["a"]["compute_infer_ms"],
        found["a"]["compute_input_ms"],
    ) == (5.0, 5.0, None)
    anew = work_between({"a": read(6, 4, 30)}, {"a": read(2, 1, 4), "c": read(1, 1, 7)})
    assert (anew["a"]["requests"], anew["a"]["queue_ms"], anew["c"]["requests"]) == (2, 2.0, 1)


def test_a_sweep_over_the_real_server(
    server: ServerRecord, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "regionspot.benchmarks")
    url = server.ports.grpc_url
    report = measured("--url", url, "--seconds", "0.4", "--concurrency", "1,2", "--warm-up", "1")
    assert report["benchmark"] == "load"
    assert {"processor", "commit", "precision", "includes", "client"} <= set(report["conditions"])
    assert (report["conditions"]["model"], report["conditions"]["picture"]) == (
        "regionspot_mini",
        "new",
    )
    closed = [row for row in report["rows"] if row["mode"] == "closed"]
    opened = [row for row in report["rows"] if row["mode"] == "open"]
    assert [row["concurrency"] for row in closed] == [1, 2] and len(opened) == len(FRACTIONS)
    for row in report["rows"]:
        assert (
            row["n"] >= 1
            and row["errors"] == 0
            and row["error_codes"] == {}
            and row["not_sent"] == 0
        )
        assert row["cached"] == 0, "every picture was new"
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        work = row["server"]["regionspot"]
        assert work["requests"] >= row["n"] - 1 and work["executions"] >= 1 and work["failed"] == 0
        assert work["compute_infer_ms"] > 0 and work["queue_ms"] >= 0
    best = max(row["achieved_per_s"] for row in closed)
    for row, fraction in zip(opened, FRACTIONS, strict=True):
        assert row["n"] == max(round(fraction * best * 0.4), 1) and row["saturated"] in (
            None,
            True,
            False,
        )
        assert row["achieved_per_s"] <= row["offered_per_s"] + 0.01
    assert report["saturation_per_s"] == max(row["achieved_per_s"] for row in report["rows"])
    assert caplog.messages == [line_of(row) for row in report["rows"]]


def test_known_pictures_with_masks(server: ServerRecord, dataset: CocoDataset) -> None:
    options = [
        "--url",
        server.ports.grpc_url,
        "--data",
        str(dataset.path),
        "--picture",
        "known",
        "--masks",
    ]
    options += ["--regions", "1,6", "--seconds", "0.3", "--warm-up", "0", "--vocabulary", "pets"]
    report = measured(*options, "--mode", "open", "--rates", "5")
    assert (
        [row["regions"] for row in report["rows"]]
        == [1, 6]
        == [one["regions"] for one in report["saturation"]]
    )
    assert all(row["cached"] == row["n"] == 2 and row["mode"] == "open" for row in report["rows"])
    assert (report["conditions"]["masks"], report["conditions"]["words"]) == (True, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocabulary", "birds"], "mini, pets, not birds"),
        (["--regions", "301"], "takes 300 of a picture"),
        (["--regions", "0"], "--regions must be more than 0"),
        (["--concurrency", "1,two"], "--concurrency takes numbers"),
        (["--seconds", "nan"], "--seconds must be more than 0"),
        (["--mode", "open"], "--rates auto"),
        (["--url", "http://127.0.0.1:8000"], "gRPC"),
        (["--perf-analyzer", "/nowhere/perf_analyzer"], "cannot be started"),
        (["--perf-analyzer", sys.executable], "libb64"),
    ],
)
def test_what_cannot_be_measured(server: ServerRecord, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measured("--url", server.ports.grpc_url, *options)


def test_no_server() -> None:
    with pytest.raises(ServingError, match="regionspot-serve up") as caught:
        measured("--url", "127.0.0.1:1")
    assert caught.value.code == "UNAVAILABLE" and "\n" not in str(caught.value)


PERF_ANALYZER = """#!{python}
import json, shutil, sys
if "--version" in sys.argv:
    sys.exit(print("Perf Analyzer Version 2.50"))
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
shutil.copy(options["--input-data"], {copy!r})
if options["--request-count"] != "20":
    sys.exit("Failed to obtain stable measurement\\n")
with open(options["-f"], "w") as table:
    table.write("Concurrency,Inferences/Second,Client Send,Server Queue,Server Compute Infer,"
                "p50 latency,p90 latency,p95 latency,p99 latency,Avg latency\\n"
                "1,6.65816,29,170,117449,119913,144163,176240,191854,119279\\n")
"""
"""Its table is one that the real one wrote."""


@pytest.fixture
def analyzer(tmp_path: Path) -> Path:
    path = tmp_path / "perf_analyzer"
    path.write_text(
        PERF_ANALYZER.format(python=sys.executable, copy=str(tmp_path / "questions.json"))
    )
    path.chmod(0o755)
    return path


def test_perf_analyzer_beside_ours(server: ServerRecord, analyzer: Path) -> None:
    options = [
        "--url",
        server.ports.grpc_url,
        "--perf-analyzer",
        str(analyzer),
        "--regions",
        "2",
        "--warm-up",
        "0",
    ]
    report = measured(*options, "--mode", "closed", "--concurrency", "1", "--seconds", "0.2")
    (row,) = report["perf_analyzer"]["rows"]
    assert (row["regions"], row["concurrency"], row["n"]) == (2, 1, 20)
    assert (row["achieved_per_s"], row["p50_ms"], row["p99_ms"]) == (8.38, 119.91, 191.85)
    assert (row["server_queue_ms"], row["server_compute_infer_ms"]) == (0.17, 117.45)
    assert (row["ours_n"], row["ours_p50_ms"]) == (
        report["rows"][0]["n"],
        report["rows"][0]["p50_ms"],
    )
    asked = json.loads((analyzer.parent / "questions.json").read_text())["data"]
    images = [base64.b64decode(one["image"]["content"]["b64"]) for one in asked]
    assert len(set(images)) == len(images) == 20 + perf_analyzer.SPARE
    assert all(int.from_bytes(image[:4], "little") == len(image) - 4 for image in images)
    assert Image.open(io.BytesIO(images[0][4:])).format == "JPEG"
    assert all(
        one["boxes"]["shape"] == [2, 4] and len(one["boxes"]["content"]) == 8 for one in asked
    )


def test_perf_analyzer_that_fails_costs_no_figures(analyzer: Path) -> None:
    data = perf_analyzer.input_data(["handle"], [np.zeros((1, 4), np.float32)], "mini", False)
    assert data["data"][0]["image_handle"] == {"content": ["handle"], "shape": [1]}
    row = perf_analyzer.run(str(analyzer), "127.0.0.1:8001", data, 7, 1)
    assert row == {
        "concurrency": 1,
        "n": 7,
        "error": "exit status 1: Failed to obtain stable measurement",
    }

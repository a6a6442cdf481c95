"""`python -m regionspot.benchmarks.gpu_check`: what works on this machine's GPU, and how fast it
is, in a bounded time.

Doctor, the tests marked `gpu`, PyTorch, `torch.compile`, and each runtime of artefacts that is
installed: parity with PyTorch, latency of each graph and of the whole path, and its share of this
GPU's own rates. Each stage is a process of its own with a deadline; the report is written after
each, so that nothing that hangs or crashes loses what was measured before. `--resume` goes on with
what is not there yet. What is not installed, fails, or finds no time left is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regionspot.benchmarks.conditions import conditions
from regionspot.benchmarks.gpu_stages import (
    THIS,
    WORDS,
    Plan,
    Row,
    Stage,
    missing_module,
    stages,
)
from regionspot.benchmarks.synthetic import read_picture
from regionspot.benchmarks.tables import markdown
from regionspot.child_process import run_module
from regionspot.cli.models import DEFAULT_MODEL
from regionspot.errors import InputError, RegionSpotError
from regionspot.files import write_atomically

MINUTES = 8.0
LEAST_S = 5.0
"""A stage is not begun with less time than this."""

OK, FAILED, MISSING, LATE = "ok", "failed", "not installed", "out of time"
ENDED = (OK, FAILED, MISSING)
"""States that `--resume` leaves as they are."""

ROOFLINE_S = 120.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m regionspot.benchmarks.gpu_check",
        description="What works on this machine's GPU and how fast, in a bounded time, as JSON and "
        "Markdown. Exits with 1 if a stage failed, with 2 if there is no GPU.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="for gpu_NAME.json and gpu_NAME.md (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="that all may take (default: %(default)s)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out what an earlier run has finished, of this model and commit",
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        metavar="DIR",
        help="of the model, made before (default: made here, as far as the time allows)",
    )
    parser.add_argument(
        "--model", default="regionspot_bl", help="with random weights (default: %(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/gpu-check"),
        metavar="DIR",
        help="for artefacts and files between stages (default: %(default)s)",
    )
    parser.add_argument(
        "--stages", metavar="LIST", help="only those whose names begin so, such as device,latency"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the same on the CPU with regionspot_mini, smaller"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return check(arguments)
    except RegionSpotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(arguments: argparse.Namespace) -> int:
    """Runs all stages; the exit status. Raises InputError where there is no GPU to check."""
    began = time.monotonic()
    deadline = began + 60 * arguments.minutes
    plan = plan_of(arguments)
    name = "cpu_dry_run" if arguments.dry_run else _gpu_name()
    path = arguments.out / f"gpu_{name}.json"
    now = conditions(
        model=plan.model["name"],
        device=name,
        words=WORDS,
        batches=list(plan.batches),
        regions=list(plan.regions),
        minutes=arguments.minutes,
        roofline="share of the time that the measured rates of a matrix product in that precision "
        "and of a copy would take, whichever is larger",
    )
    report = Report(path, {}, now)
    if arguments.resume and path.exists():
        report.take_over(Report.load(path))
    chosen = [one for one in stages(plan) if _is_chosen(one, arguments.stages)]
    run_stages(report, chosen, deadline)
    print(f"wrote {path} and {path.with_suffix('.md')} in {time.monotonic() - began:.0f} s")
    return 1 if FAILED in {one["state"] for one in report.stages.values()} else 0


def plan_of(arguments: argparse.Namespace) -> Plan:
    arguments.work.mkdir(parents=True, exist_ok=True)
    size = "320x240" if arguments.dry_run else "1920x1080"
    write_atomically(arguments.work / "picture", read_picture(size, 0)[0])
    artifacts = arguments.artifacts or arguments.work / "artifacts"
    shared = {"artifacts": artifacts, "export": arguments.artifacts is None}
    if arguments.dry_run:
        small: dict[str, Any] = {"seconds": 0.0, "batches": (1,), "regions": (2, 9)}
        return Plan({"name": DEFAULT_MODEL}, work=arguments.work, device="cpu", **shared, **small)
    model: dict[str, Any] = {"name": arguments.model}
    if arguments.model != DEFAULT_MODEL:
        model["random_weights"] = 0
    return Plan(model=model, work=arguments.work, **shared)


@dataclass
class Report:
    """What was found so far; a file after each stage.

    Args:
        path: of the JSON; the tables in Markdown lie beside it.
        stages: name -> state, seconds, note and rows.
    """

    path: Path
    stages: dict[str, dict[str, Any]]
    conditions: Mapping[str, Any] | None = None
    figures: Sequence[Row] = ()
    """Of the roofline, for each timed row."""

    @classmethod
    def load(cls, path: Path) -> Report:
        """Raises InputError for a file that is none of ours."""
        try:
            found = json.loads(path.read_bytes())
            return cls(path, found["stages"], found["conditions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no report of gpu_check ({error}): remove it, or leave out --resume"
            ) from error

    def take_over(self, earlier: Report) -> None:
        """What an earlier run found, unless that was of another model or commit."""
        kinds = [
            {name: (one.conditions or {}).get(name) for name in ("model", "commit")}
            for one in (self, earlier)
        ]
        if kinds[0] == kinds[1]:
            self.stages = dict(earlier.stages)

    def add(
        self, stage: Stage, state: str, seconds: float, note: str | None, rows: list[Row]
    ) -> None:
        self.stages[stage.name] = {
            "state": state,
            "seconds": round(seconds, 1),
            "note": note,
            "rows": rows,
        }
        self.write()

    def write(self) -> None:
        content = {
            "benchmark": "gpu_check",
            "rows": self.rows(),
            "stages": self.stages,
            "conditions": self.conditions or {},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(content, indent=2) + "\n").encode())
        tables = markdown(content).encode("utf-8", "backslashreplace")
        write_atomically(self.path.with_suffix(".md"), tables)

    def rows(self) -> list[Row]:
        """Of all stages, and one for each stage that did not end well or had nothing to say."""
        found = []
        for name, stage in self.stages.items():
            found += [{"stage": name, **row} for row in stage["rows"]]
            if stage["state"] != OK or not stage["rows"]:
                found.append({"stage": name, "result": stage["state"], "note": stage["note"]})
        figures = iter(self.figures)
        return [row | next(figures, {}) if "p50_ms" in row else row for row in found]


def run_stages(
    report: Report, chosen: Sequence[Stage], deadline: float, say: Callable[[str], None] = print
) -> None:
    """Runs what the report does not have yet, and adds the roofline's figures.

    Args:
        deadline: by `time.monotonic`.
    """
    for stage in chosen:
        if report.stages.get(stage.name, {}).get("state") in ENDED:
            say(f"{stage.name}: kept")
            continue
        _run(report, stage, deadline)
        done = report.stages[stage.name]
        say(f"{stage.name}: {done['state']}, {done['seconds']} s {done['note'] or ''}".rstrip())
    left = deadline + ROOFLINE_S - time.monotonic()  # they are counted, not measured: no GPU waits
    run = run_module(THIS, "roofline", report.path, timeout_s=max(left, LEAST_S))
    report.figures = run.rows
    if run.failure:
        say(f"roofline: {run.failure}")
    report.write()


def _run(report: Report, stage: Stage, deadline: float) -> None:
    if missing := missing_module(stage):
        report.add(stage, MISSING, 0, f"there is no Python module {missing}", [])
        return
    left = deadline - time.monotonic()
    if left < min(LEAST_S, stage.limit_s):
        report.add(stage, LATE, 0, "no time was left: go on with --resume", [])
        return
    began, limit_s = time.monotonic(), min(stage.limit_s, left)
    run = run_module(stage.module, *stage.arguments, timeout_s=limit_s)
    seconds = time.monotonic() - began
    try:
        rows = stage.read(run)
    except (ValueError, KeyError, TypeError) as error:
        report.add(stage, FAILED, seconds, f"its output cannot be read: {error!r}", [])
        return
    if run.failure is None:
        report.add(stage, OK, seconds, None, rows)
    else:
        ran_out = run.failure.startswith("did not end") and limit_s < stage.limit_s
        report.add(stage, LATE if ran_out else FAILED, seconds, run.failure, rows)


def _gpu_name() -> str:
    """Of the first GPU, as a file's name. Raises InputError where PyTorch sees none."""
    run = run_module(THIS, "device", "cuda", timeout_s=120)
    if run.failure or not run.rows:
        raise InputError(
            f"there is no GPU to check here ({run.failure}): `regionspot doctor` says why; "
            "--dry-run tries this program on the CPU"
        )
    return re.sub(r"[^a-z0-9]+", "_", str(run.rows[0]["graph"]).lower()).strip("_")


def _is_chosen(stage: Stage, asked: str | None) -> bool:
    return asked is None or any(stage.name.startswith(part) for part in asked.split(","))


if __name__ == "__main__":
    sys.exit(main())

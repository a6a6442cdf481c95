"""Run directories and checkpoints: nothing half-written, nothing overwritten, nothing damaged taken
for whole.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regionspot.config import TrainConfig
from regionspot.errors import ArtifactError, InputError
from regionspot.training.metrics import MetricsLog
from regionspot.training.resume import RunDirectory, read_checkpoint

MakeConfig = Callable[..., TrainConfig]


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "head.weight": torch.full((20, 30), float(step)),
        "optimizer.step": torch.tensor(float(step)),
    }


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path) -> RunDirectory:
    """A run with the checkpoints of steps 2 and 4."""
    directory = RunDirectory(tmp_path / "run", make_config())
    assert directory.starting_point(None) is None
    directory.begin()
    for step in (2, 4):
        directory.save(step, tensors(step), {"train_seconds": step})
    return directory


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_a_checkpoint_is_read_as_it_was_written(run: RunDirectory) -> None:
    checkpoint = run.starting_point("auto")
    assert checkpoint is not None and checkpoint.step == 4
    assert checkpoint.tensors.keys() == tensors(4).keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors(4).items())
    manifest = checkpoint.manifest
    assert manifest["train_seconds"] == 4 and manifest["config"]["steps"] == 6
    assert manifest["versions"].keys() == {"regionspot", "torch", "numpy", "python"}
    assert manifest["state_bytes"] == (checkpoint.path / "state.safetensors").stat().st_size
    assert "git_commit" in manifest


def test_the_newest_are_kept(run: RunDirectory) -> None:
    (run.checkpoints / ".step_00000003.99.tmp").mkdir()  # a process that was killed while saving
    run.save(6, tensors(6), {})
    run.save(10, tensors(10), {})
    assert names(run) == ["step_00000006", "step_00000010"]


def test_what_a_killed_save_of_the_same_process_id_left_is_in_nobodys_way(
    run: RunDirectory,
) -> None:
    """As after a restart of a container, where a process gets the id that the killed one had."""
    for step in (5, 6):
        aside = run.checkpoints / f".step_{step:08}.{os.getpid()}.tmp"
        aside.mkdir()
        (aside / "state.safetensors").write_bytes(b"half of it")
    run.save(6, tensors(6), {})
    assert names(run) == ["step_00000004", "step_00000006"]
    assert read_checkpoint(run.checkpoints / "step_00000006").step == 6


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    run: RunDirectory, file: str, damage: str
) -> None:
    path = run.checkpoints / "step_00000004" / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        position = (
            content.index(b'"state_xxh3"') + 18 if file == "manifest.json" else len(content) - 5
        )
        content[position] ^= 1
    elif damage == "cut":
        del content[-7:]
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    with pytest.warns(
        UserWarning, match=r"step_00000004 is missing or damaged .*the one before is tried"
    ):
        checkpoint = run.starting_point("auto")
    assert checkpoint is not None and checkpoint.step == 2
    run.save(4, tensors(40), {})  # made again in its place
    assert torch.equal(
        read_checkpoint(run.checkpoints / "step_00000004").tensors["head.weight"],
        tensors(40)["head.weight"],
    )


def test_all_damaged_is_an_error_and_none_is_the_beginning(run: RunDirectory) -> None:
    for path in run.checkpoints.glob("*/state.safetensors"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ArtifactError, match=r"every checkpoint in .* is damaged: delete"),
    ):
        run.starting_point("auto")
    shutil.rmtree(run.checkpoints)
    assert run.starting_point("auto") is None


def test_a_chosen_checkpoint(run: RunDirectory, make_config: MakeConfig, tmp_path: Path) -> None:
    two, four = run.checkpoints / "step_00000002", run.checkpoints / "step_00000004"
    chosen = run.starting_point(four)
    assert chosen is not None and chosen.step == 4
    with pytest.raises(
        InputError,
        match=r"has later checkpoints than .*step_00000002 \(step_00000004\): delete them",
    ):
        run.starting_point(two)
    with pytest.raises(ArtifactError, match="step_00000099 is missing"):
        run.starting_point(run.checkpoints / "step_00000099")
    elsewhere = RunDirectory(tmp_path / "other", make_config(name="other"))
    begun = elsewhere.starting_point(two)
    assert begun is not None and begun.step == 2
    different = RunDirectory(tmp_path / "third", make_config(name="third", seed=5))
    with pytest.raises(InputError, match=r"another configuration: seed \(0, now 5\)"):
        different.starting_point(two)


def test_an_existing_run_is_not_overwritten(run: RunDirectory) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    with pytest.raises(
        InputError,
        match=r"exists: go on with it by --resume auto, choose another name by name=NAME",
    ):
        run.starting_point(None)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_configuration_alone_is_no_run(
    make_config: MakeConfig, tmp_path: Path, resume: str | None
) -> None:
    """What is left of an attempt that failed before its first step does not block the corrected
    one.
    """
    RunDirectory(tmp_path / "run", make_config(seed=1)).begin()
    (tmp_path / "run" / "metrics.jsonl").touch()
    corrected = RunDirectory(tmp_path / "run", make_config(seed=2))
    assert corrected.starting_point(resume) is None
    corrected.begin()
    assert "seed: 2" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("trace", ["metrics.jsonl", "head.safetensors"])
def test_a_line_of_the_log_or_a_head_is_a_run(
    make_config: MakeConfig, tmp_path: Path, trace: str
) -> None:
    run = RunDirectory(tmp_path / "run", make_config())
    run.begin()
    (run.path / trace).write_text("{}")
    with pytest.raises(InputError, match="exists: go on with it"):
        run.starting_point(None)


def test_a_damaged_configuration_is_named(run: RunDirectory) -> None:
    for content in ("a: [", "3", "sed: 1"):
        (run.path / "config.yaml").write_text(content)
        with pytest.raises(ArtifactError, match=r"config.yaml is damaged"):
            run.starting_point("auto")


FAILING: list[tuple[str, int]] = [
    ("open", 0),
    ("open", 1),
    ("write", 0),
    ("write", 1),
    ("mkdir", 0),
    ("rename", 0),
]
FAILING += [("fsync", call) for call in range(4)]


@pytest.mark.parametrize(("function", "call"), FAILING)
def test_a_full_disk_leaves_the_older_checkpoints_usable_and_says_so(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    """The call-th use of a function fails while the checkpoint of step 6 is saved."""
    counts = iter(range(1000))

    def failing(
        real: Callable[..., Any], wanted: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            if wanted(*args) and next(counts) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return maybe

    def open_for_writing(file: Any, mode: str = "r", *_: Any) -> bool:
        return mode == "wb"

    class FullFile(io.FileIO):
        write = failing(io.FileIO.write)

    with monkeypatch.context() as patch:
        if function == "open":
            patch.setattr(builtins, "open", failing(open, open_for_writing))
        elif function == "write":
            patch.setattr(
                builtins, "open", lambda file, mode="r", **_: FullFile(file, mode.replace("b", ""))
            )
        else:
            patch.setattr(os, function, failing(getattr(os, function)))
        message = (
            r"step 6 was not saved: the disk is full; free some space.*"
            r"newest good checkpoint is .*--resume auto"
        )
        with pytest.raises(ArtifactError, match=message):
            run.save(6, tensors(6), {"train_seconds": 6})
    complete = function == "fsync" and call == 3  # renamed, only the directory's own flush failed
    assert names(run) == ["step_00000002", "step_00000004"] + ["step_00000006"] * complete
    checkpoint = run.starting_point("auto")
    assert checkpoint is not None and checkpoint.step == (6 if complete else 4)
    assert torch.equal(checkpoint.tensors["head.weight"], tensors(checkpoint.step)["head.weight"])
    run.save(6, tensors(6), {"train_seconds": 6})
    assert names(run) == ["step_00000004", "step_00000006"]


def test_the_log_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, tensorboard=False) as log:
        for step in (2, 4, 6):
            log.write(step, loss=1.0 / step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    with MetricsLog(tmp_path, 4, tensorboard=False) as log:
        log.write(6, loss=0.5, eta_s=None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, 0, tensorboard=True) as log:
        log.write(3, loss=0.25, eta_s=None)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.25)]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """As the norm of a gradient that overflowed in float16: JSON has neither Infinity nor NaN."""
    with MetricsLog(tmp_path, 0, tensorboard=False) as log:
        log.write(2, loss=0.5, grad_norm=float("inf"), eta_s=float("nan"))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 2,
        "loss": 0.5,
        "grad_norm": None,
        "eta_s": None,
    }


def test_tensorboard_forgets_what_a_killed_run_wrote_before_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for loss, steps in ((0.25, (3, 6)), (0.75, (3,))):
        with MetricsLog(tmp_path, 0, tensorboard=True) as log:
            for step in steps:
                log.write(step, loss=loss)
        time.sleep(1.1)  # files of events are ordered by the second in their names
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.75)]

"""A run's directory and its checkpoints: whole or not there, verified when read.

<output_dir>/<name>/
    config.yaml
    plan.txt                data sets and what was left out of them, steps, the head's size
    skipped.json            images that could not be used, if any, and why
    metrics.jsonl, tensorboard/
    checkpoints/step_00000500/
        state.safetensors   weights, optimizer, average, input statistics
        manifest.json       checksum, step, configuration, versions
    head.safetensors        at the end
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash
import yaml
from torch import Tensor

from regionspot import __version__
from regionspot.config import (
    TrainConfig,
    config_of_run,
    config_to_dict,
    config_to_yaml,
    differences_on_resume,
)
from regionspot.errors import ArtifactError, InputError
from regionspot.files import flush_directory, why_not_written, write_atomically, write_flushed
from regionspot.provenance import git_commit

FORMAT = "regionspot-training-1"
_STEP_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run after `step` steps. `tensors` are on the CPU."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]


class RunDirectory:
    """Where a run keeps everything.

    Args:
        path: made by `begin` if it does not exist.
    """

    def __init__(self, path: str | Path, config: TrainConfig) -> None:
        self.path, self.config = Path(path), config
        self.checkpoints = self.path / "checkpoints"

    def starting_point(self, resume: str | Path | None) -> Checkpoint | None:
        """Look what is there. Nothing is written.

        Args:
            resume: None for a new run; "auto" for the newest whole checkpoint, if there is any; or
                a checkpoint's path.

        Returns:
            Where to go on from, None for the beginning.

        Raises:
            InputError: a new run would go over an old one; the old one had another configuration; a
                later checkpoint than the one to go on from is there.
            ArtifactError: the checkpoint is damaged; every one is.
        """
        begun = self._has_begun()
        if resume is None and begun:
            raise InputError(
                f"the run {self.path} exists: go on with it by --resume auto, choose another name "
                "by name=NAME, or delete the directory"
            )
        if begun:
            self._check_config()
        if resume is None:
            return None
        return self.newest() if resume == "auto" else self._chosen(Path(resume))

    def begin(self, plan: str = "") -> None:
        """Makes the directory, with the configuration and the plan in it.

        Raises:
            ArtifactError: it cannot be written.
        """
        write_atomically(self.path / "config.yaml", config_to_yaml(self.config).encode())
        if plan:
            write_atomically(
                self.path / "plan.txt", f"{plan}\n".encode("utf-8", "backslashreplace")
            )

    def write_skipped(self, skipped: Mapping[str, Mapping[str, str]]) -> None:
        """Writes the list of skipped images: data set -> file name -> why. Without any, there is no
        such file.

        Raises:
            ArtifactError: it cannot be written.
        """
        path = self.path / "skipped.json"
        if skipped or path.exists():
            write_atomically(path, json.dumps(skipped, indent=2).encode())

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then delete those that are older than the newest
        `checkpoints.keep`.

        Args:
            extra: JSON values for the manifest.

        Raises:
            ArtifactError: it cannot be written; names the newest checkpoint that is there.
        """
        target = self.checkpoints / f"step_{step:08}"
        aside = self.checkpoints / f".{target.name}.{os.getpid()}.tmp"
        self._delete_leftovers()
        try:
            state = safetensors.torch.save(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            )
            manifest = json.dumps(self._manifest(step, state) | dict(extra), indent=2).encode()
            aside.mkdir(parents=True)
            write_flushed(aside / "state.safetensors", state)
            write_flushed(aside / "manifest.json", manifest)
            flush_directory(aside)
            if target.exists():  # made before this run went back, or damaged
                shutil.rmtree(target)
            os.rename(aside, target)
            flush_directory(self.checkpoints)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise self._not_saved(step, error) from error
        self._delete_old(step)
        return target

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are passed over with a warning.

        Raises:
            ArtifactError: there are some, and all are damaged.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                return read_checkpoint(path)
            except ArtifactError as error:
                warnings.warn(f"{error}; the one before is tried", stacklevel=2)
        if paths:
            raise ArtifactError(
                f"every checkpoint in {self.checkpoints} is damaged: delete that directory to "
                "start from the beginning"
            )
        return None

    def describe_newest(self) -> str:
        """ "the newest good checkpoint is …", or that there is none."""
        paths = self._paths()
        return (
            f"the newest good checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"
        )

    def _has_begun(self) -> bool:
        """Whether a checkpoint, a head or a line of the log is there; a configuration alone is of
        no use to anybody.
        """
        log = self.path / "metrics.jsonl"
        return (
            bool(self._paths())
            or (self.path / "head.safetensors").exists()
            or (log.exists() and log.stat().st_size > 0)
        )

    def _chosen(self, path: Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        later = [p.name for p in self._paths() if _step_of(p) > checkpoint.step]
        if later:
            raise InputError(
                f"{self.path} has later checkpoints than {path} ({', '.join(later)}): delete them "
                "to go back to it, or start another run from it with name=NAME"
            )
        differing = differences_on_resume(config_of_run(checkpoint.manifest["config"]), self.config)
        if differing:
            raise InputError(_another_run(path, differing))
        return checkpoint

    def _check_config(self) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            return
        try:
            old = config_of_run(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, InputError) as error:
            raise ArtifactError(
                f"{file} is damaged or of another version ({error}): start another run"
            ) from error
        differing = differences_on_resume(old, self.config)
        if differing:
            raise InputError(_another_run(self.path, differing))

    def _paths(self) -> list[Path]:
        """Checkpoint directories, oldest first."""
        found = self.checkpoints.glob("step_*") if self.checkpoints.is_dir() else []
        return sorted((path for path in found if _STEP_NAME.fullmatch(path.name)), key=_step_of)

    def _delete_old(self, step: int) -> None:
        for path in [p for p in self._paths() if _step_of(p) <= step][
            : -self.config.checkpoints.keep
        ]:
            shutil.rmtree(path, ignore_errors=True)

    def _delete_leftovers(self) -> None:
        """Of processes that were killed while saving; one of them may have had our process id."""
        for leftover in self.checkpoints.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _manifest(self, step: int, state: bytes) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": step,
            "state_xxh3": xxhash.xxh3_64_hexdigest(state),
            "state_bytes": len(state),
            "config": config_to_dict(self.config),
            "versions": versions(),
            "git_commit": git_commit(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _not_saved(self, step: int, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"the checkpoint of step {step} was not saved: {why_not_written(error)}. No older "
            f"checkpoint was touched, {self.describe_newest()}; go on with --resume auto"
        )


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's content, verified.

    Raises:
        ArtifactError: missing, incomplete or damaged; names it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, not {FORMAT}")
        state = (path / "state.safetensors").read_bytes()
        if xxhash.xxh3_64_hexdigest(state) != manifest["state_xxh3"]:
            raise ValueError("its checksum is wrong")
        return Checkpoint(path, int(manifest["step"]), safetensors.torch.load(state), manifest)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"the checkpoint {path} is missing or damaged ({error})") from error


def versions() -> dict[str, str]:
    return {
        "regionspot": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _another_run(path: Path, differing: list[str]) -> str:
    changed = ", ".join(differing)
    return (
        f"{path} is of another configuration: {changed}. Go on with its own, or start another run "
        "by name=NAME"
    )

"""The files that a command writes: refused before any work where they would destroy something,
written before tables.

Every command that writes calls `check_outputs` first, `write_output` as soon as there is something
to write, and prints its table to `table_stream` last.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from regionspot.errors import InputError
from regionspot.files import own_descriptor, same_file, write_atomically

STDOUT = "-"
Name = str | Path
"""A file's path, or "-" for standard output."""


def check_outputs(
    outputs: Mapping[str, Name | None], inputs: Mapping[str, Name | Iterable[Name] | None]
) -> None:
    """Refuse outputs that cannot be written, or whose writing would lose something.

    Args:
        outputs: option -> the file to write, None where it is not asked for.
        inputs: what it is ("the picture", "--data") -> the file or files that are read. None, words
            that name no file, and folders are passed over; of a folder of artefacts name the files,
            see `artifact_files`.

    Raises:
        InputError: an output is a folder, lies in one that cannot be written to, is an input, or is
            another output.
    """
    asked = {option: path for option, path in outputs.items() if path is not None}
    for option, path in asked.items():
        _check_place(option, path)
        for what, source in _each(inputs):
            if not is_stdout(path) and _is_file(source) and same_file(path, source):
                raise InputError(
                    f"{option} {path} would overwrite {what}, {source}: choose another name"
                )
    options = list(asked)
    for index, first in enumerate(options):
        for second in options[index + 1 :]:
            if _collide(asked[first], asked[second]):
                raise InputError(
                    f"{first} and {second} would both write {asked[second]}: choose two names"
                )


def write_output(path: Name, content: bytes) -> None:
    """Write a file whole or not at all, or to standard output where `path` is that.

    Raises:
        ArtifactError: it cannot be written.
    """
    if not is_stdout(path):
        write_atomically(path, content)
    elif hasattr(sys.stdout, "write_bytes"):
        sys.stdout.write_bytes(content)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.flush()


def json_bytes(document: Any, indent: int | None = 2) -> bytes:
    """A document as a JSON file's content. Text that is no Unicode is written in JSON's own
    escapes.
    """
    text = json.dumps(document, indent=indent, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def table_stream(*outputs: Name | None) -> IO[str]:
    """Where a table goes: standard output, or standard error where one of the outputs takes
    standard output.
    """
    return (
        sys.stderr if any(path is not None and is_stdout(path) for path in outputs) else sys.stdout
    )


def is_stdout(path: Name) -> bool:
    """Whether a path is "-", or leads to the process's standard output in another way, such as
    /dev/stdout.
    """
    if str(path) == STDOUT:
        return True
    try:
        if own_descriptor(path) == 1:
            return True
        here, there = os.stat(path), os.fstat(1)
    except (OSError, ValueError):
        return False
    return os.path.samestat(here, there) and not stat.S_ISCHR(here.st_mode)


def model_files(arguments: argparse.Namespace) -> dict[str, Name | Iterable[Name] | None]:
    """What the options of `add_model_options` and `add_runtime_options` name, as inputs of
    `check_outputs`.
    """
    weights = ("head_weights", "sam_weights", "clip_weights")
    named: dict[str, Any] = {
        f"--{option.replace('_', '-')}": getattr(arguments, option, None) for option in weights
    }
    return named | {"a file of --artifacts": artifact_files(getattr(arguments, "artifacts", None))}


def artifact_files(directory: Name | None) -> list[Path]:
    """The files of an artefact directory that must not be overwritten: its manifest and what that
    lists.
    """
    if directory is None:
        return []
    manifest = Path(directory) / "manifest.json"
    try:
        graphs = json.loads(manifest.read_bytes())["graphs"]
        return [manifest, *(Path(directory) / name for graph in graphs for name in graph["files"])]
    except (OSError, ValueError, KeyError, TypeError):  # whoever opens it says what is wrong
        return [manifest]


def _each(inputs: Mapping[str, Name | Iterable[Name] | None]) -> Iterator[tuple[str, Name]]:
    for what, given in inputs.items():
        if given is None:
            continue
        yield from ((what, one) for one in ([given] if isinstance(given, str | Path) else given))


def _is_file(path: Name) -> bool:
    """Whether a path leads to something that could be lost: neither a folder nor a device, nor
    words for one.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISDIR(mode) or stat.S_ISCHR(mode))


def _collide(first: Name, second: Name) -> bool:
    if is_stdout(first) or is_stdout(second):
        return is_stdout(first) and is_stdout(second)
    return same_file(first, second) and (_is_file(first) or not os.path.exists(first))


def _check_place(option: str, path: Name) -> None:
    """Raises InputError for a file that could not be written after all the work."""
    if is_stdout(path):
        return
    if os.path.isdir(path):
        raise InputError(f"{option} {path} is a folder: name a file in it")
    if os.path.islink(os.path.realpath(path)):
        raise InputError(f"{option} {path}: its symbolic links form a loop: choose another name")
    if os.path.exists(path) and not os.path.isfile(path):
        return  # a device or a FIFO: what its folder allows does not matter
    folder = Path(os.path.realpath(path)).parent
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder):
        raise InputError(f"{option} {path}: {folder} is no folder: choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {folder} may not be written to: choose another folder")

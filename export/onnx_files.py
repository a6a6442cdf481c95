"""Writing ONNX files: whole and valid, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import onnx
from onnxscript import ir

from regionspot.errors import ArtifactError

MAX_FILE_BYTES = 2_000_000_000
"""Larger graphs keep their weights in a file beside them: protobuf ends at 2 GiB."""


def save(model: ir.Model, path: str | Path) -> None:
    """Writes a model, checked by ONNX's own checker before the file appears under its name.

    A model larger than `MAX_FILE_BYTES` has its weights in `path` + ".data".

    Raises:
        ArtifactError: not valid ONNX, or it cannot be written.
    """
    path = Path(path)
    weight_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    external = f"{path.name}.data" if weight_bytes > MAX_FILE_BYTES else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
            ir.save(model, Path(aside, path.name), external_data=external)
            onnx.checker.check_model(str(Path(aside, path.name)), full_check=True)
            # the weights first, then the graph that names them
            for file in sorted(os.listdir(aside), reverse=True):
                shutil.move(Path(aside, file), path.with_name(file))
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(
            f"{path.name} is not valid ONNX ({error}): please report this"
        ) from error

"""ONNX files to OpenVINO's IR."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from regionspot.errors import ArtifactError, InputError
from regionspot.export.making import Making

try:
    import openvino
except ImportError as error:
    raise InputError(
        f"making OpenVINO's IR needs OpenVINO ({error}): pip install 'regionspot[openvino]'"
    ) from error


def make(making: Making) -> None:
    """Converts the ONNX file of the same precision."""
    assert making.source is not None
    convert(making.source, making.path, making.step.precision)


def convert(onnx_path: str | Path, out_xml: str | Path, precision: str) -> None:
    """Write an ONNX file of ours as `out_xml` and the weights beside it, `.bin`.

    The precision is that of the ONNX file, node by node; on a CPU OpenVINO takes half-precision
    weights as they are and works in the precision that the runner asks for. int8 pairs become the
    quantised layers of its own that they mean.

    Args:
        precision: of the ONNX file; noted down in the IR.

    Raises:
        ArtifactError: OpenVINO cannot read the file, or the IR cannot be written.
    """
    source, out = Path(onnx_path), Path(out_xml)
    if not source.is_file():
        raise ArtifactError(f"{source} does not exist: export it to ONNX first")
    try:
        model = openvino.Core().read_model(source)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ArtifactError(
            f"OpenVINO {openvino.__version__} cannot read {source} ({reason}): the file is "
            "damaged, or this version lacks one of its operators"
        ) from error
    model.set_rt_info(precision, ["regionspot", "precision"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
            openvino.save_model(model, Path(aside, out.name), compress_to_fp16=False)
            # the weights first, then the graph that names them
            for file in (out.with_suffix(".bin"), out):
                os.replace(Path(aside, file.name), file)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"cannot write {out}: {error}") from error

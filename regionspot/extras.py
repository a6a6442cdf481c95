"""Which extra of this package brings a library that is not installed."""

from __future__ import annotations

EXTRAS = {
    "torch": "torch",
    "open_clip": "torch",
    "segment_anything": "torch",
    "safetensors": "torch",
    "tensorboard": "train",
    "hotcoco": "eval",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tritonclient": "serving",
    "prometheus_client": "web",
    "python_multipart": "web",
    "starlette": "web",
    "uvicorn": "web",
    "matplotlib": "benchmark",
    "transformers": "peers",
}
"""Module -> extra in pyproject.toml."""


def install_hint(error: ImportError) -> str | None:
    """Says how to install what an import did not find; None if that is no library of an extra."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in EXTRAS:
        return None
    return f"this needs {module}, which is not installed: pip install 'regionspot[{EXTRAS[module]}]'"

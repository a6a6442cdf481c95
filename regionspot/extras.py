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
    "httpx2": "serving",
    "psutil": "serving",
    "tritonclient": "serving",
    "opentelemetry": "web",
    "prometheus_client": "web",
    "python_multipart": "web",
    "starlette": "web",
    "uvicorn": "web",
    "jinja2": "benchmark",
    "matplotlib": "benchmark",
    "transformers": "peers",
}
"""Module -> extra in pyproject.toml."""


WITH_TORCH = ("train", "eval", "export")
"""Extras that are named for a command and include "torch"."""


def install_hint(error: ImportError, command: str = "") -> str | None:
    """Says how to install what an import did not find; None if that is no library of an extra.

    Args:
        command: that was run, if one was: what it needs besides PyTorch is named at once.
    """
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in EXTRAS:
        return None
    extra = command if EXTRAS[module] == "torch" and command in WITH_TORCH else EXTRAS[module]
    return f"this needs {module}, which is not installed: pip install 'regionspot[{extra}]'"

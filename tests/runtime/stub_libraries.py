"""Libraries without content, so that others which link to them load on a machine that lacks CUDA
and TensorRT.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

NVINFER = """
    static void *none() { return 0; }
    static void *table[64];
    static void *object[64];
    void *getPluginRegistry() {
      for (int i = 0; i < 64; ++i) table[i] = (void *)none;
      object[0] = table;
      return object;
    }
    void *getBuilderPluginRegistry() { return getPluginRegistry(); }
    int getInferLibVersion() { return 101600; }
    void *createInferBuilder_INTERNAL() { return 0; }
    void *createInferRefitter_INTERNAL() { return 0; }
    void *createInferRuntime_INTERNAL() { return 0; }
"""
"""Of libnvinfer, what ONNX Runtime's provider and TensorRT's Python module link to."""

NVONNXPARSER = """
    int getNvOnnxParserVersion() { return 101600; }
    void *createNvOnnxParser_INTERNAL() { return 0; }
    void *createNvOnnxParserRefitter_INTERNAL() { return 0; }
"""

NVINFER_PLUGIN = "int initLibNvInferPlugins() { return 0; }"


def compile_library(folder: Path, name: str, source: str, *options: str) -> None:
    """Compiles a library of C into a folder.

    Args:
        name: of the file, and the name that others link to: "libnvinfer.so.10".
    """
    path = folder / f"{name}.c"
    path.write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(folder / name), str(path)]
    subprocess.run([*command, f"-Wl,-soname,{name}", *options], check=True)

"""How graphs run on CUDA, in this process and in Triton alike: what is verified here is what is
served there.
"""

from __future__ import annotations

from collections.abc import Mapping

ONNX_RUNTIME_CUDA: Mapping[str, str] = {
    # single precision stays single precision: a faster graph is one exported in fp16 or bf16
    "use_tf32": "0",
    "cudnn_conv_algo_search": "HEURISTIC",  # the default searches anew for each shape
}
"""Options of ONNX Runtime's CUDA provider. Triton's backend takes them by the same names, as
parameters of the accelerator "cuda".
"""

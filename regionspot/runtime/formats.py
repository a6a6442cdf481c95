"""The registers of artefact formats and of the runtimes that open them.

Whatever depends on a format or a runtime reads its row here. A new one is a row, a `Runner` and a
function that makes the files. A package outside of regionspot adds its rows by an entry point of
the group `regionspot.formats` (docs/how-to/add-a-runtime.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regionspot.errors import InputError
from regionspot.registers import Plugins, Register, load_object
from regionspot.runtime.engine_file import FLAVOURS
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.tolerance import (
    FP8,
    GPU_ONLY,
    HALF,
    INT8,
    PRECISIONS,
    RUNTIME_FP32,
    TENSORRT_FP32,
    Tolerance,
)

if TYPE_CHECKING:
    from regionspot.runtime.runner import Runner

ONNX, ONNX_GPU, NATIVE = "onnx", "onnx-gpu", "native"

CPU, GPU = "cpu", "gpu"
"""What a graph is laid out for; see `Format.target`."""

MODEL = "model"
"""What a format is made from, if not from ONNX: the PyTorch model."""


@dataclass(frozen=True)
class OpenOptions:
    """How to open a graph; see `open_graph`. `device` is never "auto"."""

    runtime: str
    precision: str
    device: str
    threads: int | None = None
    cuda_graph: bool = False


@dataclass(frozen=True)
class Runtime:
    """A library that runs artefacts.

    Args:
        name: as in `--runtime`.
        opens: names of the formats that it opens, the preferred one first.
        prefers_on_gpu: names of those that it prefers on a GPU.
        opener: "module:function" that opens a graph: `(path, spec, OpenOptions) -> Runner`.
            Imported when it is needed.
        modules: Python modules that must be installed.
        devices: where it runs. "cuda:N" allows any number for N.
        best_device: the device that "auto" stands for.
        needs_cuda: it runs on NVIDIA GPUs only.
        gpu_precisions: precisions that it computes on GPUs only.
        cuda_graphs: it can capture a graph as a CUDA graph on request.
        whole_models: False for kernels that replace single graphs of another runtime.
    """

    name: str
    opens: tuple[str, ...]
    opener: str
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    best_device: Callable[[], str] = lambda: "cpu"
    needs_cuda: bool = False
    gpu_precisions: tuple[str, ...] = ()
    prefers_on_gpu: tuple[str, ...] = ()
    cuda_graphs: bool = False
    whole_models: bool = True

    def resolve_device(self, device: str) -> str:
        """Resolves "auto". Raises InputError for a device that the runtime does not have."""
        if device == "auto":
            return self.best_device()
        if re.sub(r":[0-9]+$", ":N", device) not in self.devices:
            allowed = ["auto", *(name.replace(":N", ":1") for name in self.devices)]
            raise InputError(
                f"the runtime {self.name} works on {', '.join(allowed)}, not on {device}"
            )
        return device

    def opens_on(self, device: str) -> tuple[str, ...]:
        """Returns `opens` in the order of preference on a device."""
        if device == "cpu":
            return self.opens
        return tuple(dict.fromkeys((*self.prefers_on_gpu, *self.opens)))

    def own_formats(self, device: str) -> tuple[str, ...]:
        """Returns those of `opens_on` whose artefacts are verified in this runtime."""
        return tuple(name for name in self.opens_on(device) if FORMATS[name].runtime == self.name)

    def parity_device(self, precision: str, target: str = CPU) -> str:
        """Returns the device on which artefacts are compared.

        That is a CPU for those that are laid out for one and that a CPU can run, else the GPU
        that will serve them, if there is one.
        """
        on_cpu = "cpu" in self.devices and precision not in self.gpu_precisions
        return "cpu" if on_cpu and target == CPU else self.best_device()


@dataclass(frozen=True)
class Format:
    """A format of artefacts.

    Args:
        name: as in the manifest.
        suffix: of the file to open.
        runtime: name of the runtime in which artefacts are verified.
        maker: "module:function" that makes a file: `(regionspot.export.making.Making) -> None`.
        settings: "module:function" that returns what else the file depends on, as JSON: `(Making)
            -> dict`; None if nothing.
        option: of `regionspot-export`, without dashes; None if it comes with other formats.
        help: of that option.
        made_from: the name of another format, or MODEL.
        target: what its graphs are laid out for, CPU or GPU. The numbers are the same; the
            operators differ, see `regionspot.modeling.graphs.GraphModule.target`.
        companions: names of files beside the one to open: {name} is its name, {stem} the same
            without the suffix.
        modules: Python modules that making and verifying need.
        install: command that installs them.
        distributions: whose versions the manifest records.
        fp32_tolerance: parity class of artefacts in fp32.
        weight_copies: peak number of copies of a graph's weights held in memory during its build,
            measured at ViT-L/14.
        runs_on_cpu: whole models run on a CPU, so native kernels can replace some of their graphs.
        graphs: names of the graphs that it exists for; None for all.
    """

    name: str
    suffix: str
    runtime: str
    maker: str
    option: str | None
    help: str = ""
    settings: str | None = None
    made_from: str = ONNX
    target: str = CPU
    companions: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    install: str = ""
    distributions: tuple[str, ...] = ()
    fp32_tolerance: Tolerance = RUNTIME_FP32
    weight_copies: float = 4.0
    runs_on_cpu: bool = False
    graphs: tuple[str, ...] | None = None

    def files_at(self, path: Path) -> list[Path]:
        """Returns the file to open and its companions, as far as they exist."""
        named = (name.format(name=path.name, stem=path.stem) for name in self.companions)
        return [
            file for file in (path, *(path.with_name(name) for name in named)) if file.is_file()
        ]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Returns the precisions that it can be exported in."""
        return tuple(one for one in PRECISIONS if self.target == GPU or one not in GPU_ONLY)

    @property
    def precision(self) -> str:
        """Returns the precision that it is exported in where none is named."""
        return preferred_precisions(self.target)[0]

    def parity_device(self, precision: str) -> str:
        """Returns the device on which artefacts of a precision are compared with the model."""
        return RUNTIMES[self.runtime].parity_device(precision, self.target)

    def tolerance(self, precision: str) -> Tolerance:
        """Returns the parity class of a precision, relative to the PyTorch model in fp32."""
        if precision not in PRECISIONS:
            raise InputError(
                f"there is no precision {precision!r}: choose one of {', '.join(PRECISIONS)}"
            )
        named = {"fp32": self.fp32_tolerance, "fp16": HALF, "bf16": HALF, "int8": INT8, "fp8": FP8}
        return named[precision]


def preferred_precisions(target: str) -> tuple[str, ...]:
    """Returns PRECISIONS, the one first that is taken where none is named.

    On a CPU that is single precision. On a GPU it is half precision, whose products are several
    times as fast there; we disable TF32 for fp32.
    """
    first = "fp32" if target == CPU else "fp16"
    return tuple(sorted(PRECISIONS, key=lambda precision: precision != first))


def register(*rows: Runtime | Format) -> None:
    """Adds rows to the registers. Raises InputError for a name that is taken."""
    for row in rows:
        if isinstance(row, Runtime):
            RUNTIMES.add(row)
        else:
            FORMATS.add(row)


_PLUGINS = Plugins("regionspot.formats", register)
RUNTIMES: Register[Runtime] = Register("runtime", _PLUGINS)
FORMATS: Register[Format] = Register("format", _PLUGINS)


def has_nvidia_gpu() -> bool:
    """Tells whether a driver of an NVIDIA GPU is loaded, without PyTorch."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def _best_device_of_onnxruntime() -> str:
    device: str = load_object("regionspot.runtime.ort_runner:best_device")()
    return device


def _engine_format(name: str, option: str, help_text: str, distribution: str) -> Format:
    flavour = FLAVOURS[name]
    return Format(
        name,
        suffix=flavour.suffix,
        runtime=name,
        maker="regionspot.export.trt_engine:make",
        settings="regionspot.export.trt_engine:settings",
        option=option,
        help=help_text,
        made_from=ONNX_GPU,
        target=GPU,
        companions=("{stem}.json",),
        modules=(flavour.module,),
        install=flavour.install,
        distributions=(distribution,),
        fp32_tolerance=TENSORRT_FP32,
        weight_copies=6.0,
    )


register(
    Runtime(
        "onnxruntime",
        opens=(ONNX, ONNX_GPU),
        prefers_on_gpu=(ONNX_GPU,),
        opener="regionspot.runtime.ort_runner:open_graph",
        modules=("onnxruntime",),
        devices=("cpu", "cuda", "cuda:N", "tensorrt", "tensorrt:N"),
        best_device=_best_device_of_onnxruntime,
        gpu_precisions=("bf16",),
        cuda_graphs=True,
    ),
    Runtime(
        "openvino",
        opens=("openvino", ONNX),
        opener="regionspot.runtime.openvino_runner:open_graph",
        modules=("openvino",),
    ),
    *(
        Runtime(
            name,
            opens=(name,),
            opener="regionspot.runtime.trt_runner:open_graph",
            modules=(flavour.module,),
            devices=("cuda", "cuda:N"),
            best_device=lambda: "cuda",
            needs_cuda=True,
        )
        for name, flavour in FLAVOURS.items()
    ),
    Runtime(
        NATIVE,
        opens=(NATIVE,),
        opener="regionspot.runtime.native_runner:open_graph",
        whole_models=False,
    ),
    Format(
        ONNX,
        suffix=".onnx",
        runtime="onnxruntime",
        maker="regionspot.export.onnx_graph:make",
        option="onnx",
        help="ONNX files (the default if no format is given)",
        made_from=MODEL,
        companions=("{name}.data",),
        modules=("onnx", "onnxscript", "onnxruntime"),
        install="pip install 'regionspot[export]'",
        distributions=("torch", "onnx", "onnxscript", "onnxruntime"),
        runs_on_cpu=True,
    ),
    Format(
        ONNX_GPU,
        suffix=".gpu.onnx",  # a server's folder may hold both
        runtime="onnxruntime",
        maker="regionspot.export.onnx_graph:make",
        option="onnx-gpu",
        help="ONNX files laid out for NVIDIA GPUs: ONNX Runtime's CUDA and TensorRT providers, "
        "Triton, trtexec",
        made_from=MODEL,
        target=GPU,
        companions=("{name}.data",),
        modules=("onnx", "onnxscript", "onnxruntime"),
        install="pip install 'regionspot[export]'",
        distributions=("torch", "onnx", "onnxscript", "onnxruntime"),
    ),
    Format(
        "openvino",
        suffix=".xml",
        runtime="openvino",
        maker="regionspot.export.openvino_ir:make",
        option="openvino",
        help="OpenVINO IR, for CPUs",
        companions=("{stem}.bin",),
        modules=("openvino",),
        install="pip install 'regionspot[export,openvino]'",
        distributions=("openvino",),
        runs_on_cpu=True,
    ),
    _engine_format("tensorrt", "trt", "TensorRT engines, for the GPU of this machine", "tensorrt"),
    _engine_format(
        "tensorrt-rtx",
        "trt-rtx",
        "TensorRT-RTX engines, for RTX GPUs; needs no GPU",
        "tensorrt_rtx-cu13-libs",
    ),
    Format(
        NATIVE,
        suffix=".npz",
        runtime=NATIVE,
        maker="regionspot.export.decoder_weights:make",
        option=None,
        made_from=MODEL,
        distributions=("numpy", "torch"),
        graphs=("sam_token_decoder_prompts", "sam_mask_decoder"),
    ),
)


def model_runtimes() -> tuple[str, ...]:
    """Returns the names of the runtimes that run whole models from artefacts."""
    return tuple(name for name, runtime in RUNTIMES.items() if runtime.whole_models)


def runtime_named(name: str, whole_models: bool = False) -> Runtime:
    """Returns a row of the register. Raises InputError for an unknown name, or one that runs no
    whole models.
    """
    if name not in (model_runtimes() if whole_models else RUNTIMES):
        hint = "; torch runs the weights themselves, without artefacts" if name == "torch" else ""
        raise InputError(
            f"there is no runtime {name!r} for artefacts: choose "
            f"{', '.join(model_runtimes())}{hint}"
        )
    return RUNTIMES[name]


def export_option(runtime: str, precision: str | None = None) -> str:
    """Returns the option of `regionspot-export` that makes the preferred format of a runtime:
    "--openvino".

    Args:
        precision: one that the format must have; None stands for any.

    Raises:
        InputError: the runtime opens no format in that precision.
    """
    opens = [FORMATS[name] for name in RUNTIMES[runtime].opens]
    able = [row for row in opens if precision is None or precision in row.precisions]
    if not able:
        raise InputError(
            f"{runtime} runs on CPUs, and {precision} is for GPUs: leave out the precision, or "
            "take another runtime"
        )
    return f"--{able[0].option}"


def open_graph(
    path: Path,
    spec: GraphSpec,
    runtime: str,
    precision: str,
    device: str = "auto",
    threads: int | None = None,
    cuda_graph: bool = False,
) -> Runner:
    """Opens a file in a runtime, which is imported only now.

    Args:
        runtime: a name in RUNTIMES.
        precision: of the graph.
        device: one of the runtime's devices; for ONNX Runtime also "tensorrt", its provider of that
            name. "auto" is a GPU if the runtime can use one.
        threads: of runtimes on the CPU; None stands for `regionspot.threads.default_threads()`.
        cuda_graph: of ONNX Runtime on CUDA: capture the graph once and replay it, which saves the
            launches of its kernels. Each axis must have one size: `regionspot-export --batch 1`
            makes such image encoders. TensorRT's runners capture on their own.

    Raises:
        InputError: the runtime is not installed, the device is not available or not one of the
            runtime's, or the graph cannot be captured.
        ArtifactError: the runtime cannot load the file, or the file is not the spec's graph.
    """
    row = runtime_named(runtime)
    if cuda_graph and not row.cuda_graphs:
        able = ", ".join(name for name, other in RUNTIMES.items() if other.cuda_graphs)
        raise InputError(f"cuda_graph is an option of {able}, not of {runtime}: leave it out")
    options = OpenOptions(runtime, precision, row.resolve_device(device), threads, cuda_graph)
    runner: Runner = load_object(row.opener)(path, spec, options)
    return runner

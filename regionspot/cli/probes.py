"""What `regionspot doctor` tries of each library, one function for each.

A broken driver or a mismatched wheel can take the whole process down, so doctor runs the probes in
a child: `python -m regionspot.cli.probes NAME ...` prints one finding a line, as JSON, as soon as
it is there.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from regionspot.cli.findings import Finding
from regionspot.errors import ArtifactError

TESTED_TORCH = ("2.10", "2.13")
KERNEL_LEVELS = {1: "SSE2", 3: "AVX2", 4: "AVX-512"}
NVIDIA_INDEX = "https://pypi.nvidia.com"
RTX_CAPABILITY = 89
"""The compute capability that TensorRT-RTX builds for where there is no GPU: 8.9, Ada."""


@dataclass(frozen=True)
class Probe:
    """`check` says in a few words what works, or returns a whole finding; an exception means that
    it does not work.
    """

    check: Callable[[], str | Finding]
    install: str  # what `pip install` takes
    required: bool = False
    index: str = ""  # where pip looks besides PyPI

    def mend(self, *flags: str) -> str:
        """The command that installs it, and why it is not the usual one."""
        flags = (f"--extra-index-url {self.index}", *flags) if self.index else flags
        command = " ".join(["pip install", *flags, f"'{self.install}'"])
        return (
            f"{command} (the wheels are there; what PyPI has is a stub that downloads them)"
            if self.index
            else command
        )


def run(name: str) -> Finding:
    """The finding of one probe, here and now. A library that is not installed is a warning unless
    it is required.
    """
    probe = PROBES[name]
    try:
        found = probe.check()
        finding = found if isinstance(found, Finding) else Finding(name, "OK", found)
    except ModuleNotFoundError as error:
        finding = Finding(
            name,
            "FAIL" if probe.required else "WARN",
            f"not installed ({error.name})",
            probe.mend(),
        )
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        detail = f"installed, but does not work: {type(error).__name__}: {reason}"
        finding = Finding(name, "FAIL", detail, probe.mend("--force-reinstall"))
    return replace(finding, required=probe.required)


def _packages() -> str:
    homes = {
        "numpy": "numpy",
        "pillow": "PIL.Image",
        "PyYAML": "yaml",
        "xxhash": "xxhash",
        "filelock": "filelock",
    }
    homes |= {"ftfy": "ftfy", "tokenizers": "tokenizers"}
    for module in homes.values():
        import_module(module)
    return ", ".join(f"{distribution} {metadata.version(distribution)}" for distribution in homes)


def _native() -> Finding | str:
    try:
        masks = import_module("regionspot.masks")
    except ImportError as error:
        return Finding("native extension", "FAIL", str(error), "make setup, or pip install .")
    # runs 0 1 3 1 3 1, the last three written as differences
    mask = import_module("numpy").eye(3, dtype=bool)
    rle = masks.encode_rle(mask)
    if rle["counts"] != "013000" or not (masks.decode_rle(rle) == mask).all():
        return Finding(
            "native extension",
            "FAIL",
            f"a 3x3 mask came out as {rle}",
            "build it again: make setup",
        )
    native = import_module("regionspot._native")
    return kernel_level(native.level(), native.HIGHEST_LEVEL, platform.machine().lower())


def kernel_level(used: int, built: int, machine: str) -> Finding | str:
    """The instruction set that the kernels use, and whether the compiler could have made better
    ones.

    Args:
        used, built: levels of x86-64; 1 is the baseline of any processor.
        machine: as `platform.machine` names it, in lower case.
    """
    if machine not in ("x86_64", "amd64"):
        return "works; kernels are built for this processor's baseline"
    detail = (
        f"works; kernels use {KERNEL_LEVELS[used]} and are built for up to {KERNEL_LEVELS[built]}"
    )
    if built == 1:
        mend = "build it again with GCC 12 or Clang 18, or a later one: CXX=g++-12 make setup"
        return Finding("native extension", "WARN", f"{detail}: they are slower than none", mend)
    asked = os.environ.get("REGIONSPOT_MAX_LEVEL")
    return f"{detail} (REGIONSPOT_MAX_LEVEL={asked})" if asked else detail


def _torch() -> Finding | str:
    torch = import_module("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    detail = f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)"
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    first, last = (tuple(int(part) for part in version.split(".")) for version in TESTED_TORCH)
    if first <= release <= last:
        return detail
    mend = "pip install -c constraints.txt torch torchvision"
    return Finding(
        "torch", "WARN", f"{detail}: tested with {TESTED_TORCH[0]} to {TESTED_TORCH[1]}", mend
    )


def _devices() -> Finding | str:
    torch = import_module("torch")
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            found.append(
                f"cuda:{index} {card.name}, {card.total_memory / 2**30:.0f} GiB, "
                f"sm_{card.major}{card.minor}"
            )
    if torch.backends.mps.is_available():
        found.append("mps")
    return "; ".join([*found, "cpu"]) if found else _devices_without_gpu(torch.version.cuda)


def _devices_without_gpu(cuda: str | None) -> Finding | str:
    """Says why PyTorch sees no GPU.

    Args:
        cuda: the version that PyTorch is built for; None for a CPU build.
    """
    from regionspot.cli.nvidia import NAME
    from regionspot.runtime.nvidia import oldest_driver, read_driver

    driver = read_driver()
    if cuda is None and (driver is None or not driver.gpus):
        return "cpu"
    detail = "cpu alone, though " + (
        f"PyTorch is built for CUDA {cuda}" if cuda else "there is an NVIDIA GPU"
    )
    if cuda is None:
        detail += ": PyTorch is a CPU build"
        mend = "pip uninstall torch torchvision, then install them for CUDA (docs/export.md)"
    elif driver is None:
        detail += ": no NVIDIA driver is loaded"
        mend = "install NVIDIA's driver, or ignore this on a machine without an NVIDIA GPU"
    elif not driver.runs(cuda):
        oldest = oldest_driver(cuda)
        detail += f", which needs driver {oldest} or later, not {driver.version}"
        mend = f"install driver {oldest} or later, or PyTorch for an older CUDA (docs/export.md)"
    else:
        mend = f"see the line {NAME} above, and whether CUDA_VISIBLE_DEVICES hides GPUs"
    return Finding("devices", "WARN", detail, mend)


def _nvidia_gpu() -> Finding:
    from regionspot.cli.nvidia import examine_driver
    from regionspot.runtime.nvidia import read_driver

    return examine_driver(read_driver())


def _has_nvidia_gpu() -> bool:
    found: bool = import_module("regionspot.runtime.formats").has_nvidia_gpu()
    return found


def _torchvision() -> str:
    version = metadata.version("torchvision")
    try:
        import_module("torchvision")
    except RuntimeError as error:
        import_module("regionspot.modeling.torchvision_shim").import_safely()
        return f"{version}, importable through regionspot's shim (without it: {error})"
    return f"{version}, imports by itself: the shim does nothing"


def _foundation(module: str, distribution: str) -> str:
    import_module("regionspot.modeling.torchvision_shim").import_safely()
    import_module(module)
    return metadata.version(distribution)


def mini_weights(folder: Path | None = None) -> Finding | str:
    """Loads the weights of regionspot_mini, which verifies their checksums; `folder` instead of the
    shipped ones.
    """
    shipped = import_module("regionspot.mini.shipped")
    folder = folder or shipped.WEIGHTS_DIR
    try:
        shipped.load_mini_backbones(folder)
        import_module("regionspot.modeling.checkpoint").load_head(folder / "head.safetensors")
    except ArtifactError as error:
        return Finding(
            "mini weights", "FAIL", str(error), "install regionspot again, or restore them with git"
        )
    megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    return f"SAM, CLIP and head load, their checksums agree ({megabytes:.1f} MB)"


def _version(module: str) -> str:
    return str(import_module(module).__version__)


def _onnxruntime() -> Finding | str:
    runtime = import_module("onnxruntime")
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(both) > 1:
        return Finding(
            "onnxruntime",
            "WARN",
            f"{runtime.__version__}, but both {' and '.join(both)} are installed, which overwrite "
            "each other's files",
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'regionspot[onnx]' for "
            "CPUs or 'regionspot[onnx-gpu]' for NVIDIA GPUs",
        )
    return _try_providers(runtime, _has_nvidia_gpu())


def _try_providers(runtime: Any, has_gpu: bool) -> Finding | str:
    """Says which providers run a graph. One that is compiled in may still miss its libraries."""
    from regionspot.cli import one_layer
    from regionspot.runtime.ort_runner import PROVIDERS

    compiled_in = runtime.get_available_providers()
    for_gpus = [name for name in ("cuda", "tensorrt") if PROVIDERS[name] in compiled_in]
    running, failures = [], []
    for name in ["cpu", *(for_gpus if has_gpu else [])]:
        try:
            one_layer.run_in_onnxruntime(runtime, PROVIDERS[name])
            running.append(name)
        except RuntimeError as error:
            failures.append(f"{name} does not run: {error}")
    detail = "; ".join(
        [f"{runtime.__version__}: runs on {', '.join(running) or 'nothing'}", *failures]
    )
    if failures:
        mend = "install the versions that go together (docs/export.md), or work on the CPU"
        return Finding("onnxruntime", "WARN" if "cpu" in running else "FAIL", detail, mend)
    if has_gpu and not for_gpus:
        detail += "; it is a CPU build, though there is an NVIDIA GPU"
        mend = "pip uninstall onnxruntime, then pip install 'regionspot[onnx-gpu]'"
        return Finding("onnxruntime", "WARN", detail, mend)
    if for_gpus and not has_gpu:
        detail += f"; {' and '.join(for_gpus)} not tried: there is no NVIDIA GPU"
    return detail


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _openvino() -> str:
    openvino = import_module("openvino")
    return (
        f"{openvino.__version__.split('-')[0]}, devices: "
        f"{', '.join(openvino.Core().available_devices)}"
    )


def _tensorrt() -> Finding | str:
    trt = import_module("tensorrt")
    if not _has_nvidia_gpu():
        detail = (
            f"{trt.__version__}, but there is no NVIDIA GPU: it can neither build nor run engines "
            "here"
        )
        return Finding(
            "tensorrt", "WARN", detail, "use a machine with an NVIDIA GPU, or tensorrt_rtx to build"
        )
    return _build_and_run("tensorrt", trt)


def _tensorrt_rtx() -> Finding | str:
    from regionspot.cli import one_layer

    trt: Any = import_module("tensorrt_rtx_bindings")
    if _has_nvidia_gpu():
        return _build_and_run("tensorrt_rtx", trt)
    plan = one_layer.build_in_tensorrt(trt, RTX_CAPABILITY)
    detail = (
        f"{trt.__version__}: built an engine of one layer ahead of time ({len(plan)} bytes, for "
        f"compute capability {RTX_CAPABILITY / 10}), but there is no NVIDIA GPU to run engines"
    )
    return Finding("tensorrt_rtx", "WARN", detail, "run the engines on a machine with an RTX GPU")


def _build_and_run(name: str, trt: Any) -> Finding | str:
    """Builds an engine for the GPU of this machine and runs it, in memory of PyTorch."""
    from regionspot.cli import one_layer

    plan = one_layer.build_in_tensorrt(trt)
    detail = f"{trt.__version__}: built an engine of one layer"
    if not _is_installed("torch") or not import_module("torch").cuda.is_available():
        mend = "install PyTorch for CUDA: engines run in its memory"
        return Finding(name, "WARN", f"{detail}, not run: PyTorch has no CUDA device here", mend)
    one_layer.run_in_tensorrt(trt, import_module("torch"), plan)
    return f"{detail} and ran it"


def _tritonclient() -> str:
    import_module("tritonclient.grpc")
    import_module("tritonclient.http")
    return metadata.version("tritonclient")


PROBES: dict[str, Probe] = {
    "packages": Probe(_packages, "regionspot", required=True),
    "native extension": Probe(_native, "regionspot", required=True),
    "nvidia gpu": Probe(_nvidia_gpu, "regionspot"),
    "torch": Probe(_torch, "regionspot[torch]"),
    "devices": Probe(_devices, "regionspot[torch]"),
    "torchvision": Probe(_torchvision, "torchvision"),
    "segment_anything": Probe(
        lambda: _foundation("segment_anything", "segment-anything"), "segment-anything"
    ),
    "open_clip": Probe(lambda: _foundation("open_clip", "open_clip_torch"), "open_clip_torch"),
    "mini weights": Probe(mini_weights, "regionspot[torch]"),
    "tensorboard": Probe(lambda: _version("tensorboard"), "regionspot[train]"),
    "hotcoco": Probe(
        lambda: metadata.version(import_module("hotcoco").__name__), "regionspot[eval]"
    ),
    "onnx": Probe(lambda: _version("onnx"), "regionspot[export]"),
    "onnxruntime": Probe(_onnxruntime, "regionspot[onnx]"),
    "openvino": Probe(_openvino, "regionspot[openvino]"),
    "tensorrt": Probe(_tensorrt, "regionspot[tensorrt]", index=NVIDIA_INDEX),
    "tensorrt_rtx": Probe(_tensorrt_rtx, "regionspot[tensorrt-rtx]"),
    "tritonclient": Probe(_tritonclient, "regionspot[serving]"),
}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(asdict(run(name))), flush=True)

"""What `regionspot doctor` says of the NVIDIA driver and its GPUs."""

from __future__ import annotations

from regionspot.cli.findings import Finding
from regionspot.runtime.nvidia import TRITON_CONTAINERS, Driver, oldest_driver

NAME = "nvidia gpu"

OLDEST_CAPABILITY = (7, 5)
"""What CUDA 13, TensorRT and the Triton containers from 25.08 on support: Turing and later."""


REMEDIES = {
    "Driver/library version mismatch": "restart the machine: the driver was updated while the "
    "old kernel module was loaded",
    "couldn't communicate": "install the driver, or load its kernel module: modprobe nvidia",
    "No devices were found": "pass GPUs to the container (docker run --gpus all), or look for "
    "NVRM in dmesg",
    "not on the PATH": "install the driver's tools; for a container set "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
}
"""A part of what is wrong -> how to fix it."""


def examine_driver(driver: Driver | None) -> Finding:
    """Says which GPUs there are and which Triton container the driver runs."""
    if driver is None:
        return Finding(NAME, "OK", "none: no NVIDIA driver is loaded, everything runs on the CPU")
    if driver.problem:
        remedies = [remedy for sign, remedy in REMEDIES.items() if sign in driver.problem]
        remedy = next(iter(remedies), "run nvidia-smi, and look for NVRM in dmesg")
        return Finding(NAME, "WARN", f"{driver}: {driver.problem}", remedy)
    detail = "; ".join([str(driver), *map(str, driver.gpus)])
    old = [
        gpu.index
        for gpu in driver.gpus
        if (gpu.capability or OLDEST_CAPABILITY) < OLDEST_CAPABILITY
    ]
    if old:
        return Finding(
            NAME,
            "WARN",
            f"{detail}; CUDA 13, TensorRT and current Triton containers do not support GPU "
            f"{', '.join(old)}",
            "use a GPU of compute capability 7.5 (Turing) or later",
        )
    return _examine_containers(driver, detail)


def _examine_containers(driver: Driver, detail: str) -> Finding:
    ours = TRITON_CONTAINERS[0]
    newest = next((one for one in TRITON_CONTAINERS if driver.runs(one.cuda)), None)
    if newest is ours:
        return Finding(NAME, "OK", f"{detail}; runs Triton's container {ours.release}")
    needed = oldest_driver(ours.cuda)
    detail += (
        f"; too old for Triton's container {ours.release}: its CUDA {ours.cuda} needs driver "
        f"{needed} or later"
    )
    remedy = f"install driver {needed} or later"
    if newest is not None:
        remedy += (
            f", or build serving/deploy/Dockerfile on Triton's container {newest.release} (CUDA "
            f"{newest.cuda}): --build-arg "
            f"TRITON_IMAGE=nvcr.io/nvidia/tritonserver:{newest.release}-py3"
        )
    return Finding(NAME, "WARN", detail, remedy)

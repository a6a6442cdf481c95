"""The NVIDIA driver and its GPUs, as `nvidia-smi` and the kernel describe them. PyTorch is not
asked: it may be missing, a CPU build, or built for a newer CUDA than the driver knows.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from regionspot.runtime.formats import has_nvidia_gpu

VERSION_FILE = Path("/proc/driver/nvidia/version")
QUERY = ("index", "memory.total", "compute_cap", "driver_version", "name")
QUERY_SECONDS = 20

OLDEST_DRIVERS = {13: 580, 12: 525}
"""The major version of CUDA -> the oldest series of drivers that runs programs of any of its minor
versions (https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
"""


@dataclass(frozen=True)
class Container:
    """A release of nvcr.io/nvidia/tritonserver and the CUDA that it brings."""

    release: str
    cuda: str


TRITON_CONTAINERS = (Container("26.10", "13.4"), Container("25.07", "12.9"))
"""The newest for each major version of CUDA. The first is the one that serving/deploy/Dockerfile
builds on, which starts without NVIDIA's entry point and so without CUDA's forward compatibility.

Sources: docs.nvidia.com/deeplearning/triton-inference-server/release-notes (25.08 is the first with
CUDA 13), and docs/introduction/compatibility.md of triton-inference-server/server.
"""


@dataclass(frozen=True)
class Gpu:
    """One GPU. What `nvidia-smi` does not know is None, such as the memory of a GB10.

    Args:
        memory_mib: in MiB.
        capability: compute capability, (8, 9) for 8.9.
    """

    index: str
    name: str
    memory_mib: int | None
    capability: tuple[int, int] | None

    @property
    def compute_capability(self) -> int | None:
        """As TensorRT's engines name it: 89 for 8.9."""
        return None if self.capability is None else 10 * self.capability[0] + self.capability[1]

    def __str__(self) -> str:
        known = [f"{self.index}: {self.name}"]
        if self.memory_mib is not None:
            known.append(f"{self.memory_mib} MiB")
        if self.capability is not None:
            known.append(f"compute capability {self.capability[0]}.{self.capability[1]}")
        return ", ".join(known)


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver.

    Args:
        version: "580.95.05"; None where neither `nvidia-smi` nor the kernel says.
        cuda: the newest CUDA that it knows, "13.0"; None where `nvidia-smi` does not say.
        problem: why no GPU could be listed, in one line.
    """

    version: str | None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None

    def __str__(self) -> str:
        cuda = f" (CUDA {self.cuda})" if self.cuda else ""
        return f"driver {self.version or 'of unknown version'}{cuda}"

    def runs(self, cuda: str) -> bool:
        """Tells whether programs of a version of CUDA run, such as "13.4"; True if unknown."""
        oldest = oldest_driver(cuda)
        if self.version is None or oldest is None:
            return True
        return int(self.version.split(".")[0]) >= oldest


def oldest_driver(cuda: str) -> int | None:
    """Returns the oldest series of drivers for a version of CUDA; None if the table lacks it."""
    return OLDEST_DRIVERS.get(int(cuda.split(".")[0]))


def read_driver(version_file: Path = VERSION_FILE) -> Driver | None:
    """Returns the driver of this machine; None where nothing suggests that there is one.

    Args:
        version_file: where the loaded kernel module tells its version.
    """
    loaded = _loaded_version(version_file)
    program = shutil.which("nvidia-smi")
    if program is None:
        seen = loaded is not None or has_nvidia_gpu()
        return Driver(loaded, problem="nvidia-smi is not on the PATH") if seen else None
    listed, failure = _run(
        program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"
    )
    rows = [line.split(", ", len(QUERY) - 1) for line in listed.splitlines()]
    rows = [row for row in rows if len(row) == len(QUERY)]
    if failure or not rows:
        return Driver(
            loaded, problem=failure or " ".join(listed.split()) or "nvidia-smi says nothing"
        )
    header, _ = _run(program)
    cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", header)  # UMD: since driver 610
    return Driver(rows[0][3], cuda[1] if cuda else None, tuple(_gpu(row) for row in rows))


def _loaded_version(path: Path) -> str | None:
    """Returns "580.95" of "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95"."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _run(program: str, *arguments: str) -> tuple[str, str | None]:
    """Returns what `nvidia-smi` prints, and how it failed, in its own words."""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=QUERY_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not end in {QUERY_SECONDS} s"
    except OSError as error:
        return "", f"nvidia-smi cannot be run: {error.strerror}"
    if done.returncode == 0:
        return done.stdout, None
    said = " ".join(f"{done.stdout} {done.stderr}".split()) or "no message"
    return "", f"nvidia-smi ended with status {done.returncode}: {said}"


def _gpu(row: list[str]) -> Gpu:
    """Returns the GPU of a row of QUERY. "[N/A]", "[Not Supported]" and the like are unknown."""
    index, memory, capability, _, name = (field.strip() for field in row)
    version = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return Gpu(
        index,
        name,
        int(memory) if memory.isdigit() else None,
        (int(version[1]), int(version[2])) if version else None,
    )

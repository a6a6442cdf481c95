"""`regionspot doctor`: the report here, and machines on which something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from regionspot.cli import doctor, probes
from regionspot.cli.findings import Finding, Status
from regionspot.cli.main import main
from regionspot.cli.nvidia import examine_driver
from regionspot.cli.probes import Probe
from regionspot.runtime import nvidia
from regionspot.runtime.nvidia import read_driver

OPTIONAL = {
    "hotcoco",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "tritonclient",
}


def test_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] is True
    assert set(findings) >= {"python", "cpu", "memory", "disk", *probes.PROBES}
    for finding in findings.values():
        assert set(finding) == {"name", "status", "detail", "mend", "required"}
        assert finding["status"] in ("OK", "WARN", "FAIL") and finding["detail"]
        assert finding["status"] == "OK" or finding["mend"], (
            f"{finding['name']} does not say how to mend it"
        )
    assert {name for name, finding in findings.items() if finding["required"]}.isdisjoint(OPTIONAL)
    assert findings["torchvision"]["status"] == findings["native extension"]["status"] == "OK"


def test_text_says_what_fails_and_how_to_mend_it() -> None:
    findings = [
        Finding("python", "OK", "3.11", required=True),
        Finding("onnx", "WARN", "not installed", "pip install onnx"),
        Finding("torch", "FAIL", "crashed (SIGSEGV)", "pip install torch", required=True),
    ]
    assert doctor.as_text(findings).splitlines()[1:] == [
        "OK    python  3.11",
        "WARN  onnx    not installed",
        "                to mend: pip install onnx",
        "FAIL  torch   crashed (SIGSEGV)",
        "                to mend: pip install torch",
    ]


@pytest.mark.parametrize(("required", "status"), [(True, 1), (False, 0)])
def test_only_what_is_required_makes_it_fail(
    required: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda: [Finding("thing", "FAIL", "broken", "mend it", required)]
    )
    assert doctor.main(["--json"]) == status
    assert json.loads(capsys.readouterr().out)["ok"] is not required


def test_probe_of_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: tuple[tuple[bool, Status], ...] = ((True, "FAIL"), (False, "WARN"))
    for required, status in cases:
        probe = Probe(lambda: probes._version("no_such_library"), "regionspot[thing]", required)
        monkeypatch.setitem(probes.PROBES, "thing", probe)
        mend = "pip install 'regionspot[thing]'"
        assert probes.run("thing") == Finding(
            "thing", status, "not installed (no_such_library)", mend, required
        )


def test_probe_of_a_library_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setitem(probes.PROBES, "thing", Probe(broken, "regionspot[thing]"))
    finding = probes.run("thing")
    assert finding.status == "FAIL" and not finding.required
    assert (
        finding.detail
        == "installed, but does not work: OSError: libcudart.so.13: cannot open shared object file"
    )
    assert "--force-reinstall" in finding.mend


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_probe_that_takes_its_process_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others are tried all the same. The stand-in libraries are found first on the child's
    path.
    """
    (tmp_path / "onnx.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "openvino.py").write_text(
        "import os, sys\nsys.stderr.write('no licence\\n')\nos._exit(3)\n"
    )
    (tmp_path / "tritonclient.py").write_text(
        "print('chatter of a library')\nraise ImportError('mismatch')\n"
    )
    (tmp_path / "hotcoco.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(doctor.__file__).parents[2])])
    )
    monkeypatch.setattr(doctor, "PROBES_SECONDS", 3)
    found = doctor.run_probes(["native extension", "onnx", "openvino", "tritonclient", "hotcoco"])
    assert [finding.name for finding in found] == [
        "native extension",
        "onnx",
        "openvino",
        "tritonclient",
        "hotcoco",
    ]
    assert [finding.status for finding in found] == ["OK", "FAIL", "FAIL", "FAIL", "FAIL"]
    assert [finding.detail for finding in found[1:]] == [
        "trying it crashed (SIGSEGV)",
        "trying it ended with status 3: no licence",
        "installed, but does not work: ImportError: mismatch",
        "trying it did not end in 3 s",
    ]


def test_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512f amx_tile\n\n"
    )
    assert doctor.check_cpu(cpuinfo).status == "OK"
    assert doctor.check_cpu(cpuinfo).detail.startswith("A CPU, ")
    assert doctor.check_cpu(cpuinfo).detail.endswith("AVX2 AVX512 AMX")
    cpuinfo.write_text("model name : An old CPU\nflags : fpu sse2\n")
    assert doctor.check_cpu(cpuinfo).status == "WARN"
    assert doctor.check_cpu(tmp_path / "none").status == "OK"


def test_memory(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n")
    assert doctor.check_memory(meminfo, limit).detail == "8.0 of 16.0 GiB available"
    limit.write_text("max\n")
    assert doctor.check_memory(meminfo, limit).status == "OK"
    limit.write_text(f"{2 * 2**30}\n")
    finding = doctor.check_memory(meminfo, limit)
    assert finding.status == "WARN" and finding.detail == "2.0 of 2.0 GiB available"
    assert doctor.check_memory(tmp_path / "none", limit).status == "OK"


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path / "not" / "made" / "yet"))
    assert "for the cache" in doctor.check_disk().detail
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(doctor, "LOW_DISK_GIB", 1e9)
    assert doctor.check_disk().status == "WARN"


def test_mini_weights(tmp_path: Path) -> None:
    from regionspot.mini.architecture import build_mini_sam
    from regionspot.mini.shipped import save_sam

    missing = probes.mini_weights(tmp_path)
    assert (
        isinstance(missing, Finding)
        and missing.status == "FAIL"
        and "sam.safetensors" in missing.detail
    )
    path = save_sam(build_mini_sam(), tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damaged = probes.mini_weights(tmp_path)
    assert isinstance(damaged, Finding) and damaged.status == "FAIL"
    assert "sam.safetensors is damaged" in damaged.detail and damaged.mend


@pytest.mark.parametrize(
    ("used", "built", "machine", "status", "said"),
    [
        (4, 4, "x86_64", "OK", "kernels use AVX-512 and are built for up to AVX-512"),
        (3, 4, "amd64", "OK", "kernels use AVX2 and are built for up to AVX-512"),
        (
            1,
            1,
            "x86_64",
            "WARN",
            "kernels use SSE2 and are built for up to SSE2: they are slower than none",
        ),
        (1, 1, "aarch64", "OK", "this processor's baseline"),
    ],
)
def test_the_instruction_set_of_the_kernels(
    used: int, built: int, machine: str, status: str, said: str
) -> None:
    found = probes.kernel_level(used, built, machine)
    assert (found.status if isinstance(found, Finding) else "OK") == status
    assert said in (found.detail if isinstance(found, Finding) else found)
    assert not isinstance(found, Finding) or "GCC 12" in found.mend


@pytest.mark.skipif(
    sys.platform == "win32" or os.uname().machine != "x86_64", reason="x86-64's levels"
)
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("1", "kernels use SSE2"),
        ("v1", "kernels use SSE2"),
        ("avx9", "is ignored: use 1, 2, 3 or 4"),
    ],
)
def test_the_level_that_is_asked_for(asked: str, said: str) -> None:
    command = [sys.executable, "-m", "regionspot.cli.probes", "native extension"]
    environment = os.environ | {"REGIONSPOT_MAX_LEVEL": asked}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said in run.stdout + run.stderr
    if asked == "avx9":
        assert (
            "kernels use SSE2" not in run.stdout or "avx2" not in Path("/proc/cpuinfo").read_text()
        )


def test_disk_of_a_user_without_home_or_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert doctor.check_disk().status == "WARN"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGIONSPOT_CACHE", "~nobody-of-that-name/cache")
    finding = doctor.check_disk()
    assert finding.status == "WARN" and "no such home directory" in finding.detail


SMI_HEADER = "| NVIDIA-SMI {0}    Driver Version: {0}    CUDA Version: {1}     |"
SMI_HEADER_610 = "| NVIDIA-SMI {0}    KMD Version: {0}    CUDA UMD Version: {1}     |"


def put_nvidia_smi(folder: Path, rows: str, header: str = "", status: int = 0) -> None:
    """Puts a program on a path that answers as `nvidia-smi` does."""
    folder.mkdir(exist_ok=True)
    (folder / "rows").write_text(rows)
    (folder / "header").write_text(header)
    program = folder / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in --query-gpu=*) cat "{folder}/rows";; *) cat "{folder}/header";; '
        f"esac\nexit {status}\n"
    )
    program.chmod(0o755)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched first for programs."""
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


needs_a_shell = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")


@needs_a_shell
@pytest.mark.parametrize(
    ("rows", "header", "status", "said", "mend"),
    [
        (
            "0, 23034, 8.9, 580.95.05, NVIDIA L4\n",
            SMI_HEADER.format("580.95.05", "13.0"),
            "OK",
            "driver 580.95.05 (CUDA 13.0); 0: NVIDIA L4, 23034 MiB, compute capability 8.9; runs "
            "Triton's container 26.10",
            "",
        ),
        (
            "0, 81559, 9.0, 610.43.02, NVIDIA H100 80GB HBM3\n"
            "1, 81559, 9.0, 610.43.02, NVIDIA H100 80GB HBM3\n",
            SMI_HEADER_610.format("610.43.02", "13.3"),
            "OK",
            "(CUDA 13.3); 0: NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0; 1: NVIDIA H",
            "",
        ),
        (
            "0, [N/A], 12.1, 580.126.09, NVIDIA GB10\n",
            "",
            "OK",
            "driver 580.126.09; 0: NVIDIA GB10, compute capability 12.1; runs",
            "",
        ),
        (
            "0, 24564, 8.9, 570.124.06, NVIDIA GeForce RTX 4090\n",
            SMI_HEADER.format("570.124.06", "12.8"),
            "WARN",
            "too old for Triton's container 26.10: its CUDA 13.4 needs driver 580 or later",
            "tritonserver:25.07-py3",
        ),
        (
            "0, 15109, 7.5, 470.256.02, Tesla T4\n",
            SMI_HEADER.format("470.256.02", "11.4"),
            "WARN",
            "too old for Triton's container 26.10",
            "install driver 580 or later",
        ),
        (
            "0, 16160, 7.0, 580.95.05, Tesla V100-SXM2-16GB\n",
            SMI_HEADER.format("580.95.05", "13.0"),
            "WARN",
            "do not support GPU 0",
            "compute capability 7.5",
        ),
    ],
    ids=["one", "two, driver 610", "memory unknown", "driver of CUDA 12", "of CUDA 11", "Volta"],
)
def test_gpus_and_the_container_that_their_driver_runs(
    rows: str, header: str, status: str, said: str, mend: str, smi: Path, tmp_path: Path
) -> None:
    put_nvidia_smi(smi, rows, header)
    finding = examine_driver(read_driver(tmp_path / "none"))
    assert finding.status == status and said in finding.detail
    assert mend in finding.mend and bool(mend) == bool(finding.mend)


@needs_a_shell
@pytest.mark.parametrize(
    ("output", "exit_status", "said", "mend"),
    [
        (
            "Failed to initialize NVML: Driver/library version mismatch\n"
            "NVML library version: 580.173\n",
            18,
            "nvidia-smi ended with status 18: Failed to initialize NVML: Driver/library version "
            "mismatch NVML library version: 580.173",
            "restart the machine",
        ),
        ("No devices were found\n", 6, "status 6: No devices were found", "--gpus all"),
        ("No devices were found\n", 0, "06: No devices were found", "--gpus all"),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make "
            "sure that the latest NVIDIA driver is installed and running.\n",
            9,
            "status 9: NVIDIA-SMI has failed",
            "modprobe nvidia",
        ),
        ('Field "compute_cap" is not a valid field to query.\n', 2, "status 2: Field", "dmesg"),
    ],
    ids=["mismatch", "no devices", "no devices, status 0", "no driver", "an old nvidia-smi"],
)
def test_nvidia_smi_that_fails(
    output: str, exit_status: int, said: str, mend: str, smi: Path, tmp_path: Path
) -> None:
    put_nvidia_smi(smi, output, status=exit_status)
    kernel = tmp_path / "version"
    kernel.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  595.71.06  Fri Jan 10 20:00:00 UTC 2026\n"
        "GCC version:  gcc version 13.3.0 (GCC)\n"
    )
    finding = examine_driver(read_driver(kernel))
    assert finding.status == "WARN" and finding.detail.startswith("driver 595.71.06: ")
    assert said in finding.detail and mend in finding.mend


@needs_a_shell
def test_nvidia_smi_that_hangs(smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(smi, "")
    (smi / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(nvidia, "QUERY_SECONDS", 0.2)
    finding = examine_driver(read_driver(tmp_path / "none"))
    assert finding.status == "WARN" and "did not end in 0.2 s" in finding.detail


def test_driver_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvidia, "has_nvidia_gpu", lambda: False)
    kernel = tmp_path / "version"
    assert read_driver(kernel) is None
    assert examine_driver(None).status == "OK"
    kernel.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  "
        "(dvs-builder@U22-I3-B17-02-5)  Tue Sep 23 09:55:41 UTC 2025\n"
    )
    finding = examine_driver(read_driver(kernel))
    assert finding.detail == "driver 580.95.05: nvidia-smi is not on the PATH"
    assert "NVIDIA_DRIVER_CAPABILITIES" in finding.mend


def test_the_container_is_the_one_of_the_dockerfile() -> None:
    dockerfile = Path(__file__).resolve().parents[1] / "serving" / "deploy" / "Dockerfile"
    pinned = f"nvcr.io/nvidia/tritonserver:{nvidia.TRITON_CONTAINERS[0].release}-py3"
    assert f"ARG TRITON_IMAGE={pinned}\n" in dockerfile.read_text()


@needs_a_shell
@pytest.mark.parametrize(
    ("cuda", "driver", "said"),
    [
        (None, "580.95.05", "though there is an NVIDIA GPU: PyTorch is a CPU build"),
        ("13.0", "570.124.06", "CUDA 13.0, which needs driver 580 or later, not 570.124.06"),
        ("12.6", "570.124.06", "cpu alone, though PyTorch is built for CUDA 12.6"),
    ],
)
def test_pytorch_that_sees_no_gpu(cuda: str | None, driver: str, said: str, smi: Path) -> None:
    put_nvidia_smi(smi, f"0, 23034, 8.9, {driver}, NVIDIA L4\n")
    finding = probes._devices_without_gpu(cuda)
    assert isinstance(finding, Finding) and finding.status == "WARN" and finding.mend
    assert finding.detail.endswith(said)


@needs_a_shell
def test_a_cpu_build_of_pytorch_where_nvidia_smi_finds_no_gpu(smi: Path) -> None:
    put_nvidia_smi(smi, "No devices were found\n")
    assert probes._devices_without_gpu(None) == "cpu"


@needs_a_shell
def test_the_child_process_reports_the_gpu(smi: Path) -> None:
    put_nvidia_smi(smi, "0, 23034, 8.9, 570.124.06, NVIDIA L4\n", SMI_HEADER.format("570", "12.8"))
    gpu, devices = doctor.run_probes(["nvidia gpu", "devices"])
    assert gpu.status == "WARN" and "NVIDIA L4" in gpu.detail
    assert devices.name == "devices" and devices.status in ("OK", "WARN")

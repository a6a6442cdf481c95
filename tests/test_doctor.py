"""`regionspot doctor`: the report here, and machines on which something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from regionspot.cli import doctor, probes
from regionspot.cli.main import main
from regionspot.cli.probes import Finding, Probe

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
    cases: tuple[tuple[bool, probes.Status], ...] = ((True, "FAIL"), (False, "WARN"))
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

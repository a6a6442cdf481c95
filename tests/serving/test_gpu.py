"""What a repository asks of a GPU, by the sidecars of its engines: memory, and where they load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regionspot.cli.serve import main
from regionspot.errors import ArtifactError
from regionspot.runtime.artifacts import GraphEntry, Manifest
from regionspot.runtime.engine_file import read_sidecar, write_engine
from regionspot.runtime.nvidia import Gpu
from regionspot.serving.contract import GPU_INDEX, WORKERS, Limits
from regionspot.serving.environment import Installation
from regionspot.serving.gpu import (
    CONTEXT_BYTES,
    pool_bytes,
)
from regionspot.serving.ports import Ports
from regionspot.serving.repository import RepositoryOptions, graphs_on_gpu, make_repository
from regionspot.serving.server import ServerOptions, TritonServer
from tests.serving.conftest import SCRATCH_MIB

L4 = Gpu("0", "NVIDIA L4", 23034, (8, 9))
A10 = Gpu("0", "NVIDIA A10", 23028, (8, 6))


@pytest.fixture
def repository(engines: Path, tmp_path: Path) -> Path:
    out = tmp_path / "repository"
    make_repository(engines, out, RepositoryOptions("tensorrt"))
    return out


def entries_of(repository: Path) -> list[GraphEntry]:
    return list(graphs_on_gpu(repository, "tensorrt").entries)


def with_sidecars(repository: Path, **changes: Any) -> None:
    """Rewrites every engine's sidecar."""
    for entry in entries_of(repository):
        path = repository / str(entry.file)
        changed = replace(read_sidecar(path), **changes)
        write_engine(path, path.read_bytes(), changed)


def install(root: Path, version: str) -> Path:
    """A system with TensorRT's library of a version; the whole file is what tells it."""
    folder = root / "usr/lib/x86_64-linux-gnu"
    folder.mkdir(parents=True)
    symbol = f"tensorrt_version_{version.replace('.', '_')}"
    (folder / "libnvinfer.so.11").write_bytes(b"\x7fELF\0" + symbol.encode() + b"\0")
    return root


def test_memory_is_the_sum_of_all_parts(repository: Path) -> None:
    graphs = graphs_on_gpu(repository, "tensorrt")
    entries, found = graphs.entries, graphs.memory()
    assert found.weights == sum(entry.size_bytes for entry in entries)
    assert found.scratch == len(entries) * SCRATCH_MIB * 2**20
    assert found.unmeasured == ()
    assert found.total == (
        CONTEXT_BYTES + found.weights + found.scratch + found.tensors + found.pool
    )
    assert "of GPU memory (" in str(found) and "encoded images" in str(found)
    with_sidecars(repository, scratch_mib=None)
    unknown = graphs_on_gpu(repository, "tensorrt").memory()
    assert unknown.scratch == 0 and set(unknown.unmeasured) == {entry.name for entry in entries}
    assert "without the activations of " in str(unknown) and "sam_image_encoder" in str(unknown)


def test_the_pool_holds_the_cache_and_the_images_at_work(engines: Path) -> None:
    manifest = Manifest.load(engines)
    specs = [entry.spec for entry in manifest.graphs]
    # mini: an embedding of 128 x 16 x 16, 11 projections of 64 x 256, 3 statistics of 256
    image = 4 * (128 * 16 * 16 + 11 * 64 * 256 + 3 * 256)
    expected = (7 << 20) + 2 * WORKERS * image
    assert pool_bytes(specs, Limits(image_cache_mb=7)) == expected


def test_a_server_that_would_not_fit_is_refused(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repository"
    options = ["init", "--artifacts", str(engines), "--out", str(out), "--target", "tensorrt"]
    with pytest.raises(ArtifactError, match=r"would need .* and that GPU has 2\.0 GiB: give"):
        main([*options, "--gpu-memory", "2"])
    assert not out.exists()
    assert main([*options, "--gpu-memory", "24"]) == 0
    assert "it takes about " in capsys.readouterr().out


def test_engines_are_compared_with_the_gpu_and_with_tensorrt(
    repository: Path, tmp_path: Path
) -> None:
    entries = entries_of(repository)
    same = install(tmp_path / "same", "11.4.0.106")
    other = install(tmp_path / "other", "11.5.0.3")
    graphs = graphs_on_gpu(repository, "tensorrt")
    assert graphs.why_not_loadable(L4, same) == []
    assert graphs.why_not_loadable(L4, tmp_path / "nothing") == []
    wrong_gpu = graphs.why_not_loadable(A10, same)
    assert len(wrong_gpu) == len(entries)
    assert "was built on NVIDIA L4, of compute capability 8.9" in wrong_gpu[0]
    wrong_version = graphs.why_not_loadable(L4, other)
    assert "was built by TensorRT 11.4.0.106, and this is 11.5.0.3" in wrong_version[0]
    with_sidecars(repository, version_compatible=True, hardware_compatibility="ampere_plus")
    assert graphs_on_gpu(repository, "tensorrt").why_not_loadable(A10, other) == []


def test_a_server_does_not_start_with_engines_of_another_machine(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = a_server(repository, tmp_path)
    monkeypatch.setattr("regionspot.serving.server.first_gpu", lambda: A10)
    with pytest.raises(ArtifactError, match="holds engines for another machine: sam_image_encod"):
        server.start()
    small = replace(L4, memory_mib=1024)
    monkeypatch.setattr("regionspot.serving.server.first_gpu", lambda: small)
    with pytest.raises(ArtifactError, match=r"NVIDIA L4 has 1\.0 GiB"):
        server.start()


def test_options_of_a_gpu(repository: Path, tmp_path: Path) -> None:
    server = a_server(repository, tmp_path)
    graphs = graphs_on_gpu(repository, "tensorrt")
    pool = pool_bytes([entry.spec for entry in graphs.entries], graphs.limits)
    command = server.command()
    assert f"--cuda-memory-pool-byte-size={GPU_INDEX}:{pool}" in command
    assert not graphs.need_host_code
    assert "--backend-config=tensorrt,version-compatible=true" not in command
    with_sidecars(repository, version_compatible=True)
    command = a_server(repository, tmp_path).command()
    assert "--backend-config=tensorrt,version-compatible=true" in command


def test_unverified_engines_are_served_only_if_that_is_allowed(
    engines: Path, tmp_path: Path
) -> None:
    manifest = Manifest.load(engines)
    head = manifest.find("region_head", "tensorrt", "fp32")
    told = replace(head, passed=None, reason="there is no NVIDIA GPU here to run it")
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in engines.iterdir():
        (changed / path.name).symlink_to(path)
    (changed / "manifest.json").unlink()
    replace(manifest.with_entry(told), directory=changed).save()
    with pytest.raises(
        ArtifactError, match=r"region_head \(tensorrt, fp32\) .*never compared.*--allow"
    ):
        make_repository(changed, tmp_path / "repository", RepositoryOptions("tensorrt"))
    allowed = RepositoryOptions("tensorrt", allow_unverified=True)
    assert "region_head" in make_repository(changed, tmp_path / "repository", allowed)


def a_server(repository: Path, home: Path) -> TritonServer:
    """Not started."""
    installation = Installation(Path("/bin/false"), home)
    return TritonServer(
        installation, repository, Ports(1, 2, 3), home / "log", ServerOptions("tensorrt")
    )

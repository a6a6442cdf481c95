"""What goes wrong in production, done to a real server: killed stubs, killed servers, targets that
are not here.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from regionspot.cli import serve
from regionspot.errors import ArtifactError, InputError
from regionspot.locks import locked
from regionspot.runtime.graphs import served_graphs
from regionspot.serving import canary
from regionspot.serving.client import RegionClient, make_question
from regionspot.serving.contract import MODEL, ServingError
from regionspot.serving.environment import find_installation
from regionspot.serving.model_config import graph_config, read_config, write_config
from regionspot.serving.ports import METRICS_PORT, Ports
from regionspot.serving.processes import SHARED_MEMORY, remove_orphaned_shared_memory, running_stubs
from regionspot.serving.records import (
    ServerRecord,
    running_server,
    start_detached,
    stop_server,
)
from regionspot.serving.repository import RepositoryOptions, graphs_on_gpu, make_repository
from regionspot.serving.server import ServerOptions, TritonServer
from regionspot.serving.triton import Connection, pipeline_from_triton
from regionspot.structures import RegionPredictions

BOX = [[5, 5, 90, 90]]
WAIT_S = 120.0


@pytest.fixture(scope="module")
def victim(repository: Path, home: Path) -> Iterator[ServerRecord]:
    with running_server(repository, home, ServerOptions(all_models=True)) as running:
        yield running


def server_pid(running: ServerRecord) -> int:
    """Of `tritonserver`, the supervisor's child."""
    found = subprocess.run(
        ["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True
    )
    (pid,) = map(int, found.stdout.split())
    return pid


def wait_for_answers(running: ServerRecord) -> None:
    """Until a restarted server answers, which the client waits for."""
    with RegionClient(running.ports.grpc_url, WAIT_S) as client:
        canary.check(client, WAIT_S)


def shared_memory(running: ServerRecord) -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob(f"regionspot_{running.pid}_*")]


class Questions:
    """Threads that ask the same thing again and again; each answer is kept, with when it came."""

    def __init__(self, running: ServerRecord, picture: Path, threads: int = 3) -> None:
        self._url, self._picture, self._stop = running.ports.grpc_url, picture, threading.Event()
        self.answers: list[tuple[float, np.ndarray]] = []
        self.errors: list[ServingError] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> Questions:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with RegionClient(self._url, timeout_s=40) as client:
            while not self._stop.is_set():
                try:
                    found = client.recognize(self._picture, BOX, "mini")
                    self.answers.append((time.monotonic(), found.top_scores))
                except ServingError as error:
                    self.errors.append(error)

    def wait_for_more(self, count: int = 5, timeout_s: float = WAIT_S) -> None:
        wanted, deadline = len(self.answers) + count, time.monotonic() + timeout_s
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, f"no more answers; errors: {self.errors}"
            time.sleep(0.05)


@pytest.mark.parametrize("fault", ["stub", "server"])
def test_killed_under_load(victim: ServerRecord, picture: Path, fault: str) -> None:
    with RegionClient(victim.ports.grpc_url) as client:
        expected = client.recognize(picture, BOX, "mini").top_scores
    before = server_pid(victim)
    with Questions(victim, picture) as questions:
        questions.wait_for_more()
        stubs = dict(running_stubs(before))
        os.kill(stubs[MODEL] if fault == "stub" else before, signal.SIGKILL)
        killed = time.monotonic()
        time.sleep(0.5)
        questions.wait_for_more()
    assert not questions.errors  # the client asks again until the server is back
    assert all(np.array_equal(scores, expected) for _, scores in questions.answers)
    assert max(moment for moment, _ in questions.answers) > killed
    after = server_pid(victim)
    assert after != before
    assert MODEL in dict(running_stubs(after)) and dict(running_stubs(after)) != stubs
    assert len(shared_memory(victim)) == len(stubs)  # what the old processes had is gone


def test_a_graphs_stub_that_dies(victim: ServerRecord) -> None:
    pid = server_pid(victim)
    os.kill(dict(running_stubs(pid))["region_head"], signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    wait_for_answers(victim)
    with pipeline_from_triton(victim.ports.grpc_url) as pipeline:
        tokens = np.zeros((1, 2, pipeline.info.token_dim), np.float32)
        maps = np.zeros((1, pipeline.info.num_patch_tokens, pipeline.info.clip_width), np.float32)
        words = np.eye(3, pipeline.info.embed_dim, dtype=np.float32)
        assert pipeline.classify(tokens, maps, None, words).shape == (1, 2, 3)


def test_down_leaves_nothing(repository: Path, home: Path) -> None:
    with running_server(repository, home, ServerOptions(all_models=True)) as running:
        pids = [server_pid(running), *(pid for _, pid in running_stubs(server_pid(running)))]
        assert len(shared_memory(running)) == len(pids) - 1 == len(served_graphs()) + 1
        assert running.pid in [one.pid for one in ServerRecord.read_all(home)]
    assert shared_memory(running) == [] and not running.alive
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert running.pid not in [one.pid for one in ServerRecord.read_all(home)]


def test_a_supervisor_that_is_killed_takes_its_server_along(repository: Path, home: Path) -> None:
    with running_server(repository, home) as running:
        pid = server_pid(running)
        os.kill(running.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert running.pid not in [one.pid for one in ServerRecord.read_all(home)]
    (SHARED_MEMORY / f"regionspot_{running.pid}_left").touch()
    (SHARED_MEMORY / f"regionspot_{os.getpid()}_mine").touch()
    remove_orphaned_shared_memory()  # as every start does
    assert shared_memory(running) == []
    (SHARED_MEMORY / f"regionspot_{os.getpid()}_mine").unlink()


def test_the_canary_as_a_command(victim: ServerRecord, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        canary.main(["--url", victim.ports.grpc_url]) == 0 and capsys.readouterr().out == "ready\n"
    )
    assert canary.main(["--url", "127.0.0.1:9", "--timeout", "0.3"]) == 1
    assert "not ready: 127.0.0.1:9 cannot answer" in capsys.readouterr().err


def test_the_canary_under_load_and_of_a_stopped_model(
    victim: ServerRecord, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that answers others is alive, however long its queue; one that answers nobody is
    not.
    """
    stop = threading.Event()

    def ask() -> float:
        """Returns how long the last answer took."""
        with RegionClient(victim.ports.grpc_url, timeout_s=300) as client:
            while True:
                began = time.monotonic()
                client.recognize(picture, BOX * 20, "mini", return_masks=True)
                if stop.is_set():
                    return time.monotonic() - began

    stop.set()
    alone_s = min(ask(), ask())
    stop.clear()
    # longer than an answer takes, and shorter than the queue
    command = ["--url", victim.ports.grpc_url, "--timeout", str(4 * alone_s)]
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask) for _ in range(12)]
        try:
            time.sleep(4 * alone_s)
            capsys.readouterr()
            codes = [canary.main(command) for _ in range(2)]
        finally:
            stop.set()
        assert all(one.result() for one in asked)
    assert codes == [0, 0] and "busy: others were answered" in capsys.readouterr().out

    stub = dict(running_stubs(server_pid(victim)))[MODEL]
    os.kill(stub, signal.SIGSTOP)
    try:
        assert canary.main(command) == canary.main(command) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):  # Triton may have ended meanwhile
            os.kill(stub, signal.SIGCONT)
    wait_for_answers(victim)


def test_what_other_users_can_read(victim: ServerRecord, home: Path) -> None:
    pid = server_pid(victim)
    assert "Umask:\t0077" in Path(f"/proc/{pid}/status").read_text()
    output = Path(victim.log).with_name(f"{victim.ports.key}.up.log")
    files = [Path(victim.log), output, ServerRecord.path(home, victim.ports)]
    files += [SHARED_MEMORY / name for name in shared_memory(victim)]
    assert len(files) > 3
    assert [path for path in files if path.stat().st_mode & 0o077] == []


def test_a_server_without_http_on_ipv6(repository: Path, home: Path) -> None:
    ports = Ports(None, 0, 0, "::1").resolved()
    record = start_detached(repository, home.resolve(), ports)
    try:
        wait_for_answers(record)
        assert record.ports == ports
        pid = server_pid(record)
        sockets = psutil.Process(pid).net_connections("tcp")
        listening = {one.laddr[:2] for one in sockets if one.status == psutil.CONN_LISTEN}
        assert listening == {("::1", ports.grpc), ("::1", ports.metrics)}
        with urllib.request.urlopen(ports.metrics_url) as response:
            assert b"nv_inference_request_success" in response.read()
    finally:
        stop_server(record)
    assert not Path(f"/proc/{pid}").exists()


def test_hosts_that_others_can_reach(repository: Path, home: Path) -> None:
    up = ["up", "--repository", str(repository), "--home", str(home)]
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(InputError, match=r"neither authentication nor TLS.*--allow-remote"):
            serve.main([*up, "--host", host])
    assert [Ports(host=host).is_local for host in ("127.0.0.2", "::1", "localhost")] == [True] * 3
    every = Ports(None, 0, 0, "0.0.0.0").resolved()
    assert every.grpc_url == f"127.0.0.1:{every.grpc}"
    with pytest.raises(InputError, match="nowhere"):
        Ports(host="nowhere.invalid").resolved()


def test_servers_of_one_port_at_two_addresses(home: Path) -> None:
    first, second = Ports(grpc=18001), Ports(grpc=18001, host="::1")
    assert ServerRecord.path(home, first).name == "18001.json"
    assert ServerRecord.path(home, second) != ServerRecord.path(home, first)


def test_two_servers_on_one_port(victim: ServerRecord) -> None:
    taken = Ports(0, victim.ports.grpc, 0)
    with pytest.raises(InputError, match=f"port {victim.ports.grpc} cannot be used for grpc"):
        taken.resolved()
    first = Ports(0, 0).resolved()
    with socket.socket() as held:  # nobody asked for a certain port of metrics, so another one does
        with contextlib.suppress(OSError):
            held.bind((first.host, METRICS_PORT))
        assert Ports(0, 0).resolved().metrics != METRICS_PORT


def test_a_port_whose_server_is_starting(home: Path, repository: Path) -> None:
    """It has not bound its port yet, so that looking at ports is not enough."""
    ports = Ports(0, 0, 0).resolved()
    with (
        locked(home / "running" / f"port-{ports.grpc}"),
        pytest.raises(ServingError, match="another server of gRPC"),
    ):
        start_detached(repository, home, ports)


def test_a_server_that_cannot_start_says_why(repository: Path, home: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(repository, tmp_path / "broken"))
    (broken / "regionspot" / "1" / "vocabularies" / "cpu" / "mini.npz").write_bytes(b"damaged")
    with pytest.raises(ServingError, match="is no vocabulary"), running_server(broken, home):
        pass
    assert [one for one in ServerRecord.read_all(home) if one.repository == str(broken)] == []


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_gpus_configurations_are_taken_up_to_the_missing_backend(
    target: str, mini_artifacts_with_masks: Path, engines: Path, home: Path, tmp_path: Path
) -> None:
    artifacts = engines if target == "tensorrt" else mini_artifacts_with_masks
    repository = tmp_path / "repository"
    names = make_repository(
        artifacts, repository, RepositoryOptions(target=target, vocabularies={})
    )
    installation = find_installation(home)
    with TritonServer(
        installation, repository, Ports(0, 0, 0).resolved(), tmp_path / "log"
    ) as server:
        server.start()
        told = f"ended before it was ready, for it has no backend {target} in .*NVIDIA's container"
        with pytest.raises(ServingError, match=told):
            server.wait_ready(60)
    log = (tmp_path / "log").read_text(errors="replace")
    for name in names:
        if name != MODEL:
            assert (
                f"failed to load '{name}' version 1: Invalid argument: unable to find backend "
                "library" in log
            ), log
    assert (
        "failed to load 'regionspot'" not in log
        and "invalid model configuration" not in log.lower()
    )


def test_graphs_as_models_of_their_own(
    mini_artifacts_with_masks: Path,
    server: ServerRecord,
    home: Path,
    picture: Path,
    boxes: list[list[float]],
    tmp_path: Path,
) -> None:
    """What a GPU's public model does, on a CPU: every graph is called inside the server, several
    pictures at once.
    """
    repository = tmp_path / "repository"
    make_repository(mini_artifacts_with_masks, repository, RepositoryOptions(graphs="triton"))
    with (
        running_server(repository, home) as running,
        RegionClient(running.ports.grpc_url) as client,
    ):
        found = [client.recognize(picture, boxes, "mini", return_masks=True) for _ in range(2)]
        words = client.recognize(picture, boxes, ["plain green toy", "plain red toy"])
        with Connection(running.ports.grpc_url) as connection:
            # the canary's and ours
            assert int(connection.statistics("sam_image_encoder")["inference_count"]) >= 2
    with RegionClient(server.ports.grpc_url) as client:
        expected = client.recognize(picture, boxes, "mini", return_masks=True)
        expected_words = client.recognize(picture, boxes, ["plain green toy", "plain red toy"])
    for one in found:
        assert np.array_equal(one.class_ids, expected.class_ids) and one.masks == expected.masks
        np.testing.assert_allclose(one.top_scores, expected.top_scores, atol=1e-5)
    np.testing.assert_allclose(words.top_scores, expected_words.top_scores, atol=1e-5)


def test_graphs_of_a_gpus_repository_batch_whatever_is_asked(
    mini_artifacts_with_masks: Path, home: Path, tmp_path: Path
) -> None:
    """On a CPU, with the batching and the warm-up of a GPU: requests that differ in all that they
    may, several pictures of one request, and a picture that is known.
    """
    repository = tmp_path / "repository"
    make_repository(mini_artifacts_with_masks, repository, RepositoryOptions(graphs="triton"))
    for entry in graphs_on_gpu(repository, "cpu").entries:
        path = repository / entry.name / "configs" / "cpu.pbtxt"
        config = read_config(path)
        on_gpu = graph_config(entry.spec, "onnxruntime", "x", True)
        assert config.dynamic_batching == on_gpu.dynamic_batching
        config.model_warmup.extend(on_gpu.model_warmup)
        path.write_text(write_config(config))
    pictures = [noise(index) for index in range(56)]
    with (
        running_server(repository, home) as running,
        RegionClient(running.ports.grpc_url, 120) as client,
        Connection(running.ports.grpc_url) as connection,
    ):

        def ask(index: int) -> RegionPredictions:
            words = "mini" if index % 2 else ["plain green toy", "plain red toy"]
            boxes = [[10, 10, 100, 100]] * (1 + index % 5)
            return client.recognize(pictures[index], boxes, words, return_masks=index % 3 == 0)

        def executions(model: str) -> int:
            return int(connection.statistics(model).get("execution_count", 0))

        alone = [ask(index) for index in range(48, 56)]
        before = executions(MODEL)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(ask, range(48)))
        assert len(found) == 48 and executions(MODEL) - before <= 16

        with ThreadPoolExecutor(1) as pool:  # of known images: neither waits for an encoder
            slow = pool.submit(
                client.recognize,
                pictures[48],
                [[10, 10, 100, 100]] * 300,
                "mini",
                return_masks=True,
            )
            time.sleep(0.1)
            quick = client.recognize(pictures[49], [[10, 10, 100, 100]], "mini")
            assert len(quick) == 1 and not slow.done()
            assert len(slow.result()) == 300

        one = make_question(pictures[48], [[10, 10, 100, 100]], "mini").to_tensors()
        images = np.array([[picture] for picture in pictures[48:]], np.object_)
        many = {name: np.repeat(array, len(images), axis=0) for name, array in one.items()}
        for known in (True, False):
            if not known:
                images = np.array([[noise(index)] for index in range(100, 108)], np.object_)
            before = executions("sam_image_encoder")
            answer = connection.infer(MODEL, many | {"image": images})
            assert answer["cached"].all() == known
            ran = executions("sam_image_encoder") - before
            assert ran == 0 if known else 0 < ran < len(images)
        for _ in range(20):  # more than there are workers
            with pytest.raises(ServingError) as late:
                connection.infer(MODEL, many | {"image": images}, timeout_s=0.02)
            assert late.value.code == "TIMEOUT"
        assert len(ask(0)) == 1
        assert [len(one) for one in alone] == [1 + index % 5 for index in range(48, 56)]


def noise(seed: int) -> bytes:
    """An image that no other is like, as PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_the_servers_code_loads_no_pytorch(home: Path) -> None:
    installation = find_installation(home)
    package = installation.variables["REGIONSPOT_PACKAGE"]
    python = Path(installation.variables["PATH"]) / "python"
    code = (
        "import sys, types; sys.modules['triton_python_backend_utils'] = types.ModuleType('stub');"
        f"sys.path.insert(0, {package!r});"
        "import regionspot.serving.backends.pipeline_model, "
        "regionspot.serving.backends.graph_model;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "regionspot" in loaded and not loaded & {
        "torch",
        "open_clip",
        "segment_anything",
        "tritonclient",
        "onnx",
    }


def test_stubs_that_die_before_their_first_word(
    repository: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton waits for them without end: `up` says so, with the log's last lines, and does not wait
    ten minutes.
    """
    installation = find_installation(home)
    backends = tmp_path / "backends" / "python"
    backends.mkdir(parents=True)
    for path in (installation.backends / "python").iterdir():
        (backends / path.name).symlink_to(path.resolve())
    stub = backends / "triton_python_backend_stub"
    stub.unlink()
    stub.write_text("#!/bin/sh\necho 'terminate called after throwing: stol' >&2\nexit 134\n")
    stub.chmod(0o755)
    monkeypatch.setattr("regionspot.serving.server.DEAD_STUB_S", 1.0)
    ended = replace(installation, backends=backends.parent)
    with TritonServer(ended, repository, Ports(0, 0, 0).resolved(), tmp_path / "log") as server:
        server.start()
        with pytest.raises(
            ServingError, match=r"its Python backend died when they were started[\s\S]*called.*stol"
        ):
            server.wait_ready(60)


def test_the_reason_is_not_cut_off_by_frames(repository: Path, home: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(repository, tmp_path / "broken")
    code = "def f(n):\n    if n: f(n - 1)\n    import no_such_library\nf(30)\n"
    (broken / MODEL / "1" / "model.py").unlink()
    (broken / MODEL / "1" / "model.py").write_text(code)
    with pytest.raises(ServingError, match="No module named 'no_such_library'"):
        start_detached(broken, home.resolve(), Ports(0, 0, 0).resolved())


def test_a_log_that_cannot_be_written(repository: Path, home: Path, tmp_path: Path) -> None:
    for log in (tmp_path, tmp_path / "file" / "log"):
        (tmp_path / "file").write_bytes(b"")
        server = TritonServer(find_installation(home), repository, Ports(0, 0, 0).resolved(), log)
        with pytest.raises(ArtifactError, match=r"the log .* cannot be written"):
            server.start()

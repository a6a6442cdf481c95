"""What runners promise under threads and interrupts, tried for real: `python -m
tests.runtime.sharing ARTIFACTS`.

Every answer must be that of a serial run, and an interrupted run must raise what interrupted it.
`test_sharing.py` runs a share of this; the command runs as much as it is told to, and prints one
JSON line for each runner.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.runner import Runner

Feeds = dict[str, np.ndarray]

KINDS = ("torch", "onnxruntime", "openvino", "openvino-own", "native")
"""Runners; "openvino-own" has our own operations in the graph, as full-size encoders have."""


def open_kind(kind: str, artifacts: Path, threads: int) -> Runner:
    """A runner of SAM's image encoder of regionspot_mini; of the token decoder's prompt part for
    "native".

    Args:
        kind: one of KINDS; "torch-cuda" or "onnxruntime-cuda" on a GPU; or "triton=URL" for a
            server of ours.
    """
    if kind.startswith("triton="):
        from regionspot.serving.triton import pipeline_from_triton

        return pipeline_from_triton(kind.removeprefix("triton=")).runner("sam_image_encoder")
    from regionspot.runtime.artifacts import Manifest

    manifest = Manifest.load(artifacts)

    def spec(graph: str) -> GraphSpec:
        return manifest.find(graph, "onnx", "fp32").spec

    encoder = artifacts / "onnx" / "fp32" / "sam_image_encoder.onnx"
    if kind in ("torch", "torch-cuda"):
        import torch

        from regionspot.modeling.pipelines import pipeline_from_model
        from regionspot.modeling.presets import create_model

        torch.set_num_threads(threads)
        device = "cuda" if kind == "torch-cuda" else "cpu"
        return pipeline_from_model(create_model("regionspot_mini", device=device)).runner(
            "sam_image_encoder"
        )
    if kind in ("onnxruntime", "onnxruntime-cuda"):
        from regionspot.runtime.ort_runner import OrtRunner

        provider = "cuda" if kind == "onnxruntime-cuda" else "cpu"
        return OrtRunner(encoder, spec("sam_image_encoder"), provider, threads)
    if kind == "native":
        from regionspot.runtime.native_runner import NativeRunner

        entry = next(entry for entry in manifest.graphs if entry.format == "native")
        return NativeRunner(manifest.verify(entry), spec("sam_token_decoder_prompts"), threads)
    from regionspot.runtime.openvino_runner import OpenVinoRunner

    with own_operations() if kind == "openvino-own" else nullcontext():
        return OpenVinoRunner(encoder, spec("sam_image_encoder"), threads=threads)


@contextmanager
def own_operations() -> Iterator[None]:
    """Our operations take the place of OpenVINO's in graphs of any size, on any processor."""
    from regionspot.runtime import openvino_attention, openvino_linear

    before = openvino_attention.LARGE, openvino_linear.LARGE, openvino_linear.is_profitable
    openvino_attention.LARGE = openvino_linear.LARGE = 0
    openvino_linear.is_profitable = lambda: True
    try:
        yield
    finally:
        openvino_attention.LARGE, openvino_linear.LARGE, openvino_linear.is_profitable = before


def questions(spec: GraphSpec) -> list[Feeds]:
    """Three sets of feeds with different answers; of images one is square, one flat and one
    tall.
    """
    rng = np.random.default_rng(0)
    if spec.name == "sam_image_encoder":
        side = int(spec.inputs[0].shape[1])
        found: list[Feeds] = []
        for height, width in ((side, side), (side // 4, side), (side, side // 4)):
            images = np.zeros((1, side, side, 3), np.uint8)
            images[0, :height, :width] = rng.integers(0, 256, (height, width, 3))
            found.append({"images": images, "input_sizes": np.array([[height, width]], np.int32)})
        return found
    sizes = {
        tensor.name: tensor.resolved({"batch": 1})
        for tensor in spec.inputs
        if tensor.name.startswith("image_")
    }
    drawn: list[Feeds] = []
    for _ in range(3):
        statistics = 100 + 50 * rng.random(sizes["image_statistics"])  # squared lengths: above 0
        projections = rng.standard_normal(sizes["image_projections"])
        drawn.append(
            {
                "image_projections": projections.astype(np.float32),
                "image_statistics": statistics.astype(np.float32),
                "points": (rng.random((1, 2, 2, 2)) * 200).astype(np.float32),
                "labels": np.array([[[2, 3], [2, 3]]], np.int32),
                "token_ids": np.array([0], np.int32),
            }
        )
    return drawn


def is_right(answer: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(np.allclose(answer[name], wanted[name], rtol=1e-4, atol=1e-4) for name in wanted)


def share(runner: Runner, answers: int) -> dict[str, int]:
    """Three threads ask one runner, each its own question, `answers` times each."""
    asked = questions(runner.spec)
    wanted = [runner.infer(feeds) for feeds in asked]
    counts = {"answers": 0, "wrong": 0, "errors": 0, "wrong_afterwards": 0}
    lock = threading.Lock()

    def work(index: int) -> None:
        for _ in range(answers):
            try:
                right, failed = is_right(runner.infer(asked[index]), wanted[index]), False
            except Exception:
                right, failed = False, True
            with lock:
                counts["answers"] += 1
                counts["wrong"] += not right
                counts["errors"] += failed

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts["wrong_afterwards"] = sum(
        not is_right(runner.infer(feeds), answer)
        for feeds, answer in zip(asked, wanted, strict=True)
    )
    return counts


class TimeIsOver(RuntimeError):
    """What the handler of SIGALRM raises: of a type that runtimes raise too."""


def interrupt(runner: Runner, signal_number: int, instants: int, seed: int = 0) -> dict[str, int]:
    """Interrupts runs at random instants. Only in a main thread.

    Returns:
        How many runs raised what the signal raises, how many answered in spite of it, and how many
        answered wrongly or raised anything else.
    """
    asked = questions(runner.spec)
    wanted = [runner.infer(feeds) for feeds in asked]
    began = time.perf_counter()
    runner.infer(asked[0])
    duration = time.perf_counter() - began
    rng = random.Random(seed)
    expected, arm, wait = _signalling(signal_number)
    counts = {"raised": 0, "answered": 0, "wrong": 0, "other_errors": 0, "wrong_afterwards": 0}
    for instant in range(instants):
        index = instant % len(asked)
        try:
            arm(max(1e-5, duration * rng.uniform(0, 1.2)))
            answer = runner.infer(asked[index])
            right = is_right(answer, wanted[index])
            counts["answered" if right else "wrong"] += 1
            wait()  # a late signal comes here
        except expected:
            counts["raised"] += 1
        except BaseException:
            counts["other_errors"] += 1
        for feeds, answer in zip(asked, wanted, strict=True):
            counts["wrong_afterwards"] += not is_right(runner.infer(feeds), answer)
    return counts


def _signalling(
    signal_number: int,
) -> tuple[type[BaseException], Callable[[float], None], Callable[[], None]]:
    """What a signal raises here, a function that sends it to this process after some seconds, one
    that awaits it.
    """
    if signal_number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)

        timers: list[threading.Timer] = []

        def arm(seconds: float) -> None:
            timers.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)))
            timers[-1].start()

        def wait() -> None:
            for timer in timers:
                timer.join()
            time.sleep(0.01)

        return KeyboardInterrupt, arm, wait

    def over(*_: object) -> None:
        raise TimeIsOver

    signal.signal(signal.SIGALRM, over)

    def arm_timer(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def wait_for_timer() -> None:
        while signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            time.sleep(0.001)
        time.sleep(0.01)

    return TimeIsOver, arm_timer, wait_for_timer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "artifacts", type=Path, help="of regionspot_mini, from regionspot-export --onnx"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=1, help="of each runner (default: %(default)s)"
    )
    parser.add_argument(
        "--answers", type=int, default=1000, help="of each of three threads (default: %(default)s)"
    )
    parser.add_argument(
        "--instants", type=int, default=20, help="of each signal (default: %(default)s)"
    )
    arguments = parser.parse_args()
    for kind in arguments.kinds.split(","):
        with open_kind(kind, arguments.artifacts, arguments.threads) as runner:
            row: dict[str, Any] = {"runner": kind, "threads": arguments.threads}
            row |= {"shared": share(runner, arguments.answers)} if arguments.answers else {}
            for name in ("SIGALRM", "SIGINT") if arguments.instants else ():
                row[name] = interrupt(runner, getattr(signal, name), arguments.instants)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Runners, pipelines and predictors under threads and interrupts: the right answer or the
exception, nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch

from regionspot.errors import ArtifactError, InputError, is_interrupt
from regionspot.predictor import RegionPredictor
from regionspot.runtime import openvino_attention
from regionspot.runtime.graph_spec import GraphSpec, Range, TensorSpec
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.runtime.ort_runner import OrtRunner, best_device
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.runner import Runner
from regionspot.structures import RegionPredictions, Vocabulary
from tests.runtime.sharing import KINDS, is_right, open_kind, questions, share

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {"native": 200}
"""Of each of three threads; the images of the other runners take longer."""


@pytest.fixture(autouse=True)
def pytorch_keeps_its_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


class TestThreads:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_answer_is_that_of_a_serial_run(
        self, kind: str, num_threads: int, mini_artifacts: Path
    ) -> None:
        with open_kind(kind, mini_artifacts, num_threads) as runner:
            counts = share(runner, ANSWERS.get(kind, 12))
        assert counts == {
            "answers": 3 * ANSWERS.get(kind, 12),
            "wrong": 0,
            "errors": 0,
            "wrong_afterwards": 0,
        }

    @pytest.mark.gpu
    @pytest.mark.parametrize("kind", ["torch-cuda", "onnxruntime-cuda"])
    def test_every_answer_on_a_gpu(self, kind: str, mini_artifacts: Path) -> None:
        if kind == "onnxruntime-cuda" and best_device() != "cuda":
            pytest.skip("this ONNX Runtime has no CUDA")
        with open_kind(kind, mini_artifacts, 1) as runner:
            assert share(runner, 100) == {
                "answers": 300,
                "wrong": 0,
                "errors": 0,
                "wrong_afterwards": 0,
            }

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torch"])
    def test_closing_waits_for_runs_and_refuses_later_ones(
        self, kind: str, mini_artifacts: Path
    ) -> None:
        runner = open_kind(kind, mini_artifacts, 1)
        asked = questions(runner.spec)[0]
        wanted = runner.infer(asked)
        started = threading.Barrier(4)

        def ask() -> bool:
            started.wait()
            try:
                return all(is_right(runner.infer(asked), wanted) for _ in range(200))
            except InputError as error:
                return "was closed" in str(error)

        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(ask) for _ in range(3)]
            started.wait()
            runner.close()
            assert all(answer.result() for answer in answers)


class TestInterrupts:
    def test_an_exception_or_the_right_answer(self, num_threads: int, mini_artifacts: Path) -> None:
        """SIGALRM and SIGINT at 20 random instants for each runner, in a process whose main thread
        runs the graphs.
        """
        command = [
            sys.executable,
            "-m",
            "tests.runtime.sharing",
            str(mini_artifacts),
            "--answers",
            "0",
        ]
        done = subprocess.run(
            [*command, "--threads", str(num_threads)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["runner"] for row in rows] == list(KINDS)
        for row in rows:
            for name in ("SIGALRM", "SIGINT"):
                counts = row[name]
                assert (
                    counts["wrong"] == counts["other_errors"] == counts["wrong_afterwards"] == 0
                ), row
        assert sum(row["SIGALRM"]["raised"] for row in rows) >= 20  # the interrupts did arrive

    def test_answers_of_an_earlier_run_are_noticed(self, mini_artifacts: Path) -> None:
        with open_kind("onnxruntime", mini_artifacts, 1) as runner:
            one, two, _ = questions(runner.spec)
            assert not is_right(runner.infer(one), runner.infer(two))


class _Kernels:
    """The native module with an attention that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def grid_attention(self, *_: object, **__: object) -> None:
        raise self.error


class TestErrorsInsideAGraph:
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError("x"),
            RuntimeError("x"),
            ValueError("x"),
            TimeoutError("x"),
            SystemExit(3),
            KeyboardInterrupt(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_an_operation_of_ours_raises_comes_out(
        self,
        error: BaseException,
        num_threads: int,
        mini_artifacts: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with open_kind("openvino-own", mini_artifacts, num_threads) as runner:
            one, two, _ = questions(runner.spec)
            first, second = runner.infer(one), runner.infer(two)
            runner.infer(one)
            with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
                patch.setattr(openvino_attention, "_native", _Kernels(error))
                runner.infer(two)
            assert raised.value is error
            assert is_right(runner.infer(two), second) and is_right(runner.infer(one), first)

    @pytest.mark.parametrize("runner_class", [OpenVinoRunner, OrtRunner])
    def test_the_runtimes_own_errors_come_out(
        self, runner_class: type[OpenVinoRunner] | type[OrtRunner], num_threads: int, tmp_path: Path
    ) -> None:
        """OpenVINO's `infer` drops them at one thread and leaves the outputs of the run before."""
        onnx.save(onnx.parser.parse_model(RESHAPE), tmp_path / "reshape.onnx")
        x = np.arange(6, dtype=np.float32)
        with runner_class(tmp_path / "reshape.onnx", RESHAPE_SPEC, threads=num_threads) as runner:
            runner.infer({"x": x, "wanted": np.array([2, 3], np.int32)})
            with pytest.raises(ArtifactError, match="cannot run reshape"):
                runner.infer({"x": 10 * x, "wanted": np.array([4, 3], np.int32)})
            found = runner.infer({"x": 10 * x, "wanted": np.array([3, 2], np.int32)})["y"]
        np.testing.assert_array_equal(found, 20 * x.reshape(3, 2))

    def test_an_output_of_another_shape_is_refused(self, tmp_path: Path) -> None:
        onnx.save(onnx.parser.parse_model(RESHAPE), tmp_path / "reshape.onnx")
        y = TensorSpec("y", "float32", ("n", "columns"))
        spec = GraphSpec("reshape", "", RESHAPE_SPEC.inputs, (y,), RESHAPE_SPEC.ranges)
        with OrtRunner(tmp_path / "reshape.onnx", spec) as runner:
            runner.infer({"x": np.ones(6, np.float32), "wanted": np.array([6, 1], np.int32)})
            with pytest.raises(ArtifactError, match=r"gave y of reshape the shape \(2, 3\)"):
                runner.infer({"x": np.ones(6, np.float32), "wanted": np.array([2, 3], np.int32)})


RESHAPE = """
<ir_version: 9, opset_import: ["" : 18]>
reshape (float[n] x, int32[2] wanted) => (float[rows, columns] y)
<float two = {2}>
{
  doubled = Mul (x, two)
  shape = Cast <to = 7> (wanted)
  y = Reshape (doubled, shape)
}
"""
RESHAPE_SPEC = GraphSpec(
    "reshape",
    "x twice as large, in the wanted shape",
    (TensorSpec("x", "float32", ("n",)), TensorSpec("wanted", "int32", (2,))),
    (TensorSpec("y", "float32", ("rows", "columns")),),
    {"n": Range(1, 6, 12)},
)

Ask = Callable[[RegionPredictor, int], RegionPredictions]
RUNTIMES = ("torch", "onnxruntime", "openvino")


@pytest.fixture(scope="module", params=RUNTIMES)
def predictor(
    request: pytest.FixtureRequest, mini_artifacts_with_masks: Path, model: Any
) -> Iterator[RegionPredictor]:
    if request.param == "torch":
        yield RegionPredictor(model)
        return
    with open_pipeline(mini_artifacts_with_masks, runtime=request.param, threads=1) as pipeline:
        yield RegionPredictor(pipeline)


IMAGES = [
    np.random.default_rng(seed).integers(0, 256, (60 + 40 * seed, 120, 3), dtype=np.uint8)
    for seed in range(3)
]
BOXES = [[1, 2, 30, 40], [5, 5, 50, 50]]


def vocabulary(predictor: RegionPredictor, first: int = 0) -> Vocabulary:
    size = predictor.pipeline.info.embed_dim
    rows = np.linalg.qr(np.random.default_rng(5).normal(size=(size, size)))[0][first : first + 8]
    return Vocabulary(
        tuple(f"word {index}" for index in range(first, first + 8)), rows.astype(np.float32)
    )


def same(one: RegionPredictions, other: RegionPredictions) -> bool:
    return (
        one.class_names == other.class_names
        and np.allclose(one.top_scores, other.top_scores, atol=1e-4)
        and (one.image_height, one.image_width) == (other.image_height, other.image_width)
        and one.masks == other.masks
    )


class TestPredictors:
    def test_one_predictor_in_three_threads(self, predictor: RegionPredictor) -> None:
        """By images of their own, by `set_image`, and with different words."""
        words = [vocabulary(predictor, 8 * index) for index in range(3)]

        def stateless(index: int) -> RegionPredictions:
            return predictor.predict(IMAGES[index], boxes=BOXES, vocabulary=words[index], top_k=8)

        def by_set_image(index: int) -> RegionPredictions:
            return predictor.set_image(IMAGES[index]).predict(
                boxes=BOXES, vocabulary=words[index], top_k=8
            )

        wanted = [stateless(index) for index in range(3)]
        assert not same(wanted[0], wanted[1])

        def work(index: int) -> list[bool]:
            return [
                same(ask(index), wanted[index])
                for _ in range(6)
                for ask in (stateless, by_set_image)
            ]

        with ThreadPoolExecutor(3) as pool:
            assert all(right for answers in pool.map(work, range(3)) for right in answers)

    def test_words_of_several_threads(self, predictor: RegionPredictor) -> None:
        names = [
            ["plain red toy", "plain blue toy"],
            ["a red toy", "a green toy", "a blue toy"],
            ["toy", "plain toy"],
        ]
        image = predictor.encode(IMAGES[0])
        wanted = [predictor.predict(image, boxes=BOXES, vocabulary=words) for words in names]

        def work(index: int) -> list[bool]:
            return [
                same(predictor.predict(image, boxes=BOXES, vocabulary=names[index]), wanted[index])
                for _ in range(8)
            ]

        with ThreadPoolExecutor(3) as pool:
            assert all(right for answers in pool.map(work, range(3)) for right in answers)

    def test_an_image_holds_for_its_thread(self, predictor: RegionPredictor) -> None:
        words = vocabulary(predictor)
        own = RegionPredictor(predictor.model)

        def ask() -> RegionPredictions:
            return own.predict(boxes=BOXES, vocabulary=words)

        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(InputError, match="no image is set for this thread"):
                pool.submit(ask).result()
            pool.submit(own.set_image, IMAGES[1]).result()
            with pytest.raises(InputError, match="no image is set for this thread"):
                ask()  # another thread's
            own.set_image(IMAGES[0])
            assert pool.submit(ask).result().image_height == IMAGES[1].shape[0]
            assert ask().image_height == IMAGES[0].shape[0]
        with ThreadPoolExecutor(1) as pool:  # a thread that has set nothing
            assert same(pool.submit(ask).result(), ask())

    def test_a_thread_is_not_taken_for_the_one_that_made_the_predictor(
        self, predictor: RegionPredictor
    ) -> None:
        """Threads that have ended leave their numbers to later ones."""
        words = vocabulary(predictor)

        def in_a_thread(work: Callable[[], Any]) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(work).result()

        made = in_a_thread(lambda: RegionPredictor(predictor.model))
        in_a_thread(lambda: made.set_image(IMAGES[0]))
        with pytest.raises(InputError, match="no image is set for this thread"):
            in_a_thread(lambda: made.predict(boxes=BOXES, vocabulary=words))

    def test_predict_leaves_the_image_that_was_set(self, predictor: RegionPredictor) -> None:
        words = vocabulary(predictor)
        predictor.set_image(IMAGES[0])
        assert (
            predictor.predict(IMAGES[2], boxes=BOXES, vocabulary=words).image_height
            == IMAGES[2].shape[0]
        )
        assert predictor.predict(boxes=BOXES, vocabulary=words).image_height == IMAGES[0].shape[0]


@pytest.fixture(scope="module")
def other() -> RegionPredictor:
    """A model of equal sizes with other weights."""
    from regionspot.modeling.presets import create_model

    return RegionPredictor(create_model("regionspot_mini", random_weights=1))


class TestEncodedPictures:
    def test_another_model_refuses_them(
        self, predictor: RegionPredictor, other: RegionPredictor
    ) -> None:
        encoded, words = predictor.encode(IMAGES[0]), vocabulary(predictor)
        other.set_image(IMAGES[1])
        for ask in (
            other.set_image,
            lambda image: other.predict(image, boxes=BOXES, vocabulary=words),
        ):
            with pytest.raises(InputError, match="encoded by another model"):
                ask(encoded)
        assert other.predict(boxes=BOXES, vocabulary=words).image_height == IMAGES[1].shape[0]
        with pytest.raises(InputError, match="encoded by another model"):
            other.pipeline.mask_tokens(
                encoded.encoded, np.zeros((1, 1, 2, 2), np.float32), np.array([[[2, 3]]], np.int32)
            )

    def test_another_clip_refuses_them(self, model: Any, other: RegionPredictor) -> None:
        from regionspot.modeling.regionspot import RegionSpot

        mixed = RegionPredictor(RegionSpot(model.sam, other.model.clip, model.head, "mixed"))  # type: ignore[union-attr]
        with pytest.raises(InputError, match="another CLIP"):
            mixed.set_image(RegionPredictor(model).encode(IMAGES[0]))

    def test_the_same_model_in_another_pipeline_takes_them(
        self, mini_artifacts_with_masks: Path
    ) -> None:
        with (
            open_pipeline(mini_artifacts_with_masks) as one,
            open_pipeline(mini_artifacts_with_masks) as two,
        ):
            words = vocabulary(RegionPredictor(one))
            encoded = RegionPredictor(one).encode(IMAGES[0])
            wanted = RegionPredictor(one).predict(encoded, boxes=BOXES, vocabulary=words)
            assert same(
                RegionPredictor(two).predict(encoded, boxes=BOXES, vocabulary=words), wanted
            )

    def test_weights_that_changed_refuse_them(self) -> None:
        from regionspot.modeling.presets import create_model

        changing = create_model("regionspot_mini")
        predictor = RegionPredictor(changing)
        encoded = predictor.encode(IMAGES[0])
        predictor.set_image(encoded)
        changing.sam.load_state_dict(
            create_model("regionspot_mini", random_weights=1).sam.state_dict()
        )
        with pytest.raises(InputError, match="encoded by another model"):
            predictor.set_image(encoded)

    def test_weights_of_clip_that_changed_are_noticed(self, tmp_path: Path) -> None:
        """By the image that was set, by the words in memory, and by those on the disk."""
        from regionspot.modeling.presets import create_model

        names, changing = ["plain red toy", "plain blue toy"], create_model("regionspot_mini")
        predictor = RegionPredictor(changing, tmp_path / "words").set_image(IMAGES[0])
        before = predictor.predict(boxes=BOXES, vocabulary=names)
        changing.clip.load_state_dict(
            create_model("regionspot_mini", random_weights=1).clip.state_dict()
        )
        with pytest.raises(InputError, match="another CLIP"):
            predictor.predict(boxes=BOXES, vocabulary=names)
        after = predictor.predict(IMAGES[0], boxes=BOXES, vocabulary=names)
        fresh = RegionPredictor(changing, tmp_path / "others").predict(
            IMAGES[0], boxes=BOXES, vocabulary=names
        )
        assert same(after, fresh) and not same(after, before)
        original = RegionPredictor(create_model("regionspot_mini"), tmp_path / "words")
        assert same(original.predict(IMAGES[0], boxes=BOXES, vocabulary=names), before)


class TestPipelines:
    def test_a_graph_is_opened_once(self, mini_artifacts: Path) -> None:
        opened: list[str] = []
        with open_pipeline(mini_artifacts, threads=1) as whole:

            def open_slowly(graph: str) -> Runner:
                opened.append(graph)
                threading.Event().wait(0.05)
                return whole.runner(graph)

            pipeline = RegionPipeline(
                whole.info,
                open_slowly,
                runtime="onnxruntime",
                precision="fp32",
                fingerprint=whole.fingerprint,
            )
            with ThreadPoolExecutor(4) as pool:
                runners = list(pool.map(pipeline.runner, ["region_head"] * 4))
        assert opened == ["region_head"] and len(set(map(id, runners))) == 1


CHILD = """
import pickle, sys
from pathlib import Path
folder = Path(sys.argv[1])
predictor, image, words = pickle.loads((folder / "sent.pickle").read_bytes())
found = predictor.predict(image, boxes=[[1, 2, 30, 40], [5, 5, 50, 50]], vocabulary=words)
(folder / "back.pickle").write_bytes(pickle.dumps(found))
"""


class TestPickling:
    def test_a_predictor_in_another_process(
        self, predictor: RegionPredictor, tmp_path: Path
    ) -> None:
        words = vocabulary(predictor)
        (tmp_path / "sent.pickle").write_bytes(pickle.dumps((predictor, IMAGES[1], words)))
        subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        back = pickle.loads((tmp_path / "back.pickle").read_bytes())
        assert same(back, predictor.predict(IMAGES[1], boxes=BOXES, vocabulary=words))

    def test_a_pipeline_and_what_it_encoded(self, mini_artifacts_with_masks: Path) -> None:
        with open_pipeline(mini_artifacts_with_masks, "openvino", threads=1) as pipeline:
            encoded = RegionPredictor(pipeline).encode(IMAGES[0])
            words = vocabulary(RegionPredictor(pipeline))
            wanted = RegionPredictor(pipeline).predict(encoded, boxes=BOXES, vocabulary=words)
            with pickle.loads(pickle.dumps(pipeline)) as copy:
                again = pickle.loads(pickle.dumps(encoded))
                assert same(
                    RegionPredictor(copy).predict(again, boxes=BOXES, vocabulary=words), wanted
                )

    def test_a_pipeline_that_cannot_be_opened_again_says_so(self, mini_artifacts: Path) -> None:
        with open_pipeline(mini_artifacts) as whole:
            own = RegionPipeline(
                whole.info,
                whole.runner,
                runtime="mine",
                precision="fp32",
                fingerprint=whole.fingerprint,
            )
            with pytest.raises(pickle.PicklingError, match="open it in the other process"):
                pickle.dumps(own)


class _Alarm:
    """A handler that is an object."""

    def __call__(self, *_: object) -> None:
        raise RuntimeError("time is over")

    def method(self, *_: object) -> None:
        self()


class TestIsInterrupt:
    @pytest.mark.parametrize(
        "handler",
        [_Alarm(), _Alarm().method, functools.partial(_Alarm().method, "x"), lambda *_: _Alarm()()],
    )
    def test_what_a_handler_raised(self, handler: Callable[..., None]) -> None:
        before = signal.signal(signal.SIGALRM, handler)
        try:
            with pytest.raises(RuntimeError) as raised:
                signal.raise_signal(signal.SIGALRM)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert is_interrupt(raised.value)  # though it is nobody's handler any more

    def test_what_no_handler_raised(self) -> None:
        with pytest.raises(ZeroDivisionError) as raised:
            _ = 1 / 0
        assert not is_interrupt(raised.value)


def test_threads_that_open_graphs_at_once() -> None:
    """In a process of its own, which may hang."""
    pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AT_ONCE], capture_output=True, text=True, timeout=240
    )
    assert done.stdout.endswith("opened\n"), done.stderr


OPEN_AT_ONCE = """
import tempfile, threading
from regionspot.cli.main import main
from regionspot.runtime.opening import open_pipeline

folder = tempfile.mkdtemp()
assert main(["export", "--out", folder, "--openvino", "--graphs", "sam_image_encoder"]) == 0

def work():
    open_pipeline(folder, "openvino", threads=1, device="cpu").runner("sam_image_encoder")

for _ in range(4):
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("opened")
"""

"""The real server: answers equal those of this process, whatever the protocol, the client and the
company.
"""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from regionspot.data.coco_json import CocoDataset
from regionspot.predictor import RegionPredictor
from regionspot.serving.client import AsyncRegionClient, RegionClient, make_question
from regionspot.serving.contract import MODEL, RequestError, ServingError
from regionspot.serving.messages import RemoteImage
from regionspot.serving.records import ServerRecord
from regionspot.serving.triton import pipeline_from_triton
from regionspot.structures import RegionPredictions, Vocabulary
from regionspot.vocabulary import VocabularyEncoder
from tests.runtime.sharing import TimeIsOver, is_right, questions, share
from tests.serving.conftest import ROOT

WORDS = (
    "plain green toy",
    "red toy with blue stripes",
    "white toy with a pink border",
    "blue toy with yellow dots",
)
PETS = ("cat", "dog")


@pytest.fixture(scope="module")
def words(encoder: VocabularyEncoder) -> Vocabulary:
    return encoder.encode(WORDS)


@pytest.fixture(scope="module", params=["grpc", "http"])
def each_client(request: pytest.FixtureRequest, server: ServerRecord) -> Iterator[RegionClient]:
    with RegionClient(
        server.ports.grpc_url if request.param == "grpc" else server.ports.http_url
    ) as client:
        yield client


def assert_same(found: RegionPredictions, expected: RegionPredictions) -> None:
    assert found.class_names == expected.class_names
    assert np.array_equal(found.class_ids, expected.class_ids)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.top_scores, expected.top_scores, atol=1e-4)
    assert np.array_equal(found.boxes, expected.boxes) and found.masks == expected.masks
    assert found.iou_predictions is not None and expected.iou_predictions is not None
    np.testing.assert_allclose(found.iou_predictions, expected.iou_predictions, atol=1e-4)
    assert (found.image_height, found.image_width) == (expected.image_height, expected.image_width)


class TestAnswers:
    def test_boxes_and_clicks_with_masks(
        self,
        each_client: RegionClient,
        predictor: RegionPredictor,
        words: Vocabulary,
        picture: Path,
        boxes: list[list[float]],
    ) -> None:
        asked: dict[str, Any] = {
            "boxes": boxes,
            "points": [[60, 70], [90, 100]],
            "point_labels": [1, 1],
            "return_masks": True,
        }
        found = each_client.recognize(picture, vocabulary=WORDS, **asked)
        assert_same(found, predictor.set_image(picture).predict(vocabulary=words, **asked))
        assert found.masks is not None and len(found.masks) == len(boxes) + 2

    def test_a_registered_vocabulary(
        self,
        each_client: RegionClient,
        predictor: RegionPredictor,
        encoder: VocabularyEncoder,
        picture: Path,
    ) -> None:
        found = each_client.recognize(picture, [[5, 5, 90, 90]], "pets")
        expected = predictor.set_image(picture).predict(
            boxes=[[5, 5, 90, 90]], vocabulary=encoder.encode(PETS), return_masks=False
        )
        assert found.class_names == PETS and found.masks is None
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        assert each_client.recognize(
            picture, [[5, 5, 90, 90]], "mini", top_k=410
        ).top_scores.shape == (1, 410)

    @pytest.mark.parametrize("count", [0, 1, 300])
    def test_any_number_of_regions(
        self,
        client: RegionClient,
        predictor: RegionPredictor,
        words: Vocabulary,
        picture: Path,
        count: int,
    ) -> None:
        corners = np.random.default_rng(count).uniform(0, 100, (count, 2))
        many = np.concatenate([corners, corners + 60], axis=1)
        found = client.recognize(picture, many, WORDS)
        expected = predictor.set_image(picture).predict(
            boxes=many, vocabulary=words, return_masks=False
        )
        assert len(found) == count and np.array_equal(found.class_ids, expected.class_ids)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)

    def test_other_sources_of_a_picture(
        self, client: RegionClient, picture: Path, tmp_path: Path
    ) -> None:
        box = [[5, 5, 90, 90]]
        pixels = Image.open(picture)
        pixels.save(tmp_path / "same.bmp")
        expected = client.recognize(picture, box, WORDS)
        for source in (
            picture.read_bytes(),
            pixels,
            np.asarray(pixels),
            tmp_path / "same.bmp",
            str(picture),
        ):
            np.testing.assert_array_equal(
                client.recognize(source, box, WORDS).scores, expected.scores
            )

    def test_encode_once(self, client: RegionClient, picture: Path) -> None:
        known = client.encode(picture)
        boxes = [[5, 5, 90, 90]]
        answer = client.ask(make_question(known, boxes, "pets"))
        assert answer.cached and answer.image.handle == known.handle
        expected = client.recognize(picture, boxes, "pets")
        assert np.array_equal(answer.predictions.scores, expected.scores)

    def test_a_forgotten_picture_is_sent_again(self, client: RegionClient, picture: Path) -> None:
        known = replace(client.encode(picture), handle="0" * 64)
        answer = client.ask(make_question(known, [[5, 5, 90, 90]], "pets"))
        assert len(answer.predictions) == 1 and answer.image.handle != known.handle
        with pytest.raises(RequestError, match="send the picture"):
            client.recognize(replace(known, encoded=None), [[5, 5, 90, 90]], "pets")

    def test_info(self, each_client: RegionClient) -> None:
        info = each_client.info()
        assert (info.model, info.runtime, info.precision) == (
            "regionspot_mini",
            "onnxruntime",
            "fp32",
        )
        assert info.vocabularies["pets"] == PETS and info.limits.max_regions == 300


class TestCompany:
    """Several at once get what each would get alone."""

    def test_threads(self, client: RegionClient, dataset: CocoDataset) -> None:
        pictures = [dataset.image_path(record) for record in dataset.images[:6]]
        alone = [client.recognize(path, [[5, 5, 90, 90]], "mini") for path in pictures]
        with ThreadPoolExecutor(6) as pool:
            for _ in range(3):
                together = list(
                    pool.map(
                        lambda path: client.recognize(path, [[5, 5, 90, 90]], "mini"), pictures
                    )
                )
                for one, other in zip(alone, together, strict=True):
                    assert np.array_equal(one.scores, other.scores)

    @pytest.mark.parametrize("protocol", ["grpc", "http"])
    def test_asyncio(
        self, server: ServerRecord, client: RegionClient, dataset: CocoDataset, protocol: str
    ) -> None:
        pictures = [dataset.image_path(record) for record in dataset.images[:6]]

        async def ask_all() -> list[RegionPredictions]:
            url = server.ports.grpc_url if protocol == "grpc" else server.ports.http_url
            async with AsyncRegionClient(url) as many:
                images: list[Path | RemoteImage] = [await many.encode(pictures[0]), *pictures[1:]]
                asked = [many.recognize(image, [[5, 5, 90, 90]], "mini") for image in images]
                return list(await asyncio.gather(*asked))

        for path, found in zip(pictures, asyncio.run(ask_all()), strict=True):
            expected = client.recognize(path, [[5, 5, 90, 90]], "mini")
            assert found.class_names == expected.class_names
            assert np.array_equal(found.scores, expected.scores)

    def test_a_task_that_is_cancelled(self, server: ServerRecord, picture: Path) -> None:
        async def cancel() -> int:
            async with AsyncRegionClient(server.ports.grpc_url) as many:
                task = asyncio.create_task(
                    many.recognize(picture, np.tile([[5, 5, 90, 90]], (300, 1)), "mini")
                )
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                return len(await many.recognize(picture, [[5, 5, 90, 90]], "mini"))

        assert asyncio.run(cancel()) == 1


class TestForeignClients:
    """Nothing of ours but the table of tensors."""

    @pytest.mark.parametrize("library", [tritonclient.grpc, tritonclient.http])
    def test_one_request_of_two_pictures(
        self, server: ServerRecord, client: RegionClient, dataset: CocoDataset, library: Any
    ) -> None:
        paths = [dataset.image_path(record) for record in dataset.images[:2]]
        images = np.array([[path.read_bytes()] for path in paths], np.object_)
        boxes = np.array([[[5, 5, 90, 90]], [[10, 20, 80, 70]]], np.float32)
        names = np.array([[b"pets"], [b"pets"]], np.object_)
        found = self.infer(server, library, image=images, boxes=boxes, vocabulary=names)
        for row, path in enumerate(paths):
            expected = client.recognize(path, boxes[row], "pets")
            np.testing.assert_array_equal(found.as_numpy("scores")[row], expected.scores)
            assert (
                found.as_numpy("class_names")[row, 0].decode() == PETS[int(expected.class_ids[0])]
            )
        assert found.as_numpy("masks").shape == (2, 0) and found.as_numpy(
            "top_class_names"
        ).shape == (2, 1, 2)

    def test_some_of_the_outputs(self, server: ServerRecord, picture: Path) -> None:
        connection = tritonclient.grpc.InferenceServerClient(server.ports.grpc_url)
        arrays = {
            "image": np.array([[picture.read_bytes()]], np.object_),
            "boxes": np.array([[[5, 5, 90, 90]]], np.float32),
            "words": np.array([[b"cat", b"dog", "naïve café".encode()]], np.object_),
        }
        wanted = [tritonclient.grpc.InferRequestedOutput("scores")]
        found = connection.infer(MODEL, self.inputs(tritonclient.grpc, arrays), outputs=wanted)
        assert found.as_numpy("scores").shape == (1, 1) and found.as_numpy("boxes") is None
        connection.close()

    BAD: ClassVar[dict[str, tuple[dict[str, Any], str]]] = {
        "boxes of doubles": ({"boxes": np.zeros((1, 1, 4))}, "unexpected datatype|data-type"),
        "a box without its row": ({"boxes": np.zeros((1, 4), np.float32)}, "unexpected shape"),
        "five numbers": ({"boxes": np.zeros((1, 1, 5), np.float32)}, "unexpected shape"),
        "an unknown tensor": (
            {"box": np.zeros((1, 1, 4), np.float32)},
            "unexpected inference input 'box'",
        ),
        "words that are no text": (
            {"words": np.array([[b"\xff\xfe", b"dog"]], np.object_)},
            "VOCABULARY_INVALID: words must be",
        ),
        "two pictures and one box": ({"image": np.array([[b"x"], [b"y"]], np.object_)}, "batch"),
        "two that differ": (
            {
                "image": np.array([[b"x"], [b"y"]], np.object_),
                "boxes": np.zeros((2, 1, 4), np.float32),
                "words": np.array([[b"cat", b"dog"]] * 2, np.object_),
                "top_k": np.array([[1], [2]], np.int32),
            },
            "REQUEST_INVALID: the pictures of one request need the same top_k",
        ),
        "NaN": ({"boxes": np.full((1, 1, 4), np.nan, np.float32)}, "REGION_INVALID: box 0"),
    }

    @pytest.mark.parametrize("case", BAD)
    def test_what_is_refused(self, case: str, server: ServerRecord, picture: Path) -> None:
        changed, message = self.BAD[case]
        arrays = {
            "image": np.array([[picture.read_bytes()]], np.object_),
            "boxes": np.array([[[5, 5, 90, 90]]], np.float32),
            "words": np.array([[b"cat", b"dog"]], np.object_),
        }
        with pytest.raises(InferenceServerException, match=message) as caught:
            self.infer(server, tritonclient.grpc, **(arrays | changed))
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert "Traceback" not in str(caught.value) and "site-packages" not in str(caught.value)
        # and nothing is lost
        assert len(self.infer(server, tritonclient.grpc, **arrays).as_numpy("scores")) == 1

    def test_a_name_that_is_not_utf8(self, server: ServerRecord, picture: Path) -> None:
        """Of a request by HTTP: Triton passes it on, and a refusal keeps its code."""
        arrays = {
            "image": np.array([[picture.read_bytes()]], np.object_),
            "boxes": np.array([[[5, 5, 90, 90]]], np.float32),
            "words": np.array([[b"cat", b"cat"]], np.object_),
        }
        body, size = tritonclient.http.InferenceServerClient.generate_request_body(
            self.inputs(tritonclient.http, arrays), request_id="the-name"
        )
        request = urllib.request.Request(
            f"{server.ports.http_url}/v2/models/{MODEL}/infer",
            body.replace(b"the-name", b"\xff\xfe-name-", 1),
            {"Inference-Header-Content-Length": str(size)},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 400
        assert b"VOCABULARY_INVALID" in refused.value.read()

    def infer(self, server: ServerRecord, library: Any, **arrays: Any) -> Any:
        url = (
            server.ports.grpc_url
            if library is tritonclient.grpc
            else server.ports.http_url.removeprefix("http://")
        )
        connection = library.InferenceServerClient(url)
        try:
            return connection.infer(MODEL, self.inputs(library, arrays))
        finally:
            connection.close()

    def inputs(self, library: Any, arrays: dict[str, Any]) -> list[Any]:
        types = {"O": "BYTES", "float32": "FP32", "float64": "FP64", "int32": "INT32"}
        made = []
        for name, array in arrays.items():
            tensor = library.InferInput(
                name, array.shape, types.get(array.dtype.name, types.get(array.dtype.char, ""))
            )
            tensor.set_data_from_numpy(array)
            made.append(tensor)
        return made


class TestBadInput:
    """Of clients of ours: a code and a sentence, and the next question is answered."""

    def cases(self) -> dict[str, tuple[dict[str, Any], str]]:
        bomb = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
        jpeg = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(jpeg, "JPEG")
        return {
            "corrupt": ({"image": jpeg.getvalue()[:400]}, "IMAGE_INVALID"),
            "bomb": ({"image": bomb.getvalue()}, "IMAGE_TOO_LARGE"),
            "oversized": ({"image": jpeg.getvalue() + bytes(40 << 20)}, "IMAGE_TOO_LARGE"),
            "nan": ({"boxes": [[0, 0, float("nan"), 5]]}, "REGION_INVALID"),
            "many": ({"boxes": np.tile([[1, 1, 9, 9]], (10_000, 1))}, "TOO_MANY_REGIONS"),
            "unknown": ({"vocabulary": "birds"}, "VOCABULARY_UNKNOWN"),
            "blank": ({"vocabulary": ["cat", ""]}, "VOCABULARY_INVALID"),
        }

    def test_each(self, each_client: RegionClient, picture: Path) -> None:
        good: dict[str, Any] = {"image": picture, "boxes": [[5, 5, 90, 90]], "vocabulary": "pets"}
        expected = each_client.recognize(**good).scores
        for name, (changed, code) in self.cases().items():
            with pytest.raises(RequestError) as caught:
                each_client.recognize(**(good | changed))
            assert caught.value.code == code, name
            assert np.array_equal(each_client.recognize(**good).scores, expected)

    def test_too_little_time(self, server: ServerRecord, picture: Path) -> None:
        with RegionClient(server.ports.grpc_url) as client:
            client.info()
            boxes = np.tile([[5, 5, 90, 90]], (300, 1))
            with pytest.raises(ServingError, match="gave no answer in time") as caught:
                client.recognize(picture, boxes, "mini", timeout_s=0.02)
            assert caught.value.code == "TIMEOUT"
            assert len(client.recognize(picture, boxes, "mini")) == 300


def test_nobody_else_may_load_models(server: ServerRecord) -> None:
    """Who may load a model may run any program on the server."""
    connection = tritonclient.grpc.InferenceServerClient(server.ports.grpc_url)
    for ask in (connection.get_model_repository_index, lambda: connection.unload_model(MODEL)):
        with pytest.raises(InferenceServerException, match="restricted"):
            ask()
    connection.close()
    body = urllib.request.Request(
        f"{server.ports.http_url}/v2/repository/models/{MODEL}/unload", data=b"{}"
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(body)


def test_a_graphs_errors_name_no_files(server: ServerRecord) -> None:
    connection = tritonclient.grpc.InferenceServerClient(server.ports.grpc_url)
    tokens = tritonclient.grpc.InferInput("tokens", (1, 500), "INT32")
    tokens.set_data_from_numpy(np.full((1, 500), 49407, np.int32))
    with pytest.raises(
        InferenceServerException, match="REQUEST_INVALID: the graph does not take these sizes"
    ) as caught:
        connection.infer("clip_text_encoder", [tokens])
    assert "/" not in caught.value.message()
    connection.close()


def test_other_words_than_were_known(server: ServerRecord, picture: Path) -> None:
    """A vocabulary that was registered anew: the client asks again what it holds, and never mixes
    the two.
    """
    with RegionClient(server.ports.grpc_url) as client:
        info = client.info()
        for old in (("dog", "cat"), ("cat",), None):
            vocabularies = {} if old is None else {"pets": old}
            client._conversation.known = replace(info, vocabularies=vocabularies)
            assert client.recognize(picture, [[5, 5, 90, 90]], "pets").class_names == PETS


def test_metrics(server: ServerRecord, client: RegionClient, picture: Path) -> None:
    def metrics() -> dict[str, float]:
        with urllib.request.urlopen(server.ports.metrics_url) as response:
            lines = response.read().decode().splitlines()
        return {
            line.split("{")[0]: float(line.split()[-1])
            for line in lines
            if line.startswith("regionspot_")
        }

    client.recognize(picture, [[5, 5, 90, 90]], "pets")
    before = metrics()
    client.recognize(picture, [[5, 5, 90, 90], [6, 6, 80, 80]], "pets")
    with pytest.raises(RequestError):
        client.recognize(picture, [[5, 5, 90, 90]], "birds")
    after = metrics()
    changed = {
        name: after[name] - before[name]
        for name in after
        if name.endswith("_total") and after[name] != before[name]
    }
    assert changed["regionspot_image_cache_hits_total"] == changed["regionspot_refusals_total"] == 1
    assert (
        changed["regionspot_regions_total"] == 2
        and "regionspot_encoders_seconds_total" not in changed
    )
    assert (
        after["regionspot_image_cache_pictures"] >= 1
        and after["regionspot_image_cache_bytes"] > 500_000
    )


def test_the_log_has_codes_and_request_ids(
    server: ServerRecord, client: RegionClient, picture: Path
) -> None:
    with pytest.raises(RequestError):
        client.ask(make_question(picture, [[5, 5, 90, 90]], "birds"), request_id="number-7")
    log = Path(server.log).read_text(errors="replace")
    assert any(
        '"request_id": "number-7", "code": "VOCABULARY_UNKNOWN"' in line
        for line in log.splitlines()
    )


def url_of(server: ServerRecord, protocol: str) -> str:
    return server.ports.grpc_url if protocol == "grpc" else server.ports.http_url


def interrupt_reading(patch: pytest.MonkeyPatch, protocol: str) -> None:
    """SIGALRM comes while the library makes a message of the bytes of an answer."""
    deserialize, http_result = grpc._common.deserialize, tritonclient.http._client.InferResult

    def deserialize_grpc(content: bytes, deserializer: Callable[[bytes], Any]) -> Any:
        def interrupted(content: bytes) -> Any:
            signal.raise_signal(signal.SIGALRM)
            return deserializer(content)

        return deserialize(content, interrupted)

    def read_http(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGALRM)
        return http_result(*arguments)

    if protocol == "grpc":
        patch.setattr(grpc._common, "deserialize", deserialize_grpc)
    else:
        patch.setattr(tritonclient.http._client, "InferResult", read_http)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
class TestGraphByGraph:
    """What `--runtime triton` runs, under threads and interrupts; see
    tests/runtime/test_sharing.py.
    """

    def test_every_answer_is_that_of_a_serial_run(
        self, server: ServerRecord, protocol: str
    ) -> None:
        with pipeline_from_triton(url_of(server, protocol)) as pipeline:
            counts = share(pipeline.runner("sam_image_encoder"), 8)
        assert counts == {"answers": 24, "wrong": 0, "errors": 0, "wrong_afterwards": 0}

    def test_an_interrupt_or_the_right_answer(
        self, server: ServerRecord, protocol: str, repository: Path
    ) -> None:
        command = [sys.executable, "-m", "tests.runtime.sharing", str(repository), "--answers", "0"]
        kind = f"triton={url_of(server, protocol)}"
        done = subprocess.run(
            [*command, "--kinds", kind], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout)
        for name in ("SIGALRM", "SIGINT"):
            assert row[name]["raised"] > 0, row
            assert (
                row[name]["wrong"]
                == row[name]["other_errors"]
                == row[name]["wrong_afterwards"]
                == 0
            ), row

    def test_what_a_handler_raises_while_an_answer_is_read_comes_out(
        self, server: ServerRecord, protocol: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """gRPC takes what a deserializer raises for an error of its own, so none may be
        interrupted.
        """

        def over(*_: object) -> None:
            raise TimeIsOver

        with pipeline_from_triton(url_of(server, protocol)) as pipeline:
            runner = pipeline.runner("sam_image_encoder")
            feeds = questions(runner.spec)[0]
            wanted = runner.infer(feeds)
            before = signal.signal(signal.SIGALRM, over)
            try:
                with monkeypatch.context() as patch, pytest.raises(TimeIsOver):
                    interrupt_reading(patch, protocol)
                    runner.infer(feeds)
            finally:
                signal.signal(signal.SIGALRM, before)
            assert is_right(runner.infer(feeds), wanted)

    def test_a_pipeline_is_pickled_by_its_address(
        self, server: ServerRecord, protocol: str
    ) -> None:
        with (
            pipeline_from_triton(url_of(server, protocol)) as pipeline,
            pickle.loads(pickle.dumps(pipeline)) as copy,
        ):
            assert copy.sam_fingerprint() == pipeline.sam_fingerprint()

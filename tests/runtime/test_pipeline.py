"""The pipeline in three runtimes, whole, in pieces and padded, held against the model called by
hand.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.errors import InputError
from regionspot.export.precision import write_half
from regionspot.mini.architecture import CLIP_IMAGE_SIZE
from regionspot.modeling.clip import tokenize
from regionspot.modeling.graphs import model_info
from regionspot.modeling.pipelines import pipeline_from_backbones, pipeline_from_model
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.predictor import RegionPredictor, as_pipeline
from regionspot.runtime.graph_spec import Range
from regionspot.runtime.graphs import Ranges, gpu_graph_specs
from regionspot.runtime.ort_runner import OrtRunner
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.runtime.runner import Runner
from regionspot.runtime.tolerance import measure
from regionspot.structures import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, PADDING

RUNTIMES = ("torch", "onnxruntime", "openvino")
TIGHT = Ranges(
    batch=Range(2, 2, 2),
    regions=Range(3, 4, 8),
    prompts=Range(3, 4, 8),
    points=Range(2, 2, 3),
    words=Range(4, 4, 4),
    texts=Range(3, 3, 3),
)
"""Everything is padded, cut into pieces, or both."""

OpenPipeline = Callable[..., RegionPipeline]


@dataclass(frozen=True)
class Sample:
    """Three images with five prompts each, the last of which are padding, and six words."""

    images: np.ndarray
    input_sizes: np.ndarray
    clip_images: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    text_embeddings: np.ndarray
    embeddings: np.ndarray  # what the model itself says: (B, C, h, w)
    patch_tokens: np.ndarray  # (B, L, D)


@pytest.fixture(scope="module")
def sample(model: RegionSpot) -> Sample:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    sizes = np.array([[256, 200], [100, 256], [256, 256]], np.int32)
    clip_images = rng.integers(0, 256, (3, CLIP_IMAGE_SIZE, CLIP_IMAGE_SIZE, 3), dtype=np.uint8)
    corners = rng.uniform(0, 90, (3, 5, 1, 2))
    points = np.concatenate([corners, corners + rng.uniform(5, 90, (3, 5, 1, 2))], axis=2).astype(
        np.float32
    )
    labels = np.tile(np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32), (3, 5, 1))
    labels[1] = FOREGROUND, PADDING
    valid = np.arange(5) < np.array([5, 2, 4])[:, None]
    points[~valid], labels[~valid] = 0, PADDING
    text = rng.standard_normal((6, 128)).astype(np.float32)
    with torch.inference_mode():
        nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
        embeddings = model.sam.encode_image(nchw, torch.from_numpy(sizes)).numpy()
        patch_tokens = model.clip.encode_image(
            torch.from_numpy(clip_images).permute(0, 3, 1, 2)
        ).numpy()
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    return Sample(images, sizes, clip_images, points, labels, valid, unit, embeddings, patch_tokens)


CUTS: dict[str, dict[str, Any]] = {
    "": {},
    "wide": {"region_step": 4, "prompt_step": 4},
    "tight": {"ranges": TIGHT, "prompt_chunk": 6},
    "gpu": {"for_gpu": True, "prompt_chunk": 3},
}


@pytest.fixture(
    params=[
        "torch",
        "onnxruntime wide",
        "onnxruntime tight",
        "onnxruntime gpu",
        "openvino wide",
        "openvino tight",
        "openvino gpu",
    ]
)
def pipeline(request: pytest.FixtureRequest, open_pipeline: OpenPipeline) -> RegionPipeline:
    runtime, _, cut = request.param.partition(" ")
    opened = open_pipeline(runtime, **CUTS[cut])
    request.addfinalizer(opened.close)
    return opened


def near(actual: np.ndarray, expected: torch.Tensor | np.ndarray) -> None:
    assert actual.dtype == np.float32
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-4)


class TestValues:
    def test_masks_as_prompts(
        self, pipeline: RegionPipeline, model: RegionSpot, sample: Sample
    ) -> None:
        encoded = pipeline.encode_image(sample.images, sample.input_sizes)
        masks = np.random.default_rng(2).standard_normal((3, 5, 1, 64, 64)).astype(np.float32)
        arrays = (sample.embeddings, sample.points, sample.labels, masks)
        embeddings, points, labels, mask_inputs = (torch.from_numpy(array) for array in arrays)
        for multimask in (False, True):
            with torch.inference_mode():
                expected_masks, expected = model.sam.low_res_masks(
                    embeddings, points, labels, multimask, mask_inputs
                )
            drawn, *found = pipeline.low_res_masks(
                encoded, sample.points, sample.labels, multimask, masks
            )
            near(drawn[sample.valid], expected_masks[sample.valid])
            for tokens, ious in (
                found,
                pipeline.mask_tokens(encoded, sample.points, sample.labels, multimask, masks),
            ):
                near(tokens[sample.valid], expected.tokens[sample.valid])
                near(ious[sample.valid], expected.iou_predictions[sample.valid])

    def test_no_masks_as_prompts(self, pipeline: RegionPipeline, sample: Sample) -> None:
        encoded = pipeline.encode_image(sample.images, sample.input_sizes)
        none = (
            sample.points[:, :0],
            sample.labels[:, :0],
            True,
            np.zeros((3, 0, 1, 64, 64), np.float32),
        )
        assert pipeline.mask_tokens(encoded, *none)[0].shape == (3, 0, 3, 128)

    def test_prompts_of_several_images(
        self, pipeline: RegionPipeline, model: RegionSpot, sample: Sample
    ) -> None:
        encoded = pipeline.encode_image(sample.images, sample.input_sizes)
        assert len(encoded) == 3
        arrays = (sample.embeddings, sample.points, sample.labels)
        embeddings, points, labels = (torch.from_numpy(array) for array in arrays)
        for multimask in (False, True):
            with torch.inference_mode():
                masks, expected = model.sam.low_res_masks(embeddings, points, labels, multimask)
            tokens, ious = pipeline.mask_tokens(encoded, sample.points, sample.labels, multimask)
            drawn, of_drawn, ious_of_drawn = pipeline.low_res_masks(
                encoded, sample.points, sample.labels, multimask
            )
            for found in (tokens, of_drawn):
                near(found[sample.valid], expected.tokens[sample.valid])
            for found in (ious, ious_of_drawn):
                near(found[sample.valid], expected.iou_predictions[sample.valid])
            near(drawn[sample.valid], masks[sample.valid])

    def test_clips_maps(self, pipeline: RegionPipeline, sample: Sample) -> None:
        near(pipeline.encode_clip(sample.clip_images), sample.patch_tokens)

    @pytest.mark.parametrize("masked", [True, False])
    def test_logits(
        self, pipeline: RegionPipeline, model: RegionSpot, sample: Sample, masked: bool
    ) -> None:
        tokens = np.random.default_rng(1).standard_normal((3, 5, 128)).astype(np.float32)
        valid = sample.valid if masked else None
        arrays = (tokens, sample.patch_tokens, sample.text_embeddings)
        inputs = [
            torch.from_numpy(array) for array in (*arrays, *(() if valid is None else (valid,)))
        ]
        with torch.inference_mode():
            expected = model.classify(*inputs).numpy()
        found = pipeline.classify(tokens, sample.patch_tokens, valid, sample.text_embeddings)
        shown = np.ones_like(sample.valid) if valid is None else valid
        near(found[shown], expected[shown])

    def test_texts(self, pipeline: RegionPipeline, model: RegionSpot) -> None:
        texts = [
            "a",
            "a photo of a large red toy",
            "toy",
            "two",
            "a rather long text, with a comma or two, of a cup",
        ]
        encoder = pipeline.text_encoder
        assert encoder.templates == model.clip.templates
        assert encoder.embed_dim == 128
        assert encoder.known_tokens() == model.clip.known_tokens()
        with torch.inference_mode():
            near(encoder.encode_text(texts), model.clip.encode_text(texts))
            near(encoder.encode_text(["a" * 500]), model.clip.encode_text(["a" * 500]))
        near(
            pipeline.encode_tokens(tokenize(["a"], context_length=3).numpy().astype(np.int32)),
            _one(model, "a"),
        )
        assert encoder.encode_text([]).shape == (0, 128)


def _one(model: RegionSpot, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return model.clip.encode_text([text])


class TestNothing:
    @pytest.mark.parametrize("multimask", [False, True])
    def test_no_prompt(self, pipeline: RegionPipeline, sample: Sample, multimask: bool) -> None:
        encoded = pipeline.encode_image(sample.images[:2], sample.input_sizes[:2])
        readings = 3 if multimask else 1
        asked = (
            encoded,
            np.zeros((2, 0, 2, 2), np.float32),
            np.zeros((2, 0, 2), np.int32),
            multimask,
        )
        tokens, ious = pipeline.mask_tokens(*asked)
        assert tokens.shape == (2, 0, readings, 128) and ious.shape == (2, 0, readings)
        assert pipeline.low_res_masks(*asked)[0].shape == (2, 0, readings, 64, 64)
        logits = pipeline.classify(
            tokens[:, :, 0], sample.patch_tokens[:2], None, sample.text_embeddings
        )
        assert logits.shape == (2, 0, 6)

    def test_no_image(self, pipeline: RegionPipeline, sample: Sample) -> None:
        encoded = pipeline.encode_image(sample.images[:0], sample.input_sizes[:0])
        assert len(encoded) == 0
        assert pipeline.mask_tokens(encoded, sample.points[:0], sample.labels[:0])[0].shape == (
            0,
            5,
            1,
            128,
        )
        assert pipeline.encode_clip(sample.clip_images[:0]).shape == (
            0,
            pipeline.info.num_patch_tokens,
            192,
        )


class TestRefusals:
    @pytest.fixture
    def tight(self, open_pipeline: OpenPipeline) -> RegionPipeline:
        return open_pipeline("onnxruntime", TIGHT)

    def test_more_regions_than_the_head_takes(self, tight: RegionPipeline, sample: Sample) -> None:
        tokens = np.zeros((1, 9, 128), np.float32)
        with pytest.raises(
            InputError, match=r"9 regions of one image .* region_head takes, 8: .*--regions 1:9:9$"
        ):
            tight.classify(tokens, sample.patch_tokens[:1], None, sample.text_embeddings)
        with pytest.raises(InputError, match=r"--regions 1:32:400$"):
            tight.check_num_regions(400)
        tight.check_num_regions(8)

    @pytest.mark.parametrize("points", [1, 4])
    def test_points_out_of_range(self, tight: RegionPipeline, sample: Sample, points: int) -> None:
        encoded = tight.encode_image(sample.images[:1], sample.input_sizes[:1])
        asked = np.zeros((1, 2, points, 2), np.float32), np.ones((1, 2, points), np.int32)
        with pytest.raises(
            InputError,
            match=rf"sam_token_decoder_prompts takes prompts of 2 to 3 points, not {points}",
        ):
            tight.mask_tokens(encoded, *asked)

    def test_graphs_of_different_batches(self, open_pipeline: OpenPipeline, sample: Sample) -> None:
        wide, tight = open_pipeline("onnxruntime"), open_pipeline("onnxruntime", TIGHT)
        encoded = wide.encode_image(sample.images, sample.input_sizes)
        with pytest.raises(
            InputError, match=r"takes 2:2:2 images and sam_image_encoder gives 3 at once.*same"
        ):
            tight.mask_tokens(encoded, sample.points, sample.labels)

    def test_an_image_part_of_another_batch(
        self, open_pipeline: OpenPipeline, sample: Sample, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Found before the encoder runs, and not by the runtime."""
        wide, tight = open_pipeline("onnxruntime"), open_pipeline("onnxruntime", TIGHT)
        open_wide = wide._open
        mixed = {"sam_image_encoder": open_wide, "sam_token_decoder_image": tight._open}
        monkeypatch.setattr(wide, "_open", lambda graph: mixed[graph](graph))
        monkeypatch.setattr(wide, "_run", lambda *_, **__: pytest.fail("ran"))
        with pytest.raises(
            InputError,
            match="sam_token_decoder_image takes 2:2:2 images and sam_image_encoder gives 3",
        ):
            wide.encode_image(sample.images, sample.input_sizes)

    @pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
    def test_other_numbers_of_images(
        self, open_pipeline: OpenPipeline, sample: Sample, runtime: str
    ) -> None:
        """Padding to the graph's batch would make blank images of those that are missing."""
        pipeline = open_pipeline(runtime)
        with pytest.raises(InputError, match="there are 2 images, and 1 in input_sizes"):
            pipeline.encode_image(sample.images[:2], sample.input_sizes[:1])
        encoded = pipeline.encode_image(sample.images[:2], sample.input_sizes[:2])
        points, labels = sample.points, sample.labels
        with pytest.raises(InputError, match="there are 2 encoded images, and 1 in points"):
            pipeline.mask_tokens(encoded, points[:1], labels[:1])
        with pytest.raises(InputError, match="there are 2 encoded images, and 3 in labels"):
            pipeline.low_res_masks(encoded, points[:2], labels)
        tokens = np.zeros((2, 5, 128), np.float32)
        patch_tokens = sample.patch_tokens
        words = sample.text_embeddings
        with pytest.raises(
            InputError, match="there are 2 images in mask_tokens, and 1 in patch_tokens"
        ):
            pipeline.classify(tokens, patch_tokens[:1], None, words)
        with pytest.raises(InputError, match="there are 2 images in mask_tokens, and 3 in valid"):
            pipeline.classify(tokens, patch_tokens[:2], sample.valid, words)
        with pytest.raises(InputError, match="there are 5 regions in mask_tokens, and 4 in valid"):
            pipeline.classify(tokens, patch_tokens[:2], sample.valid[:2, :4], words)
        masks = np.zeros((1, 5, 1, 64, 64), np.float32)
        with pytest.raises(InputError, match="there are 2 encoded images, and 1 in mask_inputs"):
            pipeline.mask_tokens(encoded, points[:2], labels[:2], False, masks)
        with pytest.raises(InputError, match="there are 5 prompts in labels, and 4 in mask_inputs"):
            pipeline.mask_tokens(encoded, points[:2], labels[:2], False, masks[[0, 0], :4])

    def test_a_chunk_of_nothing(self, model: RegionSpot) -> None:
        model.sam.prompt_chunk, saved = 0, model.sam.prompt_chunk
        try:
            with pytest.raises(InputError, match="prompt_chunk must be 1 or more, not 0"):
                pipeline_from_model(model)
        finally:
            model.sam.prompt_chunk = saved

    def test_the_towers_alone_do_not_classify(self, model: RegionSpot, sample: Sample) -> None:
        pipeline = pipeline_from_backbones(model.sam, model.clip, "towers")
        assert pipeline.name == "towers"
        near(pipeline.encode_clip(sample.clip_images), sample.patch_tokens)
        with pytest.raises(InputError, match="region_head needs a head"):
            pipeline.classify(
                np.zeros((1, 1, 128), np.float32),
                sample.patch_tokens[:1],
                None,
                sample.text_embeddings,
            )


class Noted:
    """A runner's sizes at each call."""

    def __init__(self, runner: Runner, log: list[dict[str, tuple[int, ...]]]) -> None:
        self.runner, self.spec, self.log, self.closed = runner, runner.spec, log, False
        self.cuts_kept = True

    def infer(self, feeds: Any, keep: Any = ()) -> dict[str, Any]:
        self.log.append({name: value.shape for name, value in feeds.items()})
        return self.runner.infer(feeds, keep)

    def close(self) -> None:
        self.closed = True
        self.runner.close()

    def __enter__(self) -> Noted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TestRunners:
    def test_graphs_are_opened_when_needed_and_closed_together(
        self, model: RegionSpot, sample: Sample
    ) -> None:
        log: list[dict[str, tuple[int, ...]]] = []
        opened: dict[str, Noted] = {}
        whole = pipeline_from_model(model)

        def open_runner(graph: str) -> Runner:
            opened[graph] = Noted(whole._open(graph), log)
            return opened[graph]

        with RegionPipeline(
            whole.info,
            open_runner,
            runtime="torch",
            precision="fp32",
            fingerprint=whole.fingerprint,
            prompt_chunk=6,
        ) as pipeline:
            assert not opened
            encoded = pipeline.encode_image(sample.images, sample.input_sizes)
            # the last one for how many images it takes
            assert list(opened) == [
                "sam_image_encoder",
                "sam_token_decoder_image",
                "sam_token_decoder_prompts",
            ]
            log.clear()
            pipeline.mask_tokens(encoded, sample.points, sample.labels)
            # six prompts at a time
            assert [sizes["labels"] for sizes in log] == [(3, 2, 2), (3, 2, 2), (3, 1, 2)]
            assert not any(runner.closed for runner in opened.values())
        assert all(runner.closed for runner in opened.values())
        pipeline.encode_image(sample.images[:1], sample.input_sizes[:1])  # opened again

    def test_sizes_are_rounded_up(self, model: RegionSpot, sample: Sample) -> None:
        """Few sizes reach the runtime, none outside the graph's range, and what is padding changes
        nothing.
        """
        whole = pipeline_from_model(model)
        log: list[dict[str, tuple[int, ...]]] = []
        encoded = whole.encode_image(sample.images[:1], sample.input_sizes[:1])
        with RegionPipeline(
            whole.info,
            lambda graph: Noted(whole._open(graph), log),
            runtime="torch",
            precision="fp32",
            fingerprint=whole.fingerprint,
            region_step=4,
            prompt_step=3,
        ) as rounding:
            tokens = {}
            for count in (1, 3, 4, 5):
                asked = encoded, sample.points[:1, :count], sample.labels[:1, :count]
                tokens[count] = rounding.mask_tokens(*asked)[0]
                near(tokens[count], whole.mask_tokens(*asked)[0])
                given = (
                    tokens[count][:, :, 0],
                    sample.patch_tokens[:1],
                    None,
                    sample.text_embeddings,
                )
                near(rounding.classify(*given), whole.classify(*given))
        assert [sizes["labels"][1] for sizes in log if "labels" in sizes] == [3, 3, 6, 6]
        assert [sizes["valid"][1] for sizes in log if "valid" in sizes] == [4, 4, 4, 8]

    def test_a_mapping_of_runners(self, model: RegionSpot, sample: Sample) -> None:
        whole = pipeline_from_model(model)
        runners = {"clip_image_encoder": whole._open("clip_image_encoder")}
        pipeline = RegionPipeline(
            whole.info, runners, runtime="torch", precision="fp32", fingerprint=whole.fingerprint
        )
        near(pipeline.encode_clip(sample.clip_images), sample.patch_tokens)

    def test_shapes_are_within_the_ranges(
        self, open_pipeline: OpenPipeline, sample: Sample, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = open_pipeline("onnxruntime", TIGHT, prompt_chunk=100)
        open_runner = pipeline._open
        log: list[dict[str, tuple[int, ...]]] = []
        monkeypatch.setattr(pipeline, "_open", lambda graph: Noted(open_runner(graph), log))
        encoded = pipeline.encode_image(sample.images, sample.input_sizes)
        twice = (
            np.concatenate([sample.points, sample.points], 1),
            np.concatenate([sample.labels, sample.labels], 1),
        )
        pipeline.mask_tokens(encoded, *twice)
        assert [sizes["points"] for sizes in log if "points" in sizes] == [
            (2, 8, 2, 2),
            (2, 3, 2, 2),
        ] * 2
        log.clear()
        pipeline.prompt_chunk = 1  # less than the graph takes: no prompts are made up to fill it
        pipeline.mask_tokens(encoded, *twice)
        asked = [sizes["points"] for sizes in log if "points" in sizes]
        assert asked == [(2, 3, 2, 2)] * 8  # ten prompts in three and a rest, for two batches
        log.clear()
        tokens = np.zeros((3, 2, 128), np.float32)
        pipeline.classify(tokens, sample.patch_tokens, None, sample.text_embeddings)
        assert {sizes["mask_tokens"] for sizes in log} == {(2, 3, 128)}
        # two batches, two pieces of six words
        assert [sizes["text_embeddings"] for sizes in log] == [(4, 128)] * 4

    @pytest.mark.parametrize("cuts_kept", [True, False])
    def test_a_decoder_that_takes_one_image(
        self,
        open_pipeline: OpenPipeline,
        sample: Sample,
        monkeypatch: pytest.MonkeyPatch,
        cuts_kept: bool,
    ) -> None:
        """Images go through the encoder together where what it keeps can be cut into images."""
        pipeline = open_pipeline("onnxruntime", for_gpu=True)
        open_runner = pipeline._open
        log: list[dict[str, tuple[int, ...]]] = []

        def noted(graph: str) -> Noted:
            runner = Noted(open_runner(graph), log)
            runner.cuts_kept = cuts_kept
            return runner

        monkeypatch.setattr(pipeline, "_open", noted)
        encoded = pipeline.encode_image(sample.images, sample.input_sizes)
        batches = [sizes["images"][0] for sizes in log if "images" in sizes]
        assert batches == ([3] if cuts_kept else [1, 1, 1])
        pipeline.mask_tokens(encoded, sample.points, sample.labels)
        assert [sizes["points"] for sizes in log if "points" in sizes] == [(1, 5, 2, 2)] * 3


class TestBothEncoders:
    """Together where the runner of CLIP waits for its GPU: here it says so, and works on the
    CPU.
    """

    @pytest.fixture
    def threads(
        self, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[RegionPipeline, dict[str, str]]]:
        """A pipeline, and the thread in which each stage ran."""
        pipeline, seen = open_pipeline("onnxruntime"), {}

        @contextmanager
        def observer(stage: str) -> Iterator[None]:
            seen[stage] = threading.current_thread().name
            yield

        monkeypatch.setattr(OrtRunner, "waits_for_gpu", True)
        pipeline.observer = observer
        before = threading.active_count()
        with pipeline:
            yield pipeline, seen
        assert threading.active_count() == before

    def test_values_and_threads(
        self, threads: tuple[RegionPipeline, dict[str, str]], sample: Sample
    ) -> None:
        pipeline, seen = threads
        images = (sample.images, sample.input_sizes, sample.clip_images)
        encoded, maps = pipeline.encode(*images)
        near(maps, sample.patch_tokens)
        near(encoded.parts[0].tensors[0], sample.embeddings)
        own = threading.current_thread().name
        assert seen["sam_image_encoder"] == seen["sam_token_decoder_image"] == own
        assert seen["clip_image_encoder"].startswith("regionspot-clip")

    def test_one_after_the_other_on_a_cpu(
        self, open_pipeline: OpenPipeline, sample: Sample, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("regionspot.runtime.pipeline.ThreadPoolExecutor", None)
        for runtime in ("torch", "onnxruntime"):
            pipeline = open_pipeline(runtime)
            _, maps = pipeline.encode(sample.images, sample.input_sizes, sample.clip_images)
            near(maps, sample.patch_tokens)

    @pytest.mark.parametrize("stage", ["sam_image_encoder", "clip_image_encoder"])
    @pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()])
    def test_what_either_raises_comes_out_when_the_other_has_ended(
        self,
        threads: tuple[RegionPipeline, dict[str, str]],
        sample: Sample,
        stage: str,
        error: BaseException,
    ) -> None:
        pipeline, seen = threads
        observed = pipeline.observer

        @contextmanager
        def observer(name: str) -> Iterator[None]:
            with observed(name):
                if name == stage:
                    raise error
                yield

        pipeline.observer = observer
        images = (sample.images, sample.input_sizes, sample.clip_images)
        with pytest.raises(type(error)):
            pipeline.encode(*images)
        assert {"sam_image_encoder", "clip_image_encoder"} <= set(seen)
        pipeline.observer = observed
        near(pipeline.encode(*images)[1], sample.patch_tokens)


class TestHalf:
    def test_kept_tensors_in_fp16(
        self, model: RegionSpot, artifacts: Path, sample: Sample, tmp_path: Path
    ) -> None:
        """As graphs for GPUs have them: half the memory, and the same answers up to rounding."""
        specs = {
            name: spec.with_half_tensors()
            for name, spec in gpu_graph_specs(model_info(model)).items()
        }

        def open_runner(graph: str) -> Runner:
            path = tmp_path / f"{graph}.onnx"
            half = specs[graph].half_tensors
            write_half(artifacts / "onnx" / "fp32" / path.name, path, "fp16", half)
            return OrtRunner(path, specs[graph], threads=1, precision="fp16")

        whole = pipeline_from_model(model)
        asked = sample.points, sample.labels
        masks = np.random.default_rng(0).normal(size=(3, 5, 1, 64, 64)).astype(np.float32)
        with RegionPipeline(
            model_info(model),
            open_runner,
            runtime="onnxruntime",
            precision="fp16",
            fingerprint=lambda graph: f"{graph} in fp16",
        ) as halved:
            encoded = halved.encode_image(sample.images, sample.input_sizes)
            expected = whole.encode_image(sample.images, sample.input_sizes)
            assert encoded.nbytes < 0.52 * expected.nbytes  # the statistics stay in fp32
            pairs = (
                (halved.mask_tokens(encoded, *asked), whole.mask_tokens(expected, *asked)),
                (
                    halved.low_res_masks(encoded, *asked, mask_inputs=masks),
                    whole.low_res_masks(expected, *asked, mask_inputs=masks),
                ),
            )
        for found, wanted in pairs:
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == np.float32
                assert measure(other, one).sqnr_db > 35


class TestTorch:
    def test_compiled_in_half_precision(
        self, sample: Sample, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each graph in one piece, and few times for any number of regions. Traced only: to compile
        them takes minutes on a CPU, which `make gpu-check` does on a GPU.
        """
        made: list[Any] = []

        def compile_without_inductor(module: torch.nn.Module) -> Any:
            def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
                made.append(type(module).__name__)
                return graph.forward

            return compiler(module, backend=backend, fullgraph=True)

        torch.compiler.reset()
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", compile_without_inductor)
        model = create_model("regionspot_mini", dtype="bf16")
        plain, compiled = pipeline_from_model(model), pipeline_from_model(model, compiled=True)
        text = sample.text_embeddings

        def logits(pipeline: RegionPipeline, count: int) -> np.ndarray:
            encoded, maps = pipeline.encode(
                sample.images[:1], sample.input_sizes[:1], sample.clip_images[:1]
            )
            points = np.repeat(sample.points[:1, :1], count, axis=1)
            labels = np.repeat(sample.labels[:1, :1], count, axis=1)
            tokens, _ = pipeline.mask_tokens(encoded, points, labels)
            return pipeline.classify(tokens[:, :, 0], maps, None, text)

        for count in (3, 12):
            expected, found = logits(plain, count), logits(compiled, count)
            assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
        assert set(made) == {
            "SamImageEncoder",
            "ClipImageEncoder",
            "SamTokenDecoderImage",
            "SamTokenDecoderPrompts",
            "RegionHeadLogits",
        }
        assert max(map(made.count, made)) == 2
        assert pickle.loads(pickle.dumps(compiled)).region_step == compiled.region_step == 8

    def test_weights_that_change_are_seen(self, sample: Sample) -> None:
        model = create_model("regionspot_mini", random_weights=0)
        pipeline = pipeline_from_model(model)
        before = pipeline.encode_clip(sample.clip_images)
        with torch.no_grad():
            model.clip.clip.visual.conv1.weight.mul_(2)
        assert np.abs(pipeline.encode_clip(sample.clip_images) - before).max() > 0.1

    def test_the_models_mode_is_left_as_it_was(self, sample: Sample) -> None:
        model = create_model("regionspot_mini", random_weights=0).train()
        modes = {name: module.training for name, module in model.named_modules()}
        pipeline = pipeline_from_model(model)
        tokens = np.zeros((3, 2, 128), np.float32)
        first, second = (
            pipeline.classify(tokens, sample.patch_tokens, None, sample.text_embeddings)
            for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)  # no dropout
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert model.head.training

    def test_fingerprints_are_of_the_part(self, model: RegionSpot) -> None:
        def prints(changed: RegionSpot) -> list[str]:
            pipeline = pipeline_from_model(changed)
            head, text = (
                pipeline.fingerprint(graph) for graph in ("region_head", "clip_text_encoder")
            )
            return [pipeline.sam_fingerprint(), pipeline.clip_fingerprint(), head, text]

        before = prints(model)
        assert len(set(before)) == 4 and before == prints(create_model("regionspot_mini"))
        for index, part in enumerate(
            ("sam.sam.mask_decoder", "clip.clip.visual", "head", "clip.clip.transformer")
        ):
            other = create_model("regionspot_mini")
            with torch.no_grad():
                next(other.get_submodule(part).parameters()).add_(1)
            assert [a != b for a, b in zip(prints(other), before, strict=True)] == [
                i == index for i in range(4)
            ]

    def test_the_precision_is_that_of_the_weights(self, model: RegionSpot) -> None:
        assert (pipeline_from_model(model).runtime, pipeline_from_model(model).precision) == (
            "torch",
            "fp32",
        )
        other = create_model("regionspot_mini", random_weights=0).double()
        for make in (pipeline_from_model, RegionPredictor):
            with pytest.raises(
                InputError, match=r"weights in float64; it can work in .* call model\.float\(\)"
            ):
                make(other)
        assert pipeline_from_model(other.float()).precision == "fp32"
        assert pipeline_from_model(other.half()).precision == "fp16"


class TestTextEncoders:
    def test_a_model_brings_its_own(self, model: RegionSpot) -> None:
        assert model.text_encoder is model.clip
        pipeline = pipeline_from_model(model)
        assert as_pipeline(pipeline) is pipeline
        assert pipeline.text_encoder.fingerprint() == model.clip.fingerprint()

    def test_no_runtime_shares_words_with_another(
        self, open_pipeline: OpenPipeline, model: RegionSpot
    ) -> None:
        pipelines = [open_pipeline(runtime) for runtime in RUNTIMES]
        assert len({pipeline.text_encoder.fingerprint() for pipeline in pipelines}) == 3


def test_no_pytorch_is_loaded() -> None:
    code = (
        "import sys, regionspot.runtime.pipeline, regionspot.runtime.artifacts, "
        "regionspot.predictor;"
    )
    code += "import regionspot.runtime.ort_runner, regionspot.runtime.openvino_runner;"
    code += "print(sorted({'torch', 'open_clip', 'onnx'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"

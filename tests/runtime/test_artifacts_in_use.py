"""A directory of artefacts in place of weights: prediction, evaluation, feature extraction, and
their commands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from regionspot.cli.main import main
from regionspot.config import TrainConfig, config_from_dict
from regionspot.data.coco_json import CocoDataset
from regionspot.data.dataset import load_training_set
from regionspot.data.extraction import FeatureExtractor, fill_caches, make_cache
from regionspot.errors import InputError
from regionspot.evaluation.evaluator import evaluate_methods
from regionspot.evaluation.methods import METHODS
from regionspot.evaluation.proposals import Proposals, ground_truth_proposals
from regionspot.modeling import presets
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.presets import create_backbones
from regionspot.modeling.regionspot import RegionSpot
from regionspot.predictor import RegionPredictor
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.graph_spec import Range
from regionspot.runtime.graphs import Ranges
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.pipeline import RegionPipeline
from regionspot.training.setup import Setup
from regionspot.vocabulary import TextEncoder, VocabularyEncoder

RUNTIMES = ("onnxruntime", "openvino")
WORDS = ("red toy", "dog", "blue cup")
BOXES = [[10, 5, 60, 50], [0, 0, 90, 60], [40, 20, 80, 55]]
HEIGHT, WIDTH = 60, 90


@pytest.fixture(params=RUNTIMES)
def pipeline(request: pytest.FixtureRequest, artifacts: Path) -> Iterator[RegionPipeline]:
    with open_pipeline(artifacts, request.param, "fp32", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((10, 10, 1), np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, photo: np.ndarray) -> Path:
    """Three pictures with one, three and no object of two classes."""
    directory = tmp_path_factory.mktemp("pictures")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, boxes in enumerate((BOXES[:1], BOXES, [])):
        Image.fromarray(np.roll(photo, 10 * index, axis=1)).save(directory / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": WIDTH, "height": HEIGHT})
        for x0, y0, x1, y1 in boxes:
            outline = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            entry: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": index,
                "category_id": 1 + len(annotations) % 2,
            }
            entry |= {
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "segmentation": outline,
            }
            annotations.append(entry)
    categories = [{"id": 1, "name": "red toy"}, {"id": 2, "name": "blue toy"}]
    path = directory / "val.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


class TestPrediction:
    def test_as_pytorch(
        self, pipeline: RegionPipeline, model: RegionSpot, photo: np.ndarray
    ) -> None:
        asked: dict[str, Any] = {
            "boxes": BOXES,
            "points": [[40, 30]],
            "vocabulary": WORDS,
            "multimask": True,
        }
        expected = RegionPredictor(model).set_image(photo).predict(**asked)
        hook = register_module_forward_pre_hook(lambda *_: pytest.fail("PyTorch ran"))
        try:
            found = RegionPredictor(pipeline).set_image(photo).predict(**asked)
        finally:
            hook.remove()
        np.testing.assert_allclose(found.top_scores, expected.top_scores, atol=1e-4)
        np.testing.assert_array_equal(found.top_class_ids, expected.top_class_ids)
        assert found.iou_predictions is not None and expected.iou_predictions is not None
        np.testing.assert_allclose(found.iou_predictions, expected.iou_predictions, atol=1e-4)
        assert found.masks is not None and len(found.masks) == 12

    def test_nothing_and_masks(
        self, pipeline: RegionPipeline, model: RegionSpot, photo: np.ndarray
    ) -> None:
        predictor = RegionPredictor(pipeline).set_image(photo)
        assert len(predictor.predict(boxes=[], masks=[], vocabulary=WORDS)) == 0
        mask = np.zeros((1, HEIGHT, WIDTH), bool)
        mask[0, 10:40, 20:50] = True
        asked: dict[str, Any] = {"boxes": BOXES, "masks": mask, "vocabulary": WORDS}
        expected = RegionPredictor(model).set_image(photo).predict(**asked)
        found = predictor.predict(**asked)
        np.testing.assert_allclose(found.top_scores, expected.top_scores, atol=1e-4)
        assert found.iou_predictions is not None and expected.iou_predictions is not None
        np.testing.assert_allclose(found.iou_predictions, expected.iou_predictions, atol=1e-4)

    def test_more_regions_than_the_graphs_take(
        self, open_pipeline: Callable[..., Any], photo: np.ndarray
    ) -> None:
        few = open_pipeline("onnxruntime", Ranges(regions=Range(1, 2, 3)))
        predictor = RegionPredictor(few).set_image(photo)
        assert len(predictor.predict(boxes=BOXES, vocabulary=WORDS)) == 3
        with pytest.raises(
            InputError,
            match=r"4 regions .* region_head takes, 3: .*regionspot-export --regions 1:4:4",
        ):
            predictor.predict(boxes=BOXES, points=[[5, 5]], vocabulary=WORDS)

    def test_words_are_cached_apart(
        self, artifacts: Path, model: RegionSpot, tmp_path: Path
    ) -> None:
        encoders: list[TextEncoder] = [model.clip]
        encoders += [open_pipeline(artifacts, runtime, "fp32").text_encoder for runtime in RUNTIMES]
        found = [VocabularyEncoder(each, tmp_path).encode(WORDS).embeddings for each in encoders]
        assert len(list(tmp_path.iterdir())) == 3
        for embeddings in found[1:]:
            np.testing.assert_allclose(embeddings, found[0], atol=1e-5)


class TestEvaluation:
    def test_as_pytorch(self, pipeline: RegionPipeline, model: RegionSpot, data: Path) -> None:
        dataset = CocoDataset.load(data)
        methods = [name for name in METHODS if not METHODS[name].needs_torch]
        vocabulary = VocabularyEncoder(model.clip).encode(dataset.class_names)
        arguments = (dataset, vocabulary, ground_truth_proposals(dataset), methods)
        options: dict[str, Any] = {
            "rules": "coco",
            "masks": True,
            "batch_size": 2,
            "progress": False,
        }
        expected, found = (
            evaluate_methods(each, *arguments, **options) for each in (model, pipeline)
        )
        assert list(found) == methods == ["head", "constant_token"]
        for method in methods:
            (metrics, detections), (_, own) = found[method], expected[method]
            assert len(detections) == len(own) == 8
            np.testing.assert_allclose(np.sort(detections.scores), np.sort(own.scores), atol=1e-4)
            assert detections.masks is not None
            assert (metrics["protocol"]["runtime"], metrics["protocol"]["precision"]) == (
                pipeline.runtime,
                "fp32",
            )

    @pytest.mark.parametrize("method", ["clip_crops", "roi_pooling"])
    def test_methods_that_need_pytorch(
        self, pipeline: RegionPipeline, model: RegionSpot, data: Path, method: str
    ) -> None:
        dataset = CocoDataset.load(data)
        vocabulary = VocabularyEncoder(model.clip).encode(dataset.class_names)
        with pytest.raises(
            InputError, match=f"{method} run CLIP's own modules in PyTorch.*{pipeline.runtime}"
        ):
            evaluate_methods(
                pipeline,
                dataset,
                vocabulary,
                ground_truth_proposals(dataset),
                ["head", method],
                "coco",
            )
        with pytest.raises(InputError, match="give it the model, not a pipeline of it"):
            METHODS[method].start(pipeline_from_model(model), None)

    def test_too_many_regions_are_found_before_anything_is_computed(
        self,
        open_pipeline: Callable[..., Any],
        model: RegionSpot,
        data: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        few = open_pipeline("onnxruntime", Ranges(regions=Range(1, 2, 3)))
        monkeypatch.setattr(few, "encode_image", lambda *_: pytest.fail("computed"))
        dataset = CocoDataset.load(data)
        many = Proposals(
            "many", {image.id: np.tile([1.0, 1, 9, 9], (4, 1)) for image in dataset.images}, None
        )
        vocabulary = VocabularyEncoder(model.clip).encode(dataset.class_names)
        with pytest.raises(InputError, match="4 regions of one image"):
            evaluate_methods(few, dataset, vocabulary, many, rules="coco", progress=False)


class TestFeatures:
    @pytest.mark.parametrize("multimask", [False, True])
    def test_as_pytorch(
        self,
        pipeline: RegionPipeline,
        model: RegionSpot,
        data: Path,
        tmp_path: Path,
        multimask: bool,
    ) -> None:
        training_set, features = load_training_set("toys", data), []
        for index, source in enumerate((pipeline_from_model(model), pipeline)):
            extractor = FeatureExtractor(source, multimask=multimask)
            cache = make_cache(tmp_path / str(index), training_set, extractor, images_per_shard=1)
            fill_caches([cache], extractor)
            features.append(cache.load().gather(np.arange(2)))
        for expected, found in zip(*features, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-3)

    def test_the_key_is_the_artefacts(
        self, artifacts: Path, model: RegionSpot, data: Path, tmp_path: Path
    ) -> None:
        training_set = load_training_set("toys", data)

        def key(source: RegionPipeline, **options: Any) -> str:
            return make_cache(tmp_path, training_set, FeatureExtractor(source, **options), 1).key

        manifest = Manifest.load(artifacts)
        by_onnx, by_openvino = (open_pipeline(artifacts, runtime, "fp32") for runtime in RUNTIMES)
        assert key(by_onnx) == key(by_openvino) != key(pipeline_from_model(model))
        used = {
            "sam_image_encoder": "onnx",
            "sam_token_decoder_prompts": "native",
            "clip_image_encoder": "onnx",
        }
        for graph, kind in used.items():
            entry = manifest.find(graph, kind, "fp32")
            assert entry.sha256 is not None
            own = by_onnx.sam_fingerprint() + by_onnx.clip_fingerprint()
            assert entry.sha256 in own
        head = manifest.find("region_head", "onnx", "fp32").sha256
        assert (
            head is not None and head not in by_onnx.sam_fingerprint() + by_onnx.clip_fingerprint()
        )

    def test_weights_beside_the_graphs_file_count(self, artifacts: Path, tmp_path: Path) -> None:
        """OpenVINO's .xml stays the same whatever the weights in its .bin are."""
        manifest = Manifest.load(artifacts)

        def fingerprint(weights: str) -> str:
            files = {"clip.xml": "a" * 64, "clip.bin": weights * 64}
            graphs = tuple(
                replace(e, format="openvino", file="clip.xml", files=files) for e in manifest.graphs
            )
            replace(manifest, directory=tmp_path, graphs=graphs).save()
            return open_pipeline(tmp_path, "openvino", "fp32").clip_fingerprint()

        assert fingerprint("b") != fingerprint("c")


class TestTraining:
    @pytest.fixture
    def make_config(
        self, data: Path, tmp_path: Path, artifacts: Path
    ) -> Callable[..., TrainConfig]:
        def make(preset: str = "regionspot_mini", **features: Any) -> TrainConfig:
            of_features = {"cache_dir": str(tmp_path), "dtype": "float32", **features}
            tree = {
                "datasets": [{"name": "toys", "annotations": str(data)}],
                "device": "cpu",
                "features": of_features,
            }
            return config_from_dict({**tree, "model": {"preset": preset, "num_layers": 1}})

        return make

    @pytest.mark.parametrize("augmentation", [False, True])
    def test_a_run_whose_features_come_from_artefacts(
        self,
        make_config: Callable[..., TrainConfig],
        artifacts: Path,
        model: RegionSpot,
        augmentation: bool,
    ) -> None:
        from regionspot.config import AugmentationConfig

        varied = AugmentationConfig() if augmentation else None
        towers = (model.sam, model.clip)
        options = {"runtime": "onnxruntime", "artifacts": str(artifacts)}
        by_torch, by_graphs = (
            replace(make_config(**each), augmentation=varied) for each in ({}, options)
        )
        setups = [Setup.from_config(config, towers) for config in (by_torch, by_graphs)]
        assert [setup.extractor.pipeline.runtime for setup in setups] == ["torch", "onnxruntime"]
        assert [setup.extractor.maps for setup in setups] == [not augmentation] * 2
        assert setups[0].caches[0].key != setups[1].caches[0].key
        assert f"features by onnxruntime from {artifacts}" in setups[1].describe()
        assert "features by" not in setups[0].describe()
        fill_caches(setups[1].caches, setups[1].extractor)

    def test_artefacts_of_another_model(
        self, make_config: Callable[..., TrainConfig], artifacts: Path, model: RegionSpot
    ) -> None:
        config = make_config(runtime="openvino", artifacts=str(artifacts))
        other = create_backbones("regionspot_mini", random_weights=1)
        with pytest.raises(
            InputError,
            match="is of regionspot_mini, and this run of regionspot_mini with other weights of "
            "SAM and",
        ):
            Setup.from_config(config, other)
        bb = make_config("regionspot_bb", runtime="openvino", artifacts=str(artifacts))
        with pytest.raises(
            InputError, match="is of regionspot_mini, and this run of regionspot_bb: export"
        ):
            Setup.from_config(bb, (model.sam, model.clip))

    @pytest.mark.parametrize(
        ("tower", "part"), [("SAM", "sam.mask_decoder"), ("CLIP", "clip.visual")]
    )
    def test_artefacts_of_another_tower(
        self, make_config: Callable[..., TrainConfig], artifacts: Path, tower: str, part: str
    ) -> None:
        towers = create_backbones("regionspot_mini")
        with torch.no_grad():
            next(towers[tower == "CLIP"].get_submodule(part).parameters()).add_(1)
        config = make_config(runtime="onnxruntime", artifacts=str(artifacts))
        with pytest.raises(
            InputError, match=f"this run of regionspot_mini with other weights of {tower}: export"
        ):
            Setup.from_config(config, towers)

    def test_the_runtime_has_a_device_of_its_own(
        self, make_config: Callable[..., TrainConfig], artifacts: Path, model: RegionSpot
    ) -> None:
        """The one to train on need not be one of its."""
        config = replace(make_config(runtime="openvino", artifacts=str(artifacts)), device="cpu:0")
        extractor = Setup.from_config(config, (model.sam, model.clip)).extractor
        image = np.zeros((1, model.clip.image_size, model.clip.image_size, 3), np.uint8)
        assert extractor.pipeline.encode_clip(image).shape == (1, model.clip.num_tokens, 192)


class TestCommands:
    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing here may load weights."""
        monkeypatch.setattr(
            presets, "create_model", lambda *_, **__: pytest.fail("weights were loaded")
        )

    @pytest.fixture(params=RUNTIMES)
    def chosen(self, request: pytest.FixtureRequest, artifacts: Path) -> list[str]:
        return ["--artifacts", str(artifacts), "--runtime", request.param, "--threads", "1"]

    @pytest.fixture
    def closed(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Grows with each pipeline that is closed: a runner may have something to save then."""
        log: list[str] = []
        close = RegionPipeline.close

        def noted(pipeline: RegionPipeline) -> None:
            log.append("closed")
            close(pipeline)

        monkeypatch.setattr(RegionPipeline, "close", noted)
        return log

    def test_predict(
        self,
        data: Path,
        tmp_path: Path,
        chosen: list[str],
        closed: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        asked = ["--box", "10,5,60,50", "--point", "20,30", "--vocabulary", "red toy,dog"]
        document = tmp_path / "out.json"
        assert (
            main(["predict", str(data.parent / "0.png"), *asked, *chosen, "--json", str(document)])
            == 0
        )
        assert len(json.loads(document.read_text())["regions"]) == 2
        assert (
            f"0.png: 90 x 60 pixels, regionspot_mini by {chosen[3]}, 2 words"
            in capsys.readouterr().out
        )
        assert closed == ["closed"]

    def test_eval(
        self,
        data: Path,
        tmp_path: Path,
        chosen: list[str],
        closed: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        document = tmp_path / "metrics.json"
        assert (
            main(["eval", "--data", str(data), "--rules", "coco", *chosen, "--json", str(document)])
            == 0
        )
        protocol = json.loads(document.read_text())["head"]["protocol"]
        assert (protocol["runtime"], protocol["precision"]) == (chosen[3], "fp32")
        header, *_, head = capsys.readouterr().out.splitlines()
        assert header.startswith(f"regionspot_mini by {chosen[3]} in fp32 on 3 images, 4 regions")
        assert head.split()[0] == "head" and float(head.split()[1]) >= 0
        assert closed == ["closed"]

    def test_artefacts_of_another_model(
        self, data: Path, chosen: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert (
            main(
                [
                    "eval",
                    "--data",
                    str(data),
                    "--rules",
                    "coco",
                    "--model",
                    "regionspot_bb",
                    *chosen,
                ]
            )
            == 2
        )
        assert (
            "are of regionspot_mini, not of regionspot_bb: leave out --model"
            in capsys.readouterr().err
        )

    def test_what_was_not_made(
        self, data: Path, chosen: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert (
            main(["eval", "--data", str(data), "--rules", "coco", *chosen, "--precision", "int8"])
            == 2
        )
        assert "int8" in capsys.readouterr().err

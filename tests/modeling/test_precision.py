"""Half precision in PyTorch: what is converted, how close the answers stay, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip import CLIP
from segment_anything.modeling import Sam

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.evaluator import evaluate_methods
from regionspot.evaluation.methods import METHODS
from regionspot.evaluation.proposals import ground_truth_proposals
from regionspot.images import read_image
from regionspot.masks import decode_rle
from regionspot.mini.dataset import build_dataset
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.graphs import graph_module
from regionspot.modeling.head import RegionHead
from regionspot.modeling.pipelines import (
    graph_fingerprints,
    pipeline_from_backbones,
    pipeline_from_model,
)
from regionspot.modeling.precision import DTYPES, precision_of
from regionspot.modeling.presets import create_backbones, create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone
from regionspot.predictor import RegionPredictor
from regionspot.structures import Vocabulary
from regionspot.vocabulary import VocabularyEncoder

WORDS = ["red ball", "blue cube", "green cone", "yellow star", "cat"]
HALVES = ["bf16", "fp16"]


@pytest.fixture(scope="module")
def models() -> dict[str, RegionSpot]:
    return {name: create_model("regionspot_mini", dtype=name) for name in DTYPES}


@pytest.fixture(scope="module")
def words(models: dict[str, RegionSpot]) -> Vocabulary:
    """In single precision: most CPUs take several times as long in half precision."""
    return VocabularyEncoder(models["fp32"].clip).encode(WORDS)


@pytest.fixture(scope="module")
def predictors(models: dict[str, RegionSpot], world: World) -> dict[str, RegionPredictor]:
    """Of each precision, with the first picture set."""
    return {
        name: RegionPredictor(model).set_image(world.pictures[0]) for name, model in models.items()
    }


@dataclass(frozen=True)
class World:
    """Pictures of the mini world, the names of the toys in them, and the boxes of those in each."""

    annotations: Path
    names: list[str]
    pictures: list[np.ndarray]
    boxes: list[np.ndarray]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("world")
    _, path = build_dataset(directory, 1, 6, seed=7, workers=1)
    content = json.loads(path.read_text())
    shown = {one["category_id"] for one in content["annotations"]}
    content["categories"] = [one for one in content["categories"] if one["id"] in shown]
    for image in content["images"]:
        image["neg_category_ids"] = [
            category for category in image["neg_category_ids"] if category in shown
        ]
    path.write_text(json.dumps(content))
    pictures, boxes = [], []
    for image in content["images"]:
        xywh = np.array(
            [one["bbox"] for one in content["annotations"] if one["image_id"] == image["id"]],
            np.float32,
        )
        pictures.append(read_image(directory / image["file_name"]))
        boxes.append(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1))
    return World(path, [one["name"] for one in content["categories"]], pictures, boxes)


def cosines(a: Any, b: Any) -> np.ndarray:
    a, b = (np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (a, b))
    found: np.ndarray = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found


class TestAnswers:
    @pytest.mark.parametrize("half", HALVES)
    def test_scores_stay_close_and_the_best_word_the_same(
        self, models: dict[str, RegionSpot], world: World, half: str
    ) -> None:
        words = VocabularyEncoder(models["fp32"].clip).encode(world.names)
        scores, best = [], []
        for name in ("fp32", half):
            predictor = RegionPredictor(models[name])
            found = [
                predictor.set_image(picture).predict(
                    boxes=boxes, vocabulary=words, return_masks=False, top_k=1
                )
                for picture, boxes in zip(world.pictures, world.boxes, strict=True)
            ]
            scores.append(np.concatenate([one.scores for one in found]))
            best.append(np.concatenate([one.class_ids for one in found]))
        assert len(best[0]) >= 24 and len(world.names) >= 12
        assert (best[0] == best[1]).mean() >= 0.95
        assert np.abs(scores[0] - scores[1]).max() < {"bf16": 0.08, "fp16": 0.01}[half]
        assert (scores[0] != scores[1]).any()

    @pytest.mark.parametrize("half", HALVES)
    def test_features(
        self, predictors: dict[str, RegionPredictor], world: World, half: str
    ) -> None:
        expected, found = (predictors[name].encode(world.pictures[0]) for name in ("fp32", half))
        assert cosines(expected.patch_tokens, found.patch_tokens).min() > 0.999
        assert found.patch_tokens.dtype == np.float32
        embeddings = [encoded.encoded.parts[0].tensors[0] for encoded in (expected, found)]
        assert cosines(*(array.reshape(array.shape[1], -1).T for array in embeddings)).min() > 0.999

    @pytest.mark.parametrize("half", HALVES)
    def test_words(self, models: dict[str, RegionSpot], words: Vocabulary, half: str) -> None:
        expected, found = (models[name].clip.encode_text(WORDS) for name in ("fp32", half))
        assert found.dtype == torch.float32
        assert cosines(expected, found).min() > 0.999
        by_predictor = RegionPredictor(models[half])._encode_vocabulary(WORDS[:1])
        assert cosines(by_predictor.embeddings, words.embeddings[:1]).min() > 0.999

    @pytest.mark.parametrize("return_masks", [False, True])
    @pytest.mark.parametrize("multimask", [False, True])
    @pytest.mark.parametrize("kind", ["boxes", "points", "masks"])
    def test_every_kind_of_prompt(
        self,
        predictors: dict[str, RegionPredictor],
        words: Vocabulary,
        world: World,
        kind: str,
        multimask: bool,
        return_masks: bool,
    ) -> None:
        picture, boxes = world.pictures[0], world.boxes[0][:3]
        x0, y0, x1, y1 = boxes[0].astype(int)
        mask = np.zeros((1, *picture.shape[:2]), bool)
        mask[:, y0:y1, x0:x1] = True
        prompts = {"boxes": boxes, "points": (boxes[:, :2] + boxes[:, 2:]) / 2, "masks": mask}
        single, half = (
            predictors[name].predict(
                **{kind: prompts[kind]},
                vocabulary=words,
                multimask=multimask,
                return_masks=return_masks,
            )
            for name in ("fp32", "bf16")
        )
        assert np.abs(single.top_scores.max(1) - half.top_scores.max(1)).max() < 0.08
        assert single.iou_predictions is not None and half.iou_predictions is not None
        np.testing.assert_allclose(half.iou_predictions, single.iou_predictions, atol=0.03)
        for one, other in zip(single.masks or (), half.masks or (), strict=True):
            a, b = decode_rle(one), decode_rle(other)
            assert (a & b).sum() >= 0.93 * (a | b).sum()

    def test_average_precision_by_every_method(
        self, models: dict[str, RegionSpot], world: World
    ) -> None:
        dataset = CocoDataset.load(world.annotations)
        figures = []
        words = VocabularyEncoder(models["fp32"].clip).encode(dataset.class_names)
        for name in ("fp32", "bf16"):
            chosen = tuple(METHODS)
            results = evaluate_methods(
                models[name],
                dataset,
                words,
                ground_truth_proposals(dataset),
                chosen,
                "lvis",
                True,
                progress=False,
            )
            figures.append({method: metrics for method, (metrics, _) in results.items()})
        for method in METHODS:
            single, half = (of_precision[method] for of_precision in figures)
            assert (single["protocol"]["precision"], half["protocol"]["precision"]) == (
                "fp32",
                "bf16",
            )
            # percent, of few regions; of 200 pictures: 0.04
            assert abs(single["AP"] - half["AP"]) < 12

    @pytest.mark.gpu
    @pytest.mark.parametrize("half", HALVES)
    def test_on_the_gpu(
        self, models: dict[str, RegionSpot], words: Vocabulary, world: World, half: str
    ) -> None:
        on_gpu = create_model("regionspot_mini", device="cuda", dtype=half)
        assert on_gpu.device.type == "cuda" and on_gpu.sam.prompt_chunk == 32
        asked: dict[str, Any] = {"boxes": world.boxes[0], "vocabulary": words}
        expected, found = (
            RegionPredictor(model).set_image(world.pictures[0]).predict(**asked)
            for model in (models["fp32"], on_gpu)
        )
        np.testing.assert_allclose(found.scores, expected.scores, atol=0.08)


class TestConversions:
    def test_what_is_halved_and_what_is_kept(self, models: dict[str, RegionSpot]) -> None:
        single, half = models["fp32"], models["bf16"]
        for part in (
            half.sam.sam.image_encoder,
            half.clip.clip.visual,
            half.clip.clip.transformer,
            half.head,
        ):
            assert {weight.dtype for weight in part.parameters()} == {torch.bfloat16}
        for part in (
            half.sam.sam.mask_decoder,
            half.sam.sam.prompt_encoder,
            half.sam.token_decoder,
        ):
            assert {tensor.dtype for tensor in (*part.parameters(), *part.buffers())} == {
                torch.float32
            }
        # e to the power of a rounded number is 1 % off
        assert half.clip.logit_scale == single.clip.logit_scale
        assert torch.equal(half.clip.image_mean, single.clip.image_mean)
        for name, constant in single.sam.token_decoder.named_buffers():
            assert torch.equal(constant, half.sam.token_decoder.get_buffer(name))
        size, halved = (
            sum(t.nbytes for t in model.state_dict().values()) for model in (single, half)
        )
        assert halved < 0.6 * size

    @pytest.mark.parametrize(
        ("convert", "precision"),
        [
            (lambda model: model.half(), "fp16"),
            (lambda model: model.bfloat16(), "bf16"),
            (lambda model: model.to(torch.float16), "fp16"),
            (lambda model: model.to("cpu", torch.bfloat16), "bf16"),
            (lambda model: model.half().float(), "fp32"),
            (lambda model: model.half().bfloat16(), "bf16"),
            (lambda model: model.double().float(), "fp32"),
        ],
    )
    def test_every_way_to_convert(
        self,
        models: dict[str, RegionSpot],
        convert: Callable[[RegionSpot], RegionSpot],
        precision: str,
    ) -> None:
        model = convert(copy.deepcopy(models["fp32"]))
        assert precision_of(model) == pipeline_from_model(model).precision == precision
        for name, tensor in models[precision].state_dict().items():
            assert model.state_dict()[name].dtype == tensor.dtype

    def test_towers_that_come_in_half_precision(self, tiny_sam: Sam, tiny_clip: CLIP) -> None:
        sam, clip = SamBackbone(tiny_sam.bfloat16()), ClipBackbone(tiny_clip.bfloat16())
        model = RegionSpot(sam, clip, RegionHead(32, 48, 24, feedforward_dim=8).bfloat16())
        assert precision_of(model) == "bf16"
        clip.encode_text(["a cat"])
        tokens = sam.mask_tokens(
            torch.zeros(1, 32, 8, 8), torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2).int()
        )
        assert tokens.tokens.dtype == torch.float32

    def test_weights_that_come_later_are_folded(self, models: dict[str, RegionSpot]) -> None:
        half, _ = create_backbones("regionspot_mini", random_weights=1, dtype="bf16")
        shipped = models["fp32"]
        half.load_state_dict(shipped.sam.state_dict())
        assert half.sam.image_encoder.pos_embed.dtype == torch.bfloat16
        for name, constant in shipped.sam.token_decoder.named_buffers():
            assert torch.equal(constant, half.token_decoder.get_buffer(name))

    def test_random_weights_are_drawn_before_they_are_rounded(self) -> None:
        (single, _), (half, _) = (
            create_backbones("regionspot_mini", random_weights=3, dtype=name)
            for name in ("fp32", "fp16")
        )
        for name, tensor in half.state_dict().items():
            assert torch.equal(single.state_dict()[name].to(tensor.dtype), tensor)

    @pytest.mark.parametrize("dtype", ["float16", "int8", "", 16, torch.float64, torch.int8])
    def test_no_such_precision(self, dtype: Any) -> None:
        for make in (create_model, create_backbones):
            with pytest.raises(InputError, match="dtype must be one of fp32, bf16, fp16, not "):
                make("regionspot_mini", dtype=dtype)

    @pytest.mark.parametrize("device", ["cuda:99", "abacus", 3.5])
    def test_no_such_device(self, device: Any) -> None:
        for make in (create_model, create_backbones):
            with pytest.raises(InputError, match=f"the device {device} cannot be used here"):
                make("regionspot_mini", device=device)

    def test_names_devices_and_types(self) -> None:
        sam, clip = create_backbones(
            "regionspot_mini", device=torch.device("cpu"), dtype=torch.bfloat16
        )
        assert {sam.sam.device.type, clip.image_mean.device.type} == {"cpu"}
        assert clip.clip.visual.conv1.weight.dtype == torch.bfloat16


class TestPipelines:
    def test_towers_alone(self, predictors: dict[str, RegionPredictor], world: World) -> None:
        pipeline = pipeline_from_backbones(
            *create_backbones("regionspot_mini", dtype="bf16"), "regionspot_mini"
        )
        assert pipeline.precision == "bf16"
        whole = predictors["bf16"].pipeline
        assert pipeline.sam_fingerprint() == whole.sam_fingerprint()
        assert pipeline.clip_fingerprint() == whole.clip_fingerprint()
        expected = predictors["bf16"].encode(world.pictures[0])
        found = RegionPredictor(pipeline).encode(world.pictures[0])
        np.testing.assert_array_equal(found.patch_tokens, expected.patch_tokens)

    def test_fingerprints_tell_precisions_apart(self, models: dict[str, RegionSpot]) -> None:
        prints = {name: graph_fingerprints(model) for name, model in models.items()}
        for graph in (
            "sam_image_encoder",
            "clip_image_encoder",
            "region_head",
            "clip_text_encoder",
        ):
            assert len({of_model(graph) for of_model in prints.values()}) == len(models)

    def test_fingerprints_of_single_precision_are_those_in_users_caches(
        self, models: dict[str, RegionSpot]
    ) -> None:
        assert {
            graph: graph_fingerprints(models["fp32"])(graph)[:8] for graph in FINGERPRINTS
        } == FINGERPRINTS

    @pytest.mark.parametrize(
        ("convert", "found"),
        [
            (
                lambda model: model.double(),
                "float64; it can work in float32, bfloat16 or float16 throughout: call m",
            ),
            (
                lambda model: model.clip.half(),
                r"float32 \(SAM's image encoder\), float16 \(CLIP's image tower\), ",
            ),
            (
                lambda model: model.head.bfloat16(),
                r"float32 \(CLIP's text tower\), bfloat16 \(the head\), ",
            ),
            (
                lambda model: model.sam.sam.mask_decoder.half(),
                r"float16 and float32 \(SAM's decoder\)",
            ),
        ],
    )
    def test_mixed_and_unknown_precisions_are_named(
        self, models: dict[str, RegionSpot], convert: Callable[[RegionSpot], Any], found: str
    ) -> None:
        model = copy.deepcopy(models["fp32"])
        convert(model)
        for make in (pipeline_from_model, RegionPredictor):
            with pytest.raises(InputError, match=f"the model has weights in .*{found}"):
                make(model)

    def test_a_model_that_is_converted_afterwards_is_refused(
        self, models: dict[str, RegionSpot], words: Vocabulary, world: World
    ) -> None:
        model = copy.deepcopy(models["fp32"])
        predictor = RegionPredictor(model).set_image(world.pictures[0])
        pipeline, mask = predictor.pipeline, np.ones((1, *world.pictures[0].shape[:2]), bool)
        model.bfloat16()
        with pytest.raises(
            InputError, match="encoded by another model, or by other weights, precision"
        ):
            predictor.predict(boxes=world.boxes[0], vocabulary=words)
        for ask in (
            lambda: predictor.predict(world.pictures[0], boxes=world.boxes[0], vocabulary=words),
            lambda: predictor.predict(world.pictures[0], masks=mask, vocabulary=words),
            lambda: pipeline.encode_clip(np.zeros((1, 192, 192, 3), np.uint8)),
        ):
            with pytest.raises(
                InputError,
                match="converted after this pipeline was made of it in fp32: make another",
            ):
                ask()

    def test_the_graph_of_everything_knows_one_mask_token(
        self, models: dict[str, RegionSpot]
    ) -> None:
        single = models["fp32"]
        head = RegionHead(
            single.sam.token_dim,
            single.clip.width,
            single.clip.embed_dim,
            num_layers=1,
            multimask=True,
        )
        model = RegionSpot(single.sam, single.clip, head)
        graph_module(model, "region_head")
        with pytest.raises(
            InputError, match="region_recognizer reads SAM's single-mask token, and this head was"
        ):
            graph_module(model, "region_recognizer")


FINGERPRINTS = {
    "sam_image_encoder": "b84f8be7",
    "clip_image_encoder": "201d345d",
    "region_head": "491562a1",
    "clip_text_encoder": "0b3e7886",
}
"""Beginnings of those of regionspot_mini: caches and manifests hold them."""


class TestAutocast:
    def test_a_predictor_works_in_the_precision_of_its_model(
        self, models: dict[str, RegionSpot], words: Vocabulary, world: World
    ) -> None:
        picture, boxes = world.pictures[0], world.boxes[0][:2]
        mask = np.ones((1, *picture.shape[:2]), bool)

        def ask() -> np.ndarray:
            predictor = RegionPredictor(models["fp32"]).set_image(picture)
            return predictor.predict(
                boxes=boxes, points=[[9, 9]], masks=mask, vocabulary=words
            ).top_scores

        expected = ask()
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.warns(UserWarning, match="autocast has no effect on"),
        ):
            np.testing.assert_array_equal(ask(), expected)

    def test_words_are_never_cached_in_another_precision(
        self, models: dict[str, RegionSpot]
    ) -> None:
        clip = models["fp32"].clip
        with torch.autocast("cpu", torch.bfloat16):
            found = clip.encode_text(WORDS)
        assert torch.equal(found, clip.encode_text(WORDS))

    @torch.inference_mode()
    def test_modules_work_within_it(
        self, tiny_sam: Sam, tiny_clip: CLIP, generator: torch.Generator
    ) -> None:
        sam, clip = SamBackbone(tiny_sam), ClipBackbone(tiny_clip)
        model = RegionSpot(sam, clip, RegionHead(32, 48, 24, feedforward_dim=8)).eval()
        images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator)
        points, labels = torch.rand(2, 5, 3, 2, generator=generator) * 64, torch.ones(2, 5, 3).int()
        masks = torch.randn(2, 5, 1, 32, 32, generator=generator)

        def run() -> list[torch.Tensor]:
            embeddings = sam.encode_image(images, torch.tensor([[64, 64], [40, 64]]))
            tokens = sam.mask_tokens(embeddings, points, labels).tokens
            drawn, _ = sam.low_res_masks(embeddings, points, labels, True)
            prompted, _ = sam.low_res_masks(embeddings, points, labels, False, masks)
            patches = clip.encode_image(images[..., ::2, ::2])
            return [
                tokens,
                drawn,
                prompted,
                model.classify(tokens[:, :, 0], patches, torch.eye(24)[:3]),
            ]

        expected = run()
        with torch.autocast("cpu", torch.bfloat16):
            found = run()
        for one, other in zip(expected, found, strict=True):
            error = (one - other.float()).square().mean() / one.square().mean()
            assert error.sqrt() < 0.03

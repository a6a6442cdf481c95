"""The evaluator on a small world of random pictures, with the mini architecture and random
weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import InputError
from regionspot.evaluation.baselines import (
    CropSetting,
    PoolingSetting,
    crop_embedder,
    pooling_embedder,
)
from regionspot.evaluation.batches import BatchEncoder, load_image
from regionspot.evaluation.detections import Detections
from regionspot.evaluation.evaluator import evaluate, evaluate_methods
from regionspot.evaluation.methods import METHODS, head_of
from regionspot.evaluation.proposals import Proposals, ground_truth_proposals
from regionspot.masks import decode_rle, encode_rle
from regionspot.modeling.pipelines import pipeline_from_model
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.predictor import RegionPredictor
from regionspot.structures import Vocabulary

SIZES = ((90, 70), (64, 64), (50, 100), (120, 80), (60, 60))  # width, height
BOXES: tuple[list[list[float]], ...] = (  # xywh of each image's objects
    [[5, 5, 40, 30], [30, 20, 50, 45], [60, 2, 20, 20]],
    [[10, 10, 30, 40]],
    [],
    [[0, 0, 120, 80], [70.5, 30.25, 20, 20]],
    [[20, 20, 3, 3], [5, 30, 50, 20], [1, 1, 20, 20], [40, 5, 15, 40]],
)
NUM_OBJECTS = sum(map(len, BOXES))


@pytest.fixture(scope="module")
def model() -> RegionSpot:
    return create_model("regionspot_mini", random_weights=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Five pictures, one empty; every object is of a class of its own, and a crowd lies over the
    second picture.
    """
    directory = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, ((width, height), boxes) in enumerate(zip(SIZES, BOXES, strict=True), start=1):
        colours = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((width, height)).save(directory / f"{image_id}.png")
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height}
        )
        for box in boxes:
            mask = np.zeros((height, width), bool)
            mask[int(box[1]) : int(box[1] + box[3]), int(box[0]) : int(box[0] + box[2])] = True
            number = len(annotations) + 1
            entry = {"id": number, "image_id": image_id, "category_id": 10 * number, "bbox": box}
            annotations.append(
                entry | {"area": float(mask.sum()), "segmentation": encode_rle(mask)}
            )
    everything = set(range(10, 10 * NUM_OBJECTS + 1, 10))
    for image in images:
        shown = {a["category_id"] for a in annotations if a["image_id"] == image["id"]}
        image |= {"neg_category_ids": sorted(everything - shown), "not_exhaustive_category_ids": []}
    crowd = {
        "id": 100,
        "image_id": 2,
        "category_id": 10,
        "bbox": [0, 0, 64, 64],
        "iscrowd": 1,
        "area": 4096,
    }
    annotations.append(crowd | {"segmentation": encode_rle(np.ones((64, 64), bool))})
    categories = [
        {"id": i, "name": f"thing {i}", "frequency": "f", "novel": i > 80}
        for i in sorted(everything)
    ]
    path = directory / "data.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return CocoDataset.load(path)


@pytest.fixture(scope="module")
def proposals(dataset: CocoDataset) -> Proposals:
    return ground_truth_proposals(dataset)


@pytest.fixture(scope="module")
def vocabulary(dataset: CocoDataset, model: RegionSpot) -> Vocabulary:
    embeddings = (
        np.random.default_rng(1).normal(size=(NUM_OBJECTS, model.clip.embed_dim)).astype(np.float32)
    )
    return Vocabulary(
        dataset.class_names, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    )


def scores_of(detections: Detections, image_id: int, num_regions: int) -> np.ndarray:
    """(num_regions, V) of one image, regions in the order of their boxes' corners."""
    of_image = detections.image_ids == image_id
    boxes, scores = detections.boxes[of_image], detections.scores[of_image]
    order = np.lexsort([detections.category_ids[of_image], *boxes.T])
    return scores[order].reshape(num_regions, NUM_OBJECTS)


@pytest.mark.parametrize("method", METHODS)
def test_vocabulary_of_the_regions_themselves_is_perfect(
    model: RegionSpot,
    dataset: CocoDataset,
    proposals: Proposals,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With each object's own embedding as its class's text embedding nothing is mistaken, but by
    the control.
    """
    # random weights embed all regions much alike
    monkeypatch.setattr(type(model.clip), "logit_scale", 1e5)
    pipeline = pipeline_from_model(model)
    score = METHODS[method].start(pipeline, model)
    axes = np.eye(model.clip.embed_dim, dtype=np.float32)
    encoder = BatchEncoder(pipeline, masks=METHODS[method].needs_masks)
    embeddings = np.zeros((NUM_OBJECTS, model.clip.embed_dim), np.float32)
    position = 0
    for record in sorted(dataset.images, key=lambda image: image.id):
        boxes = proposals.boxes[record.id]
        if len(boxes):
            image = load_image(dataset, record, boxes, model.sam.image_size, model.clip.image_size)
            cosines_with_axes = score(encoder.encode([image]), axes)[0]  # the embeddings, scaled
            embeddings[position : position + len(boxes)] = cosines_with_axes
            position += len(boxes)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    own = Vocabulary(dataset.class_names, embeddings)
    metrics, detections = evaluate(
        model, dataset, own, proposals, method, "coco", batch_size=3, progress=False
    )
    if method == "constant_token":
        assert metrics["AP"] < 90
    else:
        assert [metrics[name] for name in ("AP", "AP_base", "AP_novel")] == pytest.approx([100] * 3)
    assert len(detections) == sum(len(boxes) * NUM_OBJECTS for boxes in BOXES)


@pytest.mark.parametrize(
    "method", ["head", "clip_crops", "roi_pooling", "mask_pooling", "head_and_crops"]
)
def test_batches_change_nothing(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    method: str,
) -> None:
    one = evaluate(model, dataset, vocabulary, proposals, method, batch_size=1, progress=False)[1]
    four = evaluate(model, dataset, vocabulary, proposals, method, batch_size=4, progress=False)[1]
    for image_id, boxes in enumerate(BOXES, start=1):
        first, second = (scores_of(detections, image_id, len(boxes)) for detections in (one, four))
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_scores_are_the_models_own(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    detections = evaluate(model, dataset, vocabulary, proposals, progress=False)[1]
    record = dataset.images[0]
    image = load_image(
        dataset, record, proposals.boxes[1], model.sam.image_size, model.clip.image_size
    )
    batch = BatchEncoder(pipeline_from_model(model)).encode([image])
    assert batch.mask_tokens is not None and batch.patch_tokens is not None
    tokens = batch.mask_tokens[:, :, 0]
    inputs = [
        torch.from_numpy(array) for array in (tokens, batch.patch_tokens, vocabulary.embeddings)
    ]
    with torch.inference_mode():
        expected = model.classify(*inputs)[0].softmax(-1).numpy()
    order = np.lexsort(proposals.boxes[1].T)
    np.testing.assert_allclose(scores_of(detections, 1, 3), expected[order], atol=1e-5)
    assert (np.diff(detections.scores[detections.image_ids == 1]) <= 0).all()


def test_methods_together_encode_each_image_once(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = {"sam": 0, "clip": 0}

    def counting(name: str, encode: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def count(images: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            counts[name] += len(images)
            return encode(images, *rest)

        return count

    monkeypatch.setattr(model.sam, "encode_image", counting("sam", model.sam.encode_image))
    monkeypatch.setattr(model.clip, "encode_image", counting("clip", model.clip.encode_image))
    results = evaluate_methods(
        model,
        dataset,
        vocabulary,
        proposals,
        ["head", "roi_pooling", "constant_token"],
        batch_size=2,
        progress=False,
    )
    assert list(results) == ["head", "roi_pooling", "constant_token"]
    assert counts == {"sam": 4, "clip": 4}  # the picture without regions is not encoded at all
    evaluate_methods(model, dataset, vocabulary, proposals, ["clip_crops"], progress=False)
    assert counts == {"sam": 4, "clip": 4 + NUM_OBJECTS}


def test_constant_token_tells_no_regions_apart(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    detections = evaluate(
        model, dataset, vocabulary, proposals, "constant_token", batch_size=2, progress=False
    )[1]
    scores = scores_of(detections, 5, 4)
    np.testing.assert_allclose(scores, np.broadcast_to(scores[:1], scores.shape), atol=1e-5)


def test_another_models_head_scores_the_same_encoded_images(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    other = create_model("regionspot_mini")
    beside = RegionSpot(model.sam, model.clip, other.head)
    methods = {"head": METHODS["head"], "other": head_of(beside, "another head")}
    together = evaluate_methods(model, dataset, vocabulary, proposals, methods, progress=False)
    alone = evaluate(beside, dataset, vocabulary, proposals, progress=False)[1]
    np.testing.assert_allclose(
        scores_of(together["other"][1], 5, 4), scores_of(alone, 5, 4), atol=1e-6
    )
    assert abs(scores_of(together["head"][1], 5, 4) - scores_of(alone, 5, 4)).max() > 1e-3
    assert together["other"][0]["protocol"]["method"] == "another head"


def test_masks_are_shared_and_judged(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    metrics, detections = evaluate(
        model, dataset, vocabulary, proposals, masks=True, progress=False
    )
    assert set(metrics["segm"]) == set(metrics["one_label"]) < set(metrics)
    assert detections.masks is not None
    sizes = {image.id: (image.height, image.width) for image in dataset.images}
    by_region: dict[tuple[float, ...], int] = {}
    for image_id, box, mask in zip(
        detections.image_ids, detections.boxes, detections.masks, strict=True
    ):
        assert decode_rle(mask).shape == sizes[image_id]
        assert by_region.setdefault((image_id, *box), id(mask)) == id(mask)
    assert len(by_region) == NUM_OBJECTS
    assert "segmentation" in detections.to_coco()[0]


def test_detector_scores_multiply(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    halves = {image_id: np.full(len(boxes), 0.5) for image_id, boxes in proposals.boxes.items()}
    plain, plain_detections = evaluate(model, dataset, vocabulary, proposals, progress=False)
    half, detections = evaluate(
        model, dataset, vocabulary, replace(proposals, scores=halves), progress=False
    )
    np.testing.assert_allclose(detections.scores, plain_detections.scores / 2)
    assert half["protocol"]["scores"] == f"softmax over {NUM_OBJECTS} classes × detector score"
    assert {**half, "protocol": None} == {**plain, "protocol": None}


def test_no_proposals_at_all(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary
) -> None:
    nothing = Proposals("none", {image.id: np.zeros((0, 4)) for image in dataset.images}, None)
    metrics, detections = evaluate(model, dataset, vocabulary, nothing, masks=True, progress=False)
    assert (metrics["AP"], metrics["segm"]["AP"], len(detections)) == (0, 0, 0)


def test_the_protocol_is_stated(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    assert evaluate(model, dataset, vocabulary, proposals, progress=False)[0]["protocol"] == {
        "model": "regionspot_mini",
        "runtime": "torch",
        "precision": "fp32",
        "method": "RegionSpot's head",
        "tuned_on": None,
        "mask_token": "SAM's single-mask token",
        "rules": "lvis",
        "proposals": "ground-truth boxes",
        "boxes_dropped": 0,
        "classes": NUM_OBJECTS,
        "scores": f"softmax over {NUM_OBJECTS} classes",
        "shared_names": 0,
        "pairs_per_image": 900,
        "detections_judged": "300 per image",
        "images": 5,
        "regions": NUM_OBJECTS,
        "masks_without_pixels": 0,
        "masks_beside_boxes": 0,
        "images_skipped": [],
    }


def test_training_mode_is_left_as_it_was(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    expected = evaluate(model, dataset, vocabulary, proposals, progress=False)[1].scores
    model.train()
    try:
        actual = evaluate(model, dataset, vocabulary, proposals, progress=False)[1].scores
        assert model.head.training and not model.sam.training
    finally:
        model.eval()
    np.testing.assert_array_equal(actual, expected)


def test_whole_image_box_gives_clips_own_embedding_of_it(
    model: RegionSpot, dataset: CocoDataset
) -> None:
    record = dataset.images[3]
    whole = np.array([[0.0, 0.0, record.width, record.height]])
    image = load_image(dataset, record, whole, model.sam.image_size, model.clip.image_size)
    batch = BatchEncoder(pipeline_from_model(model)).encode([image])
    assert batch.patch_tokens is not None
    patch_tokens = torch.from_numpy(batch.patch_tokens)
    with torch.inference_mode():
        torch.testing.assert_close(
            crop_embedder(model, CropSetting())(batch)[0],
            model.clip.pool(patch_tokens),
            rtol=1e-4,
            atol=1e-5,
        )
        mean = patch_tokens[:, 1:].mean(1, keepdim=True)
        torch.testing.assert_close(
            pooling_embedder(model, PoolingSetting())(batch)[0],
            model.clip.pool(mean.expand(-1, 2, -1)),
            rtol=1e-4,
            atol=1e-5,
        )


def test_unfit_input_is_named(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    with pytest.raises(
        InputError, match=r"unknown methods \['guess'\]: choose from head, clip_crops"
    ):
        evaluate(model, dataset, vocabulary, proposals, "guess")
    with pytest.raises(InputError, match="batch_size must be 1 or more"):
        evaluate(model, dataset, vocabulary, proposals, batch_size=0)
    renamed = Vocabulary(("cup", *vocabulary.names[1:]), vocabulary.embeddings)
    with pytest.raises(
        InputError, match=r"the vocabulary has 10 names .* 10 class names; they differ from index 0"
    ):
        evaluate(model, dataset, renamed, proposals)
    shorter = Vocabulary(vocabulary.names[:4], vocabulary.embeddings[:4])
    with pytest.raises(InputError, match="they differ from index 4"):
        evaluate(model, dataset, shorter, proposals)
    with pytest.raises(InputError, match="nothing to evaluate against"):
        evaluate(model, replace(dataset, images=(), annotations_by_image={}), vocabulary, proposals)
    with pytest.raises(InputError, match="no entry for the images 1"):
        others = {image_id: boxes for image_id, boxes in proposals.boxes.items() if image_id != 1}
        evaluate(model, dataset, vocabulary, replace(proposals, boxes=others))


def test_annotations_that_cannot_be_judged_are_named_before_anything_is_computed(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BatchEncoder, "encode", lambda *_: pytest.fail("computed"))
    unlisted = replace(
        dataset, images=tuple(replace(image, neg_category_ids=None) for image in dataset.images)
    )
    with pytest.raises(InputError, match="image 1 has no neg_category_ids"):
        evaluate(model, unlisted, vocabulary, proposals, progress=False)
    boxes_alone = {
        image_id: tuple(replace(annotation, segmentation=None) for annotation in annotations)
        for image_id, annotations in dataset.annotations_by_image.items()
    }
    with pytest.raises(InputError, match="annotation 1 has no segmentation"):
        without_masks = replace(dataset, annotations_by_image=boxes_alone)
        evaluate(model, without_masks, vocabulary, proposals, masks=True, progress=False)
    with pytest.raises(InputError, match="unknown rules 'voc'"):
        evaluate(model, dataset, vocabulary, proposals, rules="voc", progress=False)  # type: ignore[arg-type]


def test_masks_and_tokens_take_one_pass_of_the_decoder(
    model: RegionSpot, dataset: CocoDataset, proposals: Proposals, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (model.sam.image_size, model.clip.image_size)
    images = [
        load_image(dataset, dataset.images[index], proposals.boxes[index + 1], *sizes)
        for index in (0, 1)
    ]
    pipeline = pipeline_from_model(model)
    graphs: list[str] = []

    @contextmanager
    def observer(stage: str) -> Iterator[None]:
        graphs.append(stage)
        yield

    monkeypatch.setattr(pipeline, "observer", observer)
    with_masks = BatchEncoder(pipeline, masks=True).encode(images)
    encoders = ["sam_image_encoder", "sam_token_decoder_image"]
    assert graphs == [*encoders, "sam_mask_decoder", "clip_image_encoder"]
    without = BatchEncoder(pipeline).encode(images)
    assert graphs[4:] == [*encoders, "sam_token_decoder_prompts", "clip_image_encoder"]
    assert (
        with_masks.mask_tokens is not None
        and without.mask_tokens is not None
        and with_masks.masks is not None
    )
    assert [len(masks) for masks in with_masks.masks] == [3, 1]
    valid = without.valid
    np.testing.assert_allclose(
        with_masks.mask_tokens[valid], without.mask_tokens[valid], rtol=1e-4, atol=1e-5
    )


def test_unfit_images_are_named(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    tmp_path: Path,
) -> None:
    other_size = (replace(dataset.images[0], width=91), *dataset.images[1:])
    with pytest.raises(
        InputError, match=r"1\.png is 90 x 70 pixels .* annotations are for 91 x 70"
    ):
        evaluate(model, replace(dataset, images=other_size), vocabulary, proposals, progress=False)
    with pytest.raises(
        InputError,
        match=r"4 of 4 pictures cannot be used, .*--skip-unreadable 4: .* does not exist",
    ):
        evaluate(
            model, replace(dataset, image_root=tmp_path), vocabulary, proposals, progress=False
        )


def test_bad_pictures_are_found_before_anything_is_computed_and_can_be_left_out(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for source in dataset.image_root.glob("*.png"):
        content = source.read_bytes()
        (tmp_path / source.name).write_bytes(
            content[: len(content) // 2] if source.name == "2.png" else content
        )
    (tmp_path / "4.png").unlink()
    damaged = replace(dataset, image_root=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError) as found:
        patch.setattr(BatchEncoder, "encode", lambda *_: pytest.fail("computed"))
        evaluate(model, damaged, vocabulary, proposals, progress=False, skip_unreadable=1)
    assert "2 of 4 pictures cannot be used, more than --skip-unreadable 1 allows" in str(
        found.value
    )
    assert all(str(tmp_path / name) in str(found.value) for name in ("2.png", "4.png"))
    metrics, detections = evaluate(
        model, damaged, vocabulary, proposals, progress=False, skip_unreadable=2
    )
    protocol = metrics["protocol"]
    assert (protocol["images"], protocol["regions"], len(protocol["images_skipped"])) == (3, 7, 2)
    assert set(detections.image_ids.tolist()) == {1, 5}
    kept = tuple(image for image in dataset.images if image.id in (1, 3, 5))
    annotations = {image.id: dataset.annotations_by_image[image.id] for image in kept}
    rest = replace(dataset, images=kept, annotations_by_image=annotations)
    assert {**metrics, "protocol": None} == {
        **evaluate(model, rest, vocabulary, proposals, progress=False)[0],
        "protocol": None,
    }


def test_a_head_for_three_tokens_is_evaluated_on_three_tokens(
    dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    """As prediction names each of SAM's readings; of each region the one with the highest predicted
    IoU counts.
    """
    model = create_model("regionspot_mini", random_weights=0)
    model.head.multimask = True
    estimate = model.sam.sam.mask_decoder.iou_prediction_head.layers[-1]
    with torch.no_grad():  # otherwise one reading is the best everywhere
        estimate.weight.copy_(
            torch.randn(estimate.weight.shape, generator=torch.Generator().manual_seed(2))
        )
        estimate.bias.zero_()
    metrics, detections = evaluate(
        model, dataset, vocabulary, proposals, masks=True, progress=False
    )
    assert "highest predicted IoU" in metrics["protocol"]["mask_token"]
    assert detections.masks is not None
    record = dataset.images[4]
    found = (
        RegionPredictor(model)
        .set_image(dataset.image_path(record))
        .predict(boxes=proposals.boxes[5], vocabulary=vocabulary, top_k=NUM_OBJECTS, multimask=True)
    )
    assert found.iou_predictions is not None and found.masks is not None
    best = found.iou_predictions.reshape(4, 3).argmax(1) + 3 * np.arange(
        4
    )  # (4,) rows of the readings that count
    assert len(set(best % 3)) > 1  # otherwise a wrong choice could pass
    expected = np.empty((4, NUM_OBJECTS))
    np.put_along_axis(expected, found.top_class_ids[best], found.top_scores[best], axis=1)
    order = np.lexsort(proposals.boxes[5].T)
    np.testing.assert_allclose(scores_of(detections, 5, 4), expected[order], atol=1e-5)
    rows = [
        (index, box)
        for index, box in enumerate(detections.boxes.tolist())
        if detections.image_ids[index] == 5
    ]
    for region, box in enumerate(proposals.boxes[5].tolist()):
        drawn = next(detections.masks[index] for index, of_row in rows if of_row == box)
        wanted, actual = decode_rle(found.masks[best[region]]), decode_rle(drawn)
        assert (wanted == actual).mean() > 0.99

    without_masks = evaluate(model, dataset, vocabulary, proposals, progress=False)[1]
    np.testing.assert_allclose(
        scores_of(without_masks, 5, 4), scores_of(detections, 5, 4), atol=1e-5
    )
    control = evaluate(model, dataset, vocabulary, proposals, "constant_token", progress=False)[1]
    same = scores_of(control, 5, 4)
    np.testing.assert_allclose(same, np.broadcast_to(same[:1], same.shape), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    model: RegionSpot,
    method: str,
) -> None:
    half = create_model("regionspot_mini", random_weights=0, dtype="bf16")
    metrics, found = evaluate(
        half, dataset, vocabulary, proposals, method, masks=True, progress=False
    )
    expected = evaluate(model, dataset, vocabulary, proposals, method, progress=False)[1]
    assert metrics["protocol"]["precision"] == "bf16"
    np.testing.assert_allclose(scores_of(found, 5, 4), scores_of(expected, 5, 4), atol=0.05)


def test_categories_of_one_name_each_get_the_score_of_their_word(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    twins = tuple(replace(c, name="thing 10") if c.id == 50 else c for c in dataset.categories)
    shared = replace(dataset, categories=twins)
    assert len(shared.class_names) == NUM_OBJECTS - 1
    kept = [index for index, name in enumerate(vocabulary.names) if name != "thing 50"]
    words = Vocabulary(shared.class_names, vocabulary.embeddings[kept])
    metrics, detections = evaluate(model, shared, words, proposals, progress=False)
    assert metrics["protocol"]["shared_names"] == 1
    assert metrics["protocol"]["scores"] == f"softmax over {NUM_OBJECTS - 1} classes"
    scores = scores_of(detections, 5, 4)  # in the order of category ids
    np.testing.assert_array_equal(scores[:, 0], scores[:, 4])
    np.testing.assert_allclose(scores.sum(1) - scores[:, 4], 1, atol=1e-5)


def test_ids_of_the_file_are_kept_in_the_results(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    tmp_path: Path,
) -> None:
    expected, detections = evaluate(model, dataset, vocabulary, proposals, progress=False)
    content = json.loads(dataset.path.read_text())
    names = {image["id"]: f"{image['id']:016x}" for image in content["images"]}
    for image in content["images"]:
        image["id"] = names[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    hexadecimal = CocoDataset.load(path, dataset.image_root)
    regions = ground_truth_proposals(hexadecimal)
    found, others = evaluate(model, hexadecimal, vocabulary, regions, progress=False)
    assert found == expected
    assert others.to_coco() == [
        d | {"image_id": names[d["image_id"]]} for d in detections.to_coco()
    ]


def with_crowds_alone(dataset: CocoDataset) -> CocoDataset:
    crowds = {
        image_id: tuple(replace(annotation, iscrowd=True) for annotation in annotations)
        for image_id, annotations in dataset.annotations_by_image.items()
    }
    return replace(dataset, annotations_by_image=crowds)


def test_nothing_but_crowds_is_said(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    with pytest.raises(InputError, match="all 11 annotations are crowds"):
        evaluate(model, with_crowds_alone(dataset), vocabulary, proposals, rules="coco")


def test_by_lvis_rules_crowds_are_objects(
    model: RegionSpot, dataset: CocoDataset, vocabulary: Vocabulary
) -> None:
    crowded = with_crowds_alone(dataset)
    found, _ = evaluate(model, crowded, vocabulary, ground_truth_proposals(crowded, crowds=True))
    wanted, _ = evaluate(model, dataset, vocabulary, ground_truth_proposals(dataset, crowds=True))
    assert (
        found["AP"] == wanted["AP"]
        and found["protocol"]["regions"] == wanted["protocol"]["regions"] > 0
    )


@pytest.mark.parametrize("rules", ["lvis", "coco"])
def test_no_categories_are_said(
    model: RegionSpot,
    dataset: CocoDataset,
    vocabulary: Vocabulary,
    proposals: Proposals,
    rules: Any,
) -> None:
    with pytest.raises(InputError, match="has no categories"):
        evaluate(model, replace(dataset, categories=()), vocabulary, proposals, rules=rules)


def test_nan_is_not_taken_for_an_answer(
    dataset: CocoDataset, vocabulary: Vocabulary, proposals: Proposals
) -> None:
    broken = create_model("regionspot_mini", random_weights=0)
    with torch.no_grad():
        next(iter(broken.head.parameters())).fill_(float("nan"))
    with pytest.raises(InputError, match=r"method 'head' gives NaN for image 5\.png"):
        evaluate(broken, dataset, vocabulary, proposals, progress=False)

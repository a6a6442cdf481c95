"""The training loop on a tiny run: what it writes, what it leaves alone, and that a killed run ends
the same.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from regionspot.config import TrainConfig, config_to_yaml
from regionspot.data import feature_cache
from regionspot.data.extraction import read_upright, stack_images
from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.checkpoint import load_head, read_head_metadata
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.losses import region_logits, sigmoid_focal_loss
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone
from regionspot.structures import Prompts
from regionspot.training import setup as training_setup
from regionspot.training.loop import prepare_batches, train
from regionspot.training.resume import read_checkpoint
from regionspot.training.setup import Setup
from regionspot.training.trainer import StepReport, Trainer
from regionspot.transforms import ClipTransform, SamTransform

MakeConfig = Callable[..., TrainConfig]
Backbones = tuple[SamBackbone, ClipBackbone]
SCRIPT = Path(__file__).with_name("train_and_die.py")


def test_a_run_leaves_head_log_configuration_and_the_newest_checkpoints(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    config = make_config(steps=7)
    reports: list[StepReport] = []
    result = train(config, backbones=backbones, on_step=reports.append)

    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6, 7]
    assert (result.steps, result.images, result.train_seconds > 0) == (7, 10, True)
    assert sorted(p.name for p in (result.run_directory / "checkpoints").iterdir()) == [
        "step_00000006",
        "step_00000007",
    ]
    assert (result.run_directory / "config.yaml").read_text() == config_to_yaml(config)
    lines = [
        json.loads(line)
        for line in (result.run_directory / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert lines[0].keys() == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "images_per_s",
        "eta_s",
    }
    assert lines[0]["loss"] == pytest.approx(
        np.mean([float(r.loss) for r in reports[:2]]), rel=1e-5
    )
    assert result.loss == lines[-1]["loss"]
    head = load_head(result.head_path)
    assert (head.token_dim, head.clip_width, head.embed_dim, head.feedforward_dim) == (
        128,
        192,
        128,
        32,
    )
    metadata = read_head_metadata(result.head_path)
    assert metadata["steps"] == 7 and str(result.run_directory) not in json.dumps(metadata)


def test_the_loss_falls_and_equals_the_model_run_by_hand(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    config = make_config(
        steps=60, batch_size=10, model={"dropout": 0.0}, optimizer={"learning_rate": 3e-3}
    )
    reports: list[StepReport] = []
    result = train(config, backbones=backbones, on_step=reports.append)
    assert float(reports[-1].loss) < 0.3 * float(reports[0].loss)

    # raw pictures through the finished head: the folded weights
    setup = Setup.from_config(config, backbones)
    model = RegionSpot(*backbones, load_head(result.head_path))
    text = torch.from_numpy(_text_embeddings(setup))
    losses = 0.0
    with torch.inference_mode():
        for image in range(len(setup.sets[0])):
            logits, classes = _classify(model, setup, image, text)
            losses += float(sigmoid_focal_loss(logits, classes))
    # the last step changes it a little
    assert losses / len(setup.sets[0]) == pytest.approx(float(reports[-1].loss), rel=2e-2)


def _text_embeddings(setup: Setup) -> np.ndarray[Any, np.dtype[np.float32]]:
    from regionspot.vocabulary import VocabularyEncoder

    return VocabularyEncoder(setup.clip).encode(setup.sets[0].class_names).embeddings


def _classify(
    model: RegionSpot, setup: Setup, index: int, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, N, V) and classes (1, N) of one image, without any cache."""
    training_set = setup.sets[0]
    image = read_upright(training_set.paths[index], (96, 128))
    regions = slice(training_set.offsets[index], training_set.offsets[index + 1])
    prompts = Prompts.from_boxes(training_set.boxes[regions])
    transform = SamTransform(model.sam.image_size)
    frame, size = transform.apply_image(image)
    embeddings = model.sam.encode_image(stack_images([frame]), torch.tensor([size]))
    points = torch.from_numpy(transform.apply_points(prompts.points, 96, 128))[None]
    tokens = model.sam.mask_tokens(
        embeddings, points, torch.from_numpy(prompts.labels)[None]
    ).tokens[:, :, 0]
    patches = model.clip.encode_image(
        stack_images([ClipTransform(model.clip.image_size).apply_image(image)])
    )
    return model.classify(tokens, patches, text), torch.from_numpy(training_set.class_ids[regions])[
        None
    ]


def test_frozen_towers_stay_as_they_are_and_checkpoints_hold_the_head_alone(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    before = [{k: v.clone() for k, v in tower.state_dict().items()} for tower in backbones]
    result = train(make_config(), backbones=backbones)
    for tower, old in zip(backbones, before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in tower.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in tower.parameters())
        assert not any(module.training for child in tower.children() for module in child.modules())
    names = set(load_head(result.head_path).state_dict())
    tensors = read_checkpoint(result.run_directory / "checkpoints" / "step_00000006").tensors
    assert {name.split(".")[0] for name in tensors} == {"head", "optimizer", "inputs"}
    assert {name.removeprefix("head.") for name in tensors if name.startswith("head.")} == names


@pytest.mark.parametrize("reduction", ["per_image", "per_region"])
def test_a_step_equals_the_recipe_written_out(
    make_config: MakeConfig, backbones: Backbones, reduction: str
) -> None:
    config = make_config(standardize_inputs=False, model={"dropout": 0.0}, loss_reduction=reduction)
    setup = Setup.from_config(config, backbones)
    with prepare_batches(setup) as batches:
        trainer = Trainer(setup, batches)
        head = setup.build_head()
        report = trainer.step(0)
        batch = batches.batch(0)
    logits = region_logits(
        head(batch.mask_tokens, batch.patch_tokens, batch.valid),
        trainer.text_embeddings[0],
        setup.clip.logit_scale,
    )
    target = F.one_hot(batch.class_ids, 3).float()
    probability = logits.sigmoid()
    p_t = torch.where(target > 0, probability, 1 - probability)
    a_t = torch.where(target > 0, 0.25, 0.75)
    focal = -a_t * (1 - p_t) ** 2 * p_t.log()  # (B, N, V)
    # B tensors of n regions
    images = [row[own].sum(-1) for row, own in zip(focal, batch.valid, strict=True)]
    assert len({len(image) for image in images}) > 1
    loss = (
        torch.stack([i.mean() for i in images]).mean()
        if reduction == "per_image"
        else torch.cat(images).mean()
    )
    assert float(report.loss) == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    assert float(report.grad_norm) == pytest.approx(float(norm), rel=1e-3)
    torch.optim.AdamW(head.parameters(), lr=1e-3 * 0.01, weight_decay=1e-4).step()
    for trained, expected in zip(trainer.head.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=0, atol=2e-6)


def test_several_data_sets_have_their_own_vocabulary_and_turn(
    make_config: MakeConfig, backbones: Backbones, tmp_path: Path, data: Path
) -> None:
    other = json.loads(data.read_text())
    other["categories"] = [{"id": c["id"], "name": f"{c['name']} two"} for c in other["categories"]]
    other["categories"].append({"id": 99, "name": "a fourth"})
    path = data.with_name("other.json")
    path.write_text(json.dumps(other))
    sets = [
        {"name": "one", "annotations": str(data), "ratio": 2},
        {"name": "two", "annotations": str(path)},
    ]
    config = make_config(datasets=sets, steps=6)
    setup = Setup.from_config(config, backbones)
    with prepare_batches(setup) as batches:
        trainer = Trainer(setup, batches)
        order = [batches.batch(step).dataset for step in range(6)]
    assert [len(text) for text in trainer.text_embeddings] == [3, 4]
    assert sorted(order[:3]) == sorted(order[3:]) == [0, 0, 1]
    assert np.isfinite(train(config, backbones=backbones).loss)


@pytest.mark.parametrize("multimask", [False, True])
def test_augmentation_reads_the_pictures_and_keeps_the_cached_tokens(
    make_config: MakeConfig, backbones: Backbones, multimask: bool
) -> None:
    changes = {
        "augmentation": {},
        "features": {"multimask": multimask, "max_memory_gib": 0.0},
        "steps": 3,
    }
    result = train(make_config(**changes), backbones=backbones)
    assert np.isfinite(result.loss)
    setup = Setup.from_config(make_config(**changes), backbones)
    assert setup.caches[0].shape.patch_tokens is None
    with prepare_batches(setup) as batches:
        again, later, once_more = batches.batch(0), batches.batch(1), batches.batch(0)
    assert torch.equal(again.patch_tokens, once_more.patch_tokens)
    assert not torch.equal(again.patch_tokens, later.patch_tokens)
    assert again.mask_tokens.shape[1] % (3 if multimask else 1) == 0


def test_a_moving_average_is_saved_instead_of_the_weights(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    plain = load_head(train(make_config(name="plain"), backbones=backbones).head_path)
    averaged = load_head(
        train(make_config(name="ema", optimizer={"ema_decay": 0.9}), backbones=backbones).head_path
    )
    assert not torch.equal(plain.projector.weight, averaged.projector.weight)


@pytest.mark.parametrize("multimask", [False, True])
def test_a_head_knows_which_mask_tokens_it_was_trained_on(
    make_config: MakeConfig, backbones: Backbones, multimask: bool
) -> None:
    path = train(
        make_config(steps=2, features={"multimask": multimask}), backbones=backbones
    ).head_path
    assert load_head(path).multimask == read_head_metadata(path)["multimask"] == multimask
    other = {
        "standardize_inputs": False,
        "model": {"initial_head": str(path)},
        "features": {"multimask": not multimask},
    }
    with pytest.raises(ArtifactError, match=f"multimask {multimask} instead of {not multimask}"):
        Setup.from_config(make_config(name="other", **other), backbones).build_head()


def test_pytorch_extracts_in_half_precision_on_request(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    single, half = (
        Setup.from_config(make_config(features={"precision": precision}), backbones)
        for precision in ("fp32", "bf16")
    )
    assert [setup.extractor.pipeline.precision for setup in (single, half)] == ["fp32", "bf16"]
    assert single.caches[0].key != half.caches[0].key
    assert "features by torch in bf16" in half.describe()
    # the caller's are untouched
    assert {p.dtype for tower in backbones for p in tower.parameters()} == {torch.float32}
    maps = []
    for setup in (single, half):
        with prepare_batches(setup) as batches:
            maps.append(batches.batch(0).patch_tokens.flatten(1))
    assert not torch.equal(*maps)
    assert F.cosine_similarity(maps[0], maps[1]).min() > 0.99


def test_a_batch_takes_at_most_so_many_regions_of_an_image(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    for augmentation in (None, {"keep_cropped_regions": True}):
        setup = Setup.from_config(
            make_config(max_regions_per_image=2, augmentation=augmentation), backbones
        )
        with prepare_batches(setup) as batches:
            counts = torch.cat([batches.batch(step).valid.sum(1) for step in range(5)])
        assert setup.sets[0].counts.max() > 2 and counts.max() == 2
    assert np.isfinite(
        train(make_config(max_regions_per_image=1, steps=2), backbones=backbones).loss
    )


def test_stage_two_goes_on_from_a_head(make_config: MakeConfig, backbones: Backbones) -> None:
    first = train(make_config(name="one"), backbones=backbones).head_path
    changes = {
        "name": "two",
        "standardize_inputs": False,
        "model": {"initial_head": str(first), "dropout": 0.0},
    }
    setup = Setup.from_config(make_config(**changes), backbones)
    assert torch.equal(setup.build_head().projector.weight, load_head(first).projector.weight)
    wrong = Setup.from_config(
        make_config(**{**changes, "model": {"initial_head": str(first), "num_layers": 2}}),
        backbones,
    )
    with pytest.raises(ArtifactError, match="num_layers 1 instead of 2"):
        wrong.build_head()


def test_bf16_on_the_cpu_and_fp16_refused(make_config: MakeConfig, backbones: Backbones) -> None:
    assert np.isfinite(train(make_config(amp="bf16", steps=2), backbones=backbones).loss)
    with pytest.raises(InputError, match="amp=fp16 needs a GPU"):
        Setup.from_config(make_config(name="other", amp="fp16"), backbones)


def renamed(data: Path, *names: str) -> str:
    """The path of an annotation file with other class names."""
    content = json.loads(data.read_text())
    for category, name in zip(content["categories"], names, strict=True):
        category["name"] = name
    path = data.with_name(f"{'_'.join(names).replace(' ', '-')}.json")
    path.write_text(json.dumps(content))
    return str(path)


def test_categories_that_share_a_name_are_one_class(
    make_config: MakeConfig, backbones: Backbones, data: Path
) -> None:
    path = renamed(data, "red square", "red square", "blue square")
    config = make_config(steps=2, datasets=[{"name": "twice", "annotations": path}])
    setup = Setup.from_config(config, backbones)
    assert [vocabulary.names for vocabulary in setup.vocabularies] == [
        ("red square", "blue square")
    ]
    assert (
        "1 names stand for several categories each, and are one class each: 'red square'"
        in setup.describe()
    )
    assert np.isfinite(train(config, backbones=backbones).loss)


def test_names_that_mean_the_same_stop_a_run_before_anything_is_computed(
    make_config: MakeConfig, backbones: Backbones, data: Path, tmp_path: Path
) -> None:
    """Each would be the other's negative: the loss falls all the same, and the head is useless."""
    sets = {
        "name": "twins",
        "annotations": renamed(data, "red square", "red  square", "blue square"),
    }
    features = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(
        InputError, match=r"data set twins: .*'red square'.*'red  square'.*same_meaning=warn"
    ):
        train(make_config(datasets=[sets], features=features), backbones=backbones)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()
    allowed = make_config(datasets=[{**sets, "same_meaning": "warn"}], features=features, steps=2)
    with pytest.warns(UserWarning, match="look the same to this text encoder"):
        train(allowed, backbones=backbones)


def test_classes_marked_novel_are_left_out_on_request(
    make_config: MakeConfig, backbones: Backbones, data: Path
) -> None:
    content = json.loads(data.read_text())
    content["categories"][0]["novel"] = True
    path = data.with_name("novel.json")
    path.write_text(json.dumps(content))
    every, base = (
        Setup.from_config(
            make_config(datasets=[{"name": "n", "annotations": str(path), **more}]), backbones
        )
        for more in ({}, {"exclude": "novel"})
    )
    assert len(every.sets[0].class_names) == 3 and "nothing left out" in every.describe()
    assert "1 categories marked novel are trained on like all others" in every.describe()
    assert base.sets[0].class_names == ("green square", "blue square")
    left_out = base.sets[0].left_out["regions of excluded classes"]
    assert left_out > 0 and f"{left_out} regions of excluded classes" in base.describe()


def test_an_attempt_that_cannot_begin_leaves_nothing_and_does_not_block_the_corrected_one(
    make_config: MakeConfig, backbones: Backbones, tmp_path: Path
) -> None:
    missing = make_config(
        datasets=[{"name": "squares", "annotations": str(tmp_path / "typo.json")}]
    )
    too_large = make_config(
        model={"initial_head": str(tmp_path / "none")}, standardize_inputs=False
    )
    for config in (missing, too_large):
        with pytest.raises((InputError, ArtifactError)):
            train(config, backbones=backbones)
        assert not (tmp_path / "runs").exists()
    assert np.isfinite(train(make_config(steps=2), backbones=backbones).loss)


def test_space_for_all_caches_is_looked_at_before_any_is_filled(
    make_config: MakeConfig,
    backbones: Backbones,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sets = [{"name": name, "annotations": str(data)} for name in ("one", "two")]
    setup = Setup.from_config(
        make_config(datasets=sets, features={"cache_dir": str(tmp_path / "cache")}), backbones
    )
    one, both = (sum(c.num_bytes() for c in caches) for caches in (setup.caches[:1], setup.caches))
    free = feature_cache.FREE_SPACE_MARGIN + (one + both) // 2  # enough for each, not for both
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    caplog.set_level(logging.INFO, "regionspot")
    with (
        pytest.raises(InputError, match="the features of one and two need"),
        prepare_batches(setup),
    ):
        pass
    assert len(caplog.messages) == 2 and not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="the features of one and two need"):
        setup.describe_caches()


def test_random_numbers_of_other_devices_are_left_alone(
    make_config: MakeConfig, backbones: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    real = torch.random.fork_rng

    def fork_rng(**options: Any) -> Any:
        asked.append(options)
        return real(**options)

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    before = torch.get_rng_state()
    train(make_config(steps=2), backbones=backbones)
    assert asked and all(options == {"devices": []} for options in asked)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_no_number_stops_the_run(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    config = make_config(optimizer={"learning_rate": 1e30, "warmup_steps": 0}, steps=20)
    with pytest.raises(
        InputError, match=r"the loss is nan at step \d+: lower optimizer.learning_rate"
    ):
        train(config, backbones=backbones)


@pytest.mark.parametrize("broken", ["loss", "weight", "average"])
def test_what_is_not_finite_is_never_saved_over_good_checkpoints(
    make_config: MakeConfig, backbones: Backbones, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Step 6 goes wrong, between the lines of the log, and its checkpoint would be the only one
    kept.
    """
    config = make_config(
        steps=8,
        checkpoints={"every": 2, "keep": 1},
        logging={"every": 100},
        optimizer={"ema_decay": 0.5},
    )
    real = Trainer.step

    def step(self: Trainer, number: int) -> StepReport:
        report = real(self, number)
        if number != 5:
            return report
        if broken == "loss":
            return replace(report, loss=report.loss * np.nan)
        assert self.average is not None
        with torch.no_grad():
            (self.head if broken == "weight" else self.average.head).projector.bias[3] = np.inf
        return report

    monkeypatch.setattr(Trainer, "step", step)
    what = "the loss is nan" if broken == "loss" else "the state has infinite or NaN values"
    with pytest.raises(
        InputError, match=rf"{what}.* at step 6: lower .*newest good checkpoint is .*step_00000004$"
    ):
        train(config, backbones=backbones)
    checkpoints = Path(config.output_dir) / config.name / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000004"]
    tensors = read_checkpoint(checkpoints / "step_00000004").tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_run_is_not_overwritten_and_resume_needs_the_same_configuration(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    train(make_config(), backbones=backbones)
    with pytest.raises(InputError, match="--resume auto, choose another name"):
        train(make_config(), backbones=backbones)
    with pytest.raises(InputError, match=r"optimizer.weight_decay \(0.0001, now 0.1\)"):
        train(make_config(optimizer={"weight_decay": 0.1}), backbones=backbones, resume="auto")
    finished = train(make_config(logging={"every": 1}), backbones=backbones, resume="auto")
    assert np.isnan(finished.loss)  # no step was left


def test_a_run_of_more_steps_goes_on_as_if_it_had_been_asked_for_them_at_once(
    make_config: MakeConfig, backbones: Backbones
) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"schedule": "multistep", "milestones": [5], "ema_decay": 0.9}
    }
    whole = load_head(
        train(make_config(name="whole", steps=8, **changes), backbones=backbones).head_path
    ).state_dict()
    train(make_config(name="longer", steps=4, **changes), backbones=backbones)
    longer = train(
        make_config(name="longer", steps=8, **changes), backbones=backbones, resume="auto"
    )
    assert longer.steps == 8
    assert all(
        torch.equal(tensor, whole[name])
        for name, tensor in load_head(longer.head_path).state_dict().items()
    )
    with pytest.raises(InputError, match=r"steps \(8, now 4; steps may only grow\)"):
        train(make_config(name="longer", steps=4, **changes), backbones=backbones, resume="auto")
    train(make_config(name="cosine"), backbones=backbones)
    with pytest.raises(
        InputError, match=r"steps \(6, now 9; the cosine schedule spreads over all steps"
    ):
        train(make_config(name="cosine", steps=9), backbones=backbones, resume="auto")


def test_the_run_directory_tells_the_plan(
    make_config: MakeConfig, backbones: Backbones, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "regionspot")
    result = train(make_config(steps=2), backbones=backbones)
    plan = (result.run_directory / "plan.txt").read_text()
    assert (
        plan.strip() == caplog.messages[0]
        and "data set squares: 10 images" in plan
        and "nothing left out" in plan
    )
    assert not (result.run_directory / "skipped.json").exists()


def with_broken_pictures(data: Path, folder: Path, *indices: int) -> dict[str, Any]:
    """A data set whose pictures of these indices are cut off; of index 0 it is gone."""
    folder.mkdir()
    for picture in data.parent.glob("*.png"):
        (folder / picture.name).write_bytes(picture.read_bytes())
    for index in indices:
        (folder / f"{index}.png").write_bytes((folder / f"{index}.png").read_bytes()[:200])
    if 0 in indices:
        (folder / "0.png").unlink()
    return {"name": "broken", "annotations": str(data), "images": str(folder)}


@pytest.mark.parametrize("augmentation", [None, {}])
def test_pictures_that_cannot_be_used_are_left_out_listed_and_stay_out_on_resume(
    make_config: MakeConfig,
    backbones: Backbones,
    data: Path,
    tmp_path: Path,
    augmentation: dict[str, Any] | None,
) -> None:
    sets = [with_broken_pictures(data, tmp_path / "pictures", 0, 3)]
    skip: dict[str, Any] = {
        "features": {"on_error": "skip", "max_skipped": 0.2, "cache_dir": str(tmp_path / "cache")}
    }
    changes: dict[str, Any] = {"datasets": sets, "steps": 4, "augmentation": augmentation, **skip}
    whole = train(make_config(name="whole", **changes), backbones=backbones)
    assert whole.images == 8
    listed = json.loads((whole.run_directory / "skipped.json").read_text())
    assert list(listed["broken"]) == ["0.png", "3.png"] and "3.png" in listed["broken"]["3.png"]

    def stop(report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    config = make_config(name="resumed", checkpoints={"every": 1}, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, backbones=backbones, on_step=stop)
    resumed = train(config, backbones=backbones, resume="auto")
    heads = [load_head(result.head_path).state_dict() for result in (whole, resumed)]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())
    with pytest.raises(InputError, match=r"more than 1 of the 10 images of broken cannot be used"):
        few = {**changes, "features": {**skip["features"], "max_skipped": 0.1}}
        train(make_config(name="few", **few), backbones=backbones)


def test_resume_notices_that_other_pictures_are_skipped(
    make_config: MakeConfig, backbones: Backbones, data: Path, tmp_path: Path
) -> None:
    """The same files, but the checkpoint's run could read one more of them."""
    sets = [with_broken_pictures(data, tmp_path / "pictures", 3)]
    features = {"on_error": "skip", "max_skipped": 0.2}
    config = make_config(datasets=sets, steps=4, features=features)
    train(config, backbones=backbones)
    for manifest in (tmp_path / "runs" / "run" / "checkpoints").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        assert list(content["skipped"]["broken"]) == ["3.png"]
        manifest.write_text(json.dumps({**content, "skipped": {}}))
    with pytest.raises(
        InputError, match=r"other images of the data set broken are skipped than .*\(3.png\)"
    ):
        train(config, backbones=backbones, resume="auto")


def test_resume_notices_other_data(
    make_config: MakeConfig, backbones: Backbones, data: Path, tmp_path: Path
) -> None:
    train(make_config(), backbones=backbones)
    content = json.loads(data.read_text())
    content["annotations"][0]["bbox"][2] = 20
    changed = data.with_name("changed.json")
    changed.write_text(json.dumps(content))
    config = make_config(datasets=[{"name": "squares", "annotations": str(changed)}])
    with pytest.raises(InputError, match="the data set squares changed since"):
        train(config, backbones=backbones, resume="auto")


@pytest.mark.parametrize("augmentation", [None, {}])
def test_resume_notices_another_clip_wherever_its_weights_are(
    make_config: MakeConfig, backbones: Backbones, augmentation: dict[str, Any] | None
) -> None:
    train(make_config(steps=2, augmentation=augmentation), backbones=backbones)
    moved = make_config(
        steps=2,
        augmentation=augmentation,
        model={"clip_weights": "new.pt", "sam_weights": "new.pth"},
    )
    train(moved, backbones=backbones, resume="auto")  # the same weights in other files
    other = copy.deepcopy(backbones[1])
    with torch.no_grad():
        other.clip.visual.conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match=r"^CLIP's image tower changed since"):
        train(moved, backbones=(backbones[0], other), resume="auto")
    sam = copy.deepcopy(backbones[0])
    with torch.no_grad():
        sam.sam.image_encoder.pos_embed += 1
    with pytest.raises(InputError, match=r"^SAM's weights changed since"):  # and not the data
        train(moved, backbones=(sam, backbones[1]), resume="auto")


def test_resume_notices_other_classes_though_features_stay(
    make_config: MakeConfig, backbones: Backbones, data: Path
) -> None:
    config = make_config(steps=2)
    train(config, backbones=backbones)
    content = json.loads(data.read_text())
    content["annotations"][0]["category_id"] ^= 1  # 10 and 11 are classes
    changed = data.with_name("relabelled.json")
    changed.write_text(json.dumps(content))
    relabelled = make_config(steps=2, datasets=[{"name": "squares", "annotations": str(changed)}])
    with pytest.raises(InputError, match="the data set squares changed since"):
        train(relabelled, backbones=backbones, resume="auto")
    caches = [Setup.from_config(c, backbones).caches[0] for c in (config, relabelled)]
    assert caches[0].shard_path(0) == caches[1].shard_path(0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_resume_blames_the_key_that_was_changed(
    make_config: MakeConfig, backbones: Backbones, precision: str
) -> None:
    """Not the data, which is what it was."""
    train(make_config(steps=2), backbones=backbones)
    with pytest.raises(
        InputError, match=rf"another configuration: features.precision \(None, now '{precision}'\)"
    ):
        train(
            make_config(steps=2, features={"precision": precision}),
            backbones=backbones,
            resume="auto",
        )
    graphs = {"runtime": "openvino", "artifacts": "artifacts"}
    with pytest.raises(InputError, match=r"features.runtime \('torch', now 'openvino'\)"):
        train(make_config(steps=2, features=graphs), backbones=backbones, resume="auto")


def test_a_run_of_an_earlier_version_goes_on_as_it_began_or_not_at_all(
    make_config: MakeConfig, backbones: Backbones, tmp_path: Path
) -> None:
    """Its configuration has none of the newer keys: then it summed over regions."""
    train(make_config(steps=2), backbones=backbones)
    run = tmp_path / "runs" / "run"
    text = (run / "config.yaml").read_text().replace("loss_reduction: per_image\n", "")
    (run / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"loss_reduction \('per_region', now 'per_image'\)"):
        train(make_config(steps=2), backbones=backbones, resume="auto")


def test_of_an_earlier_version_it_is_said_what_cannot_be_compared(
    make_config: MakeConfig, backbones: Backbones, tmp_path: Path
) -> None:
    train(make_config(steps=2), backbones=backbones)
    for manifest in (tmp_path / "runs" / "run" / "checkpoints").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        del content["inputs"]["features"]
        manifest.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="that SAM's weights are the same is not checked"):
        train(make_config(steps=2), backbones=backbones, resume="auto")


def test_the_towers_are_hashed_once_in_a_run(
    make_config: MakeConfig, backbones: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Any] = []
    real = training_setup.weights_fingerprint

    def fingerprint(**parts: Any) -> str:
        hashed.append(parts)
        return real(**parts)

    monkeypatch.setattr(training_setup, "weights_fingerprint", fingerprint)
    train(make_config(steps=2), backbones=backbones)
    assert len(hashed) == 1


def test_one_corrected_annotation_costs_one_shard(
    make_config: MakeConfig,
    backbones: Backbones,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    features = {"cache_dir": str(tmp_path / "cache"), "images_per_shard": 2}
    train(make_config(steps=2, features=features), backbones=backbones)
    before = set((tmp_path / "cache").glob("*/*.safetensors"))
    content = json.loads(data.read_text())
    content["annotations"][0]["bbox"][2] = 20
    corrected = data.with_name("corrected.json")
    corrected.write_text(json.dumps(content))
    sets = [{"name": "squares", "annotations": str(corrected)}]
    caplog.set_level(logging.INFO, "regionspot")
    train(make_config(name="two", steps=2, features=features, datasets=sets), backbones=backbones)
    assert len(set((tmp_path / "cache").glob("*/*.safetensors")) - before) == 1
    estimate = caplog.messages[1]
    assert (
        "1 to make" in estimate
        and "1 more files are of earlier states of this data set" in estimate
    )


def test_an_image_of_another_size_than_annotated_is_named(
    make_config: MakeConfig, backbones: Backbones, data: Path
) -> None:
    content = json.loads(data.read_text())
    content["images"][2] |= {"width": 96, "height": 128}
    path = data.with_name("turned.json")
    path.write_text(json.dumps(content))
    config = make_config(datasets=[{"name": "turned", "annotations": str(path)}])
    with pytest.raises(
        InputError, match=r"2.png is 128 x 96 pixels .* annotations are for 96 x 128"
    ):
        train(config, backbones=backbones)


# --- killed and resumed ---


def _start(config_file: Path, kill_at: int | None, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [
        sys.executable,
        str(SCRIPT),
        str(config_file),
        str(-1 if kill_at is None else kill_at),
        *arguments,
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _finish(process: subprocess.Popen[bytes]) -> int:
    output, _ = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), output.decode()
    return process.returncode


def test_killed_at_random_steps_and_resumed_it_ends_with_the_same_weights_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, backbones: Backbones
) -> None:
    changes: dict[str, Any] = {
        "steps": 30,
        "checkpoints": {"every": 4, "keep": 2},
        "optimizer": {"ema_decay": 0.9},
    }
    whole, killed = tmp_path / "whole.yaml", tmp_path / "killed.yaml"
    whole.write_text(config_to_yaml(make_config(name="whole", **changes)))
    killed.write_text(config_to_yaml(make_config(name="killed", **changes)))
    assert _finish(_start(whole, None)) == 0

    steps = sorted(random.Random(4).sample(range(1, 30), 3))
    for step in steps:
        assert _finish(_start(killed, step)) == -signal.SIGKILL
    process = _start(killed, None)  # and once at any moment at all, saving a checkpoint perhaps
    checkpoints = tmp_path / "runs" / "killed" / "checkpoints"
    deadline, before = time.monotonic() + 120, set(checkpoints.iterdir())
    while (
        process.poll() is None
        and set(checkpoints.iterdir()) == before
        and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    process.kill()
    _finish(process)
    assert _finish(_start(killed, None)) == 0

    first, second = (
        load_head(tmp_path / "runs" / name / "head.safetensors").state_dict()
        for name in ("whole", "killed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(2, 31, 2))


def test_a_picture_that_is_broken_stops_extraction_with_its_name(
    make_config: MakeConfig, backbones: Backbones, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for picture in data.parent.glob("*.png"):
        (folder / picture.name).write_bytes(picture.read_bytes())
    Image.new("RGB", (128, 96)).save(folder / "3.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-30])
    config = make_config(
        datasets=[{"name": "broken", "annotations": str(data), "images": str(folder)}]
    )
    with pytest.raises(InputError, match=r"3\.png"):
        train(config, backbones=backbones)

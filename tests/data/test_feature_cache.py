"""The feature cache: whole or not there, any flipped byte is found, and only what is missing is made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regionspot.data import extraction, feature_cache
from regionspot.data.dataset import TrainingSet
from regionspot.data.extraction import FeatureExtractor, fill_caches, make_cache
from regionspot.data.feature_cache import FeatureCache, Features, FeatureShape, check_space
from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.pipelines import pipeline_from_backbones
from regionspot.modeling.presets import create_backbones
from regionspot.modeling.sam import SamBackbone
from regionspot.structures import Prompts
from regionspot.transforms import ClipTransform, SamTransform, read_image

SHAPE = FeatureShape((1, 6), (3, 4), "float16")


def make_set(directory: Path, counts: tuple[int, ...] = (2, 1, 3, 1, 2), seed: int = 0) -> TrainingSet:
    """Pictures of 40 x 30 (width x height) with random boxes."""
    rng = np.random.default_rng(seed)
    directory.mkdir(exist_ok=True)
    paths = tuple(directory / f"{index}.png" for index in range(len(counts)))
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    corners = rng.random((sum(counts), 2)).astype(np.float32) * [20, 15]
    return TrainingSet(
        name="set",
        class_names=("a", "b"),
        paths=paths,
        file_names=tuple(path.name for path in paths),
        sizes=np.tile([30, 40], (len(counts), 1)),
        counts=np.array(counts),
        boxes=np.concatenate([corners, corners + 12], axis=1).astype(np.float32),
        class_ids=rng.integers(0, 2, sum(counts)),
    )


def features_of(cache: FeatureCache, shard: int) -> Features:
    """Numbers that tell which region or image they are of."""
    images = cache.shard_images(shard)
    regions = cache.training_set.region_indices(images)
    tokens = regions[:, None, None] + np.zeros((1, *cache.shape.mask_tokens))
    maps = None
    if cache.shape.patch_tokens:
        maps = (images[:, None, None] + np.zeros((1, *cache.shape.patch_tokens))).astype(cache.shape.dtype)
    return Features(tokens.astype(cache.shape.dtype), maps)


def full_cache(root: Path, shape: FeatureShape = SHAPE) -> FeatureCache:
    cache = FeatureCache(root / "cache", make_set(root / "pictures"), shape, {"sam": "x"}, images_per_shard=2)
    for shard in range(cache.num_shards):
        cache.write_shard(shard, features_of(cache, shard))
    return cache


@pytest.mark.parametrize("shape", [SHAPE, FeatureShape((3, 6), None, "float32")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_written_is_read(tmp_path: Path, shape: FeatureShape, in_memory: bool) -> None:
    cache = full_cache(tmp_path, shape)
    assert cache.num_shards == 3 and cache.missing_shards() == ([], [])
    store = cache.load() if in_memory else cache.open()
    images = np.array([4, 0, 2, 4])
    tokens, maps = store.gather(images)
    expected = [7, 8, 0, 1, 3, 4, 5, 7, 8]
    assert tokens.shape == (9, *shape.mask_tokens) and tokens.dtype == getattr(torch, shape.dtype)
    assert tokens[:, 0, 0].tolist() == expected
    if shape.patch_tokens is None:
        assert maps is None
    else:
        assert maps is not None and maps[:, 0, 0].tolist() == [4, 0, 2, 4]


def test_the_size_estimate_is_right(tmp_path: Path) -> None:
    cache = full_cache(tmp_path, FeatureShape((1, 256), (64, 128), "float32"))
    on_disk = sum(path.stat().st_size for path in cache.directory.glob("*.safetensors"))
    assert cache.num_bytes() == pytest.approx(on_disk, rel=0.02)
    assert cache.num_bytes() == sum(cache.num_bytes([shard]) for shard in range(3))


def test_a_flipped_byte_anywhere_is_found_and_the_shard_named(tmp_path: Path) -> None:
    cache = full_cache(tmp_path)
    path = cache.shard_path(1)
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        missing, complaints = cache.missing_shards()
        assert missing == [1] and "shard_00001.safetensors is damaged" in complaints[0]
        with pytest.raises(ArtifactError, match=r"shard_00001.safetensors is damaged .*makes this shard anew"):
            cache.load()
    path.write_bytes(content)
    assert cache.missing_shards() == ([], [])


@pytest.mark.parametrize("position", range(-150, 0, 15))
def test_a_flipped_byte_in_a_record_is_found_when_it_is_read(tmp_path: Path, position: int) -> None:
    cache = full_cache(tmp_path)
    content = bytearray(cache.shard_path(1).read_bytes())
    content[position] ^= 1
    cache.shard_path(1).write_bytes(content)
    store = cache.open()
    with pytest.raises(ArtifactError, match=r"shard_00001.safetensors is damaged"):
        for image in (2, 3):
            store.gather(np.array([image]))
    store.gather(np.array([0, 1, 4]))  # the other shards serve on


@pytest.mark.parametrize("damage", ["index gone", "index cut", "index nonsense", "shard gone", "shard cut"])
def test_a_shard_without_its_index_or_half_there_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = full_cache(tmp_path)
    path = cache.shard_path(2) if damage.startswith("shard") else cache.shard_path(2).with_suffix(".json")
    if damage.endswith("gone"):
        path.unlink()
    else:
        path.write_bytes(b"[1]" if damage.endswith("nonsense") else path.read_bytes()[:-20])
    assert cache.missing_shards()[0] == [2]


def test_the_key_follows_everything_the_features_depend_on(tmp_path: Path) -> None:
    def key(counts: tuple[int, ...] = (2, 1), seed: int = 0, shape: FeatureShape = SHAPE, sam: str = "x") -> str:
        return FeatureCache(tmp_path, make_set(tmp_path / "p", counts, seed), shape, {"sam": sam}, 2).key

    assert key() == key()
    relabelled = replace(make_set(tmp_path / "p", (2, 1)), class_ids=np.array([1, 0, 1]), class_names=("c", "d"))
    assert FeatureCache(tmp_path, relabelled, SHAPE, {"sam": "x"}, 2).key == key()  # features are of no class
    others = [key((1, 2)), key(seed=1), key(shape=FeatureShape((3, 6), (3, 4), "float16")), key(sam="y")]
    assert len({key(), *others}) == 5


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path / "a" / "b", make_set(tmp_path / "p"), FeatureShape((1, 6), None, "float32"), {}, 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage(0, 0, 1 << 20))
    with pytest.raises(InputError, match=r"need 64.0 MiB, but .* has 1.0 MiB free: .*features.cache_dir=DIR, or halve"):
        check_space([cache], [[0]])
    check_space([cache], [[]])


@pytest.mark.parametrize("call", range(6))
def test_a_disk_that_fills_up_loses_no_finished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """`fsync` fails at its call-th call: of a shard, of its directory, of its index."""
    cache = full_cache(tmp_path)
    cache.shard_path(1).with_suffix(".json").unlink()
    calls = iter(range(100))
    real = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if call < 4:
            with pytest.raises(ArtifactError, match="the disk is full"):
                cache.write_shard(1, features_of(cache, 1))
        else:
            cache.write_shard(1, features_of(cache, 1))
    missing, _ = cache.missing_shards()
    assert missing in ([1], [])
    assert not list(cache.directory.glob(".*"))
    cache.write_shard(1, features_of(cache, 1))
    assert cache.missing_shards() == ([], [])


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    cache = full_cache(tmp_path)
    features = features_of(cache, 0)
    features.mask_tokens[0] = np.inf
    with pytest.raises(InputError, match=r"mask_tokens of shard 0 of set have infinite .*features.dtype=float32"):
        cache.write_shard(0, features)


# --- extraction, with regionspot_mini's towers ---


@pytest.fixture(scope="module")
def backbones() -> tuple[SamBackbone, ClipBackbone]:
    return create_backbones("regionspot_mini", random_weights=0)


def extractor_of(sam: SamBackbone, clip: ClipBackbone, **options: Any) -> FeatureExtractor:
    return FeatureExtractor(pipeline_from_backbones(sam, clip), **options)


def filled(root: Path, training_set: TrainingSet, extractor: FeatureExtractor, **options: Any) -> FeatureCache:
    cache = make_cache(root / "cache", training_set, extractor, images_per_shard=2)
    fill_caches([cache], extractor, say=lambda _: None, **options)
    return cache


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("with_clip", [False, True])
def test_features_are_those_of_each_image_by_itself(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone], multimask: bool, with_clip: bool
) -> None:
    sam, clip = backbones
    training_set = make_set(tmp_path / "pictures")
    extractor = extractor_of(sam, clip, maps=with_clip, multimask=multimask)
    store = filled(tmp_path, training_set, extractor, batch_size=3).load()
    for index, path in enumerate(training_set.paths):
        tokens, maps = store.gather(np.array([index]))
        image, prompts = (
            read_image(path),
            Prompts.from_boxes(training_set.boxes[training_set.region_indices(np.array([index]))]),
        )
        frame, size = SamTransform(256).apply_image(image)
        points = torch.from_numpy(SamTransform(256).apply_points(prompts.points, 30, 40))[None]
        with torch.inference_mode():
            embedding = sam.encode_image(torch.from_numpy(frame).permute(2, 0, 1)[None], torch.tensor([size]))
            expected = sam.mask_tokens(embedding, points, torch.from_numpy(prompts.labels)[None], multimask).tokens[0]
            torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
            if maps is not None:
                pixels = torch.from_numpy(ClipTransform(128).apply_image(image)).permute(2, 0, 1)[None]
                torch.testing.assert_close(maps, clip.encode_image(pixels), rtol=1e-4, atol=1e-4)
    assert (maps is not None) == with_clip


def test_a_damaged_shard_alone_is_computed_again(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    training_set, extractor = make_set(tmp_path / "pictures"), extractor_of(*backbones, dtype="float16")
    cache = filled(tmp_path, training_set, extractor)
    whole = [cache.shard_path(shard).read_bytes() for shard in range(3)]
    damaged = bytearray(whole[1])
    damaged[-1] ^= 1
    cache.shard_path(1).write_bytes(damaged)

    written: list[int] = []
    real = FeatureCache.write_shard

    def write(self: FeatureCache, shard: int, features: Features) -> None:
        written.append(shard)
        real(self, shard, features)

    monkeypatch.setattr(FeatureCache, "write_shard", write)
    with pytest.warns(
        UserWarning, match=r"shard_00001.safetensors is damaged \(its checksum is wrong\); it is made again"
    ):
        filled(tmp_path, training_set, extractor)
    assert written == [1]
    assert [cache.shard_path(shard).read_bytes() for shard in range(3)] == whole


def test_changed_weights_make_a_new_cache(tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone]) -> None:
    training_set = make_set(tmp_path / "pictures")

    def key(sam: SamBackbone, clip: ClipBackbone, **options: Any) -> str:
        return make_cache(tmp_path, training_set, extractor_of(sam, clip, **options), 2).key

    (sam, clip), (other_sam, other_clip) = backbones, create_backbones("regionspot_mini", random_weights=1)
    keys = [key(sam, clip), key(other_sam, clip), key(sam, other_clip), key(sam, clip, maps=False)]
    assert len(set(keys)) == 4
    assert key(sam, other_clip, maps=False) == keys[3]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_feature_cache import *
torch.set_num_threads(1)
extractor = extractor_of(*create_backbones("regionspot_mini", random_weights=0))
filled(Path(sys.argv[2]), make_set(Path(sys.argv[2]) / "pictures", (1,) * 60), extractor, batch_size=1)
"""


def test_killed_in_the_middle_finished_shards_are_kept(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(here.parent), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(tmp_path.glob("cache/*/shard_*.json"))) < 3:
        time.sleep(0.002)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/shard_*.json")}
    assert 3 <= len(finished) < 30

    training_set = make_set(tmp_path / "pictures", (1,) * 60)
    cache = filled(tmp_path, training_set, extractor_of(*backbones))
    assert cache.missing_shards() == ([], [])
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_what_a_killed_run_left_half_written_is_deleted(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone]
) -> None:
    training_set, extractor = make_set(tmp_path / "pictures"), extractor_of(*backbones)
    directory = filled(tmp_path, training_set, extractor).directory
    leftover, running = (directory / f".shard_00001.safetensors.{pid}.1.tmp" for pid in (1, 2))
    for path in (leftover, running):
        path.write_bytes(b"half of it")
    os.utime(leftover, (0, 0))
    filled(tmp_path, training_set, extractor)
    assert list(directory.glob(".*")) == [running]


def test_the_estimate_comes_before_the_work(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    extractor = extractor_of(*backbones)
    cache = make_cache(tmp_path, make_set(tmp_path / "pictures"), extractor, 2)
    monkeypatch.setattr(extraction, "_extract_shard", lambda *_: pytest.fail(f"already at work; said {said}"))
    with pytest.raises(pytest.fail.Exception, match=r"5 images, 9 regions.*KiB in 3 shards at .*, 3 to make"):
        fill_caches([cache], extractor, say=said.append)

"""The feature cache: whole or not there, any flipped byte is found, and only what is missing is
made.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import torch
from PIL import Image

from regionspot.data import extraction, feature_cache
from regionspot.data.dataset import TrainingSet
from regionspot.data.extraction import FeatureExtractor, fill_caches, make_cache
from regionspot.data.feature_cache import FeatureCache, Features, FeatureShape, check_space
from regionspot.errors import ArtifactError, InputError
from regionspot.images import read_image
from regionspot.modeling.clip import ClipBackbone
from regionspot.modeling.pipelines import pipeline_from_backbones
from regionspot.modeling.presets import create_backbones
from regionspot.modeling.sam import SamBackbone
from regionspot.structures import Prompts
from regionspot.transforms import ClipTransform, SamTransform

SHAPE = FeatureShape((1, 6), (3, 4), "float16")


def make_set(
    directory: Path, counts: tuple[int, ...] = (2, 1, 3, 1, 2), seed: int = 0
) -> TrainingSet:
    """Pictures of 40 x 30 (width x height) with random boxes."""
    rng = np.random.default_rng(seed)
    directory.mkdir(exist_ok=True)
    paths = tuple(directory / f"f{index}.png" for index in range(len(counts)))
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    corners = rng.random((sum(counts), 2)).astype(np.float32) * [20, 15]
    return TrainingSet(
        name="set",
        class_names=("a", "b"),
        paths=paths,
        file_names=tuple(path.name for path in paths),
        file_bytes=np.array([path.stat().st_size for path in paths]),
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
        maps = (images[:, None, None] + np.zeros((1, *cache.shape.patch_tokens))).astype(
            cache.shape.dtype
        )
    return Features(tokens.astype(cache.shape.dtype), maps)


def full_cache(root: Path, shape: FeatureShape = SHAPE) -> FeatureCache:
    cache = FeatureCache(
        root / "cache", make_set(root / "pictures"), shape, {"sam": "x"}, images_per_shard=2
    )
    assert [len(cache.shard_images(shard)) for shard in range(cache.num_shards)] == [2, 1, 2]
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
        assert missing == [1] and f"{path} is damaged" in complaints[0]
        with pytest.raises(ArtifactError, match=rf"{path} is damaged .*makes this shard anew"):
            cache.load()
    path.write_bytes(content)
    assert cache.missing_shards() == ([], [])


def test_damage_under_an_untouched_time_is_found_by_a_full_check_or_when_it_is_read(
    tmp_path: Path,
) -> None:
    """As by a disk that loses bits: nothing but the content tells."""
    cache = full_cache(tmp_path)
    path, shard = cache.shard_path(1), 1
    damaged, written = bytearray(path.read_bytes()), path.stat()
    damaged[-1] ^= 1

    def damage() -> None:
        path.write_bytes(damaged)
        os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))

    damage()
    assert cache.missing_shards() == ([], [])
    assert cache.missing_shards(verify=True)[0] == [shard]
    for read in (cache.load, lambda: cache.open().gather(np.arange(5))):
        damage()
        with pytest.raises(
            ArtifactError, match=r"is damaged .*wrong.*: run the same command again"
        ):
            read()
        assert cache.missing_shards()[0] == [shard]  # so that the same command makes it anew


def test_shards_that_nobody_touched_are_not_read_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read = full_cache(tmp_path), []
    real = FeatureCache._read_verified

    def read_verified(self: FeatureCache, shard: int) -> dict[str, npt.NDArray[Any]]:
        read.append(shard)
        return real(self, shard)

    monkeypatch.setattr(FeatureCache, "_read_verified", read_verified)
    assert cache.missing_shards() == ([], []) and read == []
    os.utime(cache.shard_path(2), (5, 5))  # a copy whose times were not kept
    assert cache.missing_shards() == ([], []) and read == [2]
    assert cache.missing_shards() == ([], []) and read == [2]  # once is enough
    cache.missing_shards(verify=True)
    assert read == [2, 0, 1, 2]


@pytest.mark.parametrize("position", range(-150, 0, 15))
def test_a_flipped_byte_in_a_record_is_found_when_it_is_read(tmp_path: Path, position: int) -> None:
    cache = full_cache(tmp_path)
    content = bytearray(cache.shard_path(2).read_bytes())
    content[position] ^= 1
    cache.shard_path(2).write_bytes(content)
    store = cache.open()
    with pytest.raises(ArtifactError, match=r"\.safetensors is damaged"):
        for image in (3, 4):
            store.gather(np.array([image]))
    store.gather(np.array([0, 1, 2]))  # the other shards serve on


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "foreign"])
def test_a_shard_that_is_not_whole_is_made_again(tmp_path: Path, damage: str) -> None:
    cache = full_cache(tmp_path)
    path = cache.shard_path(2)
    content = {
        "cut": path.read_bytes()[:-20],
        "empty": b"",
        "foreign": safetensors.numpy.save({"x": np.zeros(3)}),
    }
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    assert cache.missing_shards()[0] == [2]


def test_a_cache_is_found_by_everything_the_features_depend_on(tmp_path: Path) -> None:
    def shards(
        counts: tuple[int, ...] = (2, 1), seed: int = 0, shape: FeatureShape = SHAPE, sam: str = "x"
    ) -> Any:
        cache = FeatureCache(
            tmp_path, make_set(tmp_path / "p", counts, seed), shape, {"sam": sam}, 2
        )
        return tuple(cache.shard_path(shard) for shard in range(cache.num_shards))

    assert shards() == shards()
    relabelled = replace(
        make_set(tmp_path / "p", (2, 1)), class_ids=np.array([1, 0, 1]), class_names=("c", "d")
    )
    # of no class
    assert FeatureCache(tmp_path, relabelled, SHAPE, {"sam": "x"}, 2).shard_path(0) == shards()[0]
    others = [
        shards((1, 2)),
        shards(seed=1),
        shards(shape=FeatureShape((3, 6), (3, 4), "float16")),
        shards(sam="y"),
    ]
    assert len({shards(), *others}) == 5


def many(names: Sequence[str], boxes: npt.NDArray[np.float32] | None = None) -> TrainingSet:
    """Images of one region each that need not exist."""
    count = len(names)
    return TrainingSet(
        name="many",
        class_names=("a",),
        paths=tuple(map(Path, names)),
        file_names=tuple(names),
        file_bytes=np.full(count, 7),
        sizes=np.full((count, 2), 30),
        counts=np.ones(count, np.int64),
        boxes=np.tile(np.array([1, 2, 3, 4], np.float32), (count, 1)) if boxes is None else boxes,
        class_ids=np.zeros(count, np.int64),
    )


def paths_of(training_set: TrainingSet) -> set[Path]:
    cache = FeatureCache("cache", training_set, SHAPE, {}, images_per_shard=16)
    sizes = [len(cache.shard_images(shard)) for shard in range(cache.num_shards)]
    assert sum(sizes) == len(training_set) and max(sizes) <= 16 and min(sizes[:-1]) >= 8
    return {cache.shard_path(shard) for shard in range(cache.num_shards)}


def test_a_corrected_annotation_costs_one_shard() -> None:
    names = [f"{index:04}.jpg" for index in range(600)]
    whole = many(names)
    before = paths_of(whole)
    for index in (0, 300, 599):
        boxes = whole.boxes.copy()
        boxes[index, 2] += 1
        assert len(paths_of(many(names, boxes)) - before) == 1


def test_taking_an_image_out_or_adding_one_costs_a_shard_or_two() -> None:
    names = [f"{index:04}.jpg" for index in range(600)]
    before = paths_of(many(names))
    assert len(before) > 40
    changes = [names[:at] + names[at + 1 :] for at in range(0, 600, 25)]
    changes += [[*names[:at], "new.jpg", *names[at:]] for at in range(0, 600, 25)]
    made = [len(paths_of(many(changed)) - before) for changed in changes]
    assert max(made) <= 8 and np.mean(made) < 2
    assert len(paths_of(many([*names, *(f"later_{i}.jpg" for i in range(100))])) - before) < 14


def test_files_that_no_data_set_uses_any_more_are_listed(tmp_path: Path) -> None:
    cache = full_cache(tmp_path)
    assert cache.unused_files() == []
    boxes = cache.training_set.boxes + np.float32(1)
    corrected = FeatureCache(
        tmp_path / "cache", replace(cache.training_set, boxes=boxes), SHAPE, {"sam": "x"}, 2
    )
    assert corrected.directory == cache.directory
    assert corrected.unused_files() == sorted(cache.shard_path(shard) for shard in range(3))
    earlier, of_another_set = (
        tmp_path / "cache" / f"{name}-{'0a' * 8}" for name in ("set", "set-b")
    )
    for directory in (earlier, of_another_set):
        directory.mkdir()
        (directory / "cache.json").write_text('{"format": 2}')
        (directory / "shard_00000.safetensors").write_bytes(b"old")
    other_weights = FeatureCache(tmp_path / "cache", cache.training_set, SHAPE, {"sam": "y"}, 2)
    # not the cache of the first weights
    assert other_weights.unused_files() == sorted(earlier.iterdir())


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(
        tmp_path / "a" / "b", make_set(tmp_path / "p"), FeatureShape((1, 6), None, "float32"), {}, 2
    )
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage(0, 0, 1 << 20))
    with pytest.raises(
        InputError,
        match=r"need 64.0 MiB, but .* has 1.0 MiB free: .*features.cache_dir=DIR, or halve",
    ):
        check_space([cache], [[0]])
    check_space([cache], [[]])


@pytest.mark.parametrize("call", range(3))
def test_a_disk_that_fills_up_loses_no_finished_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """`fsync` fails at its call-th call: of a shard, of its directory (which then is in place),
    never.
    """
    cache = full_cache(tmp_path)
    cache.shard_path(1).unlink()
    calls = iter(range(100))
    real = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if call < 1:
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
    with pytest.raises(
        InputError, match=r"mask_tokens of shard 0 of set have infinite .*features.dtype=float32"
    ):
        cache.write_shard(0, features)


# --- extraction, with regionspot_mini's towers ---


@pytest.fixture(scope="module")
def backbones() -> tuple[SamBackbone, ClipBackbone]:
    return create_backbones("regionspot_mini", random_weights=0)


def extractor_of(sam: SamBackbone, clip: ClipBackbone, **options: Any) -> FeatureExtractor:
    return FeatureExtractor(pipeline_from_backbones(sam, clip), **options)


def filled(
    root: Path, training_set: TrainingSet, extractor: FeatureExtractor, **options: Any
) -> FeatureCache:
    """A cache of two images a shard."""
    cache = make_cache(root / "cache", training_set, extractor, images_per_shard=2)
    fill_caches([cache], extractor, **options)
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
        image = read_image(path)
        prompts = Prompts.from_boxes(
            training_set.boxes[training_set.region_indices(np.array([index]))]
        )
        frame, size = SamTransform(256).apply_image(image)
        points = torch.from_numpy(SamTransform(256).apply_points(prompts.points, 30, 40))[None]
        with torch.inference_mode():
            embedding = sam.encode_image(
                torch.from_numpy(frame).permute(2, 0, 1)[None], torch.tensor([size])
            )
            expected = sam.mask_tokens(
                embedding, points, torch.from_numpy(prompts.labels)[None], multimask
            ).tokens[0]
            torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
            if maps is not None:
                pixels = torch.from_numpy(ClipTransform(192).apply_image(image)).permute(2, 0, 1)[
                    None
                ]
                torch.testing.assert_close(maps, clip.encode_image(pixels), rtol=1e-4, atol=1e-4)
    assert (maps is not None) == with_clip


def test_a_damaged_shard_alone_is_computed_again(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    training_set = make_set(tmp_path / "pictures")
    extractor = extractor_of(*backbones, dtype="float16")
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
        UserWarning, match=r"safetensors is damaged \(its checksum is wrong\); it is made again"
    ):
        filled(tmp_path, training_set, extractor)
    assert written == [1]
    again = [cache.shard_path(shard).read_bytes() for shard in range(3)]
    assert list(map(_without_time, again)) == list(map(_without_time, whole))


def _without_time(shard: bytes) -> tuple[dict[str, bytes], tuple[str, ...]]:
    arrays = safetensors.numpy.load(shard)
    header = json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")])
    records = tuple(json.loads(header["__metadata__"]["shard"])["records"])
    return {name: array.tobytes() for name, array in arrays.items()}, records


def test_changed_weights_make_a_new_cache(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone]
) -> None:
    training_set = make_set(tmp_path / "pictures")

    def key(sam: SamBackbone, clip: ClipBackbone, **options: Any) -> str:
        return make_cache(tmp_path, training_set, extractor_of(sam, clip, **options), 2).key

    (sam, clip) = backbones
    (other_sam, other_clip) = create_backbones("regionspot_mini", random_weights=1)
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
pictures = make_set(Path(sys.argv[2]) / "pictures", (1,) * 60)
filled(Path(sys.argv[2]), pictures, extractor, batch_size=1)
"""


def test_killed_in_the_middle_finished_shards_are_kept(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(here.parent), str(tmp_path)], env=environment
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(tmp_path.glob("cache/*/*.safetensors"))) < 3:
        time.sleep(0.002)
    process.kill()
    process.wait()
    finished = {path: path.stat().st_ino for path in tmp_path.glob("cache/*/*.safetensors")}
    assert 3 <= len(finished) < 30

    training_set = make_set(tmp_path / "pictures", (1,) * 60)
    cache = filled(tmp_path, training_set, extractor_of(*backbones))
    assert cache.missing_shards() == ([], [])
    assert {path: path.stat().st_ino for path in finished} == finished


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


# --- images that cannot be used ---


def break_pictures(training_set: TrainingSet, *indices: int) -> TrainingSet:
    for index in indices:
        training_set.paths[index].write_bytes(training_set.paths[index].read_bytes()[:60])
    sizes = np.array([path.stat().st_size for path in training_set.paths])
    return replace(training_set, file_bytes=sizes)


def test_pictures_that_cannot_be_used_are_skipped_up_to_a_ceiling(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone]
) -> None:
    extractor = extractor_of(*backbones)
    whole = filled(tmp_path, make_set(tmp_path / "pictures"), extractor).load()
    training_set = break_pictures(make_set(tmp_path / "pictures"), 1, 2)  # 2 is a shard of its own
    training_set.paths[0].unlink()
    with pytest.raises(
        InputError, match=r"f[01]\.png.*\(features.on_error=skip leaves such images out.\)"
    ):
        filled(tmp_path, training_set, extractor)
    with pytest.raises(
        InputError,
        match=r"more than 2 of the 5 images of set cannot be used: .*f0.png.*max_skipped",
    ):
        filled(tmp_path, training_set, extractor, max_skipped=0.3)
    cache = filled(tmp_path, training_set, extractor, max_skipped=0.5)
    assert sorted(cache.skipped()) == [0, 1, 2]
    assert all(training_set.file_names[index] in why for index, why in cache.skipped().items())
    for store in (cache.load(), cache.open()):
        tokens, maps = store.gather(np.array([3, 4]))
        expected_tokens, expected_maps = whole.gather(np.array([3, 4]))
        torch.testing.assert_close(tokens, expected_tokens)
        torch.testing.assert_close(maps, expected_maps)
        skipped, _ = store.gather(np.array([1]))
        assert not skipped.any()


def test_skipped_pictures_are_remembered_counted_and_tried_again_on_request(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone]
) -> None:
    extractor = extractor_of(*backbones)
    training_set = break_pictures(make_set(tmp_path / "pictures"), 1)
    first = filled(tmp_path, training_set, extractor, max_skipped=0.2)
    made = {path: path.stat().st_ino for path in first.directory.glob("*.safetensors")}
    again = filled(tmp_path, training_set, extractor, max_skipped=0.2)
    assert again.skipped() == first.skipped()
    assert {path: path.stat().st_ino for path in first.directory.glob("*.safetensors")} == made
    with pytest.raises(InputError, match="more than 0 of the 5 images"):
        filled(tmp_path, training_set, extractor, max_skipped=0.0)
    with pytest.raises(InputError, match=r"f1\.png"):
        # without skipping, the picture is looked at again
        filled(tmp_path, training_set, extractor)


def test_a_data_set_is_never_skipped_whole(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone]
) -> None:
    training_set = break_pictures(make_set(tmp_path / "pictures", (1, 1)), 0, 1)
    with pytest.raises(InputError, match="more than 1 of the 2 images of set cannot be used"):
        filled(tmp_path, training_set, extractor_of(*backbones), max_skipped=1.0)


# --- several processes on one cache ---


def test_those_who_fill_one_cache_at_a_time_share_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here two threads with locks of their own, which are to the system what those of two processes
    are.
    """
    training_set, made, both = make_set(tmp_path / "pictures", (1,) * 24), [], threading.Barrier(2)
    extractors = [
        extractor_of(*create_backbones("regionspot_mini", random_weights=0)) for _ in range(2)
    ]
    real = FeatureCache.write_shard

    def write(self: FeatureCache, shard: int, features: Features) -> None:
        made.append((threading.get_ident(), shard))
        real(self, shard, features)

    def fill(extractor: FeatureExtractor) -> FeatureCache:
        both.wait(60)
        return filled(tmp_path, training_set, extractor, batch_size=1)

    monkeypatch.setattr(FeatureCache, "write_shard", write)
    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(fill, extractors))
    # each shard once
    assert sorted(shard for _, shard in made) == list(range(caches[0].num_shards))
    assert len({thread for thread, _ in made}) == 2
    assert caches[0].missing_shards(verify=True) == ([], [])
    assert list(caches[0].directory.glob(".*")) == []


def test_a_shard_is_held_by_one_process_at_a_time_and_let_go_of(tmp_path: Path) -> None:
    cache = full_cache(tmp_path)
    other = FeatureCache(
        tmp_path / "cache", cache.training_set, SHAPE, {"sam": "x"}, images_per_shard=2
    )
    with cache.claim(0) as mine, other.claim(0) as theirs, other.claim(1) as another:
        assert (mine, theirs, another) == (True, False, True)
    with other.claim(0) as free:
        assert free


def test_the_estimate_comes_before_the_work(
    tmp_path: Path,
    backbones: tuple[SamBackbone, ClipBackbone],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "regionspot")
    extractor = extractor_of(*backbones)
    cache = make_cache(tmp_path, make_set(tmp_path / "pictures"), extractor, 2)
    monkeypatch.setattr(
        extraction, "_extract_shard", lambda *_: pytest.fail(f"at work; logged {caplog.messages}")
    )
    with pytest.raises(
        pytest.fail.Exception, match=r"5 images, 9 regions.*KiB in 3 shards at .*, 3 to make"
    ):
        fill_caches([cache], extractor)


def test_a_file_system_that_fails_is_no_fault_of_the_image(
    tmp_path: Path, backbones: tuple[SamBackbone, ClipBackbone]
) -> None:
    """It may pass: an image that was skipped for it would stay left out."""
    training_set = make_set(tmp_path / "pictures")
    training_set.paths[1].unlink()
    training_set.paths[1].symlink_to(training_set.paths[1])  # ELOOP
    with pytest.raises(InputError, match="symbolic links"):
        filled(tmp_path, training_set, extractor_of(*backbones), max_skipped=1.0)

"""The weights that come with the package: whole, small, and good for what the model card says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from regionspot.data.coco_json import CocoDataset
from regionspot.errors import ArtifactError
from regionspot.evaluation.evaluator import evaluate_methods
from regionspot.evaluation.proposals import ground_truth_proposals
from regionspot.images import read_image
from regionspot.mini.architecture import build_mini_clip, position_table
from regionspot.mini.dataset import build_dataset
from regionspot.mini.pretrain_clip import CompactTokenizer
from regionspot.mini.shipped import WEIGHTS_DIR, load_mini_backbones, save_clip
from regionspot.modeling.clip import ClipBackbone, tokenize
from regionspot.modeling.presets import create_model
from regionspot.predictor import RegionPredictor
from regionspot.vocabulary import VocabularyEncoder


def test_the_files_are_a_few_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in WEIGHTS_DIR.glob("*.safetensors")}
    assert set(sizes) == {"sam.safetensors", "clip.safetensors", "head.safetensors"}
    assert sum(sizes.values()) < 20e6


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS_DIR, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "clip.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        load_mini_backbones(tmp_path)


def test_the_full_vocabulary_says_what_the_compact_one_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer()
    compact = build_mini_clip(vocab_size=len(tokenizer.ids)).half().float().eval()
    save_clip(compact, torch.from_numpy(tokenizer.ids), tmp_path)
    shutil.copy(WEIGHTS_DIR / "sam.safetensors", tmp_path)
    _, full = load_mini_backbones(tmp_path)
    texts = [
        "a photo of a red toy with blue stripes.",
        "plain green toy",
        "red toy with a pink bottom and plain blue toy",
    ]
    reference = ClipBackbone(compact, tokenizer=tokenize).encode_tokens(tokenizer(texts))
    torch.testing.assert_close(full.encode_text(texts), reference, rtol=0, atol=1e-5)


def test_a_word_it_never_met_still_gets_an_embedding() -> None:
    _, clip = load_mini_backbones()
    vocabulary = VocabularyEncoder(clip).encode(["zebra", "plain red toy"])
    assert np.isfinite(vocabulary.embeddings).all()
    assert tokenize(["zebra"])[0, 1].item() not in CompactTokenizer().ids


def test_positions_are_the_frozen_table() -> None:
    _, clip = load_mini_backbones()
    table = position_table(clip.image_size // clip.patch_size)
    torch.testing.assert_close(
        clip.clip.visual.positional_embedding.data, table, rtol=1e-3, atol=1e-3
    )


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Pictures that no training saw: a seed of their own."""
    _, val = build_dataset(
        tmp_path_factory.mktemp("held_out"), num_train=1, num_val=400, seed=424_242
    )
    return CocoDataset.load(val)


def test_the_shipped_head_recognises_regions_and_needs_its_mask_tokens(
    held_out: CocoDataset,
) -> None:
    model = create_model("regionspot_mini")
    results = evaluate_methods(
        model,
        held_out,
        VocabularyEncoder(model.clip).encode(held_out.class_names),
        ground_truth_proposals(held_out),
        ["head", "constant_token"],
        batch_size=32,
        progress=False,
    )
    figures = {method: metrics for method, (metrics, _) in results.items()}
    for group, least in (("top1_base", 63), ("top1_novel", 39), ("AP_base", 68), ("AP_novel", 58)):
        assert figures["head"][group] >= least
        assert figures["constant_token"][group] <= 0.3 * figures["head"][group]


def test_masks_of_box_prompts_cover_the_toys(held_out: CocoDataset) -> None:
    from regionspot.masks import decode_rle

    predictor, ious = RegionPredictor(create_model("regionspot_mini")), []
    for record in held_out.images[:20]:
        annotations = held_out.annotations_by_image[record.id]
        predictor.set_image(read_image(held_out.image_path(record)))
        found = predictor.predict(boxes=[a.box for a in annotations], vocabulary=["toy"])
        assert found.masks is not None
        for rle, annotation in zip(found.masks, annotations, strict=True):
            mask, truth = decode_rle(rle), decode_rle(annotation.segmentation)  # type: ignore[arg-type]
            ious.append((mask & truth).sum() / (mask | truth).sum())
    assert np.mean(ious) > 0.75

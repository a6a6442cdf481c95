"""CLIP's feature map, pooling and text embeddings against open_clip's own, and the ways its weights
arrive.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import QuickGELU
from torch import Tensor

from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.clip import IMAGENET_TEMPLATES, ClipBackbone, build_clip, load_clip_weights

TEXTS = [
    "a cat.",
    "a photo of the coffee cup with a long, long handle.",
    "",
    "Grüße aus 北京 & \U0001f600",
    "cat " * 200,
]


def openai_preprocess(images: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_feature_map_is_the_transformers_output(tiny_clip: CLIP, images: Tensor) -> None:
    backbone = ClipBackbone(tiny_clip)
    seen: list[Tensor] = []
    hook = tiny_clip.visual.transformer.register_forward_hook(
        lambda _m, _i, output: seen.append(output)
    )
    expected_embedding = tiny_clip.encode_image(openai_preprocess(images))
    hook.remove()
    patch_tokens = backbone.encode_image(images)
    assert patch_tokens.shape == (2, backbone.num_tokens, backbone.width) == (2, 17, 48)
    torch.testing.assert_close(patch_tokens, seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        backbone.pool(patch_tokens), expected_embedding, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(backbone.encode_image(images.float()), patch_tokens)


@torch.no_grad()
def test_pooling_follows_the_models_own(images: Tensor) -> None:
    with torch.random.fork_rng():
        vision = CLIPVisionCfg(
            layers=1, width=32, head_width=16, patch_size=8, image_size=32, pool_type="avg"
        )
        clip = CLIP(8, vision, CLIPTextCfg(width=16, heads=2, layers=1)).eval()
    backbone = ClipBackbone(clip)
    expected = clip.encode_image(openai_preprocess(images))
    torch.testing.assert_close(
        backbone.pool(backbone.encode_image(images)), expected, rtol=1e-5, atol=1e-5
    )


def test_text_equals_open_clip_for_mixed_lengths(tiny_clip: CLIP) -> None:
    backbone = ClipBackbone(tiny_clip)
    for texts in (TEXTS, TEXTS[:1], TEXTS[:3]):
        expected = tiny_clip.encode_text(open_clip.tokenize(texts))
        torch.testing.assert_close(backbone.encode_text(texts), expected, rtol=1e-5, atol=1e-5)
        whole = backbone.encode_tokens(open_clip.tokenize(texts))
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)


def test_text_is_cut_to_the_longest_of_the_batch(tiny_clip: CLIP) -> None:
    lengths: list[int] = []
    tiny_clip.transformer.register_forward_hook(
        lambda _m, inputs, _o: lengths.append(inputs[0].shape[1])
    )
    ClipBackbone(tiny_clip).encode_text(["a cat.", "a small cat."])
    assert lengths == [6]  # start, four words and marks, end


@pytest.mark.parametrize(
    ("config", "length"),
    [({"no_causal_mask": True}, 16), ({"pool_type": "last"}, 16), ({"pool_type": "eos"}, 4)],
)
def test_text_towers_of_other_kinds(config: dict[str, Any], length: int) -> None:
    with torch.random.fork_rng():
        vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
        text = CLIPTextCfg(context_length=16, width=16, heads=2, layers=1, eos_id=49407, **config)
        clip = CLIP(8, vision, text).eval()
    backbone = ClipBackbone(clip)
    tokens = open_clip.tokenize(["cat", "a cat"], context_length=16)
    torch.testing.assert_close(
        backbone.encode_text(["cat", "a cat"]), clip.encode_text(tokens), rtol=1e-5, atol=1e-5
    )
    assert backbone._cut_padding(tokens).shape[1] == length


def test_no_texts(tiny_clip: CLIP) -> None:
    assert ClipBackbone(tiny_clip).encode_text([]).shape == (0, 24)


def test_dimensions(tiny_clip: CLIP) -> None:
    backbone = ClipBackbone(tiny_clip)
    assert (backbone.image_size, backbone.embed_dim, backbone.context_length) == (32, 24, 77)
    with torch.no_grad():
        tiny_clip.logit_scale.fill_(4.6052)
    assert backbone.logit_scale == pytest.approx(100, rel=1e-4)


def test_fingerprint_sees_text_weights_precision_and_tokenizer(tiny_clip: CLIP) -> None:
    backbone = ClipBackbone(tiny_clip)
    first = backbone.fingerprint()
    assert first == backbone.fingerprint() and len(first) == 32
    with torch.no_grad():
        tiny_clip.visual.proj.add_(1)
    assert backbone.fingerprint() == first  # the image tower does not change texts

    def other_tokenizer(texts: list[str], context_length: int) -> Tensor:
        return open_clip.tokenize([text.replace("-", " ") for text in texts], context_length)

    assert ClipBackbone(tiny_clip, other_tokenizer).fingerprint() != first
    with torch.no_grad():
        tiny_clip.ln_final.bias[3] += 1e-6
    assert backbone.fingerprint() != first
    tiny_clip.double()
    assert len({backbone.fingerprint(), ClipBackbone(tiny_clip.float()).fingerprint(), first}) == 3


def test_quick_gelu_where_openai_weights_need_it() -> None:
    with torch.device("meta"):
        quick = build_clip("ViT-B-32", True)
        plain = build_clip("ViT-B-32")
        named = build_clip("ViT-B-32-quickgelu")
    assert isinstance(quick.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert isinstance(quick.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert isinstance(plain.visual.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
    assert isinstance(named.transformer.resblocks[0].mlp.gelu, QuickGELU)


@pytest.mark.parametrize(
    ("name", "size", "tokens", "width", "embed_dim"),
    [
        ("ViT-B-16", 224, 197, 768, 512),
        ("ViT-L-14", 224, 257, 1024, 768),
        ("ViT-L-14-336", 336, 577, 1024, 768),
        ("ViT-H-14", 224, 257, 1280, 1024),
    ],
)
def test_published_sizes(name: str, size: int, tokens: int, width: int, embed_dim: int) -> None:
    with torch.device("meta"):
        backbone = ClipBackbone(build_clip(name, quick_gelu=True))
    assert (backbone.image_size, backbone.num_tokens, backbone.width, backbone.embed_dim) == (
        size,
        tokens,
        width,
        embed_dim,
    )


def test_models_of_other_kinds_are_refused() -> None:
    with pytest.raises(InputError, match=r"no model 'ViT-B-17'; did you mean .*ViT-B-1"):
        build_clip("ViT-B-17")
    with pytest.raises(InputError, match="no model 'hf-hub:"):
        build_clip("hf-hub:someone/something")
    with pytest.raises(InputError, match="not a plain CLIP"):
        build_clip("ViT-B-16-SigLIP")
    with torch.device("meta"):
        resnet, bert = build_clip("RN50"), build_clip("ViT-H-14-CLIPA")
    with pytest.raises(
        InputError, match="plain vision transformer, not a CLIP with a ModifiedResNet"
    ):
        ClipBackbone(resnet)
    with pytest.raises(InputError, match="vocabulary of 32000 tokens"):
        ClipBackbone(bert)


def test_templates() -> None:
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    assert all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)


def openai_archive(clip: CLIP, path: Path) -> None:
    """What OpenAI publishes: a traced half-precision model with three numbers as buffers."""
    half = build_like(clip).half()
    half.load_state_dict(clip.state_dict())
    example = (torch.zeros(1, 3, 32, 32).half(), torch.zeros(1, 77, dtype=torch.long))
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(half, name):
            delattr(half, name)
        half.register_buffer(name, torch.tensor(number))
    torch.jit.trace(half.requires_grad_(False), example, check_trace=False).save(path)


def build_like(_: CLIP) -> CLIP:
    vision = CLIPVisionCfg(layers=2, width=48, head_width=16, patch_size=8, image_size=32)
    return CLIP(24, vision, CLIPTextCfg(width=32, heads=2, layers=2), quick_gelu=True).eval()


@pytest.mark.filterwarnings("ignore")
def test_openai_archive_is_read_without_running_it(
    tiny_clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai_archive(tiny_clip, tmp_path / "openai.pt")
    monkeypatch.setattr(
        torch.jit, "load", lambda *_, **__: pytest.fail("the archive's code was loaded")
    )
    loaded = build_like(tiny_clip)
    load_clip_weights(loaded, tmp_path / "openai.pt")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(
            tensor, tiny_clip.state_dict()[name].half().float(), rtol=0, atol=0
        )


@pytest.mark.filterwarnings("ignore")
def test_archive_that_asks_for_more_than_tensors_is_refused(
    tiny_clip: CLIP, tmp_path: Path
) -> None:
    openai_archive(tiny_clip, tmp_path / "openai.pt")
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    with (
        zipfile.ZipFile(tmp_path / "openai.pt") as source,
        zipfile.ZipFile(tmp_path / "evil.pt", "w") as target,
    ):
        for name in source.namelist():
            content = pickle.dumps(Payload()) if name.endswith("/data.pkl") else source.read(name)
            target.writestr(name, content)
    with pytest.raises(ArtifactError, match="is refused"):
        load_clip_weights(tiny_clip, tmp_path / "evil.pt")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_damaged_archive_is_found(tiny_clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "openai.pt"
    openai_archive(tiny_clip, path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        load_clip_weights(build_like(tiny_clip), path)


@pytest.mark.parametrize("kind", ["plain", "training", "safetensors"])
def test_open_clip_files_load(tiny_clip: CLIP, tmp_path: Path, kind: str) -> None:
    weights = dict(tiny_clip.state_dict())
    if kind == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "open_clip_model.safetensors"
        save_file({key: value.clone() for key, value in weights.items()}, path)
    else:
        path = tmp_path / "open_clip_pytorch_model.bin"
        wrapped = {
            "epoch": 3,
            "state_dict": {f"module.{key}": value for key, value in weights.items()},
        }
        torch.save(weights if kind == "plain" else wrapped, path)
    loaded = build_like(tiny_clip)
    load_clip_weights(loaded, path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_files_of_other_models_are_named(tiny_clip: CLIP, tmp_path: Path) -> None:
    torch.save(
        {**tiny_clip.state_dict(), "visual.positional_embedding": torch.zeros(50, 48)},
        tmp_path / "other.pt",
    )
    with pytest.raises(
        ArtifactError, match=r"visual\.positional_embedding \(50, 48\) instead of \(17, 48\)"
    ):
        load_clip_weights(tiny_clip, tmp_path / "other.pt")
    torch.save(
        {"text_model.embeddings.token_embedding.weight": torch.zeros(1)}, tmp_path / "hf.bin"
    )
    with pytest.raises(ArtifactError, match="Hugging Face transformers"):
        load_clip_weights(tiny_clip, tmp_path / "hf.bin")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ArtifactError, match=r"text\.pt"):
        load_clip_weights(tiny_clip, tmp_path / "text.pt")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_clip_weights(tiny_clip, tmp_path / "absent.pt")


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_transformers_stay_usable_for_open_clip_and_other_threads() -> None:
    """In a process of its own, since it is about the first import."""
    code = """
import threading
import torch
failures = []

def elsewhere():
    try:
        import transformers
    except ImportError as error:
        failures.append(error)

thread = threading.Thread(target=elsewhere)
thread.start()
import regionspot.modeling.clip
thread.join()
assert not failures, failures
import open_clip.hf_model
assert open_clip.hf_model.transformers is not None
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr

"""Models by name. Weights are files that the user names; only regionspot_mini brings its own."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regionspot.errors import ArtifactError, InputError
from regionspot.modeling.checkpoint import load_head
from regionspot.modeling.clip import ClipBackbone, build_clip, load_clip_weights
from regionspot.modeling.devices import resolve_device
from regionspot.modeling.head import RegionHead
from regionspot.modeling.precision import resolve_dtype
from regionspot.modeling.regionspot import RegionSpot
from regionspot.modeling.sam import SamBackbone, build_sam, load_sam_weights
from regionspot.runtime.engine_file import file_sha256

MINI = "regionspot_mini"
MINI_HEAD = Path(__file__).parents[1] / "mini" / "weights" / "head.safetensors"

TRUST = "REGIONSPOT_TRUST_WEIGHTS"
"""The environment variable that, set to 1, leaves out `UnknownWeightsWarning`."""

_PathLike = str | Path


class UnknownWeightsWarning(UserWarning):
    """A weight file fits the model, but nothing says that it was trained with the model's
    activation and pixels.
    """


@dataclass(frozen=True)
class WeightFile:
    """A file that its authors publish."""

    name: str
    url: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} from {self.url} (SHA-256 {self.sha256})"


@dataclass(frozen=True)
class Preset:
    """A SAM size and an OpenAI CLIP (by open_clip's name), whose weights need QuickGELU."""

    sam_size: str
    clip_name: str


_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_CLIP_URL = "https://openaipublic.azureedge.net/clip/models/"
_HEADS_AT = "https://github.com/Surrey-UPLab/Recognize-Any-Regions"


def _sam_file(name: str, sha256: str) -> WeightFile:
    return WeightFile(name, _SAM_URL + name, sha256)


def _clip_file(name: str, sha256: str) -> WeightFile:
    return WeightFile(name, f"{_CLIP_URL}{sha256}/{name}", sha256)


SAM_FILES = {
    "vit_b": _sam_file(
        "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": _sam_file(
        "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": _sam_file(
        "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
}
CLIP_FILES = {
    "ViT-B-16": _clip_file(
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    ),
    "ViT-L-14": _clip_file(
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
    ),
    "ViT-L-14-336": _clip_file(
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
    ),
}
PRESETS = {
    f"regionspot_{clip}{sam}": Preset(sam_size, clip_name)
    for clip, clip_name in (("bb", "ViT-B-16"), ("bl", "ViT-L-14"), ("bl_336", "ViT-L-14-336"))
    for sam, sam_size in (("", "vit_b"), ("_sam_l", "vit_l"), ("_sam_h", "vit_h"))
}


def list_presets() -> tuple[str, ...]:
    """The names that `create_model` knows."""
    return (MINI, *PRESETS)


def create_model(
    name: str,
    sam_weights: _PathLike | None = None,
    clip_weights: _PathLike | None = None,
    head_weights: _PathLike | None = None,
    random_weights: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> RegionSpot:
    """Makes a complete model, in evaluation mode.

    Args:
        name: one of `list_presets()`.
        sam_weights: SAM's official `.pth`. Any other file gives an `UnknownWeightsWarning`.
        clip_weights: OpenAI's `.pt`, or an open_clip file of the same weights, which gives an
            `UnknownWeightsWarning`: files trained by others, such as LAION's, fit as well, and
            answer wrongly without OpenAI's activation and normalisation.
        head_weights: from `regionspot-train` or `regionspot convert`. regionspot_mini has one of
            its own.
        random_weights: a seed for whatever has no file: for tests, benchmarks and heads still to be
            trained.
        device: "cpu" (the default), "cuda", "cuda:1", or "auto" for a GPU if there is one.
        dtype: "fp32" (the default), or "bf16" or "fp16": both image encoders, CLIP's text
            transformer and the head then take half the memory and work in half precision, see
            `regionspot.modeling.precision`. It is faster on GPUs and on CPUs with instructions for
            it (AVX512-BF16, AMX), and several times slower on others.

    Raises:
        InputError: an unknown name, device or dtype, or weights neither given nor random; says
            which file to get and from where.
        ArtifactError: a file is missing, damaged, or made for another model.
    """
    target = _target(device, dtype)
    if name == MINI and head_weights is None and random_weights is None:
        head_weights = MINI_HEAD
    if name in PRESETS:
        _check_files(name, sam_weights, clip_weights, random_weights, (head_weights,))
    sam, clip = create_backbones(name, sam_weights, clip_weights, random_weights, **target)
    if head_weights is not None:
        head = load_head(head_weights)
    else:
        with _seeded(random_weights):
            head = RegionHead(sam.token_dim, clip.width, clip.embed_dim)
    return RegionSpot(sam, clip, head.to(**target), name).eval()


def _target(device: str | torch.device | None, dtype: str | torch.dtype | None) -> dict[str, Any]:
    """Arguments of `Module.to`. Without a device, modules stay where they were made, such as on
    "meta".
    """
    where = {} if device is None else {"device": resolve_device(device)}
    return {"dtype": resolve_dtype(dtype), **where}


def create_backbones(
    name: str,
    sam_weights: _PathLike | None = None,
    clip_weights: _PathLike | None = None,
    random_weights: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[SamBackbone, ClipBackbone]:
    """Makes the frozen towers of a preset, for which a head is then trained. Arguments and errors
    as `create_model`.
    """
    target = _target(device, dtype)
    if name == MINI:
        sam, clip = _mini_backbones(sam_weights, clip_weights, random_weights)
    else:
        sam, clip = _full_size_backbones(name, sam_weights, clip_weights, random_weights)
    return sam.to(**target), clip.to(**target)


def _full_size_backbones(
    name: str,
    sam_weights: _PathLike | None,
    clip_weights: _PathLike | None,
    random_weights: int | None,
) -> tuple[SamBackbone, ClipBackbone]:
    if name not in PRESETS:
        raise InputError(f"there is no model {name!r}: choose one of {', '.join(list_presets())}")
    _check_files(name, sam_weights, clip_weights, random_weights)
    preset = PRESETS[name]
    with _seeded(random_weights):
        sam = build_sam(preset.sam_size)
        clip = build_clip(preset.clip_name, quick_gelu=True)
    if sam_weights is not None:
        load_sam_weights(sam, sam_weights)
        _warn_unless_official("sam_weights", sam_weights, SAM_FILES[preset.sam_size])
    if clip_weights is not None:
        load_clip_weights(clip, clip_weights)
        _warn_unless_official("clip_weights", clip_weights, CLIP_FILES[preset.clip_name])
    return SamBackbone(sam), ClipBackbone(clip)


def _mini_backbones(
    sam_weights: _PathLike | None, clip_weights: _PathLike | None, random_weights: int | None
) -> tuple[SamBackbone, ClipBackbone]:
    if sam_weights is not None or clip_weights is not None:
        raise InputError(
            f"{MINI} brings its own SAM and CLIP: leave out sam_weights and clip_weights"
        )
    from regionspot.mini.architecture import build_mini_clip, build_mini_sam
    from regionspot.mini.shipped import load_mini_backbones

    if random_weights is None:
        return load_mini_backbones()
    with _seeded(random_weights):
        return SamBackbone(build_mini_sam()), ClipBackbone(build_mini_clip())


def _check_files(
    name: str,
    sam_weights: _PathLike | None,
    clip_weights: _PathLike | None,
    random_weights: int | None,
    head_weights: tuple[_PathLike | None, ...] = (),
) -> None:
    """Look for all files before anything large is built. `head_weights` is empty where no head is
    wanted.
    """
    preset = PRESETS[name]
    head_source = f"a head trained for it, or the authors' ({_HEADS_AT}) after `regionspot convert`"
    wanted = [
        ("sam_weights", sam_weights, str(SAM_FILES[preset.sam_size])),
        ("clip_weights", clip_weights, str(CLIP_FILES[preset.clip_name])),
        *(("head_weights", path, head_source) for path in head_weights),
    ]
    absent = [f"  {argument}: {source}" for argument, path, source in wanted if path is None]
    if absent and random_weights is None:
        raise InputError(
            "\n".join([f"{name} needs weights; get these files and pass their paths:", *absent])
        )
    for argument, path, source in wanted:
        if path is not None and not Path(path).is_file():
            raise ArtifactError(f"{argument} {path} does not exist; {name} takes {source}")


def _warn_unless_official(argument: str, path: _PathLike, official: WeightFile) -> None:
    if os.environ.get(TRUST) == "1" or file_sha256(Path(path)) == official.sha256:
        return
    trained = {
        "sam_weights": "the pixel normalisation of Meta's",
        "clip_weights": "the activation (QuickGELU) and the pixel normalisation of OpenAI's",
    }
    warnings.warn(
        f"{argument} {path} is not {official.name} as published (its SHA-256 is another). It is "
        f"run with {trained[argument]}, and answers wrongly if it was trained with others, as "
        f"LAION's and DataComp's CLIP were. If it is right, set {TRUST}=1",
        UnknownWeightsWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw weights from `seed` and leave the global generator as it was; with None they are about
    to be replaced.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield

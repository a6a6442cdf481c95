"""The trained weights that come with the package, and how they are written.

They are kept in half precision, and CLIP's token embedding without the rows of words that it never
met: the numbers in the files, not those before rounding, are the model. In memory everything is
single precision and full size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from regionspot.mini.architecture import build_mini_clip, build_mini_sam, position_table
from regionspot.modeling.checkpoint import load_tensors, save_tensors
from regionspot.modeling.clip import OPENAI_VOCABULARY_SIZE, ClipBackbone
from regionspot.modeling.sam import SamBackbone
from regionspot.modeling.weights import load_strictly

WEIGHTS_DIR = Path(__file__).parent / "weights"
FORMAT = "regionspot-mini-1"
TOKEN_EMBEDDING = "token_embedding.weight"
TOKEN_IDS = "token_ids"  # (K,) int32: which rows of the token embedding the file holds


def save_sam(sam: nn.Module, directory: Path = WEIGHTS_DIR) -> Path:
    """Write `sam.safetensors`."""
    path = directory / "sam.safetensors"
    save_tensors(path, _halved(sam.state_dict()), FORMAT)
    return path


def save_clip(clip: nn.Module, token_ids: Tensor, directory: Path = WEIGHTS_DIR) -> Path:
    """Write `clip.safetensors`; `token_ids` (K,) are the tokens that the K rows of its embedding
    stand for.
    """
    path = directory / "clip.safetensors"
    save_tensors(path, _halved(clip.state_dict()) | {TOKEN_IDS: token_ids.int()}, FORMAT)
    return path


def load_mini_backbones(directory: Path = WEIGHTS_DIR) -> tuple[SamBackbone, ClipBackbone]:
    """The small SAM and CLIP, frozen, on the CPU.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    sam, clip = build_mini_sam(), build_mini_clip()
    load_mini_sam(sam, directory)
    load_mini_clip(clip, directory)
    return SamBackbone(sam), ClipBackbone(clip, position_table=position_table)


def load_mini_sam(sam: nn.Module, directory: Path = WEIGHTS_DIR) -> None:
    """Read `sam.safetensors`. Raises ArtifactError."""
    path = directory / "sam.safetensors"
    tensors, _ = load_tensors(path, FORMAT)
    load_strictly(sam, _expanded(tensors, sam, None), path)


def load_mini_clip(
    clip: nn.Module, directory: Path = WEIGHTS_DIR, token_ids: Tensor | None = None
) -> None:
    """Read `clip.safetensors`; `token_ids` as in `save_clip`, None for a model of all tokens.
    Raises ArtifactError.
    """
    path = directory / "clip.safetensors"
    tensors, _ = load_tensors(path, FORMAT)
    load_strictly(clip, _expanded(tensors, clip, token_ids), path)


def _halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def _expanded(
    tensors: dict[str, Tensor], module: nn.Module, token_ids: Tensor | None
) -> dict[str, Tensor]:
    """The file's tensors in single precision, with the rows of unknown words zero."""
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    if TOKEN_IDS in state:
        own = module.get_parameter(TOKEN_EMBEDDING)
        known = state.pop(TOKEN_IDS).long()
        rows = torch.zeros(OPENAI_VOCABULARY_SIZE, own.shape[1])
        rows[known] = state[TOKEN_EMBEDDING]
        state[TOKEN_EMBEDDING] = rows if token_ids is None else rows[token_ids.long()]
    return state

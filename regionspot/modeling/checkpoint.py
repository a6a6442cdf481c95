"""Our own weight files: safetensors with a checksum, written atomically. And the import of the
authors' checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash

from regionspot.errors import ArtifactError, is_interrupt
from regionspot.files import write_atomically
from regionspot.modeling.head import RegionHead
from regionspot.modeling.weights import (
    check_fits,
    check_is_file,
    first_line,
    held_bytes,
    load_strictly,
    read_checkpoint,
    without_prefix,
)

HEAD_FORMAT = "regionspot-head-1"
_METADATA_KEY = "regionspot"
OFFICIAL_NUM_HEADS = 8
OFFICIAL_DROPOUT = 0.1
_SIZES = ("token_dim", "clip_width", "embed_dim", "num_layers", "num_heads", "feedforward_dim")
_FOUNDATION_PREFIXES = ("sam.", "clip_model.", "text_feats")


def save_head(
    head: RegionHead, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the head's weights and dimensions, and nothing else of the model, to a safetensors
    file, atomically.

    Args:
        metadata: anything that JSON can hold, such as the training configuration; read back by
            `read_head_metadata`.

    Raises:
        ArtifactError: the file cannot be written. An older file of that name is then untouched.
    """
    header = {"dimensions": _dimensions(head), "metadata": dict(metadata or {})}
    save_tensors(path, head.state_dict(), HEAD_FORMAT, header)


def load_head(path: str | Path) -> RegionHead:
    """A head from `save_head`'s file, on the CPU, in evaluation mode.

    Raises:
        ArtifactError: the file is missing, damaged (a single flipped bit is found), or not a head
            of ours.
    """
    tensors, header = load_tensors(path, HEAD_FORMAT)
    head = _head_of(_checked_dimensions(header.get("dimensions"), path), tensors, path)
    load_strictly(head, tensors, path)
    return head.eval()


def read_head_metadata(path: str | Path) -> dict[str, Any]:
    """What was given to `save_head` as `metadata`. Errors as in `load_head`."""
    header = load_tensors(path, HEAD_FORMAT)[1]
    if not isinstance(header.get("metadata"), dict):
        raise ArtifactError(f"{path} was not written by regionspot: its header has no metadata")
    metadata: dict[str, Any] = header["metadata"]
    return metadata


def convert_official(source: str | Path, target: str | Path) -> RegionHead:
    """Turn one of the authors' checkpoints into a file for `load_head`, and return the head.

    Their files hold `{"model": {...}}` with or without a `model.` prefix, often with SAM, CLIP and
    text features inside, which are left out. The head's sizes are read off its weights, but for the
    number of attention heads, which leaves no trace there and is 8 in all their models.

    Raises:
        ArtifactError: `source` holds more than weights, or keys of the head are missing or unknown;
            they are named.
    """
    content = read_checkpoint(source)
    weights = content["model"] if isinstance(content.get("model"), dict) else content
    weights = without_prefix(weights, "model.", source)
    weights = {
        key: value for key, value in weights.items() if not key.startswith(_FOUNDATION_PREFIXES)
    }
    head = _official_head(weights, source)
    load_strictly(head, {key: _as_float32(value) for key, value in weights.items()}, source)
    save_head(head, target, {"converted_from": Path(source).name})
    return head.eval()


def _official_head(weights: Mapping[str, Any], source: str | Path) -> RegionHead:
    """An untrained head of the sizes that `weights` have."""
    needed = ("to_clip.weight", "projector.weight", "decoder.layers.0.linear1.weight")
    missing = [
        key
        for key in needed
        if not isinstance(weights.get(key), torch.Tensor) or weights[key].ndim != 2
    ]
    if missing:
        raise ArtifactError(
            f"{source} is not a RegionSpot checkpoint: it lacks {', '.join(missing)}. It holds "
            f"{len(weights)} other "
            f"entries{', such as ' + ', '.join(list(weights)[:3]) if weights else ''}."
        )
    layers = {key.split(".")[2] for key in weights if key.startswith("decoder.layers.")}
    clip_width, token_dim = weights["to_clip.weight"].shape
    dimensions = {
        "token_dim": token_dim,
        "clip_width": clip_width,
        "embed_dim": weights["projector.weight"].shape[0],
        "num_layers": len(layers),
        "num_heads": OFFICIAL_NUM_HEADS,
        "feedforward_dim": weights["decoder.layers.0.linear1.weight"].shape[0],
        "dropout": OFFICIAL_DROPOUT,
    }
    return _head_of(_checked_dimensions(dimensions, source), weights, source)


def _checked_dimensions(dimensions: Any, source: str | Path) -> dict[str, Any]:
    """Arguments of `RegionHead`, as a file states them.

    Raises:
        ArtifactError: some are missing, unknown, or no sizes.
    """
    if not isinstance(dimensions, dict):
        raise ArtifactError(f"{source} was not written by regionspot: its header has no dimensions")
    known: dict[str, Any] = {name: dimensions.get(name) for name in _SIZES}
    wrong = [name for name, size in known.items() if type(size) is not int or size < 1]
    wrong += [name for name in dimensions if name not in (*_SIZES, "dropout", "multimask")]
    dropout: Any = dimensions.get("dropout")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        wrong.append("dropout")
    if type(dimensions.get("multimask", False)) is not bool:
        wrong.append("multimask")
    if wrong:
        stated = ", ".join(f"{name}: {dimensions.get(name, 'missing')!s:.40}" for name in wrong)
        raise ArtifactError(
            f"{source} states dimensions of a head that cannot be ({stated}): make the file again"
        )
    if known["clip_width"] % known["num_heads"]:
        raise ArtifactError(
            f"{source} states {known['num_heads']} attention heads, which do not divide a width of "
            f"{known['clip_width']}: make the file again"
        )
    return dimensions


def _head_of(
    dimensions: Mapping[str, Any], tensors: Mapping[str, Any], source: str | Path
) -> RegionHead:
    """An untrained head, made only where the file has weights of its size, whatever sizes it
    states.

    Raises:
        ArtifactError: it has not.
    """
    if dimensions["num_layers"] > len(tensors):
        raise ArtifactError(
            f"{source} has {len(tensors)} weights, too few for {dimensions['num_layers']} layers"
        )
    try:
        with torch.device("meta"):
            without_memory = RegionHead(**dimensions)
    except Exception as error:  # products of sizes that overflow, say
        if is_interrupt(error):
            raise
        raise ArtifactError(
            f"{source} states dimensions of a head that cannot be ({first_line(error)})"
        ) from error
    check_fits(without_memory, tensors, source)
    if sum(tensor.nbytes for tensor in tensors.values()) > held_bytes(tensors.values()):
        raise ArtifactError(
            f"{source} is refused: its tensors share their numbers, so that they are larger than it"
        )
    with torch.random.fork_rng(devices=[]):
        return RegionHead(**dimensions)


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value


def _dimensions(head: RegionHead) -> dict[str, Any]:
    return {name: getattr(head, name) for name in (*_SIZES, "dropout", "multimask")}


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    file_format: str,
    header: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors and a JSON header to a safetensors file with a checksum, atomically. Equal
    content, equal bytes.

    Args:
        file_format: the name and version of what the file holds; `load_tensors` asks for the same.

    Raises:
        ArtifactError: the file cannot be written. An older file of that name is then untouched.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {"format": file_format, "header": dict(header or {})}
    entries["xxh3_128"] = _checksum(tensors, entries)
    # One metadata entry, since safetensors writes several in random order.
    write_atomically(
        path, safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(entries, sort_keys=True)})
    )


def load_tensors(
    path: str | Path, file_format: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and header of a `save_tensors` file, both proven by the checksum.

    Raises:
        ArtifactError: the file is missing, unreadable, damaged (a single flipped bit is found), or
            of another format.
    """
    check_is_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ArtifactError(
            f"weight file {path} cannot be read: {error.strerror or error}"
        ) from error
    except Exception as error:  # of whatever type: a header can say anything
        if isinstance(error, MemoryError) or is_interrupt(error):
            raise
        raise ArtifactError(
            f"{path} is damaged or no safetensors file ({first_line(error)}). "
            "A checkpoint of the authors (.pth) must first go through `regionspot convert`."
        ) from error
    entries = entries if isinstance(entries, dict) else {}
    stated = entries.pop("xxh3_128", None)
    if (
        stated is None
        or entries.get("format") != file_format
        or not isinstance(entries.get("header"), dict)
    ):
        raise ArtifactError(
            f"{path} is a safetensors file, but not one that regionspot saved as "
            f"{file_format}{_what_else(tensors)}"
        )
    if stated != _checksum(tensors, entries):
        raise ArtifactError(
            f"{path} is damaged: its content does not match its checksum. Copy or make it again."
        )
    return tensors, entries["header"]


def _what_else(tensors: Mapping[str, Any]) -> str:
    """How to come to a head from the state of a training run, or from the authors' weights."""
    if any(name.startswith("optimizer.") for name in tensors):
        return (
            ": it is the state of a training run, to go on from by regionspot-train --resume; the "
            "run writes its head beside its folder checkpoints, as head.safetensors, at the end"
        )
    if any(name.removeprefix("model.").startswith("to_clip.") for name in tensors):
        return (
            ": it holds a head of the authors' layout, which must first go through `regionspot "
            "convert`"
        )
    return ""


def _checksum(tensors: Mapping[str, torch.Tensor], entries: Mapping[str, Any]) -> str:
    """xxh3 over the entries and every tensor's name, type, shape and bytes, in the order of the
    names.
    """
    digest = xxhash.xxh3_128(json.dumps(dict(entries), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

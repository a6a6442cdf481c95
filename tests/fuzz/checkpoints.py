"""Weight files, damaged and foreign, through every function that reads one."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from regionspot.errors import RegionSpotError
from regionspot.mini.architecture import build_mini_clip
from regionspot.modeling.checkpoint import (
    HEAD_FORMAT,
    convert_official,
    load_head,
    read_head_metadata,
    save_head,
    save_tensors,
)
from regionspot.modeling.clip import load_clip_weights
from regionspot.modeling.head import RegionHead
from regionspot.modeling.sam import load_sam_weights
from regionspot.modeling.weights import read_checkpoint
from tests.fuzz.target import attempt, check, write
from tests.fuzz.trees import NUMBERS, Note, mutate_bytes, mutate_values, strange_value

HEAD_BYTES = 1500
HEADER_KEY = "regionspot"
CANARY = "canary"
DIMENSIONS = {
    "token_dim": 8,
    "clip_width": 16,
    "embed_dim": 4,
    "num_layers": 1,
    "num_heads": 8,
    "feedforward_dim": 8,
}


class Checkpoints:
    """The target."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        self._directory = directory
        os.chdir(directory)  # where a file that runs code would leave its trace
        self._head = RegionHead(**DIMENSIONS)  # type: ignore[arg-type]
        self._clip = build_mini_clip(vocab_size=32)
        save_head(self._head, directory / "own", {"config": {"steps": 3}, "names": ["a", "é"]})
        self._header = _header_of(directory / "own")
        self._files = {
            "own.safetensors": (directory / "own").read_bytes(),
            "foreign.safetensors": safetensors.torch.save(self._head.state_dict()),
            "official.pth": _pickled(self._official()),
            "legacy.pth": _pickled(self._official(), zipped=False),
            "clip.pt": _pickled(
                {
                    "state_dict": {
                        f"module.{k}": v.half() for k, v in self._clip.state_dict().items()
                    }
                }
            ),
            "script.pt": _scripted(self._head),
        }

    def run(self, rng: random.Random, note: Note) -> bool:
        damaged = (
            self._bytes,
            self._bytes,
            self._archive,
            self._header_text,
            self._pickle,
            self._own_header,
            self._code,
        )
        cases = (*damaged, self._whole) if rng.random() < 0.2 else damaged
        accepted = rng.choice(cases)(rng, note)
        check(not (self._directory / CANARY).exists(), "a weight file ran code")
        return accepted

    def _whole(self, rng: random.Random, note: Note) -> bool:
        """Undamaged files are read by those that they are for."""
        readers: dict[str, Callable[[Path, bytes], bool]] = {
            "own.safetensors": self._read_head,
            "foreign.safetensors": rng.choice((self._convert, self._load_clip)),
            "official.pth": self._convert,
            "legacy.pth": self._convert,
            "clip.pt": self._load_clip,
            "script.pt": self._read_content,
        }
        name, read = rng.choice(list(readers.items()))
        note(f"{read.__name__} {name}")
        check(
            read(write(self._directory, name, self._files[name]), self._files[name]),
            "an undamaged file is refused",
        )
        return True

    def _bytes(self, rng: random.Random, note: Note) -> bool:
        name, content = rng.choice(list(self._files.items()))
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content) + 1)]
        elif rng.random() < 0.9:
            content = mutate_bytes(content, rng, HEAD_BYTES)
        note(f"the bytes of {name}")
        return self._read(name, content, rng, note)

    def _archive(self, rng: random.Random, note: Note) -> bool:
        """Members of a zip archive changed, removed, doubled or renamed, with the right
        checksums.
        """
        name = rng.choice(("official.pth", "clip.pt", "script.pt"))
        with zipfile.ZipFile(io.BytesIO(self._files[name])) as archive:
            members = [(member, archive.read(member)) for member in archive.namelist()]
        for _ in range(rng.choice((1, 1, 3))):
            index = rng.choice((rng.randrange(len(members)), 0))
            member, content = members[index]
            change = rng.choice(
                ("change", "change", "change", "remove", "double", "rename", "empty")
            )
            note(f"{change} {member} of {name}")
            if change == "change":
                members[index] = (member, mutate_bytes(content, rng))
            elif change == "remove" and len(members) > 1:
                del members[index]
            elif change == "double":
                members.append((f"{member}2", content))
            elif change == "rename":
                members[index] = (
                    rng.choice(("data.pkl", "../x", f"other/{Path(member).name}", "é")),
                    content,
                )
            elif change == "empty":
                members[index] = (member, b"")
        return self._read(name, _zipped(dict(members)), rng, note)

    def _header_text(self, rng: random.Random, note: Note) -> bool:
        """The JSON in front of a safetensors file changed, its length put right."""
        name = rng.choice(("own.safetensors", "foreign.safetensors"))
        content = self._files[name]
        length = struct.unpack("<Q", content[:8])[0]
        header = mutate_values(json.loads(content[8 : 8 + length]), rng, note, rng.choice((1, 2)))
        text = json.dumps(header).encode()
        length = rng.choice((len(text), len(text), len(text), 0, len(text) - 1, 2**40, 2**63))
        return self._read(name, struct.pack("<Q", length) + text + content[8 + length :], rng, note)

    def _pickle(self, rng: random.Random, note: Note) -> bool:
        """A checkpoint of the authors with other entries than it should have."""
        content = self._official()
        for _ in range(rng.choice((1, 1, 3))):
            where: dict[Any, Any] = (
                content["model"] if isinstance(content.get("model"), dict) else content
            )
            key = rng.choice(list(where) or [""])
            value = (
                _strange_tensor(where.get(key), rng) if rng.random() < 0.5 else strange_value(rng)
            )
            change = rng.choice(("replace", "replace", "remove", "add", "model", "key"))
            note(f"{change} {key}: {type(value).__name__} {getattr(value, 'shape', value)!r:.60}")
            if change == "replace":
                where[key] = value
            elif change == "remove":
                where.pop(key, None)
            elif change == "add":
                where[
                    rng.choice(
                        ("decoder.layers.7.linear1.weight", "decoder.layers.", "x", "", 7, None)
                    )
                ] = value
            elif change == "model":
                content["model"] = value
            else:
                where[rng.choice((0, None, 1.5, True, "é", f"{key} "))] = where.pop(key, value)
        return self._read("official.pth", _pickled(content), rng, note, tensors=content)

    def _own_header(self, rng: random.Random, note: Note) -> bool:
        """A file of ours whose checksum is right, as another version might write it."""
        header, tensors = json.loads(json.dumps(self._header)), dict(self._head.state_dict())
        if rng.random() < 0.4:
            key, value = rng.choice(list(header["dimensions"])), rng.choice(NUMBERS)
            note(f"{key} becomes {value!r:.40}")
            header["dimensions"][key] = value
        elif rng.random() < 0.7:
            header = mutate_values(header, rng, note, rng.choice((1, 1, 2)))
        if rng.random() < 0.5:
            key = rng.choice(list(tensors))
            tensors[key] = _strange_tensor(tensors[key], rng)
            note(f"{key} becomes {tensors[key].dtype} {tuple(tensors[key].shape)}")
        path = self._directory / "other.safetensors"
        try:
            save_tensors(path, tensors, HEAD_FORMAT, header)
        except Exception:  # what was made up cannot be written
            return False
        head = attempt(lambda: load_head(path))
        attempt(lambda: read_head_metadata(path))
        if isinstance(head, RegionSpotError):
            return False
        _check_state(head, tensors)
        for name, value in header["dimensions"].items():
            found = getattr(head, name)
            check(
                type(found) is type(value) or name == "dropout",
                f"{name} {value!r:.80} is read as {found!r}",
            )
            check(found == value, f"{name} {value!r:.80} is read as {found!r}")
        return True

    def _code(self, rng: random.Random, note: Note) -> bool:
        """Pickles that would run code."""
        evil = pickle.dumps(_Evil(), protocol=rng.choice((0, 2, 4)))
        how = rng.choice(("pickle", "archive", "script", "inside"))
        note(f"code as {how}")
        if how == "pickle":
            content = evil
        elif how == "inside":
            content = _pickled({"model": {"to_clip.weight": _Evil()}}, zipped=rng.random() < 0.5)
        else:
            with zipfile.ZipFile(
                io.BytesIO(self._files["script.pt" if how == "script" else "official.pth"])
            ) as archive:
                members = {member: archive.read(member) for member in archive.namelist()}
            name = next(member for member in members if member.endswith("data.pkl"))
            content = _zipped(members | {name: evil})
        return self._read("evil.pth", content, rng, note)

    def _read(
        self,
        name: str,
        content: bytes,
        rng: random.Random,
        note: Note,
        tensors: dict[str, Any] | None = None,
    ) -> bool:
        """Gives a file to one of the readers."""
        path = write(
            self._directory,
            rng.choice((name, name, "weights.safetensors", "weights.pth", "weights")),
            content,
        )
        read = rng.choice(
            (self._read_content, self._read_head, self._convert, self._convert, self._load_clip)
        )
        note(f"{read.__name__} {path.name}")
        try:
            return read(path, content)
        finally:
            path.unlink(missing_ok=True)

    def _read_content(self, path: Path, content: bytes) -> bool:
        read = attempt(lambda: read_checkpoint(path))
        check(isinstance(read, (RegionSpotError, dict)), f"a {type(read).__name__} was read")
        return isinstance(read, dict)

    def _read_head(self, path: Path, content: bytes) -> bool:
        """A head of ours that is accepted is the one that was saved: the checksum finds everything
        else.
        """
        head, metadata = attempt(lambda: load_head(path)), attempt(lambda: read_head_metadata(path))
        if isinstance(head, RegionSpotError):
            return False
        _check_state(head, self._head.state_dict())
        check(metadata == self._header["metadata"], f"metadata {metadata!r:.200}")
        check(
            all(getattr(head, key) == value for key, value in DIMENSIONS.items()),
            "other dimensions",
        )
        return True

    def _convert(self, path: Path, content: bytes) -> bool:
        """What is converted is what `load_head` reads; where it is refused, the older target
        stays.
        """
        target = write(self._directory, "converted.safetensors", b"older")
        head = attempt(lambda: convert_official(path, target))
        if isinstance(head, RegionSpotError):
            check(target.read_bytes() == b"older", "a refused conversion changes the target")
            return False
        _check_state(load_head(target), head.state_dict())
        read = read_checkpoint(path)
        weights = read["model"] if isinstance(read.get("model"), dict) else read
        _check_state(
            head, {str(key).removeprefix("model."): value for key, value in weights.items()}
        )
        return True

    def _load_clip(self, path: Path, content: bytes) -> bool:
        """Into CLIP, and into a module by SAM's way; what is refused leaves the module as it
        was.
        """
        clip_before = {key: value.clone() for key, value in self._clip.state_dict().items()}
        loaded = attempt(lambda: load_clip_weights(self._clip, path))
        if isinstance(loaded, RegionSpotError):
            _check_state(self._clip, clip_before)
        self._clip.load_state_dict(clip_before)
        head = RegionHead(**DIMENSIONS)  # type: ignore[arg-type]
        before = {key: value.clone() for key, value in head.state_dict().items()}
        as_sam = attempt(lambda: load_sam_weights(head, path))
        if isinstance(as_sam, RegionSpotError):
            _check_state(head, before)
        return loaded is None or as_sam is None

    def _official(self) -> dict[str, Any]:
        weights: dict[Any, Any] = {
            f"model.{name}": tensor for name, tensor in self._head.state_dict().items()
        }
        others = {
            "sam.x": torch.ones(2),
            "clip_model.y": torch.ones(2),
            "text_feats": torch.ones(1),
        }
        return {"model": weights | others, "iteration": 3}


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CANARY,)


def _check_state(module: nn.Module, expected: dict[str, Any]) -> None:
    for name, tensor in module.state_dict().items():
        given = expected.get(name)
        check(isinstance(given, Tensor), f"{name} is {type(given).__name__}")
        assert isinstance(given, Tensor)
        check(not given.is_complex(), f"{name} of {given.dtype} was accepted")
        same = given.to_dense() if given.layout != torch.strided else given
        same = (same.dequantize() if same.is_quantized else same).to(tensor.dtype)
        check(
            tensor.shape == same.shape
            and torch.equal(tensor.nan_to_num(1e9), same.nan_to_num(1e9)),
            f"{name} differs",
        )


def _strange_tensor(tensor: Any, rng: random.Random) -> Tensor:
    small = isinstance(tensor, Tensor) and tensor.numel() < 2**20 and tensor.layout == torch.strided
    old = (
        tensor
        if small and not tensor.is_complex() and not tensor.is_quantized
        else torch.ones(2, 2)
    )
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: old.half(),
        lambda: old.double() * 1e300,
        lambda: old.to(torch.complex64) * 1j,
        lambda: (old * 100).to(torch.int64),
        lambda: old > 0,
        lambda: old.flatten(),
        lambda: old[None],
        lambda: old[:0],
        lambda: torch.zeros(1).expand(2**20, 2**20),
        lambda: old[:1].expand(2**13, *old.shape[1:]),
        lambda: old * float("nan"),
        lambda: old.to_sparse(),
        lambda: torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8),
        lambda: nn.Parameter(old.float()),
        lambda: old.t() if old.ndim == 2 else old.flip(0),
        lambda: torch.tensor(0.5),
        lambda: old.to(torch.float8_e4m3fn),
    )
    return rng.choice(changes)()


def _header_of(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()[HEADER_KEY])["header"]
    return header


def _pickled(content: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _scripted(module: nn.Module) -> bytes:
    """A TorchScript archive with a module's tensors; the code that would use them is left out."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_clip, self.projector = module.to_clip, module.projector

        def forward(self, x: Tensor) -> Tensor:
            return x

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Holder(), torch.ones(1)), buffer)
    return buffer.getvalue()


def _zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()

"""Head files: what they hold, what they survive, and the import of the authors' checkpoints."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regionspot.errors import ArtifactError
from regionspot.modeling.checkpoint import (
    HEAD_FORMAT,
    _dimensions,
    convert_official,
    load_head,
    read_head_metadata,
    save_head,
    save_tensors,
)
from regionspot.modeling.head import RegionHead
from regionspot.modeling.weights import read_checkpoint

TOKEN_DIM, WIDTH, EMBED_DIM = 20, 48, 24


class OfficialHead(nn.Module):
    """The part of the authors' model that their checkpoints name, from `torch.nn` blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.to_clip = nn.Linear(TOKEN_DIM, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, 8, dim_feedforward=96, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=3, norm=nn.LayerNorm(WIDTH))
        self.projector = nn.Linear(WIDTH, EMBED_DIM)

    def forward(self, mask_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
        return self.projector(self.decoder(self.to_clip(mask_tokens), patch_tokens))


@pytest.fixture
def official() -> OfficialHead:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return OfficialHead().eval()


@pytest.fixture
def head() -> RegionHead:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return RegionHead(
            TOKEN_DIM, WIDTH, EMBED_DIM, num_layers=2, num_heads=4, feedforward_dim=32, dropout=0.2
        )


def random_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(2, 5, TOKEN_DIM, generator=generator), torch.randn(
        2, 17, WIDTH, generator=generator
    )


def test_round_trip(head: RegionHead, tmp_path: Path) -> None:
    path = tmp_path / "new" / "head.safetensors"
    save_head(head, path, {"steps": 12, "config": {"lr": 0.1}})
    loaded = load_head(path)
    assert not loaded.training
    assert (loaded.num_layers, loaded.num_heads, loaded.feedforward_dim, loaded.dropout) == (
        2,
        4,
        32,
        0.2,
    )
    assert torch.equal(loaded(*random_inputs()), head.eval()(*random_inputs()))
    assert read_head_metadata(path) == {"steps": 12, "config": {"lr": 0.1}}
    assert os.listdir(path.parent) == ["head.safetensors"]


def test_a_file_holds_the_head_alone(head: RegionHead, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_head(head, tmp_path / "head.safetensors")
    assert set(load_file(tmp_path / "head.safetensors")) == set(head.state_dict())


def test_saving_twice_gives_the_same_bytes(head: RegionHead, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_head(head, tmp_path / name, {"y": 1, "x": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_flipped_bit_is_found(head: RegionHead, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_head(head, path, {"steps": 12})
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    header = range(8 + 1, 8 + len(content[8:header_end].rstrip()))
    positions = [
        0,
        *list(header)[::7],
        *range(header_end, len(content), len(content) // 40),
        len(content) - 1,
    ]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"head\.safetensors"):
            load_head(path)


def test_cut_and_foreign_files_are_named(head: RegionHead, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_head(head, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"cut\.safetensors is damaged"):
        load_head(tmp_path / "cut.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtifactError, match="not one that regionspot saved as regionspot-head-1"):
        load_head(tmp_path / "foreign.safetensors")
    torch.save({"model": {}}, tmp_path / "official.pth")
    with pytest.raises(ArtifactError, match="regionspot convert"):
        load_head(tmp_path / "official.pth")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_head(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": None}, "num_layers: None"),
        ({"num_layers": 10**9}, "too few for 1000000000 layers"),
        ({"token_dim": 2**40}, "does not fit this RegionHead"),
        ({"clip_width": 2**62}, "cannot be"),
        ({"feedforward_dim": -1}, "feedforward_dim: -1"),
        ({"num_heads": 0}, "num_heads: 0"),
        ({"num_heads": 5}, "5 attention heads, which do not divide a width of 48"),
        ({"embed_dim": 24.0}, "embed_dim: 24.0"),
        ({"token_dim": True}, "token_dim: True"),
        ({"dropout": "none"}, "dropout: none"),
        ({"dropout": float("nan")}, "dropout: nan"),
        ({"multimask": 1}, "multimask: 1"),
        ({"depth": 3}, "depth: 3"),
    ],
)
def test_dimensions_that_cannot_be(
    head: RegionHead, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """The checksum is right: another program wrote it."""
    path = tmp_path / "head.safetensors"
    header = {"dimensions": _dimensions(head) | change, "metadata": {}}
    save_tensors(path, head.state_dict(), HEAD_FORMAT, header)
    with pytest.raises(ArtifactError, match=rf"head\.safetensors .*{message}"):
        load_head(path)


@pytest.mark.parametrize("header", [{}, {"dimensions": [1]}, {"metadata": "none"}])
def test_headers_without_what_belongs_in_them(
    head: RegionHead, tmp_path: Path, header: dict[str, Any]
) -> None:
    path = tmp_path / "head.safetensors"
    save_tensors(path, head.state_dict(), HEAD_FORMAT, header)
    for read in (load_head, read_head_metadata):
        with pytest.raises(ArtifactError, match="was not written by regionspot: its header has no"):
            read(path)


def test_metadata_that_are_no_object(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for content in (
        "[]",
        "7",
        "not JSON",
        '{"format": "regionspot-head-1", "xxh3_128": 5, "header": []}',
    ):
        save_file(
            {"weight": torch.zeros(1)}, tmp_path / "head.safetensors", {"regionspot": content}
        )
        with pytest.raises(ArtifactError, match=r"head\.safetensors is "):
            load_head(tmp_path / "head.safetensors")


def test_what_a_foreign_file_is_and_what_to_do_with_it(head: RegionHead, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = head.state_dict()
    save_file(
        {f"model.{name}": tensor for name, tensor in state.items()},
        tmp_path / "authors.safetensors",
    )
    with pytest.raises(
        ArtifactError,
        match=r"the authors' layout, which must first go through `regionspot convert`",
    ):
        load_head(tmp_path / "authors.safetensors")
    of_run = {f"head.{name}": tensor for name, tensor in state.items()} | {
        "optimizer.step": torch.zeros(1)
    }
    save_file(of_run, tmp_path / "state.safetensors")
    with pytest.raises(
        ArtifactError, match=r"the state of a training run.*writes its head .* as head\.safetensors"
    ):
        load_head(tmp_path / "state.safetensors")
    with pytest.raises(ArtifactError, match="is a folder: name the file in it"):
        load_head(tmp_path)
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(ArtifactError, match="weight file "):
            load_head(path)


def test_loading_leaves_the_global_generator(head: RegionHead, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head.safetensors")
    state = torch.get_rng_state()
    load_head(tmp_path / "head.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


class Crafted:
    """Pickles that ask the reader for what fails in ways of its own."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    "crafted",
    [
        Crafted(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4, 5, 6),
        Crafted(torch._utils._rebuild_tensor_v2),
        Crafted(torch._utils._rebuild_parameter, "no tensor", True, {}),
        Crafted(torch.Size, [-1, "a"]),
        Crafted(OrderedDict, 5),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_crafted_pickles(tmp_path: Path, crafted: Crafted, zipped: bool) -> None:
    torch.save({"model": crafted}, tmp_path / "crafted.pth", _use_new_zipfile_serialization=zipped)
    for read in (read_checkpoint, lambda path: convert_official(path, tmp_path / "out")):
        with pytest.raises(ArtifactError, match=r"crafted\.pth "):
            read(tmp_path / "crafted.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.complex64), "not dense real numbers: to_clip.bias"),
        (lambda tensor: tensor.to_sparse(), "not dense real numbers: to_clip.bias"),
        (lambda tensor: tensor.to("meta"), "not dense real numbers: to_clip.bias"),
        (lambda tensor: tensor[0], r"of another shape: to_clip.bias \(\) instead of \(48,\)"),
        (lambda tensor: tensor.tolist(), "of another shape: to_clip.bias list"),
        (lambda _: torch.zeros(1).expand(48), "its tensors share their numbers"),
    ],
)
def test_weights_that_are_not_what_they_should_be(
    official: OfficialHead, tmp_path: Path, change: Callable[[Tensor], Any], message: str
) -> None:
    state = official.state_dict()
    torch.save(
        {"model": state | {"to_clip.bias": change(state["to_clip.bias"])}},
        tmp_path / "official.pth",
    )
    (tmp_path / "out").write_text("older")
    with pytest.raises(ArtifactError, match=message):
        convert_official(tmp_path / "official.pth", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "older"


def test_a_small_file_of_huge_tensors(official: OfficialHead, tmp_path: Path) -> None:
    """Sizes that fit each other, and would take terabytes: all numbers are one number."""
    with torch.device("meta"):
        shapes = RegionHead(2**20, 2**20, 2**20, num_layers=1).state_dict()
    huge = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in shapes.items()}
    torch.save({"model": huge}, tmp_path / "huge.pth")
    with pytest.raises(
        ArtifactError, match="its tensors share their numbers, so that they are larger than it"
    ):
        convert_official(tmp_path / "huge.pth", tmp_path / "out")


def test_names_that_collide(official: OfficialHead, tmp_path: Path) -> None:
    state = official.state_dict()
    torch.save(
        {"model": state | {"model.to_clip.bias": state["to_clip.bias"] + 1}},
        tmp_path / "official.pth",
    )
    with pytest.raises(ArtifactError, match=r"weights of one name with and without 'model\.'"):
        convert_official(tmp_path / "official.pth", tmp_path / "out")


def test_an_archive_that_unpacks_to_more_than_its_size(
    official: OfficialHead, tmp_path: Path
) -> None:
    torch.save({"model": {"zeros": torch.zeros(2**23)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.namelist():
            bomb.writestr(member, plain.read(member))
    with pytest.raises(
        ArtifactError, match=r"bomb\.pth .*a compressed archive, which could fill the memory"
    ):
        read_checkpoint(tmp_path / "bomb.pth")


def test_unreadable_files_are_named(
    head: RegionHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    save_head(head, tmp_path / "head.safetensors")
    monkeypatch.setattr("safetensors.safe_open", refused)
    with pytest.raises(ArtifactError, match=r"head\.safetensors cannot be read: Permission denied"):
        load_head(tmp_path / "head.safetensors")
    monkeypatch.setattr("torch.load", refused)
    (tmp_path / "official.pth").touch()
    with pytest.raises(ArtifactError, match=r"official\.pth cannot be read: Permission denied"):
        read_checkpoint(tmp_path / "official.pth")


def test_full_disk_leaves_the_old_file(
    head: RegionHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head.safetensors"
    save_head(head, path, {"steps": 1})

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ArtifactError, match=r"cannot write .*head\.safetensors: the disk is full"):
        save_head(head, path, {"steps": 2})
    assert read_head_metadata(path) == {"steps": 1}
    assert os.listdir(tmp_path) == ["head.safetensors"]


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("foundations", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_official_checkpoint(
    official: OfficialHead, tmp_path: Path, prefix: str, foundations: bool, wrapped: bool
) -> None:
    weights = {prefix + name: tensor for name, tensor in official.state_dict().items()}
    if foundations:
        weights[f"{prefix}sam.image_encoder.pos_embed"] = torch.zeros(1, 4, 4, 8)
        weights[f"{prefix}clip_model.visual.conv1.weight"] = torch.zeros(8, 3, 2, 2)
        weights[f"{prefix}text_feats_lvis"] = torch.zeros(8, 1203)
    content: dict[str, Any] = (
        {"model": weights, "optimizer": {"lr": 0.1}, "iteration": 449999} if wrapped else weights
    )
    torch.save(content, tmp_path / "official.pth")
    convert_official(tmp_path / "official.pth", tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors")
    assert (head.num_layers, head.num_heads, head.feedforward_dim) == (3, 8, 96)
    torch.testing.assert_close(
        head(*random_inputs()), official(*random_inputs()), rtol=1e-5, atol=1e-5
    )
    assert set(head.state_dict()) == set(official.state_dict())


def test_half_precision_checkpoint_becomes_float32(official: OfficialHead, tmp_path: Path) -> None:
    torch.save({"model": official.half().state_dict()}, tmp_path / "official.pth")
    head = convert_official(tmp_path / "official.pth", tmp_path / "head.safetensors")
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


def test_unsafe_pickle_is_refused(official: OfficialHead, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save({"model": official.state_dict(), "hook": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps({"model": Payload()}, protocol=2))
    for name in ("evil.pth", "legacy.pth"):
        with pytest.raises(ArtifactError, match="is refused"):
            convert_official(tmp_path / name, tmp_path / "head.safetensors")
    assert not marker.exists()
    assert not (tmp_path / "head.safetensors").exists()


def test_missing_and_unknown_keys_are_named(official: OfficialHead, tmp_path: Path) -> None:
    weights = dict(official.state_dict())
    del weights["decoder.layers.1.norm2.bias"]
    weights["decoder.extra"] = torch.zeros(3)
    torch.save({"model": weights}, tmp_path / "official.pth")
    with pytest.raises(
        ArtifactError, match=r"missing: decoder\.layers\.1\.norm2\.bias; unexpected: decoder\.extra"
    ):
        convert_official(tmp_path / "official.pth", tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()


def test_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"backbone.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(
        ArtifactError,
        match=r"not a RegionSpot checkpoint: it lacks to_clip\.weight.*backbone\.weight",
    ):
        convert_official(tmp_path / "resnet.pth", tmp_path / "head.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ArtifactError, match="holds a list"):
        convert_official(tmp_path / "list.pth", tmp_path / "head.safetensors")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"empty\.pth"):
        convert_official(tmp_path / "empty.pth", tmp_path / "head.safetensors")

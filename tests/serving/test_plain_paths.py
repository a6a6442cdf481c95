"""Paths that a shell would tear apart, and links in their place."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regionspot.errors import ArtifactError
from regionspot.serving.client import RegionClient
from regionspot.serving.plain_paths import PlainPaths
from regionspot.serving.ports import Ports
from regionspot.serving.records import ServerRecord, running_server


@pytest.mark.parametrize(
    "name", ["two words", "repoü", "a;b", "$(id)", "a'b", 'a"b', "a&b", "a\nb"]
)
def test_a_link_stands_in(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    paths = PlainPaths()
    link = paths.path(folder)
    assert (
        link.is_symlink() and link.samefile(folder) and str(link).isascii() and " " not in str(link)
    )
    assert paths.path(folder) == link
    paths.remove()
    assert not link.parent.exists() and folder.is_dir()
    assert paths.path(folder).samefile(folder)
    paths.remove()


def test_a_plain_path_stays(tmp_path: Path) -> None:
    assert PlainPaths().path(tmp_path / "repo%1-2.x_y+z") == tmp_path / "repo%1-2.x_y+z"


def test_no_plain_place_for_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(
        ArtifactError, match=r"Triton cannot use the path .*two words.* Move it, or set TMPDIR"
    ):
        PlainPaths().path(folder)


def test_a_repository_with_a_space(
    repository: Path, home: Path, server: ServerRecord, tmp_path: Path, picture: Path
) -> None:
    """Served by the real server, with the answers of one whose path is plain; its links go when it
    stops.
    """
    there = shutil.copytree(repository, tmp_path / "my répo; x")
    image = np.asarray(Image.open(picture))
    asked: dict[str, Any] = {"boxes": [[5, 5, 90, 90]], "vocabulary": ("cat", "plain green toy")}
    with running_server(there, home) as running, RegionClient(running.ports.grpc_url) as client:
        found = client.recognize(image, **asked)
        links = [
            path
            for path in Path(tempfile.gettempdir()).glob("regionspot-*/path0")
            if path.samefile(there)
        ]
        assert len(links) == 1
    with RegionClient(server.ports.grpc_url) as client:
        assert np.allclose(client.recognize(image, **asked).scores, found.scores)
    assert not links[0].exists() and not links[0].is_symlink()


def test_ports_are_told_apart(server: ServerRecord, picture: Path) -> None:
    """The HTTP port as a gRPC address, and the other way round: the message names the port that is
    wanted.
    """
    ports: Ports = server.ports
    for url, said in (
        (f"127.0.0.1:{ports.http}", "is an HTTP port: name the server's gRPC port"),
        (f"127.0.0.1:{ports.metrics}", "is an HTTP port"),
        (f"http://127.0.0.1:{ports.grpc}", "does not speak HTTP: name the server's HTTP port"),
    ):
        with RegionClient(url, 20) as client, pytest.raises(ValueError, match=said):
            client.recognize(picture, [[5, 5, 90, 90]], ("cat", "dog"))

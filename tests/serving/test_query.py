"""`regionspot-query`, and the other commands over a server, against `regionspot predict` in this
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from regionspot.cli.main import main
from regionspot.data.coco_json import CocoDataset
from regionspot.serving.gateway import GatewaySettings
from regionspot.serving.records import ServerRecord
from tests.serving.network import Certificates, gateway, make_certificates

BOXES = ["--box", "5,5,90,90", "--point", "60,70"]


def document(path: Path) -> dict:
    return json.loads(path.read_text())


def assert_near(found: dict, expected: dict) -> None:
    assert found["image"] == expected["image"] and len(found["regions"]) == len(expected["regions"])
    for one, other in zip(found["regions"], expected["regions"], strict=True):
        assert (one["class"], one["box"], one["mask"]) == (
            other["class"],
            other["box"],
            other["mask"],
        )
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert [name for name, _ in one["top"]] == [name for name, _ in other["top"]]


@pytest.mark.parametrize(
    "vocabulary", ["plain green toy,red toy with blue stripes", "pets", "mini"]
)
def test_a_picture(
    vocabulary: str,
    server: ServerRecord,
    mini_artifacts_with_masks: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    query = [
        "query",
        str(picture),
        *BOXES,
        "--vocabulary",
        vocabulary,
        "--url",
        server.ports.grpc_url,
    ]
    assert main([*query, "--out", str(tmp_path / "o.png"), "--json", str(tmp_path / "q.json")]) == 0
    assert "regionspot_mini by onnxruntime at" in capsys.readouterr().out
    words = "cat,dog" if vocabulary == "pets" else vocabulary
    predict = ["predict", str(picture), *BOXES, "--vocabulary", words, "--runtime", "onnxruntime"]
    predict += ["--artifacts", str(mini_artifacts_with_masks)]
    assert (
        main([*predict, "--out", str(tmp_path / "p.png"), "--json", str(tmp_path / "p.json")]) == 0
    )
    assert_near(document(tmp_path / "q.json"), document(tmp_path / "p.json"))
    assert Image.open(tmp_path / "o.png").size == Image.open(tmp_path / "p.png").size


def test_predict_graph_by_graph(
    server: ServerRecord, picture: Path, mini_artifacts: Path, tmp_path: Path
) -> None:
    predict = ["predict", str(picture), *BOXES, "--vocabulary", "mini", "--json"]
    assert (
        main(
            [
                *predict,
                str(tmp_path / "t.json"),
                "--runtime",
                "triton",
                "--url",
                server.ports.grpc_url,
            ]
        )
        == 0
    )
    assert main([*predict, str(tmp_path / "p.json")]) == 0
    assert_near(document(tmp_path / "t.json"), document(tmp_path / "p.json"))


def test_a_folder(
    server: ServerRecord, dataset: CocoDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = dataset.image_path(dataset.images[0]).parent
    query = [
        "query",
        str(folder),
        "--vocabulary",
        "mini",
        "--url",
        server.ports.grpc_url,
        "--no-masks",
    ]
    assert (
        main([*query, "--regions", str(dataset.path), "--json", str(tmp_path / "all.jsonl")]) == 0
    )
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(lines) == len(dataset.images) and "pictures: " in printed.err
    for line, record in zip(
        lines, sorted(dataset.images, key=lambda record: record.file_name), strict=True
    ):
        assert line["image"]["file_name"] == Path(record.file_name).name
        assert len(line["regions"]) == len(dataset.annotations_by_image[record.id])


def test_a_folder_with_a_bad_picture(
    server: ServerRecord, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.jpg").write_bytes(picture.read_bytes())
    (tmp_path / "bad.jpg").write_bytes(picture.read_bytes()[:300])
    query = [
        "query",
        str(tmp_path),
        "--box",
        "5,5,90,90",
        "--vocabulary",
        "pets",
        "--url",
        server.ports.grpc_url,
    ]
    assert main(query) == 1
    printed = capsys.readouterr()
    assert "good.jpg: " in printed.out and "bad.jpg: the image" in printed.err


REFUSED = {
    "no region": (["PICTURE", "--vocabulary", "pets"], "give --box or --point at least once"),
    "address": (
        ["PICTURE", *BOXES, "--vocabulary", "pets", "--url", "ftp://x"],
        "is no server's address",
    ),
    "out": (["PICTURE", *BOXES, "--vocabulary", "pets", "--out", "x.gif"], "must end in one of"),
    "out of a folder": (
        ["FOLDER", *BOXES, "--vocabulary", "pets", "--out", "x.png"],
        "--out draws one picture",
    ),
    "missing": (["none.jpg", *BOXES, "--vocabulary", "pets"], "image 'none.jpg' cannot be read"),
    "nobody": (
        ["PICTURE", *BOXES, "--vocabulary", "pets", "--url", "127.0.0.1:9", "--timeout", "0.3"],
        "cannot answer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(
    case: str, server: ServerRecord, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    places = {"PICTURE": str(picture), "FOLDER": str(picture.parent)}
    given = [places.get(word, word) for word in words]
    if "--url" not in given:
        given += ["--url", server.ports.grpc_url]
    assert main(["query", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "triton"], "--runtime triton needs --url"),
        (["--url", "127.0.0.1:1"], "--url goes with --runtime triton"),
        (
            ["--runtime", "triton", "--url", "127.0.0.1:1", "--artifacts", "x"],
            "--artifacts would be ignored",
        ),
        (
            ["--runtime", "triton", "--url", "127.0.0.1:1", "--random-weights", "0"],
            "--random-weights would be ignored",
        ),
    ],
)
def test_options_of_the_runtime(
    options: list[str], message: str, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(picture), *BOXES, "--vocabulary", "cat,dog", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_every_kind_of_name(
    server: ServerRecord, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that is not UTF-8 loses no answer; what is passed over is counted."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name in (b"a.jpg", b"caf\xe9.jpg", b"._a.jpg", b"new.avif", b"below/b.jpg"):
        (folder / os.fsdecode(name)).write_bytes(picture.read_bytes())
    query = [
        "query",
        str(folder),
        "--box",
        "5,5,90,90",
        "--vocabulary",
        "pets",
        "--url",
        server.ports.grpc_url,
    ]
    assert main([*query, "--no-masks", "--json", str(tmp_path / "all.jsonl")]) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["image"]["file_name"] for line in lines] == ["a.jpg", "caf\\xe9.jpg"]
    assert lines[0]["regions"] == lines[1]["regions"] and "caf\\xe9.jpg: " in printed.out
    assert f"passed over in {folder}: 1 .avif file, 1 folder, 1 hidden file" in printed.err


def test_a_pipe_is_read_once(server: ServerRecord, picture: Path, tmp_path: Path) -> None:
    script = (
        f"cat '{picture}' | '{sys.executable}' -m regionspot.cli.main query /dev/stdin --box "
        "5,5,90,90"
    )
    script += (
        f" --vocabulary pets --url {server.ports.grpc_url} --no-masks --out '{tmp_path / 'o.png'}'"
    )
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)
    assert Image.open(tmp_path / "o.png").format == "PNG"


# ------------------------------------------------------------------ through a gateway

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def through(
    server: ServerRecord, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """The options that lead through TLS, a token and a gateway to the server."""
    token_file = tmp_path_factory.mktemp("token") / "token"
    token_file.write_text(f"{TOKEN}\n# a second line is none of it\n")
    with gateway(GatewaySettings(server.ports.grpc_url, token=TOKEN), certificates) as url:
        yield ["--url", url, "--token-file", str(token_file), "--ca-file", str(certificates.ca)]


def test_a_picture_through_a_gateway(
    through: list[str],
    server: ServerRecord,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    query = ["query", str(picture), *BOXES, "--vocabulary", "mini", "--json"]
    assert main([*query, str(tmp_path / "g.json"), *through]) == 0
    assert f"by onnxruntime at {through[1]}" in capsys.readouterr().out
    assert main([*query, str(tmp_path / "t.json"), "--url", server.ports.grpc_url]) == 0
    assert document(tmp_path / "g.json") == document(tmp_path / "t.json")


def test_a_folder_through_a_gateway(
    through: list[str],
    server: ServerRecord,
    dataset: CocoDataset,
    tmp_path: Path,
) -> None:
    folder = dataset.image_path(dataset.images[0]).parent
    query = ["query", str(folder), "--regions", str(dataset.path), "--vocabulary", "pets", "--json"]
    assert main([*query, str(tmp_path / "g.jsonl"), *through]) == 0
    assert main([*query, str(tmp_path / "t.jsonl"), "--url", server.ports.grpc_url]) == 0
    assert (tmp_path / "g.jsonl").read_bytes() == (tmp_path / "t.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("--token-file", "this gateway wants its token"),
        ("--ca-file", "name the file of its authority by ca_file (--ca-file)"),
    ],
)
def test_who_is_not_let_in(
    left_out: str,
    message: str,
    through: list[str],
    picture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = through.index(left_out)
    options = through[:place] + through[place + 2 :]
    assert main(["query", str(picture), *BOXES, "--vocabulary", "pets", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and TOKEN not in printed.err + printed.out


@pytest.mark.parametrize("content", [None, "", "\n\n", b"\xff\xfe"])
def test_a_token_file_that_holds_none(
    content: str | bytes | None, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    query = ["query", str(picture), *BOXES, "--vocabulary", "pets", "--url", "https://127.0.0.1:9"]
    assert main([*query, "--token-file", str(path)]) == 2
    assert f"--token-file {path}" in capsys.readouterr().err


def test_an_evaluation_through_a_gateway(
    through: list[str],
    server: ServerRecord,
    dataset: CocoDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The figures of the graphs themselves, from whole answers; words that no vocabulary holds are
    taught to the server first.
    """
    content = json.loads(dataset.path.read_text())
    content["images"] = content["images"][:6]
    kept = {image["id"] for image in content["images"]}
    annotations = [one for one in content["annotations"] if one["image_id"] in kept]
    used = {one["category_id"] for one in annotations}
    content["annotations"] = annotations
    for image in content["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[key] = [one for one in image.get(key, []) if one in used]
    content["categories"] = [one for one in content["categories"] if one["id"] in used]
    small = dataset.path.with_name("small.json")
    small.write_text(json.dumps(content))
    evaluate = ["eval", "--data", str(small), "--runtime", "triton", "--iou-type", "both", "--json"]
    assert main([*evaluate, str(tmp_path / "g.json"), *through]) == 0
    assert "behind a gateway" in capsys.readouterr().out
    assert main([*evaluate, str(tmp_path / "t.json"), "--url", server.ports.grpc_url]) == 0
    found, expected = document(tmp_path / "g.json"), document(tmp_path / "t.json")
    for figures in (found["head"], expected["head"]):
        del figures["protocol"]
    assert found == expected

    capsys.readouterr()
    methods = [*evaluate, str(tmp_path / "x.json"), "--methods", "head,constant_token"]
    assert main([*methods, *through]) == 2
    assert "is a gateway, which answers with the head's names alone" in capsys.readouterr().err


def test_graphs_of_a_gateway_are_refused(
    through: list[str], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = ["predict", str(picture), *BOXES, "--vocabulary", "mini", "--runtime", "triton"]
    assert main([*predict, *through]) == 2
    assert "--token-file is for a gateway" in capsys.readouterr().err
    assert main([*predict, *through[:2], *through[4:]]) == 2
    assert "is a gateway, which answers whole questions only" in capsys.readouterr().err


def test_words_that_would_play_with_the_terminal_are_shown(
    server: ServerRecord, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.json"
    words.write_text(json.dumps(["red\x1b[2J", "\u202eneerg", "blue\u2028toy", "\x9bm", "n\nl"]))
    url = ["--url", server.ports.grpc_url, "--no-masks"]
    query = ["query", str(picture), *BOXES, "--vocabulary", str(words), "--top-k", "5", *url]
    assert main(query) == 0
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a\x1b]0;b.jpg").write_bytes(picture.read_bytes())
    (folder / "b\x1b]0;b.jpg").write_bytes(b"none")
    query = ["query", str(folder), *BOXES, "--vocabulary", str(words), *url]
    assert main(query) == 1
    printed = capsys.readouterr()
    assert "a\\x1b]0;b.jpg: " in printed.out and "b\\x1b]0;b.jpg: " in printed.err
    text = printed.out + printed.err.replace("\r", "").replace("\x1b[K", "")  # of the progress
    assert all(letter.isprintable() or letter == "\n" for letter in text)

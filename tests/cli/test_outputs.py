"""Outputs that would destroy something, standard output as a file, and file names of any bytes."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from regionspot.cli.main import main
from regionspot.cli.outputs import (
    artifact_files,
    check_outputs,
    is_stdout,
    json_bytes,
    table_stream,
    write_output,
)
from regionspot.cli.paths import local_path
from regionspot.errors import InputError

ASKED = [
    "--box",
    "10,5,40,50",
    "--vocabulary",
    "red toy,blue toy",
    "--random-weights",
    "0",
    "--no-masks",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path_factory.getbasetemp() / "words"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two files, two links, a loop of links, a folder and a FIFO."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link").symlink_to("a.json")
    (tmp_path / "new link").symlink_to("new.json")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "an input": (
        {"--json": "a.json"},
        "--json a.json would overwrite the annotations, a.json: choose another name",
    ),
    "an input by a link": (
        {"--json": "link"},
        "--json link would overwrite the annotations, a.json",
    ),
    "an input by another way": ({"--json": "folder/../a.json"}, "would overwrite the annotations"),
    "one of several inputs": ({"--json": "b.json"}, "would overwrite a mask, b.json"),
    "a FIFO that is read": ({"--json": "fifo"}, "would overwrite the pipe"),
    "two outputs": (
        {"--json": "x", "--out": "x"},
        "--json and --out would both write x: choose two names",
    ),
    "two names of one": ({"--json": "new.json", "--out": "new link"}, "would both write new link"),
    "standard output twice": (
        {"--json": "-", "--out": "/dev/stdout"},
        "would both write /dev/stdout",
    ),
    "a folder": ({"--json": "folder"}, "--json folder is a folder: name a file in it"),
    "below a file": ({"--json": "a.json/x"}, r"--json a.json/x: .*a.json is no folder"),
    "a loop": ({"--json": "loop"}, "--json loop: its symbolic links form a loop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(folder: Path, case: str) -> None:
    outputs, message = REFUSED[case]
    inputs: dict[str, Any] = {
        "the annotations": "a.json",
        "a mask": [Path("b.json")],
        "the words": "cat,dog",
        "the pipe": "fifo",
    }
    with pytest.raises(InputError, match=message):
        check_outputs(outputs, inputs)


def test_what_may_be_written(folder: Path) -> None:
    check_outputs(
        {"--json": "new.json", "--out": None}, {"the annotations": "a.json", "a folder": "folder"}
    )
    check_outputs({"--json": "folder/x/y.json"}, {})
    check_outputs({"--json": os.devnull, "--out": os.devnull}, {"the words": os.devnull})
    check_outputs({"--json": "b.json"}, {"none": None, "words": "a" * 5000})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(folder: Path) -> None:
    (folder / "folder").chmod(0o500)
    with pytest.raises(InputError, match="may not be written to"):
        check_outputs({"--json": "folder/x"}, {})


def test_the_files_of_artefacts(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"graphs": [{"files": {"onnx/a.onnx": "0"}}]}))
    assert artifact_files(folder) == [folder / "manifest.json", folder / "onnx" / "a.onnx"]
    (folder / "manifest.json").write_text("[]")
    assert artifact_files(folder) == [folder / "manifest.json"] and artifact_files(None) == []


def test_standard_output_by_its_names(folder: Path) -> None:
    (folder / "stdout").symlink_to("/dev/stdout")
    assert all(map(is_stdout, ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "stdout"]))
    assert not any(map(is_stdout, ["a.json", "./-", "/dev/stderr", "loop", "none"]))
    assert (
        table_stream(None, Path("-")) is sys.stderr
        and table_stream(Path("a.json"), None) is sys.stdout
    )


def test_text_that_is_no_unicode_stays_json() -> None:
    assert json.loads(json_bytes({"name": "caf\udce9 ü"})) == {"name": "caf\udce9 ü"}


@pytest.mark.parametrize(
    "text", ["https://example.com/x.jpg", "s3://bucket/x.jpg", "file:///x.jpg"]
)
def test_urls_are_not_fetched(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", text, *ASKED])
    assert f"{text!r} is a URL, and nothing is fetched: download it" in capsys.readouterr().err
    assert str(local_path("c:/x.jpg")) == "c:/x.jpg"


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "teal").save("photo.png")
    return lambda *more, image="photo.png": main(["predict", image, *ASKED, *more])


def test_json_to_standard_output(
    predict: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("--json", "-") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["regions"]) == 1 and "90 x 60 pixels" in printed.err
    assert os.listdir() == ["photo.png"]


def test_a_device_stays_one(predict: Callable[..., int]) -> None:
    try:
        os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        Path("null").write_bytes(b"try")
    except OSError:
        pytest.skip("this user may not make or use devices")
    assert predict("--json", "null", "--out", "null") == 0
    assert stat.S_ISCHR(os.lstat("null").st_mode)


def test_a_name_that_is_not_utf8(
    predict: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    os.rename("photo.png", name)
    assert predict("--json", "o.json", image=name) == 0
    assert json.loads(Path("o.json").read_text())["image"]["file_name"] == "caf\\xe9.png"
    assert "caf\\xe9.png: 90 x 60 pixels" in capsys.readouterr().out


def test_a_loop_of_links_as_picture(
    predict: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink("loop.png", "loop.png")
    assert predict("--json", "o.json", image="loop.png") == 2
    assert "loop.png" in capsys.readouterr().err and not Path("o.json").exists()


def test_write_output_behind_what_was_printed(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    print("before")
    write_output("-", b"content\n")
    print("after", flush=True)
    assert capfdbinary.readouterr().out == b"before\ncontent\nafter\n"


COMMANDS = {
    "predict": "predict photo.png --box 1,1,9,9 --vocabulary words.txt --json words.txt",
    "a mask": "predict photo.png --mask mask.png --vocabulary a,b --out mask.png",
    "weights": "predict photo.png --box 1,1,9,9 --vocabulary a,b --head-weights head.json --json "
    "head.json",
    "artefacts": "predict photo.png --box 1,1,9,9 --vocabulary a,b --artifacts . --json "
    "manifest.json",
    "query": "query photo.png --box 1,1,9,9 --vocabulary a,b --json photo.png",
    "query of a folder": "query . --box 1,1,9,9 --vocabulary a,b --json photo.png",
    "query with annotations": "query . --regions head.json --vocabulary a,b --json head.json",
    "convert": "convert head.json head.json",
    "parity": "parity .:openvino torch --json manifest.json",
    "compare": "benchmark compare head.json words.txt --json words.txt",
    "report": "benchmark report head.json words.txt --html words.txt",
    "latency": "benchmark latency --picture photo.png --json photo.png",
    "export": "export --out artifacts --weights head.json --timing-cache head.json",
}


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_that_writes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "teal").save("photo.png")
    Image.new("L", (90, 60), "white").save("mask.png")
    for name in ("words.txt", "head.json", "manifest.json"):
        Path(name).write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(COMMANDS[case].split()) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

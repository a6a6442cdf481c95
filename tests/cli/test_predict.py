"""`regionspot predict` from its words to its files, on regionspot_mini's architecture with random
weights.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionspot.cli.main import main
from regionspot.cli.predict import EXAMPLE, build_parser
from regionspot.masks import decode_rle

HEIGHT, WIDTH = 60, 90
ASKED = [
    "--box",
    "10,5,40,50",
    "--vocabulary",
    "red toy,blue toy,plain toy",
    "--random-weights",
    "0",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path_factory.getbasetemp() / "words"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


WITHOUT_PYTORCH = """
import sys
from importlib.abc import MetaPathFinder


class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        heavy = ("torch", "torchvision", "open_clip", "segment_anything", "onnx", "timm")
        if name.partition(".")[0] in heavy:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
from regionspot.cli.main import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("vocabulary", ["red toy,blue toy", "mini"])
def test_artefacts_need_no_pytorch(
    mini_artifacts_with_masks: Path, photo: Path, tmp_path: Path, vocabulary: str
) -> None:
    asked = ["predict", str(photo), "--box", "10,5,40,50", "--vocabulary", vocabulary]
    options = ["--runtime", "onnxruntime", "--artifacts", str(mini_artifacts_with_masks)]
    command = [
        sys.executable,
        "-c",
        WITHOUT_PYTORCH,
        *asked,
        *options,
        "--json",
        str(tmp_path / "out.json"),
    ]
    run = subprocess.run(
        [*command, "--out", str(tmp_path / "out.png")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert main([*asked, "--json", str(tmp_path / "torch.json")]) == 0
    found, expected = (
        json.loads((tmp_path / name).read_text())["regions"][0]
        for name in ("out.json", "torch.json")
    )
    assert found["class"] == expected["class"]
    assert found["score"] == pytest.approx(expected["score"], abs=1e-3)


def test_boxes_points_and_masks_to_files(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[20:30, 50:80] = True
    Image.fromarray(region).save(tmp_path / "region.png")
    overlay, document = tmp_path / "new" / "overlay.png", tmp_path / "out.json"
    more = ["--box", "0,0,90,60", "--point", "20,30", "--mask", str(tmp_path / "region.png")]
    assert (
        main(["predict", str(photo), *ASKED, *more, "--out", str(overlay), "--json", str(document)])
        == 0
    )

    found = json.loads(document.read_text())
    assert found["image"] == {"file_name": "photo.png", "width": WIDTH, "height": HEIGHT}
    assert len(found["regions"]) == 4
    assert found["regions"][0]["box"] == [10, 5, 40, 50]
    assert found["regions"][3]["box"] == [50, 20, 80, 30]
    for each in found["regions"]:
        assert set(each) == {"box", "class", "score", "top", "mask", "iou"}
        assert [each["class"], each["score"]] == each["top"][0]
        assert len(each["top"]) == 3
        assert decode_rle(each["mask"]).shape == (HEIGHT, WIDTH)
    with Image.open(overlay) as drawn:
        assert drawn.size == (768, 512)

    printed = capsys.readouterr().out
    assert "photo.png: 90 x 60 pixels, regionspot_mini, 3 words" in printed
    assert re.search(
        r"^0 +10,5,40,50 +(red|blue|plain) toy +0\.\d\d +\w+ toy 0\.\d\d, ", printed, re.MULTILINE
    )
    assert f"wrote {overlay}" in printed
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("suffix", "file_format"), [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP")]
)
def test_overlay_formats(photo: Path, tmp_path: Path, suffix: str, file_format: str) -> None:
    overlay = tmp_path / f"overlay{suffix}"
    assert main(["predict", str(photo), *ASKED, "--no-masks", "--out", str(overlay)]) == 0
    with Image.open(overlay) as drawn:
        assert drawn.format == file_format


def test_fewer_things(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "out.json"
    single = ["--vocabulary", "toy", "--no-masks", "--top-k", "1", "--json", str(document)]
    assert main(["predict", str(photo), *ASKED, *single]) == 0
    (region,) = json.loads(document.read_text())["regions"]
    assert region["mask"] is None
    assert region["top"] == [["toy", 1.0]]
    assert "among one word every region scores 1.00" in capsys.readouterr().err


def test_coco_suffixes_are_left_out_on_request(photo: Path, tmp_path: Path) -> None:
    """What words the scores are of shows in their order: `wall-stuff` is a word of its own unless
    asked otherwise.
    """
    regions = []
    for words, clean in (
        ("wall-stuff,red toy", "coco"),
        ("wall,red toy", "none"),
        ("wall-stuff,red toy", "none"),
    ):
        options = [
            "--vocabulary",
            words,
            "--clean-names",
            clean,
            "--json",
            str(tmp_path / "out.json"),
            "--no-masks",
        ]
        assert main(["predict", str(photo), *ASKED, *options]) == 0
        regions.append(json.loads((tmp_path / "out.json").read_text())["regions"][0]["score"])
    assert regions[0] == regions[1] != regions[2]


def test_labels_in_a_font_of_ones_own(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.ttf").write_bytes(b"no font")
    assert (
        main(
            [
                "predict",
                str(photo),
                *ASKED,
                "--out",
                str(tmp_path / "o.png"),
                "--font",
                str(tmp_path / "no.ttf"),
            ]
        )
        == 2
    )
    assert "no.ttf" in capsys.readouterr().err and not (tmp_path / "o.png").exists()
    font = ["--font", str(tmp_path / "no.ttf")]
    assert main(["predict", str(photo), *ASKED, *font, "--json", str(tmp_path / "no.ttf")]) == 2
    assert (tmp_path / "no.ttf").read_bytes() == b"no font"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocabulary", "cat,dog"], "no region was asked for: give --box, --point or --mask"),
        ([*ASKED, "--vocabulary", "cat,cat"], "'cat'"),
        ([*ASKED, "--vocabulary", ""], "vocabulary is empty"),
        ([*ASKED, "--box", "50,5,40,50"], r"box 1 \[50, 5, 40, 50\] is inverted"),
        (
            [*ASKED, "--box", "nan,5,40,50"],
            r"box 1 \[nan, 5, 40, 50\] has a coordinate that is NaN",
        ),
        (
            [*ASKED, "--box=-9,-9,-1,-1"],
            r"box 1 \[-9, -9, -1, -1\] lies wholly outside.*90 x 60 pixels",
        ),
        ([*ASKED, "--point", "91,3"], r"point 0 \[91, 3\] lies outside"),
        ([*ASKED, "--mask", "none.png"], "'none.png' does not exist"),
        ([*ASKED, "--top-k", "0"], "--top-k must be 1 or more"),
        ([*ASKED, "--out", "overlay.gif"], r"must end in one of \.png"),
        ([*ASKED, "--json", "photo.png"], "--json photo.png would overwrite the picture itself"),
        ([*ASKED, "--model", "regionspot_xl"], "regionspot_xl"),
    ],
)
def test_refuses(
    photo: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photo.parent)
    before = photo.read_bytes()
    assert main(["predict", str(photo), *arguments]) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err, re.DOTALL)
    assert photo.read_bytes() == before
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]


def test_no_region_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "photo.jpg", "--vocabulary", "cat"]) == 2
    assert EXAMPLE in capsys.readouterr().err
    build_parser().parse_args(
        ["photo.jpg", "--box", "10,20,200,300", "--vocabulary", "cat,dog", "--out", "overlay.png"]
    )


@pytest.mark.parametrize("box", ["1,2,3", "1,2,3,4,5", "1 2 3 4", "a,b,c,d", ""])
def test_malformed_boxes(box: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "photo.jpg", "--box", box, "--vocabulary", "cat"])
    assert stopped.value.code == 2
    assert (
        f"argument --box: '{box}' is not x0,y0,x1,y1: 4 numbers with commas"
        in capsys.readouterr().err
    )


def test_masks_of_different_sizes(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, size in enumerate([(WIDTH, HEIGHT), (5, 5)]):
        Image.new("1", size, 1).save(tmp_path / f"{index}.png")
    masks = [
        argument for index in range(2) for argument in ("--mask", str(tmp_path / f"{index}.png"))
    ]
    assert main(["predict", str(photo), *ASKED, *masks]) == 2
    assert "the masks have different sizes, 5 x 5, 90 x 60" in capsys.readouterr().err


def test_masks_are_read_before_the_model_is_loaded(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regionspot.cli.predict.load_recognizer", lambda _: pytest.fail("loaded"))
    assert main(["predict", str(photo), *ASKED, "--mask", "none.png"]) == 2


def test_outside_a_mask_may_be_transparent(photo: Path, tmp_path: Path) -> None:
    region = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    region[20:30, 50:80] = 255
    Image.fromarray(region).save(tmp_path / "region.png")
    document = tmp_path / "out.json"
    more = ["--mask", str(tmp_path / "region.png"), "--no-masks", "--json", str(document)]
    assert main(["predict", str(photo), *ASKED, *more]) == 0
    assert json.loads(document.read_text())["regions"][1]["box"] == [50, 20, 80, 30]


def test_a_format_too_small_for_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16_400, 8)).save(tmp_path / "wide.png")
    overlay, document = tmp_path / "overlay.webp", tmp_path / "out.json"
    asked = [
        *ASKED[2:],
        "--box",
        "10,1,40,7",
        "--no-masks",
        "--out",
        str(overlay),
        "--json",
        str(document),
    ]
    assert main(["predict", str(tmp_path / "wide.png"), *asked]) == 2
    assert re.search(
        r"error: --out .*overlay\.webp: .*16400 x 8 pixels, cannot be written as WEBP .*\.png",
        capsys.readouterr().err,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["wide.png"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "out.json"
    document.write_text("old")
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert main(["predict", str(photo), *ASKED, "--json", str(document)]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert document.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "photo.png"]

"""The register of data-set formats, and a format that a package outside of regionspot adds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regionspot.data.coco_json import Annotation, Category, CocoDataset, ImageRecord
from regionspot.data.formats import DATASET_FORMATS, DatasetFormat, load_dataset, register
from regionspot.errors import InputError
from tests.plugins import install_page

CSV = """\
image,width,height,x0,y0,x1,y1,label
b.png,64,48,1,2,30,40,dog
a.png,32,32,0,0,16,16,cat
b.png,64,48,5,5,60,40,cat
"""


def records() -> tuple[list[ImageRecord], list[Category], list[Annotation]]:
    images = [ImageRecord(1, "a.png", 64, 48)]
    categories = [Category(2, "dog"), Category(1, "cat")]
    return images, categories, [Annotation(1, 1, 2, (1.0, 2.0, 30.0, 40.0), 1102.0)]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> DatasetFormat:
    def load(path: Path, image_root: Path | None, check_images: bool) -> CocoDataset:
        assert not check_images
        return CocoDataset.from_records(path, image_root, *records())

    row = DatasetFormat("toy", recognizes=lambda path: path.suffix == ".toy", load=load)
    monkeypatch.setitem(DATASET_FORMATS._rows, "toy", row)
    return row


def test_a_format_is_one_row(toy: DatasetFormat, tmp_path: Path) -> None:
    dataset = load_dataset(tmp_path / "data.toy", check_images=False)
    assert dataset.class_names == ("cat", "dog") and dataset.num_annotations == 1
    assert dataset.image_path(dataset.images[0]) == tmp_path / "a.png"
    assert load_dataset(tmp_path / "data.toy", "elsewhere", check_images=False).image_root == Path(
        "elsewhere"
    )


def test_other_files_are_read_as_coco(toy: DatasetFormat, tmp_path: Path) -> None:
    content = {"images": [], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    for name in ("coco.json", "no_suffix"):
        (tmp_path / name).write_text(json.dumps(content))
        assert load_dataset(tmp_path / name).class_names == ("cat",)
    (tmp_path / "list.txt").write_text("[]")
    with pytest.raises(InputError, match=r"list\.txt is no COCO or LVIS annotation file"):
        load_dataset(tmp_path / "list.txt")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(InputError, match="there is a data-set format 'coco' already"):
        register(DATASET_FORMATS["coco"])


def test_records_that_contradict_each_other_are_refused() -> None:
    images, categories, annotations = records()
    with pytest.raises(InputError, match=r"boxes\.toy: annotation 1: no image 1\."):
        CocoDataset.from_records("boxes.toy", None, [], categories, annotations)
    with pytest.raises(InputError, match=r"boxes\.toy: annotation 1: no category 2\."):
        CocoDataset.from_records("boxes.toy", None, images, categories[1:], annotations)
    fractions = [Annotation(1, 1, 2, (0.1, 0.2, 0.5, 0.9), 0.28)]
    with pytest.raises(InputError, match="fractions"):
        CocoDataset.from_records("boxes.toy", None, images, categories, fractions)


class TestPlugin:
    """The code of the how-to page, installed as a package of its own."""

    @pytest.fixture
    def environment(self, tmp_path: Path) -> dict[str, str]:
        return install_page("how-to/add-a-dataset-format.md", tmp_path)

    def test_its_files_are_trained_on(self, environment: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "boxes.csv").write_text(CSV)
        for name in ("a.png", "b.png"):
            (tmp_path / name).touch()
        code = (
            "import sys; from regionspot.data.dataset import load_training_set; "
            "data = load_training_set('toy', sys.argv[1]); "
            "print(data.class_names, data.file_names, data.counts.tolist(), data.boxes.tolist()[0])"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "boxes.csv")]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (
            run.stdout.strip() == "('cat', 'dog') ('b.png', 'a.png') [2, 1] [1.0, 2.0, 30.0, 40.0]"
        ), run.stderr

    def test_a_file_that_it_cannot_read_is_an_error_of_the_commands(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        (tmp_path / "boxes.csv").write_text(CSV.replace("width", "breadth"))
        command = [
            sys.executable,
            "-m",
            "regionspot.cli.main",
            "eval",
            "--data",
            str(tmp_path / "boxes.csv"),
        ]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 2
        assert "boxes.csv is no CSV file of boxes: KeyError('width')" in run.stderr

"""The register of data-set formats, and the one function that loads a data set of any of them.

A new format is a row. A package outside of regionspot adds its rows by an entry point of the group
`regionspot.dataset_formats` (docs/how-to/add-a-dataset-format.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from regionspot.data.coco_json import CocoDataset
from regionspot.registers import Plugins, Register


@dataclass(frozen=True)
class DatasetFormat:
    """A format of annotations.

    Args:
        name: of the format.
        recognizes: tells whether a path, which need not exist, is a file or folder of the format.
        load: reads it: `(path, image_root, check_images) -> CocoDataset`, with the arguments of
            `load_dataset`.
    """

    name: str
    recognizes: Callable[[Path], bool]
    load: Callable[[Path, Path | None, bool], CocoDataset]


def register(*rows: DatasetFormat) -> None:
    """Adds rows to the register. Raises InputError for a name that is taken."""
    for row in rows:
        DATASET_FORMATS.add(row)


DATASET_FORMATS: Register[DatasetFormat] = Register(
    "data-set format", Plugins("regionspot.dataset_formats", register)
)


def load_dataset(
    path: str | Path, image_root: str | Path | None = None, check_images: bool = True
) -> CocoDataset:
    """Reads and checks a data set of any registered format.

    The format registered last is asked first; what no other recognizes is read as COCO or LVIS
    JSON.

    Args:
        path: a file or folder of annotations.
        image_root: the directory that its file names start from; by default the one that `path`
            lies in.
        check_images: whether every image must exist. Say False where only the annotations are used.

    Raises:
        InputError: the annotations cannot be read, contradict themselves, or name images that do
            not exist.
    """
    path = Path(path)
    root = None if image_root is None else Path(image_root)
    row = next(row for row in reversed(tuple(DATASET_FORMATS.values())) if row.recognizes(path))
    return row.load(path, root, check_images)


# also LVIS: see `coco_json`
register(DatasetFormat("coco", recognizes=lambda _: True, load=CocoDataset.load))

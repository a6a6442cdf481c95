"""Top-1 accuracy: in how many of the regions the best-scored class is the annotated one.

It is defined where the regions are the annotated boxes. AP ranks the regions of a class; top-1
ranks the classes of a region, which is what a user reads as "right".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from regionspot.data.coco_json import Annotation, CocoDataset
from regionspot.data.json_reading import Id
from regionspot.evaluation.average_precision import Figures

SMALL, LARGE = 32**2, 96**2  # pixels, COCO's limits

Right = Mapping[Id, npt.NDArray[np.bool_]]
"""Image id -> (n,) whether each of its regions got its annotated class."""


def is_right(
    dataset: CocoDataset, annotations: Sequence[Annotation], probabilities: npt.NDArray[np.floating]
) -> npt.NDArray[np.bool_]:
    """(n,) whether the best word of each region, of equals the first, is the name of its
    annotation's class.

    Args:
        annotations: n, one for each region.
        probabilities: (n, words) over `dataset.class_names`.
    """
    truth = [dataset.category_index[annotation.category_id] for annotation in annotations]
    return np.asarray(probabilities.argmax(1) == np.array(truth, np.int64))


def top1_accuracy(
    dataset: CocoDataset,
    annotations: Mapping[Id, Sequence[Annotation]],
    right: Right,
    groups: Mapping[str, Collection[Id]] | None = None,
) -> Figures:
    """Accuracy in percent over all regions; None of a group without regions.

    Args:
        annotations: image id -> the annotation of each region.
        right: whether each region is right; of images without an entry nothing is counted.
        groups: name -> ids of categories: further groups.

    Returns:
        top1, top1s, top1m, top1l (area of the annotation below 32², to 96², above), top1r, top1c,
        top1f (rare, common and frequent classes), top1_base, top1_novel (regions of classes not
        marked and marked novel), and top1_NAME of each further group.
    """
    flat = np.concatenate([np.zeros(0, bool), *right.values()])  # (R,)
    objects = [annotation for image_id in right for annotation in annotations[image_id]]
    classes = {category.id: category for category in dataset.categories}
    area = np.array([annotation.area for annotation in objects], np.float64)
    frequency = np.array(
        [classes[annotation.category_id].frequency or "" for annotation in objects], str
    )
    novel = np.array([classes[annotation.category_id].novel for annotation in objects], bool)
    belongs = {
        "top1": np.ones(len(objects), bool),
        "top1s": area < SMALL,
        "top1m": (area >= SMALL) & (area <= LARGE),
        "top1l": area > LARGE,
        "top1r": frequency == "r",
        "top1c": frequency == "c",
        "top1f": frequency == "f",
        "top1_base": ~novel,
        "top1_novel": novel,
    }
    for name, ids in (groups or {}).items():
        belongs[f"top1_{name}"] = np.array(
            [annotation.category_id in ids for annotation in objects], bool
        )
    return {
        name: 100 * float(flat[group].mean()) if group.any() else None
        for name, group in belongs.items()
    }

"""`regionspot-eval`: average precision of a head on COCO- or LVIS-format data, and of the baselines beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import add_model_options, add_runtime_options, check_runtime, load_recognizer

if TYPE_CHECKING:
    from regionspot.evaluation.detections import Detections

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AP_base", "AP_novel")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-eval",
        description="Recognise given regions of every image and measure average precision by LVIS's or COCO's rules. "
        "The table says the protocol: figures of different protocols do not compare.",
    )
    parser.add_argument("--data", required=True, metavar="JSON", help="annotations in COCO or LVIS format")
    parser.add_argument("--images", metavar="DIR", help="where the images are (default: beside the annotations)")
    add_model_options(parser)
    add_runtime_options(parser)
    parser.add_argument(
        "--proposals", default="gt", metavar="gt|FILE", help="ground-truth boxes (default) or a detector's COCO results"
    )
    parser.add_argument("--rules", choices=("lvis", "coco"), default="lvis", help="default: %(default)s")
    parser.add_argument(
        "--iou-type", choices=("bbox", "segm", "both"), default="bbox", help="judge boxes, SAM's masks, or both"
    )
    parser.add_argument(
        "--methods",
        default="head",
        metavar="LIST",
        help="with commas between: head, clip_crops, roi_pooling, constant_token (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures with their protocol")
    parser.add_argument(
        "--detections",
        type=Path,
        metavar="OUT",
        help="write COCO results; of several methods each gets its own file, OUT.METHOD.json",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_runtime(arguments)
    methods = tuple(dict.fromkeys(name.strip() for name in arguments.methods.split(",")))
    from regionspot.data.coco_json import CocoDataset
    from regionspot.evaluation.average_precision import check_ground_truth
    from regionspot.evaluation.evaluator import evaluate_methods
    from regionspot.evaluation.methods import check_methods
    from regionspot.evaluation.proposals import ground_truth_proposals, load_proposals
    from regionspot.modeling.pipelines import text_encoder_of
    from regionspot.vocabulary import VocabularyEncoder

    check_methods(methods, arguments.runtime)
    dataset = CocoDataset.load(arguments.data, arguments.images)
    check_ground_truth(dataset, arguments.rules, "bbox" if arguments.iou_type == "bbox" else "segm")
    proposals = (
        ground_truth_proposals(dataset) if arguments.proposals == "gt" else load_proposals(arguments.proposals, dataset)
    )
    with load_recognizer(arguments) as model:
        results = evaluate_methods(
            model,
            dataset,
            VocabularyEncoder(text_encoder_of(model)).encode(dataset.class_names),
            proposals,
            methods,
            arguments.rules,
            masks=arguments.iou_type != "bbox",
            batch_size=arguments.batch_size,
        )
    metrics = {method: figures for method, (figures, _) in results.items()}
    print(format_table(metrics, ("bbox", "segm") if arguments.iou_type == "both" else (arguments.iou_type,)))
    _write(arguments, metrics, {method: detections for method, (_, detections) in results.items()})
    return 0


def format_table(metrics: Mapping[str, Mapping[str, Any]], iou_types: Sequence[str] = ("bbox",)) -> str:
    """The protocol, then a row for each method; a table for each of iou_types. A dash: no class to measure on.

    Args:
        metrics: method -> what `evaluate_methods` returns of it.
        iou_types: "bbox", "segm" or both.
    """
    protocol = next(iter(metrics.values()))["protocol"]
    lines = [
        f"{protocol['model']} by {protocol['runtime']} in {protocol['precision']} on {protocol['images']} images, "
        f"{protocol['regions']} regions: {protocol['proposals']}",
        f"{protocol['rules'].upper()} rules; score = {protocol['scores']}; the {protocol['pairs_per_image']} best "
        f"(region, class) pairs of an image; {protocol['detections_judged']} judged",
    ]
    if protocol["boxes_dropped"]:
        lines.append(f"{protocol['boxes_dropped']} proposals left out: empty, or wholly outside their image")
    width = max(map(len, metrics))
    for iou_type in iou_types:
        heading = {"bbox": "boxes", "segm": "masks"}[iou_type]
        lines += ["", f"{heading:<{width}}" + "".join(f"{name:>9}" for name in COLUMNS)]
        for method, of_method in metrics.items():
            figures = of_method["segm"] if iou_type == "segm" else of_method
            lines.append(f"{method:<{width}}" + "".join(_cell(figures[name]) for name in COLUMNS))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'–' if value is None else format(value, '.1f'):>9}"


def _write(arguments: argparse.Namespace, metrics: Mapping[str, Any], detections: Mapping[str, Detections]) -> None:
    from regionspot.files import write_atomically

    if arguments.json:
        write_atomically(arguments.json, (json.dumps(metrics, indent=2, ensure_ascii=False) + "\n").encode())
    if arguments.detections:
        for method, of_method in detections.items():
            path = arguments.detections
            if len(detections) > 1:
                path = path.with_name(f"{path.name.removesuffix('.json')}.{method}.json")
            write_atomically(path, json.dumps(of_method.to_coco()).encode())

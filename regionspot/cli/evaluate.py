"""`regionspot-eval`: average precision of a head on COCO- or LVIS-format data, and of the baselines
beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.models import (
    DEFAULT_MODEL,
    TRITON,
    add_model_options,
    add_runtime_options,
    check_runtime,
    load_recognizer,
)
from regionspot.cli.outputs import (
    check_outputs,
    is_stdout,
    json_bytes,
    model_files,
    table_stream,
    write_output,
)
from regionspot.cli.regions import add_clean_names_option
from regionspot.cli.servers import FIRST_ANSWER_S, credentials
from regionspot.errors import InputError, plain_text, shown, visible
from regionspot.tables import text_table

if TYPE_CHECKING:
    from regionspot.data.coco_json import CocoDataset
    from regionspot.evaluation.detections import Detections
    from regionspot.evaluation.methods import Method
    from regionspot.evaluation.proposals import Proposals
    from regionspot.modeling.regionspot import RegionSpot
    from regionspot.runtime.pipeline import RegionPipeline
    from regionspot.vocabulary import VocabularyEncoder

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AP_base", "AP_novel")
TOP1_COLUMNS = (
    "top1",
    "top1s",
    "top1m",
    "top1l",
    "top1r",
    "top1c",
    "top1f",
    "top1_base",
    "top1_novel",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-eval",
        description="Recognise given regions of every image and measure average precision by "
        "LVIS's or COCO's rules. The table says the protocol: figures of different "
        "protocols do not compare.",
    )
    parser.add_argument(
        "--data", required=True, metavar="JSON", help="annotations in COCO or LVIS format"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="where the images are (default: beside the annotations)"
    )
    add_model_options(parser)
    add_runtime_options(parser)
    _add_protocol_options(parser)
    _add_method_options(parser)
    add_clean_names_option(parser)
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="images at a time (%(default)s)"
    )
    parser.add_argument(
        "--skip-unreadable",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N pictures that are missing, damaged or of another size, and list "
        "them (%(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write the figures with their protocol; - is standard output",
    )
    parser.add_argument(
        "--detections",
        type=Path,
        metavar="OUT",
        help="write COCO results; of several methods each gets its own file, OUT.METHOD.json",
    )
    return parser


def _add_protocol_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--proposals",
        default="gt",
        metavar="gt|FILE",
        help="ground-truth boxes (default), or a detector's: COCO results, or boxes (xyxy) and "
        "scores by image id",
    )
    parser.add_argument(
        "--rules", choices=("lvis", "coco"), default="lvis", help="default: %(default)s"
    )
    parser.add_argument(
        "--iou-type",
        choices=("bbox", "segm", "both"),
        default="bbox",
        help="judge boxes, SAM's masks, or both",
    )


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        default="head",
        metavar="LIST",
        help="with commas between: head, clip_crops, roi_pooling, mask_pooling, constant_token, "
        "head_and_crops (default: %(default)s)",
    )
    parser.add_argument(
        "--tune-on",
        metavar="JSON",
        help="training annotations: each baseline takes the setting with the highest top-1 "
        "accuracy on their boxes instead of its default",
    )
    parser.add_argument(
        "--tune-images",
        metavar="DIR",
        help="where the images of --tune-on are (default: beside the annotations)",
    )
    parser.add_argument(
        "--tune-count",
        type=int,
        default=200,
        metavar="N",
        help="use the first N of them (%(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_runtime(arguments)
    methods = tuple(dict.fromkeys(name.strip() for name in arguments.methods.split(",")))
    from regionspot.evaluation.evaluator import evaluate_methods
    from regionspot.evaluation.methods import check_runs_in, methods_named
    from regionspot.vocabulary import VocabularyEncoder

    check_runs_in(methods_named(methods), arguments.runtime)
    _check_tuning(arguments, methods)
    detection_files = _detection_files(arguments.detections, methods)
    _check_files(arguments, detection_files)
    dataset, proposals = _load(arguments)
    training = _load_to_tune_on(arguments, dataset)
    if _is_gateway(arguments):
        found = _through_gateway(arguments, dataset, proposals, methods)
        _write_results(arguments, {"head": found}, detection_files)
        return 0
    with load_recognizer(arguments) as model:
        encoder = VocabularyEncoder(
            model.text_encoder, clean_coco_suffixes=arguments.clean_names == "coco"
        )
        chosen = (
            methods_named(methods)
            if training is None
            else _tuned(model, training, encoder, methods, arguments)
        )
        results = evaluate_methods(
            model,
            dataset,
            encoder.encode(dataset.class_names),
            proposals,
            chosen,
            arguments.rules,
            masks=arguments.iou_type != "bbox",
            batch_size=arguments.batch_size,
            skip_unreadable=arguments.skip_unreadable,
        )
    _write_results(arguments, results, detection_files)
    return 0


def _is_gateway(arguments: argparse.Namespace) -> bool:
    """Whether --url is a gateway's, which answers whole questions, instead of running graphs."""
    if arguments.runtime != TRITON or not arguments.url.startswith(("http://", "https://")):
        return False
    from regionspot.serving.client import RegionClient

    with RegionClient(arguments.url, **credentials(arguments)) as client:
        return client.is_gateway(FIRST_ANSWER_S)


def _through_gateway(
    arguments: argparse.Namespace,
    dataset: CocoDataset,
    proposals: Proposals,
    methods: Sequence[str],
) -> tuple[Mapping[str, Any], Detections]:
    """The head's figures. Raises InputError for what only the graphs themselves can tell."""
    from regionspot.serving.client import RegionClient
    from regionspot.serving.evaluation import evaluate_through

    if tuple(methods) != ("head",):
        raise InputError(
            f"{arguments.url} is a gateway, which answers with the head's names alone: --methods "
            "needs the server itself, by its gRPC port (HOST:8001 unless told otherwise)"
        )
    if arguments.clean_names != "none":
        raise InputError(
            "--clean-names needs the server itself: a gateway's model reads names as they are"
        )
    with RegionClient(arguments.url, **credentials(arguments)) as client:
        served = client.info().model
        if arguments.model not in (DEFAULT_MODEL, served):
            raise InputError(
                f"{arguments.url} serves {visible(served)}, not {arguments.model}: leave out "
                "--model"
            )
        return evaluate_through(
            client,
            dataset,
            proposals,
            arguments.rules,
            masks=arguments.iou_type != "bbox",
            at_once=arguments.batch_size,
            skip_unreadable=arguments.skip_unreadable,
        )


def _write_results(
    arguments: argparse.Namespace,
    results: Mapping[str, tuple[Mapping[str, Any], Detections]],
    detection_files: Mapping[str, Path],
) -> None:
    """Files as they were asked for, and the table."""
    metrics = {method: figures for method, (figures, _) in results.items()}
    if arguments.json:
        write_output(arguments.json, json_bytes(metrics))
    for method, path in detection_files.items():
        write_output(path, json_bytes(results[method][1].to_coco(), indent=None))
    iou_types = ("bbox", "segm") if arguments.iou_type == "both" else (arguments.iou_type,)
    print(
        format_table(metrics, iou_types),
        file=table_stream(arguments.json, *detection_files.values()),
    )


def _load(arguments: argparse.Namespace) -> tuple[CocoDataset, Proposals]:
    """The ground truth and the regions, both checked as far as that needs no model.

    Raises:
        InputError: they cannot be used.
    """
    from regionspot.data.formats import load_dataset
    from regionspot.evaluation.evaluator import check_can_evaluate
    from regionspot.evaluation.proposals import ground_truth_proposals, load_proposals

    if arguments.skip_unreadable < 0:
        raise InputError(f"--skip-unreadable must be 0 or more, not {arguments.skip_unreadable}")
    dataset = load_dataset(arguments.data, arguments.images, check_images=False)
    check_can_evaluate(dataset, arguments.rules, arguments.iou_type != "bbox")
    dataset.check_images(missing_allowed=arguments.skip_unreadable > 0)
    if arguments.proposals == "gt":
        return dataset, ground_truth_proposals(dataset, crowds=arguments.rules == "lvis")
    return dataset, load_proposals(arguments.proposals, dataset)


def _check_tuning(arguments: argparse.Namespace, methods: Sequence[str]) -> None:
    """Refuses what --tune-on cannot be used with. Raises InputError."""
    from regionspot.evaluation.tuning import TUNABLE

    if arguments.tune_on is None:
        if arguments.tune_images is not None:
            raise InputError("--tune-images is of --tune-on: name the annotations too")
        return
    if arguments.tune_count < 1:
        raise InputError(f"--tune-count must be 1 or more, not {arguments.tune_count}")
    if not set(methods) & set(TUNABLE):
        raise InputError(
            "--tune-on is for baselines: leave it out, or add to --methods one of "
            f"{', '.join(TUNABLE)}"
        )
    if Path(arguments.tune_on).resolve() == Path(arguments.data).resolve():
        raise InputError(
            "--tune-on and --data are one file: choose settings on pictures that are not measured"
        )


def _load_to_tune_on(arguments: argparse.Namespace, dataset: CocoDataset) -> CocoDataset | None:
    """The data set of --tune-on, with the first images that have objects. Raises InputError."""
    from regionspot.data.formats import load_dataset
    from regionspot.evaluation.tuning import first_with_objects

    if arguments.tune_on is None:
        return None
    everything = load_dataset(arguments.tune_on, arguments.tune_images, check_images=False)
    training = first_with_objects(everything, arguments.tune_count)
    measured = {dataset.image_path(image).resolve() for image in dataset.images}
    both = [image for image in training.images if training.image_path(image).resolve() in measured]
    if both:
        raise InputError(
            f"{len(both)} pictures of --tune-on are also in --data ({shown(both[0].file_name)}): "
            "choose settings on pictures that are not measured"
        )
    return training


def _tuned(
    model: RegionSpot | RegionPipeline,
    training: CocoDataset,
    encoder: VocabularyEncoder,
    methods: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Method]:
    from regionspot.evaluation.tuning import tuned_methods
    from regionspot.modeling.regionspot import RegionSpot

    assert isinstance(model, RegionSpot)  # as `check_runs_in` saw to
    words = encoder.encode(training.class_names)
    return tuned_methods(
        model,
        training,
        words,
        methods,
        arguments.batch_size,
        skip_unreadable=arguments.skip_unreadable,
    )


def _detection_files(path: Path | None, methods: Sequence[str]) -> dict[str, Path]:
    """Where the detections of each method go: to `path`, those of several to OUT.METHOD.json beside
    it.
    """
    if path is None:
        return {}
    if len(methods) == 1:
        return {methods[0]: path}
    if is_stdout(path):
        raise InputError(
            "--detections: standard output takes the detections of one method; name a file for "
            "several"
        )
    return {
        method: path.with_name(f"{path.name.removesuffix('.json')}.{method}.json")
        for method in methods
    }


def _check_files(arguments: argparse.Namespace, detection_files: Mapping[str, Path]) -> None:
    """Refuses outputs that would overwrite an input or each other. Raises InputError."""
    outputs = {"--json": arguments.json} | {
        f"--detections of {name}": path for name, path in detection_files.items()
    }
    proposals = None if arguments.proposals == "gt" else arguments.proposals
    inputs = {"--data": arguments.data, "--proposals": proposals, "--tune-on": arguments.tune_on}
    check_outputs(outputs, inputs | model_files(arguments))


def format_table(
    metrics: Mapping[str, Mapping[str, Any]], iou_types: Sequence[str] = ("bbox",)
) -> str:
    """Shows the protocol, then a row for each method; a table for each of iou_types. A dash: no
    class to measure on.

    Args:
        metrics: method -> what `evaluate_methods` returns of it.
        iou_types: "bbox", "segm" or both.
    """
    protocol = next(iter(metrics.values()))["protocol"]
    lines = [
        f"{visible(protocol['model'])} by {visible(protocol['runtime'])} in "
        f"{visible(protocol['precision'])} on "
        f"{protocol['images']} images, {protocol['regions']} regions: {protocol['proposals']}",
        f"{protocol['rules'].upper()} rules; score = {protocol['scores']}; the "
        f"{protocol['pairs_per_image']} best (region, class) pairs of an image; "
        f"{protocol['detections_judged']} judged",
    ]
    lines += _remarks(protocol)
    lines += [_method_line(name, of_method["protocol"]) for name, of_method in metrics.items()]
    for iou_type in iou_types:
        heading = {"bbox": "boxes, AP", "segm": "masks, AP"}[iou_type]
        figures = {
            name: of_method["segm"] if iou_type == "segm" else of_method
            for name, of_method in metrics.items()
        }
        lines += _rows(heading, COLUMNS, figures)
    if "bbox" in iou_types:
        of_one_label = {name: of_method["one_label"] for name, of_method in metrics.items()}
        lines += _rows("boxes, AP with one label each", COLUMNS, of_one_label)
    if all("top1" in of_method for of_method in metrics.values()):
        lines += _rows("top-1 accuracy", TOP1_COLUMNS, metrics)
    return "\n".join(lines)


def _method_line(name: str, protocol: Mapping[str, Any]) -> str:
    tuned = protocol.get("tuned_on")
    if not tuned:
        return f"{name}: {protocol['method']}"
    return (
        f"{name}: {protocol['method']} (the best of {tuned['settings']} settings on the annotated "
        f"boxes of {tuned['images']} images of {plain_text(tuned['data'])})"
    )


def _rows(
    heading: str, columns: Sequence[str], figures: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A blank line, and a table with a row for each method."""
    rows = [
        [method, *(number(of_method[name]) for name in columns)]
        for method, of_method in figures.items()
    ]
    return ["", text_table([heading, *columns], rows, right=range(1, len(columns) + 1))]


def _remarks(protocol: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must know besides the protocol's usual lines."""
    remarks = []
    if protocol["boxes_dropped"]:
        remarks.append(
            f"{protocol['boxes_dropped']} proposals left out: empty, or wholly outside their image"
        )
    if protocol["images_skipped"]:
        remarks.append(f"{len(protocol['images_skipped'])} pictures left out with their objects:")
        remarks += [f"  {visible(reason)}" for reason in protocol["images_skipped"]]
    if protocol["shared_names"]:
        remarks.append(
            f"{protocol['shared_names']} categories have the name of another: each gets the score "
            "of their one word"
        )
    if protocol["masks_without_pixels"]:
        remarks.append(
            f"{protocol['masks_without_pixels']} annotated masks cover no pixel of their picture: "
            "objects that no mask can find"
        )
    if protocol["masks_beside_boxes"]:
        remarks.append(
            f"{protocol['masks_beside_boxes']} annotated masks do not touch their own boxes: are "
            "they fractions of the picture, or of another picture?"
        )
    return remarks


def number(value: float | None) -> str:
    return "–" if value is None else format(value, ".1f")

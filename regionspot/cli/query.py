"""`regionspot-query IMAGE|DIR --box ... --vocabulary ... --url HOST:PORT`: ask a server about pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.regions import (
    add_output_options,
    add_region_options,
    add_vocabulary_option,
    check_outputs,
    region_table,
    write_outputs,
)
from regionspot.errors import InputError, RegionSpotError

if TYPE_CHECKING:
    from regionspot.serving.client import Answer, AsyncRegionClient

EXAMPLE = 'regionspot-query photo.jpg --box 10,20,200,300 --vocabulary "cat,dog,coffee cup" --url localhost:8001'
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
EXIT_SOME_FAILED = 1
FIRST_ANSWER_S = 10.0
"""A server that restarts is back by then; a wrong address should not cost a minute."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-query",
        description="Ask a server about regions of a picture, or about the same regions of each picture of a folder.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("image", metavar="IMAGE|DIR", type=Path, help="a picture, or a folder of pictures")
    add_region_options(parser)
    add_vocabulary_option(parser, ", or the name of a vocabulary that the server has registered")
    parser.add_argument(
        "--regions", metavar="JSON", type=Path, help="of a folder: boxes of each picture, from a COCO annotation file"
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", default="127.0.0.1:8001", help="its gRPC port, or http://HOST:PORT (default: %(default)s)"
    )
    server.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of each picture (%(default)s)")
    server.add_argument(
        "--concurrency", type=int, default=4, metavar="N", help="of a folder: pictures at once (%(default)s)"
    )
    add_output_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    return _ask_about_folder(arguments) if arguments.image.is_dir() else _ask_about_picture(arguments)


def _check(arguments: argparse.Namespace) -> None:
    check_outputs(arguments, arguments.image)
    if arguments.regions is None and not (arguments.boxes or arguments.points):
        raise InputError(f"no region was asked for: give --box or --point at least once\nexample: {EXAMPLE}")
    if arguments.image.is_dir():
        if arguments.out:
            raise InputError("--out draws one picture, and this is a folder: leave it out, or write --json")
        if arguments.concurrency < 1:
            raise InputError(f"--concurrency must be 1 or more, not {arguments.concurrency}")
    elif arguments.regions is not None:
        raise InputError("--regions goes with a folder of pictures: give --box for one picture")


def _ask_about_picture(arguments: argparse.Namespace) -> int:
    from regionspot.serving.client import RegionClient, encoded_picture
    from regionspot.transforms import read_image

    picture = encoded_picture(arguments.image)
    with RegionClient(arguments.url, arguments.timeout) as client:
        info = client.info(timeout_s=min(arguments.timeout, FIRST_ANSWER_S))
        answer = client.ask(
            picture,
            _vocabulary(arguments.vocabulary, info.vocabularies),
            {"boxes": arguments.boxes or None, "points": arguments.points or None},
            top_k=arguments.top_k,
            return_masks=not arguments.no_masks,
        )
    found = answer.predictions
    size = f"{found.image_width} x {found.image_height} pixels"
    print(region_table(found, f"{arguments.image.name}: {size}, {info.model} by {info.runtime} at {arguments.url}"))
    image = read_image(arguments.image) if arguments.out else None
    write_outputs(image, arguments.image.name, found, arguments.json, arguments.out)  # type: ignore[arg-type]
    if len(found.class_names) == 1:
        print("note: among one word every region scores 1.00; give more words to choose from", file=sys.stderr)
    return 0


def _ask_about_folder(arguments: argparse.Namespace) -> int:
    """Answers as they come; with --json a line of JSON for each picture."""
    import asyncio

    work = list(_pictures(arguments))
    if not work:
        raise InputError(f"{arguments.image} holds no pictures ({', '.join(PICTURES)})")
    return asyncio.run(_stream(arguments, work))


async def _stream(arguments: argparse.Namespace, work: Sequence[tuple[Path, Any]]) -> int:
    import asyncio

    from regionspot.files import write_atomically
    from regionspot.progress import Progress
    from regionspot.serving.client import AsyncRegionClient

    lines: dict[str, str] = {}
    failures: dict[str, str] = {}
    slots = asyncio.Semaphore(arguments.concurrency)
    async with AsyncRegionClient(arguments.url, arguments.timeout) as client:
        words = _vocabulary(arguments.vocabulary, (await client.info()).vocabularies)
        with Progress("pictures", len(work), "pictures", stream=sys.stderr) as progress:

            async def ask(path: Path, boxes: Any) -> None:
                name = path.relative_to(arguments.image).as_posix()
                async with slots:
                    try:
                        answer = await _answer(client, arguments, path, boxes, words)
                        lines[name] = json.dumps(answer.predictions.to_json(name), ensure_ascii=False)
                        print(_summary(name, answer), flush=True)
                    except RegionSpotError as error:
                        failures[name] = str(error)
                    progress.update(len(lines) + len(failures))

            try:
                await asyncio.gather(*(ask(path, boxes) for path, boxes in work))
            finally:
                if arguments.json:  # what was answered is kept, whatever ends the work
                    write_atomically(arguments.json, "".join(f"{lines[name]}\n" for name in sorted(lines)).encode())
    if arguments.json:
        print(f"wrote {arguments.json}")
    for name, reason in sorted(failures.items()):
        print(f"{name}: {reason}", file=sys.stderr)
    return EXIT_SOME_FAILED if failures else 0


async def _answer(
    client: AsyncRegionClient, arguments: argparse.Namespace, path: Path, boxes: Any, words: str | Sequence[str]
) -> Answer:
    regions = {"boxes": boxes, "points": arguments.points or None}
    masks = arguments.json is not None and not arguments.no_masks
    return await client.ask(path, words, regions, top_k=arguments.top_k, return_masks=masks)


def _pictures(arguments: argparse.Namespace) -> Iterator[tuple[Path, Any]]:
    """Each picture and its boxes: those of --regions, or the same for all."""
    if arguments.regions is not None:
        from regionspot.data.coco_json import CocoDataset

        dataset = CocoDataset.load(arguments.regions, arguments.image)
        for record in dataset.images:
            boxes = [annotation.box for annotation in dataset.annotations_by_image[record.id]]
            yield dataset.image_path(record), boxes + list(arguments.boxes)
        return
    for path in sorted(arguments.image.iterdir()):
        if path.suffix.lower() in PICTURES:
            yield path, arguments.boxes or None


def _vocabulary(text: str, registered: Any) -> str | tuple[str, ...]:
    """The name of a registered vocabulary as it is, anything else as words."""
    from regionspot.vocabulary import parse_vocabulary

    return text if text in registered else parse_vocabulary(text)


def _summary(name: str, answer: Answer) -> str:
    found = answer.predictions
    named = [
        f"{found.class_names[index]} {score:.2f}" for index, score in zip(found.class_ids, found.scores, strict=True)
    ]
    return f"{name}: {', '.join(named) or 'no regions'}"

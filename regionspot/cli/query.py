"""`regionspot-query IMAGE|DIR --box ... --vocabulary ... --url URL`: ask about pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regionspot.cli.outputs import check_outputs, is_stdout, table_stream, write_output
from regionspot.cli.paths import local_path
from regionspot.cli.regions import (
    add_output_options,
    add_region_options,
    add_vocabulary_option,
    check_output_options,
    deliver,
)
from regionspot.cli.servers import FIRST_ANSWER_S, URL_HELP, add_credential_options, credentials
from regionspot.errors import InputError, RegionSpotError, plain_text, visible
from regionspot.files import list_files

if TYPE_CHECKING:
    from regionspot.serving.client import AsyncRegionClient
    from regionspot.serving.messages import Answer

EXAMPLE = (
    "regionspot-query photo.jpg --box 10,20,200,300 "
    '--vocabulary "cat,dog,coffee cup" --url localhost:8001'
)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
EXIT_SOME_FAILED = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regionspot-query",
        description="Ask a server about regions of a picture, or about the same regions of each "
        "picture of a folder.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument(
        "image", metavar="IMAGE|DIR", type=local_path, help="a picture, or a folder of pictures"
    )
    add_region_options(parser)
    add_vocabulary_option(parser, ", or the name of a vocabulary that the server has registered")
    parser.add_argument(
        "--regions",
        metavar="JSON",
        type=local_path,
        help="of a folder: boxes of each picture, from a COCO annotation file",
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        default="127.0.0.1:8001",
        help=f"{URL_HELP} (default: %(default)s)",
    )
    add_credential_options(server)
    server.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of each picture (%(default)s)",
    )
    server.add_argument(
        "--concurrency",
        type=int,
        default=4,
        metavar="N",
        help="of a folder: pictures at once (%(default)s)",
    )
    add_output_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    return (
        _ask_about_folder(arguments) if arguments.image.is_dir() else _ask_about_picture(arguments)
    )


def _check(arguments: argparse.Namespace) -> None:
    check_output_options(
        arguments, {"the picture itself": arguments.image, "--regions": arguments.regions}
    )
    if arguments.regions is None and not (arguments.boxes or arguments.points):
        raise InputError(
            f"no region was asked for: give --box or --point at least once\nexample: {EXAMPLE}"
        )
    if arguments.image.is_dir():
        if arguments.out:
            raise InputError(
                "--out draws one picture, and this is a folder: leave it out, or write --json"
            )
        if arguments.concurrency < 1:
            raise InputError(f"--concurrency must be 1 or more, not {arguments.concurrency}")
    elif arguments.regions is not None:
        raise InputError("--regions goes with a folder of pictures: give --box for one picture")


def _ask_about_picture(arguments: argparse.Namespace) -> int:
    from regionspot.images import read_image
    from regionspot.serving.client import RegionClient, encoded_picture

    picture = encoded_picture(arguments.image)
    with RegionClient(arguments.url, arguments.timeout, **credentials(arguments)) as client:
        info = client.info(timeout_s=min(arguments.timeout, FIRST_ANSWER_S))
        found = client.recognize(
            picture,
            arguments.boxes or None,
            _vocabulary(arguments.vocabulary, info.vocabularies),
            points=arguments.points or None,
            top_k=arguments.top_k,
            return_masks=not arguments.no_masks,
        )
    title = (
        f"{found.image_width} x {found.image_height} pixels, {visible(info.model)} by "
        f"{visible(info.runtime)} at {arguments.url}"
    )
    image = read_image(picture) if arguments.out else None  # not the file again: it may be a pipe
    deliver(image, found, arguments, title)
    return 0


@dataclass(frozen=True)
class _Task:
    """A picture of a folder: its file, what it is called in the answers, and its boxes, None for
    those of all.
    """

    path: Path
    name: str
    boxes: Any


def _ask_about_folder(arguments: argparse.Namespace) -> int:
    """Answers as they come; with --json a line of JSON for each picture."""
    import asyncio

    tasks = (
        _tasks_of_annotations(arguments)
        if arguments.regions is not None
        else _tasks_of_folder(arguments)
    )
    if not tasks:
        raise InputError(f"{arguments.image} holds no pictures ({', '.join(PICTURES)})")
    if arguments.json:
        check_outputs({"--json": arguments.json}, {"a picture": [task.path for task in tasks]})
    return asyncio.run(_stream(arguments, tasks))


async def _stream(arguments: argparse.Namespace, tasks: Sequence[_Task]) -> int:
    import asyncio

    from regionspot.progress import Progress
    from regionspot.serving.client import AsyncRegionClient

    lines: dict[str, str] = {}
    failures: dict[str, str] = {}
    slots, stream = asyncio.Semaphore(arguments.concurrency), table_stream(arguments.json)
    async with AsyncRegionClient(
        arguments.url, arguments.timeout, **credentials(arguments)
    ) as client:
        words = _vocabulary(arguments.vocabulary, (await client.info()).vocabularies)
        with Progress("pictures", len(tasks), "pictures") as progress:

            async def ask(task: _Task) -> None:
                async with slots:
                    if not arguments.json and getattr(stream, "failure", None):
                        return  # nobody reads the answers, and no file keeps them
                    try:
                        answer = await _answer(client, arguments, task, words)
                        lines[task.name] = json.dumps(
                            answer.predictions.to_json(task.name), ensure_ascii=False
                        )
                        print(_summary(task.name, answer), file=stream, flush=True)
                    except RegionSpotError as error:
                        failures[task.name] = str(error)
                    progress.update(len(lines) + len(failures))

            try:
                await asyncio.gather(*map(ask, tasks))
            finally:
                if arguments.json:  # what was answered is kept, whatever ends the work
                    text = "".join(f"{lines[name]}\n" for name in sorted(lines))
                    write_output(arguments.json, text.encode("utf-8", "backslashreplace"))
    if arguments.json and not is_stdout(arguments.json):
        print(f"wrote {plain_text(arguments.json)}", file=stream)
    for name, reason in sorted(failures.items()):
        print(f"{visible(name)}: {visible(reason)}", file=sys.stderr)
    return EXIT_SOME_FAILED if failures else 0


async def _answer(
    client: AsyncRegionClient,
    arguments: argparse.Namespace,
    task: _Task,
    words: str | Sequence[str],
) -> Answer:
    from regionspot.serving.client import make_question

    question = make_question(
        task.path,
        task.boxes,
        words,
        points=arguments.points or None,
        top_k=arguments.top_k,
        return_masks=arguments.json is not None and not arguments.no_masks,
    )
    return await client.ask(question)


def _tasks_of_annotations(arguments: argparse.Namespace) -> list[_Task]:
    """Each picture with the boxes that --regions gives it."""
    from regionspot.data.formats import load_dataset

    dataset = load_dataset(arguments.regions, arguments.image)
    found = []
    for record in dataset.images:
        boxes = [annotation.box for annotation in dataset.annotations_by_image[record.id]]
        path = dataset.image_path(record)
        found.append(_Task(path, _name(path, arguments.image), boxes + list(arguments.boxes)))
    return found


def _tasks_of_folder(arguments: argparse.Namespace) -> list[_Task]:
    """The pictures of the folder itself, all with the same boxes; says how much else lies there."""
    listing = list_files(arguments.image, PICTURES)
    if skipped := listing.describe_skipped():
        print(f"note: passed over in {plain_text(arguments.image)}: {skipped}", file=sys.stderr)
    boxes = arguments.boxes or None
    return [_Task(path, _name(path, arguments.image), boxes) for path in listing.files]


def _name(path: Path, folder: Path) -> str:
    """The path of a picture from the folder on, as text that JSON can hold."""
    return Path(plain_text(os.path.relpath(path, folder))).as_posix()


def _vocabulary(text: str, registered: Any) -> str | tuple[str, ...]:
    """The name of a registered vocabulary as it is, anything else as words."""
    from regionspot.vocabulary import parse_vocabulary

    return text if text in registered else parse_vocabulary(text)


def _summary(name: str, answer: Answer) -> str:
    found = answer.predictions
    named = [
        f"{visible(found.class_names[index])} {score:.2f}"
        for index, score in zip(found.class_ids, found.scores, strict=True)
    ]
    return f"{visible(name)}: {', '.join(named) or 'no regions'}"

"""`regionspot COMMAND ...`: finds the command, runs it, and says in one line what a user got wrong.

Nothing heavy is imported here: `regionspot --help` must stay quick.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from regionspot import __version__
from regionspot.cli.streams import KeptStreams
from regionspot.errors import RegionSpotError, visible_lines
from regionspot.extras import install_hint
from regionspot.files import private_folder
from regionspot.logs import log_to

COMMANDS = {
    "predict": ("regionspot.cli.predict", "recognise regions of a picture"),
    "train": ("regionspot.cli.train", "train a head on COCO- or LVIS-format data"),
    "eval": (
        "regionspot.cli.evaluate",
        "average precision of a head, and of CLIP on box crops beside it",
    ),
    "export": (
        "regionspot.cli.export",
        "make ONNX, OpenVINO and TensorRT artefacts, each verified",
    ),
    "serve": (
        "regionspot.cli.serve",
        "serve a model with Triton Inference Server, and a web page to try it",
    ),
    "query": ("regionspot.cli.query", "ask a server about pictures"),
    "benchmark": (
        "regionspot.cli.benchmark",
        "measure latency, accuracy, load, peers and training",
    ),
    "parity": (
        "regionspot.cli.parity",
        "compare two runtimes of a model, graph by graph and end to end",
    ),
    "convert": ("regionspot.cli.convert", "import a checkpoint of RegionSpot's authors"),
    "mini": ("regionspot.cli.mini", "build the mini world and its foundation models"),
    "demo": ("regionspot.cli.demo", "train on the mini world, evaluate, recognise regions"),
    "doctor": (
        "regionspot.cli.doctor",
        "what works on this machine, and how to mend what does not",
    ),
}

LOGGING_TO_STDOUT = ("train", "export", "serve", "mini", "demo")
"""Commands whose output is read by people; the results of others may be read by programs, so they
log to stderr.
"""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 for what the user can mend, or the command's own.

    A reader of standard output that goes away (`| head`) does not end the work: the status is then
    141.
    """
    _ensure_home()
    with KeptStreams() as streams, _plain_warnings():
        return streams.status(_run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_USER_ERROR
    name, *rest = arguments
    if name == "--version":
        print(f"regionspot {__version__}")
        return 0
    if name not in COMMANDS:
        return _fail(unknown_name("command", name, COMMANDS))
    try:
        with log_to("stdout" if name in LOGGING_TO_STDOUT else "stderr"):
            return int(import_module(COMMANDS[name][0]).main(rest))
    except RegionSpotError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if (hint := install_hint(error, name)) is None:
            raise
        return _fail(hint)
    except MemoryError:
        return _fail("out of memory: ask for less at a time, or use a machine with more")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show this package's own warnings as a line, without the place in its source."""
    before = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        own = category.__module__.partition(".")[0] == "regionspot"
        if own:
            return f"warning: {visible_lines(str(message))}\n"
        return before(message, category, *place, **more)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def _ensure_home() -> None:
    """Give libraries that insist on a home directory one, where HOME is unset and the user has no
    account.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(private_folder())


def train() -> int:
    """The console script `regionspot-train`."""
    return main(["train", *sys.argv[1:]])


def evaluate() -> int:
    """The console script `regionspot-eval`."""
    return main(["eval", *sys.argv[1:]])


def export() -> int:
    """The console script `regionspot-export`."""
    return main(["export", *sys.argv[1:]])


def serve() -> int:
    """The console script `regionspot-serve`."""
    return main(["serve", *sys.argv[1:]])


def query() -> int:
    """The console script `regionspot-query`."""
    return main(["query", *sys.argv[1:]])


def benchmark() -> int:
    """The console script `regionspot-benchmark`."""
    return main(["benchmark", *sys.argv[1:]])


def unknown_name(what: str, name: str, known: Collection[str]) -> str:
    """What to say of a name that is none of the known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"there is no {what} {name!r}.{meant} The {what}s are {', '.join(known)}."


def usage() -> str:
    lines = [
        "usage: regionspot COMMAND [argument ...]",
        "",
        "Recognise the regions of an image with a small head on a frozen SAM and a frozen CLIP.",
        "",
        "commands:",
        *(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()),
        "",
        "`regionspot COMMAND --help` describes a command; `regionspot --version` names this "
        "release.",
    ]
    return "\n".join(lines)


def _fail(message: str) -> int:
    print(f"error: {visible_lines(message)}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

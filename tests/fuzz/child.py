"""The process that runs cases: limited in memory, told by lines on stdin, answering by lines on its
old stdout.

A line in is "KIND START STOP SEED"; the lines out are JSON: {"begin": case}, {"note"} for what is
done to the input, then {"case", "outcome", "detail", "where"}, and {"finished": true} behind the
last case. A case that takes too long is ended from within by `faulthandler`, which also says where
it hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tests.fuzz.kinds import find_kind
from tests.fuzz.target import OutOfMemory, Target, WrongAnswer, make_rng

MEMORY_BYTES = 4 << 30
"""What a case may take on top of what is in use once its target is set up."""

MAX_DETAIL = 600


def main() -> None:
    directory, seconds = Path(sys.argv[1]), float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code under test prints must not look like an answer
    faulthandler.enable()
    targets: dict[str, Target] = {}
    for line in sys.stdin:
        kind, start, stop, seed = line.split()
        if kind not in targets:
            resource.setrlimit(
                resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            own = directory / kind
            own.mkdir(parents=True, exist_ok=True)
            targets[kind] = find_kind(kind).load(own)
            _limit_memory()
        for case in range(int(start), int(stop)):
            _say(answers, {"begin": case})
            faulthandler.dump_traceback_later(seconds, exit=True)
            answer = _run(
                targets[kind], kind, case, int(seed), lambda text: _say(answers, {"note": text})
            )
            faulthandler.cancel_dump_traceback_later()
            _say(answers, answer)
        _say(answers, {"finished": True})
    os._exit(0)  # taking PyTorch down takes seconds


def _run(
    target: Target, kind: str, case: int, seed: int, note: Callable[[str], None]
) -> dict[str, Any]:
    if hasattr(target, "begin"):
        target.begin(case)
    answer: dict[str, Any] = {"case": case, "detail": "", "where": ""}
    try:
        answer["outcome"] = (
            "accepted" if target.run(make_rng(kind, case, seed), note) else "refused"
        )
    except WrongAnswer as error:
        answer |= {"outcome": "wrong answer", "detail": str(error), "where": ""}
    except (MemoryError, OutOfMemory) as error:
        answer |= {"outcome": "out of memory", "detail": str(error), "where": _where(error)}
    except Exception as error:  # what this looks for
        text = f"{type(error).__name__}: {error}"
        answer |= {"outcome": "untyped exception", "detail": text, "where": _where(error)}
    answer["detail"] = answer["detail"][:MAX_DETAIL]
    return answer


def _where(error: BaseException) -> str:
    """The innermost frame that is the project's own, else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "/regionspot/" in frame.filename and "site-packages" not in frame.filename
    ]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    in_use = next(
        int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + MEMORY_BYTES, resource.RLIM_INFINITY))


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()

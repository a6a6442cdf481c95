"""What the package logs is silent in a library, plain lines in a command, and JSON in a server."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import pytest

from regionspot.logs import JsonFormatter, log_to

Captured = pytest.CaptureFixture[str]
logger = logging.getLogger("regionspot.a.module")


def test_nothing_is_shown_unless_logging_is_configured() -> None:
    code = "import logging, regionspot; logging.getLogger('regionspot.export.build').info('making')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_an_application_gets_records_by_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "regionspot")
    with log_to("stderr"):
        logger.info("to the command's handler alone")
    logger.info("to the application's")
    assert caplog.messages == ["to the application's"]


def test_messages_are_plain_lines_on_the_chosen_stream(capsys: Captured) -> None:
    with log_to("stdout"):
        logger.info("100 % of a plan\nof two lines")
        logger.debug("a detail")
        logging.getLogger("another.library").info("its own business")
        with log_to("stderr"):
            logger.info("inside")
        logger.info("outside again")
    logger.info("behind")
    assert tuple(capsys.readouterr()) == (
        "100 % of a plan\nof two lines\noutside again\n",
        "inside\n",
    )


def test_the_stream_is_looked_up_for_each_record(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with log_to("stdout"), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stderr)
        logger.info("where stdout is now")
    assert tuple(capsys.readouterr()) == ("", "where stdout is now\n")


def test_json_has_the_fields_that_are_known(capsys: Captured) -> None:
    with log_to("stderr", JsonFormatter()):
        logger.info(
            "refused",
            extra={"fields": {"request_id": "a", "regions": 0, "message": "Größe\n", "path": None}},
        )
        logger.info("the server is back")
    fields, message = map(json.loads, capsys.readouterr().err.splitlines())
    assert abs(fields.pop("time") - time.time()) < 60 and message.pop("time") > 0
    assert fields == {"request_id": "a", "regions": 0, "message": "Größe\n"}
    assert message == {"event": "module", "message": "the server is back"}

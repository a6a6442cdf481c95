"""Deletes what earlier releases left in a server's home: installed servers, and copies of this
package.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path

from regionspot.locks import locked
from regionspot.serving.environment import PREFIXES, Installation
from regionspot.serving.records import ServerRecord

logger = logging.getLogger(__name__)

UNUSED_S = 7 * 24 * 3600.0
"""A folder is deleted that no server was started from for so long."""


def delete_unused(home: Path, installation: Installation) -> None:
    """Deletes the folders of other releases that no server runs from, and none was started from
    for `UNUSED_S`. Does nothing while a server runs that does not say which it uses.

    Args:
        installation: The one that is about to be used.
    """
    if not installation.folders:  # a container's server is not kept in the home
        return
    with locked(home):
        records = ServerRecord.read_all(home)
        if any(record.uses is None for record in records):
            return
        used = set(installation.folders)
        for record in records:
            used.update(record.uses or ())
        for path in sorted(home.iterdir()):
            if path.name.startswith(PREFIXES) and path.name not in used and _is_unused(path):
                logger.info(f"Deleting {path}, of another release, which no server uses.")
                shutil.rmtree(path, ignore_errors=True)


def _is_unused(path: Path) -> bool:
    """Looks at the time of a folder, which each start from it sets."""
    with contextlib.suppress(OSError):
        return path.is_dir() and time.time() - path.stat().st_mtime > UNUSED_S
    return False

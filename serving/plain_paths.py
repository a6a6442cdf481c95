"""Paths that Triton's Python backend can take: it starts its processes by a shell command, and
quotes nothing in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

from regionspot.errors import ArtifactError

_PLAIN = re.compile(r"[A-Za-z0-9_./%+-]*")


class PlainPaths:
    """Stands links without spaces and letters beyond ASCII in for paths that have such; call
    `remove` in the end.

    The links lie in a private folder among the temporary files, which is made for the first of
    them.
    """

    def __init__(self) -> None:
        self._links: dict[Path, Path] = {}
        self._folder: Path | None = None

    def path(self, path: str | Path) -> Path:
        """The absolute path itself where it is plain, else a link to it, the same one each time.

        Raises:
            ArtifactError: no link can be made, or the folder of temporary files has such a path
                itself.
        """
        target = Path(os.path.realpath(path))
        if _PLAIN.fullmatch(str(target)):
            return target
        if target not in self._links:
            self._links[target] = self._link(target)
        return self._links[target]

    def remove(self) -> None:
        """Remove the links, not what they lead to. Never fails."""
        with contextlib.suppress(OSError):
            for link in self._links.values():
                link.unlink()
            if self._folder is not None:
                self._folder.rmdir()
        self._links.clear()
        self._folder = None

    def _link(self, target: Path) -> Path:
        try:
            if self._folder is None:
                self._folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="regionspot-")))
            if not _PLAIN.fullmatch(str(self._folder)):
                raise OSError(f"{self._folder} has such letters, too")
            link = self._folder / f"path{len(self._links)}"
            link.symlink_to(target)
        except OSError as error:
            raise ArtifactError(
                f"Triton cannot use the path {target}: it takes letters of ASCII without spaces, "
                f"and no link to it can be made ({error}). Move it, or set TMPDIR to a folder with "
                "such a path"
            ) from error
        return link

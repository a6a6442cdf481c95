"""Where the Triton server comes from: that of NVIDIA's container, or one of PyPI in an environment
of its own.

The server's Python must not be the user's: it needs an older NumPy, and does without PyTorch. What
it imports of this package is copied beside it, once for each state of the code.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import regionspot
from regionspot.errors import ArtifactError, InputError
from regionspot.files import cache_root, expand_home
from regionspot.locks import locked
from regionspot.serving.repository import PACKAGE_VARIABLE

logger = logging.getLogger(__name__)

CONTAINER = Path("/opt/tritonserver")
REQUIREMENTS = Path(__file__).with_name("requirements-server.txt")
PREFIXES = ("environment-", "package-")
"""Names of folders of a home begin so: an installed server, and a copy of this package."""

_READY = ".ready"
_LEFT_OUT = ("weights", "native", "__pycache__", "web", "deploy", "gateway")


@dataclass(frozen=True)
class Installation:
    """A Triton server that can be started.

    Args:
        executable: `tritonserver`.
        backends: the directory of its backends.
        variables: of the environment, in front of what is there.
        folders: names of the folders of the server's home that it needs.
    """

    executable: Path
    backends: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    def takes(self, option: str) -> bool:
        """Returns whether the server has an option, such as `--http-max-input-size`: releases
        differ.
        """
        done = subprocess.run(
            [str(self.executable), "--help"],
            env=self.environment(),
            cwd="/",
            capture_output=True,
            text=True,
            errors="replace",
        )
        return option in (done.stdout + done.stderr).split()

    def environment(self, plain: Callable[[str | Path], Path] = Path) -> dict[str, str]:
        """For the server's process: this process's own with `variables` put in.

        Args:
            plain: gives a path in the place of one that the server cannot take, see
                `PlainPaths.path`.
        """
        own = dict(os.environ)
        for name, given in self.variables.items():
            value = str(plain(given)) if name == PACKAGE_VARIABLE else given
            joined = (
                [value, own[name]]
                if name in ("PATH", "LD_LIBRARY_PATH") and own.get(name)
                else [value]
            )
            own[name] = os.pathsep.join(joined)
        return own


def default_home() -> Path:
    """Where the server's environment is kept unless told otherwise: $REGIONSPOT_SERVER_HOME, or in
    the cache.
    """
    named = os.environ.get("REGIONSPOT_SERVER_HOME")
    return expand_home(named, "REGIONSPOT_SERVER_HOME") if named else cache_root() / "server"


def find_installation(home: str | Path | None = None) -> Installation:
    """The container's server where this runs in one, else one from PyPI, installed when first asked
    for.

    Logs the installation, which takes minutes.

    Args:
        home: where it is kept; None stands for `default_home()`.

    Raises:
        InputError: this system has no such server.
        ArtifactError: it cannot be installed.
    """
    if (CONTAINER / "bin" / "tritonserver").is_file():
        return Installation(CONTAINER / "bin" / "tritonserver", CONTAINER / "backends")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise InputError(
            "PyPI has a Triton server for Linux on x86-64 alone: elsewhere run NVIDIA's container "
            "(serving/deploy)"
        )
    # links and variables need it whole
    home = Path(os.path.abspath(home if home is not None else default_home()))
    with locked(home):
        environment = _prepared(home)
        package = _copied_package(home)
        for folder in (environment, package):
            with contextlib.suppress(OSError):  # another user's
                os.utime(folder)  # it is in use, see `regionspot.serving.leftovers`
    python = (
        environment
        / "lib"
        / f"python{sys.version_info.major}.{sys.version_info.minor}"
        / "site-packages"
    )
    libraries = [str(python / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    return Installation(
        python / "pytriton" / "tritonserver" / "bin" / "tritonserver",
        environment / "backends",
        {
            "PATH": str(environment / "bin"),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            PACKAGE_VARIABLE: str(package),
        },
        (environment.name, package.name),
    )


def _prepared(home: Path) -> Path:
    """The environment of these requirements and of this Python, made if there is none."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + version.encode()).hexdigest()[:12]
    environment = home / f"environment-{digest}"
    if (environment / _READY).is_file():
        return environment
    shutil.rmtree(environment, ignore_errors=True)
    logger.info(f"Installing the Triton server into {environment}: once, about 600 MB on disk.")
    venv.create(environment, with_pip=True)
    command = [
        str(environment / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*command, "--no-deps", "-r", str(REQUIREMENTS)], capture_output=True, text=True
    )
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        raise ArtifactError(
            "the Triton server could not be installed: "
            f"{' '.join(lines[-2:]) or 'pip gave no reason'}. Is there a package index? Python "
            "3.10 to 3.12 has all of the packages."
        )
    _make_backends(environment, version)
    (environment / _READY).touch()
    return environment


def _make_backends(environment: Path, version: str) -> None:
    """A directory of backends whose Python backend starts this Python: the one in the package is
    built for another.
    """
    shipped = (
        environment / "lib" / f"python{version}" / "site-packages" / "pytriton" / "tritonserver"
    )
    stub = shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise InputError(
            f"this Triton server has no backend for Python {version}: use Python 3.10 to 3.12"
        )
    target = environment / "backends" / "python"
    target.mkdir(parents=True, exist_ok=True)
    for path in (shipped / "backends" / "python").iterdir():
        if path.name != stub.name:
            (target / path.name).symlink_to(path)
    shutil.copyfile(stub, target / stub.name)
    (target / stub.name).chmod(0o755)


def _copied_package(home: Path) -> Path:
    """A folder with this package as it is now, without weights, for a Python in which it is not
    installed.
    """
    files = dict(_package_files())
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    package = home / f"package-{digest.hexdigest()[:12]}"
    if not package.is_dir():
        aside = home / f".{package.name}.{os.getpid()}"
        for name, path in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, aside / name)
        aside.rename(package)
    return package


def _package_files() -> Iterator[tuple[str, Path]]:
    """Name in the copy -> file. In a checkout `serving` lies beside the package, and the extension
    elsewhere.
    """
    from regionspot import _native

    yield f"regionspot/{Path(_native.__file__).name}", Path(_native.__file__)
    roots = {
        "regionspot": Path(regionspot.__file__).parent,
        "regionspot/serving": Path(__file__).parent,
    }
    for prefix, root in roots.items():
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not set(inside.parts) & set(_LEFT_OUT):
                yield f"{prefix}/{inside.as_posix()}", path

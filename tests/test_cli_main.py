"""Dispatch, exit statuses and the one-line errors of `regionspot`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from regionspot import __version__
from regionspot.cli import main as cli
from regionspot.errors import ArtifactError, InputError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Put a function in the place of `regionspot doctor`."""

    def install(function: Callable[[list[str]], int]) -> None:
        module = types.ModuleType("stand_in_command")
        module.main = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stand_in_command", module)
        monkeypatch.setitem(cli.COMMANDS, "doctor", ("stand_in_command", "a stand-in"))

    return install


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in cli.COMMANDS)
    assert max(map(len, printed.splitlines())) <= 100


def test_no_command_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: regionspot" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"regionspot {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"), [("predcit", "Did you mean predict?"), ("zzz", "The commands are predict")]
)
def test_unknown_command(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err.startswith(f"error: there is no command '{typed}'.") and meant in captured.err
    )


def test_arguments_and_status_are_passed_through(command: Callable) -> None:
    seen = []

    def stand_in(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    command(stand_in)
    assert cli.main(["doctor", "--json", "x"]) == 7
    assert seen == [["--json", "x"]]


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (InputError("box 3 is empty"), 2, "error: box 3 is empty\n"),
        (ArtifactError("head.safetensors is damaged"), 2, "error: head.safetensors is damaged\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            MemoryError(),
            2,
            "error: out of memory: ask for less at a time, or use a machine with more\n",
        ),
    ],
)
def test_what_a_user_meets(
    raised: BaseException,
    status: int,
    printed: str,
    command: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stand_in(argv: list[str]) -> int:
        raise raised

    command(stand_in)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == printed


def test_a_defect_of_ours_is_not_hidden(command: Callable) -> None:
    def stand_in(argv: list[str]) -> int:
        raise ZeroDivisionError

    command(stand_in)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


@pytest.mark.parametrize(("script", "name"), [(cli.train, "train"), (cli.evaluate, "eval")])
def test_console_scripts(
    script: Callable[[], int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "main", lambda argv: 7 if argv == [name, "--config", "x.yaml"] else 1)
    monkeypatch.setattr(sys, "argv", ["script", "--config", "x.yaml"])
    assert script() == 7


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_describes_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_convert_reports_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "head.safetensors")]) == 2
    )
    assert "none.pth does not exist" in capsys.readouterr().err


STAND_IN = """
import sys, types
from regionspot.cli import main as cli
def run(argv):
    for _ in range(20_000):
        print("a line of a table")
    print("a line for the log", file=sys.stderr, flush=True)
    open("result", "w").write("whole")
    return 0
module = types.ModuleType("stand_in")
module.main = run
sys.modules["stand_in"] = module
cli.COMMANDS["doctor"] = ("stand_in", "")
sys.exit(cli.main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("| true", 141, ""),
        ("| head -1 > line", 141, ""),
        ("> /dev/full", 2, "error: cannot write to standard output: No space left on device\n"),
        (">&-", 0, ""),
        ("> /dev/null 2>&1 >&- 2>&-", 0, ""),
        ("2>&1 >/dev/null | true", 141, ""),
    ],
)
@pytest.mark.skipif(
    not Path("/dev/full").exists() or shutil.which("bash") is None, reason="Linux, with bash"
)
def test_output_that_nobody_reads(tmp_path: Path, redirection: str, status: int, said: str) -> None:
    """The work is done, its files are written, and the end is quiet."""
    (tmp_path / "command.py").write_text(STAND_IN)
    script = f"'{sys.executable}' command.py {redirection}; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    log = "" if "2>" in redirection else "a line for the log\n"
    assert (run.returncode, run.stderr) == (status, log + said)
    assert (tmp_path / "result").read_text() == "whole"


def test_text_that_the_output_cannot_hold(tmp_path: Path) -> None:
    """A file's name that is not UTF-8, and any letter where the locale has few: escaped, not a
    traceback.
    """
    code = (
        "from regionspot.cli.streams import KeptStreams\nwith KeptStreams(): print('caf\\udce9', "
        "'猫')"
    )
    for encoding, expected in (
        ("utf-8", b"caf\\udce9 \xe7\x8c\xab\n"),
        ("ascii", b"caf\\udce9 \\u732b\n"),
    ):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        )
        assert run.stdout == expected


def test_a_user_without_home_and_account(tmp_path: Path) -> None:
    """`env -i`, and a user id that no account has: libraries that insist on a home get one."""
    code = (
        "import os, sys; from regionspot.cli.main import main; main(['--version']); "
        "print(os.environ['HOME'])"
    )
    command = [sys.executable, "-c", f"import pwd; pwd.getpwuid = {{}}.__getitem__; {code}"]
    run = subprocess.run(command, env={"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[1].startswith(str(tmp_path))


def test_warnings_are_lines(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """This package's own ones without the place in its source; those of others as they are."""
    own = type("OwnWarning", (UserWarning,), {"__module__": "regionspot.vocabulary"})

    def stand_in(argv: list[str]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            for category in (own, UserWarning):
                sys.stderr.write(
                    warnings.formatwarning("two names look the same", category, "x.py", 1, "")
                )
        return 0

    command(stand_in)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: two names look the same" and said[1].startswith(
        "x.py:1: UserWarning"
    )

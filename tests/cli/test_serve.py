"""`regionspot-serve`: options, and what is refused before anything is started."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from regionspot.cli.main import main
from regionspot.cli.serve import build_parser, server_options
from regionspot.serving.gateway.tokens import first_line
from regionspot.serving.model_config import parameters_of, read_config
from regionspot.serving.server import ServerOptions
from regionspot.serving.tls import ServerTls


def test_init(mini_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "repository"
    command = [
        "serve",
        "init",
        "--artifacts",
        str(mini_artifacts),
        "--out",
        str(out),
        "--target",
        "cpu,onnxruntime",
    ]
    assert main([*command, "--vocabulary", "pets=cat,dog", "--limit", "max_regions=5"]) == 0
    printed = capsys.readouterr().out
    assert "serves 7 models on cpu" in printed and "serves 7 models on onnxruntime" in printed
    assert f"regionspot-serve up --repository {out}" in printed
    for target in ("cpu", "onnxruntime"):
        parameters = parameters_of(read_config(out / "regionspot" / "configs" / f"{target}.pbtxt"))
        assert parameters["vocabularies"] == '{"pets":["cat","dog"]}'
        assert '"max_regions":5' in parameters["limits"]


REFUSED = {
    "target": (
        ["init", "--artifacts", "A", "--out", "R", "--target", "gpu"],
        "there is no target 'gpu'",
    ),
    "limit": (
        ["init", "--artifacts", "A", "--out", "R", "--limit", "regions=5"],
        "there is no such limit",
    ),
    "number": (
        ["init", "--artifacts", "A", "--out", "R", "--limit", "max_words=many"],
        "they are whole numbers",
    ),
    "words": (
        ["init", "--artifacts", "A", "--out", "R", "--vocabulary", "cat,dog"],
        "write NAME=WORDS, such as",
    ),
    "artefacts": (["init", "--artifacts", "none", "--out", "R"], "none holds no artefacts"),
    "repository": (
        ["up", "--repository", "none"],
        "none is no model repository of regionspot. Make one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(
    case: str,
    mini_artifacts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[case]
    given = [str(mini_artifacts) if word == "A" else word for word in words]
    assert main(["serve", *given]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_down_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "down", "--home", str(tmp_path), "--grpc-port", "8001"]) == 0
    assert (
        "no server of gRPC port 8001 is running that `regionspot-serve up` started"
        in capsys.readouterr().out
    )


def test_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\nnot this\n")
    assert first_line(tmp_path / "token") == "0123456789abcdef"
    (tmp_path / "short").write_text("secret\n")
    for name, message in (("short", "at least 16 characters"), ("none", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            first_line(tmp_path / name)
        assert main(["serve", "web", "--token-file", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_gateway_that_anybody_could_use_wants_to_be_told_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert main(["serve", "web", "--host", host]) == 2
        assert "--allow-anonymous" in capsys.readouterr().err
    # none of this machine's addresses: it is refused later
    assert main(["serve", "web", "--host", "192.0.2.1", "--allow-anonymous"]) == 2
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err


def test_help_of_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("init", "up", "down", "web"):
        with pytest.raises(SystemExit) as caught:
            main(["serve", command, "--help"])
        assert caught.value.code == 0 and "--" in capsys.readouterr().out


def test_a_server_in_the_background_gets_every_option(tmp_path: Path) -> None:
    pem = tmp_path / "one.pem"
    pem.touch()
    given = ServerOptions("cpu", 2, 3, True, ServerTls(pem, pem, pem), "http://collector:4318")
    default = ServerOptions()
    for field in fields(ServerOptions):
        assert getattr(given, field.name) != getattr(default, field.name), "give it here, too"
    command = ["up", "--repository", "R", *given.up_options()]
    arguments = build_parser().parse_args(command)
    assert server_options(arguments, arguments.target) == given

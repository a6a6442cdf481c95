"""The options that say what runs the model: which go together, and what is said where they do
not.
"""

from __future__ import annotations

import argparse
from typing import get_args

import pytest

from regionspot.cli import models
from regionspot.cli.main import main
from regionspot.config import Precision, Runtime
from regionspot.errors import InputError
from regionspot.modeling.precision import DTYPES
from regionspot.predictor import as_pipeline
from regionspot.runtime.formats import model_runtimes
from regionspot.runtime.tolerance import PRECISIONS


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    models.add_model_options(parser)
    models.add_runtime_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--artifacts", "a"],
            "torch runs the weights themselves: --artifacts goes with another --runtime",
        ),
        (["--artifacts", "a", "--runtime", "torch"], "torch runs the weights themselves"),
        (
            ["--precision", "int8"],
            "torch works in fp32, bf16, fp16, not in int8: leave out --precision, or use artef",
        ),
        (
            ["--runtime", "openvino", "--artifacts", "a", "--head-weights", "h"],
            "--head-weights would be ignored",
        ),
        (
            [
                "--runtime",
                "openvino",
                "--artifacts",
                "a",
                "--sam-weights",
                "s",
                "--random-weights",
                "0",
            ],
            "--sam-weights, --random-weights would be ignored: the artefacts in a hold their own "
            "weights",
        ),
        (["--threads", "0"], "--threads must be from 1 to 1024, not 0"),
        (["--threads", "1025"], "--threads must be from 1 to 1024, not 1025"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.check_runtime(parse(*arguments))


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ["--runtime", "onnxruntime"],
            "regionspot-export --model regionspot_mini --out artifacts --onnx",
        ),
        (
            [
                "--runtime",
                "onnxruntime",
                "--precision",
                "fp8",
                "--model",
                "regionspot_bl",
                "--sam-weights",
                "s.pth",
            ],
            "regionspot-export --model regionspot_bl --sam-weights s.pth --out artifacts "
            "--onnx-gpu --calibration IMAGES --precision fp8",
        ),
        (
            ["--runtime", "tensorrt-rtx", "--precision", "fp16", "--random-weights", "0"],
            "regionspot-export --model regionspot_mini --random-weights 0 --out artifacts "
            "--trt-rtx --precision fp16",
        ),
        (
            [
                "--runtime",
                "tensorrt",
                "--model",
                "regionspot_bl",
                "--head-weights",
                "my head",
                "--sam-weights",
                "s.pth",
            ],
            "regionspot-export --model regionspot_bl --weights 'my head' --sam-weights s.pth "
            "--out artifacts --trt",
        ),
    ],
)
def test_without_artifacts_the_command_that_makes_them_is_shown(
    arguments: list[str], command: str
) -> None:
    from regionspot.cli.export import build_parser

    with pytest.raises(InputError) as caught:
        models.check_runtime(parse(*arguments))
    what, _, shown = str(caught.value).partition("\n  ")
    assert what.startswith(f"--runtime {arguments[1]} runs exported graphs") and shown == command
    words = command.replace("'my head'", "my_head").split()
    build_parser().parse_args(words[1:])  # the command that is shown exists


@pytest.mark.parametrize(
    "arguments", [[], ["--runtime", "torch", "--threads", "3"], ["--precision", "bf16"]]
)
def test_what_goes_together(arguments: list[str]) -> None:
    models.check_runtime(parse(*arguments))


def test_every_runtime_and_precision_can_be_asked_for() -> None:
    assert get_args(Runtime) == ("torch", *model_runtimes())
    assert get_args(Precision) == PRECISIONS
    assert set(models.TORCH_PRECISIONS) == set(DTYPES)


@pytest.mark.parametrize(
    ("precision", "works_in"), [(None, "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_torch_works_in_the_precision_that_is_asked_for(
    precision: str | None, works_in: str
) -> None:
    arguments = parse(*(["--precision", precision] if precision else []))
    with models.load_recognizer(arguments) as model:
        assert as_pipeline(model).precision == works_in


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_refused_before_anything_is_loaded(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda _: pytest.fail("loaded"))
    arguments = {
        "predict": ["a.jpg", "--box", "0,0,9,9", "--vocabulary", "cat,dog"],
        "eval": ["--data", "x.json"],
    }
    assert main([command, *arguments[command], "--runtime", "openvino"]) == 2
    assert (
        "regionspot-export --model regionspot_mini --out artifacts --openvino"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("threads", ["0", "-1", "100000"])
@pytest.mark.parametrize("command", ["predict", "eval", "export", "parity"])
def test_no_such_number_of_threads(
    command: str, threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "predict": ["absent.jpg", "--box", "0,0,9,9", "--vocabulary", "cat,dog"],
        "eval": ["--data", "absent.json"],
        "export": ["--out", "absent/of/all", "--dry-run"],
        "parity": ["torch", "absent"],
    }
    assert main([command, *arguments[command], f"--threads={threads}"]) == 2
    assert capsys.readouterr().err == f"error: --threads must be from 1 to 1024, not {threads}\n"


@pytest.mark.parametrize("methods", ["clip_crops", "head,roi_pooling"])
def test_methods_that_need_pytorch(methods: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--runtime", "openvino", "--artifacts", "somewhere", "--methods", methods]
    assert main(["eval", "--data", "absent.json", *chosen]) == 2
    error = capsys.readouterr().err
    assert (
        "PyTorch, not exported graphs in openvino" in error
        and "choose from head, constant_token" in error
    )

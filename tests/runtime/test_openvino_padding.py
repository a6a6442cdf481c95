"""SAM's first layers without the windows that no picture reaches: the same bits, from less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from regionspot.modeling.graphs import model_sizes
from regionspot.modeling.presets import create_model
from regionspot.runtime import openvino_attention, openvino_linear
from regionspot.runtime.graphs import graph_specs
from regionspot.runtime.openvino_attention import use_own_attention
from regionspot.runtime.openvino_linear import NativeLinear, use_own_linear_layers
from regionspot.runtime.openvino_operation import NativeOperations
from regionspot.runtime.openvino_padding import PaddingWindows, leave_out_padding
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.structures import FloatArray

SIZE = 256


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_attention, "LARGE", 0)
    monkeypatch.setattr(openvino_linear, "LARGE", 0)
    monkeypatch.setattr(openvino_linear, "is_profitable", lambda: True)


def open_encoder(path: Path) -> OpenVinoRunner:
    return OpenVinoRunner(
        path,
        graph_specs(model_sizes(create_model("regionspot_mini")))["sam_image_encoder"],
        threads=2,
    )


def picture(height: int, width: int, seed: int) -> dict[str, np.ndarray]:
    # in the padding, too
    images = np.random.default_rng(seed).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    return {"images": images, "input_sizes": np.array([[height, width]], np.int32)}


def embeddings(runner: OpenVinoRunner, feeds: dict[str, np.ndarray]) -> FloatArray:
    return np.asarray(runner.infer(feeds)["image_embeddings"])


def test_the_same_bits_whatever_came_before(sam_encoder: Path) -> None:
    sizes = [
        (144, 256),
        (256, 90),
        (100, 256),
        (256, 256),
        (144, 256),
        (60, 60),
        (256, 90),
        (0, 0),
        (20, 256),
        (144, 250),
    ]
    with open_encoder(sam_encoder) as runner:
        for seed, size in enumerate(sizes):
            feeds = picture(*size, seed)
            found = embeddings(runner, feeds)
            with open_encoder(sam_encoder) as fresh:
                np.testing.assert_array_equal(found, embeddings(fresh, feeds))
        together = {
            name: np.concatenate([picture(*size, 3)[name] for size in sizes[:3]]) for name in feeds
        }
        alone = [
            embeddings(runner, {name: value[row : row + 1] for name, value in together.items()})
            for row in range(3)
        ]
        np.testing.assert_array_equal(embeddings(runner, together), np.concatenate(alone))


def test_less_is_worked_on(sam_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    compute = NativeLinear.compute

    def counted(operation: NativeLinear, outputs: list[Any], inputs: list[Any]) -> None:
        spans = [slice(0, 16 * 16)] if operation.worked is None else operation.worked.spans()
        tokens.append(sum(span.stop - span.start for span in spans))
        compute(operation, outputs, inputs)

    monkeypatch.setattr(NativeLinear, "compute", counted)
    blocks = create_model("regionspot_mini").sam.sam.image_encoder.blocks
    windowed = next(index for index, block in enumerate(blocks) if block.window_size == 0)
    window = blocks[0].window_size
    assert windowed > 0 and 2 * window < 16  # several windows
    with open_encoder(sam_encoder) as runner:
        for height in (SIZE, 144, 144):  # 9 rows of tokens
            runner.infer(picture(height, SIZE, 0))
    whole, rows = 16 * 16, -(-9 // window) * window
    first, second, third = (
        tokens[run * 4 * len(blocks) : (run + 1) * 4 * len(blocks)] for run in range(3)
    )
    # the second had to find out what padding comes to
    assert first == second == [whole] * 4 * len(blocks)
    assert third == [rows * 16] * 4 * windowed + [whole] * 4 * (len(blocks) - windowed)


def test_what_is_known() -> None:
    windows = PaddingWindows((8, 8), (3, 3), patch=10)

    def run(height: int, width: int) -> tuple[int, int]:
        windows.begin((height, width))
        tokens = np.ones((8, 8, 2), np.float32)
        if windows.size != (8, 8):
            tokens[windows.size[0] :] = tokens[:, windows.size[1] :] = np.nan  # whatever is there
        windows.complete(tokens)
        assert (tokens == 1).all()
        return windows.size

    assert run(30, 80) == (8, 8)
    assert run(21, 80) == (3, 8) and run(30, 80) == (3, 8)
    assert run(31, 80) == (6, 8)  # less padding than was known
    assert run(80, 60) == (8, 8)  # other padding
    assert run(80, 55) == (8, 6) and run(30, 60) == (3, 6) and run(80, 80) == (8, 8)


def prepared(path: Path) -> tuple[openvino.Model, NativeOperations]:
    operations = NativeOperations()
    model = openvino.Core().read_model(path)
    use_own_attention(model, operations)
    model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
    return model, operations


def test_layers_that_are_not_all_ours_stay(sam_encoder: Path) -> None:
    model, operations = prepared(sam_encoder)
    assert leave_out_padding(model, operations) is None  # OpenVINO has the linear layers
    use_own_linear_layers(model, operations)
    assert leave_out_padding(model, operations) is not None
    plain = openvino.Core().read_model(sam_encoder)
    assert leave_out_padding(plain, NativeOperations()) is None


def test_windows_alone_or_none(sam_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a global layer there is no place until which windows stay apart."""
    from regionspot.runtime import openvino_padding

    for window in (lambda node: (4, 4), openvino_padding._grid_of):
        model, operations = prepared(sam_encoder)
        use_own_linear_layers(model, operations)
        monkeypatch.setattr(openvino_padding, "_window_of", window)
        assert leave_out_padding(model, operations) is None

"""Linear layers by our own kernel inside OpenVINO: found where they are meant to be, and equal."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13

from regionspot import _native
from regionspot.modeling.graphs import model_sizes
from regionspot.modeling.presets import create_model
from regionspot.runtime import openvino_linear
from regionspot.runtime.graphs import graph_specs
from regionspot.runtime.openvino_linear import NativeLinear, use_own_linear_layers
from regionspot.runtime.openvino_operation import NativeOperations
from regionspot.runtime.openvino_runner import OpenVinoRunner
from tests.runtime.conftest import Encode


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor, too: kernels for fewer lanes give the same."""
    monkeypatch.setattr(openvino_linear, "LARGE", 0)
    monkeypatch.setattr(openvino_linear, "is_profitable", lambda: True)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.2, shape).astype(np.float32)


def replaced(model: openvino.Model) -> list[Any]:
    operations = NativeOperations()
    use_own_linear_layers(model, operations)
    return operations.alive


def outputs(model: openvino.Model, x: np.ndarray) -> list[np.ndarray]:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled([x])
    return [results[port] for port in compiled.outputs]


Build = Callable[[openvino.Output], Any]


def model_of(*layers: Build, inputs: int = 32) -> openvino.Model:
    x = opset13.parameter([2, 3, inputs], np.float32)
    return openvino.Model([opset13.result(layer(x)) for layer in layers], [x])


def linear(x: openvino.Output, outputs: int = 48, transposed: bool = False, seed: int = 0) -> Any:
    weight = weights(32, outputs) + np.float32(seed)
    product = opset13.matmul(
        x, np.ascontiguousarray(weight.T) if transposed else weight, False, transposed
    )
    return opset13.add(product, weights(1, 1, outputs))


def quick_gelu(x: openvino.Output, factor: float = 1.702) -> Any:
    return opset13.multiply(x, opset13.sigmoid(opset13.multiply(x, np.float32(factor))))


SAME: dict[str, Build] = {
    "plain": linear,
    "transposed": lambda x: linear(x, transposed=True),
    "gelu": lambda x: opset13.gelu(linear(x), "ERF"),
    "tanh_gelu_beside": lambda x: opset13.gelu(linear(x), "TANH"),
    "quick_gelu": lambda x: quick_gelu(linear(x)),
    "other_gate": lambda x: quick_gelu(linear(x), 1.6),
    "gate_of_something_else": lambda x: opset13.multiply(
        layer := linear(x), opset13.sigmoid(opset13.multiply(opset13.abs(layer), np.float32(1.702)))
    ),
    "no_bias": lambda x: opset13.matmul(x, weights(32, 48), False, False),
    "bias_for_all": lambda x: opset13.add(
        opset13.matmul(x, weights(32, 48), False, False), weights(1)
    ),
    "bias_for_each_row": lambda x: opset13.add(
        opset13.matmul(x, weights(32, 48), False, False), weights(3, 1)
    ),
    "bias_for_each_place": lambda x: opset13.add(
        opset13.matmul(x, weights(32, 48), False, False), weights(3, 48)
    ),
    "product_read_twice": lambda x: opset13.add(
        product := opset13.matmul(x, weights(32, 48), False, False), product
    ),
    "read_before_gelu": lambda x: opset13.multiply(
        before := linear(x), opset13.gelu(before, "ERF")
    ),
}


STAYS = {
    **dict.fromkeys(("tanh_gelu_beside", "read_before_gelu"), "Gelu"),
    **dict.fromkeys(("other_gate", "gate_of_something_else"), "Sigmoid"),
    **dict.fromkeys(
        ("bias_for_all", "bias_for_each_row", "bias_for_each_place", "product_read_twice"), "Add"
    ),
}
"""What is done by OpenVINO still."""


@pytest.mark.parametrize("name", SAME)
def test_equal_to_openvinos_own(name: str) -> None:
    x = weights(2, 3, 32)
    theirs = outputs(model_of(SAME[name]), x)
    model = model_of(SAME[name])
    assert len(replaced(model)) == 1
    kinds = {node.get_type_name() for node in model.get_ordered_ops()}
    assert kinds & {"MatMul", "Gelu", "Sigmoid", "Add"} == (
        {STAYS[name]} if name in STAYS else set()
    )
    np.testing.assert_allclose(outputs(model, x)[0], theirs[0], atol=3e-6)


def test_two_layers_of_one_input_stay_two() -> None:
    """OpenVINO makes one of operations that seem the same: ours have their weights within."""
    x = weights(2, 3, 32)
    layers: tuple[Build, Build] = (linear, lambda x: linear(x, seed=1))
    theirs = outputs(model_of(*layers), x)
    model = model_of(*layers)
    assert len(replaced(model)) == 2
    for ours, their in zip(outputs(model, x), theirs, strict=True):
        np.testing.assert_allclose(ours, their, atol=2e-5)
    assert np.abs(theirs[0] - theirs[1]).max() > 0.1


OTHERS: dict[str, Build] = {
    "odd_width": lambda x: linear(x, outputs=40),
    "batched": lambda x: opset13.add(
        opset13.matmul(x, weights(2, 32, 48), False, False), weights(48)
    ),
    "no_constant": lambda x: opset13.add(opset13.matmul(x, x, False, True), weights(3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_something_else_stays(name: str) -> None:
    assert not replaced(model_of(OTHERS[name]))


def test_small_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_linear, "LARGE", 2 * 3 * 32 * 48)
    assert replaced(model_of(linear))
    monkeypatch.setattr(openvino_linear, "LARGE", 2 * 3 * 32 * 48 + 1)
    assert not replaced(model_of(linear))


def test_other_processors_keep_openvinos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(openvino_linear, "LARGE", 0)
    assert bool(replaced(model_of(linear))) == (_native.LinearLayer.lanes == 16)


def test_an_encoder(sam_encoder: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = create_model("regionspot_mini").sam.sam.image_encoder.blocks
    model = openvino.Core().read_model(sam_encoder)
    assert len(replaced(model)) == 4 * len(blocks)
    assert "Gelu" not in [node.get_type_name() for node in model.get_ordered_ops()]
    ours = encode(sam_encoder)
    monkeypatch.setattr(openvino_linear, "LARGE", 1 << 60)
    theirs = encode(sam_encoder)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_a_graph_of_several_sizes_keeps_openvinos(mini_artifacts: Path) -> None:
    """Ours would fix all of them, the number of words too."""
    path = mini_artifacts / "onnx" / "fp32" / "region_head.onnx"
    assert replaced(openvino.Core().read_model(path))  # layers that ours could do
    spec = graph_specs(model_sizes(create_model("regionspot_mini")))["region_head"]
    with OpenVinoRunner(path, spec, threads=1) as runner:
        for sizes in (
            {"batch": 1, "regions": 8, "words": 5},
            {"batch": 2, "regions": 3, "words": 80},
        ):
            feeds = {
                tensor.name: np.ones(tensor.resolved(sizes), tensor.dtype) for tensor in spec.inputs
            }
            assert runner.infer(feeds)["logits"].shape == tuple(sizes.values())


def test_nothing_is_left_behind(sam_encoder: Path) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(found, NativeLinear) for found in gc.get_objects())

    before = alive()
    spec = graph_specs(model_sizes(create_model("regionspot_mini")))["sam_image_encoder"]
    with OpenVinoRunner(sam_encoder, spec, threads=1):
        assert alive() > before
    assert alive() == before


def test_layers_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        _native.LinearLayer(weights(24, 16), weights(16))
    with pytest.raises(ValueError, match="bias does not fit"):
        _native.LinearLayer(weights(32, 16), weights(32))
    layer = _native.LinearLayer(weights(32, 16), weights(16))
    for x, y in (((2, 16), (2, 16)), ((2, 32), (2, 32)), ((2, 32), (3, 16))):
        with pytest.raises(ValueError, match="another shape"):
            layer.apply(weights(*x), weights(*y), threads=1)

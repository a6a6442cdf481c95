"""What artefacts are compared on: trials of all sizes and of pictures, the same for the same
seed.
"""

from __future__ import annotations

import numpy as np
import pytest

from regionspot.errors import InputError
from regionspot.export.parity import compare, compare_pipeline
from regionspot.export.parity_inputs import ParityInputs, Trial
from regionspot.modeling.presets import create_model
from regionspot.runtime.tolerance import REFACTORED, RUNTIME_FP32


@pytest.fixture(scope="module")
def inputs() -> ParityInputs:
    return ParityInputs(create_model("regionspot_mini"), parity_images=2)


def regions(trials: list[Trial]) -> list[tuple[int, ...]]:
    return [trial.feeds["valid"].shape for trial in trials]


def test_seeded_sizes_and_real_pictures(inputs: ParityInputs) -> None:
    trials = inputs.trials(inputs.specs["region_head"])
    assert [trial.real for trial in trials] == [False, False, False, False, True, True]
    assert regions(trials)[:4] == [(1, 32), (2, 5), (1, 1), (8, 300)]
    assert [len(trial.feeds["text_embeddings"]) for trial in trials[:4]] == [80, 7, 80, 2048]
    for trial in trials:
        assert trial.expected["logits"].shape == (
            *trial.feeds["valid"].shape,
            len(trial.feeds["text_embeddings"]),
        )
        assert np.isfinite(trial.expected["logits"]).all()


@pytest.mark.parametrize(
    "graph", ["sam_image_encoder", "sam_token_decoder_prompts", "clip_text_encoder"]
)
def test_the_same_again(inputs: ParityInputs, graph: str) -> None:
    spec = inputs.specs[graph]
    first = inputs.trials(spec)
    assert inputs.trials(spec) is first
    inputs.forget(graph)
    again = inputs.trials(spec)
    for one, other in zip(first, again, strict=True):
        for name, array in one.feeds.items():
            np.testing.assert_array_equal(array, other.feeds[name])
    assert compare(spec, first, [trial.expected for trial in again], REFACTORED).passed


def test_calibration_is_on_other_pictures(inputs: ParityInputs) -> None:
    spec = inputs.specs["clip_image_encoder"]
    compared = [trial.feeds["clip_images"] for trial in inputs.trials(spec) if trial.real]
    calibrated = [feeds["clip_images"] for feeds in inputs.calibration(spec)]
    assert len(compared) == 2 and len(calibrated) > 20
    assert not any(np.array_equal(one, other) for one in compared for other in calibrated)


def test_a_fingerprint_of_the_calibration(inputs: ParityInputs) -> None:
    same = ParityInputs(inputs.model, parity_images=2)
    assert same.calibration_fingerprint() == inputs.calibration_fingerprint()
    assert ParityInputs(inputs.model, parity_images=2, seed=1).calibration_fingerprint() != (
        inputs.calibration_fingerprint()
    )


def test_the_pipeline_is_the_recognizer(inputs: ParityInputs) -> None:
    """Graph after graph, with the text encoder or without, gives what the module that holds all in
    one gives.
    """
    spec = inputs.specs["region_recognizer"]
    whole = [trial for trial in inputs.trials(spec) if trial.real]
    for with_text in (False, True):
        trials = inputs.pipeline_trials(spec, with_text)
        assert ("tokens" in trials[0].feeds) is with_text and trials[0].real
        logits = [{"logits": np.log(trial.expected["scores"])} for trial in whole]
        verdict = compare_pipeline(trials, logits, RUNTIME_FP32)
        assert verdict.passed, verdict.reason
        assert verdict.images == 2 and verdict.regions == sum(
            int(trial.feeds["valid"].sum()) for trial in trials
        )


def test_no_picture() -> None:
    with pytest.raises(InputError, match="one picture or more, not 0"):
        ParityInputs(create_model("regionspot_mini"), parity_images=0)

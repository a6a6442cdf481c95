"""Our own kernels for the token decoder: equal to the module, whatever is asked; refusals; where
they are used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from regionspot.errors import ArtifactError, InputError
from regionspot.export.decoder_weights import write_decoder_weights
from regionspot.modeling.graphs import graph_module, model_sizes
from regionspot.modeling.presets import create_model
from regionspot.modeling.regionspot import RegionSpot
from regionspot.runtime.artifacts import Manifest, spec_to_json
from regionspot.runtime.graphs import graph_specs
from regionspot.runtime.native_runner import NATIVE_GRAPHS, NativeRunner
from regionspot.runtime.opening import open_pipeline
from regionspot.runtime.openvino_runner import OpenVinoRunner
from regionspot.transforms import SamTransform
from tests.modeling.conftest import roughen, seeded

PROMPTS, MASKS = NATIVE_GRAPHS
Feeds = dict[str, np.ndarray]


class Case:
    """A model whose decoder is far from its initial weights, its file, and answers in double
    precision.
    """

    def __init__(self, model: RegionSpot, folder: Path) -> None:
        self.model, self.path = model, folder / "decoder.npz"
        self.specs = graph_specs(model_sizes(model))
        write_decoder_weights(model.sam, self.path)
        exact: Any = SimpleNamespace(sam=deepcopy(model.sam).double())
        self.modules = {
            name: graph_module(exact, name) for name in (*NATIVE_GRAPHS, "sam_token_decoder_image")
        }

    def open(self, graph: str = MASKS, threads: int = 2) -> NativeRunner:
        return NativeRunner(self.path, self.specs[graph], threads)

    def feeds(
        self,
        graph: str = MASKS,
        prompts: int = 5,
        points: int = 2,
        images: int = 1,
        seed: int = 0,
        multimask: bool = False,
    ) -> Feeds:
        random = np.random.default_rng(seed)
        info = model_sizes(self.model)
        embeddings = random.standard_normal((images, info.token_dim, *info.embedding_size))
        with torch.no_grad():
            context = self.modules["sam_token_decoder_image"](torch.from_numpy(embeddings))
        every = {
            "image_embeddings": embeddings,
            "image_projections": context[0].numpy(),
            "image_statistics": context[1].numpy(),
            "points": random.random((images, prompts, points, 2)) * info.sam_image_size,
        }
        feeds = {name: array.astype(np.float32) for name, array in every.items()}
        feeds["labels"] = random.integers(-1, 4, (images, prompts, points), dtype=np.int32)
        feeds["token_ids"] = np.array([1, 2, 3] if multimask else [0], np.int32)
        return {name: feeds[name] for name in self.specs[graph].input_names}

    def expected(self, graph: str, feeds: Feeds) -> Feeds:
        tensors = [torch.from_numpy(feeds[name]) for name in self.specs[graph].input_names]
        doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
        with torch.no_grad():
            found = self.modules[graph](*doubles)
        return dict(
            zip(self.specs[graph].output_names, (tensor.numpy() for tensor in found), strict=True)
        )


@pytest.fixture(scope="module", params=["regionspot_mini", "regionspot_bb"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    with seeded(5):
        model = create_model(request.param, random_weights=5)
        roughen(model.sam.sam.mask_decoder)
        roughen(model.sam.sam.prompt_encoder)
        model.sam.token_decoder.fold()
    return Case(model, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(create_model("regionspot_mini"), tmp_path_factory.mktemp("mini"))


def assert_close(found: Feeds, expected: Feeds) -> None:
    assert list(found) == list(expected)
    for name, array in found.items():
        assert array.dtype == np.float32 and array.shape == expected[name].shape
        np.testing.assert_allclose(
            array, expected[name], atol=2e-5 * max(1.0, np.abs(expected[name]).max()), err_msg=name
        )


class TestAnswers:
    @pytest.mark.parametrize("multimask", [False, True])
    @pytest.mark.parametrize(("prompts", "points", "images"), [(1, 1, 1), (5, 2, 2), (11, 5, 1)])
    def test_equal_the_modules(
        self, case: Case, prompts: int, points: int, images: int, multimask: bool
    ) -> None:
        for graph in NATIVE_GRAPHS:
            feeds = case.feeds(graph, prompts, points, images, multimask=multimask)
            with case.open(graph) as runner:
                assert_close(runner.infer(feeds), case.expected(graph, feeds))

    def test_no_prompts(self, mini: Case) -> None:
        with mini.open() as runner:
            assert runner.infer(mini.feeds(prompts=0))["low_res_masks"].shape == (1, 0, 1, 64, 64)

    def test_are_the_same_whatever_the_threads_and_the_company(self, case: Case) -> None:
        feeds = case.feeds(prompts=9)
        with case.open(threads=1) as one, case.open(threads=3) as three:
            together = one.infer(feeds)
            for name, array in three.infer(feeds).items():
                np.testing.assert_array_equal(array, together[name])
            alone = one.infer(feeds | {name: feeds[name][:, 4:5] for name in ("points", "labels")})
            for name, array in alone.items():
                np.testing.assert_array_equal(array, together[name][:, 4:5])

    @pytest.mark.parametrize("pictures", [[(1080, 1920), (480, 640)], [(640, 361), (639, 639)]])
    def test_masks_are_drawn_as_far_as_their_pictures_reach(
        self, case: Case, pictures: list[tuple[int, int]]
    ) -> None:
        transform = SamTransform(case.model.sam.image_size)
        sizes = np.array([transform.input_size(*picture) for picture in pictures], np.int32)
        feeds = case.feeds(images=2)
        with case.open() as runner:
            whole, found = runner.infer(feeds), runner.infer(feeds | {"input_sizes": sizes})
            padded = [np.count_nonzero(masks == 0) for masks in found["low_res_masks"]]
            for masks, expected, picture in zip(
                found["low_res_masks"][:, :, 0],
                whole["low_res_masks"][:, :, 0],
                pictures,
                strict=True,
            ):
                assert (
                    transform.encode_masks(masks, *picture).rles
                    == transform.encode_masks(expected, *picture).rles
                )
        assert np.isfinite(found["low_res_masks"]).all()
        # kernels leave out rows, and columns where tiles are rows
        rows_alone = found["low_res_masks"].shape[-1] == 256
        left_out = padded[0] / found["low_res_masks"][0].size
        assert left_out >= 0.25 if rows_alone or pictures[0][1] > pictures[0][0] else left_out == 0
        for name in ("mask_tokens", "iou_predictions"):
            np.testing.assert_array_equal(found[name], whole[name])

    @pytest.mark.parametrize("level", [1, 3])
    def test_at_lower_levels_of_the_instruction_set(
        self, mini: Case, level: int, tmp_path: Path
    ) -> None:
        feeds = mini.feeds(prompts=6)
        np.savez(tmp_path / "feeds.npz", **feeds)  # type: ignore[arg-type]
        program = (
            "import json, sys, numpy as np\n"
            "from regionspot.runtime.artifacts import spec_from_json\n"
            "from regionspot.runtime.native_runner import NativeRunner\n"
            "folder, weights, spec = sys.argv[1:]\n"
            "runner = NativeRunner(weights, spec_from_json(json.loads(spec)), 1)\n"
            "np.savez(folder + '/found.npz', **runner.infer(dict(np.load(folder + "
            "'/feeds.npz'))))\n"
        )
        command = [
            sys.executable,
            "-c",
            program,
            str(tmp_path),
            str(mini.path),
            json.dumps(spec_to_json(mini.specs[MASKS])),
        ]
        subprocess.run(command, check=True, env=os.environ | {"REGIONSPOT_MAX_LEVEL": str(level)})
        with np.load(tmp_path / "found.npz") as found:
            assert_close(dict(found), mini.expected(MASKS, feeds))


class TestImages:
    def test_another_image(self, mini: Case) -> None:
        first, second = mini.feeds(seed=1), mini.feeds(seed=2)
        with mini.open() as runner:
            for feeds in (first, second, first):
                assert_close(runner.infer(feeds), mini.expected(MASKS, feeds))

    def test_what_is_kept_of_an_image_goes_with_it(self, mini: Case) -> None:
        feeds = mini.feeds()
        with mini.open() as runner:
            runner.infer(feeds)
            packed = runner._packed_last
            runner.infer(feeds)
            assert packed is not None and runner._packed_last is packed and len(packed.images) == 1
            del feeds
            assert runner._packed_last is None

    def test_arrays_in_any_memory_order(self, mini: Case) -> None:
        feeds = mini.feeds()
        odd = {name: np.asfortranarray(array) for name, array in feeds.items()}
        with mini.open() as runner:
            assert_close(runner.infer(odd), mini.expected(MASKS, feeds))


class TestRefusals:
    def test_of_questions(self, mini: Case) -> None:
        feeds = mini.feeds()
        with mini.open() as runner:
            with pytest.raises(InputError, match="labels are -1 to 3, not 4"):
                runner.infer(feeds | {"labels": np.full_like(feeds["labels"], 4)})
            with pytest.raises(InputError, match="token_ids are 0 to 3, not"):
                runner.infer(feeds | {"token_ids": np.array([4], np.int32)})
            with pytest.raises(InputError, match="needs labels too"):
                runner.infer({name: array for name, array in feeds.items() if name != "labels"})
        with pytest.raises(InputError, match="was closed"):
            runner.infer(feeds)

    def test_of_files(self, mini: Case, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="export it again"):
            NativeRunner(tmp_path / "none.npz", mini.specs[MASKS])
        (tmp_path / "damaged.npz").write_bytes(mini.path.read_bytes()[:5000])
        with pytest.raises(ArtifactError, match="export it again"):
            NativeRunner(tmp_path / "damaged.npz", mini.specs[MASKS])
        with np.load(mini.path) as content:
            np.savez(
                tmp_path / "less.npz",
                **{name: content[name] for name in content.files if name != "u1.u1"},
            )
        with pytest.raises(ArtifactError, match=r"u1\.u1 is missing"):
            NativeRunner(tmp_path / "less.npz", mini.specs[MASKS])

    def test_of_another_models_weights(self, mini: Case) -> None:
        other = replace(model_sizes(mini.model), token_dim=256, embedding_size=(64, 64))
        with pytest.raises(
            ArtifactError,
            match="128 channels and 256 cells, where sam_mask_decoder has 256 and 4096",
        ):
            NativeRunner(mini.path, graph_specs(other)[MASKS])

    def test_of_another_graph(self, mini: Case) -> None:
        with pytest.raises(InputError, match="no kernels for region_head"):
            NativeRunner(mini.path, mini.specs["region_head"])


class TestInAPipeline:
    def test_they_stand_in_for_the_runtimes_own_graphs(
        self, mini_artifacts_with_masks: Path
    ) -> None:
        boxes = np.array([[[[10, 10], [90, 90]], [[30, 40], [200, 250]]]], np.float32)
        labels = np.tile(np.array([2, 3], np.int32), (1, 2, 1))
        images = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
        found = []
        for native in (True, False):
            with open_pipeline(mini_artifacts_with_masks, "openvino", native=native) as pipeline:
                runners = [type(pipeline.runner(graph)) for graph in NATIVE_GRAPHS]
                assert runners == [NativeRunner if native else OpenVinoRunner] * 2
                found.append(
                    pipeline.low_res_masks(
                        pipeline.encode_image(images, [[256, 256]]), boxes, labels, True
                    )
                )
        for own, other in zip(*found, strict=True):
            np.testing.assert_allclose(own, other, atol=2e-4)

    def test_not_where_they_failed(self, mini_artifacts: Path, tmp_path: Path) -> None:
        shutil.copytree(mini_artifacts, tmp_path / "a")
        manifest = Manifest.load(tmp_path / "a")
        entry = manifest.find(PROMPTS, "native", "fp32")
        manifest.with_entry(replace(entry, passed=False, reason="a test")).save()
        with open_pipeline(tmp_path / "a", "onnxruntime") as pipeline:
            assert not isinstance(pipeline.runner(PROMPTS), NativeRunner)

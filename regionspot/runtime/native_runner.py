"""SAM's token decoder on the CPU by our own kernels, `regionspot/native/token_decoder.hpp`; NumPy
is all it needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from zipfile import BadZipFile

import numpy as np

from regionspot import _native
from regionspot.errors import ArtifactError, InputError
from regionspot.runtime.formats import FORMATS, NATIVE, OpenOptions
from regionspot.runtime.graph_spec import NUM_MASK_TOKENS, GraphSpec
from regionspot.runtime.graphs import INPUT_SIZES
from regionspot.runtime.runner import Array, Tensors, check_feeds
from regionspot.structures import PADDING, FloatArray
from regionspot.threads import default_threads

NATIVE_GRAPHS = FORMATS[NATIVE].graphs or ()


@dataclass(frozen=True, eq=False)
class _PackedImages:
    """Images in the kernels' order, and the arrays that they were packed from."""

    sources: tuple[weakref.ref[Array], ...]
    images: list[Any]

    def is_of(self, arrays: list[Array]) -> bool:
        return all(source() is array for source, array in zip(self.sources, arrays, strict=True))


class NativeRunner:
    """A `Runner` of a graph of NATIVE_GRAPHS in single precision. What it keeps are arrays.

    What prompts share of an image is brought into the kernels' order when its arrays are first
    seen, and kept while those very arrays live: nobody may write into them meanwhile.

    Where it is told `input_sizes`, it leaves masks 0 in the images' padding, except next to the
    image, where enlarging a mask looks at them.

    Args:
        path: weights, as `regionspot.export.decoder_weights` writes them.
        spec: the graph's tensors.
        threads: None stands for `default_threads()`.

    Raises:
        InputError: it is not one of NATIVE_GRAPHS.
        ArtifactError: the file is not there, damaged, or of a decoder of other sizes.
    """

    def __init__(self, path: str | Path, spec: GraphSpec, threads: int | None = None) -> None:
        self.path, self.spec, self.threads = Path(path), spec, threads or default_threads()
        if spec.name not in NATIVE_GRAPHS:
            raise InputError(
                f"there are no kernels for {spec.name}: choose {' or '.join(NATIVE_GRAPHS)}"
            )
        try:
            with np.load(self.path, allow_pickle=False) as content:
                weights = {
                    name: np.ascontiguousarray(content[name], np.float32) for name in content.files
                }
            self._decoder: Any = _native.TokenDecoder(weights)
            self._prompt_weights = {
                name: weights[name] for name in ("gaussian", "point_kinds", "output_tokens")
            }
            self._image_size = float(weights["image_size"][0])
        except (OSError, ValueError, LookupError, EOFError, BadZipFile) as error:
            raise ArtifactError(
                f"{path} holds no token decoder that can be used ({error}): export it again"
            ) from error
        self._draws = "low_res_masks" in spec.output_names
        if self._draws:
            self.spec = replace(spec, optional=(INPUT_SIZES,))
        self._check_sizes()
        self._packed_last: _PackedImages | None = None

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`."""
        decoder = self._decoder
        if decoder is None:
            raise InputError(f"{self.path} was closed: open it again")
        check_feeds(self.spec, feeds)
        wanted = [int(token) for token in feeds["token_ids"]]
        if not all(0 <= token < NUM_MASK_TOKENS for token in wanted):
            raise InputError(
                f"{self.spec.name}: token_ids are 0 to {NUM_MASK_TOKENS - 1}, not {wanted}"
            )
        prompts = self._prompt_tokens(feeds["points"], feeds["labels"])  # (B, N, 1 + 4 + P, C)
        sizes = dict(
            zip(("batch", "prompts", "tokens"), (*prompts.shape[:2], len(wanted)), strict=True)
        )
        outputs = {
            tensor.name: np.zeros(tensor.resolved(sizes), np.float32)
            for tensor in self.spec.outputs
        }
        masks = outputs.get("low_res_masks")  # (B, N, T, 4h, 4w)
        drawn = self._drawn_cells(feeds, len(prompts))
        for index, image in enumerate(self._packed(decoder, feeds)):
            decoder.decode(
                image,
                prompts[index],
                wanted,
                self._grid[1],
                drawn[index],
                outputs["mask_tokens"][index],
                outputs["iou_predictions"][index],
                None if masks is None else masks[index],
                self.threads,
            )
        return outputs

    def close(self) -> None:
        self._decoder = self._packed_last = None

    def __enter__(self) -> NativeRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_sizes(self) -> None:
        shapes = {tensor.name: tensor.shape for tensor in (*self.spec.inputs, *self.spec.outputs)}
        channels, cells = shapes["mask_tokens"][3], shapes["image_statistics"][2]
        if (self._decoder.channels, self._decoder.cells) != (channels, cells):
            raise ArtifactError(
                f"{self.path} is of {self._decoder.channels} channels and {self._decoder.cells} "
                f"cells, where {self.spec.name} has {channels} and {cells}: export it again"
            )
        # Masks are (4h, 4w); without any, how cells lie in rows does not matter.
        h, w = shapes["low_res_masks"][3:] if self._draws else (4 * cells, 4)
        self._grid = int(h) // 4, int(w) // 4

    def _drawn_cells(self, feeds: Tensors, images: int) -> list[tuple[int, int]]:
        """Rows and columns of cells of each image's masks that are drawn: one more than reach into
        the image.
        """
        if "input_sizes" not in feeds:
            return [self._grid] * images
        cell = self._image_size / np.array(self._grid)
        drawn = np.clip(np.ceil(feeds["input_sizes"] / cell).astype(int) + 1, 0, self._grid)
        return [(int(rows), int(columns)) for rows, columns in drawn]

    def _packed(self, decoder: Any, feeds: Tensors) -> list[Any]:
        """The images of the feeds in the kernels' order; those of the last call are kept.

        Another thread may replace `_packed_last` at any time, so it is read once and written once.
        """
        names = (
            "image_projections",
            "image_statistics",
            *(("image_embeddings",) if self._draws else ()),
        )
        arrays = [feeds[name] for name in names]
        last = self._packed_last
        if last is not None and last.is_of(arrays):
            return last.images
        self._packed_last = last = None  # release the memory first
        of_images = zip(*map(np.ascontiguousarray, arrays), strict=True)
        rest = () if self._draws else (None,)
        images = [decoder.pack(*of_image, *rest, self.threads) for of_image in of_images]
        this = weakref.ref(self)  # a runner that nobody has any more goes at once

        def forget(gone: weakref.ref[Array]) -> None:
            runner = this()
            kept = None if runner is None else runner._packed_last
            if (
                runner is not None
                and kept is not None
                and any(source is gone for source in kept.sources)
            ):
                runner._packed_last = None

        self._packed_last = _PackedImages(
            tuple(weakref.ref(array, forget) for array in arrays), images
        )
        return images

    def _prompt_tokens(self, points: Array, labels: Array) -> FloatArray:
        """SAM's embeddings behind its output tokens, (B, N, 5 + P, C), as
        `TokenDecoder._prompt_tokens`.
        """
        output_tokens, point_kinds = (
            self._prompt_weights[name] for name in ("output_tokens", "point_kinds")
        )
        kinds = labels - PADDING
        if labels.size and (kinds.min() < 0 or kinds.max() >= len(point_kinds)):
            raise InputError(
                f"{self.spec.name}: labels are {PADDING} to 3, not {labels.min()} to {labels.max()}"
            )
        angles = (
            2 * (points.astype(np.float64) + 0.5) / self._image_size - 1
        ) @ self._prompt_weights["gaussian"]
        angles *= 2 * np.pi  # (B, N, P, C / 2)
        positions = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        positions[labels == PADDING] = 0
        embedded = positions + point_kinds[kinds]
        shared = np.broadcast_to(output_tokens, (*labels.shape[:2], *output_tokens.shape))
        return np.ascontiguousarray(np.concatenate([shared, embedded], axis=2), np.float32)


def open_graph(path: Path, spec: GraphSpec, options: OpenOptions) -> NativeRunner:
    """Opens the weights of the token decoder."""
    return NativeRunner(path, spec, options.threads)

"""RegionSpot over any runtime: arrays in, arrays out. No PyTorch here, so that a server can do
without it.

It cuts what is asked into pieces that the graphs' ranges allow, and pads where they ask for more
than there is.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from regionspot.errors import InputError
from regionspot.runtime.graph_spec import ModelInfo, Range
from regionspot.runtime.runner import Array, Runner
from regionspot.runtime.text_encoder import GraphTextEncoder, TextInput
from regionspot.structures import PADDING, BoolArray, FloatArray, IntArray, UInt8Array

CPU_PROMPT_CHUNK = 8
"""ViT-B's decoder takes a third longer in chunks of 32, whose matrices do not fit into a CPU's
caches.
"""

NATIVE_PROMPT_CHUNK = 64
"""Our own kernels divide prompts among themselves, and want enough for all threads."""

GPU_PROMPT_CHUNK = 32

SIZES_ON_CPU: dict[str, Any] = {
    "prompt_chunk": CPU_PROMPT_CHUNK,
    "prompt_step": 1,
    "region_step": 8,
}
SIZES_ON_GPU: dict[str, Any] = {
    "prompt_chunk": GPU_PROMPT_CHUNK,
    "prompt_step": 8,
    "region_step": 8,
}
"""Of exported graphs. On a CPU a prompt more takes longer than getting ready for another number of
them.
"""

SINGLE_TOKEN, MULTIMASK_TOKENS = (0,), (1, 2, 3)

SAM_IMAGE_GRAPHS = ("sam_image_encoder", "sam_token_decoder_image")
"""What `EncodedImages` depend on."""

SAM_GRAPHS = (*SAM_IMAGE_GRAPHS, "sam_token_decoder_prompts")
"""What mask tokens depend on."""

MASK_PROMPT_GRAPH = "sam_mask_prompt"
MASK_PROMPT_CHUNK = 8
"""So many prompts that are masks are decoded together: each has an image of its own, of 27 MB
beside full-size SAM.
"""

Arrays = TypeVar("Arrays", bound=tuple[FloatArray, ...])

FETCH_BYTES = 1 << 28
"""Results that may stay on the device until they are copied to the host together."""

_Chunk = tuple[slice, slice, Sequence[Any]]
"""Which of the images and of their prompts, and the outputs for them."""

_EXPORT = "export it again with regionspot-export"


@dataclass(frozen=True, eq=False)
class _Part:
    """Images that went through the graphs together.

    Args:
        count: how many images.
        rows: how many the graphs saw, padding included.
        input_sizes: (rows, 2) see `encode_image`.
        tensors: image embeddings, projections and statistics, in the form that the runtime keeps.
    """

    count: int
    rows: int
    input_sizes: IntArray
    tensors: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """What SAM says of B images before any prompt, kept where the runtime works. `len` is B.

    Args:
        fingerprint: of the graphs that encoded them; a pipeline with others refuses them.
    """

    parts: tuple[_Part, ...]
    fingerprint: str

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def nbytes(self) -> int:
        """What is kept, on whatever device; of runtimes that do not say how large their tensors
        are, nothing.
        """
        return sum(
            int(getattr(tensor, "nbytes", 0)) for part in self.parts for tensor in part.tensors
        )

    def located(self) -> Iterator[tuple[slice, _Part]]:
        """Each part and which of the B images it holds."""
        start = 0
        for part in self.parts:
            yield slice(start, start + part.count), part
            start += part.count


class RegionPipeline:
    """Runs the model's graphs in one runtime. Use it as a context manager, or call `close`.

    Thread-safe. It can be pickled if `reopen` is given; the copy opens each graph when it is first
    needed.

    Args:
        info: sizes of the model.
        runners: graph name -> runner. A function is called when a graph is first needed.
        runtime: name of the runtime in reports.
        precision: name of the precision in reports.
        fingerprint: graph name -> a string that changes with what the graph computes: the SHA-256
            of an artefact or of weights.
        prompt_chunk: number of prompts, over all images of a batch, that go through the token
            decoder at once; bounds memory and changes no result.
        region_step: numbers of regions are padded to multiples of this where the graphs' ranges
            allow it, so that runtimes which specialise per shape (OpenVINO, CUDA graphs) see only a
            few shapes; changes no result.
        prompt_step: the same for numbers of prompts.
        reopen: opens the same pipeline in another process; it must be picklable.
        text_input: loads what makes tokens of class names, when they are first encoded; None if
            there is nothing.

    Attributes:
        observer: gives a context manager around each stage, by the stage's name: a graph's, or
            what `RegionPredictor` does beside the graphs, "preprocess" and "encode_masks". For
            timers and tracers; called in the thread that does the work. By default it does nothing.
    """

    def __init__(
        self,
        info: ModelInfo,
        runners: Callable[[str], Runner] | Mapping[str, Runner],
        *,
        runtime: str,
        precision: str,
        fingerprint: Callable[[str], str],
        prompt_chunk: int = CPU_PROMPT_CHUNK,
        region_step: int = 1,
        prompt_step: int = 1,
        reopen: Callable[[], RegionPipeline] | None = None,
        text_input: Callable[[], TextInput] | None = None,
    ) -> None:
        if prompt_chunk < 1:
            raise InputError(f"prompt_chunk must be 1 or more, not {prompt_chunk}")
        self.region_step, self.prompt_step = region_step, prompt_step
        self.info = info
        self.runtime = runtime
        self.precision = precision
        self.prompt_chunk = prompt_chunk
        self.fingerprint = fingerprint
        self._open = runners if callable(runners) else runners.__getitem__
        self._opened: dict[str, Runner] = {}
        self._opening, self._reopen = threading.RLock(), reopen
        self._load_text_input = text_input
        self._text_input: TextInput | None = None
        self.observer: Callable[[str], AbstractContextManager[object]] = nullcontext

    def __reduce__(self) -> tuple[Callable[[], RegionPipeline], tuple[()]]:
        if self._reopen is None:
            raise pickle.PicklingError(
                f"this pipeline of {self.name} in {self.runtime} cannot be pickled: open it in the "
                "other process"
            )
        return self._reopen, ()

    @property
    def name(self) -> str:
        """What reports call the model."""
        return self.info.name

    @property
    def text_encoder(self) -> GraphTextEncoder:
        """What `regionspot.vocabulary.VocabularyEncoder` encodes class names with.

        Raises:
            InputError: this pipeline has no tokenizer.
            ArtifactError: the tokenizer's file is missing or damaged.
        """
        with self._opening:
            if self._text_input is None:
                if self._load_text_input is None:
                    raise InputError(
                        f"this pipeline of {self.name} in {self.runtime} has no tokenizer for "
                        "class names"
                    )
                self._text_input = self._load_text_input()
            return GraphTextEncoder(self, self._text_input)

    def sam_fingerprint(self) -> str:
        """Changes with anything that mask tokens depend on."""
        return " ".join(dict.fromkeys(map(self.fingerprint, SAM_GRAPHS)))

    def clip_fingerprint(self) -> str:
        """Changes with anything that CLIP's feature maps depend on."""
        return self.fingerprint("clip_image_encoder")

    def check_encoded(self, encoded: EncodedImages) -> None:
        """Raises InputError for images that another SAM encoded: its numbers mean nothing here."""
        if encoded.fingerprint != self._encoder_fingerprint():
            raise InputError(
                "these images were encoded by another model, or by other weights, precision or "
                f"runtime, than this {self.name} in {self.runtime}: encode them again with this one"
            )

    def check_num_regions(self, count: int) -> None:
        """Raises InputError if an image may not have so many regions: the head sees all of them at
        once.
        """
        most = self._range("region_head", "regions").max
        if count > most:
            raise InputError(
                f"{count} regions of one image are more than the graph region_head takes, {most}: "
                f"ask about fewer at a time, or {_EXPORT} --regions 1:{min(32, count)}:{count}"
            )

    def check_mask_prompts(self) -> None:
        """Raises ArtifactError where prompts cannot be masks: their graph was not exported."""
        self.runner(MASK_PROMPT_GRAPH)

    def encode(
        self, sam_images: UInt8Array, input_sizes: npt.ArrayLike, clip_images: UInt8Array
    ) -> tuple[EncodedImages, FloatArray]:
        """`encode_image` and `encode_clip` of the same images, whose arguments and errors these
        are. On a GPU both encoders work at the same time.

        SAM's side is kept on the device, so that runners with a stream of their own wait for CLIP
        alone; of runners that always wait (`Runner`), CLIP's gets a thread, which ends here. If
        both fail, the error is SAM's.
        """
        if not getattr(self.runner("clip_image_encoder"), "waits_for_gpu", False):
            return self.encode_image(sam_images, input_sizes), self.encode_clip(clip_images)
        with ThreadPoolExecutor(1, thread_name_prefix="regionspot-clip") as pool:
            maps = pool.submit(self.encode_clip, clip_images)
            return self.encode_image(sam_images, input_sizes), maps.result()

    def encode_image(self, sam_images: UInt8Array, input_sizes: npt.ArrayLike) -> EncodedImages:
        """SAM's image encoder, and the part of its decoder that all prompts share.

        Args:
            sam_images: (B, S, S, 3) RGB in the SAM frame, see `regionspot.transforms.SamTransform`.
            input_sizes: (B, 2) height and width of the part of each that is not padding.

        Raises:
            InputError: not as many sizes as images, or graphs that do not take the same number of
                images at a time.
        """
        sizes = np.asarray(input_sizes, np.int32).reshape(-1, 2)
        _check_lengths("images", len(sam_images), input_sizes=len(sizes))
        most = None if self._cuts_kept() else self._decoded_at_once()
        parts: list[_Part] = []
        for images, rows in self._batches("sam_image_encoder", len(sam_images), most):
            self._check_rows("sam_token_decoder_image", rows)
            padded_sizes = _pad_to(sizes[images], 0, rows)
            padded_images = _pad_to(sam_images[images], 0, rows)
            (embeddings,) = self._run("sam_image_encoder", padded_images, padded_sizes, keep=True)
            parts += self._parts(len(sam_images[images]), embeddings, padded_sizes)
        return EncodedImages(tuple(parts), self._encoder_fingerprint())

    def _parts(self, count: int, embeddings: Any, padded_sizes: IntArray) -> list[_Part]:
        """`count` images of known embeddings, padding behind them, with what their prompts share:
        as many in a part as the decoder takes.
        """
        context = self._run("sam_token_decoder_image", embeddings, keep=True)
        tensors, rows = (embeddings, *context), len(padded_sizes)
        most = self._decoded_at_once() if rows > 1 else 1
        if rows <= most or not self._cuts_kept():
            return [_Part(count, rows, padded_sizes, tensors)]
        return [
            _Part(
                min(count, part.stop) - part.start,
                part.stop - part.start,
                padded_sizes[part],
                tuple(tensor[part] for tensor in tensors),
            )
            for part in _split_ranges(rows, most)
            if part.start < count
        ]

    def _decoded_at_once(self) -> int:
        """How many images the token decoder takes."""
        return self._range("sam_token_decoder_prompts", "batch").max

    def _cuts_kept(self) -> bool:
        """Whether what SAM's encoder keeps can be cut into images; see `Runner`."""
        return bool(getattr(self.runner("sam_image_encoder"), "cuts_kept", True))

    def encode_clip(self, clip_images: UInt8Array) -> FloatArray:
        """CLIP's feature maps (B, L, D) of (B, S', S', 3) RGB, see
        `regionspot.transforms.ClipTransform`.
        """
        found = np.empty(
            (len(clip_images), self.info.num_patch_tokens, self.info.clip_width), np.float32
        )
        for images, rows in self._batches("clip_image_encoder", len(clip_images)):
            (maps,) = self._run("clip_image_encoder", _pad_to(clip_images[images], 0, rows))
            found[images] = maps[: len(found[images])]
        return found

    def mask_tokens(
        self,
        encoded: EncodedImages,
        points: FloatArray,
        labels: IntArray,
        multimask: bool = False,
        mask_inputs: FloatArray | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """The position-aware token of each prompt, without drawing any mask.

        Args:
            encoded: from `encode_image`.
            points: (B, N, P, 2) xy in SAM-frame pixels.
            labels: (B, N, P), see `regionspot.structures.Prompts`.
            multimask: SAM's three tokens for whole, part and subpart in place of its single-mask
                token.
            mask_inputs: (B, N, 1, 4h, 4w) mask logits, see `SamTransform.apply_masks`.

        Returns:
            Tokens (B, N, T, C) and the predicted IoU of the mask that belongs to each (B, N, T).

        Raises:
            InputError: prompts of more or fewer images than were encoded, more points than the
                graph takes, or masks as prompts where nothing takes them.
        """
        if mask_inputs is not None:
            return self._with_masks(
                self.mask_tokens, encoded, points, labels, multimask, mask_inputs
            )
        found = self._decode(
            "sam_token_decoder_prompts", slice(1, None), encoded, points, labels, multimask
        )
        tokens, iou_predictions = found
        return tokens, iou_predictions

    def low_res_masks(
        self,
        encoded: EncodedImages,
        points: FloatArray,
        labels: IntArray,
        multimask: bool = False,
        mask_inputs: FloatArray | None = None,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Masks beside the tokens; arguments and errors as in `mask_tokens`.

        Returns:
            Mask logits (B, N, T, 4h, 4w) in the SAM frame, above 0 inside, of the image's padding
            perhaps all 0; tokens (B, N, T, C); predicted IoU (B, N, T).
        """
        if mask_inputs is not None:
            return self._with_masks(
                self.low_res_masks, encoded, points, labels, multimask, mask_inputs
            )
        found = self._decode("sam_mask_decoder", slice(None), encoded, points, labels, multimask)
        low_res_masks, tokens, iou_predictions = found
        return low_res_masks, tokens, iou_predictions

    def classify(
        self,
        mask_tokens: FloatArray,
        patch_tokens: FloatArray,
        valid: BoolArray | None,
        text_embeddings: FloatArray,
    ) -> FloatArray:
        """Logits (B, N, V) of N regions of each of B images over V words.

        Args:
            mask_tokens: (B, N, C), all regions of an image together.
            patch_tokens: (B, L, D) from `encode_clip`.
            valid: (B, N), False for padding; None if there is none.
            text_embeddings: (V, E) unit rows.

        Raises:
            InputError: arrays of different numbers of images, or more regions than the graph takes.
        """
        batch, count = mask_tokens.shape[:2]
        valid = np.ones((batch, count), np.bool_) if valid is None else valid
        _check_lengths(
            "images in mask_tokens", batch, patch_tokens=len(patch_tokens), valid=len(valid)
        )
        _check_lengths("regions in mask_tokens", count, valid=valid.shape[1])
        logits = np.zeros((batch, count, len(text_embeddings)), np.float32)
        if not logits.size:
            return logits
        self.check_num_regions(count)
        regions = self._range("region_head", "regions")
        vocabulary = self._range("region_head", "words")
        seen = _round_up(count, self.region_step, regions)
        for images, rows in self._batches("region_head", batch):
            of_images = [
                _pad_to(_pad_to(mask_tokens[images], 1, seen), 0, rows),
                _pad_to(patch_tokens[images], 0, rows),
                _pad_to(_pad_to(valid[images], 1, seen), 0, rows),
            ]
            for words in _split_ranges(len(text_embeddings), vocabulary.max):
                (found,) = self._run(
                    "region_head", *of_images, _pad_to(text_embeddings[words], 0, vocabulary.min)
                )
                part = logits[images, :, words]
                part[:] = found[: part.shape[0], :count, : part.shape[2]]
        return logits

    def classify_readings(
        self,
        mask_tokens: FloatArray,
        patch_tokens: FloatArray,
        valid: BoolArray | None,
        text_embeddings: FloatArray,
    ) -> FloatArray:
        """Logits (B, N, T, V) of mask tokens (B, N, T, C): `classify` of each reading of all
        regions by itself.
        """
        by_reading = [
            self.classify(
                np.ascontiguousarray(mask_tokens[:, :, reading]),
                patch_tokens,
                valid,
                text_embeddings,
            )
            for reading in range(mask_tokens.shape[2])
        ]
        return np.stack(by_reading, axis=2)

    def encode_tokens(self, tokens: IntArray) -> FloatArray:
        """CLIP's un-normalised embeddings (n, E) of (n, T) tokens; T need only reach the last end
        token.
        """
        texts, length = (
            self._range("clip_text_encoder", axis) for axis in ("texts", "text_length")
        )
        tokens = _pad_to(np.asarray(tokens, np.int32), 1, length.min)
        found = np.zeros((len(tokens), self.info.embed_dim), np.float32)
        for rows in _split_ranges(len(tokens), texts.max):
            (embeddings,) = self._run("clip_text_encoder", _pad_to(tokens[rows], 0, texts.min))
            found[rows] = embeddings[: len(found[rows])]
        return found

    def close(self) -> None:
        """Close what was opened. A graph that is needed later is opened again."""
        with self._opening:
            while self._opened:
                self._opened.popitem()[1].close()

    def __enter__(self) -> RegionPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def runner(self, graph: str) -> Runner:
        """What runs a graph; opened when first asked for, closed with the pipeline."""
        opened = self._opened.get(graph)
        if opened is not None:
            return opened
        with self._opening:  # another thread may have opened it meanwhile
            if graph not in self._opened:
                self._opened[graph] = self._open(graph)
            return self._opened[graph]

    def _encoder_fingerprint(self) -> str:
        """Changes with anything that `EncodedImages` depend on."""
        return " ".join(dict.fromkeys(map(self.fingerprint, SAM_IMAGE_GRAPHS)))

    def _range(self, graph: str, axis: str) -> Range:
        return self.runner(graph).spec.ranges[axis]

    def _run(
        self, graph: str, *arguments: Any, keep: bool = False, **optional: Any
    ) -> tuple[Any, ...]:
        """One run: inputs and outputs in the order of the graph's spec; optional ones reach runners
        that take them.
        """
        runner = self.runner(graph)
        names = runner.spec.output_names
        feeds = dict(zip(runner.spec.input_names, arguments, strict=True))
        feeds |= {
            tensor.name: optional[tensor.name]
            for tensor in runner.spec.optional
            if tensor.name in optional
        }
        with self.observer(graph):
            outputs = runner.infer(feeds, names if keep else ())
        return tuple(outputs[name] for name in names)

    def _batches(
        self, graph: str, count: int, most: int | None = None
    ) -> Iterator[tuple[slice, int]]:
        """Which images go through a graph together, `most` at a time, and how many rows it must
        see.
        """
        batch = self._range(graph, "batch")
        for images in _split_ranges(count, min(batch.max, most or batch.max)):
            yield images, max(images.stop - images.start, batch.min)

    def _decode(
        self,
        graph: str,
        context: slice,
        encoded: EncodedImages,
        points: FloatArray,
        labels: IntArray,
        multimask: bool,
    ) -> list[FloatArray]:
        """All outputs of a decoder graph over all prompts; `context` says which kept tensors it
        takes.
        """
        spec = self.runner(graph).spec
        token_ids = np.array(MULTIMASK_TOKENS if multimask else SINGLE_TOKEN, np.int32)
        count = labels.shape[1]
        self.check_encoded(encoded)
        _check_images(encoded, points=points, labels=labels)
        self._check_prompts(graph, encoded, labels)
        sizes = {"batch": len(encoded), "prompts": count, "tokens": len(token_ids)}
        results: list[FloatArray] = [
            np.zeros(tensor.resolved(sizes), np.float32) for tensor in spec.outputs
        ]
        fetches = hasattr(self.runner(graph), "fetch")
        kept: list[_Chunk] = []
        for images, part in encoded.located():
            prompts = spec.ranges["prompts"]
            step = min(prompts.max, max(prompts.min, self.prompt_chunk // part.rows))
            for chunk in _split_ranges(count, step):
                asked_points = self._filled_prompts(graph, points[images, chunk], part.rows, 0)
                asked_labels = self._filled_prompts(
                    graph, labels[images, chunk], part.rows, PADDING
                )
                asked = (*part.tensors[context], asked_points, asked_labels, token_ids)
                outputs = self._run(graph, *asked, keep=fetches, input_sizes=part.input_sizes)
                kept.append((images, chunk, outputs))
                if _on_host(kept[-1]) or sum(map(_nbytes, kept)) > FETCH_BYTES:
                    _place(self._fetched(graph, kept), results)
                    kept.clear()
        if kept:
            _place(self._fetched(graph, kept), results)
        return results

    def _fetched(self, graph: str, kept: Sequence[_Chunk]) -> list[_Chunk]:
        """The same with arrays on the host in place of kept tensors, in one wait; see `Runner`."""
        if all(map(_on_host, kept)):
            return list(kept)
        with self.observer(graph):
            fetch = self.runner(graph).fetch  # type: ignore[attr-defined]
            arrays = iter(fetch([tensor for _, _, outputs in kept for tensor in outputs]))
        return [
            (images, prompts, [next(arrays) for _ in outputs]) for images, prompts, outputs in kept
        ]

    def _filled_prompts(self, graph: str, prompts: Array, rows: int, value: int) -> Array:
        """(b, n, P, ...) to as many images and prompts as the graph must see, padded with prompts
        that ask nothing.
        """
        seen = _round_up(prompts.shape[1], self.prompt_step, self._range(graph, "prompts"))
        return _pad_to(_pad_to(prompts, 1, seen, value), 0, rows, value)

    def _check_prompts(self, graph: str, encoded: EncodedImages, labels: IntArray) -> None:
        points = self._range(graph, "points")
        if labels.size and labels.shape[2] not in points:
            raise InputError(
                f"the graph {graph} takes prompts of {points.min} to {points.max} points, not "
                f"{labels.shape[2]} (a click counts as one, a box as two, clicks without a box as "
                "one more)"
            )
        for part in encoded.parts:
            self._check_rows(graph, part.rows)

    def _check_rows(self, graph: str, rows: int) -> None:
        """Raises InputError if a graph cannot take what sam_image_encoder gives at once."""
        batch = self._range(graph, "batch")
        if rows not in batch:
            raise InputError(
                f"the graph {graph} takes {batch} images and sam_image_encoder gives {rows} at "
                f"once: they were exported with different --batch; {_EXPORT}, all graphs with the "
                "same"
            )

    def _with_masks(
        self,
        decode: Callable[[EncodedImages, FloatArray, IntArray, bool], Arrays],
        encoded: EncodedImages,
        points: FloatArray,
        labels: IntArray,
        multimask: bool,
        mask_inputs: FloatArray,
    ) -> Arrays:
        """What `decode`, a method of this class, says of prompts with masks."""
        self.check_mask_prompts()
        self.check_encoded(encoded)
        _check_images(encoded, points=points, labels=labels, mask_inputs=mask_inputs)
        _check_lengths(
            "prompts in labels",
            labels.shape[1],
            points=points.shape[1],
            mask_inputs=mask_inputs.shape[1],
        )
        if not labels.shape[1]:
            return decode(encoded, points, labels, multimask)
        parts = []
        for images, part in encoded.located():
            most = self.runner(MASK_PROMPT_GRAPH).spec.ranges["prompts"].max
            step = min(most, max(1, min(self.prompt_chunk, MASK_PROMPT_CHUNK) // part.rows))
            chunks = []
            for prompts in _split_ranges(labels.shape[1], step):
                own = self._images_of_masks(part, mask_inputs[images, prompts])
                asked_points, asked_labels = (
                    points[images, prompts],
                    labels[images, prompts],
                )  # (b, n, ...)
                found = decode(
                    own, _one_by_one(asked_points), _one_by_one(asked_labels), multimask
                )  # (b * n, 1, ...)
                chunks.append(
                    [array.reshape(*asked_labels.shape[:2], *array.shape[2:]) for array in found]
                )
            parts.append([np.concatenate(arrays, axis=1) for arrays in zip(*chunks, strict=True)])
        results = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return cast(Arrays, results)

    def _images_of_masks(self, part: _Part, mask_inputs: FloatArray) -> EncodedImages:
        """A mask changes the image that its prompt sees: b images with n masks each become b * n
        images.
        """
        count = mask_inputs.shape[1]
        self._check_rows(MASK_PROMPT_GRAPH, part.rows)
        least = self._range(MASK_PROMPT_GRAPH, "prompts").min
        padded = _pad_to(_pad_to(mask_inputs, 0, part.rows), 1, least)
        (changed,) = self._run(MASK_PROMPT_GRAPH, part.tensors[0], padded)  # (rows, n, C, h, w)
        changed = changed[: part.count, :count].reshape(-1, *changed.shape[2:])
        (embeddings_spec,) = self.runner("sam_token_decoder_image").spec.inputs
        changed = changed.astype(embeddings_spec.dtype, copy=False)
        sizes = np.repeat(part.input_sizes[: part.count], count, axis=0)
        parts: list[_Part] = []
        for images, rows in self._batches("sam_token_decoder_image", len(changed)):
            embeddings = _pad_to(changed[images], 0, rows)
            padded_sizes = _pad_to(sizes[images], 0, rows)
            parts += self._parts(len(changed[images]), embeddings, padded_sizes)
        return EncodedImages(tuple(parts), self._encoder_fingerprint())


def _on_host(chunk: _Chunk) -> bool:
    return all(isinstance(output, np.ndarray) for output in chunk[2])


def _nbytes(chunk: _Chunk) -> int:
    return sum(int(output.nbytes) for output in chunk[2])


def _place(chunks: Sequence[_Chunk], results: Sequence[FloatArray]) -> None:
    """Outputs of chunks, without what was padded, where they belong."""
    for images, prompts, outputs in chunks:
        for result, output in zip(results, outputs, strict=True):
            result[images, prompts] = output[
                : images.stop - images.start, : prompts.stop - prompts.start
            ]


def _one_by_one(prompts: Array) -> Array:
    """(b, n, ...) to (b * n, 1, ...)."""
    return prompts.reshape(-1, 1, *prompts.shape[2:])


def _check_images(encoded: EncodedImages, **arrays: Array) -> None:
    """Raises InputError unless each array has as many rows as there are encoded images."""
    _check_lengths(
        "encoded images", len(encoded), **{name: len(array) for name, array in arrays.items()}
    )


def _check_lengths(what: str, wanted: int, **found: int) -> None:
    """Raises InputError unless all are as long as wanted: padding to a graph's batch would hide
    that they are not.
    """
    for name, length in found.items():
        if length != wanted:
            raise InputError(
                f"there are {wanted} {what}, and {length} in {name}: give as many of each"
            )


def _split_ranges(count: int, step: int) -> Iterator[slice]:
    """0 to `count` in pieces of `step`, the last one smaller."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _round_up(count: int, step: int, limits: Range) -> int:
    """To a multiple of `step`, within the range of a graph's axis."""
    return min(max(-(-count // step) * step, limits.min), limits.max)


def _pad_to(array: Array, axis: int, size: int, value: int = 0) -> Array:
    """As long as `size` along an axis at least, with `value` behind what there is."""
    missing = size - array.shape[axis]
    if missing <= 0:
        return array
    widths = [(0, missing if index == axis else 0) for index in range(array.ndim)]
    return np.pad(array, widths, constant_values=value)

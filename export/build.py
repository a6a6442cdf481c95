"""Make every artefact of a plan, compare each with the model as soon as it is there, and keep the
manifest true.

Whatever happens to one artefact is a row of the table; the others are made all the same. The
manifest is written after each, so that a run that was killed can go on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from regionspot.errors import ArtifactError, InputError, RegionSpotError
from regionspot.export.made_with import preprocessing_of, versions
from regionspot.export.making import EngineOptions, Making
from regionspot.export.parity import ParityResult, unavailable_reason, verify_graph, verify_pipeline
from regionspot.export.parity_inputs import ParityInputs
from regionspot.export.plan import Step
from regionspot.export.report import Report, in_words
from regionspot.files import write_atomically
from regionspot.locks import locked
from regionspot.modeling.graphs import model_info
from regionspot.modeling.pipelines import graph_fingerprints
from regionspot.modeling.regionspot import RegionSpot
from regionspot.provenance import git_commit
from regionspot.registers import load_object
from regionspot.runtime.artifacts import MANIFEST, TOKENIZER, GraphEntry, Manifest
from regionspot.runtime.engine_file import file_sha256
from regionspot.runtime.formats import FORMATS
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.graphs import required_graphs
from regionspot.runtime.opening import native_entries
from regionspot.runtime.run_graph import TIMEOUT_S
from regionspot.runtime.tokenizer import tokenizer_json
from regionspot.runtime.tolerance import QUANTIZED, TOLERANCES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to export.

    Args:
        out: the directory of artefacts.
        resume: keep what is there, intact, equal to the model, and would be made the same way.
        source: what the manifest says of the weights' origin: files, or the seed of random ones.
        engine: for TensorRT.
        threads: of CPU runtimes, while artefacts are verified.
        timeout_s: for running one artefact.
    """

    out: Path
    resume: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineOptions = field(default_factory=EngineOptions)
    threads: int | None = None
    timeout_s: float = TIMEOUT_S


def export(
    model: RegionSpot, steps: Sequence[Step], inputs: ParityInputs, settings: Settings
) -> Report:
    """Make what `steps` say, sources first, as `make_plan` gives them. Logs each step and its
    outcome.

    Args:
        inputs: what to compare on, and to calibrate int8 with.

    Raises:
        InputError: the directory holds artefacts of another model, or another process is exporting
            into it.
        ArtifactError: its manifest cannot be written.
    """
    busy = (
        f"another process is exporting into {settings.out}: wait for it to end, or name another "
        "directory with --out"
    )
    with locked(settings.out, busy):
        build = _Build(model, inputs, settings, len(steps))
        entries: list[GraphEntry] = []
        for _, of_graph in groupby(steps, key=lambda step: step.spec.name):
            entries += build.graph(list(of_graph))
        kinds = dict.fromkeys((step.format, step.precision) for step in steps)
        rows = [row for kind in kinds if (row := build.end_to_end(*kind)) is not None]
        return Report(tuple(entries), tuple(rows))


class _Build:
    """The state of one export: the manifest as it grows."""

    def __init__(
        self, model: RegionSpot, inputs: ParityInputs, settings: Settings, total: int = 0
    ) -> None:
        self.model, self.inputs, self.settings = model, inputs, settings
        self.weights_of = graph_fingerprints(model)
        self.manifest = _open_manifest(model, self.weights_of, settings)
        self.total = total
        self.done = 0

    def graph(self, steps: Sequence[Step]) -> list[GraphEntry]:
        """Make and verify every artefact of one graph. The reference is computed once, where it is
        needed.
        """
        weights = self.weights_of(steps[0].spec.name)
        entries = []
        for step in steps:
            self.done += 1
            entry = self._step(step, weights)
            self.manifest = self.manifest.with_entry(entry)
            self.manifest.save()
            logger.info(f"[{self.done}/{self.total}] {step.title}: {in_words(entry)}")
            entries.append(entry)
        self.inputs.forget(steps[0].spec.name)
        return entries

    def _step(self, step: Step, weights: str) -> GraphEntry:
        made_with = versions(step.format)
        recipe = self._recipe(step, weights, made_with)
        if self.settings.resume and (kept := self._still_good(step, recipe)) is not None:
            return kept
        self.manifest = self.manifest.without(step.key)
        self.manifest.save()  # nothing half-made is listed
        entry = GraphEntry(
            step.spec,
            step.format,
            step.precision,
            weights=weights,
            recipe=recipe,
            versions=made_with,
        )
        entry = replace(entry, tolerance=FORMATS[step.format].tolerance(step.precision).name)
        logger.info(f"[{self.done}/{self.total}] {step.title}: making")
        began = time.monotonic()
        try:
            self._make(step)
        except Exception as error:  # exporters and converters raise almost anything
            reason = self._shortened(f"making it failed: {_first_line(error)}")
            return replace(
                entry, passed=False, reason=reason, build_s=round(time.monotonic() - began, 2)
            )
        files = FORMATS[step.format].files_at(self.settings.out / step.file)
        entry = replace(
            entry,
            file=step.file,
            files={
                path.relative_to(self.settings.out).as_posix(): file_sha256(path) for path in files
            },
            size_bytes=sum(path.stat().st_size for path in files),
            build_s=round(time.monotonic() - began, 2),
        )
        return self._verified(entry)

    def _still_good(self, step: Step, recipe: str) -> GraphEntry | None:
        """The entry of an earlier run, verified now if it could not be then; None where it must be
        made again.
        """
        entry = self.manifest.get(*step.key)
        if entry is None or entry.recipe != recipe or entry.passed is False:
            return None
        try:
            path = self.manifest.verify(entry)
        except ArtifactError:
            return None
        runtime = FORMATS[entry.format].runtime
        if entry.passed is None and unavailable_reason(runtime, entry.precision, path) is None:
            return self._verified(entry)
        return entry

    def _verified(self, entry: GraphEntry) -> GraphEntry:
        assert entry.file is not None
        parity = verify_graph(
            self.settings.out / entry.file,
            entry.spec,
            entry.format,
            entry.precision,
            self.inputs.trials(entry.spec),
            self.settings.threads,
            timeout_s=self.settings.timeout_s,
        )
        return with_parity(entry, replace(parity, reason=self._shortened(parity.reason)))

    def _make(self, step: Step) -> None:
        path = self.settings.out / step.file
        for old in FORMATS[step.format].files_at(path):
            old.unlink(missing_ok=True)
        if step.source is not None and not (self.settings.out / step.source.file).is_file():
            raise ArtifactError(f"{step.source.title}, which it is made from, was not made")
        load_object(FORMATS[step.format].maker)(self._making(step))

    def _making(self, step: Step) -> Making:
        return Making(
            step,
            self.settings.out / step.file,
            self.settings.out / step.source.file if step.source else None,
            self.model,
            self.manifest.preprocessing.fingerprint(),
            partial(self.inputs.calibration, step.spec),
            self.settings.engine,
        )

    def _recipe(self, step: Step, weights: str, made_with: Mapping[str, str]) -> str:
        """What would make the same file again has the same recipe."""
        content: dict[str, Any] = {
            "weights": weights,
            "preprocessing": self.manifest.preprocessing.fingerprint(),
            "graph": repr(step.spec),
            "kind": step.key,
            "versions": dict(made_with),
        }
        if step.source is not None:
            source = self.manifest.get(*step.source.key)
            content["source"] = sorted(source.files.items()) if source else None
        if (settings := FORMATS[step.format].settings) is not None:
            content |= load_object(settings)(self._making(step))
        if step.precision in QUANTIZED:
            content["calibration"] = self.inputs.calibration_fingerprint()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _shortened(self, reason: str) -> str:
        """Without the directory, which the manifest lies in and may leave with it."""
        return reason.replace(f"{self.settings.out}/", "")

    def end_to_end(self, artefact_format: str, precision: str) -> Mapping[str, Any] | None:
        """The row of a whole pipeline, kept where nothing of it changed; None where a graph of it
        is not there.
        """
        of = _pipeline_fingerprint(self.manifest, artefact_format, precision)
        if of is None:
            return None
        kept = next((row for row in self.manifest.end_to_end if row["of"] == of), None)
        if kept is not None and kept["passed"] and self.settings.resume:
            return kept
        logger.info(f"end to end, {artefact_format} {precision}: running")
        text = self.manifest.get("clip_text_encoder", artefact_format, precision)
        head = self.manifest.find("region_head", artefact_format, precision)
        recognizer = recognizer_spec(self.inputs.specs["region_recognizer"], head.spec)
        kernels = FORMATS[artefact_format].runs_on_cpu and bool(native_entries(self.manifest))
        trials = self.inputs.pipeline_trials(recognizer, text is not None and text.file is not None)
        ways = [
            verify_pipeline(
                self.settings.out,
                artefact_format,
                precision,
                trials,
                self.settings.threads,
                self.settings.timeout_s,
                native,
            )
            for native in ((True, False) if kernels else (False,))
        ]
        # as it runs on a CPU, unless one failed
        found = next((way for way in ways if way.passed is False), ways[0])
        row = {"format": artefact_format, "precision": precision, "of": of, **found.to_json()}
        row["reason"] = self._shortened(found.reason)
        self.manifest = replace(self.manifest, end_to_end=(*_still_true(self.manifest, of), row))
        self.manifest.save()
        return row


def _pipeline_fingerprint(manifest: Manifest, artefact_format: str, precision: str) -> str | None:
    """Changes with any file of a pipeline, those beside the one to open included; None where one is
    missing.
    """
    used = [manifest.get(name, artefact_format, precision) for name in required_graphs()]
    if not all(entry and entry.file for entry in used):
        return None
    used.append(manifest.get("clip_text_encoder", artefact_format, precision))
    if FORMATS[artefact_format].runs_on_cpu:
        used += native_entries(manifest).values()
    content = [
        artefact_format,
        precision,
        *(sorted(entry.files.items()) if entry else None for entry in used),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _still_true(manifest: Manifest, but: str | None = None) -> tuple[Mapping[str, Any], ...]:
    """The rows of pipelines whose files have not changed since, `but` one."""
    return tuple(
        row
        for row in manifest.end_to_end
        if row["of"] != but
        and row["of"] == _pipeline_fingerprint(manifest, row["format"], row["precision"])
    )


def recognizer_spec(recognizer: GraphSpec, head: GraphSpec) -> GraphSpec:
    """The spec of `region_recognizer` with the sizes that a head takes: what a pipeline in its
    place can be asked.
    """
    return replace(recognizer, ranges={**recognizer.ranges, **head.ranges})


def with_parity(entry: GraphEntry, parity: ParityResult) -> GraphEntry:
    """The entry with a verdict on it."""
    worst = parity.worst
    return replace(
        entry,
        passed=parity.passed,
        reason=parity.reason,
        max_abs_diff=worst.max_abs_diff if worst else None,
        cosine=worst.cosine if worst else None,
        sqnr_db=worst.sqnr_db if worst else None,
        outputs={name: difference.to_json() for name, difference in parity.outputs.items()},
        tolerance=parity.tolerance.name,
    )


def _open_manifest(
    model: RegionSpot, weights_of: Callable[[str], str], settings: Settings
) -> Manifest:
    """What is in the directory already of this model, or an empty one.

    Graphs of other weights are left out: two versions of a model must not stand in one directory. A
    manifest that this release cannot use is begun anew, and all that is asked for is made again.
    """
    info = model_info(model)
    manifest = Manifest(settings.out, info, preprocessing_of(model), tokenizer="", templates=())
    if (settings.out / MANIFEST).exists():
        try:
            manifest = Manifest.load(settings.out)
        except ArtifactError as error:
            logger.info(
                f"{settings.out / MANIFEST} is not usable, so an empty one takes its place: {error}"
            )
        if manifest.model.name != info.name:
            raise InputError(
                f"{settings.out} holds artefacts of {manifest.model.name}, and this model is "
                f"{info.name}: name another directory with --out, or delete that one"
            )
        for entry in manifest.graphs:
            if entry.weights != weights_of(entry.name):
                logger.info(f"{entry.title} is of other weights and is dropped from the manifest")
                manifest = manifest.without(entry.key)
    return replace(
        manifest,
        model=info,
        preprocessing=preprocessing_of(model),
        tokenizer=_write_tokenizer(settings.out / TOKENIZER),
        templates=model.clip.templates,
        source=dict(settings.source),
        git_commit=git_commit(mark_changes=True),
        tolerances={tolerance.name: tolerance.to_json() for tolerance in TOLERANCES.values()},
        end_to_end=_still_true(manifest),
    )


def _write_tokenizer(path: Path) -> str:
    """The SHA-256 of what is written."""
    content = tokenizer_json().encode()
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def _first_line(error: Exception) -> str:
    message = (str(error).strip().splitlines() or [""])[0]
    return message if isinstance(error, RegionSpotError) else f"{type(error).__name__}: {message}"

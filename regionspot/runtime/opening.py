"""Opening what a directory of artefacts holds: single graphs and the whole model. Free of
PyTorch.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from regionspot.errors import ArtifactError, InputError
from regionspot.runtime.artifacts import GraphEntry, Manifest
from regionspot.runtime.formats import (
    CPU,
    FORMATS,
    GPU,
    NATIVE,
    RUNTIMES,
    export_option,
    open_graph,
    preferred_precisions,
    runtime_named,
)
from regionspot.runtime.graphs import required_graphs
from regionspot.runtime.pipeline import (
    NATIVE_PROMPT_CHUNK,
    SIZES_ON_CPU,
    SIZES_ON_GPU,
    RegionPipeline,
)
from regionspot.runtime.runner import Runner
from regionspot.runtime.tolerance import PRECISIONS


def open_runner(
    manifest: Manifest,
    entry: GraphEntry,
    runtime: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_failed: bool = False,
) -> Runner:
    """Open an artefact whose files are proven to be what was exported.

    Args:
        runtime: a name in `formats.RUNTIMES`; by default the one that its format is verified in. A
            format of kernels that replace single graphs is always opened in its own.
        device, threads: see `open_graph`.
        allow_failed: open it even if it was found to differ from the model.

    Raises:
        ArtifactError: it did not pass its parity check, a file is missing or changed, or the
            runtime refuses it.
        InputError: the runtime is not installed or cannot open that format.
    """
    own = FORMATS[entry.format].runtime
    if runtime is None or not RUNTIMES[own].whole_models:
        runtime = own
    if entry.format not in runtime_named(runtime).opens:
        able = [name for name, row in RUNTIMES.items() if entry.format in row.opens]
        raise InputError(f"{runtime} cannot open {entry.title}: choose {' or '.join(able)}")
    if entry.passed is False and not allow_failed:
        raise ArtifactError(
            f"{entry.title} of {manifest.directory} failed its parity check, so it is not used: "
            f"{entry.reason}. Export it again, or choose another precision."
        )
    path = manifest.verify(entry)
    if entry.passed is None:
        warnings.warn(
            f"{entry.title} of {manifest.directory} was never compared with the model "
            f"({entry.reason}); do that here with `regionspot parity torch "
            f"{manifest.directory}:{own}:{entry.precision}`",
            stacklevel=2,
        )
    return open_graph(path, entry.spec, runtime, entry.precision, device, threads)


def open_pipeline(
    artifacts: str | Path,
    runtime: str = "onnxruntime",
    precision: str | None = None,
    threads: int | None = None,
    device: str = "auto",
    allow_failed: bool = False,
    native: bool = True,
    artefact_format: str | None = None,
) -> RegionPipeline:
    """Opens the model that `regionspot-export` wrote to a directory; each graph is loaded when it
    is first needed.

    The pipeline may be shared between threads. A pickled copy opens the same directory again, on
    the same machine.

    Args:
        artifacts: the directory.
        runtime: a name in `formats.RUNTIMES`.
        precision: of all graphs; None takes the first that has all required graphs: fp32 on a CPU,
            fp16 on a GPU.
        threads: of runtimes on the CPU; None stands for `regionspot.threads.default_threads()`.
        device: see `open_graph`.
        allow_failed: open graphs that failed their parity check too.
        native: on a CPU, let our own kernels run the token decoder where its weights were exported
            for them. They are in single precision, whatever the rest is.
        artefact_format: a name in `formats.FORMATS`; None takes the one that the runtime prefers on
            that device.

    Raises:
        InputError: an unknown runtime or precision.
        ArtifactError: no usable artefacts there, at once or when a graph is first needed.
    """
    manifest = Manifest.load(artifacts)
    device = runtime_named(runtime, whole_models=True).resolve_device(device)
    artefact_format, chosen = choose_artifacts(
        manifest, runtime, precision, device, artefact_format
    )
    directory = Path(artifacts).absolute()
    reopen = partial(
        open_pipeline,
        directory,
        runtime,
        chosen,
        threads,
        device,
        allow_failed,
        native,
        artefact_format,
    )

    sizes = dict(SIZES_ON_CPU if device == "cpu" else SIZES_ON_GPU)
    kernels = native_entries(manifest) if native and device == "cpu" else {}
    if kernels:
        sizes["prompt_chunk"] = NATIVE_PROMPT_CHUNK

    def entry(graph: str) -> GraphEntry:
        own = manifest.find(graph, artefact_format, chosen)
        # kernels take any sizes
        return replace(kernels[graph], spec=own.spec) if graph in kernels else own

    return RegionPipeline(
        manifest.model,
        lambda graph: open_runner(manifest, entry(graph), runtime, device, threads, allow_failed),
        runtime=runtime,
        precision=chosen,
        # an IR's weights lie in its .bin
        fingerprint=lambda graph: " ".join(sorted(entry(graph).files.values())),
        reopen=reopen,
        text_input=manifest.text_input,
        **sizes,
    )


def native_entries(manifest: Manifest) -> dict[str, GraphEntry]:
    """The graphs that our own kernels can run, by name; none if they would run one of a model's,
    and not the other.
    """
    entries = {entry.name: entry for entry in manifest.graphs if entry.format == NATIVE}
    return entries if all(entry.usable for entry in entries.values()) else {}


def choose_artifacts(
    manifest: Manifest,
    runtime: str,
    precision: str | None,
    device: str = "cpu",
    artefact_format: str | None = None,
) -> tuple[str, str]:
    """The format and the precision that a runtime takes from a directory: the first that has all
    required graphs.

    Where none has, it is the one with the most of them, and where all failed, what failed: opening
    it says why. Arguments and errors as `open_pipeline`; the device is resolved.
    """
    row = runtime_named(runtime, whole_models=True)
    opens = row.opens_on(device) if artefact_format is None else (artefact_format,)
    if precision is not None and precision not in PRECISIONS:
        raise InputError(
            f"there is no precision {precision!r}: choose one of {', '.join(PRECISIONS)}"
        )
    made_kinds = {
        (entry.format, entry.precision) for entry in manifest.graphs if entry.file is not None
    }
    target = CPU if device == "cpu" else GPU
    kinds = [
        (name, one)
        for name in opens
        for one in ([precision] if precision else preferred_precisions(target))
        if (name, one) in made_kinds
    ]
    if kinds:
        usable = [
            (entry.name, entry.format, entry.precision) for entry in manifest.graphs if entry.usable
        ]
        required = required_graphs()
        # the first of the best
        return max(kinds, key=lambda kind: sum((name, *kind) in usable for name in required))
    made = [
        f"{one} {', '.join(manifest.precisions(one))}"
        for one in FORMATS
        if manifest.precisions(one)
    ]
    raise ArtifactError(
        f"{manifest.directory} holds nothing for "
        f"{runtime}{f' in {precision}' if precision else ''}; it holds "
        f"{'; '.join(made) or 'no graph'}. Make it with regionspot-export "
        f"{export_option(runtime, precision)}"
        f"{f' --precision {precision}' if precision else ''}."
    )

"""A Triton model repository out of a directory of artefacts: one model for each graph, and the
public one over them.

    model_repository/
      manifest.json, tokenizer.json  of the graphs that lie below: the repository is itself a
                                     directory of artefacts
      regionspot/                    the public model: images in, class names of regions out
        configs/cpu.pbtxt            a configuration for each target that was asked for
        1/model.py, vocabularies/cpu/NAME.npz
      sam_image_encoder/             and so on: the graphs
        configs/cpu.pbtxt
        1/model.py, sam_image_encoder.onnx

Start the server with `--model-config-name=TARGET`, as `regionspot-serve up` does; or make the
repository flat, with the configuration of one target as `config.pbtxt` in each model's folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from regionspot.errors import ArtifactError, InputError
from regionspot.files import write_atomically
from regionspot.locks import LOCK_FILE, locked
from regionspot.runtime.artifacts import MANIFEST, TOKENIZER, GraphEntry, Manifest
from regionspot.runtime.formats import FORMATS, RUNTIMES
from regionspot.runtime.graphs import required_graphs, served_graphs
from regionspot.runtime.opening import choose_artifacts, native_entries, open_pipeline
from regionspot.serving.contract import MODEL, TARGETS, Limits, version_of
from regionspot.serving.gpu import GraphsOnGpu, check_memory, first_gpu
from regionspot.serving.model_config import (
    graph_config,
    lint,
    parameters_of,
    pipeline_config,
    read_config,
    write_config,
)
from regionspot.structures import Vocabulary, check_class_names
from regionspot.vocabulary import VocabularyEncoder, parse_vocabulary

CPU_RUNTIMES = ("openvino", "onnxruntime")
"""The faster one first."""

GRAPHS_INSIDE, GRAPHS_IN_TRITON = "in_process", "triton"
VERSION = "1"
MODEL_PARTS = ("model", "preprocessing", "tokenizer", "templates")
"""What all targets of a repository share, as fields of `Manifest`."""

PACKAGE_VARIABLE = "REGIONSPOT_PACKAGE"
"""Names the folder that holds this package where the server's Python has none installed; it ignores
PYTHONPATH.
"""

_MODEL_PY = '''"""{text}"""

import os
import sys

sys.path[:0] = filter(None, [os.environ.get("{variable}")])

from regionspot.serving.backends.{module} import (  # noqa: E402
    TritonPythonModel as TritonPythonModel,
)
'''


@dataclass(frozen=True)
class RepositoryOptions:
    """How a repository is made.

    Args:
        target: one of TARGETS.
        runtime, precision: of the artefacts; None takes the fastest runtime of a CPU, and fp32 on a
            CPU, fp16 on a GPU, or else what was exported.
        vocabularies: name -> words, or what `parse_vocabulary` takes; their embeddings are computed
            now. They are registered beside those that the repository has for this target. None
            registers the words that a model comes with, if there are no others.
        drop_vocabularies: names of the repository's that are not kept.
        limits: of a request.
        allow_unverified: also serve artefacts that were never compared with the model, such as
            engines of a machine whose PyTorch saw no GPU.
        gpu_memory_mib: of the GPU that will serve; None is this machine's, if it has one.
        graphs: where the public model's graphs run: inside of it, or as models of their own in the
            same server, which is what a GPU's repository always does.
        flat: also write each model's configuration as `config.pbtxt`, for servers that are started
            without `--model-config-name`, such as KServe's.
    """

    target: str = "cpu"
    runtime: str | None = None
    precision: str | None = None
    vocabularies: Mapping[str, str | Sequence[str]] | None = None
    drop_vocabularies: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    graphs: str | None = None
    allow_unverified: bool = False
    gpu_memory_mib: int | None = None
    flat: bool = False

    @property
    def run_graphs(self) -> str:
        """GRAPHS_INSIDE or GRAPHS_IN_TRITON."""
        return self.graphs or (GRAPHS_INSIDE if self.target == "cpu" else GRAPHS_IN_TRITON)

    @property
    def calls_graphs(self) -> bool:
        """Whether the graphs are models of their own, which the public model calls."""
        return self.run_graphs == GRAPHS_IN_TRITON


def make_repository(
    artifacts: str | Path, out: str | Path, options: RepositoryOptions
) -> list[str]:
    """Make a repository, or add a target to one of the same artefacts; the names of its models.

    Raises:
        InputError: options that do not go together, or `out` is no repository and not empty.
        ArtifactError: artefacts that are missing, damaged, of another model, or not made for the
            target.
    """
    if options.target not in TARGETS:
        raise InputError(
            f"there is no target {options.target!r}: choose one of {', '.join(TARGETS)}"
        )
    out, manifest = Path(out), Manifest.load(artifacts)
    runtime = _runtime(manifest, options)
    device = "cpu" if options.target == "cpu" else "cuda"
    artefact_format, precision = choose_artifacts(manifest, runtime, options.precision, device)
    entries = _entries(manifest, artefact_format, precision)
    if not options.allow_unverified:
        _refuse_unverified(manifest, entries)
    if options.target != "cpu":
        _check_gpu_memory(manifest, entries, options)
    served = _served_manifest(manifest, out)
    before = registered_words(out, options.target)
    words = _words(manifest, precision, options, [entry.name for entry in entries], before)
    moved = [_moved(entry, served) for entry in entries]
    graphs = {entry.name for entry in entries} if options.run_graphs == GRAPHS_INSIDE else set()
    kernels = [kernel for name, kernel in native_entries(manifest).items() if name in graphs]
    with locked(out):
        write_atomically(out / TOKENIZER, manifest.read_tokenizer())
        served.save()  # so that a repository that was left half made is known for one
        for entry, there in zip(entries, moved, strict=True):
            _place(manifest, entry, there, out)
            served = served.with_entry(there)
        if options.target == "cpu":
            served = _with_kernels(manifest, kernels, served)
        served.save()
        for there in moved:
            _write_graph(out, there, options)
        # of an earlier export
        for name in set(served_graphs()) - {entry.name for entry in entries}:
            (out / name / "configs" / f"{options.target}.pbtxt").unlink(missing_ok=True)
        kind = runtime, artefact_format, precision
        _write_pipeline(out, manifest, kind, options, words, [entry.name for entry in entries])
        _flatten(out, options)
    names = [MODEL, *(entry.name for entry in entries)]
    check_repository(out, options.target, names)
    return names


def _flatten(out: Path, options: RepositoryOptions) -> None:
    """Puts the target's configurations where Triton looks by itself, or removes earlier ones."""
    for config in out.glob(f"*/configs/{options.target}.pbtxt"):
        found_by_itself = config.parents[1] / "config.pbtxt"
        if options.flat:
            write_atomically(found_by_itself, config.read_bytes())
        else:
            found_by_itself.unlink(missing_ok=True)


def check_repository(repository: Path, target: str, names: Sequence[str]) -> None:
    """Parse every configuration back and lint it.

    Raises:
        ArtifactError: what is wrong with which.
    """
    problems = []
    for name in names:
        folder = repository / name
        problems += [
            f"{name}: {problem}"
            for problem in lint(read_config(folder / "configs" / f"{target}.pbtxt"), folder)
        ]
    if problems:
        raise ArtifactError(f"{repository} would not be served as it should: {'; '.join(problems)}")


def targets_of(repository: str | Path) -> list[str]:
    """What a repository was made for.

    Raises:
        ArtifactError: it is none.
    """
    folder = Path(repository) / MODEL / "configs"
    found = [target for target in TARGETS if (folder / f"{target}.pbtxt").is_file()]
    if not found:
        raise ArtifactError(
            f"{repository} is no model repository of regionspot. Make one: regionspot-serve init "
            f"--artifacts artifacts --out {shlex.quote(str(repository))} --target cpu"
        )
    return found


def models_of(repository: str | Path, target: str) -> list[str]:
    """Its models that have a configuration for a target, the public one first."""
    found = sorted(
        path.parents[1].name for path in Path(repository).glob(f"*/configs/{target}.pbtxt")
    )
    return [MODEL, *(name for name in found if name != MODEL)]


def write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """A registered vocabulary: names and embeddings, for `read_vocabulary`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp.npz")
    np.savez(aside, names=np.array(vocabulary.names, np.str_), embeddings=vocabulary.embeddings)
    os.replace(aside, path)


def _runtime(manifest: Manifest, options: RepositoryOptions) -> str:
    if options.target != "cpu":
        if options.runtime not in (None, options.target) or options.graphs == GRAPHS_INSIDE:
            raise InputError(
                f"the target {options.target} runs graphs in Triton's own backend of that name"
            )
        return options.target
    if options.runtime is not None:
        if options.runtime not in CPU_RUNTIMES:
            raise InputError(
                f"on a CPU the runtime is {' or '.join(CPU_RUNTIMES)}, not {options.runtime}"
            )
        return options.runtime
    made = {entry.format for entry in manifest.graphs if entry.usable}
    return next((name for name in CPU_RUNTIMES if RUNTIMES[name].opens[0] in made), "onnxruntime")


def _entries(manifest: Manifest, artefact_format: str, precision: str) -> list[GraphEntry]:
    """The usable graphs that are served. Raises ArtifactError where one that must be there is
    not.
    """
    found = []
    for name in served_graphs():
        entry = manifest.get(name, artefact_format, precision)
        if entry is None and name not in required_graphs():
            continue
        entry = manifest.find(name, artefact_format, precision)
        if not entry.usable:
            raise ArtifactError(
                f"{entry.title} failed its parity check, so it is not served: {entry.reason}"
            )
        found.append(entry)
    return found


def _refuse_unverified(manifest: Manifest, entries: Sequence[GraphEntry]) -> None:
    """Raises ArtifactError where a graph was never compared with the model."""
    unverified = [entry for entry in entries if entry.passed is None]
    if unverified:
        first = unverified[0]
        runtime = FORMATS[first.format].runtime
        raise ArtifactError(
            f"{', '.join(entry.title for entry in unverified)} of {manifest.directory}: never "
            f"compared with the model ({first.reason}). Export on the machine with the GPU, with "
            "--resume, where PyTorch sees it; or compare there by `regionspot parity torch "
            f"{manifest.directory}:{runtime}:{first.precision}`, and allow it here by "
            "--allow-unverified"
        )


def _check_gpu_memory(
    manifest: Manifest, entries: Sequence[GraphEntry], options: RepositoryOptions
) -> None:
    """Raises ArtifactError where the server would not fit on the GPU that is meant."""
    mib, name = options.gpu_memory_mib, "that GPU"
    if mib is None and (gpu := first_gpu()) is not None:
        mib, name = gpu.memory_mib, gpu.name
    if mib is not None:
        graphs = GraphsOnGpu(entries, manifest.directory, options.limits)
        check_memory(graphs.memory(), mib << 20, name)


def graphs_on_gpu(repository: str | Path, target: str) -> GraphsOnGpu:
    """Returns the graphs of a repository's target that runs on a GPU.

    Raises:
        ArtifactError: there is no such repository, or it was not made for the target.
    """
    manifest = Manifest.load(repository)
    config = read_config(Path(repository) / MODEL / "configs" / f"{target}.pbtxt")
    values = {name: json.loads(value) for name, value in parameters_of(config).items()}
    entries = [
        manifest.find(name, values["format"], values["precision"]) for name in values["graphs"]
    ]
    return GraphsOnGpu(entries, manifest.directory, Limits.from_json(values["limits"]))


def _served_manifest(manifest: Manifest, out: Path) -> Manifest:
    """The repository's own: new, or that of a target made before."""
    if not (out / MANIFEST).is_file():
        if out.is_dir() and any(path.name != LOCK_FILE for path in out.iterdir()):
            raise InputError(f"{out} is not empty, and no model repository: choose another --out")
        return replace(manifest, directory=out, graphs=(), end_to_end=())
    served = Manifest.load(out)
    if any(getattr(served, part) != getattr(manifest, part) for part in MODEL_PARTS):
        raise InputError(
            f"{out} serves {served.model.name}, and {manifest.directory} holds "
            f"{manifest.model.name} or other weights of it: choose another --out, or delete it"
        )
    return served


def _moved(entry: GraphEntry, served: Manifest) -> GraphEntry:
    """The entry with its files where they will lie in the repository.

    Raises:
        InputError: another precision of it lies there by the same name, or the same graph of other
            weights.
    """
    folder = PurePosixPath(entry.name) / VERSION
    files = {str(folder / PurePosixPath(name).name): sha for name, sha in entry.files.items()}
    others = [
        other for other in served.graphs if other.name == entry.name and other.key != entry.key
    ]
    for other in others:
        if set(other.files) & set(files) or other.weights != entry.weights:
            what = (
                "other weights"
                if other.weights != entry.weights
                else "another precision of the same format"
            )
            raise InputError(
                f"{served.directory} holds {other.title}, and this would put {what} beside it: "
                "choose another --out, or delete it"
            )
    assert entry.file is not None
    return replace(entry, file=str(folder / PurePosixPath(entry.file).name), files=files)


def _with_kernels(manifest: Manifest, entries: Sequence[GraphEntry], served: Manifest) -> Manifest:
    """The repository's manifest with the weights for our own kernels, which lie beside their
    graphs, and no others.
    """
    for old in native_entries(served).values():
        served = served.without(old.key)
    for entry in entries:
        there = _moved(entry, served)
        _place(manifest, entry, there, served.directory)
        served = served.with_entry(there)
    return served


def _place(manifest: Manifest, entry: GraphEntry, moved: GraphEntry, out: Path) -> None:
    """Put an artefact's files, proven to be whole, where `moved` says."""
    manifest.verify(entry)
    (out / entry.name / VERSION).mkdir(parents=True, exist_ok=True)
    for source, target in zip(entry.files, moved.files, strict=True):
        _link_or_copy(manifest.directory / source, out / target)


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name of the same file where that is possible: exporting again replaces files and
    does not edit them.
    """
    if target.exists() and source.samefile(target):
        return
    aside = target.with_name(f".{target.name}.tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), aside)
    except OSError:
        shutil.copyfile(source, aside)
    os.replace(aside, target)


def _write_graph(out: Path, entry: GraphEntry, options: RepositoryOptions) -> None:
    assert entry.file is not None
    _write(
        out / entry.name / VERSION / "model.py", _model_py(entry.spec.description, "graph_model")
    )
    file_name = PurePosixPath(entry.file).name
    config = graph_config(entry.spec, options.target, file_name, options.calls_graphs)
    config.parameters["format"].string_value = entry.format
    config.parameters["precision"].string_value = entry.precision
    config.parameters["fingerprint"].string_value = " ".join(sorted(entry.files.values()))
    _write(out / entry.name / "configs" / f"{options.target}.pbtxt", write_config(config))


def _write_pipeline(
    out: Path,
    manifest: Manifest,
    kind: tuple[str, str, str],
    options: RepositoryOptions,
    words: Mapping[str, tuple[str, ...]],
    graphs: Sequence[str],
) -> None:
    """`kind` is the runtime, the format and the precision of the graphs, which lie in `out`
    by now.
    """
    runtime, artefact_format, precision = kind
    folder = out / MODEL / VERSION
    _write(
        folder / "model.py",
        _model_py("RegionSpot: pictures in, names of regions out", "pipeline_model"),
    )
    vocabularies = _vocabularies(manifest, precision, words, folder, options.target)
    parameters: dict[str, Any] = {
        "model_info": asdict(manifest.model),
        "limits": options.limits.to_json(),
        "vocabularies": {name: list(one.names) for name, one in vocabularies.items()},
        "graphs": list(graphs),
        "run_graphs": options.run_graphs,
        "target": options.target,
        "format": artefact_format,
        "runtime": runtime,
        "precision": precision,
        "templates": list(manifest.templates),
        "model_version": _model_version(manifest, kind[1:], graphs),
    }
    _write(
        out / MODEL / "configs" / f"{options.target}.pbtxt",
        write_config(pipeline_config(options.calls_graphs, parameters)),
    )


def _model_version(manifest: Manifest, kind: tuple[str, str], graphs: Sequence[str]) -> str:
    """Changes with the content of anything that answers depend on, and with nothing else.

    Args:
        kind: the graphs' format and precision.
    """
    files = [sorted(manifest.find(name, *kind).files.values()) for name in sorted(graphs)]
    hashes = [digest for of_graph in files for digest in of_graph]
    return version_of([*hashes, manifest.tokenizer, *manifest.templates])


def registered_words(repository: Path, target: str) -> dict[str, tuple[str, ...]]:
    """The words of each vocabulary that a repository has for a target; none where it was not made
    for it.
    """
    path = repository / MODEL / "configs" / f"{target}.pbtxt"
    if not path.is_file():
        return {}
    found = json.loads(parameters_of(read_config(path))["vocabularies"])
    return {name: tuple(words) for name, words in found.items()}


def _words(
    manifest: Manifest,
    precision: str,
    options: RepositoryOptions,
    graphs: Sequence[str],
    before: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[str, ...]]:
    """The vocabularies to register, checked before anything is written; `before` are those that the
    repository has.
    """
    can_encode = _text_runtime(manifest, precision) is not None
    if unknown := [name for name in options.drop_vocabularies if name not in before]:
        raise InputError(
            f"there is no vocabulary {unknown[0]!r} to drop: the repository has "
            f"{', '.join(sorted(before)) or 'none'}"
        )
    asked = options.vocabularies
    if asked is None:
        of_mini = manifest.model.name == "regionspot_mini" and can_encode and not before
        asked = {"mini": "mini"} if of_mini else {}
    words = {name: words for name, words in before.items() if name not in options.drop_vocabularies}
    words |= {
        name: parse_vocabulary(text) if isinstance(text, str) else tuple(text)
        for name, text in asked.items()
    }
    if wrong := [name for name in words if not name.isidentifier()]:
        raise InputError(
            f"{wrong[0]!r} cannot be the name of a vocabulary: use letters, digits and _"
        )
    for names in words.values():
        check_class_names(names)
    if (words and not can_encode) or (not words and "clip_text_encoder" not in graphs):
        raise ArtifactError(
            f"{manifest.directory} has no clip_text_encoder that runs on a CPU, so no vocabulary "
            "can be registered and no words be served: add it with regionspot-export --graphs "
            f"clip_text_encoder --onnx --out {manifest.directory}"
        )
    return words


def _vocabularies(
    manifest: Manifest,
    precision: str,
    words: Mapping[str, tuple[str, ...]],
    folder: Path,
    target: str,
) -> dict[str, Vocabulary]:
    """The registered vocabularies, encoded now and written in place of all others."""
    text_runtime = _text_runtime(manifest, precision)
    found: dict[str, Vocabulary] = {}
    if words and text_runtime is not None:
        with open_pipeline(manifest.directory, **text_runtime, device="cpu") as pipeline:
            encoder = VocabularyEncoder(pipeline.text_encoder)
            found = {name: encoder.encode(names) for name, names in words.items()}
    for name, vocabulary in found.items():
        write_vocabulary(folder / "vocabularies" / target / f"{name}.npz", vocabulary)
    for path in (folder / "vocabularies" / target).glob("*.npz"):
        if path.stem not in found:
            path.unlink()
    return found


def _text_runtime(manifest: Manifest, precision: str) -> dict[str, Any] | None:
    """What opens the text encoder that registers words, as arguments of `open_pipeline`: single
    precision where there is one.
    """
    for wanted in dict.fromkeys(("fp32", precision)):
        for runtime in CPU_RUNTIMES:
            for name in RUNTIMES[runtime].own_formats("cpu"):
                entry = manifest.get("clip_text_encoder", name, wanted)
                if entry is not None and entry.usable:
                    return {"runtime": runtime, "precision": wanted, "artefact_format": name}
    return None


def _model_py(text: str, module: str) -> str:
    return _MODEL_PY.format(text=text, module=module, variable=PACKAGE_VARIABLE)


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode("utf-8"))

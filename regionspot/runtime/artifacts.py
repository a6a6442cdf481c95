"""A directory of artefacts: its manifest, checked when it is read, and each file checked before it
is opened.

`regionspot-export` writes one: `manifest.json` beside `FORMAT/PRECISION/GRAPH.*`. Everything here
is free of PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from regionspot.errors import ArtifactError, InputError
from regionspot.files import write_atomically
from regionspot.runtime.engine_file import file_sha256
from regionspot.runtime.formats import FORMATS, GPU, ONNX
from regionspot.runtime.graph_spec import GraphSpec, ModelInfo, Range, TensorSpec
from regionspot.runtime.graphs import graph_specs
from regionspot.runtime.preprocessing import Preprocessing
from regionspot.runtime.text_encoder import TextInput
from regionspot.runtime.tokenizer import ClipTokenizer
from regionspot.runtime.tolerance import PRECISIONS

if TYPE_CHECKING:
    pass

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "regionspot-artifacts-2"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class GraphEntry:
    """One artefact.

    Args:
        spec: its tensors, and the ranges it was made for.
        format, precision: one of FORMATS and of PRECISIONS.
        file: the file to open, relative to the directory, with "/"; None where making it failed.
        files: every file that it needs -> its SHA-256; `file` is one of them.
        size_bytes: of all files.
        weights: fingerprint of the weights behind it, see
            `regionspot.modeling.pipelines.graph_fingerprints`.
        recipe: fingerprint of all that it was made from and with: another recipe would make another
            file.
        versions: of the packages that it was made with.
        build_s: seconds that making it took.
        passed: whether it agrees with the PyTorch model; None where this could not be tried,
            `reason` says why.
        max_abs_diff, cosine, sqnr_db: the worst of all outputs and inputs tried; None where nothing
            was compared.
        outputs: the same for each output.
        tolerance: the class of parity that it was judged by.
    """

    spec: GraphSpec
    format: str
    precision: str
    file: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    weights: str = ""
    recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    build_s: float = 0.0
    passed: bool | None = None
    reason: str = ""
    max_abs_diff: float | None = None
    cosine: float | None = None
    sqnr_db: float | None = None
    outputs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tolerance: str = ""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells one artefact of a directory from another."""
        return self.name, self.format, self.precision

    @property
    def sha256(self) -> str | None:
        """Of `file`."""
        return self.files[self.file] if self.file else None

    @property
    def usable(self) -> bool:
        """It was made, and did not fail its parity check."""
        return self.file is not None and self.passed is not False

    @property
    def title(self) -> str:
        """ "region_head (onnx, fp16)"."""
        return f"{self.name} ({self.format}, {self.precision})"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": self.file,
            "sha256": self.sha256,
            "format": self.format,
            "precision": self.precision,
            "max_abs_diff": self.max_abs_diff,
            "cosine": self.cosine,
            "sqnr_db": self.sqnr_db,
            "passed": self.passed,
            "reason": self.reason,
            "tolerance": self.tolerance,
            "outputs_measured": {name: dict(figures) for name, figures in self.outputs.items()},
            "files": dict(self.files),
            "size_bytes": self.size_bytes,
            "build_s": self.build_s,
            "weights": self.weights,
            "recipe": self.recipe,
            "versions": dict(self.versions),
            **spec_to_json(self.spec),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], specs: Mapping[str, GraphSpec]) -> GraphEntry:
        """Raises KeyError, TypeError or ValueError for what `to_json` never writes, ArtifactError
        for other tensors.
        """
        entry = cls(
            spec=spec_from_json(content),
            outputs=content["outputs_measured"],
            **{name: content[name] for name in _PLAIN_FIELDS},
        )
        if entry.name not in specs:
            raise ArtifactError(f"this release has no graph {entry.name!r}")
        if entry.format not in FORMATS:
            raise ArtifactError(
                f"{entry.title} is in a format that is not registered here: install what adds it"
            )
        own = specs[entry.name]
        if FORMATS[entry.format].target == GPU and entry.spec.half_tensors:
            own = own.with_half_tensors()
        if (own.inputs, own.outputs) != (entry.spec.inputs, entry.spec.outputs):
            raise ArtifactError(
                f"{entry.title} has other tensors than this release's graph of that name"
            )
        if entry.precision not in PRECISIONS:
            raise ValueError(f"{entry.title} is in no known precision")
        if entry.file is not None and entry.file not in entry.files:
            raise ValueError(f"{entry.title} has no checksum")
        return replace(entry, spec=replace(own, ranges=entry.spec.ranges))


_PLAIN_FIELDS = (
    *(
        "format",
        "precision",
        "file",
        "files",
        "size_bytes",
        "weights",
        "recipe",
        "versions",
        "build_s",
    ),
    *("passed", "reason", "max_abs_diff", "cosine", "sqnr_db", "tolerance"),
)


@dataclass(frozen=True)
class Manifest:
    """What a directory of artefacts holds.

    Args:
        model: sizes of the model.
        preprocessing: of its pictures.
        tokenizer: SHA-256 of `tokenizer.json`, which makes tokens of class names.
        templates: the texts of a class name, with `{}` for the name.
        source: where the weights came from: fingerprints and files' names.
        git_commit: of the code that made it.
        tolerances: the classes of parity, as they were then.
        end_to_end: rows of the whole pipeline, for each format and precision.
    """

    directory: Path
    model: ModelInfo
    preprocessing: Preprocessing
    tokenizer: str
    templates: tuple[str, ...]
    source: Mapping[str, Any] = field(default_factory=dict)
    git_commit: str | None = None
    tolerances: Mapping[str, Any] = field(default_factory=dict)
    graphs: tuple[GraphEntry, ...] = ()
    end_to_end: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read and check `manifest.json`; the files it names are checked when they are opened.

        Raises:
            ArtifactError: there is none, it is damaged or was edited, or it was made for another
                release's tensors or preprocessing.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise ArtifactError(
                f"{directory} holds no artefacts: {path} cannot be read ({error.strerror}). Make "
                f"them with `regionspot-export --out {directory}`, or name another directory."
            ) from error
        except ValueError as error:
            raise ArtifactError(
                f"{path} is damaged: it is not JSON ({error}). Export again."
            ) from error
        if not isinstance(content, dict) or content.get("format") != MANIFEST_FORMAT:
            raise ArtifactError(
                f"{path} is no manifest that this release can read ({MANIFEST_FORMAT}): export "
                "again"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise ArtifactError(
                f"{path} was changed after it was written: its content does not match its "
                "checksum. Export again, or get the unchanged file."
            )
        try:
            return cls._from_json(content, directory)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is damaged or of another release ({error!r}): export again"
            ) from error

    @classmethod
    def _from_json(cls, content: dict[str, Any], directory: Path) -> Manifest:
        path = directory / MANIFEST
        preprocessing = Preprocessing.from_json(content["preprocessing"])
        preprocessing.check(path)
        model = ModelInfo.from_json(content["model"])
        specs = graph_specs(model)
        try:
            graphs = tuple(GraphEntry.from_json(entry, specs) for entry in content["graphs"])
        except InputError as error:  # an impossible range
            raise ValueError(str(error)) from error
        except ArtifactError as error:
            raise ArtifactError(
                f"{path}: {error}. Export again, or use the release that made it."
            ) from error
        kept = {name: content[name] for name in ("tokenizer", "source", "git_commit", "tolerances")}
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("templates", "end_to_end")}
        return cls(directory, model, preprocessing, graphs=graphs, **lists, **kept)

    def save(self) -> None:
        """Write `manifest.json`, atomically."""
        content: dict[str, Any] = {
            "format": MANIFEST_FORMAT,
            "model": asdict(self.model),
            "preprocessing": self.preprocessing.to_json(),
            "tokenizer": self.tokenizer,
            "templates": list(self.templates),
            "source": dict(self.source),
            "git_commit": self.git_commit,
            "tolerances": dict(self.tolerances),
            "graphs": [entry.to_json() for entry in self.graphs],
            "end_to_end": [dict(row) for row in self.end_to_end],
        }
        content["checksum"] = _checksum(content)
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.directory / MANIFEST, (text + "\n").encode())

    def with_entry(self, entry: GraphEntry) -> Manifest:
        """The same with `entry` in place of what had its key, or at the end."""
        if self.get(*entry.key) is None:
            return replace(self, graphs=(*self.graphs, entry))
        return replace(
            self, graphs=tuple(entry if old.key == entry.key else old for old in self.graphs)
        )

    def without(self, key: tuple[str, str, str]) -> Manifest:
        return replace(self, graphs=tuple(entry for entry in self.graphs if entry.key != key))

    def get(self, name: str, artefact_format: str, precision: str) -> GraphEntry | None:
        """The entry of a key, if there is one."""
        return next(
            (entry for entry in self.graphs if entry.key == (name, artefact_format, precision)),
            None,
        )

    def find(self, name: str, artefact_format: str, precision: str) -> GraphEntry:
        """The entry of a key.

        Raises:
            ArtifactError: it was not made; says what there is.
        """
        entry = self.get(name, artefact_format, precision)
        if entry is None:
            others = [
                f"{other.format} {other.precision}" for other in self.graphs if other.name == name
            ]
            raise ArtifactError(
                f"{self.directory} has no {name} as {artefact_format} in {precision}; it has "
                f"{', '.join(others) or 'none of that name'}. Make it: regionspot-export --graphs "
                f"{name} --{FORMATS[artefact_format].option or ONNX} --precision {precision} --out "
                f"{self.directory}"
            )
        return entry

    def precisions(self, artefact_format: str) -> list[str]:
        """In which there are usable graphs of a format, in the order of PRECISIONS."""
        found = {
            entry.precision
            for entry in self.graphs
            if entry.format == artefact_format and entry.usable
        }
        return [precision for precision in PRECISIONS if precision in found]

    def verify(self, entry: GraphEntry) -> Path:
        """Compare the files of an entry with their checksums; where the one to open lies.

        Raises:
            ArtifactError: a file is missing, lies outside the directory, or is not what was
                exported.
        """
        if entry.file is None:
            raise ArtifactError(f"{entry.title} was not made: {entry.reason}. Export it again.")
        for name, sha256 in entry.files.items():
            path = self._inside(name)
            if not path.is_file():
                raise ArtifactError(
                    f"{entry.title} is not whole: {path} is missing. Copy the whole directory, or "
                    "export it again."
                )
            if file_sha256(path) != sha256:
                raise ArtifactError(
                    f"{path} is not the file that was exported as {entry.title}: its SHA-256 "
                    "differs from the manifest's. It was damaged, cut short or replaced: copy it "
                    "or export it again."
                )
        return self._inside(entry.file)

    def text_input(self) -> TextInput:
        """The tokenizer and the templates.

        Raises:
            ArtifactError: as `read_tokenizer`.
            InputError: a package that it needs is not installed.
        """
        return TextInput(ClipTokenizer(self.read_tokenizer().decode()), self.templates)

    def read_tokenizer(self) -> bytes:
        """The content of `tokenizer.json`, proven to be what was exported.

        Raises:
            ArtifactError: the file is missing or was changed.
        """
        path = self.directory / TOKENIZER
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be read ({error.strerror}): copy the whole directory, or export it "
                "again"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.tokenizer:
            raise ArtifactError(
                f"{path} is not the file that was exported: its SHA-256 differs from the "
                "manifest's. Copy it or export it again."
            )
        return content

    def _inside(self, name: str) -> Path:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name:
            raise ArtifactError(
                f"{self.directory / MANIFEST} names a file outside its directory: {name!r}"
            )
        return self.directory / parts


def spec_to_json(spec: GraphSpec) -> dict[str, Any]:
    """A spec as plain values."""
    return {
        "name": spec.name,
        "description": spec.description,
        "inputs": [asdict(tensor) for tensor in spec.inputs],
        "outputs": [asdict(tensor) for tensor in spec.outputs],
        "ranges": {
            axis: [limits.min, limits.opt, limits.max] for axis, limits in spec.ranges.items()
        },
    }


def spec_from_json(content: Mapping[str, Any]) -> GraphSpec:
    """What `spec_to_json` wrote."""

    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in content[key]
        )

    ranges = {axis: Range(*limits) for axis, limits in content["ranges"].items()}
    return GraphSpec(
        content["name"], content["description"], tensors("inputs"), tensors("outputs"), ranges
    )


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 over everything in a manifest but this."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()

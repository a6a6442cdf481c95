"""What a training run is made of, as frozen dataclasses, and how they are read from YAML.

The defaults are the authors' recipe (spec: "Training recipe"); `regionspot/configs/` holds whole
files. A key that does not exist, a wrong type and an impossible value are errors that name the key.
No torch here, and no configuration goes further than `training.loop`: models take plain arguments.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from regionspot.errors import InputError, shown

Runtime = Literal["torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
"""What runs the model: PyTorch its weights, the others its exported graphs."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
"""What a model computes in; int8 and fp8 exist as exported graphs only."""

CONFIGS = Path(__file__).parent / "configs"
"""The packaged configuration files; `load_config` finds them by their bare names."""

CHANGEABLE_ON_RESUME = (
    "name",
    "output_dir",
    "device",
    "datasets.*.annotations",
    "datasets.*.images",
    "datasets.*.exclude",
    "datasets.*.same_meaning",
    "model.sam_weights",
    "model.clip_weights",
    "features.cache_dir",
    "features.batch_size",
    "features.workers",
    "features.max_memory_gib",
    "features.artifacts",
    "features.on_error",
    "features.max_skipped",
    "features.verify",
    "checkpoints.*",
    "logging.*",
)
"""Keys that a resumed run may change, since they say where and how, not what.

What the run learns from is compared by content instead: annotations, excluded classes, skipped
images, weights and artefacts (see `training.loop`).
"""

BEFORE_THE_KEY: Mapping[str, Any] = {
    "loss_reduction": "per_region",
    "datasets.*.clean_names": "coco",
    "optimizer.ema_ramp": False,
}
"""What runs did before a key existed, where that is not the key's default now: their configurations
lack the key.
"""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen parts by preset and files, and the head's size. `initial_head`: a head to go on
    from (stage 2).
    """

    preset: str = "regionspot_bb"
    sam_weights: str | None = None
    clip_weights: str | None = None
    initial_head: str | None = None
    num_layers: int = 3
    num_heads: int = 8
    feedforward_dim: int = 2048
    dropout: float = 0.1


@dataclass(frozen=True)
class DatasetConfig:
    """One COCO or LVIS annotation file. `images`: what its file names are relative to (default: the
    file's folder).

    `ratio` batches in every sum-of-ratios batches are this data set's. `exclude`: classes to leave
    out of training, with their regions: "novel" for those that the file marks `"novel": true`, or a
    text file with a class name on each line. `clean_names`: "coco" cuts COCO's suffixes `-other`,
    `-merged` and `-stuff` off the class names. `same_meaning`: what to do about different names
    with the same text embedding, which would make a region's class its own negative: "error" stops,
    "warn" trains all the same. (Equal names are always one class.)
    """

    name: str
    annotations: str
    images: str | None = None
    ratio: int = 1
    exclude: str = "none"
    clean_names: Literal["none", "coco"] = "none"
    same_meaning: Literal["error", "warn"] = "error"


@dataclass(frozen=True)
class FeatureConfig:
    """The cache of what SAM (and, without augmentation, CLIP) say of each image.

    `multimask`: three tokens of each region, each learnt on its own, instead of SAM's single-mask
    token. `cache_dir`: default $REGIONSPOT_CACHE/features or ~/.cache/regionspot/features.
    `batch_size` counts images while extracting; `workers` are threads that read images. Caches of
    up to `max_memory_gib` are held in memory.

    `runtime`: what runs SAM and CLIP while extracting; other than torch it runs the graphs in
    `artifacts`, a directory that regionspot-export made of these weights, in that `precision` or
    fp32 on a CPU and fp16 on a GPU. PyTorch extracts in fp32 (the default), bf16 or fp16.

    `on_error`: "skip" leaves out an image that cannot be read, or is not of the annotated size, and
    lists it in the run's skipped.json; more than the fraction `max_skipped` of a data set's images
    stop the run. `verify`: read the whole cache at the start, not only what was changed since it
    was written.
    """

    cache_dir: str | None = None
    dtype: Literal["float32", "float16"] = "float16"
    multimask: bool = False
    images_per_shard: int = 2048
    batch_size: int = 8
    workers: int = 4
    max_memory_gib: float = 8.0
    runtime: Runtime = "torch"
    artifacts: str | None = None
    precision: Precision | None = None
    on_error: Literal["stop", "skip"] = "stop"
    max_skipped: float = 0.01
    verify: bool = False

    def __post_init__(self) -> None:
        if self.runtime != "torch" and self.artifacts is None:
            raise InputError(
                f"features.runtime {self.runtime} runs exported graphs: name their directory with "
                "features.artifacts=DIR (regionspot-export makes it), or set features.runtime=torch"
            )
        if self.runtime == "torch" and self.artifacts is not None:
            raise InputError(
                "features.artifacts holds exported graphs, and torch runs the weights themselves: "
                "set features.runtime too, or leave it out"
            )
        if self.runtime == "torch" and self.precision in ("int8", "fp8"):
            raise InputError(
                f"features.precision {self.precision} exists as exported graphs only: set "
                "features.runtime too, or take fp32, bf16 or fp16"
            )


@dataclass(frozen=True)
class AugmentationConfig:
    """How the CLIP image is varied (see `data.augmentation`). Lengths are pixels, chosen uniformly.

    `keep_cropped_regions`: train on regions that the crop cuts away, too, as the authors' code
    does.
    """

    flip_probability: float = 0.5
    crop_probability: float = 0.5
    shortest_side_before_crop: tuple[int, ...] = (400, 500, 600)
    crop_size: tuple[int, ...] = (384, 600)
    keep_cropped_regions: bool = False


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate over the steps (see `training.optim`).

    `ema_decay`: save a moving average of the weights; `ema_ramp` lets the decay grow from 0.1 in
    the first steps, so that the random initial weights do not stay in the average for 1 / (1 -
    decay) steps.
    """

    learning_rate: float = 2.5e-5
    weight_decay: float = 1e-4
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[int, ...] = (350_000, 420_000)
    decay_factor: float = 0.1
    warmup_steps: int = 1000
    warmup_factor: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    ema_ramp: bool = True


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 5000
    keep: int = 3


@dataclass(frozen=True)
class LoggingConfig:
    every: int = 50
    tensorboard: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: it goes to `output_dir`/`name`.

    `loss_reduction`: "per_image" weighs all images of a batch alike, as the authors do;
    "per_region" all regions (see `modeling.losses`). `max_regions_per_image`: a batch takes at most
    this many regions of an image, drawn anew in each step; null means all. `amp`: "auto" is bf16
    where CUDA has it, fp16 on older GPUs, and off on the CPU. `standardize_inputs`: train on tokens
    of mean 0 and deviation 1, folded into the head's weights at the end. `augmentation`: null means
    none, and then CLIP's maps are cached as well.
    """

    datasets: tuple[DatasetConfig, ...]
    name: str = "regionspot"
    output_dir: str = "runs"
    seed: int = 0
    device: str = "auto"
    steps: int = 450_000
    batch_size: int = 16
    max_regions_per_image: int | None = None
    loss_reduction: Literal["per_image", "per_region"] = "per_image"
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    standardize_inputs: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    augmentation: AugmentationConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        flat = flatten(self)
        for key, allowed, meaning in _RANGES:
            for name, value in flat.items():
                if fnmatchcase(name, key) and value is not None and not allowed(value):
                    raise InputError(f"{name} must be {meaning}, got {shown(value)}")
        if not self.datasets:
            raise InputError("datasets is empty: give at least one {name, annotations}")
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise InputError(f"datasets share a name ({', '.join(names)}): give each its own")
        if self.augmentation and len(self.augmentation.crop_size) != 2:
            raise InputError("augmentation.crop_size must be two lengths, [smallest, largest]")
        if self.standardize_inputs and self.model.initial_head:
            raise InputError(
                "standardize_inputs cannot go with model.initial_head, which takes raw inputs: set "
                "one of the two"
            )


def _is_name(text: str) -> bool:
    return re.fullmatch(r"(?!\.+$)[\w.+-]{1,100}", text) is not None


_RANGES: tuple[tuple[str, Any, str], ...] = (
    ("name", _is_name, "a directory's name of at most 100 letters, digits and . _ + -"),
    ("datasets.*.name", _is_name, "a name of at most 100 letters, digits and . _ + -"),
    ("datasets.*.ratio", lambda v: 1 <= v <= 10_000, "1 to 10000"),
    ("seed", lambda v: 0 <= v < 2**63, "0 to 2^63 - 1"),
    ("steps", lambda v: v >= 1, "1 or more"),
    ("batch_size", lambda v: v >= 1, "1 or more"),
    ("max_regions_per_image", lambda v: v >= 1, "null or 1 or more"),
    ("model.num_*", lambda v: v >= 1, "1 or more"),
    ("model.feedforward_dim", lambda v: v >= 1, "1 or more"),
    ("model.dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("features.images_per_shard", lambda v: v >= 1, "1 or more"),
    ("features.batch_size", lambda v: v >= 1, "1 or more"),
    ("features.workers", lambda v: v >= 1, "1 or more"),
    ("features.max_memory_gib", lambda v: v >= 0, "0 or more"),
    ("features.max_skipped", lambda v: 0 <= v <= 1, "a fraction in [0, 1]"),
    ("augmentation.*_probability", lambda v: 0 <= v <= 1, "in [0, 1]"),
    (
        "augmentation.shortest_side_before_crop",
        lambda v: v and min(v) >= 1,
        "one or more lengths of 1 or more",
    ),
    (
        "augmentation.crop_size",
        lambda v: v and 1 <= v[0] <= v[-1],
        "[smallest, largest], 1 or more",
    ),
    ("optimizer.learning_rate", lambda v: 0 < v < math.inf, "more than 0 and finite"),
    ("optimizer.weight_decay", lambda v: v >= 0, "0 or more"),
    (
        "optimizer.milestones",
        lambda v: list(v) == sorted(set(v)) and min(v, default=0) >= 0,
        "increasing, 0 or more",
    ),
    ("optimizer.decay_factor", lambda v: 0 < v <= 1, "in (0, 1]"),
    ("optimizer.warmup_steps", lambda v: v >= 0, "0 or more"),
    ("optimizer.warmup_factor", lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("optimizer.max_grad_norm", lambda v: v > 0, "more than 0"),
    ("optimizer.ema_decay", lambda v: 0 < v < 1, "null or in (0, 1)"),
    ("checkpoints.*", lambda v: v >= 1, "1 or more"),
    ("logging.every", lambda v: v >= 1, "1 or more"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and lay `key.sub=value` overrides over it; `datasets.0.annotations=…`
    reaches into lists.

    Values of overrides are YAML: `augmentation=null`, `optimizer.milestones=[100,200]`.

    Args:
        path: a file, or the bare name of a packaged one ("mini.yaml" or "mini"), wherever the
            command runs. A file of that name in the working directory comes first.

    Raises:
        InputError: no such file, no YAML, an unknown key (with the nearest known one), a wrong
            type, a bad value.
    """
    tree = _read_yaml(_config_path(Path(path)))
    for override in overrides:
        _lay_over(tree, override)
    return config_from_dict(tree)


def load_config_of_run(path: str | Path) -> TrainConfig:
    """Read the config.yaml of an earlier run: keys that it lacks have the values of
    `BEFORE_THE_KEY`.

    Raises:
        InputError: as for `load_config`.
    """
    return config_of_run(_read_yaml(Path(path)))


def config_of_run(tree: Mapping[str, Any]) -> TrainConfig:
    """As `config_from_dict`, of what a run wrote down: keys that did not exist then have their
    meaning of then.
    """
    tree = copy.deepcopy(tree)
    for key, value in BEFORE_THE_KEY.items():
        *parents, last = key.split(".")
        for node in _nodes(tree, parents):
            node.setdefault(last, value)
    return config_from_dict(tree)


def packaged_configs() -> tuple[str, ...]:
    """The names of the packaged files, such as "mini.yaml"."""
    return tuple(sorted(path.name for path in CONFIGS.glob("*.yaml")))


def _config_path(path: Path) -> Path:
    if os.path.isfile(path) or len(path.parts) != 1:
        return path
    names = (path.name, f"{path.name}.yaml")
    return next((CONFIGS / name for name in names if os.path.isfile(CONFIGS / name)), path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(
            f"cannot read the configuration {path}: {reason}. Name a YAML file, or a packaged one "
            f"by its bare name: {', '.join(packaged_configs())}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {_in_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold keys and values, such as `steps: 1000`")
    return tree


def load_yaml(text: str) -> Any:
    """`yaml.safe_load`, but a key that a mapping has twice is a `yaml.YAMLError`: only one of them
    would count.
    """
    return yaml.load(text, _UniqueKeys)


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} stands twice", node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _in_one_line(error: Exception) -> str:
    """PyYAML's messages have a line for each place."""
    return " ".join(str(error).split())


def _nodes(tree: Any, parents: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The mappings at a dotted key, where `*` stands for every item of a list; nothing where there
    is none.
    """
    if not parents:
        yield from [tree] if isinstance(tree, dict) else []
    elif parents[0] == "*":
        for item in tree if isinstance(tree, list) else []:
            yield from _nodes(item, parents[1:])
    elif isinstance(tree, dict):
        yield from _nodes(tree.get(parents[0]), parents[1:])


def config_from_dict(tree: Mapping[str, Any]) -> TrainConfig:
    """Build a configuration from nested mappings, as YAML or `config_to_dict` give them."""
    config: TrainConfig = _build(TrainConfig, tree, "")
    return config


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested plain values: the inverse of `config_from_dict`."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def config_to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; the items of `datasets` are numbered: {"datasets.0.name": "mini", …}."""
    flat: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        value, key = getattr(config, spec.name), prefix + spec.name
        items = list(enumerate(value)) if isinstance(value, tuple) else []
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{key}.")
        elif items and all(dataclasses.is_dataclass(item) for _, item in items):
            for index, item in items:
                flat |= flatten(item, f"{key}.{index}.")
        else:
            flat[key] = value
    return flat


def differences_on_resume(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Keys whose change would make the resumed run another run: "optimizer.learning_rate (0.001,
    now 0.002)".

    `steps` may grow where the learning rate of a step does not depend on it.
    """
    before, now = flatten(old), flatten(new)
    changed = [
        key
        for key in [*before, *(key for key in now if key not in before)]
        if before.get(key) != now.get(key) and not _may_change(key, old, new)
    ]
    reasons = {"steps": _why_steps_stay(old, new)}
    return [
        f"{key} ({before.get(key)!r}, now {now.get(key)!r}{reasons.get(key, '')})"
        for key in changed
    ]


def _may_change(key: str, old: TrainConfig, new: TrainConfig) -> bool:
    if key == "steps":
        return not _why_steps_stay(old, new)
    if key == "optimizer.ema_ramp" and old.optimizer.ema_decay is None:
        return True
    return any(fnmatchcase(key, pattern) for pattern in CHANGEABLE_ON_RESUME)


def _why_steps_stay(old: TrainConfig, new: TrainConfig) -> str:
    if "cosine" in (old.optimizer.schedule, new.optimizer.schedule):
        return (
            "; the cosine schedule spreads over all steps, so another number of steps is another "
            "run"
        )
    return "; steps may only grow" if new.steps < old.steps else ""


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(
            f"{shown(override)} is no override: write key=value, such as "
            "optimizer.learning_rate=1e-3"
        )
    try:
        value = yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: 2026-13-45 is no date
        raise InputError(
            f"{shown(override)}: the value is not YAML ({_in_one_line(error)})"
        ) from error
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, key: str) -> Any:
    """The mapping or list at `part` of `node`, made where there is none yet."""
    if isinstance(node, list):
        child = node[_list_index(node, part, key)]
    else:
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if not isinstance(child, (dict, list)):
        raise InputError(f"{key} is a plain value ({shown(child)}): it has no keys of its own")
    return child


def _list_index(items: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise InputError(f"{key}: a list of {len(items)}; say which, 0 to {len(items) - 1}")
    return int(part)


def _build(cls: type[Any], tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise InputError(f"{prefix[:-1]} must hold keys and values, got {shown(tree)}")
    hints = get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise InputError(f"unknown key {prefix}{key}{_did_you_mean(f'{prefix}{key}')}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in tree and _is_required(f)]
    if missing:
        raise InputError(f"{prefix}{missing[0]} is missing: it has no default")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in tree.items()})


def _is_required(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as YAML gave it, as the type that the dataclass declares."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), key)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{key} must be a list, got {shown(value)}")
        return tuple(
            _convert(item, arguments[0], f"{key}.{index}") for index, item in enumerate(value)
        )
    if origin is Literal:
        # YAML reads `off` as false
        value = "off" if value is False and "off" in arguments else value
        if value not in arguments:
            raise InputError(
                f"{key} must be one of {', '.join(map(str, arguments))}, got {shown(value)}"
            )
        return value
    return _convert_scalar(value, hint, key)


def _convert_scalar(value: Any, hint: type, key: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads `1e-3` as a string
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(value) is hint:
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
    raise InputError(f"{key} must be {kind}, got {shown(value)} ({type(value).__name__})")


def _did_you_mean(key: str) -> str:
    """ "; did you mean …?" with the known key nearest to `key`, whole or by its last part."""
    known = list(_known_keys(TrainConfig, ""))
    generic = re.sub(r"\.\d+\.", ".0.", key)
    close = difflib.get_close_matches(generic, known, n=1, cutoff=0.75)
    if not close:
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [
            by_last[m]
            for m in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1, cutoff=0.6)
        ]
    return (
        f"; did you mean {close[0]}?"
        if close
        else f"; the top-level keys are {', '.join(_top_keys())}"
    )


def _top_keys() -> list[str]:
    return [spec.name for spec in dataclasses.fields(TrainConfig)]


def _known_keys(cls: type[Any], prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield prefix + name
        nested = next((a for a in (hint, *get_args(hint)) if dataclasses.is_dataclass(a)), None)
        if nested is not None:
            index = "0." if get_origin(hint) is tuple else ""
            yield from _known_keys(nested, f"{prefix}{name}.{index}")  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value

"""Training configurations and overrides through `load_config`."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import yaml

from regionspot.config import config_to_dict, config_to_yaml, flatten, load_config, packaged_configs
from regionspot.errors import RegionSpotError
from tests.fuzz.reference import exact_number
from tests.fuzz.target import attempt, check, write
from tests.fuzz.trees import Note, Tree, for_yaml, mutate_bytes, mutate_values, strange_value


class Configurations:
    """The target."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        configs = [load_config(name) for name in packaged_configs()]
        self._trees = [config_to_dict(config) for config in configs]
        self._keys = sorted({key for config in configs for key in flatten(config)})

    def run(self, rng: random.Random, note: Note) -> bool:
        tree: Tree = rng.choice(self._trees)
        if rng.random() < 0.8:
            tree = for_yaml(mutate_values(tree, rng, note, rng.choice((1, 1, 2))))
        content = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode()
        if rng.random() < 0.2:
            note("bytes changed")
            content = mutate_bytes(content, rng)
        overrides = self._overrides(rng) if rng.random() < 0.3 else []
        note(f"overrides {overrides!r:.300}")
        path = write(self._directory, "config.yaml", content)
        config = attempt(lambda: load_config(path, overrides))
        if isinstance(config, RegionSpotError):
            return False
        again = write(self._directory, "again.yaml", config_to_yaml(config).encode())
        check(load_config(again) == config, "a configuration is not what was written of it")
        read = yaml.safe_load(content)
        if not overrides:
            _check_same(config_to_dict(config), read, "")
        return True

    def _overrides(self, rng: random.Random) -> list[Any]:
        key = rng.choice((*self._keys, "datasets.9.name", "steps.x", "", "a.b"))
        value = rng.choice(
            (strange_value(rng), "[1, 2", "{", "null", "*a", "2026-01-01", "2026-13-45", "[" * 5000)
        )
        return [rng.choice((f"{key}={value}", f"{key}", f"={value}", f"{key}:={value}"))]


def _check_same(config: Any, given: Any, key: str) -> None:
    """Every value that was given is in the configuration."""
    if isinstance(given, dict):
        check(isinstance(config, dict), f"{key}: {given!r:.80} is read as {config!r:.80}")
        for name, value in given.items():
            check(name in config, f"the key {key}.{name} has no effect")
            _check_same(config[name], value, f"{key}.{name}")
    elif isinstance(given, list):
        check(
            isinstance(config, list) and len(config) == len(given),
            f"{key}: {given!r:.80} is read as {config!r:.80}",
        )
        for index, value in enumerate(given):
            _check_same(config[index], value, f"{key}.{index}")
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        same = not isinstance(given, bool) and math.isclose(
            config, exact_number(given), rel_tol=1e-15
        )
        check(same, f"{key}: {given!r:.80} is read as {config}")
    elif isinstance(given, bool) and isinstance(config, str):
        # YAML's own reading
        check(config == ("on" if given else "off"), f"{key}: {given} is read as {config!r}")
    else:
        check(
            type(config) is type(given) and config == given,
            f"{key}: {given!r:.80} is read as {config!r:.80}",
        )

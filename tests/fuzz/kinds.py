"""The kinds of input, how many cases of each `make fuzz` runs, and how many `make test`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.target import Target


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Args:
        target: "module:Class" of its `Target`, which takes a directory to write into.
        cases: of `make fuzz`.
        few: of `make test`; none while there are known failures.
    """

    target: str
    cases: int
    few: int

    def load(self, directory: Path) -> Target:
        module, name = self.target.split(":")
        target: Target = getattr(importlib.import_module(module), name)(directory)
        return target


KINDS = {
    "images": Kind("tests.fuzz.images:Images", 10_000, 300),
    "prompts": Kind("tests.fuzz.prompts:PromptSets", 10_000, 200),
    "annotations": Kind("tests.fuzz.annotations:Annotations", 5_000, 400),
    "proposals": Kind("tests.fuzz.proposals:ProposalFiles", 5_000, 300),
    "checkpoints": Kind("tests.fuzz.checkpoints:Checkpoints", 2_000, 100),
    "vocabularies": Kind("tests.fuzz.vocabularies:Vocabularies", 2_000, 150),
    "configurations": Kind("tests.fuzz.configurations:Configurations", 1_000, 60),
}
FAULTY = Kind("tests.fuzz.faulty:Faulty", 8, 8)
"""Fails in every way that there is: the harness's own test."""


def find_kind(name: str) -> Kind:
    return FAULTY if name == "faulty" else KINDS[name]

"""The exceptions a user meets. Each message says what is wrong, why, and how to mend it."""

from __future__ import annotations


class RegionSpotError(Exception):
    """Base of every error that regionspot raises on purpose."""


class InputError(RegionSpotError, ValueError):
    """Something the user passed in cannot be used: an image, a region, a word, a configuration."""


class ArtifactError(RegionSpotError):
    """A file is damaged, foreign or missing: a checkpoint, a cache shard, an artefact."""

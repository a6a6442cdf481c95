"""What goes into a manifest besides the graphs: preprocessing, versions, the GPU."""

from __future__ import annotations

import platform

import torch

import regionspot
from regionspot.modeling.regionspot import RegionSpot
from regionspot.provenance import version_of
from regionspot.runtime.engine_file import BuildHost
from regionspot.runtime.formats import FORMATS
from regionspot.runtime.nvidia import read_driver
from regionspot.runtime.preprocessing import Preprocessing


def preprocessing_of(model: RegionSpot) -> Preprocessing:
    """What happens to a picture before and in this model's graphs."""
    return Preprocessing.of_this_release(
        sam_mean=_numbers(model.sam.sam.pixel_mean),
        sam_std=_numbers(model.sam.sam.pixel_std),
        clip_mean=_numbers(model.clip.image_mean),
        clip_std=_numbers(model.clip.image_std),
    )


def versions(artefact_format: str) -> dict[str, str]:
    """Release -> version of everything that an artefact of this format is made with; what is absent
    is left out.
    """
    row = FORMATS[artefact_format]
    source = FORMATS[row.made_from].distributions if row.made_from in FORMATS else ()
    names = dict.fromkeys((*source, *row.distributions))
    found = {"regionspot": regionspot.__version__, "python": platform.python_version()}
    return found | {name: version for name in names if (version := version_of(name)) is not None}


def gpu_here() -> tuple[str, str] | None:
    """The name and the compute capability of the GPU that TensorRT's engines are tuned on; None
    without one.
    """
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


def build_host() -> BuildHost | None:
    """Returns what a TensorRT engine that is built here depends on; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    driver = read_driver()
    return BuildHost(10 * major + minor, driver.version if driver else None, torch.version.cuda)


def _numbers(buffer: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in buffer.flatten().tolist())

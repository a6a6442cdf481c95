"""In which TensorRT and on which GPU an engine can be loaded, by its sidecar alone.

By default an engine is of one release and of one kind of GPU; NVIDIA's documentation calls what an
engine may be built for besides version compatibility and hardware compatibility.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from regionspot.runtime.engine_file import EngineSidecar, flavour_named

OLDEST_AMPERE = 80
LATER_MAJORS = {10: 11}
"""Major version -> the later one that loads its version-compatible engines, by the support matrix
of TensorRT 11.4.
"""


def why_not_loadable(
    sidecar: EngineSidecar, tensorrt_version: str | None, compute_capability: int | None
) -> str | None:
    """Returns why an engine will not load, in words that follow "the engine"; None where nothing
    speaks against it.

    What the sidecar does not say, such as the GPU in one of an earlier release, is not judged.

    Args:
        sidecar: of the engine.
        tensorrt_version: of the TensorRT, or TensorRT-RTX, that is to load it, such as
            "11.4.0.106"; versions are compared as far as both go. None is any.
        compute_capability: of the GPU, 89 for 8.9; None is any.
    """
    reasons = []
    if tensorrt_version is not None:
        reasons.append(_why_not_in_version(sidecar, tensorrt_version))
    if compute_capability is not None:
        reasons.append(_why_not_on_gpu(sidecar, compute_capability))
    return "; ".join(filter(None, reasons)) or None


def _why_not_in_version(sidecar: EngineSidecar, version: str) -> str | None:
    flavour = flavour_named(sidecar.flavour)
    built_with = sidecar.versions.get(flavour.module)
    if built_with is None:
        return None
    length = min(len(_numbers(built_with)), len(_numbers(version)))
    built, here = _numbers(built_with)[:length], _numbers(version)[:length]
    if built == here:
        return None
    told = f"was built by {flavour.title} {built_with}, and this is {version}"
    if not sidecar.version_compatible:
        return told
    if here > built and here[0] in (built[0], LATER_MAJORS.get(built[0])):
        return None
    return f"{told}: version-compatible engines load in later releases of the same major version"


def _why_not_on_gpu(sidecar: EngineSidecar, capability: int) -> str | None:
    here = f"and this GPU has {in_words([capability])}"
    if sidecar.compute_capabilities:
        listed = in_words(sidecar.compute_capabilities)
        fits = capability in sidecar.compute_capabilities
        return None if fits else f"was built for GPUs of compute capability {listed}, {here}"
    if sidecar.hardware_compatibility == "ampere_plus":
        least, fits = in_words([OLDEST_AMPERE]), capability >= OLDEST_AMPERE
        return None if fits else f"was built for compute capability {least} and later, {here}"
    host = sidecar.built_on
    if host is None or host.compute_capability == capability:
        return None
    built = in_words([host.compute_capability])
    return f"was built on {sidecar.device or 'a GPU'}, of compute capability {built}, {here}"


def _numbers(version: str) -> tuple[int, ...]:
    """The four numbers of a release, or those that are there: a repackaged ".post1" is the same."""
    found = re.match(r"\d+(?:\.\d+){0,3}", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def in_words(capabilities: Collection[int]) -> str:
    """Returns "8.0, 8.9, 12.0" of (80, 89, 120)."""
    return ", ".join(f"{capability // 10}.{capability % 10}" for capability in capabilities)

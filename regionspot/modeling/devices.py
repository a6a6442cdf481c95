"""Which device the work is done on."""

from __future__ import annotations

import torch

from regionspot.errors import InputError


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it knows shapes but holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"the device {name} cannot be used here ({str(error).splitlines()[0]}): try cpu, or auto"
        ) from error
    return device

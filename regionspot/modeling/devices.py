"""Which device the work is done on."""

from __future__ import annotations

import torch

from regionspot.errors import InputError


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Returns the device of a name: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
    None is the CPU.

    Raises:
        InputError: the device is not there, or cannot be used.
    """
    if name is None:
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it knows shapes but holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"the device {name} cannot be used here ({str(error).splitlines()[0]}): try cpu, or "
            "auto"
        ) from error
    return device

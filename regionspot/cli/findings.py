"""What a check of `regionspot doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only a required thing that fails makes doctor fail."""

    name: str
    status: Status
    detail: str
    mend: str = ""
    required: bool = False

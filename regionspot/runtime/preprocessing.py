"""What happens to a picture before a graph sees it, and in its first layers: written down, so that
it can be checked.

Artefacts carry this record. Code of another release that resizes in another way would give slightly
wrong answers without any error; it refuses them instead.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from regionspot.errors import ArtifactError
from regionspot.transforms import RESIZE


@dataclass(frozen=True)
class Preprocessing:
    """Of both image inputs. The first group is done by the caller (`regionspot.transforms`), the
    second by the graphs.

    Args:
        resize: how pixels are resized.
        sam_frame, clip_frame: what a picture is resized to.
        upright: EXIF orientation is applied first.
        layout, channels, dtype: of the arrays that graphs take.
        sam_mean, sam_std, clip_mean, clip_std: in grey levels of 0 to 255, for each channel.
        padding: what is beyond a picture in SAM's frame, and when it is put there.
    """

    resize: str
    sam_frame: str
    clip_frame: str
    upright: bool
    layout: str
    channels: str
    dtype: str
    sam_mean: tuple[float, ...]
    sam_std: tuple[float, ...]
    clip_mean: tuple[float, ...]
    clip_std: tuple[float, ...]
    padding: str

    @classmethod
    def of_this_release(cls, **normalisation: tuple[float, ...]) -> Preprocessing:
        """What this code does; `normalisation` are the model's own four fields."""
        return cls(
            resize=RESIZE,
            sam_frame="longest side to S, at the top left of S x S",
            clip_frame="whole image to S x S, aspect ratio not kept",
            upright=True,
            layout="NHWC",
            channels="RGB",
            dtype="uint8",
            padding="zero, after normalisation",
            **normalisation,
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Preprocessing:
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in content.items()
        }
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    def check(self, source: object) -> None:
        """Raises ArtifactError unless this is what this release's code does; `source` is where it
        was read.
        """
        own = Preprocessing.of_this_release(
            sam_mean=self.sam_mean,
            sam_std=self.sam_std,
            clip_mean=self.clip_mean,
            clip_std=self.clip_std,
        )
        pairs = {
            field.name: (getattr(self, field.name), getattr(own, field.name))
            for field in fields(self)
        }
        wrong = [
            f"{name}: {theirs!r}, here {ours!r}"
            for name, (theirs, ours) in pairs.items()
            if theirs != ours
        ]
        if wrong:
            raise ArtifactError(
                f"{source} was made for another preprocessing than this release's, so its results "
                f"would be wrong ({'; '.join(wrong)}). Export it again with this release, or use "
                "the release that made it."
            )

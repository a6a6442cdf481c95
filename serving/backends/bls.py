"""A graph that is a model of its own in the same Triton server, called from inside the public model
(BLS).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from regionspot.errors import ArtifactError
from regionspot.runtime.graph_spec import GraphSpec
from regionspot.runtime.runner import Tensors, check_feeds, failed_run
from regionspot.serving.contract import GPU_INDEX


@dataclass(frozen=True, eq=False)
class KeptTensor:
    """An output that stays where Triton left it, on a GPU's repository in the GPU's memory."""

    tensor: Any
    shape: tuple[int, ...]
    nbytes: int


class BlsRunner:
    """A `Runner` over a model of the same server. Safe for several threads at once.

    Triton batches what several threads ask of an encoder at the same time.

    Args:
        spec: of the graph; the model has its name.
        on_gpu: what is kept stays in the memory of the server's first GPU.
    """

    cuts_kept = False

    @property
    def waits_for_gpu(self) -> bool:
        """See `Runner`: with a thread for each, SAM's and CLIP's encoders run at the same time."""
        return self._on_gpu

    def __init__(self, spec: GraphSpec, on_gpu: bool) -> None:
        self.spec, self._on_gpu = spec, on_gpu

    def infer(self, feeds: Tensors, keep: Collection[str] = ()) -> dict[str, Any]:
        """See `Runner.infer`. Of one run either all outputs are kept or none."""
        check_feeds(self.spec, feeds)
        inputs = [
            feeds[name].tensor
            if isinstance(feeds[name], KeptTensor)
            else pb_utils.Tensor(name, np.ascontiguousarray(feeds[name]))
            for name in self.spec.input_names
        ]
        kept = bool(keep)
        memory = (
            pb_utils.TRITONSERVER_MEMORY_GPU
            if kept and self._on_gpu
            else pb_utils.TRITONSERVER_MEMORY_CPU
        )
        request = pb_utils.InferenceRequest(
            model_name=self.spec.name,
            requested_output_names=list(self.spec.output_names),
            inputs=inputs,
            preferred_memory=pb_utils.PreferredMemory(memory, GPU_INDEX),
        )
        response = request.exec()
        if response.has_error():
            raise failed_run(
                self.spec, feeds, Path(self.spec.name), "Triton", response.error().message()
            )
        outputs = {
            name: pb_utils.get_output_tensor_by_name(response, name)
            for name in self.spec.output_names
        }
        if missing := [name for name, tensor in outputs.items() if tensor is None]:
            raise ArtifactError(f"the model {self.spec.name} answered without {', '.join(missing)}")
        if not kept:
            return {name: tensor.as_numpy() for name, tensor in outputs.items()}
        return {name: self._kept(name, tensor, feeds) for name, tensor in outputs.items()}

    def _kept(self, name: str, tensor: Any, feeds: Tensors) -> KeptTensor:
        spec = next(one for one in self.spec.outputs if one.name == name)
        sizes = self.spec.sizes_of({one: feeds[one].shape for one in self.spec.input_names})
        shape = spec.resolved(sizes)
        return KeptTensor(tensor, shape, int(np.prod(shape)) * np.dtype(spec.dtype).itemsize)

    def close(self) -> None:
        """Nothing to give back: the model is the server's."""

    def __enter__(self) -> BlsRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

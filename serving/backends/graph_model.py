"""A graph as a model of Triton's Python backend, in our own runtimes: the repository of a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regionspot.errors import InputError
from regionspot.runtime.artifacts import Manifest
from regionspot.runtime.formats import FORMATS
from regionspot.runtime.opening import open_runner
from regionspot.runtime.runner import Runner
from regionspot.serving.backends.requests import answer_of, arrays_of, refusal_of
from regionspot.serving.contract import RequestError


class TritonPythonModel:
    """Loads its graph when it is first asked: the public model has its own, and most servers need
    no others.
    """

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self._format, self._precision = (
            parameters[name]["string_value"] for name in ("format", "precision")
        )
        self._folder, self._name = Path(args["model_repository"]), args["model_name"]
        self._runner: Runner | None = None

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def _answer(self, request: Any) -> Any:
        try:
            runner = self._opened()
            return answer_of(runner.infer(arrays_of(request, runner.spec.input_names)), request)
        except InputError as error:
            outside = str(self._folder) in str(error)  # a runtime's own words name files
            message = (
                "the graph does not take these sizes: its configuration's parameter spec has their "
                "ranges"
            )
            return refusal_of(
                RequestError("REQUEST_INVALID", message if outside else str(error)), request
            )
        except Exception as error:
            return refusal_of(error, request)

    def _opened(self) -> Runner:
        if self._runner is None:
            manifest = Manifest.load(self._folder.parent)
            entry = manifest.find(self._name, self._format, self._precision)
            self._runner = open_runner(manifest, entry, FORMATS[self._format].runtime, "cpu")
        return self._runner

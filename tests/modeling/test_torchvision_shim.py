"""The shim mends exactly one failure."""

from __future__ import annotations

import importlib
import sys

import pytest

from regionspot.modeling import torchvision_shim
from regionspot.modeling.torchvision_shim import import_safely


def test_both_libraries_import_and_a_second_call_does_nothing() -> None:
    before = list(torchvision_shim._declared)
    import_safely()
    importlib.import_module("segment_anything")
    importlib.import_module("open_clip")
    assert torchvision_shim._declared == before
    assert hasattr(sys.modules["torchvision"], "transforms")


def test_other_failures_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(torchvision_shim._declared)
    failure: Exception = ImportError("No module named 'torchvision'")

    def fail(_: str) -> None:
        raise failure

    monkeypatch.setattr(torchvision_shim.importlib, "import_module", fail)
    import_safely()
    failure = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        import_safely()
    assert torchvision_shim._declared == before

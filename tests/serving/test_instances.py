"""Which instance of the model answers, and how many there are."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from regionspot.errors import InputError
from regionspot.serving.backends.budget import Budget
from regionspot.serving.backends.instances import CpuInstances, Instances, cpu_instances
from regionspot.serving.contract import ServingError


def made(*names: str) -> list[Any]:
    """Instances do not look into what they lend."""
    return list(names)


def test_who_is_alone_gets_all_cores() -> None:
    instances = Instances(made("a", "b"), alone=made("all")[0])
    assert len(instances) == 2
    for _ in range(3):
        with instances.lend(Budget(60)) as first:
            assert first == "all"
            with instances.lend(Budget(60)) as second:
                assert second == "b"
    with ExitStack() as lent:
        lent.enter_context(instances.lend(Budget(60)))
        lent.enter_context(instances.lend(Budget(60)))
        ends = iter([False, False, True])
        with pytest.raises(ServingError, match="was cancelled"):
            lent.enter_context(instances.lend(Budget(60, lambda: next(ends))))


def test_an_instance_comes_back_after_an_error() -> None:
    instances = Instances(made("only"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), instances.lend(Budget(60)):
            raise ZeroDivisionError
    with instances.lend(Budget(60)) as found:
        assert found == "only"


@pytest.mark.parametrize(
    ("cores", "variables", "expected"),
    [
        (1, {}, CpuInstances(1, 1, 1)),
        (2, {}, CpuInstances(2, 1, 2)),
        (16, {}, CpuInstances(4, 4, 16)),
        (6, {}, CpuInstances(4, 1, 6)),
        (16, {"REGIONSPOT_INSTANCES": "1"}, CpuInstances(1, 16, 16)),
        (16, {"REGIONSPOT_INSTANCES": "8"}, CpuInstances(8, 2, 16)),
        (2, {"REGIONSPOT_INSTANCES": "5"}, CpuInstances(5, 1, 2)),
        (16, {"REGIONSPOT_THREADS": "8"}, CpuInstances(2, 8, 8)),
        (2, {"REGIONSPOT_THREADS": "8"}, CpuInstances(1, 8, 8)),
        (2, {"REGIONSPOT_INSTANCES": "3", "REGIONSPOT_THREADS": "2"}, CpuInstances(3, 2, 2)),
    ],
)
def test_cores_are_shared_out(
    cores: int, variables: dict[str, str], expected: CpuInstances
) -> None:
    assert cpu_instances(variables, cores, 1 << 20, 1 << 34) == expected


@pytest.mark.parametrize(("memory_gib", "instances"), [(1, 1), (8, 1), (12, 2), (16, 3), (99, 4)])
def test_copies_of_the_weights_fit(memory_gib: int, instances: int) -> None:
    assert cpu_instances({}, 16, 1 << 30, memory_gib << 30).instances == instances
    asked = cpu_instances({"REGIONSPOT_INSTANCES": "8"}, 16, 1 << 30, memory_gib << 30)
    assert asked.instances == 8


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_wrong_numbers(value: str) -> None:
    with pytest.raises(InputError, match="REGIONSPOT_THREADS must be a number from 1 on"):
        cpu_instances({"REGIONSPOT_THREADS": value}, 2, 1, 1 << 30)

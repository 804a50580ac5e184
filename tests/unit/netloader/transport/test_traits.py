from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter

import pytest

from vllm_ascend.distributed.process_group import BACKENDS
from vllm_ascend.model_loader.netloader import traits, transport
from vllm_ascend.model_loader.netloader.traits import ANY, TABLE, Exposure, Traits
from vllm_ascend.model_loader.netloader.transport.base import CopyingTransport, MappingTransport, Transport
from vllm_ascend.model_loader.netloader.transport.in_process import InProcessTransport
from vllm_ascend.model_loader.netloader.transport.registry import transports

TEST_DOUBLES = {InProcessTransport}


def made() -> dict[str, Transport]:
    """Every transport that a configuration can name, by name."""
    return dict(zip(traits.NAMES, transports(traits.NAMES), strict=True))


def transports_in_package() -> set[type[Transport]]:
    modules = [
        importlib.import_module(f"{transport.__name__}.{module.name}")
        for module in pkgutil.iter_modules(transport.__path__)
    ]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return {each for each in found if issubclass(each, Transport) and not inspect.isabstract(each)}


def test_no_transport_is_without_a_row_and_no_row_without_a_transport() -> None:
    assert {type(each) for each in made().values()} == transports_in_package() - TEST_DOUBLES


def test_a_transport_has_the_traits_of_its_row() -> None:
    for name, each in made().items():
        assert each.traits == traits.traits_of(name, "cpu")
        assert each.name == each.offer().transport == name
        assert isinstance(each, CopyingTransport if each.traits.copies else MappingTransport)


@pytest.mark.parametrize("device", ["cpu", "npu", "another"])
def test_a_transport_has_one_row_for_a_device(device: str) -> None:
    assert set(Counter(row.name for row in traits.rows_for(device)).values()) == {1}


@pytest.mark.parametrize("device", BACKENDS)
def test_the_library_of_process_groups_is_the_one_of_the_row(device: str) -> None:
    assert traits.traits_of("process_group", device).library == BACKENDS[device]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_what_exposes_anything_names_the_library_that_does(row: Traits) -> None:
    assert bool(row.library) == (row.exposure is not Exposure.NOTHING)


def test_a_device_that_no_row_names_is_served_by_those_for_any() -> None:
    assert {row.device for row in traits.rows_for("another")} == {ANY}
    with pytest.raises(KeyError):
        traits.traits_of("shared_memory", "another")

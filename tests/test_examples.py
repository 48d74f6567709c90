"""The examples in docstrings say what happens."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import layerskip.decode
import layerskip.model

MODULES = [
    module.name
    for package in (layerskip.decode, layerskip.model)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(import_module(name)).failed == 0


def test_there_are_examples() -> None:
    assert sum(doctest.testmod(import_module(name)).attempted for name in MODULES) >= 20

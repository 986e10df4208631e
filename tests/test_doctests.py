"""The examples in docstrings give what they show."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import dimscope

PACKAGES = ("geometry", "vectors", "texts")
MODULES = [
    f"dimscope.{package}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules([f"{dimscope.__path__[0]}/{package}"])
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(import_module(name)).failed == 0

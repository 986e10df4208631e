"""The names that `import dimscope` promises, and what importing it must not cost."""

import json

import pytest

import dimscope


@pytest.mark.parametrize("name", dimscope.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    assert getattr(dimscope, name).__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing_such"):
        dimscope.nothing_such  # noqa: B018


def test_importing_the_package_loads_no_heavy_library(run_python):
    code = "import sys, json, dimscope; print(json.dumps(sorted({'torch', 'transformers', 'polars', 'plotly'} & set(sys.modules))))"
    assert json.loads(run_python("-c", code).stdout) == []

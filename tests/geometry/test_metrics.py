"""Each measure has one name, one identifier and a definition number."""

import subprocess
import sys

import pytest
import torch

from dimscope.geometry.dimension import linear_dimensions
from dimscope.geometry.intrinsic import intrinsic_dimensions
from dimscope.geometry.metrics import METRICS, metric_of, slug_of
from dimscope.geometry.spectrum import spectrum_of


def test_every_measure_is_complete_and_has_an_identifier_of_its_own():
    assert len({m.slug for m in METRICS.values()}) == len(METRICS)
    for name, metric in METRICS.items():
        assert (metric.name, metric.definition >= 1, metric.slug.isidentifier()) == (name, True, True)
        assert metric.summary
        assert metric.unit


def test_what_geometry_computes_is_registered():
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    names = [d.metric for d in linear_dimensions(spectrum_of(rows))] + [e.metric for e in intrinsic_dimensions(rows)]
    assert {metric_of(name).name for name in names} <= set(METRICS)
    assert len({slug_of(name) for name in names}) == len(set(names))
    with pytest.raises(KeyError):
        metric_of("no such measure")


def test_names_are_read_without_torch():
    code = "import sys, dimscope.geometry.metrics; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""All dimensions of vectors at once: the numbers of the family, beside white noise, as a table."""

import pytest
import torch
from matrices import gaussian

from dimscope.errors import InvalidArgument
from dimscope.geometry.dimension import linear_dimensions
from dimscope.geometry.dimension_table import dimensions_of
from dimscope.geometry.nulls import white_noise_spectrum
from dimscope.geometry.spectrum import spectrum, spectrum_of
from dimscope.vectors.moments import moments
from dimscope.vectors.table import table_from_tensor

NAMES = [
    "variance_count_80", "variance_count_90", "variance_count_95", "variance_count_99", "numerical_rank",
    "participation_ratio", "participation_ratio_corrected", "effective_rank_sigma", "effective_rank_lambda", "stable_rank",
]  # fmt: skip


@pytest.mark.parametrize("centred", [True, False])
def test_values_are_those_of_the_family_and_nulls_those_of_white_noise(centred):
    x = gaussian(300, 12) @ torch.diag(torch.arange(1.0, 13)) + 2
    result = dimensions_of(moments([x], dtype=torch.float64), centred=centred)
    measured = spectrum(moments([x], dtype=torch.float64), centred=centred)
    noise = white_noise_spectrum(300, 12, 3.0, centred=centred)
    assert list(result) == NAMES
    assert [d.value for d in result.values()] == [d.value for d in linear_dimensions(measured)]
    assert [d.null for d in result.values()] == pytest.approx([d.value for d in linear_dimensions(noise)])
    assert (result.n_rows, result.dim, result.preprocess) == (300, 12, "centred" if centred else "uncentred")


def test_rows_table_moments_and_spectrum_are_the_same_source():
    x = gaussian(60, 5)
    sums = moments([x], dtype=torch.float64)
    rows, table, sums, measured = (dimensions_of(s) for s in (x, table_from_tensor(x), sums, spectrum_of(x)))
    for name in NAMES:
        assert table[name].value == sums[name].value
        assert rows[name].value == pytest.approx(sums[name].value, rel=1e-12) == measured[name].value


def test_white_noise_is_as_wide_as_its_null():
    for d in dimensions_of(gaussian(4000, 20)).values():
        assert d.value == pytest.approx(d.null, rel=0.02, abs=1)


def test_the_table_has_a_line_per_measure():
    result = dimensions_of(gaussian(1200, 8))
    lines = str(result).splitlines()
    assert lines[0] == "Dimensions of 1,200 x 8 vectors, centred"
    assert [line.split()[0] for line in lines[2:]] == NAMES
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[6].split() == ["numerical_rank", "8", "8", "100.0%"]
    html = result._repr_html_()
    assert html.count("<tr>") == 11
    assert "participation_ratio_corrected" in html


def test_the_frame_has_a_row_per_measure():
    result = dimensions_of(gaussian(50, 4), thresholds=(0.995,))
    frame = result.to_frame()
    assert frame["metric"].to_list()[:2] == ["variance count 99.5%", "numerical rank"]
    assert next(iter(result)) == "variance_count_99_5"
    row = frame.row(2, named=True)
    expected = result["participation_ratio"]
    assert (row["value"], row["null"], row["share_of_dim"]) == (expected.value, expected.null, expected.value / 4)
    assert (row["n_rows"], row["dim"], row["preprocess"], row["order"]) == (50, 4, "centred", 2.0)


def test_names_thresholds_and_rows_that_do_not_exist():
    with pytest.raises(KeyError, match="no measure 'rank'; the measures are variance_count_80"):
        dimensions_of(gaussian(9, 3))["rank"]
    for thresholds in ((0.0,), (1.5,), (95,)):
        with pytest.raises(InvalidArgument, match="`thresholds` must be shares"):
            dimensions_of(gaussian(9, 3), thresholds=thresholds)
    with pytest.raises(InvalidArgument, match="at least 2 rows, got 1"):
        dimensions_of(gaussian(1, 3))
    assert dimensions_of(gaussian(1, 3), centred=False)["stable_rank"].value == pytest.approx(1)
    zeros = dimensions_of(torch.zeros(5, 3))
    assert zeros["variance_count_95"].value == 0
    assert str(zeros).splitlines()[8].split()[:2] == ["participation_ratio_corrected", "undefined"]
    assert zeros.to_frame()["value"].null_count() == 1

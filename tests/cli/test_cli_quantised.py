"""Quantised checkpoints: always inspected, studied where the table can be read, never narrowed."""

from __future__ import annotations

import json

import damage
import pytest

pytestmark = pytest.mark.slow  # whole commands or studies

READABLE = ("bitsandbytes_int8", "fp8")  # formats of tables with a documented dequantisation


def spectrum(cli, folder):
    printed = cli("spectrum", folder, "--json")
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout)


@pytest.mark.parametrize("method", damage.QUANTIZATIONS)
@pytest.mark.parametrize("tables", [False, True])
def test_the_budget_is_that_of_the_model_and_the_table_is_studied_where_it_can_be_read(
    checkpoint, editable, refuses, cli, method, tables
):
    stock = checkpoint("llama")
    folder = damage.quantize(editable(stock), method, tables=tables)
    whole, packed = (json.loads(cli("inspect", path, "--json").stdout) for path in (stock, folder))
    assert packed["n_parameters"] == whole["n_parameters"]
    assert packed["embedding_share"] == pytest.approx(whole["embedding_share"])
    sums = [{r["role"]: r["n_parameters"] for r in found["roles"] if r["n_parameters"]} for found in (whole, packed)]
    assert sums[0] == sums[1]
    if tables and method not in READABLE:
        refuses(folder, "quantised from", command="spectrum")
    elif tables:
        found, expected = (spectrum(cli, path)["dimensions"] for path in (folder, stock))
        for one, other in zip(found, expected, strict=True):
            if one["metric"] == "participation ratio":
                assert one["value"] == pytest.approx(other["value"], rel=0.01)
    else:
        assert spectrum(cli, folder)["spectrum"] == spectrum(cli, stock)["spectrum"]
    refuses(folder, "quantised", command="narrow", options=("--width", "16"))

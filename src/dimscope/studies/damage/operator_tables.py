"""The tables of a random projection as a matrix: its entries, compared with theory."""

import polars as pl
import torch
from torch import Tensor

from dimscope.interventions.operators import operator_statistics

BLOCK_SIDE = 100  # rows and columns of the top left of an operator that are shown, as many as the notebook showed
N_BINS = 61
METRICS = {
    "mean of the diagonal": "diagonal_mean",
    "sd of the diagonal": "diagonal_sd",
    "sd off the diagonal": "off_diagonal_sd",
}


def operator_frame(projector: Tensor, k: int) -> pl.DataFrame:
    """Return mean and standard deviations of the entries of a random projection on `k` dimensions, beside theory."""
    statistics = operator_statistics(projector, k)
    rows = [
        {"k": k, "d": len(projector), "metric": metric, "value": getattr(statistics, name),
         "null": getattr(statistics, f"expected_{name}")}
        for metric, name in METRICS.items()
    ]  # fmt: skip
    return pl.DataFrame(rows)


def operator_block_frame(projector: Tensor) -> pl.DataFrame:
    """Return the top left of an operator, entry by entry."""
    side = min(BLOCK_SIDE, len(projector))
    row, column = pl.int_range(side, eager=True), pl.int_range(side, eager=True)
    places = pl.DataFrame({"row": row}).join(pl.DataFrame({"column": column}), how="cross")
    return places.with_columns(pl.Series("value", projector[:side, :side].flatten().numpy()))


def operator_histogram_frame(projector: Tensor) -> pl.DataFrame:
    """Return the density of the entries off the diagonal, in units of their expected standard deviation."""
    d = len(projector)
    rest = projector[~torch.eye(d, dtype=torch.bool)]
    k = round(float(projector.trace()))
    sd = operator_statistics(projector, k).expected_off_diagonal_sd
    scaled = rest / sd if sd else rest
    edges = torch.linspace(-5, 5, N_BINS + 1, dtype=torch.float64)
    counts = torch.histogram(scaled, bins=edges).hist
    middle, width = (edges[1:] + edges[:-1]) / 2, 10 / N_BINS
    density = (counts / len(rest) / width).numpy()
    return pl.DataFrame({"middle": middle.numpy(), "density": density}).with_columns(sd=pl.lit(sd), k=pl.lit(k))

"""The tables about directions, for each population of rows: the spectrum and the linear dimensions, beside their nulls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from dimscope.geometry.dimension import Dimension, linear_dimensions
from dimscope.geometry.nulls import permuted_moments, permuted_spectrum, white_noise_spectrum
from dimscope.geometry.spectrum import Spectrum, spectrum
from dimscope.studies.embedding.populations import RowSet, per_population


def spectra_frame(populations: Sequence[RowSet], draws: int, seed: int) -> pl.DataFrame:
    """Return the `spectrum_frame` of every population.

    Only the leading population of each table is permuted: a draw takes a pass over the table, which the moments of the
    others do not need. Their columns of the permuted table are null.
    """
    leading = {id(next(rows for rows in populations if rows.table_name == name)) for name in _names(populations)}
    return per_population(populations, lambda rows: spectrum_frame(rows, draws if id(rows) in leading else 0, seed))


def _names(populations: Sequence[RowSet]) -> set[str]:
    return {rows.table_name for rows in populations}


def spectrum_frame(rows: RowSet, draws: int, seed: int) -> pl.DataFrame:
    """Return singular values, centred and not, beside those of a Gaussian table and, for draws, of the column-permuted table."""
    shuffled = permuted_moments(rows.table, draws=draws, seed=seed)
    parts = []
    for centred in (True, False):
        measured = spectrum(rows.moments, centred=centred)
        share = measured.explained_variance_ratio
        permuted = permuted_spectrum(shuffled, centred=centred) if shuffled else None
        columns = {
            "table": [rows.table_name] * len(share),
            "rows": [rows.rows] * len(share),
            "preprocess": [measured.preprocess] * len(share),
            "index": np.arange(1, len(share) + 1),
            "singular_value": measured.singular_values.numpy(),
            "explained_variance_ratio": share.numpy(),
            "cumulative": share.cumsum(0).numpy(),
            "gaussian_singular_value": gaussian_like(measured).singular_values.numpy(),
            "permuted_singular_value": permuted.mean.singular_values.numpy() if permuted else None,
            "permuted_sd": permuted.sd.numpy() if permuted else None,
        }
        parts.append(
            pl.DataFrame(columns, schema_overrides={"permuted_singular_value": pl.Float64, "permuted_sd": pl.Float64})
        )
    return pl.concat(parts)


def gaussian_like(measured: Spectrum) -> Spectrum:
    """Return the expected spectrum of a Gaussian table of the same shape and standard deviation."""
    n = max(measured.n_rows - measured.centred, 1)
    std = math.sqrt(float(measured.singular_values.square().sum()) / (n * measured.dim))
    return white_noise_spectrum(measured.n_rows, measured.dim, std, centred=measured.centred)


def dimensions_frame(rows: RowSet, spectra: pl.DataFrame) -> pl.DataFrame:
    """Return every linear dimension of the family, beside its value on the two nulls of the same shape, where these exist."""
    n_rows, dim, records = rows.table.n_used, rows.table.dim, []
    for preprocess in ("centred", "uncentred"):
        part = spectra.filter(table=rows.table_name, rows=rows.rows, preprocess=preprocess)

        def family(column: str, part: pl.DataFrame = part, centred: bool = preprocess == "centred") -> list[Dimension]:
            return linear_dimensions(Spectrum(torch.from_numpy(part[column].to_numpy().copy()), n_rows, dim, centred))

        measured, gaussian = (family(f"{c}singular_value") for c in ("", "gaussian_"))
        column = "permuted_singular_value"
        permuted = [d.value for d in family(column)] if part[column].null_count() == 0 else [None] * len(measured)
        records += [
            (
                rows.table_name,
                rows.rows,
                d.metric,
                preprocess,
                d.spectrum,
                d.order,
                d.value,
                noise.value,
                of_permuted,
                n_rows,
                dim,
            )
            for d, noise, of_permuted in zip(measured, gaussian, permuted, strict=True)
        ]
    text, value, n = pl.String, pl.Float64, pl.Int64
    schema = {
        "table": text, "rows": text, "metric": text, "preprocess": text, "spectrum": text, "order": value, "value": value,
        "null_gaussian": value, "null_permuted": value, "n_tokens": n, "dim": n,
    }  # fmt: skip
    return pl.DataFrame(records, schema=schema, orient="row").fill_nan(
        None
    )  # a table without variance has no dimension

"""The tables of the damage study: what was measured at a point, one row for each number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.evaluation.evaluate import SUMS, Evaluation, evaluation_of
from dimscope.evaluation.generation import Continuation
from dimscope.evaluation.metrics import BITS, KL, LOSS, PERPLEXITY, RISE, TOP_1, UNIGRAMS
from dimscope.evaluation.prompts import Prompt
from dimscope.interventions.maps import LinearMap, RowMap, exact_error
from dimscope.interventions.perturbations import find_perturbation
from dimscope.interventions.row_errors import Ratio, RowErrors
from dimscope.interventions.table_summary import TableSummary
from dimscope.studies.damage.plan import UNDAMAGED, Point, Table

POINT: dict[str, Any] = {
    "model": pl.String, "change": pl.String, "kind": pl.String, "strength": pl.Float64, "unit": pl.String,
    "kept_share": pl.Float64, "side": pl.String, "seed": pl.Int64,
}  # fmt: skip
DAMAGE = POINT | {
    "table": pl.String, "text": pl.String, "metric": pl.String, "value": pl.Float64, "stderr": pl.Float64,
    "null": pl.Float64, "n_tokens": pl.Int64,
}  # fmt: skip
WINDOWS = POINT | {"text": pl.String, "window": pl.Int64} | dict.fromkeys(SUMS, pl.Float64)
GENERATIONS = POINT | {
    "number": pl.Int64, "prompt": pl.String, "chat": pl.Boolean, "continuation": pl.String, "n_tokens": pl.Int64,
    "repetition": pl.Float64, "ids": pl.List(pl.Int64),
}  # fmt: skip

ERROR, RELATIVE = "error", "relative error"
CAST, NORMED, COSINE = "relative error, cast", "relative error, first norm", "cosine"


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number of the table `damage`.

    Attributes:
        metric: Its name.
        value: The number.
        n_tokens: Over how many tokens: rows of a table, or positions of a text.
        stderr: Its standard error, where it is estimated from a sample.
        null: The value that theory expects, where there is a closed form.
    """

    metric: str
    value: float
    n_tokens: int
    stderr: float | None = None
    null: float | None = None


def point_columns(model: str, point: Point, dim: int) -> dict[str, Any]:
    """Return the columns that identify a point.

    `kept_share` is the share of the dimensions that a change keeps, null for changes that keep or drop none.
    """
    return {
        "model": model, "change": point.label, "kind": point.kind, "strength": point.strength, "unit": point.unit,
        "kept_share": None if point.n_kept is None else point.n_kept / dim, "side": point.side, "seed": point.seed,
    }  # fmt: skip


def error_numbers(change: RowMap, table: TableSummary, sampled: RowErrors, point: Point) -> list[Measurement]:
    """Return the errors of one table: exact by its moments where the map is linear, else of a sample of rows."""
    norm = table.norm
    if isinstance(change, LinearMap):
        relative = Ratio(exact_error(change, table.moments) / norm, 0.0) if norm else Ratio(0.0, 0.0)
        n, stderr = table.moments.count, None
    else:
        relative, n = sampled.plain, sampled.n
        stderr = relative.stderr if n < table.moments.count else None
    expected = _closed_form(point, table)
    numbers = [
        Measurement(ERROR, relative.value * norm, n, None if stderr is None else stderr * norm, expected),
        Measurement(RELATIVE, relative.value, n, stderr, None if expected is None or not norm else expected / norm),
        Measurement(COSINE, sampled.cosine, sampled.n),
        Measurement(CAST, sampled.cast.value, sampled.n, sampled.cast.stderr),
    ]
    if sampled.normed is not None:
        numbers.append(Measurement(NORMED, sampled.normed.value, sampled.n, sampled.normed.stderr))
    return numbers


def _closed_form(point: Point, table: TableSummary) -> float | None:
    """Return the error that theory expects of a single perturbation, where it has a closed form."""
    if len(point.steps) != 1:
        return None
    name, strength = point.steps[0]
    formula = find_perturbation(name).expected
    return None if formula is None else formula(table, strength)


def evaluation_numbers(result: Evaluation, entropy: float | None = None) -> list[Measurement]:
    """Return what a text costs, and how far the model is from the undamaged one.

    Args:
        result: The evaluation.
        entropy: The unigram entropy of the text, which stands with the undamaged model.
    """
    n_predicted, n_positions = result.n_predicted, result.n_positions
    loss, rise, bits, kl, top_1 = result.loss, result.loss_rise, result.bits_per_byte, result.kl, result.top_1
    unigrams = [] if entropy is None else [Measurement(UNIGRAMS, entropy, n_predicted)]
    return [
        Measurement(LOSS, loss.value, n_predicted, loss.stderr),
        Measurement(RISE, rise.value, n_predicted, rise.stderr),
        Measurement(PERPLEXITY, result.perplexity, n_predicted),
        Measurement(BITS, bits.value, n_predicted, bits.stderr),
        Measurement(KL, kl.value, n_positions, kl.stderr),
        Measurement(TOP_1, top_1.value, n_positions, top_1.stderr),
        *unigrams,
    ]


def windows_frame(columns: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> pl.DataFrame:
    """Return the rows of a point in the table `windows`: the sums of every window of every text.

    Args:
        columns: What `point_columns` returns.
        evaluations: Evaluations by the name of the text.
    """
    rows = [
        {**columns, "text": text, "window": window, **dict(zip(SUMS, sums, strict=True))}
        for text, evaluation in evaluations.items()
        for window, sums in enumerate(evaluation.sums.tolist())
    ]
    frame = pl.DataFrame(rows, schema=WINDOWS)
    return frame.with_columns(pl.when(pl.col(c).is_finite()).then(pl.col(c)) for c in SUMS)


def window_sums(windows: pl.DataFrame) -> Float[Tensor, "g 7"]:
    """Return the sums of some rows of the table `windows`, NaN where a model overflows."""
    columns = windows.select(pl.col(c).fill_null(math.nan) for c in SUMS)
    return torch.from_numpy(columns.to_numpy().astype(np.float64))


def evaluations_of(windows: pl.DataFrame) -> dict[str, Evaluation]:
    """Return the evaluation of a point on every text, from its rows of the table `windows`."""
    parts = windows.partition_by("text", maintain_order=True, as_dict=True)
    return {str(text): evaluation_of(window_sums(rows)) for (text,), rows in parts.items()}


def damage_frame(
    columns: Mapping[str, Any],
    errors: Mapping[Table, Sequence[Measurement]],
    evaluations: Mapping[str, Sequence[Measurement]],
) -> pl.DataFrame:
    """Return the rows of a point in the table `damage`.

    Args:
        columns: What `point_columns` returns.
        errors: Errors by the table, "input" or "output"; their column `text` is null.
        evaluations: Numbers by the name of the text; their column `table` is null.
    """
    rows = [{"table": name, **asdict(number)} for name, numbers in errors.items() for number in numbers]
    rows += [{"text": name, **asdict(number)} for name, numbers in evaluations.items() for number in numbers]
    frame = pl.DataFrame([{**columns, **row} for row in rows], schema=DAMAGE)
    # The numbers of a model that overflows are null, which JSON and figures know.
    return frame.with_columns(pl.when(pl.col(c).is_finite()).then(pl.col(c)) for c in ("value", "stderr", "null"))


def generations_frame(
    columns: Mapping[str, Any], prompts: Sequence[Prompt], continuations: Sequence[Continuation]
) -> pl.DataFrame:
    """Return the rows of a point in the table `generations`: the continuation of each prompt."""
    rows = [
        {
            "number": number, "prompt": prompt.text, "chat": prompt.chat, "continuation": continuation.text,
            "n_tokens": len(continuation.ids), "repetition": continuation.repetition, "ids": list(continuation.ids),
        }
        for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True))
    ]  # fmt: skip
    return pl.DataFrame([{**columns, **row} for row in rows], schema=GENERATIONS)


def with_agreement(generations: pl.DataFrame) -> pl.DataFrame:
    """Return the table with `n_same`: how many tokens from the first on are those of the undamaged model."""
    own = {row["number"]: row["ids"] for row in generations.filter(pl.col("kind") == UNDAMAGED).iter_rows(named=True)}

    def same(number: int, ids: Sequence[int]) -> int:
        pairs = list(zip(ids, own[number], strict=False))
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))

    counts = [same(number, ids) for number, ids in generations.select("number", "ids").iter_rows()]
    return generations.with_columns(pl.Series("n_same", counts, dtype=pl.Int64))

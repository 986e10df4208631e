"""The tables of the damage study: what was measured at a point, one row for each number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from dimscope.evaluation.evaluate import Evaluation
from dimscope.evaluation.generation import Continuation
from dimscope.evaluation.metrics import BITS, KL, LOSS, PERPLEXITY, RISE, TOP_1
from dimscope.evaluation.prompts import Prompt
from dimscope.interventions.maps import LinearMap, RowMap, exact_error
from dimscope.interventions.operators import operator_statistics
from dimscope.interventions.perturbations import find_perturbation
from dimscope.interventions.row_errors import Ratio, RowErrors
from dimscope.interventions.table_summary import TableSummary
from dimscope.studies.damage.plan import UNDAMAGED, Point

PLACE: dict[str, Any] = {
    "model": pl.String, "change": pl.String, "kind": pl.String, "strength": pl.Float64, "unit": pl.String,
    "kept": pl.Float64, "side": pl.String, "seed": pl.Int64,
}  # fmt: skip
DAMAGE = PLACE | {
    "on": pl.String, "metric": pl.String, "value": pl.Float64, "stderr": pl.Float64, "expected": pl.Float64,
    "n": pl.Int64,
}  # fmt: skip
GENERATIONS = PLACE | {
    "number": pl.Int64, "prompt": pl.String, "chat": pl.Boolean, "text": pl.String, "n_tokens": pl.Int64,
    "repetition": pl.Float64, "ids": pl.List(pl.Int64),
}  # fmt: skip

ERROR, RELATIVE = "error", "relative error"
CAST, NORMED, COSINE = "relative error, cast", "relative error, first norm", "cosine"


@dataclass(frozen=True, slots=True)
class Place:
    """What the rows of a point have in common."""

    model: str
    point: Point
    dim: int

    def columns(self) -> dict[str, Any]:
        """`kept` is the share of the dimensions that are kept, null for changes that keep or drop none."""
        point = self.point
        unit = find_perturbation(point.steps[0][0]).unit if point.strength is not None else None
        kept = point.kept()
        return {
            "model": self.model, "change": point.label, "kind": point.kind, "strength": point.strength, "unit": unit,
            "kept": None if kept is None else kept / self.dim, "side": point.side, "seed": point.seed,
        }  # fmt: skip


Number = tuple[str, float, float | None, float | None, int]  # metric, value, stderr, expected, n


def error_numbers(change: RowMap, table: TableSummary, sampled: RowErrors, point: Point) -> list[Number]:
    """The errors of one table: exact by its moments where the map is linear, else told by a sample of rows.

    `expected` is the closed form, where the perturbation has one.
    """
    norm, closed = table.norm, None
    if len(point.steps) == 1:
        name, strength = point.steps[0]
        formula = find_perturbation(name).expected
        closed = None if formula is None else formula(table, strength)
    if isinstance(change, LinearMap):
        exact = Ratio(exact_error(change, table.moments) / norm, 0.0) if norm else Ratio(0.0, 0.0)
        n, stderr = table.moments.count, None
    else:
        exact, n = sampled.plain, sampled.n
        stderr = exact.stderr if n < table.moments.count else None
    share = None if closed is None or not norm else closed / norm
    numbers: list[Number] = [
        (ERROR, exact.value * norm, None if stderr is None else stderr * norm, closed, n),
        (RELATIVE, exact.value, stderr, share, n),
        (COSINE, sampled.cosine, None, None, sampled.n),
    ]
    others = {CAST: sampled.cast, NORMED: sampled.normed}
    return numbers + [(k, v.value, v.stderr, None, sampled.n) for k, v in others.items() if v is not None]


def judged_numbers(found: Evaluation) -> list[Number]:
    """What a text costs, and how far the model is from what it was."""
    return [
        (LOSS, found.loss, None, None, found.n_predicted),
        (RISE, found.loss_rise, found.loss_rise_stderr, None, found.n_predicted),
        (PERPLEXITY, found.perplexity, None, None, found.n_predicted),
        (BITS, found.bits_per_byte, None, None, found.n_predicted),
        (KL, found.kl, found.kl_stderr, None, found.n_positions),
        (TOP_1, found.top_1, None, None, found.n_positions),
    ]


def damage_frame(place: Place, numbers: Mapping[str, Sequence[Number]]) -> pl.DataFrame:
    """Rows of the table `damage`; `on` is the table whose error it is ("input table"), or the text that was judged."""
    names = ("metric", "value", "stderr", "expected", "n")
    rows = [{"on": on, **dict(zip(names, found, strict=True))} for on, all_ in numbers.items() for found in all_]
    frame = pl.DataFrame([place.columns() | row for row in rows], schema=DAMAGE)
    # A model that overflows is told by gaps, which JSON and figures know.
    return frame.with_columns(pl.when(pl.col(c).is_finite()).then(pl.col(c)) for c in ("value", "stderr", "expected"))


def generations_frame(place: Place, prompts: Sequence[Prompt], found: Sequence[Continuation]) -> pl.DataFrame:
    """Rows of the table `generations`: what was written after each prompt."""
    rows = [
        {
            "number": number, "prompt": prompt.text, "chat": prompt.chat, "text": written.text,
            "n_tokens": len(written.ids), "repetition": written.repetition, "ids": list(written.ids),
        }
        for number, (prompt, written) in enumerate(zip(prompts, found, strict=True))
    ]  # fmt: skip
    return pl.DataFrame([place.columns() | row for row in rows], schema=GENERATIONS)


def with_agreement(generations: pl.DataFrame) -> pl.DataFrame:
    """The table with `n_same`: how many tokens from the first on are those of the undamaged model."""
    own = {row["number"]: row["ids"] for row in generations.filter(pl.col("kind") == UNDAMAGED).iter_rows(named=True)}

    def same(number: int, ids: Sequence[int]) -> int:
        pairs = list(zip(ids, own[number], strict=False))
        return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))

    counts = [same(number, ids) for number, ids in generations.select("number", "ids").iter_rows()]
    return generations.with_columns(pl.Series("n_same", counts, dtype=pl.Int64))


# ---- the operator of a random projection ---------------------------------------------------------------------------

BLOCK = 100  # rows and columns of the top left of an operator that are shown, as many as the notebook showed
BINS = 61


def operator_frame(projector: Any, k: int) -> pl.DataFrame:
    """Mean and standard deviations of the entries of a random projection beside theory, by metric."""
    found = operator_statistics(projector, k)
    names = {
        "mean of the diagonal": "diagonal_mean",
        "sd of the diagonal": "diagonal_sd",
        "sd off it": "off_diagonal_sd",
    }
    rows = [
        {"k": k, "d": len(projector), "metric": told, "value": getattr(found, name), "expected": getattr(found, f"expected_{name}")}
        for told, name in names.items()
    ]  # fmt: skip
    return pl.DataFrame(rows)


def operator_block_frame(projector: Any) -> pl.DataFrame:
    """The top left of an operator, entry by entry."""
    side = min(BLOCK, len(projector))
    row, column = pl.int_range(side, eager=True), pl.int_range(side, eager=True)
    places = pl.DataFrame({"row": row}).join(pl.DataFrame({"column": column}), how="cross")
    return places.with_columns(pl.Series("value", projector[:side, :side].flatten().numpy()))


def operator_histogram_frame(projector: Any) -> pl.DataFrame:
    """The entries off the diagonal, as a density in units of their expected standard deviation."""
    import torch

    d = len(projector)
    rest = projector[~torch.eye(d, dtype=torch.bool)]
    k = round(float(projector.trace()))
    sd = operator_statistics(projector, k).expected_off_diagonal_sd
    scaled = rest / sd if sd else rest
    edges = torch.linspace(-5, 5, BINS + 1, dtype=torch.float64)
    counts = torch.histogram(scaled, bins=edges).hist
    middle, width = (edges[1:] + edges[:-1]) / 2, 10 / BINS
    return pl.DataFrame({"middle": middle.numpy(), "density": (counts / len(rest) / width).numpy()}).with_columns(
        sd=pl.lit(sd), k=pl.lit(k)
    )

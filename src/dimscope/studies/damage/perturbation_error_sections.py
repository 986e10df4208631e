"""Sections about the errors of the table: compared with the loss, with theory, and a random projection as a matrix."""

from dataclasses import dataclass

import polars as pl

from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import count, listed, number, sentence
from dimscope.studies.damage import figures
from dimscope.studies.damage.curves import Damage, kind_name, shown_damages
from dimscope.studies.damage.figures import UNIT_AXES
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import CAST, COSINE, LOSS, NORMED, RELATIVE

ROWS_PER_KIND = 4  # changes of one kind that the table of errors shows at most
SAME_ERROR = 0.05  # relative difference up to which two errors count as equal


def error_section(tables: Tables, facts: Facts) -> Section | None:
    """Return that equal error is not equal damage, and how well the errors agree with theory."""
    shown, frame = shown_damages(tables), table(tables, "damage")
    if not shown or frame is None or not shown[0].kinds():
        return None
    first = shown[0]
    by_error = figures.damage_by_error(first)
    plots = [Plot("damage-error", by_error, "loss by the relative error of the table", "Loss by relative error")]
    errors = finite(finite(frame.filter(pl.col("metric") == RELATIVE)), "null").filter(pl.col("null") > 0)
    if errors.height:
        caption = "Measured error by the error that theory expects"
        plots.append(Plot("damage-closed", figures.closed_form(frame), "measured by expected errors", caption))
    return Section(
        anchor="perturbation_errors",
        name="Perturbation errors",
        title=_equal_error(first),
        findings=_agreement(errors),
        blocks=(*plots, _errors_grid(first)),
        how_to_read=(
            "In the first figure, changes at the same horizontal position move the table equally far. Where their losses "
            "differ, the direction of an error matters and not only its size. In the second figure, a change on the dashed "
            "diagonal has the error that theory expects. The table lists errors of one seed of each change: of the table as "
            "it is, after rounding to the dtype of the computation, and after the first norm, as the first block reads it."
        ),
        caveat=(
            "The relative error is the Frobenius norm over all tokens of the vocabulary, however rare they are in the text; "
            "the loss is over the tokens of the text. Errors after rounding and after the first norm are measured on a "
            "sample of rows, without positions added. A norm removes a factor common to all rows, so that scaling is no "
            "error for the first block; later blocks add to the unscaled embeddings and do see it."
        ),
        tables=("damage",),
    )


@dataclass(frozen=True, slots=True)
class ErrorAndLoss:
    """A change, the relative error that it makes, and the loss after it."""

    kind: str
    error: float
    loss: float


def _equal_error(damage: Damage) -> str:
    """Return the two kinds with the most different losses at nearly equal error."""
    changes = [
        ErrorAndLoss(kind, error, loss)
        for kind in damage.kinds()
        for error, loss in damage.curve(LOSS, kind).select("error", "value").iter_rows()
        if error is not None and error > 0
    ]
    pairs = [
        (a, b)
        for a in changes
        for b in changes
        if a.kind != b.kind and abs(a.error - b.error) <= SAME_ERROR * a.error and a.loss < b.loss
    ]
    if not pairs:
        return "The error of the table, and the loss after it"
    low, high = max(pairs, key=lambda pair: pair[1].loss - pair[0].loss)
    return (
        f"Equal error is not equal damage: at a relative error of about {low.error:.2g}, the loss is {number(low.loss)} after "
        f"{kind_name(low.kind)} and {number(high.loss)} after {kind_name(high.kind)}"
    )


def _agreement(errors: pl.DataFrame) -> tuple[str, ...]:
    """Return how far measured errors are from theory: of changes without randomness, and on average over seeds."""
    clauses = []
    for random, kind in ((False, "changes without randomness"), (True, "random changes")):
        rows = errors.filter(pl.col("seed").is_not_null() == random)
        means = rows.group_by("change", "side", "table").agg(pl.col("value").mean(), pl.col("null").mean(), pl.len())
        if means.is_empty():
            continue
        gap = float((means["value"] / means["null"] - 1).abs().to_numpy().max())
        seeds = f", averaged over {count(int(means['len'].to_numpy().max()), 'seed')}" if random else ""
        clauses.append(f"within {gap:.1%} for {kind}{seeds}" if gap >= 0.001 else f"within 0.1% for {kind}{seeds}")
    return (f"The measured errors agree with theory {' and '.join(clauses)}.",) if clauses else ()


def _errors_grid(damage: Damage) -> Grid:
    metrics = (RELATIVE, CAST, NORMED, COSINE, LOSS)
    rows = finite(damage.rows.filter(pl.col("metric").is_in(metrics) & (pl.col("kind") != UNDAMAGED)))
    rows = rows.filter(pl.col("seed").is_null() | (pl.col("seed") == pl.col("seed").min()))
    lines: list[tuple[str, ...]] = []
    for kind in rows["kind"].unique(maintain_order=True):
        changes = rows.filter(pl.col("kind") == kind)["change"].unique(maintain_order=True).to_list()
        step = max(1, -(-len(changes) // ROWS_PER_KIND))
        for change in changes[::step]:
            of_change = rows.filter(pl.col("change") == change).unique("metric").select("metric", "value")
            values = dict(of_change.iter_rows())
            lines.append((change, *(number(values.get(metric)) for metric in metrics)))
    header = ("change", "relative error", "rounded", "after the first norm", "cosine", "loss")
    return Grid("Errors of one seed of each change", header, tuple(lines), frozenset(range(1, len(header))))


# ---- noise and scale -----------------------------------------------------------------------------------------------


def strength_section(tables: Tables, facts: Facts) -> Section | None:
    """Return what noise, shifts and scaling cost, which keep all dimensions."""
    shown = shown_damages(tables)
    if not shown:
        return None
    first = shown[0]
    by_unit = {unit: first.kinds(unit) for unit in UNIT_AXES}
    drawn = {
        unit: [kind for kind in kinds if (first.curve(LOSS, kind)["strength"] > 0).any()]
        for unit, kinds in by_unit.items()
    }
    plots = tuple(_strength_plot(first, unit, kinds) for unit, kinds in drawn.items() if kinds)
    if not plots:
        return None
    return Section(
        anchor="strength",
        name="Noise and scale",
        title=_strength_title(first, by_unit),
        blocks=plots,
        how_to_read=(
            "These changes keep all dimensions and disturb their values; they are stronger further to the right. The dashed "
            "line is the undamaged model. Noise is a random vector for every token of the vocabulary. A shift is one random "
            "vector of the same length, added to all tokens: the two make equal errors, noise in every direction and the "
            "shift in one. In the figure of scaling, the undamaged model is at a factor of 1."
        ),
        caveat=(
            "The noise of a token is the same at every position at which it occurs. The norm before the first block removes "
            "a factor common to all rows, but the blocks add to the scaled embeddings."
        ),
        tables=("damage",),
    )


def _strength_plot(damage: Damage, unit: str, kinds: list[str]) -> Plot:
    fig = figures.damage_by_strength(damage, kinds, unit)
    caption = sentence(listed([kind_name(kind) for kind in kinds]))
    return Plot(f"damage-{unit.replace(' ', '-')}", fig, f"loss by {UNIT_AXES[unit]}", caption)


def _strength_title(damage: Damage, by_unit: dict[str, list[str]]) -> str:
    base = damage.base or 0.0
    clauses = []
    for kind in by_unit["standard deviations"]:
        points = damage.curve(LOSS, kind).filter(pl.col("strength") <= 1).tail(1)
        if points.height and base:
            rise = points["value"][0] / base - 1
            clauses.append(f"{kind_name(kind)} of {points['strength'][0]:g} sd changes the loss by {rise:+.0%}")
    for kind in by_unit["factor"]:
        halves = damage.curve(LOSS, kind).filter(pl.col("strength").is_in([0.5, 2.0]))
        if halves.height and base:
            points = halves.select("strength", "value").iter_rows()
            rises = [f"{value / base - 1:+.0%} at {strength:g}" for strength, value in points]
            clauses.append(f"{kind_name(kind)} by {listed(rises)}")
    return sentence("; ".join(clauses)) if clauses else "The loss after noise, shifts and scaling"


# ---- the operator --------------------------------------------------------------------------------------------------


def operator_section(tables: Tables, facts: Facts) -> Section | None:
    """Return what a random projection is as a matrix: a scaled identity plus normal noise, as theory expects."""
    statistics, block, bins = (table(tables, name) for name in ("operator", "operator_block", "operator_histogram"))
    if statistics is None or block is None or bins is None:
        return None
    k, d, sd = statistics["k"][0], statistics["d"][0], float(bins["sd"][0])
    corner, histogram = figures.operator_block(block, sd), figures.operator_histogram(bins)
    cells = tuple(
        (metric, number(value), number(null))
        for metric, value, null in statistics.select("metric", "value", "null").iter_rows()
    )
    grid = Grid("Entries of the projection", ("", "measured", "theory"), cells, frozenset({1, 2}))
    return Section(
        anchor="operator",
        name="What a random projection is",
        title=(
            f"A random projection on {k:,} of {d:,} dimensions is {k / d:.2f} times the identity plus normal noise of "
            f"sd {number(sd)}"
        ),
        blocks=(
            Plot("operator-block", corner, "entries of the projection", "Its top left corner", square=True),
            Plot("operator-histogram", histogram, "entries off the diagonal", "Entries off the diagonal"),
            grid,
        ),
        how_to_read=(
            "Projecting a vector on a random subspace and back multiplies it by the matrix in the picture. Its diagonal is "
            f"near k/d = {k / d:.2f}, and the other entries look like noise. A projection therefore acts like a shorter "
            "vector plus noise, and multiplying by d/k restores the length."
        ),
        caveat=(
            "The noise is not independent: the matrix is a projection, so it maps a whole subspace exactly to zero and keeps "
            "another exactly. The figure shows one seed; theory is the average over all."
        ),
        tables=("operator", "operator_block", "operator_histogram"),
    )

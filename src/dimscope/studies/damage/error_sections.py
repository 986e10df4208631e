"""Sections about the errors that damage makes: against the loss, against theory, and a random projection as a matrix."""

import polars as pl

from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import count, listed, number, sentence
from dimscope.studies.damage import figures
from dimscope.studies.damage.curves import Damage, kind_name, shown_damages
from dimscope.studies.damage.figures import UNIT_AXES
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import CAST, COSINE, LOSS, NORMED, RELATIVE

ROW_DRAWS = 4  # changes of one kind that the table of errors shows at most


def error_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell that equal error is not equal damage, and how well the errors agree with theory."""
    found, frame = shown_damages(tables), table(tables, "damage")
    if not found or frame is None or not found[0].kinds():
        return None
    first = found[0]
    plots = [
        Plot(
            "damage-error",
            figures.damage_by_error(first),
            "loss by the relative error of the table",
            "Loss by relative error",
        )
    ]
    known = finite(finite(frame.filter(pl.col("metric") == RELATIVE)), "expected").filter(pl.col("expected") > 0)
    if known.height:
        plots.append(
            Plot(
                "damage-closed",
                figures.closed_form(frame),
                "measured against expected errors",
                "Measured error against its closed form",
            )
        )
    return Section(
        anchor="errors",
        name="Error and damage",
        title=_equal_error(first),
        findings=_agreement(known),
        blocks=(*plots, _errors_grid(first)),
        how_to_read=(
            "On the left, changes that stand at the same place along the axis move the table equally far, and yet their losses "
            "differ: which directions an error takes matters more than its size. On the right, every change stands where theory "
            "expects it if it lies on the dashed diagonal. The table gives the error of one draw of each kind as it is, after "
            "rounding to the dtype in which the model computes, and as the first block sees it, after its norm."
        ),
        caveat=(
            "The relative error is the Frobenius norm over all tokens of the vocabulary, however rare they are in the text; the "
            "loss is over the tokens of the text. Errors after rounding and after the first norm are told by a sample of rows, "
            "without positions added. A factor common to all rows disappears in a norm and is no error to the block, though "
            "what is added to the stream afterwards weighs differently beside it."
        ),
        tables=("damage",),
    )  # fmt: skip


def _equal_error(damage: Damage) -> str:
    """Two kinds with the most different losses at nearly equal error."""
    rows = [
        (error, loss, kind, strength)
        for kind in damage.kinds()
        for strength, _, loss, _, _, error in damage.curve(LOSS, kind).iter_rows()
        if error is not None and error > 0
    ]
    pairs = [(a, b) for a in rows for b in rows if a[2] != b[2] and abs(a[0] - b[0]) <= 0.05 * a[0] and a[1] < b[1]]
    if not pairs:
        return "What the error of the table says about the loss"
    low, high = max(pairs, key=lambda pair: pair[1][1] - pair[0][1])
    return (
        f"Equal error is not equal damage: at a relative error of about {low[0]:.2g}, {kind_name(low[2])} leaves a loss of "
        f"{number(low[1])} and {kind_name(high[2])} one of {number(high[1])}"
    )


def _agreement(known: pl.DataFrame) -> tuple[str, ...]:
    """How far measured errors are from their closed forms: those that are exact, and those that hold on average over draws."""
    told = []
    for drawn, words in ((False, "exact"), (True, "on average over draws")):
        rows = known.filter(pl.col("seed").is_not_null() == drawn)
        means = rows.group_by("change", "side", "on").agg(pl.col("value").mean(), pl.col("expected").mean(), pl.len())
        if means.height:
            gap = float((means["value"] / means["expected"] - 1).abs().to_numpy().max())
            size = f" ({count(int(means['len'].to_numpy().max()), 'draw')} each)" if drawn else ""
            told.append(
                f"to {gap:.1%} where that is {words}{size}"
                if gap >= 0.001
                else f"to less than 0.1% where that is {words}{size}"
            )
    return (f"Errors agree with their closed form {' and '.join(told)}.",) if told else ()


def _errors_grid(damage: Damage) -> Grid:
    metrics = (RELATIVE, CAST, NORMED, COSINE, LOSS)
    first = finite(damage.rows.filter(pl.col("metric").is_in(metrics) & (pl.col("kind") != UNDAMAGED)))
    first = first.filter(pl.col("seed").is_null() | (pl.col("seed") == pl.col("seed").min()))
    shown: list[tuple[str, ...]] = []
    for kind in first["kind"].unique(maintain_order=True):
        changes = first.filter(pl.col("kind") == kind)["change"].unique(maintain_order=True).to_list()
        step = max(1, -(-len(changes) // ROW_DRAWS))
        for change in changes[::step]:
            of = dict(first.filter(pl.col("change") == change).unique("metric").select("metric", "value").iter_rows())
            shown.append((change, *(number(of.get(metric)) for metric in metrics)))
    header = ("change", "relative error", "rounded", "after the first norm", "cosine", "loss")
    return Grid("Errors of one draw of each change", header, tuple(shown), frozenset(range(1, len(header))))


# ---- noise, shift, scale -------------------------------------------------------------------------------------------


def strength_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell what noise, shifts and scaling cost, which keep all dimensions."""
    found = shown_damages(tables)
    if not found:
        return None
    first = found[0]
    by_unit = {unit: first.kinds(unit) for unit in UNIT_AXES}
    told = {unit: [k for k in kinds if (first.curve(LOSS, k)["strength"] > 0).any()] for unit, kinds in by_unit.items()}
    plots = tuple(_strength_plot(first, unit, kinds) for unit, kinds in told.items() if kinds)
    if not plots:
        return None
    return Section(
        anchor="strength",
        name="Noise and scale",
        title=_strength_finding(first, by_unit),
        blocks=plots,
        how_to_read=(
            "These changes keep all dimensions and disturb what stands in them. The further to the right, the stronger; the "
            "dashed line is the undamaged model. Noise is drawn anew for every token of the vocabulary, a shift is one random "
            "vector, as long as that noise, added to all of them: the two make the same error, one in every direction, one in "
            "one direction. For scaling the undamaged model stands at a factor of 1."
        ),
        caveat=(
            "Noise belongs to the token, not to the place: where a token comes again, it brings the same noise. A factor "
            "common to all rows is taken out again by the norm before the first block, but not where the blocks add to it."
        ),
        tables=("damage",),
    )  # fmt: skip


def _strength_plot(damage: Damage, unit: str, kinds: list[str]) -> Plot:
    fig = figures.damage_by_strength(damage, kinds, unit)
    caption = sentence(listed([kind_name(kind) for kind in kinds]))
    return Plot(f"damage-{unit.replace(' ', '-')}", fig, f"loss by {UNIT_AXES[unit]}", caption)


def _strength_finding(damage: Damage, by_unit: dict[str, list[str]]) -> str:
    base = damage.base or 0.0
    told = []
    for kind in by_unit["standard deviations"]:
        points = damage.curve(LOSS, kind).filter(pl.col("strength") <= 1).tail(1)
        if points.height and base:
            told.append(
                f"{kind_name(kind)} of {points['strength'][0]:g} sd raises the loss by {points['value'][0] / base - 1:.0%}"
            )
    for kind in by_unit["factor"]:
        points = damage.curve(LOSS, kind)
        halves = points.filter(pl.col("strength").is_in([0.5, 2.0]))
        if halves.height and base:
            rises = [
                f"{value / base - 1:+.0%} at {strength:g}"
                for strength, value in halves.select("strength", "value").iter_rows()
            ]
            told.append(f"{kind_name(kind)} changes it by {listed(rises)}")
    return sentence(", ".join(told)) if told else "What noise, shifts and scaling cost"


# ---- the operator --------------------------------------------------------------------------------------------------


def operator_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell what a random projection is as a matrix: a scaled identity and normal noise, as theory has it."""
    statistics, block, bins = (table(tables, name) for name in ("operator", "operator_block", "operator_histogram"))
    if statistics is None or block is None or bins is None:
        return None
    k, d, sd = statistics["k"][0], statistics["d"][0], float(bins["sd"][0])
    corner, histogram = figures.operator_block(block, sd), figures.operator_histogram(bins)
    plots = (
        Plot("operator-block", corner, "entries of the projection", "Its top left corner", square=True),
        Plot("operator-histogram", histogram, "entries off the diagonal", "What is off the diagonal"),
    )
    told = statistics.select("metric", "value", "expected").iter_rows()
    cells = tuple((metric, number(value), number(expected)) for metric, value, expected in told)
    return Section(
        anchor="operator",
        name="What a random projection is",
        title=(
            f"A random projection on {k:,} of {d:,} dimensions is {k / d:.2f} times the identity plus normal noise of "
            f"sd {number(sd)}"
        ),
        blocks=(*plots, Grid("Entries of the projection against theory", ("", "measured", "expected"), cells, frozenset({1, 2}))),
        how_to_read=(
            "Projecting a vector on a random subspace and back multiplies it by the matrix in the picture. Its diagonal is near "
            f"k/d = {k / d:.2f} everywhere, and what is beside it looks like noise: that is why a projection acts like a "
            "shorter vector with noise, and why multiplying by d/k puts the length right."
        ),
        caveat=(
            "The noise is not independent: the matrix is a projection, so it sends a whole subspace exactly to zero and "
            "leaves another exactly as it is. One draw; the expected values are over all draws."
        ),
        tables=("operator", "operator_block", "operator_histogram"),
    )  # fmt: skip

"""Sections about the errors of the table: compared with the loss, with theory, and a random projection as a matrix."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import polars as pl

from dimscope.evaluation.yardstick import SCALE_NOTE, TOLERANCE, compared, interval_name, two_digits
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, finite, table
from dimscope.page.wording import count, listed, number, sentence
from dimscope.studies.damage import figures
from dimscope.studies.damage.comparisons import Decision, difference, harmless_at_once
from dimscope.studies.damage.curves import change_name, kind_name, shown_losses, unreadable_text
from dimscope.studies.damage.facts import damage_facts
from dimscope.studies.damage.figures import UNIT_AXES
from dimscope.studies.damage.losses import Draws, Losses
from dimscope.studies.damage.plan import UNDAMAGED
from dimscope.studies.damage.tables import CAST, COSINE, KL, NORMED, RELATIVE

ROWS_PER_KIND = 4  # changes of one kind that the table of errors shows at most
SAME_ERROR = 0.05  # relative difference up to which two errors count as equal


def error_section(tables: Tables, facts: Facts) -> Section | None:
    """Return whether equal error is equal damage, and how well the errors agree with theory."""
    shown, frame = shown_losses(tables), table(tables, "damage")
    if not shown or frame is None or not shown[0].kinds():
        return None
    first = shown[0]
    by_error = figures.damage_by_error(first)
    plots = [Plot("damage-error", by_error, "KL by the relative error of the table", "KL by relative error")]
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
            "In the first figure, changes at the same horizontal position move the table equally far. Where their damage "
            "differs, the direction of an error matters and not only its size. Bands are 95% intervals over windows, and over "
            "seeds of a random change. Changes of different kinds are compared where their errors differ by 5% at most, by "
            "paired intervals that hold for all such pairs at once. In the second figure, a change on the dashed "
            "diagonal has the error that theory expects. The table lists errors of one seed of each change: of the table as "
            "it is, after rounding to the dtype of the computation, and after the first norm, as the first block reads it."
        ),
        caveat=(
            "The relative error is the Frobenius norm over all tokens of the vocabulary, however rare they are in the text; "
            "the KL is over the tokens of the text. Errors after rounding and after the first norm are measured on a "
            "sample of rows, without positions added. A norm removes a factor common to all rows, so that scaling is no "
            "error for the first block; later blocks add to the unscaled embeddings and do see it."
        ),
        tables=("damage", "windows"),
    )


Pair = tuple[Draws, Draws]


def _equal_error(losses: Losses) -> str:
    """Return the two changes of nearly equal error whose damage differs most, if it differs for any pair.

    The intervals of all pairs of different kinds hold at once (Bonferroni).
    """
    if losses.unreadable:
        return "This text cannot tell what an error of the table costs"
    pairs = _pairs_of_equal_error(losses)
    if not pairs:
        return "The error of the table, and what it costs"
    n = len(pairs)
    gaps = ((less, more, difference(less.mean("kl"), more.mean("kl"), n)) for less, more in map(_by_kl, pairs))
    apart = [(less, more, gap) for less, more, gap in gaps if gap is not None and (gap.low or 0.0) > 0]
    if not apart:
        return "At equal error no change clearly costs more than another"
    less, more, gap = max(apart, key=lambda compared: compared[2].value)
    more_error, less_error = (f"{losses.error(draws):.2g}" for draws in (more, less))
    if more_error == less_error:
        errors, of_more, of_less = f"at a relative error of about {less_error}, ", "", ""
    else:
        errors, of_more, of_less = "", f" (relative error {more_error})", f" ({less_error})"
    return (
        f"Equal error is not equal damage: {errors}{change_name(more)}{of_more} has a KL {two_digits(gap.value)} nats "
        f"({interval_name(n)} {two_digits(gap.low or 0.0)} to {two_digits(gap.high or 0.0)}) above that of {change_name(less)}{of_less}"
    )


def _by_kl(pair: Pair) -> Pair:
    """Return a pair with the change of the lower KL first."""
    one, other = pair
    return pair if one.kl.value <= other.kl.value else (other, one)


def _pairs_of_equal_error(losses: Losses) -> list[Pair]:
    """Return changes of different kinds whose errors are nearly the same."""
    changes = [(losses.error(draws) or 0.0, draws) for kind in losses.kinds() for draws in losses.draws(kind)]
    return [
        (one, other)
        for (a, one), (b, other) in combinations(changes, 2)
        if one.kind != other.kind and min(a, b) > 0 and abs(a - b) <= SAME_ERROR * max(a, b)
    ]


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
        bound = max(math.ceil(1000 * gap), 1) / 10  # rounded up: a bound
        clauses.append(f"within {bound:.1f}% for {kind}{seeds}")
    return (f"The measured errors agree with theory {' and '.join(clauses)}.",) if clauses else ()


def _errors_grid(losses: Losses) -> Grid:
    metrics = (RELATIVE, CAST, NORMED, COSINE, KL)
    rows = finite(losses.rows.filter(pl.col("metric").is_in(metrics) & (pl.col("kind") != UNDAMAGED)))
    rows = rows.filter(pl.col("seed").is_null() | (pl.col("seed") == pl.col("seed").min()))
    lines: list[tuple[str, ...]] = []
    for kind in rows["kind"].unique(maintain_order=True):
        changes = rows.filter(pl.col("kind") == kind)["change"].unique(maintain_order=True).to_list()
        step = max(1, -(-len(changes) // ROWS_PER_KIND))
        for change in changes[::step]:
            of_change = rows.filter(pl.col("change") == change).unique("metric").select("metric", "value")
            values = dict(of_change.iter_rows())
            lines.append((change, *(_cell(metric, values.get(metric)) for metric in metrics)))
    header = ("change", "relative error", "rounded", "after the first norm", "cosine", "KL")
    return Grid("Errors of one seed of each change", header, tuple(lines), frozenset(range(1, len(header))))


def _cell(metric: str, value: float | None) -> str:
    return two_digits(value) if metric == KL and value is not None else number(value)  # a KL has two digits on the page


# ---- noise and scale -----------------------------------------------------------------------------------------------


def strength_section(tables: Tables, facts: Facts) -> Section | None:
    """Return what noise, shifts and scaling cost, which keep all dimensions."""
    shown = shown_losses(tables)
    if not shown:
        return None
    first = shown[0]
    drawn = {
        unit: [kind for kind in first.kinds(unit) if (first.curve("kl", kind)["strength"] > 0).any()]
        for unit in UNIT_AXES
    }
    plots = tuple(_strength_plot(first, unit, kinds) for unit, kinds in drawn.items() if kinds)
    if not plots:
        return None
    named = [] if first.unreadable else _named_changes(first)
    return Section(
        anchor="strength",
        name="Noise and scale",
        title=_strength_title(first, named),
        findings=_strength_findings(named) or _why_unreadable(first, damage_facts(facts).window_length),
        blocks=plots,
        how_to_read=(
            "These changes keep all dimensions and disturb their values. Noise and shifts are stronger further to the right; "
            "rounding is stronger with fewer bits; scaling by a factor of 1 is no change. The dashed "
            "lines are the KL of rounding weights to so many bits. Bands are 95% intervals over windows, and over seeds of a random "
            "change. Noise is a random vector for every token of the vocabulary. A shift is one random vector of the same length, added "
            "to all tokens: the two make equal errors, noise in every direction and the shift in one. Changes "
            f"are compared with {TOLERANCE.name} by intervals that hold at once (the steps of Holm 1979). {SCALE_NOTE}"
        ),
        caveat=(
            "The noise of a token is the same at every position at which it occurs. The norm before the first block removes "
            "a factor common to all rows, but the blocks add to the scaled embeddings."
        ),
        tables=("damage", "windows"),
    )


def _strength_plot(losses: Losses, unit: str, kinds: list[str]) -> Plot:
    fig = figures.damage_by_strength(losses, kinds, unit)
    caption = sentence(listed([kind_name(kind) for kind in kinds]))
    return Plot(f"damage-{unit.replace(' ', '-')}", fig, f"KL by {UNIT_AXES[unit]}", caption)


def _named_changes(losses: Losses) -> list[tuple[Draws, Decision]]:
    """Return the changes of which the section speaks, and whether they are harmless, all at once.

    They are the strongest of each kind of one sd at most, and halving and doubling.
    """
    changes = []
    for kind in losses.kinds("standard deviations"):
        changes += [draws for draws in losses.draws(kind, overflown=True) if 0 < draws.strength <= 1][-1:]
    for kind in losses.kinds("factor"):
        changes += [draws for draws in losses.draws(kind, overflown=True) if draws.strength in (0.5, 2.0)]
    return list(zip(changes, harmless_at_once(changes), strict=True))


def _strength_title(losses: Losses, named: Sequence[tuple[Draws, Decision]]) -> str:
    """Return which changes cost more than the tolerance."""
    if losses.unreadable:
        return "This text cannot tell what noise, shifts and scaling cost"
    by_answer: dict[bool | None, list[str]] = defaultdict(list)
    for draws, decision in named:
        by_answer[decision.answer].append(change_name(draws))
    clauses = []
    for answer, (one, several) in {
        True: ("costs no more", "cost no more"), False: ("costs more", "cost more"),
        None: ("may cost more or less", "may cost more or less"),
    }.items():  # fmt: skip
        if names := by_answer[answer]:
            clauses.append(f"{listed(names)} {one if len(names) == 1 else several}")
    return (
        f"Compared with {TOLERANCE.name}, {'; '.join(clauses)}" if clauses else "The KL after noise, shifts and scaling"
    )


def _strength_findings(named: Sequence[tuple[Draws, Decision]]) -> tuple[str, ...]:
    costs = [
        f"{change_name(draws)}: {compared(draws.kl_of(decision.n_statements), n_statements=decision.n_statements)}"
        for draws, decision in named
    ]
    return (sentence(f"{'; '.join(costs)}."),) if costs else ()


def _why_unreadable(losses: Losses, window_length: int | None) -> tuple[str, ...]:
    """Return why a text cannot tell what changes cost, where no section about dimensions says it before."""
    if losses.unreadable and not losses.kept_kinds():
        return (f"{unreadable_text(losses, window_length)}.",)
    return ()


# ---- the operator --------------------------------------------------------------------------------------------------


def operator_section(tables: Tables, facts: Facts) -> Section | None:
    """Return what a random projection is as a matrix: a scaled identity plus normal noise, as theory expects."""
    statistics, block, bins = (table(tables, name) for name in ("operator", "operator_block", "operator_histogram"))
    if statistics is None or block is None or bins is None:
        return None
    k, d, sd = statistics["k"][0], statistics["d"][0], float(bins["sd"][0])
    measured = statistics.filter(pl.col("metric") == "sd off the diagonal")["value"].item()
    part = "The whole matrix" if block.height == d * d else "Its top left corner"
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
            f"A random projection on {k:,} of {d:,} dimensions is {number(k / d)} times the identity plus normal noise of "
            f"sd {number(measured)} off the diagonal"
        ),
        blocks=(
            Plot("operator-block", corner, "entries of the projection", part, square=True),
            Plot("operator-histogram", histogram, "entries off the diagonal", "Entries off the diagonal"),
            grid,
        ),
        how_to_read=(
            "Projecting a vector on a random subspace and back multiplies it by the matrix in the picture. Its diagonal is "
            f"near k/d = {number(k / d)}, and the other entries look like noise. A projection therefore acts like a shorter "
            "vector plus noise, and multiplying by d/k restores the length."
        ),
        caveat=(
            "The noise is not independent: the matrix is a projection, so it maps a whole subspace exactly to zero and keeps "
            "another exactly. The figure shows one seed; theory is the average over all."
        ),
        tables=("operator", "operator_block", "operator_histogram"),
    )

"""What follows from the table of a plan: methods compared at equal size, the candidate to show, and the advice in words.

Candidates are chosen by their KL on every other window of the texts, and judged on the windows between, on each text alone:
what is harmless on one text need not be so on another. A KL on the windows of the choice would be too low: it is the best of
many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import polars as pl

from dimscope.evaluation.unigrams import reads_context
from dimscope.evaluation.yardstick import TOLERANCE, compared, judge, with_error
from dimscope.page.wording import count, listed, sentence
from dimscope.texts.window_sums import Interval

NARROW, HEALED, DROP, ROUND, DENSE = "narrow", "narrow, healed", "drop layers", "quantise", "dense"
TENTH = 0.9  # share of the parameters at which the methods are compared in words
SPEEDS = (
    "prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio", "prefill_ratio_low", "decode_ratio_low",
    "prefill_ratio_high", "decode_ratio_high",
)  # fmt: skip
HALVES = ("choice_kl", "choice_kl_high", "judged_kl", "judged_kl_low", "judged_kl_high", "judged_within")
SCHEMA = {
    "method": pl.String, "basis": pl.String, "tied": pl.Boolean, "width": pl.Int64, "layers": pl.Int64, "bits": pl.Int64,
    "parameters": pl.Int64, "bytes": pl.Int64, "loss": pl.Float64, "loss_stderr": pl.Float64, "loss_high": pl.Float64,
    "loss_rise": pl.Float64, "loss_rise_stderr": pl.Float64, "kl": pl.Float64, "kl_stderr": pl.Float64, "top_1": pl.Float64,
    "top_1_stderr": pl.Float64, **dict.fromkeys(HALVES, pl.Float64), "judged_text": pl.String,
    **dict.fromkeys(SPEEDS, pl.Float64), "n_tokens": pl.Int64,
}  # fmt: skip


def with_equal_size(plan: pl.DataFrame) -> pl.DataFrame:
    """Add the columns `kl_dropping` and `loss_rise_dropping`: what dropping layers costs at the same number of parameters.

    Linear interpolation between the two nearest numbers of layers; null beyond them.
    """
    columns = [
        pl.Series(f"{value}_dropping", [_at(plan, DROP, None, value, n) for n in plan["parameters"]], dtype=pl.Float64)
        for value in ("kl", "loss_rise")
    ]
    return plan.with_columns(columns)


def _at(
    plan: pl.DataFrame, method: str, basis: str | None, value: str, position: float, x: str = "parameters"
) -> float | None:
    """Interpolate a value of one method at a number of parameters, or at a speed; the dense model is on each curve."""
    own = plan.filter(pl.col("method") == method)
    own = own if basis is None else own.filter(pl.col("basis") == basis)
    # With a second table a model of full width is not the dense one, but larger.
    dense = plan.filter((pl.col("method") == DENSE) & pl.col("tied").is_in(own["tied"].unique().to_list()))
    return between(pl.concat([own, dense]).drop_nulls([x, value]).sort(x).select(x, value).rows(), position)


def between(curve: Sequence[tuple[float, float]], position: float) -> float | None:
    """Interpolate a curve of (x, y), sorted by x, linearly; None beyond its ends.

    >>> between([(0, 1.0), (10, 2.0)], 5), between([(0, 1.0), (10, 2.0)], 11)
    (1.5, None)
    """
    for (low, before), (high, after) in pairwise(curve):
        if low <= position <= high and high > low:
            return before + (after - before) * (position - low) / (high - low)
    return None


def candidate_name(row: Mapping[str, Any]) -> str:
    """Return the name of a row of the plan: "width 224, raw", "5 layers", "8-bit weights"."""
    names = {
        DENSE: "dense", NARROW: f"width {row['width']}, {row['basis']}", HEALED: f"width {row['width']}, {row['basis']}, healed",
        DROP: f"{row['layers']} layer{'' if row['layers'] == 1 else 's'}", ROUND: f"{row['bits']}-bit weights",
    }  # fmt: skip
    return names[row["method"]]


def best_basis(plan: pl.DataFrame) -> str:
    """Return the basis that has the lowest KL at most widths, on the windows of the choice."""
    narrow = plan.filter(pl.col("method") == NARROW).with_columns(_choice_kl())
    winners = [rows.sort("choice")["basis"][0] for _, rows in narrow.group_by("width", maintain_order=True)]
    return max(dict.fromkeys(winners), key=winners.count)


def _choice_kl() -> pl.Expr:
    """Return the KL to choose by: with the upper end of its interval where there is one, on all windows where there is one."""
    return pl.coalesce("choice_kl_high", "choice_kl", "kl").alias("choice")


def shown_candidate(plan: pl.DataFrame) -> dict[str, Any]:
    """Return the candidate to show beside the dense model, and to heal.

    Of the best basis it is the smallest that is within the tolerance on the windows of the choice, else the widest that is
    a tenth smaller.
    """
    own = plan.filter((pl.col("method") == NARROW) & (pl.col("basis") == best_basis(plan))).with_columns(_choice_kl())
    narrow = own.sort("parameters", descending=True).rows(named=True)
    limit = _dense(plan)["parameters"]
    good = [row for row in narrow if row["parameters"] < limit and row["choice"] <= TOLERANCE.kl]
    smaller = [row for row in narrow if row["parameters"] <= TENTH * limit]
    shown = good[-1] if good else (smaller or narrow[-1:])[0]
    return {name: shown[name] for name in plan.columns}


def _dense(plan: pl.DataFrame) -> dict[str, Any]:
    return plan.filter(pl.col("method") == DENSE).row(0, named=True)


# ---- advice ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextRead:
    """The text that a plan was evaluated on.

    Attributes:
        names: Names of the texts.
        n_windows: Windows of the evaluation.
        entropy: Unigram entropy of the text, in nats per token; None where it is not known.
        length: Tokens of a window; None where it is not known.
    """

    names: Sequence[str] = ()
    n_windows: int = 0
    entropy: float | None = None
    length: int | None = None

    @property
    def windows(self) -> str:
        """Return on what a number is the mean: "8 windows of 512 tokens of prose.txt"."""
        of_length = f" of {self.length} tokens" if self.length else ""
        return f"{count(self.n_windows, 'window')}{of_length} of {listed(list(self.names)) or 'the text'}"


def advice(plan: pl.DataFrame, text: TextRead) -> list[str]:
    """Return what to do with this model, in a few sentences: a title, then one answer for each goal, then the evidence.

    Args:
        plan: The table of the plan.
        text: What it was evaluated on.
    """
    dense = _dense(plan)
    loss = Interval(dense["loss"], None, None, dense["loss_high"], text.n_windows)
    if text.entropy is not None and not reads_context(loss, text.entropy):
        upper = "" if loss.high is None else f", 95% interval up to {loss.high:.3g}"
        return [
            "This text cannot tell what a cut costs: the dense model predicts it not clearly better than its token frequencies "
            f"alone would (loss {dense['loss']:.3g}{upper}, entropy of the frequencies {text.entropy:.3g} nats per token, both on "
            f"{text.windows})",
            "Use a text like those that the model was trained on, or more windows.",
        ]
    answers = {goal: _pick(plan, goal) for goal in GOALS}
    title = "; ".join(f"{goal}: {_short(row)}" for goal, row in answers.items())
    details = [f"{sentence(goal)}: {_detail(plan, goal, row)}" for goal, row in answers.items()]
    return [sentence(title), *details, _how_judged(text), *_compared(plan)]


GOALS = {"fewest bytes": "bytes", "fewest parameters": "parameters", "fastest": "prefill_ratio"}


def _better(plan: pl.DataFrame, goal: str) -> pl.DataFrame:
    """Return the candidates that are better than the dense model by a goal, the best first; a speed in every round."""
    column, dense = GOALS[goal], _dense(plan)
    others = plan.with_columns(_choice_kl()).filter(pl.col("method") != DENSE)
    if column == "prefill_ratio":
        faster = others.filter(pl.coalesce("prefill_ratio_low", "prefill_ratio") > 1)
        return faster.sort("prefill_ratio", "choice", descending=[True, False], maintain_order=True)
    return others.filter(pl.col(column) < dense[column]).sort(column, "choice", maintain_order=True)


def _pick(plan: pl.DataFrame, goal: str) -> dict[str, Any] | None:
    """Return the best candidate by a goal of those within the tolerance on the windows of the choice, if there is one."""
    rows = _better(plan, goal).filter(pl.col("choice") <= TOLERANCE.kl)
    return rows.row(0, named=True) if rows.height else None


def _short(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "keep the dense model"
    doubt = {"within": "", "undecided": " (not certain)", "above": " (not confirmed)"}[judge(_judged(row))]
    return f"{candidate_name(row)}{doubt}"


def _detail(plan: pl.DataFrame, goal: str, row: Mapping[str, Any] | None) -> str:
    """Return what the pick for a goal saves and costs, or why there is none."""
    if row is None:
        better = _better(plan, goal)
        if better.is_empty():
            return f"no candidate is better than the dense model{' in every round' if goal == 'fastest' else ''}."
        nearest = better.sort("choice", maintain_order=True).row(0, named=True)
        return (
            f"keep the dense model; the nearest candidate is {candidate_name(nearest)}, {compared(_judged(nearest))}"
            f"{_on_text(nearest)}."
        )
    chance = (
        ""
        if row["judged_within"] is None
        else f"; the probability that its KL is at most {TOLERANCE.kl:g} is {_percent(row['judged_within'])}"
    )
    return f"{candidate_name(row)}, {_gain(row, _dense(plan), goal)}: {compared(_judged(row))}{_on_text(row)}{chance}."


def _on_text(row: Mapping[str, Any]) -> str:
    """Return on which of several texts a candidate is judged."""
    return "" if row["judged_text"] is None else f" on {row['judged_text']}, the text on which it costs the most"


def _percent(probability: float) -> str:
    return "more than 99%" if probability > 0.99 else "less than 1%" if probability < 0.01 else f"{probability:.0%}"


def _gain(row: Mapping[str, Any], dense: Mapping[str, Any], goal: str) -> str:
    if goal == "fastest":
        return f"which reads a prompt {times(row, 'prefill')} as fast"
    column = GOALS[goal]
    return f"{row[column] / dense[column]:.0%} of the {column}"


def times(row: Mapping[str, Any], name: str) -> str:
    """Return a speed relative to the dense model with its range over the rounds: "1.20 times (1.15 to 1.24)"."""
    low, high = row[f"{name}_ratio_low"], row[f"{name}_ratio_high"]
    spread = "" if low is None else f" ({low:.2f} to {high:.2f})"
    return f"{row[f'{name}_ratio']:.2f} times{spread}"


def _judged(row: Mapping[str, Any]) -> Interval:
    """Return the KL on the windows that judge; that on all windows, without an interval, where there is one window."""
    if row["judged_kl"] is None:
        return Interval(row["kl"], None, None, None, 1)
    return Interval(row["judged_kl"], None, row["judged_kl_low"], row["judged_kl_high"], 1)


def _how_judged(text: TextRead) -> str:
    names = listed(list(text.names)) or "the text"
    several = len(text.names) > 1
    if text.n_windows < 2 * LEAST_JUDGED * max(1, len(text.names)):
        where = " on each text" if several else ""
        windows = sentence(count(text.n_windows, "window"))
        return f"{windows} of {names} cannot judge a choice{where}: pass a longer text, or more `windows`."
    judged = text.n_windows // 2
    return (
        f"Candidates were chosen on {count(text.n_windows - judged, 'window')} of {names}, and judged on {judged} others"
        f"{', on each text alone' if several else ''}; the KL of a choice has to be within {TOLERANCE.kl:g} nats at the upper end of "
        f"its interval{' on every text' if several else ''}."
    )


LEAST_JUDGED = 2  # windows, for an interval


def _compared(plan: pl.DataFrame) -> list[str]:
    """Compare narrowing with dropping layers at a tenth fewer parameters, or at the size of the widest smaller candidate."""
    parameters, basis = _dense(plan)["parameters"], best_basis(plan)
    own = plan.filter((pl.col("method") == NARROW) & (pl.col("basis") == basis) & (pl.col("parameters") < parameters))
    if own.is_empty():
        return ["No width makes this model smaller: two tables have more parameters than one."]
    size = TENTH * parameters
    narrowing, how = _at(plan, NARROW, basis, "kl", size), ", by interpolation between the candidates"
    if narrowing is None:
        how = ""
        first = own.sort("parameters", descending=True).row(0, named=True)
        size, narrowing = first["parameters"], first["kl"]
    dropping = _at(plan, DROP, None, "kl", size)
    narrow_kl = with_error(narrowing, _stderr(plan, NARROW, basis, size))
    other = ""
    if dropping is not None:
        other = f", and dropping layers one of {with_error(dropping, _stderr(plan, DROP, None, size))}"
    error = " (± one standard error)" if "±" in narrow_kl + other else ""
    return [
        f"With {1 - size / parameters:.0%} fewer parameters{how}, narrowing ({basis}) has a KL of {narrow_kl} nats{other}, on all "
        f"windows{error}."
    ]


def _stderr(plan: pl.DataFrame, method: str, basis: str | None, size: float) -> float | None:
    """Return the standard error of a KL between two candidates, interpolated like the KL; that of the dense model is 0."""
    exact = plan.with_columns(pl.when(method=DENSE).then(0.0).otherwise("kl_stderr").alias("kl_stderr"))
    stderr = _at(exact, method, basis, "kl_stderr", size)
    if stderr is None:  # the size of one candidate, with no smaller one on its curve
        own = plan.filter(pl.col("method") == method, pl.col("parameters") == size).drop_nulls("kl_stderr")
        stderr = own["kl_stderr"][0] if own.height else None
    return stderr

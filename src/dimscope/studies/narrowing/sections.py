"""Sections about narrowing: what every width would cost, and a narrow model beside the dense one."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from dimscope.evaluation.yardstick import SCALE_NOTE, two_digits, with_error
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, table
from dimscope.page.wording import count, share
from dimscope.studies.narrowing import figures
from dimscope.studies.narrowing.advice import DENSE, HEALED, ROUND, TextRead, candidate_name
from dimscope.studies.narrowing.facts import NarrowingFacts, narrowing_facts
from dimscope.units import readable_bytes


def plan_section(tables: Tables, facts: Facts) -> Section | None:
    """Show the advice, and what every candidate costs and saves."""
    plan, own = table(tables, "plan"), narrowing_facts(facts)
    if plan is None or not own.advice:
        return None
    first, *rest = own.advice
    star = f" A star is a candidate after {count(own.heal_steps, 'step')} of healing." if own.heal_steps else ""
    return Section(
        anchor="narrowing",
        name="Narrowing",
        title=first,
        findings=tuple(rest),
        blocks=(
            Plot("narrowing-size", figures.narrowing_plan(plan, "parameters"), "KL by size", "What a size costs"),
            Plot("narrowing-speed", figures.narrowing_plan(plan, "prefill_ratio"), "KL by speed", "What a speed costs"),
            _candidates(plan, own),
        ),
        how_to_read=(
            "Every point is a smaller model, not trained after it was cut: further right it is smaller, or faster; further down "
            "its predictions are nearer to the dense model's. Coloured lines are ways to choose the directions that are kept. "
            "Grey is dropping whole layers, the simplest way to a smaller standard checkpoint. Compare at the same number of "
            f"parameters, along a vertical line.{star} {SCALE_NOTE}"
        ),
        caveat=(
            f"Evaluated on {_windows(own)}, where the dense model has a loss of {_dense_loss(plan)}, and on which "
            "nothing was calibrated, by the "
            "KL to the dense model's predictions, not by tasks. Speeds are those of this machine, one sequence at a time, in "
            "rounds beside the dense model: a range that includes 1 shows no difference. The basis hardly changes the speed, so "
            "it is measured once per width. The speed of rounded weights depends on the engine, and is not measured."
        ),
        tables=("plan",),
    )  # fmt: skip


def _dense_loss(plan: pl.DataFrame) -> str:
    dense = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    error = " (± one standard error)" if dense["loss_stderr"] else ""
    return f"{with_error(dense['loss'], dense['loss_stderr'])} nats per token{error}"


def _windows(own: NarrowingFacts) -> str:
    return TextRead(own.texts, own.n_windows["evaluation"], length=own.window_length).windows


def _candidates(plan: pl.DataFrame, own: NarrowingFacts) -> Grid:
    dense = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    rows = tuple(
        (
            candidate_name(row), f"{row['parameters']:,}", f"{row['parameters'] / dense['parameters'] - 1:+.0%}",
            readable_bytes(row["bytes"]), _times(row, "prefill"), _times(row, "decode"), f"{row['loss']:.3f}",
            "–" if row["method"] == DENSE else with_error(row["loss_rise"], row["loss_rise_stderr"], sign="+"),
            "–" if row["method"] == DENSE else with_error(row["kl"], row["kl_stderr"]), share(row["top_1"]),
            "–" if row["method"] in (DENSE, ROUND) or row["kl_dropping"] is None else two_digits(row["kl_dropping"]),
        )
        for row in plan.iter_rows(named=True)
    )  # fmt: skip
    header = (
        "model", "parameters", "change", "weights", "reading", "writing", "loss", "rise of the loss", "KL", "same choice",
        "KL of dropping layers",
    )  # fmt: skip
    caption = (
        "All candidates. Reading and writing: speed relative to the dense model, a median and the range of its rounds. Loss and "
        f"KL in nats per token on {_windows(own)}, ± one standard error over the windows. Same choice: positions with the same "
        "top prediction. Last column: dropping layers to the same size, by interpolation between the numbers of layers."
    )
    return Grid(caption, header, rows, frozenset(range(1, len(header))))


def _times(row: Mapping[str, Any], name: str) -> str:
    if (ratio := row[f"{name}_ratio"]) is None:
        return "–"
    low, high = row[f"{name}_ratio_low"], row[f"{name}_ratio_high"]
    return f"{ratio:.2f}×" if low is None else f"{ratio:.2f}× ({low:.2f} to {high:.2f})"


def before_after_section(tables: Tables, facts: Facts) -> Section | None:
    """Show one narrow model beside the dense one: size, speed, quality, texts, and what does not shrink."""
    plan, own = table(tables, "plan"), narrowing_facts(facts)
    if plan is None or own.shown is None:
        return None
    rows = plan.filter((pl.col("basis") == own.shown.basis) & (pl.col("width") == own.shown.width))
    if rows.is_empty():
        return None
    healed = rows.filter(pl.col("method") == HEALED)
    after = (healed if healed.height else rows).row(0, named=True)
    before = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    texts = table(tables, "narrow_texts")
    blocks = [_comparison(plan, after, own)]
    if texts is not None:
        blocks.append(Grid("Greedy continuations", ("prompt", "dense", f"width {own.shown.width}"), _text_rows(texts)))
    tie = "One table stays input and output table, in a basis that lets one table serve both purposes. "
    return Section(
        anchor="narrow",
        name="Before and after",
        title=(
            f"At {own.shown.width} of {own.dim} dimensions {_agreement(after)} of the top predictions stay the same, with "
            f"{after['parameters'] / before['parameters']:.0%} of the parameters"
        ),
        blocks=tuple(blocks),
        how_to_read=(
            "The narrow model is a standard checkpoint, as dimscope narrow writes it. Weights that read or write the residual "
            "stream shrink with its width; attention heads and the KV cache do not."
            + (" In the title, ± is one standard error over the windows." if after["top_1_stderr"] else "")
        ),
        caveat=(tie if own.tied else "")
        + "Texts that begin alike and differ later need not differ in quality: compare the KL above.",
        tables=("plan", "narrow_texts") if texts is not None else ("plan",),
    )  # fmt: skip


def _agreement(row: Mapping[str, Any]) -> str:
    """Return the share of the same top predictions with its standard error."""
    stderr = row["top_1_stderr"]
    return f"{with_error(100 * row['top_1'], 100 * stderr)}%" if stderr else share(row["top_1"])


def _text_rows(texts: pl.DataFrame) -> tuple[tuple[str, ...], ...]:
    return tuple(texts.select("prompt", "dense", "narrow").iter_rows())


def _comparison(plan: pl.DataFrame, after: Mapping[str, Any], own: NarrowingFacts) -> Grid:
    before = plan.filter(pl.col("method") == DENSE).row(0, named=True)

    def change(name: str) -> str:
        return f"{after[name] / before[name] - 1:+.0%}"

    cache = f"{own.kv_bytes_per_token:,}"
    rows = [
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}", change("parameters")),
        ("bytes of weights", f"{before['bytes']:,}", f"{after['bytes']:,}", change("bytes")),
        ("KV cache, bytes per token", cache, cache, "unchanged"),
        ("loss (nats per token)", f"{before['loss']:.3f}", f"{after['loss']:.3f}", f"{after['loss_rise']:+.3f}"),
        ("KL to the dense model (nats)", "0", two_digits(after["kl"]), ""),
        ("same top prediction", "100%", share(after["top_1"]), ""),
    ]  # fmt: skip
    for name, title in (("prefill", "tokens of a prompt read per second"), ("decode", "tokens generated per second")):
        own_speed, dense_speed = after[f"{name}_tokens_per_s"], before[f"{name}_tokens_per_s"]
        if own_speed is not None:  # the ratio is of rounds beside the dense model, the speeds are of each model's own
            dense_cell = "–" if dense_speed is None else f"{dense_speed:,.0f}"
            rows.append((title, dense_cell, f"{own_speed:,.0f}", _times(after, name)))
    header = ("", f"dense, {own.dim}", f"narrow, {after['width']}", "change")
    caption = (
        f"The dense and the narrow model on {_windows(own)}. A speed is the median of the model's own rounds; the change of a "
        "speed is the median of the ratios in rounds side by side."
    )
    return Grid(caption, header, tuple(rows), frozenset({1, 2, 3}))

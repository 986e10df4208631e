"""Sections about narrowing: what every width would cost, and a narrow model beside the dense one."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from dimscope.evaluation.yardstick import SCALE_NOTE
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, table
from dimscope.page.wording import count, listed, share
from dimscope.studies.narrowing import figures
from dimscope.studies.narrowing.advice import DENSE, HEALED, ROUND, candidate_name
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
            _candidates(plan),
        ),
        how_to_read=(
            "Every point is a smaller model, not trained after it was cut: further right it is smaller, or faster; further down "
            "its predictions are nearer to the dense model's. Coloured lines are ways to choose the directions that are kept. "
            "Grey is dropping whole layers, the simplest way to a smaller standard checkpoint. Compare at the same number of "
            f"parameters, along a vertical line.{star} {SCALE_NOTE}"
        ),
        caveat=(
            f"Evaluated on {count(own.n_windows['evaluation'], 'window')} of {own.window_length} tokens of {listed(own.texts)}, "
            f"where the dense model has a loss of {_dense_loss(plan)} nats per token, and on which nothing was calibrated, by the "
            "KL to the dense model's predictions, not by tasks. Speeds are those of this machine, one sequence at a time, in "
            "rounds beside the dense model: a range that includes 1 shows no difference. The basis hardly changes the speed, so "
            "it is measured once per width. The speed of rounded weights depends on the engine, and is not measured."
        ),
        tables=("plan",),
    )  # fmt: skip


def _dense_loss(plan: pl.DataFrame) -> str:
    dense = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    return _with_error(dense["loss"], dense["loss_stderr"], ".3f")


def _candidates(plan: pl.DataFrame) -> Grid:
    dense = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    rows = tuple(
        (
            candidate_name(row), f"{row['parameters']:,}", f"{row['parameters'] / dense['parameters'] - 1:+.0%}",
            readable_bytes(row["bytes"]), _times(row, "prefill"), _times(row, "decode"), f"{row['loss']:.3f}",
            "–" if row["method"] == DENSE else _with_error(row["loss_rise"], row["loss_rise_stderr"], "+.3f"),
            "–" if row["method"] == DENSE else _with_error(row["kl"], row["kl_stderr"], ".4f"), share(row["top_1"]),
            "–" if row["method"] in (DENSE, ROUND) or row["kl_dropping"] is None else f"{row['kl_dropping']:.4f}",
        )
        for row in plan.iter_rows(named=True)
    )  # fmt: skip
    header = (
        "model", "parameters", "change", "weights", "reading", "writing", "loss", "rise of the loss", "KL", "same choice",
        "KL of dropping layers",
    )  # fmt: skip
    caption = (
        "All candidates. Reading and writing: speed relative to the dense model, a median and the range of its rounds. Loss and "
        "KL in nats per token, ± one standard error over the windows. Same choice: positions with the same top prediction. "
        "Last column: dropping layers to the same size."
    )
    return Grid(caption, header, rows, frozenset(range(1, len(header))))


def _with_error(value: float, stderr: float | None, form: str) -> str:
    """Return a value with its standard error, which one window does not give."""
    return f"{value:{form}}" if stderr is None else f"{value:{form}} ± {stderr:{form.lstrip('+')}}"


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
    blocks = [_comparison(before, after, own)]
    if texts is not None:
        blocks.append(Grid("Greedy continuations", ("prompt", "dense", f"width {own.shown.width}"), _text_rows(texts)))
    tie = "One table stays input and output table, in a basis that makes the gain of the final norm diagonal. "
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
        ),
        caveat=(tie if own.tied else "")
        + "Texts that begin alike and differ later need not differ in quality: compare the loss above.",
        tables=("plan", "narrow_texts") if texts is not None else ("plan",),
    )  # fmt: skip


def _agreement(row: Mapping[str, Any]) -> str:
    """Return the share of the same top predictions with its standard error."""
    stderr = row["top_1_stderr"]
    return share(row["top_1"]) if stderr is None else f"{share(row['top_1'])} ± {stderr:.1%}"


def _text_rows(texts: pl.DataFrame) -> tuple[tuple[str, ...], ...]:
    return tuple(texts.select("prompt", "dense", "narrow").iter_rows())


def _comparison(before: dict[str, Any], after: dict[str, Any], own: NarrowingFacts) -> Grid:
    def change(name: str) -> str:
        return f"{after[name] / before[name] - 1:+.0%}"

    cache = f"{own.kv_bytes_per_token:,}"
    rows = [
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}", change("parameters")),
        ("bytes of weights", f"{before['bytes']:,}", f"{after['bytes']:,}", change("bytes")),
        ("KV cache, bytes per token", cache, cache, "unchanged"),
        ("loss (nats per token)", f"{before['loss']:.3f}", f"{after['loss']:.3f}", f"{after['loss_rise']:+.3f}"),
        ("KL to the dense model (nats)", "0", f"{after['kl']:.4f}", ""),
        ("same top prediction", "100%", share(after["top_1"]), ""),
    ]  # fmt: skip
    for name, title in (("prefill", "tokens of a prompt read per second"), ("decode", "tokens generated per second")):
        speed, ratio = after[f"{name}_tokens_per_s"], after[f"{name}_ratio"]
        if speed is not None:  # beside the dense model of the same minute
            rows.append((title, f"{speed / ratio:,.0f}", f"{speed:,.0f}", _times(after, name)))
    header = ("", f"dense, {own.dim}", f"narrow, {after['width']}", "change")
    return Grid("The dense and the narrow model", header, tuple(rows), frozenset({1, 2, 3}))

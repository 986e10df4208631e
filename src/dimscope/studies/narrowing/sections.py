"""Sections about narrowing: what every width would cost, and a narrow model beside the dense one."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from dimscope.page.section import Facts, Grid, Plot, Section, Tables, table
from dimscope.page.wording import count, number, share
from dimscope.studies.narrowing import figures
from dimscope.studies.narrowing.advice import DENSE, HEALED, ROUND, candidate_name
from dimscope.units import readable_bytes


def plan_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell whether to narrow this model, and what every candidate costs and saves."""
    plan, said = table(tables, "plan"), facts.of("narrowing")
    if plan is None or not said.get("advice"):
        return None
    first, *rest = said["advice"]
    judged, length = said["n_windows"]["judged"], said["window_length"]
    star = f" A star is a candidate after {count(said['heal'], 'step')} of healing." if said.get("heal") else ""
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
            "Every point is a smaller model, not trained again: further right it is smaller, or faster; further down it says more "
            "nearly what the dense model says. Coloured lines are ways to choose the directions that are kept; grey is leaving "
            "out whole layers, the plainest way to a smaller standard checkpoint. Compare them at the same number of real "
            f"parameters, straight up and down.{star}"
        ),
        caveat=(
            f"Judged on {count(judged, 'window')} of {length} tokens that nothing was calibrated on, by the model's own "
            "predictions, not by tasks. Speeds are of this machine, one sequence at a time. The directions hardly change the "
            "speed, so it is measured once for each width. Rounded weights are judged, not timed: their speed is the engine's."
        ),
        tables=("plan",),
    )  # fmt: skip


def _candidates(plan: pl.DataFrame) -> Grid:
    dense = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    rows = tuple(
        (
            candidate_name(row), f"{row['parameters']:,}", f"{row['parameters'] / dense['parameters'] - 1:+.0%}",
            readable_bytes(row["bytes"]), _times(row["prefill_ratio"]), _times(row["decode_ratio"]),
            f"{row['loss']:.3f}", f"{row['kl']:.4f}", share(row["top_1"]),
            "–" if row["method"] in (DENSE, ROUND) or row["kl_dropping"] is None else f"{row['kl_dropping']:.4f}",
        )
        for row in plan.iter_rows(named=True)
    )  # fmt: skip
    header = (
        "model",
        "parameters",
        "change",
        "weights",
        "reading",
        "writing",
        "loss",
        "KL",
        "same choice",
        "by layers",
    )
    caption = "All candidates: speeds are times the dense model's, the last column is the KL of dropping layers to the same size"
    return Grid(caption, header, rows, frozenset(range(1, len(header))))


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def before_after_section(tables: Tables, facts: Facts) -> Section | None:
    """Show one narrow model beside the dense one: size, speed, quality, texts, and what does not shrink."""
    plan, said = table(tables, "plan"), facts.of("narrowing")
    if plan is None or not said.get("shown"):
        return None
    shown = said["shown"]
    own = plan.filter((pl.col("basis") == shown["basis"]) & (pl.col("width") == shown["width"]))
    if own.is_empty():
        return None
    healed = own.filter(pl.col("method") == HEALED)
    after = (healed if healed.height else own).row(0, named=True)
    before = plan.filter(pl.col("method") == DENSE).row(0, named=True)
    texts = table(tables, "narrow_texts")
    blocks = [_sides(before, after, said)]
    if texts is not None:
        rows = tuple((row["prompt"], row["dense"], row["narrow"]) for row in texts.iter_rows(named=True))
        blocks.append(
            Grid("The same prompts, greedily continued", ("prompt", "dense", f"width {shown['width']}"), rows)
        )
    kept = share(after["top_1"])
    return Section(
        anchor="narrow",
        name="Before and after",
        title=(
            f"At {shown['width']} of {said['dim']} dimensions {kept} of the first choices stay, with "
            f"{after['parameters'] / before['parameters']:.0%} of the parameters"
        ),
        blocks=tuple(blocks),
        how_to_read=(
            "The narrow model is a standard checkpoint, as dimscope narrow writes it. What reads the residual stream and what "
            "writes it has become smaller by the share of the width that went; what lies between, heads and their cache, has not."
        ),
        caveat=(
            "A tied model stays tied: its one table serves both sides where the gain of the final norm is diagonal. "
            if said.get("tied")
            else ""
        )
        + "Texts that begin alike and part later need not differ in quality: the loss above judges that.",
        tables=("plan", "narrow_texts") if texts is not None else ("plan",),
    )  # fmt: skip


def _sides(before: dict[str, Any], after: dict[str, Any], said: Mapping[str, Any]) -> Grid:
    def change(name: str) -> str:
        return f"{after[name] / before[name] - 1:+.0%}"

    cache = said["kv_bytes_per_token"]
    rows = [
        ("parameters", f"{before['parameters']:,}", f"{after['parameters']:,}", change("parameters")),
        ("bytes of weights", f"{before['bytes']:,}", f"{after['bytes']:,}", change("bytes")),
        ("KV cache, bytes per token", f"{cache:,}", f"{cache:,}", "does not shrink"),
        ("heads and head size", "as they are", "as they were", "do not shrink"),
        ("loss (nats per token)", number(before["loss"]), number(after["loss"]), f"{after['loss_rise']:+.3f}"),
        ("KL to the dense model (nats)", "0", f"{after['kl']:.4f}", ""),
        ("the same first choice", "100%", share(after["top_1"]), ""),
    ]  # fmt: skip
    for name, told in (("prefill", "prompt, tokens read per second"), ("decode", "tokens written per second")):
        if after[name] is not None:  # each beside the dense model of its own minute
            was = after[name] / after[f"{name}_ratio"]
            rows.append((told, f"{was:,.0f}", f"{after[name]:,.0f}", _times(after[f"{name}_ratio"])))
    header = ("", f"dense, {said['dim']}", f"narrow, {after['width']}", "change")
    return Grid("The dense model and the narrow one", header, tuple(rows), frozenset({1, 2, 3}))

"""Tables as the plan of a narrowing writes them, with numbers that a test plants."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from dimscope.page.section import Facts, StudyFacts
from dimscope.studies.narrowing.advice import (
    DENSE,
    DROP,
    HEALED,
    NARROW,
    ROUND,
    SCHEMA,
    TextRead,
    advice,
    shown_candidate,
    with_equal_size,
)

DIM, LAYERS, PARAMETERS, LOSS = 64, 6, 200_000_000, 2.5
CACHE = 12_288  # bytes per token
WIDTHS, BASES = (56, 48, 32), ("random", "raw", "normalised")
DROPPED = {5: 0.03, 4: 0.3, 3: 1.5}  # layers that are left -> KL
KL: Mapping[tuple[str, int], float] = {
    ("random", 56): 1.25, ("raw", 56): 0.02, ("normalised", 56): 0.01,
    ("random", 48): 3.75, ("raw", 48): 0.08, ("normalised", 48): 0.04,
    ("random", 32): 6.5, ("raw", 32): 0.75, ("normalised", 32): 0.5,
}  # fmt: skip
SAID = ("The keeper", "counted ships", "counted <ships>")  # prompt, and how the dense and the narrow model go on


def row(method: str, parameters: int, kl: float, speed: float | None = None, **more: object) -> dict[str, Any]:
    """Return a row of a plan: the loss rises by half of the KL, writing is sped up by half as much as reading.

    The dense model read 1,100 and wrote 110 tokens per second beside every candidate, and 1,000 and 100 by itself.
    """
    told: dict[str, Any] = {"method": method, "tied": False, "parameters": parameters, "bytes": 2 * parameters}
    judged = {
        "loss": LOSS + kl / 2, "loss_rise": kl / 2, "loss_rise_stderr": kl / 20, "kl": kl, "kl_stderr": kl / 10,
        "loss_high": LOSS + kl / 2 + 0.3, "choice_kl": kl, "choice_kl_high": 1.2 * kl, "judged_kl": 1.1 * kl,
        "judged_kl_low": kl, "judged_kl_high": 1.25 * kl, "judged_within": 0.99 if kl < 0.03 else 0.02,
    }  # fmt: skip
    timed: dict[str, float] = {}
    if speed is not None:
        writing = (1 + speed) / 2
        timed = {
            "prefill_tokens_per_s": 1100 * speed, "decode_tokens_per_s": 110 * writing, "prefill_ratio": speed,
            "decode_ratio": writing, "prefill_ratio_low": 0.98 * speed, "prefill_ratio_high": 1.03 * speed,
            "decode_ratio_low": 0.97 * writing, "decode_ratio_high": 1.04 * writing,
        }  # fmt: skip
    return dict.fromkeys(SCHEMA) | told | judged | timed | {"top_1": 1 / (1 + kl), "n_tokens": 4096} | more


def dense(**more: object) -> dict[str, Any]:
    """Return the row of the model as it is, by itself."""
    alone = {"prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 100.0, "prefill_ratio": 1.0, "decode_ratio": 1.0}
    return row(DENSE, PARAMETERS, 0.0) | alone | more


def narrow(basis: str, width: int, kl: float, **more: object) -> dict[str, Any]:
    """Return the row of a candidate, as much faster as it is narrower; 13 million parameters stay."""
    size = 13_000_000 + 187_000_000 * width // DIM
    return row(NARROW, size, kl, DIM / width, basis=basis, width=width) | more


def healed(basis: str, width: int, kl: float, **more: object) -> dict[str, Any]:
    """Return the row of a candidate after healing."""
    return narrow(basis, width, kl, method=HEALED) | more


def dropped(layers: int, kl: float, **more: object) -> dict[str, Any]:
    """Return the row of a model with `layers` of its layers: nine tenths of its parameters are in them."""
    share = 0.1 + 0.9 * layers / LAYERS
    return row(DROP, round(PARAMETERS * share), kl, 1 / share, layers=layers) | more


def frame(*rows: Mapping[str, Any]) -> pl.DataFrame:
    """Return the table `plan` of these rows, between those of the dense model and of its rounding to 8 bits."""
    rounded = row(ROUND, PARAMETERS, 0.002, bits=8) | {"bytes": 202_000_000}
    return with_equal_size(pl.DataFrame([dense(), *rows, rounded], schema=SCHEMA))


def plan(
    widths: Sequence[int] = WIDTHS,
    bases: Sequence[str] = BASES,
    layers: Mapping[int, float] = DROPPED,
    *more: Mapping[str, Any],
) -> pl.DataFrame:
    """Return the table `plan` of these widths, bases and layers, and of further rows, in the order of the study."""
    rows = [narrow(basis, width, KL[basis, width]) for width in widths for basis in bases]
    return frame(*rows, *(dropped(n, kl) for n, kl in layers.items()), *more)


def texts(*rows: tuple[str, str, str]) -> pl.DataFrame:
    """Return the table `narrow_texts`: what the dense model and the narrow one say to every prompt."""
    return pl.DataFrame(list(rows or (SAID,)), schema=["prompt", "dense", "narrow"], orient="row")


def facts(table: pl.DataFrame | None = None, **changes: Any) -> Facts:
    """Return the facts of a run with this plan, as report.json has them; a change to None takes a fact away."""
    table = plan() if table is None else table
    shown = shown_candidate(table)
    told = {
        "advice": advice(table, TextRead(["builtin prose"], 8, 6.0)), "texts": ["builtin prose"],
        "window_length": 512, "tied": False, "dim": DIM,
        "n_layers": LAYERS, "n_windows": {"calibration": 8, "evaluation": 8, "training": 8}, "heal_steps": 0,
        "shown": {"basis": shown["basis"], "width": shown["width"]}, "kv_bytes_per_token": CACHE, **changes,
    }  # fmt: skip
    study = StudyFacts({name: value for name, value in told.items() if value is not None}, ("plan",))
    return Facts("toy", n_rows=1000, dim=DIM, n_parameters=PARAMETERS, tied=False, studies={"narrowing": study})

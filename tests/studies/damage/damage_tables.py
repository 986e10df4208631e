"""Tables as the damage study writes them, with losses that a test plants."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
import polars as pl
import torch

from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.studies.damage import tables as measures
from dimscope.studies.damage.claims import breaking_frame, claims_frame
from dimscope.studies.damage.plan import Point

DIM, BASE = 100, 2.0
Losses = Mapping[tuple[str, float], Sequence[float]]  # (kind, strength) -> the loss of every seed

PLANTED: Losses = {
    ("truncate", 75): (2.1,),
    ("truncate", 50): (2.6,),
    ("truncate", 25): (4.0,),
    ("project", 75): (2.3, 2.32, 2.28),
    ("project", 50): (3.0, 3.1, 2.9),
    ("project", 25): (5.0, 5.2, 4.8),
    ("project-rescaled", 75): (2.2, 2.22, 2.18),
    ("project-rescaled", 50): (2.5, 2.55, 2.45),
    ("project-rescaled", 25): (4.5, 4.6, 4.4),
    ("noise", 0.5): (2.02, 2.03),
    ("noise", 1.0): (2.3, 2.5),
    ("shift", 0.5): (2.5, 2.6),
    ("shift", 1.0): (3.5, 3.7),
    ("scale", 0.5): (2.8,),
    ("scale", 2.0): (2.1,),
}


def error_of(kind: str, strength: float) -> float:
    """Return a relative error that grows as that of the kind does."""
    share = strength / DIM
    formulas = {
        "truncate": 0.6 * (1 - share),
        "project": sqrt(max(1 - share, 0)),
        "project-rescaled": sqrt(max(1 / share - 1, 0)) if share else 1.0,
        "scale": abs(strength - 1),
    }
    return formulas.get(kind, strength)


def damage(losses: Losses = PLANTED, on: str = "prose", side: Any = "input", base: float = BASE) -> pl.DataFrame:
    """Return the table `damage` of a model of 100 dimensions; agreement falls as the loss rises."""
    frames = [_point(Point(), {on: _judged(base, base)})]
    for (kind, strength), values in losses.items():
        for seed, loss in enumerate(values):
            point = Point(((kind, strength),), side, seed if PERTURBATIONS[kind].random else None)
            error = error_of(kind, strength)
            told: list[measures.Number] = [
                (measures.RELATIVE, error * (1 + 0.01 * seed), None, error, 1000),
                (measures.CAST, error, 0.0, None, 100),
            ]
            frames.append(_point(point, {f"{side} table": told, on: _judged(loss, base)}))
    return pl.concat(frames)


def _judged(loss: float, base: float) -> list[measures.Number]:
    return [
        (measures.LOSS, loss, None, None, 500),
        (measures.TOP_1, max(0.0, 1 - (loss - base) / base), None, None, 501),
    ]


def _point(point: Point, numbers: Mapping[str, Sequence[measures.Number]]) -> pl.DataFrame:
    return measures.damage_frame(measures.Place("toy", point, DIM), numbers)


def generations() -> pl.DataFrame:
    """Return answers to two prompts: undamaged, the same, and one that repeats itself and means mischief."""
    rows = []
    for kind, text, ids in (
        (None, "a b c d e", [1, 2, 3, 4, 5]),
        (("truncate", 75.0), "a b c d e", [1, 2, 3, 4, 5]),
        (("project", 25.0), "<script>alert(1)</script>", [1, 9, 9, 9, 9, 9]),
    ):
        point = Point() if kind is None else Point((kind,), "input", 0 if kind[0] == "project" else None)
        for number, prompt in enumerate(("Hello", "<b>Once</b>")):
            said = {"number": number, "prompt": prompt, "chat": False, "text": text, "n_tokens": len(ids),
                    "repetition": 1 / 3 if 9 in ids else 0.0, "ids": ids}  # fmt: skip
            rows.append(measures.Place("toy", point, DIM).columns() | said)
    return measures.with_agreement(pl.DataFrame(rows, schema=measures.GENERATIONS))


def operators() -> dict[str, pl.DataFrame]:
    """Return the tables of a random projection on 60 of 100 dimensions."""
    basis = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, 60)))[0])
    projector = basis @ basis.T
    return {
        "operator": measures.operator_frame(projector, 60),
        "operator_block": measures.operator_block_frame(projector),
        "operator_histogram": measures.operator_histogram_frame(projector),
    }


def damage_tables(frame: pl.DataFrame | None = None) -> dict[str, pl.DataFrame]:
    """Return all tables of the study."""
    frame = damage() if frame is None else frame
    told = {"damage": frame, "breaking": breaking_frame(frame), "claims": claims_frame(frame)}
    return {**told, "generations": generations(), **operators()}

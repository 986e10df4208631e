"""Tables as the damage study writes them, with losses that a test plants."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from dimscope.evaluation.evaluate import SUMS, Evaluation, evaluation_of
from dimscope.evaluation.generation import Continuation
from dimscope.evaluation.prompts import Prompt
from dimscope.interventions.perturbations import PERTURBATIONS
from dimscope.page.section import Facts
from dimscope.studies.damage import operator_tables
from dimscope.studies.damage.claims import claims_frame
from dimscope.studies.damage.facts import DamageFacts
from dimscope.studies.damage.losses import breaking_frame
from dimscope.studies.damage.plan import Point
from dimscope.studies.damage.tables import (
    CAST,
    RELATIVE,
    Measurement,
    damage_frame,
    evaluation_numbers,
    generations_frame,
    point_columns,
    windows_frame,
    with_agreement,
)

DIM, BASE = 100, 2.0
KL_PER_LOSS = 0.15  # a loss of 2.2 is at the tolerance of 0.03 nats of KL, and one of 5 at 0.45
ENTROPY = 6.0  # nats per token of the unigrams
SPREAD = (-0.03, -0.01, 0.01, 0.03, 0.0)  # of windows around a mean, as shares of it
Losses = Mapping[tuple[str, float], Sequence[float]]  # (kind, strength) -> the loss of every seed

PLANTED: Losses = {
    ("truncate", 75): (2.1,),
    ("truncate", 50): (2.6,),
    ("truncate", 25): (4.0,),
    ("project", 75): (2.3, 2.302, 2.298),
    ("project", 50): (3.0, 3.1, 2.9),
    ("project", 25): (5.0, 5.2, 4.8),
    ("project-rescaled", 75): (2.2, 2.202, 2.198),
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


class Rows(NamedTuple):
    """The tables `damage` and `windows`."""

    damage: pl.DataFrame
    windows: pl.DataFrame

    def where(self, condition: pl.Expr) -> "Rows":
        """Return the rows of both that meet a condition."""
        return Rows(*(frame.filter(condition) for frame in self))


def joined(*parts: Rows) -> Rows:
    """Return the rows of several, one below the other."""
    return Rows(*(pl.concat(frames) for frames in zip(*parts, strict=True)))


def point_rows(point: Point, errors: Mapping[Any, Any], evaluations: Mapping[str, Evaluation], dim: int = DIM) -> Rows:
    """Return the rows of one point."""
    columns = point_columns("toy", point, dim)
    numbers = {
        text: evaluation_numbers(evaluation, None if point.steps else ENTROPY)
        for text, evaluation in evaluations.items()
    }
    return Rows(damage_frame(columns, errors, numbers), windows_frame(columns, evaluations))


def damage(losses: Losses = PLANTED, text: str = "prose", side: Any = "input", base: float = BASE) -> Rows:
    """Return the tables of a model of 100 dimensions; KL is 0.15 nats per nat of loss, and agreement falls as the loss rises."""
    parts = [point_rows(Point(), {}, {text: _evaluated(base, base)})]
    for (kind, strength), values in losses.items():
        for seed, loss in enumerate(values):
            point = Point(((kind, strength),), side, seed if PERTURBATIONS[kind].random else None)
            error = error_of(kind, strength)
            errors = [
                Measurement(RELATIVE, error * (1 + 0.01 * seed), 1000, null=error),
                Measurement(CAST, error, 100, 0.0),
            ]
            parts.append(point_rows(point, {side: errors}, {text: _evaluated(loss, base)}))
    return joined(*parts)


def _evaluated(loss: float, base: float) -> Evaluation:
    rise, top_1 = loss - base, max(0.0, 1 - (loss - base) / base)
    return evaluation(loss, rise, KL_PER_LOSS * abs(rise), top_1)


def evaluation(loss: float, rise: float, kl: float, top_1: float, spread: Sequence[float] = SPREAD) -> Evaluation:
    """Return an evaluation of windows of 100 predicted tokens whose numbers differ by shares of their mean."""
    factors = 1 + np.array(spread)
    sums = np.zeros((len(factors), len(SUMS)))
    sums[:, :3] = 100
    for name, value in {"loss": loss, "loss_rise": rise, "kl": kl, "top_1": top_1}.items():
        sums[:, SUMS.index(name)] = 100 * value * (factors if name in ("loss_rise", "kl") else 1)
    return evaluation_of(torch.from_numpy(sums))


def generations() -> pl.DataFrame:
    """Return continuations of two prompts: undamaged, the same, and one that repeats itself and contains a script."""
    prompts = [Prompt("Hello", (1,), chat=False), Prompt("<b>Once</b>", (2,), chat=False)]
    frames = []
    for step, text, ids in (
        (None, "a b c d e", (1, 2, 3, 4, 5)),
        (("truncate", 75.0), "a b c d e", (1, 2, 3, 4, 5)),
        (("project", 25.0), "<script>alert(1)</script>", (1, 9, 9, 9, 9, 9)),
    ):
        point = Point() if step is None else Point((step,), "input", 0 if step[0] == "project" else None)
        columns = point_columns("toy", point, DIM)
        frames.append(generations_frame(columns, prompts, [Continuation(text, ids)] * len(prompts)))
    return with_agreement(pl.concat(frames))


def operators() -> dict[str, pl.DataFrame]:
    """Return the tables of a random projection on 60 of 100 dimensions."""
    basis = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, 60)))[0])
    projector = basis @ basis.T
    return {
        "operator": operator_tables.operator_frame(projector, 60),
        "operator_block": operator_tables.operator_block_frame(projector),
        "operator_histogram": operator_tables.operator_histogram_frame(projector),
    }


def damage_tables(rows: Rows | None = None) -> dict[str, pl.DataFrame]:
    """Return all tables of the study."""
    rows, answers = damage() if rows is None else rows, generations()
    tables = {**rows._asdict(), "breaking": breaking_frame(*rows), "claims": claims_frame(*rows, answers)}
    return {**tables, "generations": answers, **operators()}


def facts(**changes: Any) -> Facts:
    """Return the facts of a run with these tables, as report.json has them."""
    own = {"facts": asdict(DamageFacts(new_tokens=6, **changes)), "tables": list(damage_tables())}
    sizes = {"model": "toy", "vocab_size": 1000, "hidden_size": DIM, "n_parameters": 9, "tied": True}
    return Facts.from_json(json.loads(json.dumps(sizes | {"studies": {"damage": own}})))

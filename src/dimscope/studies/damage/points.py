"""What is measured at one point: errors of the tables, the evaluation on every text, continuations of the prompts."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import polars as pl

from dimscope.evaluation.evaluate import evaluate, require_finite_evaluation
from dimscope.evaluation.generation import generate
from dimscope.evaluation.unigrams import unigram_entropy
from dimscope.interventions.insertion import perturbed
from dimscope.interventions.maps import RowMap
from dimscope.interventions.row_errors import row_errors, token_errors
from dimscope.interventions.table_summary import make_chain
from dimscope.studies.damage.inputs import DamageSession
from dimscope.studies.damage.plan import Point, Table
from dimscope.studies.damage.tables import (
    POINT,
    Measurement,
    damage_frame,
    error_numbers,
    evaluation_numbers,
    evaluations_of,
    generations_frame,
    point_columns,
    windows_frame,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_maps(session: DamageSession, point: Point) -> dict[Table, RowMap]:
    """Return the map of each table that a point changes."""
    return {name: make_chain(point.steps, session.summaries[name], point.seed or 0) for name in point.tables}


@contextmanager
def damaged(session: DamageSession, point: Point, maps: Mapping[Table, RowMap]) -> Generator["PreTrainedModel"]:
    """Open the model with the change of a point in it; untied tables have a map each."""
    model = session.model
    if not point.steps:
        yield model
    elif point.side == "both" and not session.inputs.checkpoint.tied:
        with perturbed(model, maps["input"]), perturbed(model, maps["output"], "output"):
            yield model
    else:
        with perturbed(model, next(iter(maps.values())), point.side):
            yield model


def evaluate_point(session: DamageSession, point: Point, maps: Mapping[Table, RowMap]) -> pl.DataFrame:
    """Return the rows of a point in the table `windows`: its evaluation on every window of every text."""
    _ = session.tables  # a table with NaN is refused before the model is loaded
    baselines = session.baselines  # of the undamaged model, so before anything is changed
    with damaged(session, point, maps) as model:
        evaluations = {name: evaluate(model, base, changed=bool(point.steps)) for name, base in baselines.items()}
    if not point.steps:
        for evaluation in evaluations.values():
            require_finite_evaluation(evaluation, session.inputs.placement.dtype)
    return windows_frame(_columns(session, point), evaluations)


def measure_point(
    session: DamageSession, point: Point, maps: Mapping[Table, RowMap], windows: pl.DataFrame
) -> pl.DataFrame:
    """Return the rows of a point in the table `damage`: the errors of its tables, and its evaluation on every text.

    Args:
        session: What the study works on.
        point: The change.
        maps: The map of each table.
        windows: What `evaluate_point` returns.
    """
    errors = {name: _table_errors(session, point, name, change) for name, change in maps.items()}
    # A text has one unigram entropy, whatever is changed.
    entropy = {} if point.steps else {name: unigram_entropy(base.windows) for name, base in session.baselines.items()}
    evaluations = {
        name: evaluation_numbers(evaluation, entropy.get(name)) for name, evaluation in evaluations_of(windows).items()
    }
    return damage_frame(_columns(session, point), errors, evaluations)


def _table_errors(session: DamageSession, point: Point, name: Table, change: RowMap) -> list[Measurement]:
    sample = session.samples[name]
    norm = session.norm if name == "input" else None
    measured = row_errors(sample.rows, sample.ids, change, session.model.dtype, norm)
    return error_numbers(change, session.summaries[name], measured, point)


def continue_prompts(
    session: DamageSession,
    point: Point,
    maps: Mapping[Table, RowMap],
    listener: Callable[[list[str]], object] | None = None,
) -> pl.DataFrame:
    """Return the rows of a point in the table `generations`; the listener gets the texts as they grow."""
    inputs = session.inputs
    with damaged(session, point, maps) as model:
        continuations = generate(model, inputs.tokenizer, inputs.prompts, inputs.decoding, listener)
    return generations_frame(_columns(session, point), inputs.prompts, continuations)


def measure_tokens(session: DamageSession, point: Point, name: Table, change: RowMap) -> pl.DataFrame:
    """Return the rows of a point in the table `token_errors`: the error of every token of a table."""
    columns = _columns(session, point)
    constants = [pl.lit(columns[c], dtype=POINT[c]).alias(c) for c in ("change", "side", "seed")]
    return token_errors(session.tables[name], change).select(*constants, pl.lit(name).alias("table"), pl.all())


def _columns(session: DamageSession, point: Point) -> dict[str, Any]:
    return point_columns(session.inputs.checkpoint.title, point, session.inputs.dim)

"""The plan: what every width would cost, compared with dropping layers and with rounding weights. Writes no checkpoint.

All candidates share one calibration pass and one pass of the dense model, and are evaluated on the same windows.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl

from dimscope.checkpoints.families import head_size
from dimscope.checkpoints.tensors import DTYPES
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.generation import Decoding, generate
from dimscope.evaluation.prompts import Prompt, prepare_prompt
from dimscope.evaluation.unigrams import unigram_entropy
from dimscope.narrowing.bases import LEARNED, check_basis
from dimscope.narrowing.target import Target, check_width, resolve_target
from dimscope.storage import Store
from dimscope.studies.narrowing.advice import TextRead, advice, shown_candidate, with_equal_size
from dimscope.studies.narrowing.facts import NarrowingFacts, ShownCandidate
from dimscope.studies.narrowing.plan_rows import (
    PlanRun,
    candidate_recipe,
    dense_row,
    final_model,
    healed_row,
    narrow_rows,
    rounded_row,
    shallower_rows,
)
from dimscope.studies.narrowing.session import NarrowingSession, open_session
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.reading import context_of
from dimscope.studies.study import Monitor, RunOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dimscope.checkpoints.checkpoint import Checkpoint

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)  # of the width: the default candidates
ALIGNED = (64, 32, 16, 8)  # default widths are multiples of the first that is an eighth of the width at most
PLANNED = ("random", "raw", "normalised")  # the default bases
NEW_TOKENS = 64  # of a continuation, at most


def default_widths(target: Target) -> tuple[int, ...]:
    """Return aligned widths at some shares of the model's, as far as its architecture allows them."""
    dim, step = target.dim, target.width_step
    aligned = next((a for a in ALIGNED if a <= dim / 8), 1)
    every = math.lcm(step, aligned) if math.lcm(step, aligned) <= dim / 8 else step
    widths = {max(every, round(dim * share / every) * every) for share in SHARES}
    return tuple(sorted((w for w in widths if w < dim), reverse=True))


def run_plan(checkpoint: Checkpoint, settings: NarrowSettings, store: Store, monitor: Monitor) -> RunOutput:
    """Compute the table `plan`, one row per candidate; finished candidates are reused.

    Raises:
        InvalidArgument: A setting does not fit the model, or the text is too short.
        UnsupportedCheckpoint: The family is not narrowed.
    """
    target = resolve_target(checkpoint, export=settings.export_as, tied=settings.tied)
    widths, bases = _candidate_widths(target, settings), tuple(dict.fromkeys(settings.bases)) or PLANNED
    for basis in bases:
        check_basis(basis)
    session = open_session(target, settings, monitor, trains=LEARNED in bases or settings.heal_steps > 0)
    prompts = _prepared_prompts(session)
    run = PlanRun(session, store)
    rows = [dense_row(run), *(row for width in widths for row in narrow_rows(run, width, bases))]
    rows += [*shallower_rows(run), rounded_row(run)]
    shown = shown_candidate(with_equal_size(pl.concat(rows)))
    if settings.heal_steps:
        rows.append(healed_row(run, shown))
    computed = pl.concat(rows)
    plan = store.table("plan", {"rows": computed.rows()}, lambda: with_equal_size(computed))
    tables = {"plan": plan, **_continuations(run, shown, prompts)}
    if run.training_folder is not None:
        shutil.rmtree(run.training_folder, ignore_errors=True)  # nothing is left to resume
    return RunOutput(tables, _facts(session, plan, shown, widths, bases).as_json(), session.warnings)


def _candidate_widths(target: Target, settings: NarrowSettings) -> tuple[int, ...]:
    widths = tuple(sorted(set(settings.widths), reverse=True)) or default_widths(target)
    for width in widths:
        check_width(target, width)
    if not widths:
        raise InvalidArgument(f"{target.checkpoint.title}: no width below its {target.dim} is allowed")
    return widths


def _facts(
    session: NarrowingSession, plan: pl.DataFrame, shown: Mapping[str, Any], widths: Sequence[int], bases: Sequence[str]
) -> NarrowingFacts:
    windows, target = session.windows, session.target
    return NarrowingFacts(
        advice=advice(
            plan,
            TextRead(list(session.texts), len(windows.evaluation), unigram_entropy(windows.evaluation), session.length),
        ),
        shown=ShownCandidate(shown["basis"], shown["width"]),
        texts=list(session.texts),
        window_length=session.length,
        n_windows={name: len(getattr(windows, name)) for name in ("calibration", "evaluation", "training")},
        tied=target.tied,
        widths=list(widths),
        bases=list(bases),
        dim=target.dim,
        n_layers=int(target.config.num_hidden_layers),
        export=target.export,
        heal_steps=session.settings.heal_steps,
        kv_bytes_per_token=_kv_bytes(target),
        dtype=session.placement.dtype,
        device=session.placement.device,
    )


def _kv_bytes(target: Target) -> int:
    """Return the bytes of keys and values per token in the stored dtype: the same at every width."""
    config: Any = target.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (
        2 * config.num_hidden_layers * heads * head_size(config) * DTYPES[target.checkpoint.input_table.dtype].itemsize
    )


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _prepared_prompts(session: NarrowingSession) -> list[Prompt]:
    checkpoint = session.target.checkpoint
    tokenizer = require_tokenizer(checkpoint.source)
    prompts = [prepare_prompt(tokenizer, prompt) for prompt in session.settings.prompts]
    context = context_of(checkpoint)
    for prompt in prompts:
        if context is not None and len(prompt.ids) >= context:
            raise InvalidArgument(
                f"`prompts`: {prompt.text[:40]!r} has {len(prompt.ids)} tokens, and the context of the model is {context}; "
                "shorten it"
            )
    return prompts


def _continuations(run: PlanRun, shown: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[str, pl.DataFrame]:
    """Return the table `narrow_texts`, where there are prompts."""
    if not prompts:
        run.store.drop("narrow_texts")
        return {}
    recipe = candidate_recipe(run.session, shown["basis"], shown["width"], healed=True)
    arguments = recipe | {"prompts": [asdict(prompt) for prompt in prompts]}

    def compute() -> pl.DataFrame:
        return _continue(run.session, final_model(run, shown["basis"], shown["width"]), prompts)

    return {"narrow_texts": run.store.table("narrow_texts", arguments, compute)}


def _continue(session: NarrowingSession, small: PreTrainedModel, prompts: Sequence[Prompt]) -> pl.DataFrame:
    """Return the greedy continuation of every prompt by the dense and by the narrow model."""
    checkpoint = session.target.checkpoint
    tokenizer, context = require_tokenizer(checkpoint.source), context_of(checkpoint)
    small.generation_config = deepcopy(session.dense().generation_config)  # it knows where a text ends
    longest = max(len(prompt.ids) for prompt in prompts)
    decoding = Decoding(max_new_tokens=NEW_TOKENS if context is None else min(NEW_TOKENS, context - longest))
    dense, narrow = (generate(model, tokenizer, prompts, decoding) for model in (session.dense(), small))
    rows = [(prompt.text, a.text, b.text) for prompt, a, b in zip(prompts, dense, narrow, strict=True)]
    return pl.DataFrame(rows, schema=["prompt", "dense", "narrow"], orient="row")

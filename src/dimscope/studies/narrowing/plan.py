"""The plan: what every width would cost before anything is written, beside dropping layers and rounding weights.

All candidates share one calibration pass and one pass of the dense model, and are judged on the same windows.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.families import check_width, head_size, layout_of, width_step
from dimscope.checkpoints.tensors import DTYPES
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.generation import Decoding, generate
from dimscope.evaluation.prompts import Prompt, prepare_prompt
from dimscope.evaluation.throughput import Throughput, throughput
from dimscope.narrowing.bases import LEARNED, check_basis
from dimscope.narrowing.conversion import check_export
from dimscope.storage import Store
from dimscope.studies.narrowing.advice import (
    DENSE,
    DROP,
    HEALED,
    NARROW,
    ROUND,
    SCHEMA,
    SPEEDS,
    advice,
    shown_candidate,
    with_equal_size,
)
from dimscope.studies.narrowing.session import LENGTH, Bench, Candidate
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.reading import context_of
from dimscope.studies.study import Monitor, RunOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)  # of the width, where none are asked for
ALIGNED = (64, 32, 16, 8)  # what widths are rounded to a multiple of: the first that is an eighth of the width at most
PLANNED = ("random", "raw", "normalised")  # bases, where none are asked for
BITS = 8
NEW_TOKENS = 64  # of a text, as far as the context goes


def default_widths(checkpoint: Checkpoint, export: str | None = None) -> tuple[int, ...]:
    """Aligned widths at some shares of the model's, as far as its architecture allows them."""
    dim, step = checkpoint.input_table.shape[1], width_step(checkpoint, export) or 1
    aligned = next((a for a in ALIGNED if a <= dim / 8), 1)
    every = math.lcm(step, aligned) if math.lcm(step, aligned) <= dim / 8 else step
    widths = {max(every, round(dim * share / every) * every) for share in SHARES}
    return tuple(sorted((w for w in widths if w < dim), reverse=True))


def run_plan(checkpoint: Checkpoint, settings: NarrowSettings, store: Any, monitor: Monitor) -> RunOutput:
    """Candidates of all widths and bases, layers dropped, weights rounded: the table `plan`, a row for each.

    Finished candidates are used again. Raises InvalidArgument, and what opening, running and reading raise.
    """
    folder = store
    layout, export = layout_of(checkpoint), check_export(checkpoint, settings.export_as)
    chosen = tuple(sorted(set(settings.widths), reverse=True)) or default_widths(checkpoint, export)
    kinds = tuple(dict.fromkeys(settings.bases)) or PLANNED
    for basis in kinds:
        check_basis(basis)
    for width in chosen:
        check_width(checkpoint, layout, width, export)
    if not chosen:
        raise InvalidArgument(f"{checkpoint.title}: no width below its {checkpoint.input_table.shape[1]} is allowed")
    bench = Bench(checkpoint, settings, trains=LEARNED in kinds or settings.heal_steps > 0, announce=monitor.announce)
    prompts = _prompts(bench)
    work = _Candidates(bench, folder)
    n_layers = int(checkpoint.config.num_hidden_layers) if checkpoint.config else 0
    rows = [work.row("dense", lambda: bench.dense, {"method": DENSE, "tied": checkpoint.tied})]
    rows += [row for width in chosen for row in work.of_width(width, kinds)]
    for n in _dropped(n_layers):
        what = {"method": DROP, "layers": n_layers - n, "tied": checkpoint.tied}
        rows.append(work.row(f"without-{n}", lambda n=n: bench.without(n), what))
    what = {"method": ROUND, "bits": BITS, "tied": checkpoint.tied}
    rows.append(work.row(f"bits-{BITS}", lambda: bench.quantised(BITS), what, timed=False))
    shown = shown_candidate(with_equal_size(pl.concat(rows)))
    if settings.heal_steps:
        rows.append(work.healed(shown))
    found = pl.concat(rows)
    tables = {"plan": folder.table("plan", {"rows": found.rows()}, lambda: with_equal_size(found))}
    if prompts:
        given = work.given(shown["basis"], shown["width"], healed=True) | {
            "prompts": [asdict(prompt) for prompt in prompts]
        }
        tables["narrow_texts"] = folder.table(
            "narrow_texts", given, lambda: _texts(bench, work.shown(shown["basis"], shown["width"]), prompts)
        )
    else:
        folder.drop("narrow_texts")
    if work.store is not None:
        shutil.rmtree(work.store, ignore_errors=True)  # nothing is left to resume
    plan = tables["plan"]
    told = {
        "advice": list(advice(plan)), "texts": list(bench.texts), "window_length": bench.length, "tied": bench.tied,
        "widths": list(chosen), "bases": list(kinds), "dim": checkpoint.input_table.shape[1], "n_layers": n_layers,
        "n_windows": {name: len(getattr(bench.reading, name)) for name in ("calibration", "judged", "training")},
        "export": export, "shown": {"basis": shown["basis"], "width": shown["width"]}, "heal": settings.heal_steps,
        "kv_bytes_per_token": _cache(bench),
        **asdict(bench.placement),
    }  # fmt: skip
    return RunOutput(tables, told)


def _cache(bench: Bench) -> int:
    """Bytes of keys and values of a token in the dtype of the checkpoint: the same at every width."""
    config: Any = bench.checkpoint.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (
        2 * config.num_hidden_layers * heads * head_size(config) * DTYPES[bench.checkpoint.input_table.dtype].itemsize
    )


def _dropped(n_layers: int) -> list[int]:
    """How many layers are taken away, in a few steps up to half of them."""
    return sorted({n for n in (1, 2, 3, *(round(n_layers / part) for part in (6, 4, 3, 2))) if 0 < n <= n_layers / 2})


class _Candidates:
    """Makes, judges and times one candidate after the other; each is on disk before the next begins."""

    def __init__(self, bench: Bench, folder: Store) -> None:
        self.bench, self.folder = bench, folder
        self.store = None if folder.folder is None else folder.folder / "training"

    def given(self, basis: str, width: int, *, healed: bool = False) -> dict[str, Any]:
        """What a narrow model depends on, beside what all depend on."""
        settings = self.bench.settings
        learned = {"learn": settings.learn_steps} if basis == LEARNED else {}
        mended = {"heal": settings.heal_steps, "lora": settings.lora} if healed and settings.heal_steps else {}
        return {"basis": basis, "width": width, "recipe": self.bench.recipe, **learned, **mended}

    def row(
        self,
        name: str,
        make: Callable[[], PreTrainedModel],
        what: Mapping[str, Any],
        *,
        timed: bool = True,
        given: Mapping[str, Any] | None = None,
    ) -> pl.DataFrame:
        """The row of a candidate: used again where it is there, with the same `given`, else made and measured."""
        asked = {"recipe": self.bench.recipe, "timed": timed, **what, **(given or {})}
        return self.folder.table(f"candidates/{name}", asked, lambda: self._measured(name, make(), what, timed))

    def of_width(self, width: int, bases: Sequence[str]) -> list[pl.DataFrame]:
        """One row for each basis; the directions make no difference to the speed, which the first is measured for."""
        rows: list[pl.DataFrame] = []
        for basis in bases:
            what = {"method": NARROW, "basis": basis, "width": width, "tied": self.bench.tied}
            row = self.row(
                f"{basis}-{width}", lambda b=basis: self.made(b, width).model, what, timed=not rows,
                given=self.given(basis, width),
            )  # fmt: skip
            rows.append(row.with_columns(rows[0].select(SPEEDS)) if rows else row)
        return rows

    def made(self, basis: str, width: int) -> Candidate:
        return self.bench.candidate(basis, width, store=self.store and self.store / f"{basis}-{width}")

    def healed(self, shown: Mapping[str, Any]) -> pl.DataFrame:
        """The row of a candidate after healing; it is as fast as it was."""
        basis, width = shown["basis"], shown["width"]
        what = {"method": HEALED, "basis": basis, "width": width, "tied": self.bench.tied}
        given = self.given(basis, width, healed=True)
        row = self.row(f"{basis}-{width}-healed", lambda: self.shown(basis, width), what, timed=False, given=given)
        return row.with_columns(pl.lit(shown[name]).alias(name) for name in SPEEDS)

    def shown(self, basis: str, width: int) -> PreTrainedModel:
        """The narrow model that is shown, healed where that is asked; made twice, training is resumed at its end."""
        made = self.made(basis, width)
        return (
            self.bench.heal(made.cut, store=self.store and self.store / "healing").model
            if self.bench.settings.heal_steps
            else made.model
        )

    def _measured(self, name: str, model: PreTrainedModel, what: Mapping[str, Any], timed: bool) -> pl.DataFrame:
        bench = self.bench
        found = bench.judge(model)
        read = min(LENGTH, bench.length)
        # Speeds are told against the dense model in the same minute: machines get busy and idle again.
        speed = _speeds(throughput({"dense": bench.dense, name: model}, read=read), name) if timed else {}
        size = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": self._bytes(model, what.get("bits"))}
        judged = {
            key: getattr(found, key) for key in ("loss", "loss_rise", "loss_rise_stderr", "kl", "kl_stderr", "top_1")
        }
        bench.say(f"{name}: {size['parameters'] / 1e6:.1f}M parameters, KL {found.kl:.4f}")
        return pl.DataFrame([{**what, **size, **judged, **speed, "n_tokens": found.n_positions}], schema=SCHEMA)

    def _bytes(self, model: PreTrainedModel, bits: int | None) -> int:
        """Of the weights as they would be stored: in the dtype of the checkpoint, or rounded, with a scale for each row."""
        stored = DTYPES[self.bench.checkpoint.input_table.dtype].itemsize
        if bits is None:
            return stored * sum(p.numel() for p in model.parameters())
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = sum(p.numel() for p in model.parameters() if p.ndim != 2)
        return sum(p.numel() * bits // 8 + len(p) * stored for p in matrices) + stored * others


def _speeds(speed: Mapping[str, Throughput], name: str) -> dict[str, float]:
    dense, own = speed["dense"], speed[name]
    ratios = {"prefill_ratio": own.prefill / dense.prefill, "decode_ratio": own.decode / dense.decode}
    return {"prefill": own.prefill, "decode": own.decode, **ratios}


def _prompts(bench: Bench) -> list[Prompt]:
    tokenizer = require_tokenizer(bench.checkpoint.source)
    prompts = [prepare_prompt(tokenizer, prompt) for prompt in bench.settings.prompts]
    context = context_of(bench.checkpoint)
    for prompt in prompts:
        if context is not None and len(prompt.ids) >= context:
            raise InvalidArgument(
                f"`prompts`: {prompt.text[:40]!r} has {len(prompt.ids)} tokens, and the model reads {context} at most; shorten it"
            )
    return prompts


def _texts(bench: Bench, small: PreTrainedModel, prompts: Sequence[Prompt]) -> pl.DataFrame:
    """What the dense model and a narrow one say to every prompt, greedily."""
    tokenizer = require_tokenizer(bench.checkpoint.source)
    small.generation_config = deepcopy(bench.dense.generation_config)  # it knows where a text ends
    context = context_of(bench.checkpoint)
    room = NEW_TOKENS if context is None else min(NEW_TOKENS, context - max(len(prompt.ids) for prompt in prompts))
    told = [generate(model, tokenizer, prompts, Decoding(max_new_tokens=room)) for model in (bench.dense, small)]
    rows = [(prompt.text, dense.text, narrow.text) for prompt, dense, narrow in zip(prompts, *told, strict=True)]
    return pl.DataFrame(rows, schema=["prompt", "dense", "narrow"], orient="row")

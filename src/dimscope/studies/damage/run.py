"""Damage: what a model loses when its embedding table is changed, change by change, beside the error that theory expects.

Every number of a point is on disk before the next point begins.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from dimscope.activations.first_norm import first_norm
from dimscope.activations.forward import input_device
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import is_out_of_memory, load_model, out_of_memory, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.evaluate import Baseline, baseline, evaluate
from dimscope.evaluation.generated_text import begin_ids, sample_windows
from dimscope.evaluation.generation import Decoding, generate
from dimscope.evaluation.prompts import Template, check_context, has_template, prepare_prompt
from dimscope.interventions.insertion import perturbed
from dimscope.interventions.maps import LinearMap, RowMap
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.row_errors import RowErrors, row_errors, token_errors
from dimscope.interventions.table_summary import TableSummary, make_chain, summarise_table
from dimscope.storage import Store
from dimscope.studies.damage import tables as measures
from dimscope.studies.damage.claims import breaking_frame, claims_frame
from dimscope.studies.damage.plan import (
    LENGTH,
    WINDOWS,
    Point,
    facts_of,
    plan_points,
    tables_of,
)
from dimscope.studies.damage.settings import DamageSettings
from dimscope.studies.estimate import estimate_damage
from dimscope.studies.reading import GENERATED, context_of, texts_or_written, window_length, windows_at_once
from dimscope.studies.study import Monitor, RunOutput
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows, require_rows, stream_windows, text_tokens
from dimscope.vectors.embedding import open_table
from dimscope.vectors.table import VectorTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = 8192  # rows on which errors are measured that have no exact form
SHOWN = 2 / 3  # share of the dimensions of the random projection that is shown as a matrix
PROJECTIONS = ("project", "project-rescaled")  # whose operators are those of uniformly random subspaces
OPTIONAL = ("generations", "token_errors", "operator", "operator_block", "operator_histogram")


@dataclass(frozen=True, slots=True)
class Writing:
    """What is being written: a change, which of how many it is, and the answers to the prompts so far."""

    change: str
    number: int
    total: int
    seconds_left: float | None
    prompts: Sequence[str]
    texts: Sequence[str]
    undamaged: Sequence[str] | None  # what the model as it is answered; None while it does


def run_damage(checkpoint: Checkpoint, settings: DamageSettings, store: Store, monitor: Monitor) -> RunOutput:
    """Runs the study point by point.

    Finished points are used again. The monitor watches the texts as they are written.
    Raises InvalidArgument and what opening texts, tables and models, and running them, raises.
    """
    work = DamageWork(checkpoint, store, settings)
    monitor.announce(work.estimate())
    try:
        work.run(monitor.watch)
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise out_of_memory(checkpoint.name) from e
        raise
    return RunOutput(work.finish(), work.facts())


class DamageWork:
    """The points of a study on their way into tables. Model, moments and baselines are there once a point needs them."""

    def __init__(self, checkpoint: Checkpoint, folder: Store, settings: DamageSettings) -> None:
        self.checkpoint, self.folder, self.settings = checkpoint, folder, settings
        self.length = window_length(checkpoint, settings.length, LENGTH)
        self.tokenizer: PreTrainedTokenizerBase = require_tokenizer(checkpoint.source)
        output = checkpoint.input_table if checkpoint.tied else checkpoint.output_table
        dims = {"input": checkpoint.input_table.shape[1]} | ({"output": output.shape[1]} if output else {})
        self.dim = dims["input"]
        self.decoding = Decoding(settings.decoding, settings.new_tokens, settings.seed)
        self.template: Template = (
            "auto" if settings.chat is settings.system is None else "plain" if settings.chat is False else "chat"
        )
        self.points = plan_points(settings, dims)
        self.prompts = [prepare_prompt(self.tokenizer, p, self.template, settings.system) for p in settings.prompts]
        check_context(self.prompts, self.decoding.max_new_tokens, context_of(checkpoint))
        if GENERATED in settings.texts:
            text_tokens(begin_ids(self.tokenizer), self.length)  # now, not after a model is loaded
        self.texts = texts_or_written(settings.texts)
        self.read = {name: self._cut(text) for name, text in self.texts.items() if text is not None}
        known = [max(p.ids) for p in self.prompts] + [int(w.ids.max()) for ws in self.read.values() for w in ws]
        require_rows(max(known, default=0), checkpoint.input_table.shape[0])
        self.placement = place(checkpoint, dtype=settings.dtype, device=settings.device)
        self.batch = settings.batch or windows_at_once(self.placement, self.length)
        self._made: tuple[Point, dict[str, RowMap]] | None = None

    def _cut(self, text: Text) -> list[Window]:
        asked = self.settings.windows
        if not self.settings.from_start:
            return middle_windows(text, self.tokenizer, length=self.length, count=asked, most=WINDOWS)
        found = list(islice(stream_windows(text, self.tokenizer, length=self.length), asked or WINDOWS))
        if asked is not None and len(found) < asked:
            raise InvalidArgument(
                f"{text.name} fits {len(found)} windows of {self.length}, not {asked}: --windows {len(found)} or a smaller --length"
            )
        return found

    # ---- what a point needs ----------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> "PreTrainedModel":
        return load_model(self.checkpoint, self.placement, trust_remote_code=self.settings.trust_remote_code)

    @cached_property
    def tables(self) -> dict[str, VectorTable]:
        """The tables that are changed; a tied model has one, under both names."""
        wanted = {table for side in self.settings.sides for table in tables_of(side)}
        first = {table: "input" if self.checkpoint.tied else table for table in sorted(wanted)}
        advice = "a model with such a table is not judged"
        opened = {name: open_table(self.checkpoint, name, advice=advice) for name in sorted(set(first.values()))}
        return {table: opened[name] for table, name in first.items()}

    @cached_property
    def summaries(self) -> dict[str, TableSummary]:
        different = {id(table): table for table in self.tables.values()}
        made = {key: summarise_table(table) for key, table in different.items()}
        return {name: made[id(table)] for name, table in self.tables.items()}

    @cached_property
    def samples(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Ids and rows of each table on which errors are measured."""
        drawn = {}
        for name, table in self.tables.items():
            random = np.random.default_rng(self.settings.seed)
            ids = torch.from_numpy(np.sort(random.permutation(table.n_rows)[:SAMPLE]))
            drawn[name] = (ids, table.rows(ids))
        return drawn

    @cached_property
    def baselines(self) -> dict[str, Baseline]:
        windows = {name: self.read[name] if name in self.read else self._written() for name in self.texts}
        return {name: baseline(self.model, listed, self.batch) for name, listed in windows.items()}

    def _written(self) -> list[Window]:
        count = self.settings.windows or WINDOWS
        return sample_windows(self.model, self.tokenizer, count=count, length=self.length, seed=self.settings.seed)

    def maps(self, point: Point) -> dict[str, RowMap]:
        """The change of each table of a point; the last ones are kept."""
        if self._made is None or self._made[0] != point:
            seed = point.seed or 0
            made: dict[str, RowMap] = {
                name: make_chain(point.steps, self.summaries[name], seed) for name in tables_of(point.side)
            }
            self._made = (point, made)
        return self._made[1]

    @contextmanager
    def damaged(self, point: Point) -> Generator["PreTrainedModel"]:
        """The model with the change of a point in it; untied tables each have their own."""
        if not point.steps:
            yield self.model
        elif point.side == "both" and not self.checkpoint.tied:
            maps = self.maps(point)
            with perturbed(self.model, maps["input"]), perturbed(self.model, maps["output"], "output"):
                yield self.model
        else:
            with perturbed(self.model, next(iter(self.maps(point).values())), point.side):
                yield self.model

    # ---- running ---------------------------------------------------------------------------------------------------

    def estimate(self) -> str:
        """What is about to run, in one line."""
        n_windows = sum(len(self.read.get(name, [])) or self.settings.windows or WINDOWS for name in self.texts)
        answered = sum(self._answers(point) for point in self.points) * self.decoding.max_new_tokens
        return estimate_damage(self.checkpoint, self.placement, len(self.points), n_windows * self.length, answered)

    def run(self, watch: Callable[[Writing], object] | None) -> None:
        """Every point that is not finished."""
        began, total = time.monotonic(), len(self.points)
        with tqdm(
            self.points, desc=self.checkpoint.title, unit="change", disable=None if watch is None else True
        ) as bar:
            for number, point in enumerate(bar, 1):
                bar.set_postfix_str(point.label)
                left = None if number == 1 else (time.monotonic() - began) / (number - 1) * (total - number + 1)
                self._damage(point)
                if self._answers(point):
                    self._generations(point, self._listener(watch, point, number, left))
                if self.settings.token_errors and point.steps:
                    for name in tables_of(point.side):
                        self._token_errors(point, name)
                self._made = None

    def _answers(self, point: Point) -> bool:
        """Whether the prompts are answered at a point."""
        drawn = point.seed is None or point.seed < self.settings.seed + self.settings.text_draws
        return bool(self.prompts) and drawn

    def _arguments(self, point: Point) -> dict[str, Any]:
        return {"steps": point.steps, "side": point.side, "seed": point.seed, "placement": asdict(self.placement)}

    @property
    def _read_arguments(self) -> dict[str, Any]:
        """What is judged on; a text that the model writes is told by its seed."""
        settings, texts = self.settings, self.texts.items()
        return {
            "texts": {name: text.fingerprint if text else settings.seed for name, text in texts},
            "windows": [len(self.read[name]) if name in self.read else settings.windows for name, _ in texts],
            "length": self.length, "from_start": settings.from_start, "batch": self.batch, "seed_of_rows": settings.seed,
        }  # fmt: skip

    @property
    def _written_arguments(self) -> dict[str, Any]:
        return {"prompts": [asdict(p) for p in self.prompts], "decoding": asdict(self.decoding)}

    def _damage(self, point: Point) -> pl.DataFrame:
        """The errors of a change, and what it does to every text."""
        given = self._arguments(point) | self._read_arguments
        return self.folder.table(f"points/{point.slug}.damage", given, lambda: self._measured(point))

    def _measured(self, point: Point) -> pl.DataFrame:
        place = measures.Place(self.checkpoint.title, point, self.dim)
        _ = self.tables  # a damaged one is refused before the model is loaded
        bases = self.baselines  # of the model as it is, so before anything is put into it
        numbers: dict[str, list[measures.Number]] = {}
        if point.steps:
            for name, change in self.maps(point).items():
                sampled = self._sampled(change, name)
                numbers[f"{name} table"] = measures.error_numbers(change, self.summaries[name], sampled, point)
        with self.damaged(point) as model:
            numbers |= {
                name: measures.judged_numbers(evaluate(model, base, changed=bool(point.steps)))
                for name, base in bases.items()
            }
        return measures.damage_frame(place, numbers)

    def _sampled(self, change: RowMap, table: str) -> RowErrors:
        ids, rows = self.samples[table]
        norm = self._norm if table == "input" else None
        return row_errors(rows, ids, change, self.model.dtype, norm)

    @cached_property
    def _norm(self) -> Callable[[Tensor], Tensor] | None:
        """The first norm of the model, for rows as they are stored."""
        module = first_norm(self.model)
        if module is None:
            return None
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)
        device = input_device(self.model)
        return lambda rows: module((rows.to(device) * scale).to(rows.dtype))

    def _generations(self, point: Point, told: Callable[[list[str]], object] | None = None) -> pl.DataFrame:
        """What the model says at a point to all prompts."""

        def written() -> pl.DataFrame:
            with self.damaged(point) as model:
                found = generate(model, self.tokenizer, self.prompts, self.decoding, told)
            place = measures.Place(self.checkpoint.title, point, self.dim)
            return measures.generations_frame(place, self.prompts, found)

        given = self._arguments(point) | self._written_arguments
        return self.folder.table(f"points/{point.slug}.generations", given, written)

    def _listener(
        self, watch: Callable[[Writing], object] | None, point: Point, number: int, left: float | None
    ) -> Callable[[list[str]], object] | None:
        if watch is None:
            return None
        own = self._generations(self.points[0])["text"].to_list() if point.steps else None
        total, prompts = len(self.points), self.settings.prompts
        return lambda texts: watch(Writing(point.label, number, total, left, prompts, texts, own))

    def _token_errors(self, point: Point, table: str) -> pl.DataFrame:
        def measured() -> pl.DataFrame:
            place = measures.Place(self.checkpoint.title, point, self.dim).columns()
            told = token_errors(self.tables[table], self.maps(point)[table])
            columns = ("change", "side", "seed")
            known = [pl.lit(place[name], dtype=measures.PLACE[name]).alias(name) for name in columns]
            return told.select(*known, pl.lit(table).alias("table"), pl.all())

        given = {"steps": point.steps, "seed": point.seed, "side": point.side, "table": table}
        return self.folder.table(f"points/{point.slug}.token_errors.{table}", given, measured)

    # ---- tables ----------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, pl.DataFrame]:
        """The tables of the study: those of its points, one below the other, and what they say."""
        points, settings, folder = self.points, self.settings, self.folder
        asked = {"points": [point.slug for point in points]} | self._read_arguments | asdict(self.placement)
        damage = folder.table("damage", asked, lambda: pl.concat(self._damage(point) for point in points))
        made = {
            "damage": damage,
            "breaking": folder.table("breaking", asked, lambda: breaking_frame(damage)),
            "claims": folder.table("claims", asked, lambda: claims_frame(damage)),
        } | self._operators()
        if answered := [point for point in points if self._answers(point)]:
            given = {"points": [p.slug for p in answered]} | self._written_arguments | asdict(self.placement)
            made["generations"] = folder.table(
                "generations", given,
                lambda: measures.with_agreement(pl.concat(self._generations(p) for p in answered)),
            )  # fmt: skip
        if settings.token_errors:
            wanted = [(point, table) for point in points if point.steps for table in tables_of(point.side)]
            given = {"points": [[point.slug, table] for point, table in wanted]}
            made["token_errors"] = folder.table(
                "token_errors", given, lambda: pl.concat(self._token_errors(*one) for one in wanted)
            )
        for name in OPTIONAL:
            if name not in made:
                folder.drop(name)
        return {name: table for name, table in made.items() if table.height}

    def _operators(self) -> dict[str, pl.DataFrame]:
        """The random projection nearest to two thirds of the dimensions, as a matrix."""
        found = {point.kept(): point for point in reversed(self.points) if point.kind in PROJECTIONS}
        counts = [k for k in found if k is not None and 0 < k < self.dim]
        if not counts or self.dim < 2:
            return {}
        k = min(counts, key=lambda count: abs(count - SHOWN * self.dim))
        seed = found[k].seed or 0

        @cache  # a QR of d x k, and three tables are made from it
        def projector() -> Tensor:
            change = make_map("project", next(iter(self.summaries.values())), k, seed)
            assert isinstance(change, LinearMap)
            return change.matrix

        made: Mapping[str, Callable[[], pl.DataFrame]] = {
            "operator": lambda: measures.operator_frame(projector(), int(k)),
            "operator_block": lambda: measures.operator_block_frame(projector()),
            "operator_histogram": lambda: measures.operator_histogram_frame(projector()),
        }
        given = {"k": k, "d": self.dim, "seed": seed}
        return {name: self.folder.table(name, given, compute) for name, compute in made.items()}

    def facts(self) -> dict[str, Any]:
        """What the page needs to know of the run, beside its tables."""
        return facts_of(self.settings) | {
            "texts": list(self.texts), "window_length": self.length, "n_changes": len(self.points) - 1,
            "template": has_template(self.tokenizer), "chat": any(prompt.chat for prompt in self.prompts),
            **asdict(self.placement),
        }  # fmt: skip

"""What a study of damage works on: fixed before any model is loaded, and what is loaded once it is needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.activations.first_norm import first_norm
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.model import Placement, input_device, load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.errors import InvalidArgument
from dimscope.evaluation.evaluate import Baseline, baseline
from dimscope.evaluation.generated_text import begin_ids, sample_windows
from dimscope.evaluation.generation import Decoding
from dimscope.evaluation.prompts import Prompt, Template, check_context, prepare_prompt
from dimscope.interventions.table_summary import TableSummary, summarise_table
from dimscope.studies.damage.plan import Point, Table, plan_points
from dimscope.studies.damage.settings import DamageSettings
from dimscope.studies.reading import (
    GENERATED,
    context_of,
    fitted_length,
    line_end_warnings,
    texts_or_generated,
    windows_at_once,
)
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, middle_windows, require_rows, stream_windows, text_tokens
from dimscope.vectors.embedding import open_table
from dimscope.vectors.table import VectorTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH, WINDOWS = 512, 4  # tokens of a window, and windows, where the settings leave them open
N_SAMPLED = 8192  # rows on which errors without an exact form are measured


@dataclass(frozen=True, slots=True, eq=False)
class DamageInputs:
    """Everything that a study works on, checked, before a weight is read.

    Attributes:
        checkpoint: The model.
        settings: The settings of the study.
        tokenizer: The tokenizer of the model.
        points: The undamaged model first, then every change.
        texts: Texts by the name that is shown; None for the text that the model generates.
        windows: Windows of every text but the generated one.
        length: Tokens of a window.
        prompts: Prompts that are continued at the points.
        decoding: How they are continued.
        placement: Device and dtype.
        batch: Windows per forward pass.
        warnings: What the user should know of the texts.
    """

    checkpoint: Checkpoint
    settings: DamageSettings
    tokenizer: "PreTrainedTokenizerBase"
    points: Sequence[Point]
    texts: Mapping[str, Text | None]
    windows: Mapping[str, Sequence[Window]]
    length: int
    prompts: Sequence[Prompt]
    decoding: Decoding
    placement: Placement
    batch: int
    warnings: Sequence[str] = ()

    @property
    def dim(self) -> int:
        """Return the width of the input table."""
        return self.checkpoint.input_table.shape[1]

    def continues_prompts(self, point: Point) -> bool:
        """Whether the prompts are continued at a point: at the first `text_draws` seeds."""
        early = point.seed is None or point.seed < self.settings.seed + self.settings.text_draws
        return bool(self.prompts) and early


def damage_inputs(checkpoint: Checkpoint, settings: DamageSettings) -> DamageInputs:
    """Read the texts, prepare the prompts and plan the points.

    Raises:
        InvalidArgument: The settings do not fit the model or the texts.
        DimscopeError: A text or the tokenizer cannot be read.
    """
    tokenizer = require_tokenizer(checkpoint.source)
    texts = texts_or_generated(settings.texts, keep_line_ends=settings.keep_line_ends)
    fitted = fitted_length(checkpoint, texts, settings.length, LENGTH)
    length = fitted.length
    points = plan_points(settings, _widths(checkpoint))
    prompts = [prepare_prompt(tokenizer, p, _template(settings), settings.system) for p in settings.prompts]
    check_context(prompts, settings.new_tokens, context_of(checkpoint))
    if GENERATED in settings.texts:
        text_tokens(begin_ids(tokenizer), length)  # raises now, not after a model is loaded
    windows = {name: cut_windows(text, tokenizer, length, settings) for name, text in texts.items() if text is not None}
    largest_ids = [max(p.ids) for p in prompts] + [int(w.ids.max()) for group in windows.values() for w in group]
    require_rows(max(largest_ids, default=0), checkpoint.input_table.shape[0])
    placement = place(checkpoint, dtype=settings.dtype, device=settings.device)
    decoding = Decoding(settings.decoding, settings.new_tokens, settings.seed)
    batch = settings.batch or windows_at_once(placement, length)
    return DamageInputs(
        checkpoint,
        settings,
        tokenizer,
        points,
        texts,
        windows,
        length,
        prompts,
        decoding,
        placement,
        batch,
        (*line_end_warnings(texts), *fitted.warnings),
    )


def _widths(checkpoint: Checkpoint) -> dict[str, int]:
    output = checkpoint.input_table if checkpoint.tied else checkpoint.output_table
    return {"input": checkpoint.input_table.shape[1]} | ({"output": output.shape[1]} if output else {})


def _template(settings: DamageSettings) -> Template:
    if settings.chat is None:  # the system prompt of a preset is for the models that have a template
        return "auto" if settings.system is None or settings.preset is not None else "chat"
    return "chat" if settings.chat else "plain"


def cut_windows(
    text: Text, tokenizer: "PreTrainedTokenizerBase", length: int, settings: DamageSettings
) -> Sequence[Window]:
    """Return the windows of a text: spread over it, or from its beginning.

    Raises:
        InvalidArgument: The text does not fit as many windows as requested.
    """
    if not settings.from_start:
        return middle_windows(text, tokenizer, length=length, count=settings.windows, most=WINDOWS)
    windows = list(islice(stream_windows(text, tokenizer, length=length), settings.windows or WINDOWS))
    if settings.windows is not None and len(windows) < settings.windows:
        raise InvalidArgument(
            f"`windows` must be 1 to {len(windows)} for {text.name} and windows of {length} tokens, got "
            f"{settings.windows}; pass fewer or take a smaller `length`"
        )
    return windows


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Some rows of a table, and their ids."""

    ids: Int[Tensor, " n"]
    rows: Float[Tensor, "n d"]


class DamageSession:
    """What is loaded or computed once, when the first point needs it. Finished studies need none of it."""

    def __init__(self, inputs: DamageInputs) -> None:
        self.inputs = inputs

    @cached_property
    def model(self) -> "PreTrainedModel":
        """Return the model, ready to run."""
        trust = self.inputs.settings.trust_remote_code
        return load_model(self.inputs.checkpoint, self.inputs.placement, trust_remote_code=trust)

    @cached_property
    def tables(self) -> Mapping[Table, VectorTable]:
        """Return the tables that are changed at some point; a tied model has one, under both names."""
        checkpoint = self.inputs.checkpoint
        names = sorted({name for point in self.inputs.points for name in point.tables})
        advice = "a model with such a table is not evaluated"
        stored: dict[Table, Table] = {name: "input" if checkpoint.tied else name for name in names}
        opened = {name: open_table(checkpoint, name, advice=advice) for name in sorted(set(stored.values()))}
        return {name: opened[stored[name]] for name in names}

    @cached_property
    def summaries(self) -> Mapping[Table, TableSummary]:
        """Return what perturbations know of each table."""
        distinct = {id(table): table for table in self.tables.values()}
        computed = {key: summarise_table(table) for key, table in distinct.items()}
        return {name: computed[id(table)] for name, table in self.tables.items()}

    @cached_property
    def samples(self) -> Mapping[Table, SampledRows]:
        """Return the rows of each table on which errors are measured."""
        sampled = {}
        for name, table in self.tables.items():
            random = np.random.default_rng(self.inputs.settings.seed)
            ids = torch.from_numpy(np.sort(random.permutation(table.n_rows)[:N_SAMPLED]))
            sampled[name] = SampledRows(ids, table.rows(ids))
        return sampled

    @cached_property
    def baselines(self) -> Mapping[str, Baseline]:
        """Return what the undamaged model predicts on each text."""
        inputs = self.inputs
        windows = {name: inputs.windows[name] if name in inputs.windows else self._generated() for name in inputs.texts}
        return {name: baseline(self.model, listed, inputs.batch) for name, listed in windows.items()}

    def _generated(self) -> list[Window]:
        inputs, settings = self.inputs, self.inputs.settings
        count = settings.windows or WINDOWS
        return sample_windows(self.model, inputs.tokenizer, count=count, length=inputs.length, seed=settings.seed)

    @cached_property
    def norm(self) -> Callable[[Tensor], Tensor] | None:
        """Return the first norm of the model, for rows as they are stored; None where it has none."""
        module = first_norm(self.model)
        if module is None:
            return None
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)
        device = input_device(self.model)
        return lambda rows: module((rows.to(device) * scale).to(rows.dtype))

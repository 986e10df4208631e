"""The verbs of the library. Each takes what the user has: a name or path, an opened checkpoint or a loaded model.

    dimscope.dimensions(array)                                    any N x d vectors, or the table of a model
    dimscope.neighbors(model, tokenizer, " water")
    dimscope.layers(model, tokenizer, text="...", shuffles=2)     a study: in memory, or with out= in a folder
    dimscope.narrow(model, tokenizer, width=192, text="...")      a smaller model

A model is never changed: weights, modes, hooks and config are afterwards what they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dimscope import studies
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.loaded import as_checkpoint
from dimscope.errors import InvalidArgument
from dimscope.studies.study import SILENT, Monitor, Study, StudyResult
from dimscope.vectors.embedding import open_table
from dimscope.vectors.sources import is_vectors, vectors_of
from dimscope.vectors.table import VectorTable, require_finite

if TYPE_CHECKING:
    import polars as pl
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dimscope.evaluation.text_loss import TextLoss
    from dimscope.geometry.dimension_table import Dimensions
    from dimscope.geometry.spectrum import Spectrum
    from dimscope.interventions.maps import RowMap
    from dimscope.studies.narrowing.run import NarrowResult
    from dimscope.texts.texts import Text

Side = Literal["input", "output"]
LONGEST = 512  # tokens of a window of `evaluate`, where the context of the model is longer
MOST_WINDOWS = 8  # of `evaluate`

# ---- numbers of a table --------------------------------------------------------------------------------------------


def dimensions(source: Any, *, centred: bool = True, side: Side = "input") -> Dimensions:
    """Compute every linear effective dimension of a table of vectors, beside that of white noise of the same shape.

    One pass over the rows in float64, then d x d work.

    Args:
        source: N x d vectors (numpy array, torch tensor, frame, .npy, .npz, .parquet or .safetensors file), or a model
            (name or path, Checkpoint, PreTrainedModel), whose embedding table is taken.
        centred: Whether the mean row is subtracted first.
        side: "input" or "output" embeddings, for a model.

    Returns:
        A mapping from the name of a measure to its value; it prints as a small table.

    Raises:
        InvalidArgument: The source is no N x d table and no model.
        NonFiniteRows: Rows hold NaN or Inf.

    >>> import numpy
    >>> X = numpy.random.default_rng(0).normal(size=(1000, 3)) @ numpy.diag([1.0, 1.0, 0.0])
    >>> round(dimensions(X)["participation_ratio"].value, 1)
    2.0
    """
    from dimscope.geometry.dimension_table import dimensions_of

    return dimensions_of(table_of(source, side=side), centred=centred)


def spectrum(source: Any, *, centred: bool = True, side: Side = "input") -> Spectrum:
    """Compute the singular values of a table of vectors, through its d x d moments in float64.

    Args:
        source: As for `dimensions`, or Moments.
        centred: Whether the mean row is subtracted first.
        side: "input" or "output" embeddings, for a model.

    Raises:
        InvalidArgument: The source is no N x d table and no model.
        NonFiniteRows: Rows hold NaN or Inf.

    >>> spectrum("builtin").dim
    256
    """
    from dimscope.geometry.spectrum import moments_of, spectrum_of
    from dimscope.vectors.moments import Moments

    moments = source if isinstance(source, Moments) else moments_of(table_of(source, side=side))
    return spectrum_of(moments, centred=centred)


def table_of(source: Any, *, side: Side = "input") -> VectorTable:
    """Open N x d vectors, or the embedding table of a model, as a table that is read block by block.

    Args:
        source: As for `dimensions`.
        side: "input" or "output" embeddings, for a model.
    """
    opened = as_source(source)
    return require_finite(opened) if isinstance(opened, VectorTable) else open_table(opened, side)


def as_source(source: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Checkpoint | VectorTable:
    """Return what a user passes as an opened checkpoint, or as vectors that are not checked yet.

    Args:
        source: As for `dimensions`.
        tokenizer: The tokenizer of a PreTrainedModel.

    Raises:
        InvalidArgument: A tokenizer comes with vectors, or `source` is neither a model nor vectors.
        CheckpointError: The model cannot be opened.
    """
    if not isinstance(source, VectorTable) and not is_vectors(source):
        return as_checkpoint(source, tokenizer)
    if tokenizer is not None:
        raise InvalidArgument("`tokenizer` goes with a loaded transformers model, and vectors have no tokens")
    return source if isinstance(source, VectorTable) else vectors_of(source)


def neighbors(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    queries: str | Sequence[str] = (),
    *,
    k: int = 20,
    metric: Literal["cosine", "centred cosine", "euclidean"] = "cosine",
    side: Side = "input",
) -> pl.DataFrame:
    """Find the nearest tokens of each query, exactly, in all dimensions and in the first 10 components.

    Args:
        model: Name or path, Checkpoint or PreTrainedModel, or N x d vectors as for `dimensions`, whose labels are searched.
        tokenizer: The tokenizer of a PreTrainedModel; None for a checkpoint, which has its own.
        queries: A text (" water"), an id ("#3015"), an expression ("king - man + woman"), or several of them.
        k: Neighbors per query.
        metric: How near is measured.
        side: "input" or "output" embeddings.

    Returns:
        Columns query, space, rank, id, label, category, and cosine or distance.

    Raises:
        InvalidArgument: No query, an empty one, or a row outside the table.
        TokenizerMissing: A query is text, and there is no tokenizer.

    >>> neighbors("builtin", None, "#300", k=1)["rank"].to_list()
    [1, 1]
    """
    import polars as pl

    from dimscope.studies.embedding.neighbors import neighbor_tables
    from dimscope.studies.embedding.source import open_source

    queries = (queries,) if isinstance(queries, str) else tuple(queries)
    if not queries:
        raise InvalidArgument("`queries` takes one or more texts, ids or expressions, got none")
    source = open_source(as_source(model, tokenizer), side)
    tables = neighbor_tables(source, queries, k=k, metric=metric)
    return pl.concat(tables.values())


# ---- studies -------------------------------------------------------------------------------------------------------


_MODEL = "Name or path, Checkpoint, or PreTrainedModel."
_MODEL_OR_VECTORS = "Name or path, Checkpoint, PreTrainedModel, or N x d vectors as for `dimensions`."


def study_verb(study: Study) -> Callable[..., StudyResult]:
    """Return the function that runs a study: `dimscope.layers`, `dimscope.damage` and so on."""

    def verb(
        model: Any = "builtin",
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        text: str | Sequence[str] | None = None,
        out: str | Path | None = None,
        monitor: Monitor = SILENT,
        **settings: Any,
    ) -> StudyResult:
        return run(study, model, tokenizer, text=text, out=out, monitor=monitor, **settings)

    verb.__name__ = verb.__qualname__ = study.name
    verb.__doc__ = f"""{study.question}

    Args:
        model: {_MODEL_OR_VECTORS if study.takes_vectors else _MODEL}
        tokenizer: The tokenizer of a PreTrainedModel.
        text: The text itself, or several; `texts` takes files, URLs and builtin:prose instead.
        out: Folder in which tables and page are written, and from which finished tables are reused. None keeps all in memory.
        monitor: Receives a line for every stage.
        **settings: The fields of {study.settings.__name__}.

    Returns:
        A StudyResult: `.tables`, `.summary()`, `.figure(name)`, `.page(out)`.

    Raises:
        InvalidArgument: A setting is out of range, or does not fit the model or the text.
        DimscopeError: What opening and running the model raise.
    """
    return verb


def run(
    study: Study,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    monitor: Monitor = SILENT,
    **settings: Any,
) -> StudyResult:
    """Run a study; see `study_verb`, whose arguments these are."""
    from dimscope.report import run_studies

    own = settings_of(study, text, settings)
    folder = None if out is None else Path(out)
    [result] = run_studies(as_source(model, tokenizer), {study: own}, folder, monitor)
    return result


def settings_of(study: Study, text: str | Sequence[str] | None, settings: dict[str, Any]) -> Any:
    """Return the settings of a study from keyword arguments, on top of those of their preset.

    Raises:
        InvalidArgument: A name is unknown, a value is out of range, or both `text` and `texts` are given.
    """
    names = study.settings.__dataclass_fields__  # ty: ignore[missing-attribute]
    if unknown := [name for name in settings if name not in names]:
        raise InvalidArgument(f"{study.name} has no setting `{unknown[0]}`; its settings are {', '.join(names)}")
    if text is not None:
        if "texts" in settings:
            raise InvalidArgument("`text` is the text itself and `texts` are files or URLs: give one of them")
        if "texts" not in names:
            raise InvalidArgument(f"{study.name} reads no text, so it takes no `text`")
        settings = settings | {"texts": _texts(text, settings.get("keep_line_ends", False))}
    preset = settings.get("preset")
    if preset is not None and preset not in study.presets:
        raise InvalidArgument(f"`preset` must be one of {', '.join(study.presets)}, got {preset!r}")
    return study.settings(**{**study.presets.get(preset or "", {}), **settings})


def _texts(text: str | Sequence[str], keep_line_ends: bool) -> tuple[Text, ...]:
    from dimscope.texts.texts import text_from_string

    strings = (text,) if isinstance(text, str) else tuple(text)
    names = ["text"] if len(strings) == 1 else [f"text {number}" for number in range(1, len(strings) + 1)]
    named = zip(strings, names, strict=True)
    return tuple(text_from_string(string, name, keep_line_ends=keep_line_ends) for string, name in named)


def damage(
    model: Any = "builtin",
    tokenizer: PreTrainedTokenizerBase | None = None,
    changes: str | Sequence[str] = (),
    **arguments: Any,
) -> StudyResult:
    """Measure what a model loses when its embedding table loses dimensions, or is changed otherwise.

    Args:
        model: Name or path, Checkpoint, or PreTrainedModel.
        tokenizer: The tokenizer of a PreTrainedModel.
        changes: Changes of the table such as "truncate:50%" or "noise:0.1"; none is a sweep of the common ones.
        **arguments: `text`, `out`, `monitor` and the fields of DamageSettings, as for `layers`.

    Raises:
        InvalidArgument: A change or setting is out of range, or does not fit the model or the text.
    """
    return run(studies.DAMAGE, model, tokenizer, changes=changes, **arguments)


def narrow(
    model: Any = "builtin",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    width: int,
    basis: str = "normalised",
    text: str | Sequence[str] | None = None,
    monitor: Monitor = SILENT,
    **settings: Any,
) -> NarrowResult:
    """Cut the hidden size of a model, in memory.

    Args:
        model: Name or path, Checkpoint, or PreTrainedModel, which is not changed.
        tokenizer: The tokenizer of a PreTrainedModel.
        width: The hidden size to cut to.
        basis: How the kept directions are chosen: normalised, learned, raw, embedding, coordinates or random.
        text: The text itself to calibrate, train and evaluate on; `texts` takes files, URLs and builtin:prose instead.
        monitor: Receives a line for every stage.
        **settings: The fields of NarrowSettings.

    Returns:
        A NarrowResult: `.model` is an ordinary PreTrainedModel, `.account` says what became smaller.

    Raises:
        InvalidArgument: The width does not fit the model, or a setting is out of range.
        UnsupportedCheckpoint: The family is not narrowed.
    """
    from dimscope.studies.narrowing.run import narrow_in_memory

    own = settings_of(studies.NARROWING, text, settings | {"widths": (width,), "bases": (basis,)})
    return narrow_in_memory(as_checkpoint(model, tokenizer), own, monitor)


# ---- a perturbed model ---------------------------------------------------------------------------------------------


def perturbation(kind: str, source: Any, strength: float = 0.0, *, seed: int = 0, side: Side = "input") -> RowMap:
    """Make a perturbation of an embedding table, such as its truncation to 100 dimensions.

    Args:
        kind: Its name, as `dimscope damage --help` lists them: "truncate", "noise" and others.
        source: A model or vectors, as for `dimensions`: whose moments the perturbation is made from.
        strength: Dimensions, standard deviations, bits or a factor, as the kind has it.
        seed: Random seed, where the kind is random.
        side: "input" or "output" embeddings, for a model.

    Raises:
        InvalidArgument: The kind is unknown, or the strength out of range.
    """
    from dimscope.interventions.perturbations import make_map
    from dimscope.interventions.table_summary import summarise_table

    return make_map(kind, summarise_table(table_of(source, side=side)), strength, seed)


def perturbed(
    model: PreTrainedModel, change: RowMap, side: Literal["input", "output", "both"] = "input"
) -> AbstractContextManager[None]:
    """Return a context in which a loaded model runs with a perturbed embedding table; afterwards it is as before.

    Args:
        model: The model. No weight is touched: rows are changed as they are looked up.
        change: A perturbation from `perturbation`.
        side: The table that is changed; a tied model stays tied only with "both".

    Raises:
        InvalidArgument: The model has no output table, and `side` asks for it.
    """
    from dimscope.interventions.insertion import perturbed as inserted

    return inserted(model, change, side)


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text: str | None = None,
    texts: str = "builtin:prose",
    length: int | None = None,
    keep_line_ends: bool = False,
) -> TextLoss:
    """Measure the loss of a model on a text, as it is at the moment: perturbed, inside `perturbed`.

    Args:
        model: Name or path, Checkpoint, or PreTrainedModel.
        tokenizer: The tokenizer of a PreTrainedModel.
        text: The text itself.
        texts: A file, folder, URL or builtin:prose instead.
        length: Tokens per window, of at most 8 windows; by default the context length of the model, at most 512, or
            as many as the text has.
        keep_line_ends: Keep CRLF and CR line ends of the text, which are read as LF otherwise.

    Raises:
        InvalidArgument: The text has fewer than two tokens, or the model cannot read `length` tokens.

    >>> round(evaluate("builtin", text="Once upon a time there was a little girl.").loss, 1)
    2.4
    """
    from dimscope.checkpoints.model import load_model
    from dimscope.checkpoints.vocabulary import require_tokenizer
    from dimscope.evaluation.text_loss import text_loss
    from dimscope.studies.reading import fitted_length
    from dimscope.texts.texts import open_text
    from dimscope.texts.windows import middle_windows

    checkpoint = as_checkpoint(model, tokenizer)
    reader = require_tokenizer(checkpoint.source)
    source = open_text(texts, keep_line_ends=keep_line_ends) if text is None else _texts(text, keep_line_ends)[0]
    size = fitted_length(checkpoint, {source.name: source}, length, LONGEST).length
    windows = middle_windows(source, reader, length=size, count=None, most=MOST_WINDOWS)
    return text_loss(load_model(checkpoint), windows)

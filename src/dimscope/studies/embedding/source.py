"""What the embedding study reads: a table with the names of its rows. Of a model, a source has both tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.vocabulary import Token, Vocabulary, read_vocabulary
from dimscope.errors import InvalidArgument
from dimscope.geometry.neighbors import NeighborIndex, build_index
from dimscope.geometry.spectrum import moments_of
from dimscope.geometry.untrained import UntrainedScores
from dimscope.studies.embedding.settings import Side
from dimscope.studies.embedding.tables import score_untrained
from dimscope.vectors.embedding import open_table
from dimscope.vectors.moments import Moments
from dimscope.vectors.table import RowBlock, VectorTable, require_finite

VECTORS = "vectors"  # the name of the table, and the category of its rows, where the source is no model
NEAR = 0.01  # radius of duplicates in units of the median row norm: one long row does not change it


@dataclass(frozen=True, slots=True, eq=False)
class TableSide:
    """One table of a source, under the name that it has in result tables, with its moments."""

    name: str
    table: VectorTable
    moments: Moments


@dataclass(frozen=True, eq=False)
class EmbeddingSource:
    """A table of N vectors, and values that several results need.

    Each value is computed at its first use, so that a resumed study pays only for the results that are missing.

    Attributes:
        origin: The model, or the vectors.
        table: The vectors that are studied.
        side: Their name in result tables: "input", "output" or "vectors".
        other: The other table of a model that is not tied.
        other_side: Its name.
    """

    origin: Checkpoint | VectorTable
    table: VectorTable
    side: str
    other: VectorTable | None = None
    other_side: str = ""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Return the model; None for vectors."""
        return self.origin if isinstance(self.origin, Checkpoint) else None

    @property
    def row(self) -> str:
        """Return what a row is, as a noun."""
        return "row" if self.checkpoint is None else "token"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Read the names of the rows: tokens of a model, labels of vectors."""
        if self.checkpoint is not None:
            return read_vocabulary(self.checkpoint.source, self.table.n_rows)
        return label_vocabulary(self.table)

    @cached_property
    def moments(self) -> Moments:
        """Compute the moments of the table."""
        return moments_of(self.table)

    @cached_property
    def sides(self) -> list[TableSide]:
        """Return the table, and the other one of an untied model."""
        sides = [TableSide(self.side, self.table, self.moments)]
        if self.other is not None:
            sides.append(TableSide(self.other_side, self.other, moments_of(self.other)))
        return sides

    @cached_property
    def untrained(self) -> UntrainedScores:
        """Score how untrained each row looks."""
        return score_untrained(self.vocabulary, self.table)

    @cached_property
    def loaded(self) -> RowBlock:
        """Load the ids and rows of the table."""
        return self.table.load()

    @cached_property
    def index(self) -> NeighborIndex:
        """Build the index of nearest neighbors of all rows."""
        return build_index(*self.loaded)

    @property
    def near(self) -> float:
        """Return the distance within which rows count as duplicates: 1% of the median norm."""
        return NEAR * float(np.median(self.loaded.rows.norm(dim=1).numpy()))


def open_source(
    origin: Checkpoint | VectorTable, side: Side = "input", *, skip_nonfinite: bool = False, both: bool = False
) -> EmbeddingSource:
    """Open the table of a model, or vectors, for the study. One pass checks that the rows are finite.

    Args:
        origin: The model, or the vectors.
        side: Which table of a model leads.
        skip_nonfinite: Leave out rows with NaN or Inf instead of raising.
        both: Whether to open the other table of an untied model, too.

    Raises:
        InvalidArgument: The model has no such table, `side` is set for vectors, or there is only one vector.
        NonFiniteRows: Rows hold NaN or Inf and are not left out.
    """
    if isinstance(origin, VectorTable):
        if side != "input":
            raise InvalidArgument(f"`side` picks one of the two tables of a model; {origin.name} is one table")
        if origin.n_rows < 2:
            raise InvalidArgument(f"{origin.name} has one row; the study compares rows, so it needs 2 or more")
        table = require_finite(origin, skip_nonfinite=skip_nonfinite)
        return EmbeddingSource(origin, table, VECTORS)
    table = open_table(origin, side, skip_nonfinite=skip_nonfinite)
    if not both or origin.output_table is None:
        return EmbeddingSource(origin, table, side)
    other_side: Side = "input" if side == "output" else "output"
    other = open_table(origin, other_side, skip_nonfinite=skip_nonfinite)
    return EmbeddingSource(origin, table, side, other, other_side)


def label_vocabulary(table: VectorTable) -> Vocabulary:
    """Return the labels of vectors as a vocabulary; a row without a label is called by its number.

    Looking up a text finds the first row with this label.
    """
    labels = table.labels or [f"#{i}" for i in range(table.n_rows)]
    tokens = tuple(Token(i, None, None, label, VECTORS) for i, label in enumerate(labels))
    rows = {label: i for i, label in reversed(list(enumerate(table.labels or ())))}

    def look_up(text: str) -> list[int]:
        row = rows.get(text, rows.get(text.removeprefix(" ")))  # terms of an expression come with a space
        if row is None:
            raise InvalidArgument(f"no row of {table.name} has the label {text!r}")
        return [row]

    return Vocabulary(tokens, None, look_up if rows else None, f"{table.name} has no labels")

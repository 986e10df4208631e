"""A table of N x d vectors, read block by block: nothing here holds more than one block, unless `load` is called."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.errors import InvalidArgument, NonFiniteRows

BLOCK = 8192  # rows; 8,192 x 4,096 float32 is 128 MiB
GAP = 32  # rows; reading so many in vain costs less than another read
SHOWN = 5  # row numbers that an error lists


class RowBlock(NamedTuple):
    """Rows of a table and their ids."""

    ids: Int[Tensor, " n"]
    rows: Float[Tensor, "n d"]


@dataclass(frozen=True, slots=True, repr=False)
class VectorTable:
    """An N x d table read block by block; the token-embedding table of a model is one.

    Row ids are positions in the table (token ids for an embedding table). `excluded` rows are skipped everywhere.
    """

    n_rows: int  # N, with the excluded rows
    dim: int
    dtype: str
    read: Callable[[int, int], Tensor]  # (start, stop) -> rows in the dtype they are stored in
    excluded: frozenset[int] = frozenset()
    labels: tuple[str, ...] | None = None  # one per row, with the excluded rows
    name: str = ""  # of the source, for messages and titles

    def __repr__(self) -> str:
        """Return one line: name, shape and dtype."""
        excluded = f", {len(self.excluded):,} rows excluded" if self.excluded else ""
        labels = ", labelled" if self.labels is not None else ""
        return f"VectorTable({self.name or 'vectors'}: {self.n_rows:,} x {self.dim:,}, {self.dtype}{excluded}{labels})"

    @property
    def n_used(self) -> int:
        """Number of rows that take part: all but the excluded ones."""
        return self.n_rows - len(self.excluded)

    def blocks(self, size: int = BLOCK) -> Iterator[RowBlock]:
        """Yield ids and float32 rows (float64 where the source holds float64), in order, `size` rows at a time."""
        for start in range(0, self.n_rows, size):
            stop = min(start + size, self.n_rows)
            rows, ids = self.read(start, stop), torch.arange(start, stop)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            if any(start <= i < stop for i in self.excluded):
                used = torch.tensor([i not in self.excluded for i in range(start, stop)])
                rows, ids = rows[used], ids[used]
            yield RowBlock(ids, rows)

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the rows of these ids in float32, in the order of the ids.

        Raises:
            InvalidArgument: for ids outside the table.
        """
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.n_rows):
            raise InvalidArgument(
                f"ids must be 0 to {self.n_rows - 1}, got {int(ids.max() if ids.min() >= 0 else ids.min())}"
            )
        result = torch.empty(len(ids), self.dim)
        ranked, order = ids.sort()
        # One read for each stretch of ids that lie close together, of a block at most.
        apart = (ranked.diff() > GAP) | (ranked[1:] // BLOCK != ranked[:-1] // BLOCK)
        for positions in order.tensor_split((torch.nonzero(apart).squeeze(1) + 1).tolist()) if len(ids) else ():
            stretch = ids[positions]
            first = int(stretch[0])
            result[positions] = self.read(first, int(stretch[-1]) + 1)[stretch - first].float()
        return result

    def load(self) -> RowBlock:
        """Return all ids and float32 rows at once: N x d x 4 bytes."""
        ids, matrix = torch.empty(self.n_used, dtype=torch.int64), torch.empty(self.n_used, self.dim)
        position = 0
        for block_ids, rows in self.blocks():
            ids[position : position + len(rows)] = block_ids
            matrix[position : position + len(rows)] = rows
            position += len(rows)
        return RowBlock(ids, matrix)


def table_from_tensor(matrix: Float[Tensor, "v d"], name: str = "") -> VectorTable:
    """Return a table over a matrix that is in memory already; nothing is copied."""
    matrix = matrix.detach()
    shape = matrix.shape
    return VectorTable(shape[0], shape[1], str(matrix.dtype), lambda start, stop: matrix[start:stop].cpu(), name=name)


def nonfinite_rows(table: VectorTable) -> list[int]:
    """Return the ids of the rows with NaN or Inf, and of those with values that float32 cannot hold."""
    bad: list[int] = []
    for ids, rows in table.blocks():
        bad += ids[~torch.isfinite(rows.float().double().sum(dim=1))].tolist()
    return bad


def require_finite(
    table: VectorTable, label: str = "", *, skip_nonfinite: bool = False, advice: str | None = None
) -> VectorTable:
    """Return the table without its rows of NaN or Inf, after one pass over it.

    Args:
        table: the table to check.
        label: what to call the table in messages, after its name; e.g. the name of the tensor.
        skip_nonfinite: leave such rows out instead of raising.
        advice: what to do instead, for the message.

    Raises:
        NonFiniteRows: where rows hold NaN or Inf and are not skipped (names the first ones), or where every row does.
    """
    bad = nonfinite_rows(table)
    where = f" of {label}" if label else ""
    if len(bad) == table.n_rows:
        raise NonFiniteRows(f"{table.name}: every row{where} holds NaN or Inf")
    if bad and not skip_nonfinite:
        numbers = ", ".join(map(str, bad[:SHOWN])) + (", ..." if len(bad) > SHOWN else "")
        raise NonFiniteRows(
            f"{table.name}: {len(bad)} of {table.n_rows:,} rows{where} hold NaN or Inf (rows {numbers}); "
            + (advice or "pass `skip_nonfinite` to leave them out")
        )
    return replace(table, excluded=frozenset(bad))

"""Embedding tables as streams of row blocks: nothing here holds more than one block, unless `load` is called."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.errors import InvalidArgument, NonFiniteRows

BLOCK = 8192  # rows; 8,192 x 4,096 float32 is 128 MiB
GAP = 32  # rows; reading so many in vain costs less than another read
SIDES = ("input", "output")


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """A V x d table read block by block. Row ids are token ids; `excluded` rows are skipped everywhere."""

    n_rows: int  # V, with the excluded rows
    dim: int
    dtype: str
    read: Callable[[int, int], Tensor]  # (start, stop) -> rows in the dtype they are stored in
    excluded: frozenset[int] = frozenset()

    @property
    def n_used(self) -> int:
        """Rows that take part: all but the excluded."""
        return self.n_rows - len(self.excluded)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]]:
        """Ids and float32 rows (float64 where the file holds float64), in order, `size` rows at a time."""
        for start in range(0, self.n_rows, size):
            stop = min(start + size, self.n_rows)
            rows, ids = self.read(start, stop), torch.arange(start, stop)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            if any(start <= i < stop for i in self.excluded):
                kept = torch.tensor([i not in self.excluded for i in range(start, stop)])
                rows, ids = rows[kept], ids[kept]
            yield ids, rows

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """The rows of these ids, in their order. Raises InvalidArgument for ids outside the table."""
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.n_rows):
            raise InvalidArgument(
                f"token ids go from 0 to {self.n_rows - 1}, not to {int(ids.max() if ids.min() >= 0 else ids.min())}"
            )
        result = torch.empty(len(ids), self.dim)
        ranked, order = ids.sort()
        # One read for each stretch of ids that lie close together, of a block at most.
        apart = (ranked.diff() > GAP) | (ranked[1:] // BLOCK != ranked[:-1] // BLOCK)
        for chosen in order.tensor_split((torch.nonzero(apart).squeeze(1) + 1).tolist()) if len(ids) else ():
            wanted = ids[chosen]
            first = int(wanted[0])
            result[chosen] = self.read(first, int(wanted[-1]) + 1)[wanted - first].float()
        return result

    def load(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]:
        """All ids and float32 rows at once: V x d x 4 bytes."""
        ids, matrix = torch.empty(self.n_used, dtype=torch.int64), torch.empty(self.n_used, self.dim)
        position = 0
        for block_ids, rows in self.blocks():
            ids[position : position + len(rows)] = block_ids
            matrix[position : position + len(rows)] = rows
            position += len(rows)
        return ids, matrix


SKIP = "pass --skip-nonfinite to go on without them"


def open_table(
    checkpoint: Checkpoint, side: str = "input", *, skip_nonfinite: bool = False, advice: str = SKIP
) -> EmbeddingTable:
    """The input or output table of a checkpoint. One pass checks that it is finite.

    Raises NonFiniteRows where rows hold NaN or Inf (names the first ones), unless `skip_nonfinite` leaves them out, with `advice`;
    InvalidArgument for a side that the model does not have.
    """
    if side not in SIDES:
        raise InvalidArgument(f"a table is one of {', '.join(SIDES)}, not {side!r}")
    info = checkpoint.input_table
    if side == "output" and not checkpoint.tied:
        if checkpoint.output_table is None:
            raise InvalidArgument(f"{checkpoint.name}: this model has no output table")
        info = checkpoint.output_table
    reader = checkpoint.reader
    reader.prefetch(info.name)
    table = EmbeddingTable(
        info.shape[0], info.shape[1], info.dtype, lambda start, stop: reader.read_rows(info.name, start, stop)
    )
    bad = nonfinite_rows(table)
    if len(bad) == table.n_rows:
        raise NonFiniteRows(f"{checkpoint.name}: every row of {info.name} holds NaN or Inf")
    if bad and not skip_nonfinite:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise NonFiniteRows(
            f"{checkpoint.name}: {len(bad)} of {info.shape[0]:,} rows of {info.name} hold NaN or Inf (rows {shown}); "
            f"{advice}"
        )
    return EmbeddingTable(table.n_rows, table.dim, table.dtype, table.read, frozenset(bad))


def table_from_tensor(matrix: Float[Tensor, "v d"]) -> EmbeddingTable:
    """A table that is in memory already."""
    matrix = matrix.detach()
    return EmbeddingTable(matrix.shape[0], matrix.shape[1], str(matrix.dtype), lambda start, stop: matrix[start:stop])


def nonfinite_rows(table: EmbeddingTable) -> list[int]:
    """Ids of the rows with NaN or Inf, also where only float32 cannot hold the value."""
    bad: list[int] = []
    for ids, rows in table.blocks():
        bad += ids[~torch.isfinite(rows.float().double().sum(dim=1))].tolist()
    return bad

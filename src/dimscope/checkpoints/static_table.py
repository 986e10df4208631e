"""Static embeddings: a folder with one table of vectors and a tokenizer, and no model, as model2vec writes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from dimscope.checkpoints.quantised import FLOATS
from dimscope.checkpoints.tensors import TensorInfo, TensorReader, read_tensor

MAPPING, WEIGHTS = "mapping", "weights"  # as model2vec calls the row and the weight of each token


@dataclass(frozen=True, slots=True)
class StaticTable:
    """The table of static embeddings, with a row for each token.

    Attributes:
        reader: Reads its rows.
        info: The table.
        notes: What the user should know of it.
    """

    reader: TensorReader
    info: TensorInfo
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SharedRows:
    """A reader of a table in which several tokens share a row, which gives the row of each token."""

    reader: TensorReader
    table: str
    rows: Float[Tensor, "k d"] = field(repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return what the files declare, by name."""
        return self.reader.tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a tensor; of the table those of these tokens."""
        if name != self.table:
            return self.reader.read_rows(name, start, stop)
        return self.rows[self.reader.read_rows(MAPPING, start, stop).long()]

    def prefetch(self, name: str) -> None:
        """Prepare for reading the whole tensor."""
        self.reader.prefetch(name)


def find_static_table(reader: TensorReader, name: str) -> StaticTable | None:
    """Return the only matrix of a file as a table of static embeddings; None where there are none, several, or larger tensors.

    Args:
        reader: The reader of the file.
        name: The name of the folder, for notes.
    """
    tensors = reader.tensors
    matrices = [info for info in tensors.values() if len(info.shape) == 2 and info.dtype in FLOATS]
    if len(matrices) != 1 or any(len(info.shape) > 2 for info in tensors.values()):
        return None
    info, notes = matrices[0], []
    if (mapping := tensors.get(MAPPING)) is not None and len(mapping.shape) == 1:
        notes.append(f"{name}: {mapping.shape[0]:,} tokens share the {info.shape[0]:,} rows of {info.name}")
        reader = SharedRows(reader, info.name, read_tensor(reader, info.name))
        info = replace(info, shape=(mapping.shape[0], info.shape[1]))
    if WEIGHTS in tensors:
        notes.append(
            f"{name}: the table is studied as it is stored; the weight of each token, {WEIGHTS}, is not applied"
        )
    return StaticTable(reader, info, tuple(notes))

"""The token-embedding tables of a checkpoint as streams of row blocks."""

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.gguf import GgufReader
from dimscope.checkpoints.hub import cache_errors
from dimscope.checkpoints.quantised import reads_floats
from dimscope.errors import InvalidArgument, UnsupportedCheckpoint
from dimscope.vectors.table import VectorTable, require_finite

SIDES = ("input", "output")


def open_table(
    checkpoint: Checkpoint, side: str = "input", *, skip_nonfinite: bool = False, advice: str | None = None
) -> VectorTable:
    """Open the input or output table of a checkpoint (V x d; row ids are token ids). One pass checks that it is finite.

    Args:
        checkpoint: an opened checkpoint.
        side: "input", or "output" (the same table where the two are tied).
        skip_nonfinite: leave rows with NaN or Inf out instead of raising.
        advice: what the error about such rows recommends instead.

    Raises:
        NonFiniteRows: where rows hold NaN or Inf and are not skipped, or where every row does.
        UnsupportedCheckpoint: where the table is quantised.
        InvalidArgument: for a side that the model does not have.
    """
    if side not in SIDES:
        raise InvalidArgument(f"a table is one of {', '.join(SIDES)}, not {side!r}")
    info = checkpoint.input_table
    if side == "output" and not checkpoint.tied:
        if checkpoint.output_table is None:
            raise InvalidArgument(f"{checkpoint.name}: this model has no output table")
        info = checkpoint.output_table
    reader = checkpoint.reader
    if not isinstance(reader, GgufReader) and not reads_floats(reader, info):
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {info.name} is stored as {info.dtype}; only tables of floating-point numbers, fp8 with "
            "scales and bitsandbytes 8-bit are read: use the checkpoint it was quantised from"
        )
    reader.prefetch(info.name)
    table = VectorTable(
        info.shape[0],
        info.shape[1],
        info.dtype,
        lambda start, stop: reader.read_rows(info.name, start, stop),
        name=checkpoint.name,
    )
    with cache_errors(checkpoint.source, info.file):
        return require_finite(table, info.name, skip_nonfinite=skip_nonfinite, advice=advice)

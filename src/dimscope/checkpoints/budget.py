"""The parameter budget: every tensor of a checkpoint with its size, block and role; tied parameters counted once."""

import re

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.skeleton import role_of
from dimscope.checkpoints.tensors import TensorInfo

SCHEMA = {
    "name": pl.String,
    "shape": pl.String,
    "dtype": pl.String,
    "n_parameters": pl.Int64,
    "n_bytes": pl.Int64,
    "role": pl.String,
    "block": pl.Int64,
}


def parameter_budget(checkpoint: Checkpoint) -> pl.DataFrame:
    """Return a row per tensor of the files: name, shape, dtype, n_parameters, n_bytes, role, block (layer index or null).

    No parameters have buffers (role "buffer": masks, rotary frequencies), a head that the files repeat although the
    config ties it to the input table ("tied copy"), and tensors that this model does not load ("not loaded").
    """
    skeleton = checkpoint.skeleton
    parameter_of = skeleton.parameters_of(checkpoint.tensors) if skeleton is not None else {}
    rows = []
    for info in checkpoint.tensors.values():
        role = _role(checkpoint, info, parameter_of.get(info.name))
        counted = role not in ("buffer", "tied copy", "not loaded")
        rows.append(
            (
                info.name,
                " x ".join(map(str, info.shape)) or "1",
                info.dtype,
                info.n_elements if counted else 0,
                info.n_bytes,
                role,
                block_of(info.name),
            )
        )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def block_of(name: str) -> int | None:
    """Return the index of the block a tensor belongs to: the first number in its path.

    >>> block_of("model.layers.11.mlp.up_proj.weight")
    11
    >>> block_of("lm_head.weight") is None
    True
    """
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None


def embedding_share(budget: pl.DataFrame) -> float:
    """Return the share of all parameters that are token-embedding tables (input and output; a tied table once)."""
    tables = budget.filter(pl.col("role").is_in(["input embedding", "output embedding"]))
    return int(tables["n_parameters"].sum()) / int(budget["n_parameters"].sum())


def _role(checkpoint: Checkpoint, info: TensorInfo, parameter: str | None) -> str:
    if info.name == checkpoint.input_table.name:
        return "input embedding"
    if checkpoint.output_table is not None and info.name == checkpoint.output_table.name:
        return "output embedding"
    skeleton = checkpoint.skeleton
    if skeleton is not None and parameter is not None:
        return skeleton.roles[parameter]
    if checkpoint.tied and info.shape == checkpoint.input_table.shape:
        return "tied copy"
    if skeleton is None:
        return role_of(info.name)
    # What the model has no parameter for is not loaded: masks and frequencies, heads of another task.
    return "buffer" if skeleton.is_buffer(info.name) or not info.dtype.startswith(("F", "BF")) else "not loaded"

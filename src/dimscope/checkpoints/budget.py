"""The parameter budget: every tensor of a checkpoint with its size, block and role; tied parameters counted once."""

import re
from math import prod

import polars as pl

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.quantised import FLOATS
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

INTEGERS = ("I64", "I32", "I16", "U8", "BOOL")  # of tensors that are no weights
UNCOUNTED = ("buffer", "tied copy", "not loaded", "quantisation")
# How formats of quantised weights name what holds the numbers of a parameter: GPTQ and AWQ, compressed-tensors, mxfp4,
# HQQ, quanto. Others keep its name.
PACKED = re.compile(r"(?:\.qweight|\.weight_packed|_blocks|\.W_q|\.weight\._data)$")


def parameter_budget(checkpoint: Checkpoint) -> pl.DataFrame:
    """Return a row per tensor of the files: name, shape, dtype, n_parameters, n_bytes, role, block (layer index or null).

    No parameters have buffers (role "buffer": masks, rotary frequencies), a head that the files repeat although the
    config ties it to the input table ("tied copy"), tensors that this model does not load ("not loaded"), and the
    scales and zeros of quantised weights ("quantisation").
    A parameter that no tensor fills has a row of dtype "unfilled" and 0 bytes: the sum is always that of the whole model.
    """
    skeleton = checkpoint.skeleton
    parameter_of = _parameters(checkpoint)
    rows = []
    for info in checkpoint.tensors.values():
        parameter = parameter_of.get(info.name)
        role = _role(checkpoint, info, parameter)
        shape = " x ".join(map(str, info.shape)) or "1"
        packed = skeleton is not None and parameter is not None and info.dtype not in FLOATS
        n_parameters = 0 if role in UNCOUNTED else prod(skeleton.shapes[parameter]) if packed else info.n_elements
        rows.append((info.name, shape, info.dtype, n_parameters, info.n_bytes, role, block_of(info.name)))
    if skeleton is not None:
        filled = set(parameter_of.values())
        for name in skeleton.unfilled(checkpoint.tensors):
            if name not in filled:
                shape = skeleton.shapes[name]
                text = " x ".join(map(str, shape))
                rows.append((name, text, "unfilled", prod(shape), 0, skeleton.roles[name], block_of(name)))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _parameters(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the parameter of each tensor, packed ones included."""
    skeleton = checkpoint.skeleton
    if skeleton is None:
        return {}
    parameters = skeleton.parameters_of(checkpoint.tensors)
    if checkpoint.quantisation:
        for name in checkpoint.tensors:
            module = PACKED.sub("", name)
            for target in (module, f"{module}.weight") if module != name else ():
                if (parameter := skeleton.targets(target)[0]) in skeleton.shapes:
                    parameters.setdefault(name, parameter)
    return parameters


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
    if checkpoint.quantisation:
        return "quantisation"
    if skeleton is None:
        return "buffer" if info.dtype in INTEGERS else role_of(info.name)
    # What the model has no parameter for is not loaded: masks and frequencies, heads of another task.
    return "buffer" if skeleton.is_buffer(info.name) or not info.dtype.startswith(("F", "BF")) else "not loaded"

"""Which tensors of a checkpoint are its embedding tables, and whether they are one: the file beats the config."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from dimscope.checkpoints.quantised import FLOATS
from dimscope.checkpoints.skeleton import Skeleton
from dimscope.checkpoints.sources import Source
from dimscope.checkpoints.tensors import TensorInfo, TensorReader
from dimscope.errors import CorruptCheckpoint, UnsupportedCheckpoint

BLOCK = 8192  # rows that are compared at once


@dataclass(frozen=True, slots=True)
class Tables:
    """The embedding tables of a checkpoint.

    Attributes:
        input: The input table.
        output: The output table; None where the model has none, or where it is the input table.
        tied: Both are one.
    """

    input: TensorInfo
    output: TensorInfo | None
    tied: bool


def locate_tables(source: Source, reader: TensorReader, skeleton: Skeleton) -> Tables:
    """Find the embedding tables among the tensors of a checkpoint, and check their shapes.

    Raises:
        CorruptCheckpoint: A table is missing, or has another shape than the config says.
        UnsupportedCheckpoint: The files hold the input table in parts.
    """
    names = set(reader.tensors)
    parts = sorted(name for name in names if skeleton.targets(name)[0] == skeleton.input_name)
    if len(parts) > 1:
        raise UnsupportedCheckpoint(
            f"{source.name}: its token-embedding table is in {len(parts)} parts ({', '.join(parts)}), which are one table "
            "only in a running model"
        )
    head = None if skeleton.head_name is None else skeleton.file_name(skeleton.head_name, names)
    input_file = skeleton.file_name(skeleton.input_name, names)
    if input_file is None and skeleton.tied:
        input_file = head  # a tied table may have been saved under the name of the head alone
    input_file = input_file or _packed(skeleton.input_name, names)
    if input_file is None:
        raise CorruptCheckpoint(f"{source.name}: the weights hold no {skeleton.input_name}, the token-embedding table")
    input_table = _checked(reader.tensors[input_file], skeleton.shapes[skeleton.input_name], source.name)
    if skeleton.output_name is None or skeleton.tied:
        return Tables(input_table, None, skeleton.tied)
    output_file = head or _packed(skeleton.output_name, names)
    if output_file is None and skeleton.causal:
        raise CorruptCheckpoint(
            f"{source.name}: the config says that input and output tables differ, but the weights hold no {skeleton.output_name}"
        )
    if output_file is None:
        return Tables(input_table, None, False)
    return Tables(
        input_table, _checked(reader.tensors[output_file], skeleton.shapes[skeleton.output_name], source.name), False
    )


def has_head_of_its_own(reader: TensorReader, skeleton: Skeleton) -> bool:
    """Return whether the files hold an output table other than the input table to which the config ties it.

    As stock transformers does, all numbers are compared; the tensors are read until the first difference.
    """
    if not skeleton.tied or skeleton.head_name is None:
        return False
    files = [skeleton.file_name(name, reader.tensors) for name in (skeleton.input_name, skeleton.head_name)]
    table, head = (reader.tensors[file] if file is not None else None for file in files)
    if table is None or head is None or table.name == head.name or {table.dtype, head.dtype} - set(FLOATS):
        return False
    if table.shape != head.shape:
        return True
    for info in (table, head):
        reader.prefetch(info.name)
    return any(
        not torch.equal(*(reader.read_rows(info.name, start, start + BLOCK).double() for info in (table, head)))
        for start in range(0, table.shape[0], BLOCK)
    )


def untie(config: Any) -> None:
    """Set in a config that input and output table are two."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = False


def _packed(parameter: str, names: set[str]) -> str | None:
    """Return a tensor that holds a parameter in packed form, such as qweight for weight."""
    module = parameter.removesuffix("weight")
    return next((n for n in sorted(names) if n.startswith(module) and "weight" in n.removeprefix(module)), None)


def _checked(info: TensorInfo, expected: tuple[int, ...], name: str) -> TensorInfo:
    if info.dtype not in FLOATS:
        return replace(info, shape=expected)  # packed: the shape in the file is not that of the table
    if info.shape != expected:
        raise CorruptCheckpoint(
            f"{name}: {info.name} has shape {' x '.join(map(str, info.shape))}, but config.json says {' x '.join(map(str, expected))}"
        )
    return info

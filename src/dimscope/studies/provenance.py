"""What a result records about its model or vectors, what tells two of them apart, and the definitions of its numbers."""

import hashlib
from typing import Any

from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.loaded import LoadedModel, weight_bytes
from dimscope.evaluation.metrics import DEFINITIONS
from dimscope.geometry.metrics import metric_of
from dimscope.storage import versions
from dimscope.vectors.table import VectorTable


def source_facts(source: Checkpoint | VectorTable) -> dict[str, Any]:
    """Return what every report.json records about the model or the vectors, and the versions of the packages."""
    if isinstance(source, VectorTable):
        facts = {"vectors": source.name, "n_rows": source.n_rows, "dim": source.dim, "dtype": source.dtype}
        return facts | {"versions": versions()}
    checkpoint = source
    vocab_size, hidden_size = checkpoint.input_table.shape
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "tied": checkpoint.shares_table,
        "n_parameters": int(parameter_budget(checkpoint)["n_parameters"].sum()),
        "dtype": checkpoint.input_table.dtype,
        "versions": versions(),
    }


def definition_number(metric: str) -> int:
    """Return the number of the definition of a metric in a table; 1 for names that no registry has.

    >>> definition_number("variance count 95%"), definition_number("a measure of some study")
    (1, 1)
    """
    try:
        return metric_of(metric).definition
    except KeyError:
        return DEFINITIONS.get(metric, 1)


def fingerprint(source: Checkpoint | VectorTable) -> dict[str, Any]:
    """Return what tells two sources apart.

    Of vectors the numbers and labels are hashed. Of a checkpoint on disk no weights are read: its commit, or the sizes
    and times of its files, stand for them.
    Of a model in memory the weights, the config and the vocabulary of the tokenizer are hashed.
    """
    if isinstance(source, VectorTable):
        return {"vectors": source.name, "rows": _hash_vectors(source)}
    checkpoint = source
    declared = hashlib.sha256()
    for info in sorted(checkpoint.tensors.values(), key=lambda t: t.name):
        declared.update(f"{info.name} {info.shape} {info.dtype} {info.file}\n".encode())
    if isinstance(checkpoint.source, LoadedModel):
        own: dict[str, Any] = {"weights": _hash_in_memory(checkpoint.source)}
    else:
        own = {"files": _file_stamps(checkpoint)}
    return {"model": checkpoint.name, "revision": checkpoint.revision, "tensors": declared.hexdigest()} | own


def _hash_vectors(table: VectorTable) -> str:
    digest = hashlib.sha256(repr((table.n_rows, table.dim, table.labels)).encode())
    for block in table.blocks():
        digest.update(block.rows.contiguous().numpy())
    return digest.hexdigest()


def _hash_in_memory(source: LoadedModel) -> str:
    digest = hashlib.sha256(source.model.config.to_json_string().encode())
    for data in weight_bytes(source.model):
        digest.update(data)
    if source.tokenizer is not None:
        digest.update(repr(sorted(source.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _file_stamps(checkpoint: Checkpoint) -> list[list[str | int]]:
    """Return name, size and time of the files that a checkpoint without a commit is read from."""
    if checkpoint.revision is not None:
        return []
    files = {t.file for t in checkpoint.tensors.values()} | {
        f for f in checkpoint.source.files if f.startswith(("token", "config."))
    }
    stats = {f: checkpoint.source.fetch(f).stat() for f in sorted(files)}
    return [[f, s.st_size, s.st_mtime_ns] for f, s in stats.items()]

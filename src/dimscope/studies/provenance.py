"""What a result records about its model, and what tells two models apart."""

import hashlib
from typing import Any

from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.loaded import LoadedModel, weight_bytes
from dimscope.storage import versions


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what every report.json records about the model, and the versions of the packages."""
    vocab_size, hidden_size = checkpoint.input_table.shape
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "tied": checkpoint.tied,
        "n_parameters": int(parameter_budget(checkpoint)["n_parameters"].sum()),
        "dtype": checkpoint.input_table.dtype,
        "versions": versions(),
    }


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what tells two checkpoints apart.

    Of a checkpoint on disk no weights are read: its commit, or the sizes and times of its files, stand for them.
    Of a model in memory the weights, the config and the vocabulary of the tokenizer are hashed.
    """
    declared = hashlib.sha256()
    for info in sorted(checkpoint.tensors.values(), key=lambda t: t.name):
        declared.update(f"{info.name} {info.shape} {info.dtype} {info.file}\n".encode())
    source = checkpoint.source
    own = (
        {"weights": _hash_in_memory(source)} if isinstance(source, LoadedModel) else {"files": _file_stamps(checkpoint)}
    )
    return {"model": checkpoint.name, "revision": checkpoint.revision, "tensors": declared.hexdigest()} | own


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

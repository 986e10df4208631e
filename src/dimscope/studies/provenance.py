"""What a result says about its model, and what tells two models apart."""

import hashlib
from typing import Any

from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.storage import versions


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What every report.json says about the model, and the versions that computed."""
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
    """What tells two checkpoints apart without reading their weights: commit, or the sizes and times of the files; declared tensors."""
    declared = hashlib.sha256()
    for info in sorted(checkpoint.tensors.values(), key=lambda t: t.name):
        declared.update(f"{info.name} {info.shape} {info.dtype} {info.file}\n".encode())
    stamps = []
    if checkpoint.revision is None:
        files = {t.file for t in checkpoint.tensors.values()} | {
            f for f in checkpoint.source.files if f.startswith(("token", "config."))
        }
        stats = {f: checkpoint.source.fetch(f).stat() for f in sorted(files)}
        stamps = [[f, s.st_size, s.st_mtime_ns] for f, s in stats.items()]
    return {"model": checkpoint.name, "revision": checkpoint.revision, "tensors": declared.hexdigest(), "files": stamps}

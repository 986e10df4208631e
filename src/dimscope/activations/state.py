"""Files with the state of unfinished work. A file of another definition is ignored, and its work is done again."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dimscope.storage import write_tensors

DEFINITION = "2"  # of sums, samples and their names; raised whenever their meaning changes


def save_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, whole or not at all.

    Raises:
        InvalidArgument: The file cannot be written.
    """
    write_tensors(path, tensors, {"definition": DEFINITION})


def load_state(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a state file, in the memory of the CPU; None where there is no file, or of another definition."""
    from safetensors.torch import load_file

    return load_file(path) if is_current(path) else None


def is_current(path: Path) -> bool:
    """Whether there is a state file, of this definition."""
    from safetensors import safe_open

    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("definition") == DEFINITION

"""A checkpoint as a model that runs: loaded with its weights, or its twin with fresh random ones."""

import os
import shutil
import tempfile
import weakref
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.sources import HubRepository
from dimscope.checkpoints.tensors import StateDictReader
from dimscope.errors import CorruptCheckpoint, InvalidArgument, MissingExtra, UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
LARGEST_SHARE = 0.6  # of this machine's memory that weights in float32 may take before they stay as they are stored


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs and in which dtype: a name of DTYPES, and a torch device or "map"."""

    dtype: str
    device: str


def place(checkpoint: Checkpoint, *, dtype: str = "auto", device: str = "auto") -> Placement:
    """Settles what "auto" means for a checkpoint on this machine.

    `dtype` "auto" is float32 on a CPU where that fits into memory (CPUs multiply bfloat16 slowly, or not at all), else
    as stored. `device` is "auto" (CUDA, Apple's GPU or the CPU), a torch device, or "map": spread over all devices by accelerate.
    Raises InvalidArgument for an unknown dtype or a device that is not there, MissingExtra for "map" without accelerate.
    """
    if dtype not in ("auto", *DTYPES):
        raise InvalidArgument(f"--dtype is auto, {', '.join(DTYPES)}, not {dtype!r}")
    found = pick_device(device)
    if dtype != "auto":
        return Placement(dtype, found)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if found == "cpu" and 4 * _n_numbers(checkpoint) < LARGEST_SHARE * memory:
        return Placement("float32", found)
    return Placement(STORED.get(checkpoint.input_table.dtype, "float32"), found)


def load_model(
    checkpoint: Checkpoint, placement: Placement | None = None, *, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """The causal language model of a checkpoint, in evaluation mode, ready to run; placed as `place` decides if not told.

    Raises UnsupportedCheckpoint for what is no causal language model, CorruptCheckpoint for weights that do not fit it,
    InvalidArgument where they do not fit into memory.
    """
    from transformers import AutoModelForCausalLM

    require_causal(checkpoint)
    placement = placement or place(checkpoint)
    _require_memory(checkpoint, placement)
    source = checkpoint.source
    # accelerate may keep weights on disk; safetensors files it reads where they are, others it writes there
    offload = tempfile.mkdtemp(prefix="dimscope-") if placement.device == "map" else None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name if isinstance(source, HubRepository) else str(source.fetch("config.json").parent),
            revision=source.revision if isinstance(source, HubRepository) else None,
            dtype=DTYPES[placement.dtype],
            device_map="auto" if placement.device == "map" else None,
            offload_folder=offload,
            trust_remote_code=trust_remote_code,
            use_safetensors=not isinstance(checkpoint.reader, StateDictReader),
            output_loading_info=True,
        )
        model, loading = loaded
        if offload is not None:
            weakref.finalize(model, shutil.rmtree, offload, ignore_errors=True)
        model = model if placement.device == "map" else model.to(placement.device)
    except (OSError, RuntimeError, ValueError, MemoryError) as e:
        if offload is not None:
            shutil.rmtree(offload, ignore_errors=True)
        if is_out_of_memory(e):
            raise out_of_memory(checkpoint.name) from e
        reason = " ".join(str(e).split())[:200]
        raise CorruptCheckpoint(f"{checkpoint.name}: the weights cannot be loaded ({reason})") from e
    if loading["missing_keys"]:  # transformers would go on with random weights there
        raise CorruptCheckpoint(f"{checkpoint.name}: the weights hold no {sorted(loading['missing_keys'])[0]}")
    return model.eval()


def random_twin(
    checkpoint: Checkpoint, placement: Placement, *, seed: int = 0, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """A model of the same config, dtype and device with the random weights that training would start from.

    Raises what `load_model` raises.
    """
    from transformers import AutoModelForCausalLM

    config = deepcopy(require_causal(checkpoint))  # transformers writes the dtype into it
    _require_memory(checkpoint, placement)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        try:
            twin = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[placement.dtype], trust_remote_code=trust_remote_code
            )
            twin = twin.to("cpu" if placement.device == "map" else placement.device)
        except (RuntimeError, MemoryError) as e:
            if is_out_of_memory(e):
                raise out_of_memory(f"{checkpoint.name} with random weights") from e
            raise
    return twin.eval()


def pick_device(device: str) -> str:
    """The name of a device that is there, or "map". Raises InvalidArgument, MissingExtra."""
    if device == "map":
        try:
            import accelerate  # noqa: F401
        except ImportError as e:
            raise MissingExtra("accelerate", "map") from e
        return device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        raise InvalidArgument(f"--device {device}: there is no such device here; take cpu, cuda, mps or map") from e
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    told = isinstance(error, MemoryError | torch.OutOfMemoryError)
    # The allocator of the CPU has no error of its own.
    return told or any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "Cannot allocate memory")
    )


def out_of_memory(name: str) -> InvalidArgument:
    """The line for a model, or a batch, that does not fit."""
    return InvalidArgument(
        f"{name}: out of memory; take a smaller --length or --batch, --dtype bfloat16, or --device map to spread the model"
    )


def available_memory() -> int | None:
    """Bytes of this machine's memory that are free to use, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _require_memory(checkpoint: Checkpoint, placement: Placement) -> None:
    """Says at once that the weights do not fit: Linux would end the process without a word when they are touched."""
    free = available_memory()
    needed = DTYPES[placement.dtype].itemsize * _n_numbers(checkpoint)
    if placement.device == "cpu" and free is not None and needed > free:
        raise InvalidArgument(
            f"{checkpoint.name}: its weights take {needed / 1e9:.1f} GB in {placement.dtype}, and {free / 1e9:.1f} GB of "
            "memory are free; take --dtype bfloat16, or --device map to spread the model"
        )


def _n_numbers(checkpoint: Checkpoint) -> int:
    return sum(info.n_elements for info in checkpoint.tensors.values())


def require_causal(checkpoint: Checkpoint) -> "PretrainedConfig":
    """The config of a causal language model. Raises UnsupportedCheckpoint for what is none, or cannot be run."""
    if checkpoint.skeleton is None or checkpoint.config is None:
        raise UnsupportedCheckpoint(f"{checkpoint.name}: GGUF weights are read, not run; give the original checkpoint")
    if not checkpoint.skeleton.causal:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {checkpoint.architecture} is no causal language model, and only those are run"
        )
    return checkpoint.config

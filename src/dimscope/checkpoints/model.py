"""A checkpoint as a model that runs: with its weights, or randomly initialised."""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.hub import cache_advice
from dimscope.checkpoints.loaded import LoadedModel
from dimscope.checkpoints.tensors import StateDictReader
from dimscope.errors import CorruptCheckpoint, DimscopeError, InvalidArgument, MissingExtra, UnsupportedCheckpoint
from dimscope.units import readable_bytes

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
    """Return where a checkpoint runs on this machine, with every "auto" resolved.

    Args:
        checkpoint: A checkpoint on disk, or a model in memory, which runs as it is.
        dtype: "auto" or a name of DTYPES. "auto" is float32 on a CPU where that fits into memory (CPUs multiply bfloat16
            slowly, or not at all), else the dtype that the weights are stored in.
        device: "auto" (CUDA, Apple's GPU or the CPU), a torch device, or "map": spread over all devices by accelerate.

    Raises:
        InvalidArgument: The dtype is unknown, the device is missing, or the model in memory has others.
        MissingExtra: The device is "map", and accelerate is not installed.
    """
    if dtype not in ("auto", *DTYPES):
        raise InvalidArgument(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    if isinstance(checkpoint.source, LoadedModel):
        return _placement_of(checkpoint.source, dtype, device)
    device = pick_device(device)
    if dtype != "auto":
        return Placement(dtype, device)
    if device == "cpu" and 4 * _n_weights(checkpoint) < LARGEST_SHARE * psutil.virtual_memory().total:
        return Placement("float32", device)
    return Placement(STORED.get(checkpoint.input_table.dtype, "float32"), device)


def _placement_of(source: LoadedModel, dtype: str, device: str) -> Placement:
    """Return the placement of a model in memory; refuse another one, because the model is not changed."""
    own = next((name for name, value in DTYPES.items() if value is source.dtype), None)
    if own is None:
        raise UnsupportedCheckpoint(
            f"{source.name}: its weights are {source.dtype}; convert the model to float32 first"
        )
    if dtype not in ("auto", own):
        raise InvalidArgument(f"`dtype` {dtype}: the model in memory is {own}, and is not changed; convert it first")
    if device != "auto" and not _same_device(device, source.device):
        raise InvalidArgument(
            f"`device` {device}: the model in memory is on {source.device}, and is not moved; move it first"
        )
    return Placement(own, source.device)


def _same_device(requested: str, actual: str) -> bool:
    """Whether two devices are the same; one without an index is any device of its type."""
    kind, _, index = requested.partition(":")
    own_kind, _, own_index = actual.partition(":")
    return kind == own_kind and (not index or index == (own_index or "0"))


def load_model(
    checkpoint: Checkpoint, placement: Placement | None = None, *, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """Return the causal language model of a checkpoint: loaded in evaluation mode, or the very model in memory as it is.

    Args:
        checkpoint: What to load.
        placement: Dtype and device; by default what `place` resolves.
        trust_remote_code: Run code of the repository.

    Raises:
        UnsupportedCheckpoint: The checkpoint is not a causal language model.
        CorruptCheckpoint: The weights do not fit the config.
        InvalidArgument: The weights do not fit into memory, or a model in memory has another dtype or device.
    """
    require_causal(checkpoint)
    source = checkpoint.source
    if isinstance(source, LoadedModel):
        if placement is not None:
            _placement_of(source, placement.dtype, placement.device)
        return source.model
    placement = placement or place(checkpoint)
    _require_memory(checkpoint, placement)
    location = str(source.folder({info.file for info in checkpoint.tensors.values()}))
    # accelerate may keep weights on disk; safetensors files it reads where they are, others it writes there
    offload = tempfile.mkdtemp(prefix="dimscope-") if placement.device == "map" else None
    try:
        model = _from_pretrained(checkpoint, location, placement, offload, trust_remote_code)
    except (OSError, RuntimeError, ValueError, MemoryError) as e:
        if offload is not None:
            shutil.rmtree(offload, ignore_errors=True)
        if isinstance(e, DimscopeError):
            raise
        if is_out_of_memory(e):
            raise out_of_memory(checkpoint.name) from e
        reason = f"({' '.join(str(e).split())[:200]}){cache_advice(source)}"
        raise CorruptCheckpoint(f"{checkpoint.name}: the weights cannot be loaded {reason}") from e
    if offload is not None:
        weakref.finalize(model, shutil.rmtree, offload, ignore_errors=True)
    return model.eval()


def _from_pretrained(
    checkpoint: Checkpoint, location: str, placement: Placement, offload: str | None, trust_remote_code: bool
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        location,
        dtype=DTYPES[placement.dtype],
        device_map="auto" if placement.device == "map" else None,
        offload_folder=offload,
        trust_remote_code=trust_remote_code,
        use_safetensors=not isinstance(checkpoint.reader, StateDictReader),
        output_loading_info=True,
    )
    model, loading = loaded
    if loading["missing_keys"]:  # transformers would fill them with random weights
        raise CorruptCheckpoint(f"{checkpoint.name}: the weights hold no {sorted(loading['missing_keys'])[0]}")
    return model if placement.device == "map" else model.to(placement.device)


def randomly_initialised(
    checkpoint: Checkpoint, placement: Placement, *, seed: int = 0, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """Return a model of the same config, dtype and device with the random weights that training would start from.

    Raises:
        CheckpointError: What `load_model` raises.
        InvalidArgument: The weights do not fit into memory.
    """
    config = deepcopy(require_causal(checkpoint))  # transformers writes the dtype into it
    _require_memory(checkpoint, placement)
    build = _builder(checkpoint, trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        try:
            model = build(config, dtype=DTYPES[placement.dtype])
            model = model.to("cpu" if placement.device == "map" else placement.device)
        except (RuntimeError, MemoryError) as e:
            if is_out_of_memory(e):
                raise out_of_memory(f"{checkpoint.name} with random weights") from e
            raise
    return model.eval()


def _builder(checkpoint: Checkpoint, trust_remote_code: bool) -> Callable[..., Any]:
    """Return what builds a model from a config: the class of a model in memory, else the one transformers knows."""
    if isinstance(checkpoint.source, LoadedModel):
        return type(checkpoint.source.model)._from_config
    from transformers import AutoModelForCausalLM

    return partial(AutoModelForCausalLM.from_config, trust_remote_code=trust_remote_code)


def pick_device(device: str) -> str:
    """Return the name of a device of this machine, or "map".

    Raises:
        InvalidArgument: The device is missing.
        MissingExtra: The device is "map", and accelerate is not installed.
    """
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
        raise InvalidArgument(f"`device` {device}: there is no such device here; take cpu, cuda, mps or map") from e
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The allocator of the CPU has no error of its own.
    return any(words in str(error) for words in ("can't allocate memory", "out of memory", "Cannot allocate memory"))


def out_of_memory(name: str) -> InvalidArgument:
    """Return the error for a model, or a batch, that does not fit into memory."""
    return InvalidArgument(
        f"{name}: out of memory; take a smaller `length` or `batch`, `dtype` bfloat16, or `device` map to spread the model"
    )


def available_memory() -> int:
    """Return the bytes of this machine's memory that are free to use."""
    return psutil.virtual_memory().available


def _require_memory(checkpoint: Checkpoint, placement: Placement) -> None:
    """Refuse weights that do not fit: Linux would end the process without a word when they are touched."""
    free = available_memory()
    needed = DTYPES[placement.dtype].itemsize * _n_weights(checkpoint)
    if placement.device == "cpu" and needed > free:
        raise InvalidArgument(
            f"{checkpoint.name}: its weights take {readable_bytes(needed)} in {placement.dtype}, and {readable_bytes(free)} of "
            "memory are free; take `dtype` bfloat16, or `device` map to spread the model"
        )


def _n_weights(checkpoint: Checkpoint) -> int:
    return sum(info.n_elements for info in checkpoint.tensors.values())


def require_causal(checkpoint: Checkpoint) -> "PretrainedConfig":
    """Return the config of a causal language model.

    Raises:
        UnsupportedCheckpoint: The checkpoint is not a causal language model, or cannot be run.
    """
    if checkpoint.skeleton is None or checkpoint.config is None:
        raise UnsupportedCheckpoint(f"{checkpoint.name}: GGUF weights are read, not run; use the original checkpoint")
    if not checkpoint.skeleton.causal:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {checkpoint.architecture} is not a causal language model, and only those are run"
        )
    return checkpoint.config

"""A checkpoint as a model that runs: with its weights, or randomly initialised."""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from dimscope.checkpoints.checkpoint import Checkpoint
from dimscope.checkpoints.hub import cache_advice
from dimscope.checkpoints.loaded import LoadedModel
from dimscope.checkpoints.tensors import StateDictReader, TensorReader, read_tensor
from dimscope.checkpoints.weights import SINGLE
from dimscope.errors import (
    CorruptCheckpoint,
    DimscopeError,
    InvalidArgument,
    MissingExtra,
    NonFiniteWeights,
    UnsupportedCheckpoint,
)
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
    """Return the model of a checkpoint: loaded in evaluation mode, or the very model in memory as it is.

    Args:
        checkpoint: What to load.
        placement: Dtype and device; by default what `place` resolves.
        trust_remote_code: Run code of the repository.

    Raises:
        UnsupportedCheckpoint: The checkpoint cannot be run.
        CorruptCheckpoint: The weights do not fit the config.
        NonFiniteWeights: A weight is NaN or Inf.
        InvalidArgument: The weights do not fit into memory, or a model in memory has another dtype or device.
    """
    require_runnable(checkpoint)
    source = checkpoint.source
    if isinstance(source, LoadedModel):
        if placement is not None:
            _placement_of(source, placement.dtype, placement.device)
        require_finite_weights(source.model, source.name)
        return source.model
    placement = placement or place(checkpoint)
    _require_memory(checkpoint, placement)
    # accelerate may keep weights on disk; safetensors files it reads where they are, others it writes there
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="dimscope-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            model = _from_pretrained(checkpoint, folder, placement, trust_remote_code)
        except (OSError, RuntimeError, ValueError, ImportError, MemoryError) as e:
            raise _loading_error(checkpoint, e) from e
        require_finite_weights(model, checkpoint.name)
        if placement.device == "map":  # reads from the folder as long as it lives
            weakref.finalize(model, stack.pop_all().close)
    return model.eval()


def _loading_error(checkpoint: Checkpoint, error: Exception) -> DimscopeError:
    """Return what to say where transformers cannot load the weights."""
    if isinstance(error, DimscopeError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(checkpoint.name)
    reason = " ".join(str(error).split())[:200]
    if method := checkpoint.quantisation:
        return UnsupportedCheckpoint(
            f"{checkpoint.name}: transformers cannot run its {method} weights on this machine ({reason}); "
            "use the checkpoint they were quantised from"
        )
    return CorruptCheckpoint(
        f"{checkpoint.name}: the weights cannot be loaded ({reason}){cache_advice(checkpoint.source)}"
    )


def _from_pretrained(
    checkpoint: Checkpoint, folder: Path, placement: Placement, trust_remote_code: bool
) -> "PreTrainedModel":
    """Load the weights that the checkpoint's reader reads, and nothing that lies beside them."""
    config = deepcopy(require_runnable(checkpoint))  # transformers writes into it
    spread = placement.device == "map"
    options: dict[str, Any]
    if _needs_state_dict(checkpoint):
        options = {"pretrained_model_name_or_path": None, "state_dict": _state_dict(checkpoint.reader)}
    else:
        options = _linked(checkpoint, folder) if _is_stock(config) else _whole_folder(checkpoint)
        options["use_safetensors"] = not isinstance(checkpoint.reader, StateDictReader)
    from_pretrained = _class_of(checkpoint).from_pretrained
    if not _is_stock(config):
        options["trust_remote_code"] = trust_remote_code
    loaded: Any = from_pretrained(
        config=config,
        dtype=DTYPES[placement.dtype],
        device_map="auto" if spread else None,
        offload_folder=str(folder) if spread else None,
        output_loading_info=True,
        **options,
    )
    model, loading = loaded
    missing = sorted(loading["missing_keys"])  # transformers fills them with random weights
    if not predicts(checkpoint):  # a pooler takes the last hidden states, and gives none
        missing = [name for name in missing if "pooler" not in name.split(".")]
    if missing:
        raise CorruptCheckpoint(f"{checkpoint.name}: the weights hold no {missing[0]}")
    model.name_or_path = model.config.name_or_path = checkpoint.name  # not the folder of links
    return model if spread or checkpoint.quantisation else model.to(placement.device)


def _needs_state_dict(checkpoint: Checkpoint) -> bool:
    """Whether transformers could not find the weights in the files: under other names, or in pickles without an index."""
    weights = checkpoint.weights
    return checkpoint.renamed or (weights is not None and len(weights.files) > 1 and weights.index is None)


def _state_dict(reader: TensorReader) -> dict[str, torch.Tensor]:
    return {name: read_tensor(reader, name) for name in reader.tensors}


def _linked(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Link the files of the weights and their configs into a folder, and return it as arguments of `from_pretrained`.

    In the folder of the user, transformers would apply adapters beside the weights, and find no file of another name.
    """
    weights = checkpoint.weights
    assert weights is not None, checkpoint.name
    explicit = getattr(checkpoint.config, "transformers_weights", None)
    links = {f: f if explicit or weights.index else SINGLE[weights.kind] for f in weights.files}
    whole = checkpoint.source.folder(links)
    links |= {f: f for f in (weights.index, "config.json", "generation_config.json") if f and (whole / f).exists()}
    for file, link in links.items():
        (folder / link).symlink_to((whole / file).resolve())
    return {"pretrained_model_name_or_path": str(folder)}


def _whole_folder(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the folder of the weights, with the code of the repository that transformers imports."""
    return {
        "pretrained_model_name_or_path": str(checkpoint.source.folder({t.file for t in checkpoint.tensors.values()}))
    }


def _is_stock(config: "PretrainedConfig") -> bool:
    """Whether the architecture is one of transformers itself."""
    return type(config).__module__.startswith("transformers.")


def _class_of(checkpoint: Checkpoint) -> Any:
    """Return the class that builds the model: the one of its skeleton, or the one that finds code of the repository."""
    from transformers import AutoModelForCausalLM

    skeleton, in_memory = checkpoint.skeleton, isinstance(checkpoint.source, LoadedModel)
    assert skeleton is not None, checkpoint.name
    return skeleton.model_class if in_memory or _is_stock(require_runnable(checkpoint)) else AutoModelForCausalLM


def randomly_initialised(
    checkpoint: Checkpoint, placement: Placement, *, seed: int = 0, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """Return a model of the same config, dtype and device with the random weights that training would start from.

    Raises:
        CheckpointError: What `load_model` raises.
        InvalidArgument: The weights do not fit into memory.
    """
    config = deepcopy(require_runnable(checkpoint))  # transformers writes the dtype into it
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
    """Return what builds a model from a config."""
    model_class = _class_of(checkpoint)
    if hasattr(model_class, "_from_config"):
        return model_class._from_config
    return partial(model_class.from_config, trust_remote_code=trust_remote_code)


def input_device(model: "PreTrainedModel") -> torch.device:
    """Return the device for token ids; accelerate may have the weights elsewhere, or not in memory at all."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(embedding.parameters()).device


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


def require_runnable(checkpoint: Checkpoint) -> "PretrainedConfig":
    """Return the config of a checkpoint that transformers can run.

    Raises:
        UnsupportedCheckpoint: It is a GGUF file, or a table and no model.
    """
    if checkpoint.config is not None:
        return checkpoint.config
    reason = "GGUF weights are read, not run; use the original checkpoint"
    if checkpoint.architecture != "GGUF":
        reason = "it holds one table and no model that could run"
    raise UnsupportedCheckpoint(f"{checkpoint.name}: {reason}")


def predicts(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is a causal language model, which predicts the next token."""
    return checkpoint.skeleton is not None and checkpoint.skeleton.causal


def require_causal(checkpoint: Checkpoint) -> "PretrainedConfig":
    """Return the config of a causal language model.

    Raises:
        UnsupportedCheckpoint: The checkpoint is not a causal language model, or cannot be run.
    """
    config = require_runnable(checkpoint)
    if not predicts(checkpoint):
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {checkpoint.architecture} does not predict the next token, which this needs"
        )
    return config


def require_finite_weights(model: "PreTrainedModel", name: str) -> None:
    """Refuse a model with NaN or Inf in its weights; one sum per parameter.

    Raises:
        NonFiniteWeights: A parameter holds NaN or Inf; names it.
    """
    for parameter, tensor in model.named_parameters():
        if tensor.is_meta or tensor.dtype not in (torch.float64, *DTYPES.values()):
            continue
        total = tensor.detach().sum(dtype=torch.float64 if tensor.dtype is torch.float64 else torch.float32)
        if bool(torch.isfinite(total)):
            continue
        if n_bad := int((~torch.isfinite(tensor.detach())).sum()):
            hint = "; `dtype` float32 or bfloat16 may hold them" if tensor.dtype is torch.float16 else ""
            raise NonFiniteWeights(
                f"{name}: {n_bad:,} of {tensor.numel():,} numbers of {parameter} are NaN or Inf{hint}"
            )

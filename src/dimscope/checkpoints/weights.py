"""The weights of a checkpoint: which of its files hold them, as stock transformers chooses, and the reader of their format."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dimscope.checkpoints.gguf import gguf_files, open_gguf
from dimscope.checkpoints.sources import LocalFolder, Source
from dimscope.checkpoints.tensors import (
    StateDictReader,
    TensorReader,
    open_safetensors,
    open_sharded,
    read_state_dict,
    read_weight_map,
)
from dimscope.errors import CheckpointNotFound, CorruptCheckpoint, UnsafeCheckpoint

ADAPTER_CONFIG = "adapter_config.json"  # as peft writes it
SINGLE = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
SHARD = {"safetensors": re.compile(r"model-\d+-of-\d+\.safetensors"), "pickle": re.compile(r"pytorch_model-.*\.bin")}


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that hold the weights.

    Attributes:
        kind: Their format.
        files: Their names.
        index: The file that says which tensor is in which of them; None for a single file.
        weight_map: What it says, by the name of the tensor; empty without an index.
        stale: Files of another save of the weights beside them, which are not read.
    """

    kind: Literal["safetensors", "gguf", "pickle"]
    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict, repr=False)
    stale: tuple[str, ...] = ()


def choose_weights(source: Source, explicit: str | None = None, *, allow_pickle: bool = False) -> WeightFiles:
    """Choose the files of the weights, in the order of preference of stock transformers.

    The order is: what the config names, a single safetensors file, a safetensors index, a safetensors file under another
    name, GGUF, a single pickle, a pickle index.

    Args:
        source: Where the files are.
        explicit: The entry `transformers_weights` of the config.
        allow_pickle: Accept pickles where there are no others.

    Raises:
        CheckpointNotFound: There are no weights, several GGUF models, or not all parts of one.
        CorruptCheckpoint: Files are missing, or the index is damaged.
        UnsafeCheckpoint: There are only pickle weights, and `allow_pickle` is off.
    """
    files = source.files
    if explicit is not None:
        if explicit not in files or not explicit.endswith((".safetensors", ".safetensors.index.json")):
            raise CorruptCheckpoint(f"{source.name}: config.json names the weights {explicit}, which is not there")
        return _indexed(source, explicit) if explicit.endswith(".json") else WeightFiles("safetensors", (explicit,))
    if chosen := _saved(source, "safetensors"):
        return chosen
    if loose := sorted(f for f in files if f.endswith(".safetensors") and not f.startswith("adapter")):
        if len(loose) > 1:
            raise CorruptCheckpoint(
                f"{source.name}: {len(loose)} safetensors files but no model.safetensors.index.json; download the model again"
            )
        return WeightFiles("safetensors", tuple(loose))
    if gguf := gguf_files(source):
        return WeightFiles("gguf", tuple(gguf))
    if pickles := [f for f in files if f.startswith("pytorch_model") and f.endswith(".bin")]:
        if not allow_pickle:
            raise UnsafeCheckpoint(
                f"{source.name}: only pickle weights ({min(pickles)}), which can run code when loaded; "
                "convert them to safetensors, or pass `allow_pickle` if you trust them"
            )
        return _saved(source, "pickle") or WeightFiles("pickle", tuple(sorted(pickles)))
    raise CheckpointNotFound(f"{source.name}: no weights found (no *.safetensors, no *.gguf){hint_below(source)}")


def _saved(source: Source, kind: Literal["safetensors", "pickle"]) -> WeightFiles | None:
    """Return the single file, else the shards of the index, as transformers names them; None where there is neither."""
    single, shards = SINGLE[kind], {f for f in source.files if SHARD[kind].fullmatch(f)}
    index = f"{single}.index.json"
    if single in source.files:
        stale = sorted(shards | ({index} & source.files))
        return WeightFiles(kind, (single,), stale=tuple(stale))
    if index in source.files:
        chosen = _indexed(source, index, kind)
        return replace(chosen, stale=tuple(sorted(shards - set(chosen.files))))
    return None


def _indexed(source: Source, index: str, kind: Literal["safetensors", "pickle"] = "safetensors") -> WeightFiles:
    weight_map = read_weight_map(source, index)
    shards = sorted(set(weight_map.values()))
    if missing := [s for s in shards if s not in source.files]:
        raise CorruptCheckpoint(
            f"{source.name}: {len(missing)} of {len(shards)} shards are missing ({missing[0]}); download the model again"
        )
    return WeightFiles(kind, tuple(shards), index, weight_map)


def open_weights(source: Source, weights: WeightFiles) -> TensorReader:
    """Return the reader of the chosen files.

    Raises:
        CorruptCheckpoint: Files are damaged.
        MissingExtra: The file is GGUF, and the package gguf is not installed.
    """
    if weights.kind == "gguf":
        return open_gguf(source, weights.files)
    if weights.kind == "pickle":
        return open_pickle(source, weights.files)
    if weights.index is not None:
        return open_sharded(source, weights.index, weights.files, weights.weight_map)
    return open_safetensors(source, weights.files)


def open_pickle(source: Source, files: tuple[str, ...]) -> StateDictReader:
    """Open weights in torch's pickle format, memory-mapped where the file allows it, loaded with `weights_only`.

    Raises:
        CorruptCheckpoint: A file cannot be read, or is not a state dict.
    """
    state: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for file in files:
        path = source.fetch(file)
        try:
            zipped = zipfile.is_zipfile(path)  # what torch 1.6 and later write; the older format cannot be mapped
            part = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as e:
            raise CorruptCheckpoint(f"{source.name}: {file} cannot be read ({str(e).splitlines()[0]})") from e
        if not isinstance(part, dict):
            raise CorruptCheckpoint(f"{source.name}: {file} holds a {type(part).__name__}, not a state dict")
        part = {name: tensor for name, tensor in part.items() if isinstance(tensor, Tensor)}
        state |= part
        origin |= dict.fromkeys(part, file)
    return read_state_dict(state, origin)


def hint_below(source: Source) -> str:
    """Return which folder below a source holds a model, to end an error message; the latest of numbered ones."""
    below = {
        f.partition("/")[0] for f in source.files if f.count("/") == 1 and f.endswith(("/config.json", ".safetensors"))
    }
    if isinstance(source, LocalFolder):
        models = (path for pattern in ("*/config.json", "*/*.safetensors") for path in source.path.glob(pattern))
        below |= {path.parent.name for path in models}
    if not below:
        return ""
    latest = max(below, key=lambda name: (int(re.sub(r"\D", "", name) or 0), name))
    others = f", and {len(below) - 1} more folders do" if len(below) > 1 else ""
    return f"; its folder {latest} holds one{others}"


def stale_note(source: Source, weights: WeightFiles) -> list[str]:
    """Return what to say of files of another save of the weights, which are not read."""
    if not weights.stale:
        return []
    files = ", ".join(weights.stale[:4]) + (", ..." if len(weights.stale) > 4 else "")
    return [f"{source.name}: the weights are read from {weights.index or weights.files[0]}, not from {files}"]


def adapter_note(source: Source, weights: WeightFiles) -> list[str]:
    """Return what to say of adapter files beside the weights: they are not applied, by any command."""
    if ADAPTER_CONFIG not in source.files:
        return []
    return [
        f"{source.name}: the adapter in {ADAPTER_CONFIG} is not applied; the weights are studied as they stand in {weights.files[0]}"
    ]


def refuse_adapter_alone(source: Source) -> None:
    """Refuse a folder that holds an adapter, and no weights of a model.

    Raises:
        CheckpointNotFound: It holds nothing but an adapter; the message says how to merge it.
    """
    weights = [f for f in source.files if f.endswith((".safetensors", ".gguf", ".bin")) and not f.startswith("adapter")]
    if ADAPTER_CONFIG not in source.files or weights:
        return
    try:
        config = json.loads(source.fetch(ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind, base = config.get("peft_type") or "LORA", config.get("base_model_name_or_path") or "an unnamed model"
    except (ValueError, AttributeError) as e:
        raise CorruptCheckpoint(f"{source.name}: {ADAPTER_CONFIG} is not valid JSON ({e})") from e
    kind = "LoRA" if kind == "LORA" else kind
    raise CheckpointNotFound(
        f"{source.name}: this is a {kind} adapter for {base}, not a model; merge it first: "
        f"AutoPeftModelForCausalLM.from_pretrained({source.name!r}).merge_and_unload().save_pretrained(FOLDER)"
    )

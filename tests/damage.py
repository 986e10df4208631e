"""Ways to spoil a checkpoint, and the forms of weights that dimscope must refuse or ask about.

Every function changes the folder it is given: hand it a copy. Hostile files (a pickle, remote code) leave a marker
file where they run, so that a test can prove that they never ran.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import TOKENIZER_FILES, embedding_key, read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint in order of name."""
    return sorted(folder.glob("*.safetensors"))


def file_of(folder: Path, tensor: str) -> Path:
    """Return the safetensors file that holds a tensor, by the index where there is one."""
    if (folder / INDEX).is_file():
        return folder / read_json(folder / INDEX)["weight_map"][tensor]
    return folder / "model.safetensors"


# ---- broken files --------------------------------------------------------------------------------------------------


def truncate(path: Path, keep: float = 0.5) -> Path:
    """Cut a file down to the given share of its bytes, as an interrupted download leaves it."""
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * keep))
    return path


def flip_header_bytes(path: Path, start: int = 8, stop: int = 24) -> Path:
    """Invert bytes of a safetensors header (bytes 0 to 7 are its length, the JSON follows)."""
    with path.open("r+b") as file:
        file.seek(start)
        flipped = bytes(byte ^ 0xFF for byte in file.read(stop - start))
        file.seek(start)
        file.write(flipped)
    return path


def claim_header_length(path: Path, n_bytes: int = 1 << 60) -> Path:
    """Make a safetensors file claim a header of `n_bytes`: a reader that allocates it first dies."""
    with path.open("r+b") as file:
        file.write(n_bytes.to_bytes(8, "little"))
    return path


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Let `edit` change the parsed header of a safetensors file, and write it back before the unchanged data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
    return path


def drop_shard(folder: Path, tensor: str | None = None) -> str:
    """Delete the shard that holds `tensor` (the input table unless told) and return the file's name."""
    path = file_of(folder, tensor or embedding_key(folder))
    path.unlink()
    return path.name


def lie_in_index(folder: Path, tensor: str | None = None) -> tuple[str, str]:
    """Make the index name another shard for `tensor` than the one that holds it; return (tensor, named shard)."""
    index = read_json(folder / INDEX)
    name = tensor or embedding_key(folder)
    held_in = index["weight_map"][name]
    shard = next(path.name for path in weight_files(folder) if path.name != held_in)
    index["weight_map"][name] = shard
    write_json(folder / INDEX, index)
    return name, shard


def point_index_outside(folder: Path, outside: str = "../elsewhere/model.safetensors") -> str:
    """Make the index name a file outside the folder for the input table, as a hostile repository could."""
    index = read_json(folder / INDEX)
    index["weight_map"][embedding_key(folder)] = outside
    write_json(folder / INDEX, index)
    return outside


def change_config(folder: Path, **values: Any) -> Path:
    """Set values of config.json, e.g. a vocab_size or hidden_size that the tensors contradict; None removes a key."""
    config = read_json(folder / "config.json")
    config.update(values)
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})
    return folder


def break_json(path: Path) -> Path:
    """Leave a JSON file without its second half."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    return path


def remove_tokenizer(folder: Path) -> Path:
    """Delete the tokenizer's files."""
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


def remove_weights(folder: Path) -> Path:
    """Delete every weight file and the index: a config and a tokenizer remain."""
    for path in [*weight_files(folder), *folder.glob("*.bin"), folder / INDEX]:
        path.unlink(missing_ok=True)
    return folder


# ---- values --------------------------------------------------------------------------------------------------------


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> Path:
    """Let `edit` change (or replace) the tensors of one safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file(edit(tensors) or tensors, path, metadata={"format": "pt"})
    return path


def set_rows(
    folder: Path, ids: Sequence[int], values: float | np.ndarray | torch.Tensor, tensor: str | None = None
) -> Path:
    """Overwrite rows of a table (the input table unless told): NaN, Inf, planted duplicates, untrained rows."""
    import torch

    name = tensor or embedding_key(folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors[name]
        table[torch.as_tensor(list(ids))] = torch.as_tensor(values).to(table.dtype)

    return edit_tensors(file_of(folder, name), edit)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write weights as two shards and their index, beside whatever is in the folder."""
    from safetensors.torch import save_file

    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


# ---- quantised weights ---------------------------------------------------------------------------------------------


def _is_linear(name: str) -> bool:
    return re.search(r"layers\.\d+\..*(proj|fc\d)\.weight$", name) is not None


def _gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    n_out, n_in = weight.shape
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.qweight": torch.randint(-(2**31), 2**31 - 1, (n_in // 8, n_out), dtype=torch.int32),
        f"{stem}.qzeros": torch.full((1, n_out // 8), 0x77777777, dtype=torch.int32),
        f"{stem}.scales": torch.full((1, n_out), 0.01, dtype=torch.float16),
        f"{stem}.g_idx": torch.zeros(n_in, dtype=torch.int32),
    }


def _nf4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    return {
        name: torch.randint(0, 256, (weight.numel() // 2, 1), dtype=torch.uint8),
        f"{name}.absmax": torch.ones(max(1, weight.numel() // 64)),
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(64, dtype=torch.uint8),
    }


def _int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    scale = weight.float().abs().amax(dim=1).clamp(min=1e-8)
    return {
        name: (weight.float() / scale[:, None] * 127).round().to(torch.int8),
        name.removesuffix("weight") + "SCB": scale,
    }


def _mlx(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    stem = name.removesuffix(".weight")
    n_out, n_in = weight.shape
    return {
        name: torch.randint(0, 2**32 - 1, (n_out, n_in // 8), dtype=torch.int64).to(torch.uint32),
        f"{stem}.scales": torch.full((n_out, max(1, n_in // 32)), 0.01, dtype=torch.float16),
        f"{stem}.biases": torch.zeros(n_out, max(1, n_in // 32), dtype=torch.float16),
    }


def _fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the numbers of blocks of 128 x 128, each divided by its scale, as DeepSeek-V3 stores them."""
    import torch

    blocks = [-(-size // 128) for size in weight.shape]
    scales = torch.empty(blocks)
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i, j in ((i, j) for i in range(blocks[0]) for j in range(blocks[1])):
        part = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
        scales[i, j] = weight[part].float().abs().max() / 448
        packed[part] = (weight[part].float() / scales[i, j]).to(packed.dtype)
    return {name: packed, f"{name}_scale_inv": scales}


QUANTIZATIONS: dict[str, tuple[Callable[[str, torch.Tensor], dict[str, torch.Tensor]], bool, dict[str, Any]]] = {
    "gptq": (
        _gptq,
        False,
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False}},
    ),
    "bitsandbytes": (
        _nf4,
        False,
        {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": "bfloat16",
            }
        },
    ),
    "bitsandbytes_int8": (
        _int8,
        False,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ),
    "fp8": (
        _fp8,
        False,
        {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            }
        },
    ),
    "mlx": (_mlx, True, {"quantization": {"group_size": 32, "bits": 4}}),
}
"""By name: how a linear weight is packed, whether the input table is packed too, and what config.json says."""


def quantize(folder: Path, method: str, tables: bool | None = None) -> Path:
    """Pack the linear weights of a Llama-like single-file checkpoint as `method` does, and say so in its config.

    GPTQ and bitsandbytes leave the tables in float, MLX packs them; `tables` overrules that.
    """
    pack, packs_tables, config = QUANTIZATIONS[method]
    packs_tables = packs_tables if tables is None else tables
    named = {embedding_key(folder), "lm_head.weight"}

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = {}
        for name, tensor in tensors.items():
            wanted = packs_tables if name in named else _is_linear(name)
            packed.update(pack(name, tensor) if wanted else {name: tensor})
        return packed

    edit_tensors(folder / "model.safetensors", edit)
    return change_config(folder, **config)


# ---- pickles and remote code ---------------------------------------------------------------------------------------


def to_pickle(folder: Path) -> Path:
    """Hold a single-file checkpoint's weights in pytorch_model.bin only, as many old repositories do."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


class _RunsOnLoad:
    """A pickled object that creates a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, (f"open({self.marker!r}, 'w').close()",)


def to_hostile_pickle(folder: Path, marker: Path) -> Path:
    """Like `to_pickle`, and whoever unpickles it without care creates the file `marker`."""
    import torch

    to_pickle(folder)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "payload": _RunsOnLoad(marker)}, folder / "pytorch_model.bin")
    return folder


REMOTE_CONFIG = """from transformers import LlamaConfig

open({marker!r}, "w").close()


class StrangerConfig(LlamaConfig):
    model_type = "stranger"
"""

REMOTE_MODEL = """from transformers import LlamaForCausalLM

from .configuration_stranger import StrangerConfig


class StrangerForCausalLM(LlamaForCausalLM):
    config_class = StrangerConfig
"""


def to_remote_code(folder: Path, marker: Path) -> Path:
    """Turn a Llama checkpoint into one of an unknown model_type whose classes come as Python files beside it.

    It loads with trust_remote_code, and whoever imports the code creates the file `marker`.
    """
    (folder / "configuration_stranger.py").write_text(REMOTE_CONFIG.format(marker=str(marker)), encoding="utf-8")
    (folder / "modeling_stranger.py").write_text(REMOTE_MODEL, encoding="utf-8")
    return change_config(
        folder,
        model_type="stranger",
        architectures=["StrangerForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_stranger.StrangerConfig",
            "AutoModelForCausalLM": "modeling_stranger.StrangerForCausalLM",
        },
    )


# ---- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_NAMES = (
    (r"model\.embed_tokens\.", "token_embd."),
    (r"model\.norm\.", "output_norm."),
    (r"lm_head\.", "output."),
    (r"model\.layers\.(\d+)\.", r"blk.\1."),
    (r"self_attn\.o_proj\.", "attn_output."),
    (r"self_attn\.([qkv])_proj\.", r"attn_\1."),
    (r"mlp\.(gate|up|down)_proj\.", r"ffn_\1."),
    (r"input_layernorm\.", "attn_norm."),
    (r"post_attention_layernorm\.", "ffn_norm."),
)


def _gguf_tensors(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return a Llama checkpoint's tensors under GGUF's names, the rotary halves interleaved as llama.cpp wants."""
    from safetensors.torch import load_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    held = {}
    for path in weight_files(folder):
        for name, tensor in load_file(path).items():
            values = tensor.float().numpy()
            for pattern, replacement in GGUF_NAMES:
                name = re.sub(pattern, replacement, name)
            part = name.split(".")[-2]
            if part in heads:
                values = values.reshape(heads[part], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            held[name] = values
    return held


def write_gguf(path: Path, checkpoint: Path, quantization: str = "F32") -> Path:
    """Write a Llama checkpoint (sentencepiece tokenizer) as one GGUF file; `quantization` is F32, F16, BF16 or Q8_0.

    Norms stay in F32, as llama.cpp writes them. Q8_0 needs a hidden size that 32 divides.
    """
    import gguf
    import numpy as np

    config = read_json(checkpoint / "config.json")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(checkpoint.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_gguf_tokenizer(writer, checkpoint)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, values in _gguf_tensors(checkpoint, config).items():
        if values.ndim == 1 or quantization == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_tokenizer(writer: Any, checkpoint: Path) -> None:
    """Store the pieces, scores and types as a sentencepiece vocabulary (1 normal, 2 unknown, 3 control, 6 byte)."""
    vocab = read_json(checkpoint / "tokenizer.json")["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.__getitem__)
    special = {"<unk>": 2, "<s>": 3, "</s>": 3}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(index) for index in range(len(pieces))])
    writer.add_token_types([special.get(p, 6 if re.fullmatch(r"<0x[0-9A-F]{2}>", p) else 1) for p in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

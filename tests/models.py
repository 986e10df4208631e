"""Real tiny checkpoints for the tests: every family with random weights, as files that stock transformers reads.

Families are rows of a table (`FAMILIES`), tokenizers are trained here on a page of our own prose, and the weights are
written by transformers itself. `as_on_hub` rewrites a checkpoint to the key names and buffers that the hub's files
carry, `write_table_checkpoint` streams a big table to disk. Ways to spoil a checkpoint are in `damage.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer

TEXT = """\
The lighthouse keeper counted the ships before breakfast. On a clear morning there were seven of them, and on a
foggy one there were none, although the bells went on ringing from somewhere behind the grey. "If you cannot see a
ship," said the keeper to her brother, "you must count its bell, and then divide by the number of sailors who are
awake." Her brother thought about this for a while. He was a careful boy, who wrote every number in a red notebook:
1, 2, 3, 5, 8, 13, 21 and so on until the page was full.

In the winter of 1907 the water froze from the harbour to the outer rocks. Nobody could remember such a thing. The
baker walked to the island with a basket of warm bread under his arm, and the doctor walked behind him with a
lantern, because he did not trust the ice, the baker, or the weather. They found the keeper at the top of the
stairs, where she was cleaning the great lamp with vinegar and an old newspaper.

"What do you want to know?" she asked. "Whether the light still works," said the doctor. "Whether you are hungry,"
said the baker. She laughed at them both and put the kettle on the stove. There was honey, there was butter, there
was a small piece of cheese that the mice had not yet discovered. While they were eating, the wind turned, and far
away the ice began to sing: a long, low note, like a finger on the rim of a glass.

It is easy to describe a straight road and hard to describe the sea. A road has one direction; a field has two; the
water under a boat has three, and something else besides, which the old people called patience. Whoever wants to
measure it should begin with a rope, a stone, and a quiet afternoon. Lower the stone until the rope goes slack.
Write down the length. Move the boat a little to the north, and measure again. After a hundred measurements you will
have a table of numbers; after a thousand you will have a map; after ten thousand you will know that the map is
wrong in the places where you were tired. This is not a reason to stop. The keeper had been measuring for thirty
years, and each winter she found another rock that nobody had named. She gave them the names of the months, then of
the flowers in her mother's garden, then of the children in the village school, and at last she numbered them as her
brother had done, one after another.
"""
"""The text on which the tests' tokenizers are trained: our own prose, nothing is downloaded."""


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def train_byte_bpe(size: int) -> Tokenizer:
    """Train a byte-level BPE as GPT-2's, with <|startoftext|> and <|endoftext|> as ids 0 and 1; 258 entries at least.

    transformers reads every Qwen2 tokenizer as its own class, which adds <|endoftext|> where it is missing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def train_sentencepiece(size: int) -> Tokenizer:
    """Train a BPE with metaspace and byte fallback laid out as Llama's: specials, 256 bytes, merges, characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()  # only while training: merges must not cross words
    draft.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    trained = json.loads(draft.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def train_wordpiece(size: int) -> Tokenizer:
    """Build an uncased WordPiece as BERT's, with [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4.

    Characters, then words and endings by their count: the library's trainer gives another vocabulary in each process.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(TEXT)))
    endings = Counter(f"##{word[at:]}" for word in words.elements() for at in range(1, len(word)))
    counts, characters = words | endings, sorted(set("".join(words)))
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))
    pieces = dict.fromkeys([*specials, *characters, *(f"##{c}" for c in characters), *frequent])
    vocab = {piece: index for index, piece in enumerate(list(pieces)[:size])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


@dataclass(frozen=True, slots=True)
class TokenizerKind:
    """How a kind of tokenizer is trained, and the special tokens that its files declare."""

    train: Callable[[int], Tokenizer]
    special_tokens: Mapping[str, str]


TOKENIZERS = {
    "byte_bpe": TokenizerKind(train_byte_bpe, {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}),
    "sentencepiece": TokenizerKind(
        train_sentencepiece, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ),
    "wordpiece": TokenizerKind(
        train_wordpiece,
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
    ),
}


def write_tokenizer(folder: Path, kind: str, size: int) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json; return the special ids as a config names them."""
    spec = TOKENIZERS[kind]
    tokenizer = spec.train(size)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"{kind} reached {tokenizer.get_vocab_size()} entries instead of {size}: TEXT decides")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", **spec.special_tokens}
    write_json(folder / "tokenizer_config.json", settings)
    named = ("bos_token", "eos_token", "pad_token")
    return {f"{name}_id": tokenizer.token_to_id(spec.special_tokens[name]) for name in named if name in settings}


# ---- families ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one family from another: its classes, its default tokenizer, and its tables' names in a file."""

    config_class: str
    model_class: str
    arguments: Callable[[int], dict[str, Any]]
    tied: bool = False
    tokenizer: str = "byte_bpe"
    embedding: str = "model.embed_tokens.weight"
    output: str | None = "lm_head.weight"


def _grouped(hidden_size: int) -> dict[str, Any]:
    return {"intermediate_size": 2 * hidden_size, "num_attention_heads": 4, "num_key_value_heads": 2}


def _full(hidden_size: int) -> dict[str, Any]:
    return {"intermediate_size": 2 * hidden_size, "num_attention_heads": 4}


def _grouped_with_head_dim(hidden_size: int) -> dict[str, Any]:
    # head_dim unlike hidden_size / heads, as in the real Qwen3 and Gemma: q_proj is not square
    return {**_grouped(hidden_size), "head_dim": hidden_size // 2}


def _gpt2(hidden_size: int) -> dict[str, Any]:
    return {"n_inner": 2 * hidden_size, "num_attention_heads": 4}


def _gpt_neo(hidden_size: int) -> dict[str, Any]:
    return {**_full(hidden_size), "attention_types": [[["global", "local"], 1]]}


def _opt(hidden_size: int) -> dict[str, Any]:
    return {"ffn_dim": 2 * hidden_size, "num_attention_heads": 4, "word_embed_proj_dim": hidden_size}


FAMILIES = {
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", _gpt2, tied=True, embedding="transformer.wte.weight"),
    "gpt_neo": Family("GPTNeoConfig", "GPTNeoForCausalLM", _gpt_neo, tied=True, embedding="transformer.wte.weight"),
    "gpt_neox": Family(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", _full, embedding="gpt_neox.embed_in.weight", output="embed_out.weight"
    ),
    "opt": Family("OPTConfig", "OPTForCausalLM", _opt, tied=True, embedding="model.decoder.embed_tokens.weight"),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", _grouped, tied=True),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", _grouped_with_head_dim, tied=True),
    "llama": Family("LlamaConfig", "LlamaForCausalLM", _grouped, tokenizer="sentencepiece"),
    "mistral": Family("MistralConfig", "MistralForCausalLM", _grouped, tokenizer="sentencepiece"),
    "gemma": Family("GemmaConfig", "GemmaForCausalLM", _grouped_with_head_dim, tied=True, tokenizer="sentencepiece"),
    "phi": Family("PhiConfig", "PhiForCausalLM", _full),
    "olmo": Family("OlmoConfig", "OlmoForCausalLM", _full),
    "bert": Family(
        "BertConfig",
        "BertModel",
        _full,
        tokenizer="wordpiece",
        embedding="embeddings.word_embeddings.weight",
        output=None,
    ),
}
"""The families of the tests by their model_type."""


def build_checkpoint(
    folder: Path,
    family: str,
    *,
    vocab_size: int = 512,
    hidden_size: int = 32,
    tied: bool | None = None,
    dtype: str = "float32",
    sharded: bool = False,
    tokenizer: str | None = "native",
    tokenizer_size: int | None = None,
    layers: int = 2,
    seed: int = 0,
    **config_arguments: Any,
) -> Path:
    """Write a random-weight checkpoint of `family` with its tokenizer into `folder` and return the folder.

    `tokenizer` is a kind of `TOKENIZERS`, "native" (the family's own) or None (no tokenizer files);
    `tokenizer_size` below `vocab_size` leaves rows beyond the tokenizer. `sharded` gives at least three shards.
    `config_arguments` go to the config as they are, e.g. `word_embed_proj_dim=16` for OPT-350m's projections.
    """
    import torch
    import transformers

    spec = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    kind = spec.tokenizer if tokenizer == "native" else tokenizer
    special_ids: dict[str, int | None] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if kind is not None:
        special_ids |= write_tokenizer(folder, kind, tokenizer_size or vocab_size)
    arguments = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "max_position_embeddings": 64,
        "tie_word_embeddings": spec.tied if tied is None else tied,
        **special_ids,
        **spec.arguments(hidden_size),
        **config_arguments,
    }
    config = getattr(transformers, spec.config_class)(**arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, spec.model_class)(config).to(getattr(torch, dtype))
    if sharded:
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        model.save_pretrained(folder, max_shard_size=n_bytes // 6)
        assert len(list(folder.glob("model-*.safetensors"))) >= 3
    else:
        model.save_pretrained(folder)
    return folder


def embedding_key(folder: Path) -> str:
    """Return the name of the input table in the files of a checkpoint that `build_checkpoint` wrote."""
    return FAMILIES[read_json(folder / "config.json")["model_type"]].embedding


def stock_tables(folder: Path) -> dict[str, np.ndarray]:
    """Return the input and (causal models) output table in float64 as stock transformers holds them: the oracle."""
    import transformers

    auto = transformers.AutoModelForCausalLM
    if FAMILIES[read_json(folder / "config.json")["model_type"]].output is None:
        auto = transformers.AutoModel
    model = auto.from_pretrained(folder)
    layers = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    return {side: layer.weight.detach().double().numpy() for side, layer in layers.items() if layer is not None}


# ---- files as the hub holds them -----------------------------------------------------------------------------------

Tensors: TypeAlias = "dict[str, torch.Tensor]"


def _causal_mask(positions: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.ones(positions, positions).tril().to(dtype).view(1, 1, positions, positions)


def _hub_gpt2(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """openai-community/gpt2: no prefix, no head; float masks as the first files, uint8 as the later ones."""
    import torch

    held = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for block in range(config["n_layer"]):
        mask_dtype = torch.float32 if block % 2 == 0 else torch.uint8
        held[f"h.{block}.attn.bias"] = _causal_mask(config["n_positions"], mask_dtype)
        held[f"h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    return held


def _hub_gpt_neo(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """EleutherAI/gpt-neo-*: masks beside every attention; the tied head is not stored twice."""
    import torch

    held = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for block in range(config["num_layers"]):
        stem = f"transformer.h.{block}.attn.attention"
        held[f"{stem}.bias"] = _causal_mask(config["max_position_embeddings"], torch.uint8)
        held[f"{stem}.masked_bias"] = torch.tensor(-1e9)
    return held


def _hub_gpt_neox(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """EleutherAI/pythia-*: boolean masks, their fill value and the rotary frequencies are stored with the weights."""
    import torch

    held = dict(tensors)
    rotary = max(2, config["hidden_size"] // config["num_attention_heads"] // 4)
    for block in range(config["num_hidden_layers"]):
        stem = f"gpt_neox.layers.{block}.attention"
        held[f"{stem}.bias"] = _causal_mask(config["max_position_embeddings"], torch.bool)
        held[f"{stem}.masked_bias"] = torch.tensor(-1e9, dtype=torch.float16)
        held[f"{stem}.rotary_emb.inv_freq"] = 10_000.0 ** -(torch.arange(0, rotary, 2) / rotary)
    return held


def _hub_opt(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """facebook/opt-350m and larger: the decoder without `model.`, the tied head left out."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _hub_opt_125m(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """facebook/opt-125m: the decoder with `model.`, and the tied head stored a second time."""
    return {**tensors, "lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone()}


def _hub_llama(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The first Llama files: the rotary frequencies of every block are stored with the weights."""
    import torch

    held = dict(tensors)
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    for block in range(config["num_hidden_layers"]):
        held[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = 10_000.0 ** -(torch.arange(half) / half)
    return held


def _hub_bert(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """google-bert/bert-base-uncased: `bert.` prefix, LayerNorm gamma and beta, position ids, both heads."""
    import torch

    held = {}
    for name, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        held["bert." + re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)] = tensor
    width = config["hidden_size"]
    return {
        **held,
        "bert.embeddings.position_ids": torch.arange(config["max_position_embeddings"]).unsqueeze(0),
        "cls.predictions.bias": torch.zeros(config["vocab_size"]),
        "cls.predictions.transform.dense.weight": torch.eye(width),
        "cls.predictions.transform.dense.bias": torch.zeros(width),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(width),
        "cls.predictions.transform.LayerNorm.beta": torch.zeros(width),
        "cls.seq_relationship.weight": torch.zeros(2, width),
        "cls.seq_relationship.bias": torch.zeros(2),
    }


HUB_LAYOUTS: dict[str, Callable[[Tensors, dict[str, Any]], Tensors]] = {
    "gpt2": _hub_gpt2,
    "gpt_neo": _hub_gpt_neo,
    "gpt_neox": _hub_gpt_neox,
    "opt": _hub_opt,
    "opt-125m": _hub_opt_125m,
    "llama": _hub_llama,
    "bert": _hub_bert,
}
"""How the hub's files of a family differ from what save_pretrained writes today."""


def as_on_hub(folder: Path, layout: str | None = None) -> Path:
    """Rewrite a single-file checkpoint in place to its family's `HUB_LAYOUTS` entry; the weights stay what they are."""
    from safetensors.torch import load_file, save_file

    config = read_json(folder / "config.json")
    path = folder / "model.safetensors"
    held = HUB_LAYOUTS[layout or config["model_type"]](load_file(path), config)
    save_file(held, path, metadata={"format": "pt"})
    if config["model_type"] == "bert":
        write_json(folder / "config.json", {**config, "architectures": ["BertForMaskedLM"]})
    return folder


# ---- big tables, streamed ------------------------------------------------------------------------------------------

Rows: TypeAlias = "torch.Tensor | np.ndarray | Callable[[int, int], torch.Tensor]"


@dataclass(frozen=True, slots=True)
class Stream:
    """One tensor of a file to be written: its shape, dtype and blocks of values, or a hole (zeros, no disk space)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[torch.Tensor]] | None


def write_safetensors(path: Path, streams: Mapping[str, Stream]) -> Path:
    """Write a safetensors file block by block, so that memory holds one block; holes stay sparse on disk."""
    import torch
    from safetensors.torch import _TYPES

    names = {dtype: name for name, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stream in streams.items():
        start, end = end, end + prod(stream.shape) * stream.dtype.itemsize
        header[name] = {"dtype": names[stream.dtype], "shape": list(stream.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, stream in streams.items():
            file.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            for block in stream.blocks() if stream.blocks else ():
                file.write(block.to(stream.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.truncate(8 + len(encoded) + end)
    return path


def row_blocks(vocab_size: int, hidden_size: int, rows: Rows | None, seed: int) -> Iterator[torch.Tensor]:
    """Yield a table in blocks of 8,192 rows: the given rows, or Gaussian ones of standard deviation 0.02."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for start in range(0, vocab_size, 8192):
        stop = min(start + 8192, vocab_size)
        if rows is None:
            yield torch.randn(stop - start, hidden_size, generator=generator) * 0.02
        elif callable(rows) and not isinstance(rows, torch.Tensor):
            yield rows(start, stop)
        else:
            yield torch.as_tensor(rows[start:stop])


def _stream(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, tables: Mapping[str, Rows | None], holes: bool, seed: int
) -> Stream:
    """Choose the values of one tensor: a table's rows, ones for a norm, small random numbers or a hole for the rest."""
    import torch

    if name not in tables and holes:
        return Stream(shape, dtype, None)
    if name.endswith("norm.weight"):
        return Stream(shape, dtype, lambda: iter([torch.ones(shape)]))
    return Stream(shape, dtype, lambda: row_blocks(shape[0], prod(shape[1:]), tables.get(name), seed))


def write_table_checkpoint(
    folder: Path,
    vocab_size: int,
    hidden_size: int,
    dtype: str = "bfloat16",
    tokenizer_dir: Path | None = None,
    rows: Rows | None = None,
    *,
    output_rows: Rows | None = None,
    tied: bool = True,
    layers: int = 1,
    intermediate_size: int = 64,
    holes: bool = False,
    seed: int = 0,
) -> Path:
    """Write a Qwen2-shaped checkpoint whose tables are given or random, with memory bounded by a block of rows.

    `rows` is a (vocab_size, hidden_size) array or a function of (start, stop) that returns those rows. With `holes`
    everything but the tables is a hole in a sparse file, so that a model of any size costs the disk only its tables.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64 if hidden_size % 64 == 0 else 1,
        num_key_value_heads=2 if hidden_size % 128 == 0 else 1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in transformers.Qwen2ForCausalLM(config).state_dict().items()}
    tables = {"model.embed_tokens.weight": rows, "lm_head.weight": output_rows}
    streams = {
        name: _stream(name, shape, getattr(torch, dtype), tables, holes, seed + number)
        for number, (name, shape) in enumerate(shapes.items())
        if not (tied and name == "lm_head.weight")
    }
    write_safetensors(folder / "model.safetensors", streams)
    if tokenizer_dir is not None:
        copy_tokenizer(tokenizer_dir, folder)
    return folder


# ---- small verbs ---------------------------------------------------------------------------------------------------

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one folder into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

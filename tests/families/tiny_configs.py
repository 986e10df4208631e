"""Tiny configs of every model type of transformers: its defaults with each size set to a small value.

RULES maps the names of fields to small values, the same for all types; OVERRIDES has what single types need beyond them.
A model has as many blocks as it takes to have every kind of block of the default config.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 300
FIRST_ORDINARY_ID = 20  # special tokens have smaller ids

# Small value: patterns of the whole name of a field, the first that fits, where its default is a larger integer.
_PATTERNS: tuple[tuple[int, str], ...] = (
    (VOCAB_SIZE, r"(?!.*type_vocab).*vocab_size(_base|_per_layer_input)? num_embeds num_embeddings"),
    (
        64,
        r"(n|max)_positions? .*max_(position|2d_position|temporal)_embeddings max_(source|target)_positions n_ctx seq_len",
    ),
    (64, r"max_seq_len context_length (num_position_embeddings|position_embedding_size|mm_posemb_size) max_pos_emb"),
    (64, r"max_num_patches"),
    (4, r"(sliding_|local_attention_|attention_)window(_size|_len)? sliding_window_size local_attention index_topk"),
    (8, r"(mamba_|attention_)?chunk_size l\w+_attn_chunk_length (global_|index_)?block_size"),
    (1, r"first_k_dense_replace num_dense_layers moe_layer_start_index n_group topk_group .*shared_experts"),
    (2, r"(.*_)?(n_|num_)?(hidden_|encoder_|decoder_)?layers? num_.*_layers .*depth num_blocks num_hidden_groups"),
    (2, r"layer_group_size .*(key_value|kv)_heads kv_n_heads linear_num_key_heads"),
    (4, r"(?!.*head_dim|.*head_hid|.*head_size).*heads?(_ipa)?"),
    (8, r".*head_dim head_size attention_head_size resampler_dim_head d_kv d_head dim_head kv_channels d_rel"),
    (8, r".*rank rotary_dim state_size ssm_state_size .*d_state"),
    (4, r"(?!.*(per_tok|shared)).*num_(local_|routed_)?experts n_routed_experts zero_expert_num"),
    (2, r".*(experts_per_tok|per_token) moe_top_?k moe_k"),
    (
        64,
        r".*(intermediate|ffn|ff|feed_forward|feedforward|inner)(_hidden)?(_size|_dim)?(_mlp)? dff d_ff mlp_dim dim_ff",
    ),
    (64, r"hidden_dim share_expert_dim moe_hidden_size"),
    (
        32,
        r"(?!.*(head|tile|image|img|patch|kernel|window|step|vocab|_type|merge|grid|pool)).*hidden_size.* d_model n_embd",
    ),
    (16, r"embedding_size input_embedding_size"),
    (32, r".*embed_dim dim emb_dim .*embedding_dim .*(projection|output|out|input)_dim d_latents"),
    (32, r"cross_attention_dim output_embedding_size output_channels lru_width entity_emb_size num_latents"),
    (32, r"image_size max_im(age|g)_size crop_size resolution"),
    (8, r"patch_size num_query_tokens resampler_n(um)?_latents latent_query_num prompt_length"),
)
RULES = tuple((re.compile(pattern), value) for value, patterns in _PATTERNS for pattern in patterns.split())

SPECIAL = re.compile(r"(.*_)?(token_(id|index)|(pad|bos|eos|sep|mask|cls|start|end)_(token_)?(id|index)|im_\w+_id)")

# Fields that are left open by default, and factors whose default is 1 or nothing, so that leaving them out would not show.
OPEN: dict[str, Any] = {
    "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
FACTORS: dict[str, float] = {
    "logit_scale": 0.3, "logits_scaling": 7.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "final_logit_softcapping": 2.0,
}  # fmt: skip
KINDS_OF_BLOCKS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
MOST_BLOCKS = 8

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}

# What a type needs beyond the rules, also as a nested config; "text_config.x" is a field of a nested config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 300},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": (1, 1)},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cosmos3_edge_text": {**_MROPE},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"topk_method": "greedy"},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "global_head_dim": 8},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": (1, 1)},
    "ernie4_5_vl_moe_text": {**_MROPE, "moe_intermediate_size": [16, 16]},
    "esm": {"vocab_size": 300, "mask_token_id": 4, "pad_token_id": 1},
    "evolla": {"protein_encoder_config.vocab_size": 64},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "florence_vision": {
        "depths": (1,), "patch_size": (7,), "patch_stride": (4,), "patch_padding": (3,), "patch_prenorm": (False,),
        "embed_dim": (32,), "num_heads": (4,), "num_groups": (4,),
    },
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "glm4v_moe_text": {**_MROPE, "head_dim": 16},
    "glm4v_text": {**_MROPE},
    "glm5_next_text": {"index_kpool": 2},
    "glm_ocr_text": {**_MROPE, "head_dim": 16},
    "glmga": {"text_config.head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0, 0, 1, 1], "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,
    },
    "granite_speech_encoder": {"context_size": 8},
    "granite_speech_plus_encoder": {"context_size": 8},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]},
    },
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": (1, 1)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mimi": {"upsample_groups": 32, "num_filters": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"patch_sizes": (4, 4), "hidden_sizes": (8, 16), "depths": (1, 1)},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8},
    "neomme": {"head_dim": 16},
    "paddleocr_vl_text": {**_MROPE},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "qwen2_5_omni_text": {**_MROPE},
    "qwen2_5_vl_text": {**_MROPE},
    "qwen2_vl_text": {**_MROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "reformer": {"axial_pos_shape": (4, 16), "axial_pos_embds_dim": (8, 24), "attn_layers": ["local", "lsh"]},
    "squeezebert": {"embedding_size": 32},
    "step3p5": {"sliding_window": 4},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4, "depths": (1, 1, 1), "downsampling_ratios": (2, 2)},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": (1, 1, 1), "downsampling_ratios": (2, 2)},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 400},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4,
    },
}  # fmt: skip


def tiny_config(model_type: str, *, causal: bool = False) -> Any:
    """Return the config of a model type with small sizes; `causal` makes a decoder of a type that is an encoder too."""
    config_class = CONFIG_MAPPING[model_type]
    is_both = any(field.name == "is_decoder" for field in dataclasses.fields(config_class))
    return _shrunk(config_class, {**({"is_decoder": causal} if is_both else {}), **OVERRIDES.get(model_type, {})}, {})


def _shrunk(config_class: Any, overrides: dict[str, Any], defaults: dict[str, Any]) -> Any:
    """Return an instance of a config class with small sizes, its nested configs too."""
    own = {name: value for name, value in overrides.items() if "." not in name}
    fields = {field.name: field.default for field in dataclasses.fields(config_class)} | defaults
    values = defaults | {n: small for n, default in fields.items() if (small := small_value(n, default)) is not None}
    if "kv_lora_rank" in fields and "num_attention_heads" in values:  # latent attention has keys for all heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, (nested, defaults) in _nested_classes(config_class).items():
        prefix = f"{name}."
        inner = {k.removeprefix(prefix): v for k, v in overrides.items() if k.startswith(prefix)}
        if name not in own:
            values[name] = _shrunk(nested, {**OVERRIDES.get(nested.model_type, {}), **inner}, defaults)
    if "num_hidden_layers" in values:
        values["num_hidden_layers"] = _n_blocks(config_class)
    return config_class(**{**values, **own})


def _n_blocks(config_class: Any) -> int:
    """Return how many blocks have every kind of block of the default config, at least 2."""
    try:
        config = config_class()
    except Exception:  # its defaults contradict each other
        return 2
    n = 2
    for name in KINDS_OF_BLOCKS:
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and kinds:
            n = max(n, 1 + max(kinds.index(kind) for kind in set(kinds)))
    return min(n, MOST_BLOCKS)


def small_value(name: str, default: Any) -> float | None:
    """Return the small value of a field, or None where its default stays."""
    if name in FACTORS:
        return FACTORS[name]
    if default is None:
        return OPEN.get(name)
    if not isinstance(default, int) or isinstance(default, bool):
        return None
    if SPECIAL.fullmatch(name):
        return default if 0 <= default < FIRST_ORDINARY_ID else 3 + sum(map(ord, name)) % (FIRST_ORDINARY_ID - 3)
    value = next((value for pattern, value in RULES if pattern.fullmatch(name)), None)
    return value if value is not None and default > value else None


def _nested_classes(config_class: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the class of each nested config, and what the outer config sets in it."""
    classes = {name: (nested, {}) for name, nested in vars(config_class).get("sub_configs", {}).items()}
    for name, spec in (config_class.sub_configs_defaults or {}).items():
        nested = spec.config_class
        if not issubclass(nested, transformers.PretrainedConfig):
            nested = spec.get_config_class(spec.model_type) if spec.model_type else None
        if nested is not None and not spec.optional:
            classes[name] = (nested, dict(spec.init_kwargs))
    return classes

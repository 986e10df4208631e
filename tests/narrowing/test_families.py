"""What every parameter of a family is, and the reasons why others are not narrowed."""

import pytest

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.families import LAYOUTS, head_size, layout_of
from dimscope.errors import UnsupportedCheckpoint

PARTS = {
    "model.embed_tokens.weight": ("table", None),
    "model.layers.3.self_attn.q_proj.weight": ("reader", "model.layers.3.input_layernorm"),
    "model.layers.3.self_attn.q_proj.bias": ("reader bias", "model.layers.3.input_layernorm"),
    "model.layers.12.mlp.up_proj.weight": ("reader", "model.layers.12.post_attention_layernorm"),
    "model.layers.3.self_attn.o_proj.weight": ("writer", None),
    "model.layers.3.mlp.down_proj.bias": ("writer", None),
    "model.layers.3.input_layernorm.weight": ("gain", None),
    "model.norm.weight": ("gain", None),
    "model.layers.3.self_attn.q_norm.weight": ("kept", None),
    "lm_head.weight": ("head", "model.norm"),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_part_of_each_parameter_of_a_llama(name):
    layout = LAYOUTS["llama"]
    assert (layout.part(name), layout.norm_before(name)) == PARTS[name]


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_every_family_has_one_table_readers_and_writers_in_every_block_and_norms_before_them(checkpoint, family):
    opened = open_checkpoint(checkpoint(family, tied=False))
    layout = layout_of(opened)
    assert opened.skeleton is not None
    names = list(opened.skeleton.shapes)
    parts = [layout.part(name) for name in names]
    assert parts.count("table") == parts.count("head") == 1
    n_layers = opened.config.num_hidden_layers
    assert parts.count("reader") >= 2 * n_layers
    assert (
        sum(part == "writer" and name.endswith("weight") for part, name in zip(parts, names, strict=True))
        == 2 * n_layers
    )
    norms = {name.removesuffix(".weight") for name in names if layout.part(name) == "gain"}
    assert {layout.norm_before(name) for name in names} - {None} <= norms
    assert head_size(opened.config) * opened.config.num_attention_heads <= 4 * opened.config.hidden_size


@pytest.mark.parametrize(
    ("family", "arguments", "reason"),
    [
        ("gpt2", {}, "whole heads"),
        ("opt", {}, "whole heads"),
        ("olmo", {}, "is known for"),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual is false"),
        ("phi", {"qk_layernorm": True}, "norms on queries and keys"),
    ],
)
def test_what_is_not_narrowed_is_refused_with_the_reason(checkpoint, family, arguments, reason):
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        layout_of(open_checkpoint(checkpoint(family, **arguments)))

"""SliceGPT for Llamas, after the paper, to compare with: rotations of its own for every block, with maps on the residual path.

Source: Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, 2024 (arXiv 2401.15024),
section 3. The signals of each block are those of the network that is sliced so far; the head is not sliced. Ours is not a
standard checkpoint: it is a model in memory, to be evaluated and counted.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dimscope.texts.windows import Window


class Norm(nn.Module):
    """RMSNorm without gain, over the width that the states had before they were sliced."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.square().sum(dim=-1, keepdim=True) / self.dim + self.eps)


class SlicedBlock(nn.Module):
    """A block whose attention and MLP each read one rotated stream and write another."""

    def __init__(self, block: Any, norm: Norm) -> None:
        super().__init__()
        self.attention, self.mlp, self.norm = block.self_attn, block.mlp, norm
        self.shortcuts = nn.ParameterList()

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        attended, _ = self.attention(hidden_states=self.norm(hidden_states), **options)
        hidden_states = hidden_states @ self.shortcuts[0] + attended
        return hidden_states @ self.shortcuts[1] + self.mlp(self.norm(hidden_states))


@torch.no_grad()
def sliced(dense: PreTrainedModel, windows: Sequence[Window], width: int) -> PreTrainedModel:
    """A Llama cut to a width by rotations for each block, calibrated on windows of one length."""
    model: Any = deepcopy(dense).float()
    config, decoder = model.config, model.model
    norm = Norm(config.hidden_size, config.rms_norm_eps)
    table = decoder.embed_tokens.weight.double()
    head = model.lm_head.weight.double() * decoder.norm.weight.double()
    for block in decoder.layers:
        for layer, gain in (
            *(
                (m, block.input_layernorm)
                for m in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
            ),
            *((m, block.post_attention_layernorm) for m in (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            layer.weight.mul_(gain.weight)
    ids = torch.stack([w.ids for w in windows])
    options = _options(model, ids)
    states = table[ids].float()  # in the coordinates of the dense model, as the sliced network has them
    turn = _leading(states, width)
    decoder.embed_tokens = nn.Embedding.from_pretrained((table @ turn).float())
    for number, block in enumerate(decoder.layers):
        own = SlicedBlock(block, norm)
        for part, readers, writer in (
            ("attention", ("q_proj", "k_proj", "v_proj"), "o_proj"), ("mlp", ("gate_proj", "up_proj"), "down_proj"),
        ):  # fmt: skip
            module = getattr(own, part)
            for name in readers:
                _reshape(getattr(module, name), getattr(module, name).weight.double() @ turn)
            seen = norm((states.double() @ turn).float())
            written = module(hidden_states=seen, **options)[0] if part == "attention" else module(seen)
            states = (states.double() @ turn @ turn.T).float() + written
            last = number == config.num_hidden_layers - 1 and part == "mlp"
            after = torch.eye(config.hidden_size, dtype=torch.float64) if last else _leading(states, width)
            _reshape(getattr(module, writer), after.T @ getattr(module, writer).weight.double())
            own.shortcuts.append(nn.Parameter((turn.T @ after).float()))
            turn = after
        decoder.layers[number] = own
    decoder.norm = norm
    model.lm_head = nn.Linear(config.hidden_size, len(head), bias=False)
    model.lm_head.weight = nn.Parameter(head.float())
    return model.eval()


def n_parameters(model: PreTrainedModel) -> int:
    """All numbers that have to be stored, the maps of the residual path among them."""
    return sum(p.numel() for p in model.parameters())


def _leading(states: Tensor, width: int) -> Tensor:
    flat = states.flatten(0, -2).double()
    return torch.linalg.eigh(flat.T @ flat)[1].flip(1)[:, :width]


def _reshape(layer: nn.Linear, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight.float())
    layer.out_features, layer.in_features = weight.shape


def _options(model: Any, ids: Tensor) -> dict[str, Any]:
    """What the decoder hands to every block beside the states: mask and positions."""
    caught: list[dict[str, Any]] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, options: caught.append(options), with_kwargs=True
    )
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return {name: value for name, value in caught[0].items() if name != "hidden_states"}

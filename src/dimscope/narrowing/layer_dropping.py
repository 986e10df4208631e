"""The plain way to a smaller standard checkpoint, for comparison: whole blocks left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from dimscope.narrowing.calibration import Calibration
from dimscope.narrowing.projection import assemble

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dimscope.checkpoints.model import Placement


def least_blocks(calibration: Calibration, n: int) -> range:
    """The `n` consecutive blocks that turn the stream the least: the angle between what enters and what leaves them.

    Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024 (arXiv 2403.17887).
    """
    seen = [rows for name, rows in calibration.samples.items() if "post_attention" not in name]
    angles = [
        float(torch.nn.functional.cosine_similarity(before, after, dim=1).clamp(-1, 1).arccos().mean())
        for before, after in zip(seen[:-n], seen[n:], strict=True)
    ]
    first = angles.index(min(angles))
    return range(first, first + n)


def without_blocks(dense: PreTrainedModel, blocks: range, placement: Placement) -> PreTrainedModel:
    """The model without some blocks; its weights are those of the dense one, not copies."""
    held = dict(dense.named_parameters())
    config, names = _shallower(dense.config, held, blocks)
    return assemble(config, {name: held[own].detach() for name, own in names.items()}, placement)


def _shallower(config: Any, names: Mapping[str, Any], blocks: range) -> tuple[PretrainedConfig, dict[str, str]]:
    """The config, and for every parameter the name that it has in the whole model."""
    kept = [i for i in range(config.num_hidden_layers) if i not in blocks]
    less: Any = deepcopy(config)
    less.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        less.layer_types = [config.layer_types[i] for i in kept]
    found: dict[str, str] = {}
    for name in names:
        match = re.match(r"(.*\.layers\.)(\d+)(\..*)", name)
        if match is None:
            found[name] = name
        elif int(match[2]) in kept:
            found[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = name
    return less, found

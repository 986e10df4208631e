"""Dropping layers: the simplest way to a smaller standard checkpoint, for comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dimscope.narrowing.assembly import assemble
from dimscope.narrowing.calibration import Calibration

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dimscope.checkpoints.model import Placement


def least_blocks(calibration: Calibration, n: int) -> range:
    """Return the `n` consecutive blocks that rotate the stream the least, by the mean angle between their input and output.

    Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024 (arXiv 2403.17887).
    """
    sampled = [rows for name, rows in calibration.samples.items() if "post_attention" not in name]
    angles = [
        float(torch.nn.functional.cosine_similarity(before, after, dim=1).clamp(-1, 1).arccos().mean())
        for before, after in zip(sampled[:-n], sampled[n:], strict=True)
    ]
    first = angles.index(min(angles))
    return range(first, first + n)


def without_blocks(dense: PreTrainedModel, blocks: range, placement: Placement) -> PreTrainedModel:
    """Return the model without some blocks; its weights are those of the dense one, not copies."""
    weights = dict(dense.named_parameters())
    shallower = _shallower(dense.config, weights, blocks)
    return assemble(shallower.config, {name: weights[own].detach() for name, own in shallower.names.items()}, placement)


@dataclass(frozen=True, slots=True)
class _Shallower:
    """The config of a model with fewer blocks, and for every parameter its name in the whole model."""

    config: PretrainedConfig
    names: dict[str, str]


def _shallower(config: Any, names: Mapping[str, Any], blocks: range) -> _Shallower:
    kept = [i for i in range(config.num_hidden_layers) if i not in blocks]
    less: Any = deepcopy(config)
    less.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        less.layer_types = [config.layer_types[i] for i in kept]
    own: dict[str, str] = {}
    for name in names:
        match = re.match(r"(.*\.layers\.)(\d+)(\..*)", name)
        if match is None:
            own[name] = name
        elif int(match[2]) in kept:
            own[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = name
    return _Shallower(less, own)

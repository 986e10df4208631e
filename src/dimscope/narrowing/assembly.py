"""The narrow model of a narrowing: assembled in memory by transformers, or written to a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dimscope.checkpoints.loaded import LoadedModel
from dimscope.checkpoints.model import DTYPES
from dimscope.checkpoints.writer import PlannedTensor, write_safetensors
from dimscope.narrowing.calibration import final_temperature
from dimscope.narrowing.projection import Narrowing

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.checkpoints.model import Placement
    from dimscope.texts.windows import Window

COPIED = (
    "tokenizer", "special_tokens_map", "vocab.", "merges.", "added_tokens", "chat_template", "generation_config", "LICENSE",
    "NOTICE",
)  # fmt: skip
"""How the names of files begin that go with the narrow checkpoint as they are."""
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Account:
    """Parameters and bytes of the dense and of the narrow checkpoint, as they are stored.

    Attributes:
        table_parameters: Of one embedding table of the narrow model.
        untied: Whether the dense model has one table for both sides, and the narrow one two.
    """

    dense_parameters: int
    dense_bytes: int
    narrow_parameters: int
    narrow_bytes: int
    table_parameters: int
    untied: bool


def account_of(narrowing: Narrowing) -> Account:
    """Count the parameters and bytes of the dense and of the narrow checkpoint."""
    plan = narrowing.plan()
    skeleton = narrowing.target.checkpoint.skeleton
    assert skeleton is not None, narrowing.target.checkpoint.name
    dense = [narrowing.files[parameter] for parameter in skeleton.shapes]  # no buffers, and no table twice
    return Account(
        dense_parameters=sum(t.n_elements for t in dense), dense_bytes=sum(t.n_bytes for t in dense),
        narrow_parameters=sum(math.prod(t.shape) for t in plan), narrow_bytes=sum(t.n_bytes for t in plan),
        table_parameters=next(math.prod(narrowing.shape_of(o)) for o in narrowing.origins.values() if o.part == "table"),
        untied=narrowing.target.checkpoint.tied and not narrowing.tied,
    )  # fmt: skip


def write_narrowing(narrowing: Narrowing, folder: Path, trained: Mapping[str, Tensor] | None = None) -> Account:
    """Write weights, config, tokenizer and generation config into an existing folder, and count what is in it.

    Args:
        narrowing: The narrow checkpoint.
        folder: An existing folder.
        trained: Weights by name that replace those of the narrowing.
    """
    plan = narrowing.plan()
    replaced = trained or {}
    write_safetensors(
        folder,
        (
            (p, iter([replaced[p.name].detach().cpu()]) if p.name in replaced else narrowing.blocks(p.name))
            for p in plan
        ),
        plan,
    )
    config = narrowing.config
    config.dtype = plan[0].dtype
    config.save_pretrained(folder)
    source = narrowing.target.checkpoint.source
    if isinstance(source, LoadedModel):
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        if (generation := generation_config_of(narrowing.target.checkpoint)) is not None:
            generation.save_pretrained(folder)
    for file in sorted(f for f in source.files if f.startswith(COPIED) and not f.endswith(".py")):
        (folder / file).write_bytes(source.fetch(file).read_bytes())
    return account_of(narrowing)


def generation_config_of(checkpoint: Checkpoint) -> GenerationConfig | None:
    """Return a copy of the settings of generation that come with a model, if any."""
    from transformers import GenerationConfig

    source = checkpoint.source
    if isinstance(source, LoadedModel):
        return deepcopy(source.model.generation_config)
    if GENERATION not in source.files:
        return None
    return GenerationConfig.from_pretrained(source.fetch(GENERATION).parent)


def assemble(config: PretrainedConfig, state: Mapping[str, Tensor], placement: Placement) -> PreTrainedModel:
    """Return the model of a config with these weights, made by transformers, in evaluation mode."""
    return _assembled(config, state, DTYPES[placement.dtype], placement.device)


def _assembled(
    config: PretrainedConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: str
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model, info = kind.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    return model.to(device).eval()


def stored_model(narrowing: Narrowing, trained: Mapping[str, Tensor], device: str) -> PreTrainedModel:
    """Return the narrow model in the dtype in which it is stored, as transformers would load what `write_narrowing` writes.

    Args:
        narrowing: The narrow checkpoint.
        trained: Weights by name that replace those of the narrowing.
        device: A torch device.
    """
    state = {
        p.name: trained[p.name].detach().cpu().to(p.dtype) if p.name in trained else _tensor(narrowing, p)
        for p in narrowing.plan()
    }
    model = _assembled(narrowing.config, state, narrowing.plan()[0].dtype, device)
    if (generation := generation_config_of(narrowing.target.checkpoint)) is not None:
        model.generation_config = generation
    return model


def _tensor(narrowing: Narrowing, planned: PlannedTensor) -> Tensor:
    return torch.cat([block.to(planned.dtype) for block in narrowing.blocks(planned.name)])


def narrow_model(narrowing: Narrowing, placement: Placement) -> PreTrainedModel:
    """Return the narrow model in memory, as transformers would load what `write_narrowing` writes."""
    return assemble(narrowing.config, {p.name: _tensor(narrowing, p) for p in narrowing.plan()}, placement)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A narrow model in memory, and what it was made from."""

    narrowing: Narrowing
    model: PreTrainedModel


def fit_temperature(
    narrowing: Narrowing, dense: PreTrainedModel, windows: Sequence[Window], placement: Placement, batch: int = 1
) -> Candidate:
    """Return the narrow model with the gain of the final norm fitted as a temperature, see `final_temperature`.

    Args:
        narrowing: With a gain for every norm.
        dense: The dense model.
        windows: What to fit it on, all of one length.
        placement: Dtype and device of the narrow model.
        batch: Windows at once.
    """
    model = narrow_model(narrowing, placement)
    final = f"{narrowing.layout.final_norm}.weight"
    factor = final_temperature(model, dense, windows, batch)
    narrowing = replace(narrowing, gains={**narrowing.gains, final: narrowing.gains[final] * factor})
    name, origin = next((n, o) for n, o in narrowing.origins.items() if o.part == "gain" and o.source == final)
    stored = next(planned.dtype for planned in narrowing.plan() if planned.name == name)
    with torch.no_grad():
        model.get_parameter(name).copy_(narrowing.gain_after(origin).to(stored))  # rounded as in the files
    return Candidate(narrowing, model)

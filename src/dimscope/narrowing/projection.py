"""A checkpoint cut to a narrower residual stream by one orthonormal map, from file to file, block by block.

With x the stream and P of d x k orthonormal, the narrow stream is P^T x: what reads it is multiplied by P from the right,
with the gain of its norm folded in before; what writes it by P^T from the left. All products are in float64, cast once.
Behind centred norms (LayerNorm) P has rank k - 1: it maps what is orthogonal to the ones of R^d to what is orthogonal to
those of R^k, so that the mean that the norm takes out is zero already (see `bases.fitted`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.checkpoints.families import Layout, layout_of
from dimscope.checkpoints.loaded import LoadedModel
from dimscope.checkpoints.writer import Planned, write_safetensors
from dimscope.errors import CorruptCheckpoint, UnsupportedCheckpoint
from dimscope.narrowing.bases import tied_to
from dimscope.narrowing.calibration import final_temperature
from dimscope.narrowing.conversion import Origin, Origins, origins_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.checkpoints.model import Placement
    from dimscope.checkpoints.tensors import TensorInfo
    from dimscope.texts.windows import Window

NUMBERS = 1 << 22  # of a tensor computed at once: 32 MiB in float64
BESIDE = (
    "tokenizer", "special_tokens_map", "vocab.", "merges.", "added_tokens", "chat_template", "generation_config", "LICENSE",
    "NOTICE",
)  # fmt: skip
GENERATION = "generation_config.json"

Gains = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Account:
    """What is in the files: numbers and bytes of the dense and of the narrow checkpoint, as they are stored."""

    dense_parameters: int
    dense_bytes: int
    narrow_parameters: int
    narrow_bytes: int
    table_parameters: int  # of one embedding table of the narrow model
    untied: bool  # whether the dense model kept one table for both, and the narrow one has two


@dataclass(frozen=True, slots=True)
class Cut:
    """A checkpoint on its way to a narrower one: where its tensors are, and how each is changed."""

    checkpoint: Checkpoint
    layout: Layout
    config: PretrainedConfig
    basis: Float[Tensor, "d k"]
    origins: Origins
    files: Mapping[str, TensorInfo]  # by parameter of the dense model
    gains: Gains = field(default_factory=dict)  # by norm, a number or one for each dimension; `usual_gain` unless told
    dtype: torch.dtype | None = None  # to store all tensors in; None keeps each as it is

    @property
    def usual_gain(self) -> float:
        """What keeps all lengths where nothing is lost: a norm makes its output sqrt(k) long, where it was sqrt(d)."""
        d, k = self.basis.shape
        return math.sqrt(d / k)

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def plan(self) -> list[Planned]:
        """The tensors of the narrow checkpoint in the order in which they are written."""
        from dimscope.checkpoints.tensors import DTYPES

        fallback = self.files[f"{self.layout.table}.weight"]
        return [
            Planned(name, self._shape(o), self.dtype or DTYPES[(self.files[o.source] if o.source else fallback).dtype])
            for name, o in self.origins.items()
        ]

    def _shape(self, origin: Origin) -> tuple[int, ...]:
        k = self.basis.shape[1]
        held = origin.source or origin.weight
        if held is None:
            return (k,)
        shape = self.files[held].shape
        if origin.part == "kept":
            return shape
        n_rows = shape[0] if origin.third is None else shape[0] // 3
        if origin.part == "reader bias":
            return (n_rows,)
        if origin.part in ("table", "head", "reader"):
            return (n_rows, k)
        return (k, *shape[1:])

    def right(
        self, origin: Origin, gain: Float[Tensor, " d"] | None, basis: Float[Tensor, "d k"]
    ) -> Float[Tensor, "d k"]:
        """What the rows of a table or reader are multiplied by, for a basis (in float64, or while it is learned)."""
        if origin.part == "table" and self.layout.scaled_table:
            return basis * self.usual_gain
        return basis if gain is None else gain.to(basis)[:, None] * basis

    def gain_before(self, origin: Origin) -> Float[Tensor, " d"] | None:
        """The gain of the norm through which a tensor reads, which is folded into it."""
        return None if origin.norm is None else self.whole(f"{origin.norm}.weight").double() + self.layout.gain_offset

    def gain_after(self, origin: Origin) -> Tensor:
        """What a norm multiplies with, as it is stored."""
        assert origin.source is not None
        told = self.gains.get(origin.source, torch.tensor(self.usual_gain, dtype=torch.float64))
        return (told.double() - self.layout.gain_offset).expand(self.basis.shape[1])

    def bias(self, origin: Origin) -> Float[Tensor, " n"]:
        """A reader's bias: what the shift of its norm comes to is added, W b."""
        assert origin.weight is not None
        assert origin.norm is not None
        own = None if origin.source is None else self.whole(origin.source, origin.third).double()
        shift = f"{origin.norm}.bias"
        if shift not in self.files:
            assert own is not None, origin
            return own
        shifted = self.whole(shift).double()
        moved = torch.cat([rows.double() @ shifted for rows in self.rows(origin.weight, origin.third)])
        return moved if own is None else own + moved

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor of the narrow checkpoint."""
        origin = self.origins[name]
        if origin.part in ("zeros", "shift"):
            yield torch.zeros(self.basis.shape[1])
        elif origin.part == "gain":
            yield self.gain_after(origin)
        elif origin.part == "reader bias":
            yield self.bias(origin)
        else:
            assert origin.source is not None
            if origin.part == "kept":
                yield from self.rows(origin.source)
            elif origin.part == "writer":
                yield from self._written(origin.source)
            else:
                right = self.right(origin, self.gain_before(origin), self.basis)
                for rows in self.rows(origin.source, origin.third):
                    yield rows.double() @ right

    def rows(self, name: str, third: int | None = None) -> Iterator[Tensor]:
        """A tensor of the dense checkpoint block by block; of a fused one the third that is asked for, at once."""
        info = self.files[name]
        if third is not None:
            yield self.whole(name, third)
            return
        step = max(1, NUMBERS // max(1, math.prod(info.shape[1:])))
        for start in range(0, info.shape[0], step):
            yield self.checkpoint.reader.read_rows(info.name, start, min(start + step, info.shape[0]))

    def whole(self, name: str, third: int | None = None) -> Tensor:
        """A tensor of the dense checkpoint as it is stored."""
        info = self.files[name]
        return self.third_of(self.checkpoint.reader.read_rows(info.name, 0, info.shape[0]), third)

    def third_of(self, fused: Tensor, third: int | None) -> Tensor:
        """Queries, keys or values of a fused projection, whose rows go by head, then by these three."""
        if third is None:
            return fused
        return fused.unflatten(0, (self.config.num_attention_heads, 3, -1))[:, third].flatten(0, 1)

    def _written(self, name: str) -> Iterator[Tensor]:
        """P^T W in blocks of rows; W stays as it is stored, and is made wide a block of columns at a time."""
        stored = self.whole(name)
        if stored.ndim == 1:
            yield stored.double() @ self.basis
            return
        k, columns = self.basis.shape[1], stored.shape[1]
        result = torch.empty(k, columns, dtype=self.dtype or stored.dtype)
        step = max(1, NUMBERS // len(stored))
        for start in range(0, columns, step):
            block = slice(start, start + step)
            result[:, block] = self.basis.T @ stored[:, block].double()
        yield result


def plan_cut(
    checkpoint: Checkpoint,
    basis: Float[Tensor, "d k"],
    gains: Gains | None = None,
    *,
    dtype: torch.dtype | None = None,
    export: str | None = None,
    tied: bool = False,
) -> Cut:
    """Looks up which tensor is what; nothing is read but headers, and for a tie the gain of the final norm.

    `tied` keeps one table for both sides of a tied model: the basis is turned to where that costs least (`tied_to`), and
    the final norm gets a gain for each dimension, times what `gains` has for it.
    Raises UnsupportedCheckpoint for a family that is not narrowed, InvalidArgument for a width, family or tie that it
    cannot have, CorruptCheckpoint where a tensor is missing.
    """
    layout = layout_of(checkpoint)
    config, origins = origins_of(checkpoint, layout, basis.shape[1], export=export, tied=tied)
    skeleton = checkpoint.skeleton
    assert skeleton is not None, checkpoint.name  # layout_of refuses what has none
    files: dict[str, TensorInfo] = {}
    named = {parameter: name for name, parameter in skeleton.parameters_of(checkpoint.tensors).items()}
    for parameter in skeleton.shapes:
        held = named.get(parameter) or skeleton.file_name(parameter, checkpoint.tensors)
        if held is None:
            raise CorruptCheckpoint(f"{checkpoint.name}: the weights hold no {parameter}")
        files[parameter] = checkpoint.tensors[held]
    files.setdefault("lm_head.weight", files[f"{layout.table}.weight"])  # of a tied model, which has one for both
    if odd := [info for info in files.values() if info.dtype not in ("F64", "F32", "F16", "BF16")]:
        raise UnsupportedCheckpoint(
            f"{checkpoint.name}: {odd[0].name} is stored as {odd[0].dtype}, which is not narrowed"
        )
    cut = Cut(checkpoint, layout, config, basis.double(), origins, files, gains or {}, dtype)
    return _tied(cut) if tied else cut


def _tied(cut: Cut) -> Cut:
    final = f"{cut.layout.final_norm}.weight"
    gain = cut.gain_before(Origin("head", final, cut.layout.final_norm))
    assert gain is not None
    basis, values = tied_to(cut.basis, gain)
    usual = torch.tensor(cut.usual_gain, dtype=torch.float64)
    table = cut.usual_gain if cut.layout.scaled_table else 1.0  # which the table has been multiplied by
    return replace(cut, basis=basis, gains={**cut.gains, final: values * cut.gains.get(final, usual) / table})


def account_of(cut: Cut) -> Account:
    """Count the parameters and bytes of the dense and of the narrow checkpoint."""
    plan = cut.plan()
    skeleton = cut.checkpoint.skeleton
    assert skeleton is not None, cut.checkpoint.name
    dense = [cut.files[parameter] for parameter in skeleton.shapes]  # no buffers, and no table twice
    return Account(
        dense_parameters=sum(t.n_elements for t in dense), dense_bytes=sum(t.n_bytes for t in dense),
        narrow_parameters=sum(math.prod(t.shape) for t in plan), narrow_bytes=sum(t.n_bytes for t in plan),
        table_parameters=next(math.prod(cut._shape(o)) for o in cut.origins.values() if o.part == "table"),
        untied=cut.checkpoint.tied and not cut.tied,
    )  # fmt: skip


def write_cut(cut: Cut, folder: Path, trained: Mapping[str, Tensor] | None = None) -> Account:
    """Write weights, config, tokenizer and generation config into an existing folder, and count what is in it.

    Args:
        cut: The narrow checkpoint.
        folder: An existing folder.
        trained: Weights by name that replace those of the cut.
    """
    plan = cut.plan()
    replaced = trained or {}
    write_safetensors(
        folder,
        ((p, iter([replaced[p.name].detach().cpu()]) if p.name in replaced else cut.blocks(p.name)) for p in plan),
        plan,
    )
    config = cut.config
    config.dtype = plan[0].dtype
    config.save_pretrained(folder)
    source = cut.checkpoint.source
    if isinstance(source, LoadedModel):
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        if (generation := generation_config_of(cut.checkpoint)) is not None:
            generation.save_pretrained(folder)
    for file in sorted(f for f in source.files if f.startswith(BESIDE) and not f.endswith(".py")):
        (folder / file).write_bytes(source.fetch(file).read_bytes())
    return account_of(cut)


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
    from dimscope.checkpoints.model import DTYPES

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


def stored_model(cut: Cut, trained: Mapping[str, Tensor], device: str) -> PreTrainedModel:
    """Return the narrow model in the dtype in which it is stored, as transformers would load what `write_cut` writes.

    Args:
        cut: The narrow checkpoint.
        trained: Weights by name that replace those of the cut.
        device: A torch device.
    """
    state = {
        p.name: trained[p.name].detach().cpu().to(p.dtype) if p.name in trained else _tensor(cut, p) for p in cut.plan()
    }
    model = _assembled(cut.config, state, cut.plan()[0].dtype, device)
    if (generation := generation_config_of(cut.checkpoint)) is not None:
        model.generation_config = generation
    return model


def _tensor(cut: Cut, planned: Planned) -> Tensor:
    return torch.cat([block.to(planned.dtype) for block in cut.blocks(planned.name)])


def narrow_model(cut: Cut, placement: Placement) -> PreTrainedModel:
    """The narrow model in memory, as `write_cut` would write it and transformers load it."""
    return assemble(cut.config, {p.name: _tensor(cut, p) for p in cut.plan()}, placement)


def fitted_model(
    cut: Cut, dense: PreTrainedModel, windows: Sequence[Window], placement: Placement, batch: int = 1
) -> tuple[Cut, PreTrainedModel]:
    """A cut with the final norm's gain fitted as a temperature on windows, and its model; every norm has a gain already."""
    model = narrow_model(cut, placement)
    final = f"{cut.layout.final_norm}.weight"
    factor = final_temperature(model, dense, windows, batch)
    cut = replace(cut, gains={**cut.gains, final: cut.gains[final] * factor})
    name, origin = next((n, o) for n, o in cut.origins.items() if o.part == "gain" and o.source == final)
    stored = next(planned.dtype for planned in cut.plan() if planned.name == name)
    with torch.no_grad():
        model.get_parameter(name).copy_(cut.gain_after(origin).to(stored))  # rounded as in the files
    return cut, model

"""The model without its weights, built on the meta device: which tensor of the files is what.

Embedding tables are found by asking the model (`get_input_embeddings`), never by a list of names, so that any
architecture that transformers knows works, whatever prefix its files use.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Tables of vectors beside those of tokens, by their names.
EMBEDDING_ROLES = (
    (r"token_?type|segment", "token-type embedding"),
    (r"per_layer", "per-layer embedding"),
    (r"\bpos|position|wpe|relative", "position embedding"),
)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Parameter names, shapes and roles of a model; no weights.

    Attributes:
        shapes: The shape of each parameter, tied parameters once.
        roles: The role of each parameter, see `role_of`.
        aliases: Further names of tied parameters, and the name that each has in `shapes`.
        input_name: The token-embedding table.
        output_name: The output table; None where the model has none.
        head_name: The name of the output table as a module has it, also where it is tied to the input table.
        model_class: The class of the model.
        causal: A causal language model, which needs an output table.
        position_offset: Rows at the beginning of the table of positions that no token uses (RoBERTa).
        targets: Turns the name of a tensor in the files into the names of parameters; several where loading splits it.
        ignored: Patterns of tensors that files may have and the model does not load.
        optional: Patterns of parameters that files may lack.
    """

    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    roles: dict[str, str] = field(repr=False)
    aliases: dict[str, str] = field(repr=False)
    input_name: str
    output_name: str | None
    head_name: str | None
    model_class: type
    causal: bool
    position_offset: int
    targets: Callable[[str], Sequence[str]] = field(repr=False)
    ignored: tuple[str, ...] = field(repr=False)
    optional: tuple[str, ...] = field(repr=False)

    @property
    def tied(self) -> bool:
        """Return whether input and output table are one by the config; the files may differ."""
        return self.output_name == self.input_name

    def parameters_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return the parameter that each tensor of the files belongs to; several tensors share one where loading merges them."""
        renamed = {name: self.targets(name)[0] for name in names}
        own = {name: parameter for name, parameter in renamed.items() if parameter in self.shapes}
        filled = set(own.values())
        for name, parameter in renamed.items():
            tied_to = self.aliases.get(parameter)
            if tied_to is not None and tied_to not in filled:
                own[name] = tied_to
                filled.add(tied_to)
        return own

    def unfilled(self, names: Iterable[str], *, exact: bool = False) -> list[str]:
        """Return the parameters that no tensor of the files fills; with `exact`, also by no name that only ends alike."""
        names = list(names)
        filled = {parameter for name in names for parameter in self.targets(name)}
        filled |= {self.aliases[parameter] for parameter in filled if parameter in self.aliases}
        own = self.parameters_of(names)
        alike = {} if exact else _by_tail(name for name in names if name not in own)
        return [
            p
            for p in self.shapes
            if p not in filled
            and not any(re.search(pattern, p) for pattern in self.optional)
            and len(alike.get(_tail(p), ())) != 1
        ]

    def file_name(self, parameter: str, names: Iterable[str]) -> str | None:
        """Return the tensor of the files that holds a parameter, or None."""
        names = list(names)
        alike = [parameter, *(alias for alias, of in self.aliases.items() if of == parameter)]
        own = min(
            (name for name in names if self.targets(name)[0] in alike),
            key=lambda name: alike.index(self.targets(name)[0]),
            default=None,
        )
        if own is not None:
            return own
        last = _by_tail(names).get(_tail(parameter), ())  # some checkpoints order their prefixes otherwise
        return last[0] if len(last) == 1 else None

    def is_buffer(self, name: str) -> bool:
        """Whether transformers itself skips a tensor of this name (mask buffers of GPT-2, rotary frequencies)."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def _tail(name: str) -> str:
    """Return the last two parts of a name."""
    return ".".join(name.split(".")[-2:])


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by their last two parts."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(_tail(name), []).append(name)
    return grouped


def build_skeleton(config: "PretrainedConfig", name: str, *, trust_remote_code: bool) -> Skeleton:
    """Build the model of a config on the meta device, and read names, shapes, ties and roles from it.

    Raises:
        UnsupportedCheckpoint: transformers cannot build the model, or it has no token-embedding table.
    """
    model = _meta_model(config, name, trust_remote_code)
    return skeleton_of(model, name, targets=_name_targets(model))


def skeleton_of(model: Any, name: str, *, targets: Callable[[str], Sequence[str]]) -> Skeleton:
    """Read names, shapes, ties and roles from a model, whose weights are not needed.

    Args:
        model: A `PreTrainedModel`, on the meta device or with its weights.
        name: Its name in error messages.
        targets: Turns the name of a tensor in the checkpoint into the names of parameters.

    Raises:
        UnsupportedCheckpoint: The model has no token-embedding table.
    """
    module, output_module = _input_module(model, name), _output_embeddings(model)
    input_name = next(f"{n}.weight" for n, m in model.named_modules() if m is module)
    every = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}  # of each parameter the first name, of the table that of its module
    for parameter_name, parameter in every.items():
        names.setdefault(id(parameter), input_name if parameter is module.weight else parameter_name)
    named = {n: every[n] for n in names.values()}
    output_name = None if output_module is None else names[id(output_module.weight)]
    roles = _roles(model, named)
    roles[input_name] = "input embedding"
    if output_name not in (None, input_name):
        roles[output_name] = "output embedding"
    return Skeleton(
        shapes={n: tuple(p.shape) for n, p in named.items()},
        roles=roles,
        aliases={n: names[id(p)] for n, p in every.items() if names[id(p)] != n},
        input_name=input_name,
        output_name=output_name,
        head_name=next((f"{n}.weight" for n, m in model.named_modules() if m is output_module), None),
        model_class=type(model),
        causal=_is_causal(model),
        position_offset=_position_offset(model),
        targets=targets,
        ignored=(
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(re.escape(n) + "$" for n, _ in model.named_buffers()),
            r"rotary_emb\.inv_freq$",
            r"\.masked_bias$",
        ),
        optional=tuple(model._keys_to_ignore_on_load_missing or ()),
    )


def _roles(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return what each parameter is for; the caller knows the tables."""
    owners = {
        f"{m}.{n}".lstrip("."): module
        for m, module in model.named_modules()
        for n, _ in module.named_parameters(recurse=False)
    }
    return {name: role_of(name, owners[name]) for name in names}


def _input_module(model: Any, name: str) -> nn.Module:
    try:
        module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # models of images or sounds
        module = None
    if not isinstance(module, nn.Module) or module._parameters.get("weight") is None:  # a property may join two tables
        raise UnsupportedCheckpoint(f"{name}: {type(model).__name__} has no token-embedding table that is one tensor")
    return module


def _is_causal(model: Any) -> bool:
    """Whether the model predicts the next token: a stock class that generates, or remote code that is declared so."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = model.config
    if config.is_encoder_decoder or _output_embeddings(model) is None:
        return False
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return False  # an encoder, which transformers would run as one
    own = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    derived = any(base.__name__ in own for base in type(model).__mro__)
    return derived or model.can_generate() or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _position_offset(model: Any) -> int:
    """Return how many rows of the table of positions no token uses: positions are counted from the padding's on."""
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    padded = (
        m.padding_idx + 1
        for n, m in model.named_modules()
        if isinstance(m, nn.Embedding) and m.num_embeddings == n_positions and m.padding_idx is not None and "pos" in n
    )
    return next(padded, 0)


def _name_targets(model: Any) -> Callable[[str], Sequence[str]]:
    """Return how transformers turns a name in the files into those of parameters: renamed, merged, split, with another prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()

    @cache
    def targets(name: str) -> Sequence[str]:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:  # a rule for the names of the hub fits a name that is right already
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if pattern is None:
            return (renamed,)
        first, *rest = next(c.target_patterns for c in converters if pattern in c.source_patterns)
        return (renamed, *(renamed.replace(first, other, 1) for other in rest))

    return targets


def role_of(name: str, owner: nn.Module | None = None) -> str:
    """Return what a parameter is for, by its module and path. The caller knows the embedding tables.

    >>> role_of("model.layers.3.self_attn.q_proj.weight")
    'attention'
    >>> role_of("transformer.h.0.ln_1.bias")
    'norm'
    >>> role_of("embeddings.token_type_embeddings.weight", nn.Embedding(2, 4))
    'token-type embedding'
    """
    path = name.lower()
    if isinstance(owner, nn.Embedding) or re.search(r"embeddings?(\.weight)?$", path):
        return next((role for pattern, role in EMBEDDING_ROLES if re.search(pattern, path)), "other embedding")
    if "norm" in type(owner).__name__.lower() or re.search(r"norm|\bln_|\.ln\d*\.", path):
        return "norm"
    if re.search(r"attn|attention", path):
        return "attention"
    if re.search(r"mlp|ffn|feed_forward|experts|\.fc\d|dense_h|dense_4h|intermediate|\.output\.dense", path):
        return "mlp"
    return "other"


def _meta_model(config: "PretrainedConfig", name: str, trust_remote_code: bool) -> Any:
    import transformers

    architecture = getattr(transformers, (config.architectures or [""])[0] or "", None)
    builders = [architecture._from_config] if hasattr(architecture, "_from_config") else []
    builders += [
        lambda c, auto=auto: auto.from_config(c, trust_remote_code=trust_remote_code)
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM, transformers.AutoModel)
    ]
    reasons = []
    for build in builders:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return build(config)
        except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, ArithmeticError, ImportError) as e:
            reasons.append(str(e).splitlines()[0] if str(e) else type(e).__name__)
    raise UnsupportedCheckpoint(
        f"{name}: transformers cannot build a {config.model_type!r} model from this config ({reasons[0]})"
    )


def _output_embeddings(model: Any) -> nn.Module | None:
    """Return the module whose weight turns hidden states into logits over the vocabulary, if there is one."""
    module = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, nn.Parameter) and weight.ndim == 2 else None

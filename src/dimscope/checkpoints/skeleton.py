"""The model without its weights, built on the meta device: which tensor of the files is what.

Embedding tables are found by asking the model (`get_input_embeddings`), never by a list of names, so that any
architecture that transformers knows works, whatever prefix its files use.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Parameter names, shapes and roles of a model; no weights.

    Attributes:
        shapes: The shape of each parameter, tied parameters once.
        roles: The role of each parameter, see `role_of`.
        input_name: The token-embedding table.
        output_name: The output table; None where the model has none.
        tied: Both are one.
        causal: A causal language model, which needs an output table.
        rename: Turns the name of a tensor in the files into the name of a parameter.
        ignored: Patterns of tensors that files may have and the model does not load.
    """

    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    roles: dict[str, str] = field(repr=False)
    input_name: str
    output_name: str | None
    tied: bool
    causal: bool
    rename: Callable[[str], str] = field(repr=False)
    ignored: tuple[str, ...] = field(repr=False)

    def parameters_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return the parameter that each tensor of the files belongs to; several tensors share one where loading merges them."""
        renamed = {name: self.rename(name) for name in names}
        return {name: parameter for name, parameter in renamed.items() if parameter in self.shapes}

    def file_name(self, parameter: str, names: Iterable[str]) -> str | None:
        """Return the tensor of the files that holds a parameter, or None."""
        own = next((name for name, of in self.parameters_of(names).items() if of == parameter), None)
        if own is not None:
            return own
        # Multimodal checkpoints order their prefixes otherwise: the last two parts are enough where they are unique.
        tail = ".".join(parameter.split(".")[-2:])
        alike = [n for n in names if n == tail or n.endswith(f".{tail}")]
        return alike[0] if len(alike) == 1 else None

    def is_buffer(self, name: str) -> bool:
        """Whether transformers itself skips a tensor of this name (mask buffers of GPT-2, rotary frequencies)."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def build_skeleton(config: "PretrainedConfig", name: str, *, trust_remote_code: bool) -> Skeleton:
    """Build the model of a config on the meta device, and read names, shapes, ties and roles from it.

    Raises:
        UnsupportedCheckpoint: transformers cannot build the model, or it has no token-embedding table.
    """
    model = _meta_model(config, name, trust_remote_code)
    return skeleton_of(model, name, rename=_renamer(model))


def skeleton_of(model: Any, name: str, *, rename: Callable[[str], str]) -> Skeleton:
    """Read names, shapes, ties and roles from a model, whose weights are not needed.

    Args:
        model: A `PreTrainedModel`, on the meta device or with its weights.
        name: Its name in error messages.
        rename: Turns the name of a tensor in the checkpoint into the name of a parameter.

    Raises:
        UnsupportedCheckpoint: The model has no token-embedding table.
    """
    named = dict(model.named_parameters())
    names = {id(p): n for n, p in named.items()}
    input_name, output_module = names[id(_input_table(model, name))], _output_embeddings(model)
    output_name = None if output_module is None else names[id(output_module.weight)]
    owners = {
        f"{m}.{n}".lstrip("."): module
        for m, module in model.named_modules()
        for n, _ in module.named_parameters(recurse=False)
    }
    roles = {n: role_of(n, owners[n]) for n in named}
    roles[input_name] = "input embedding"
    if output_name not in (None, input_name):
        roles[output_name] = "output embedding"
    return Skeleton(
        shapes={n: tuple(p.shape) for n, p in named.items()},
        roles=roles,
        input_name=input_name,
        output_name=output_name,
        tied=output_name == input_name,
        causal=_is_causal(model),
        rename=rename,
        ignored=(
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(re.escape(n) + "$" for n, _ in model.named_buffers()),
            r"rotary_emb\.inv_freq$",
            r"\.masked_bias$",
        ),
    )


def _input_table(model: Any, name: str) -> nn.Parameter:
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # models of images or sounds
        table = None
    if not isinstance(table, nn.Parameter):
        raise UnsupportedCheckpoint(f"{name}: {type(model).__name__} has no token-embedding table")
    return table


def _is_causal(model: Any) -> bool:
    """Whether the model predicts the next token: one of transformers' own, derived from one, or remote code that is declared so."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    derived = any(base.__name__ in own for base in type(model).__mro__)
    return derived or "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {})


def _renamer(model: Any) -> Callable[[str], str]:
    """Return how transformers turns a name in the files into one of the model: renamed parts, added or missing prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]


def role_of(name: str, owner: nn.Module | None = None) -> str:
    """Return what a parameter is for, by its module and path. The caller knows the embedding tables.

    >>> role_of("model.layers.3.self_attn.q_proj.weight")
    'attention'
    >>> role_of("transformer.h.0.ln_1.bias")
    'norm'
    """
    if isinstance(owner, nn.Embedding):
        return "position embedding"
    path = name.lower()
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

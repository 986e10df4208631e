"""Tiny models of stock transformers, and what they compute: the reference of the sweep. Nothing of dimscope is used here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_configs import FIRST_ORDINARY_ID, VOCAB_SIZE, tiny_config
from transformers.models.auto import modeling_auto

# Mappings of transformers by kind; a type counts once in each kind, and with the same class in the first kind only.
MAPPINGS: dict[str, tuple[str, ...]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "multimodal": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    "encoder": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
    "encoder-decoder": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
}
# Their hidden_states begin with the output of the first block instead of its input.
WITHOUT_EMBEDDINGS = {"mamba", "mamba2", "falcon_mamba", "rwkv"}


@dataclass(frozen=True, slots=True)
class Case:
    """A model type, and the class of transformers that runs it."""

    kind: str
    model_type: str
    model_class: str

    def __str__(self) -> str:
        """Return the name of the case in a test run."""
        return f"{self.kind}-{self.model_type}"


@dataclass(frozen=True, slots=True)
class Tables:
    """What a model of stock transformers has: the parameters that it saves, and its tables."""

    n_parameters: int
    input_table: torch.Tensor
    output_table: torch.Tensor | None
    tied: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """What stock transformers has and computes.

    Attributes:
        tables: The tables of the model.
        hidden_states: The input of the first block and the output of each; the last entry is after the final norm.
        before_norm: The output of the last block, where that is another one and transformers gives it out.
        logits: The logits at all positions, of a model that has an output table.
    """

    tables: Tables
    hidden_states: tuple[torch.Tensor, ...]
    before_norm: torch.Tensor | None
    logits: torch.Tensor | None


def find_cases() -> list[Case]:
    """Return all cases."""
    cases: list[Case] = []
    for kind, mappings in MAPPINGS.items():
        before = {(case.model_type, case.model_class) for case in cases}
        types: dict[str, str] = {}
        for mapping in mappings:
            types = getattr(modeling_auto, mapping) | types
        cases += [Case(kind, *item) for item in types.items() if item not in before]
    return cases


def cases_of(*kinds: str) -> list[Case]:
    """Return the cases of some kinds."""
    return [case for case in find_cases() if case.kind in kinds]


def build(case: Case, *, tie_other_way: bool = False) -> Any:
    """Return a tiny model in evaluation mode; no weight has a value that would hide a wrong site, as 0 or 1.

    Args:
        case: The type and its class.
        tie_other_way: Tie the tables of a type that has two by default, or untie them.
    """
    model_class = getattr(transformers, case.model_class)
    config = tiny_config(case.model_type, causal=case.kind == "causal")
    nested = [
        c for name in config.sub_configs if isinstance(c := getattr(config, name, None), model_class.config_class)
    ]
    if nested and not isinstance(config, model_class.config_class):  # the mapping names the model of the text alone
        config = nested[0]
        if any((c.model_type, c.model_class) == (config.model_type, case.model_class) for c in find_cases()):
            raise ValueError(f"{case.model_class} is the class of the type {config.model_type}")
    if tie_other_way:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = not getattr(part, "tie_word_embeddings", True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class._from_config(config).eval()
        for parameter in saved_parameters(model):
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def with_pooler(model: Any) -> Any:
    """Return the model below the output table of an encoder, as AutoModel builds it: with a pooler where the type has one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = type(model.base_model)._from_config(model.config).eval()
    base.load_state_dict(model.base_model.state_dict(), strict=False)
    return base


def stock_fault(model: Any, folder: Path) -> str | None:
    """Return what is wrong with the files of a model if transformers itself does not load what it saved."""
    _, loading = type(model).from_pretrained(folder, output_loading_info=True)
    if not loading["missing_keys"]:
        return None
    return f"it saves names that it does not load, so it has no {min(loading['missing_keys'])} afterwards"


def some_ids(model: Any) -> torch.Tensor:
    """Return two sequences of 11 ordinary tokens."""
    n_rows = min(len(input_table(model)), VOCAB_SIZE)
    return torch.randint(FIRST_ORDINARY_ID, n_rows, (2, 11), generator=torch.Generator().manual_seed(0))


def input_table(model: Any) -> torch.Tensor:
    """Return the token-embedding table."""
    module = model.get_input_embeddings()
    if not isinstance(table := getattr(module, "weight", None), torch.Tensor):
        raise ValueError(f"its input embedding is a {type(module).__name__}, not one table")
    return table.detach()


def reference(model: Any, ids: torch.Tensor) -> Reference:
    """Return what a model has and computes; of an encoder-decoder the states of its encoder."""
    head = model.get_output_embeddings()
    runs = model.get_encoder() if model.config.is_encoder_decoder else model
    applied: list[torch.Tensor] = []  # what the output table is applied to
    hooks = [head.register_forward_pre_hook(lambda m, args: applied.append(args[0]))] if head is not None else []
    result = _run(runs, ids)
    for hook in hooks:
        hook.remove()
    states = _tensors(result.get("hidden_states"))
    if not states:
        raise ValueError("transformers gives out no hidden states of this type")
    if (final := result.get("last_hidden_state")) is not None:  # the list of some types ends before the final norm
        states = (*states[:-1], final)
    with _last_states_before_norm(model):
        last = _tensors(_run(runs, ids).get("hidden_states"))[-1]
    if model.config.model_type in WITHOUT_EMBEDDINGS:
        states = (model.get_input_embeddings()(ids).detach(), *states)
    if (copy := getattr(model.config, "altup_active_idx", None)) is not None:
        # Gemma 3n has copies of the stream, of which one is active, and no state after the final norm among them.
        last, states = last[copy], (*(entry[copy] for entry in states[:-1]), applied[-1])
    return Reference(tables(model), states, None if torch.equal(last, states[-1]) else last, result.get("logits"))


def tables(model: Any) -> Tables:
    """Return the tables of a model, and how many parameters it saves."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return Tables(
        n_parameters=sum(p.numel() for p in saved_parameters(model)),
        input_table=input_table(model),
        output_table=None if weight is None else weight.detach(),
        tied=weight is model.get_input_embeddings().weight,
    )


def saved_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that a folder holds; sinusoidal position tables are computed when a model is built."""
    unsaved = model._keys_to_ignore_on_save or ()
    return [p for name, p in model.named_parameters() if not any(re.search(key, name) for key in unsaved)]


def _run(model: Any, ids: torch.Tensor) -> Any:
    options: dict[str, Any] = {"output_hidden_states": True, "return_dict": True}
    has_cache = hasattr(getattr(model, "config", None), "use_cache")
    if has_cache or "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    with torch.no_grad():
        return model(input_ids=ids, **options)


def _tensors(states: Any) -> tuple[torch.Tensor, ...]:
    """Return hidden states as tensors; an entry may be a tuple whose first is that of the tokens."""
    return tuple(entry if isinstance(entry, torch.Tensor) else entry[0] for entry in states or ())


@contextmanager
def _last_states_before_norm(model: Any) -> Iterator[None]:
    """Let transformers give out the last block's output as last hidden state, instead of that of the final norm."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, getattr(config, "tie_last_hidden_states", None)) for config in configs]
    for config in configs:
        config.tie_last_hidden_states = False
    try:
        yield
    finally:
        for config, value in before:
            config.tie_last_hidden_states = value

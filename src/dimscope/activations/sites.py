"""Sites: where the residual stream of a model can be read.

They are the input of the first block, the output of every block, and the output of the final norm. The list
`hidden_states` of transformers has no entry for the output of the last block before the final norm.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINAL_NORM = "after final norm"


@dataclass(frozen=True, slots=True)
class Site:
    """A point of the residual stream.

    Attributes:
        layer: 0 for the input of the first block, i for the output of block i, L + 1 for the output of the final norm.
        name: Its name in tables.
        module: The module that takes the hidden states in or gives them out.
        takes_input: The states are the input of the module, not its output.
    """

    layer: int
    name: str
    module: nn.Module = field(repr=False)
    takes_input: bool = False


def find_sites(model: "PreTrainedModel") -> list[Site]:
    """Return all sites of a causal language model, in the order of the stream.

    Raises:
        UnsupportedCheckpoint: The model has no plain list of blocks.
    """
    decoder = model.get_decoder()
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(lists) != 1 or not n_layers:
        raise UnsupportedCheckpoint(
            f"{type(model).__name__}: its blocks are not one list, so layers cannot be told apart"
        )
    blocks = list(lists[0])
    norm = _final_norm(decoder)
    last = f"block {n_layers}" + (", before final norm" if norm is not None else "")
    sites = [Site(0, "embeddings", blocks[0], takes_input=True)]
    sites += [Site(i, f"block {i}" if i < n_layers else last, block) for i, block in enumerate(blocks, 1)]
    return sites if norm is None else [*sites, Site(n_layers + 1, FINAL_NORM, norm)]


def _final_norm(decoder: nn.Module) -> nn.Module | None:
    """Return the norm beside the blocks; a norm of the embeddings (BLOOM) is not it."""
    named = [(n.lower(), m) for n, m in decoder.named_children() if m is not None]
    norms = [m for n, m in named if ("norm" in n or n.startswith("ln")) and "embed" not in n]
    return norms[-1] if norms else None


def input_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a block or norm."""
    return args[0] if args else kwargs["hidden_states"]


def output_states(result: Any) -> Tensor:
    """Return the hidden states among what a module returns: alone, or first of a tuple or a ModelOutput."""
    return (result if torch.is_tensor(result) else result[0]).detach()

"""One vector for each text: the last hidden states of a model, pooled over its tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dimscope.activations.hooks import evaluating
from dimscope.activations.structure import output_states, run_stack, text_stack
from dimscope.checkpoints.model import input_device
from dimscope.checkpoints.pooling_config import PoolingConfig
from dimscope.errors import NonFiniteActivations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32  # texts at once


@torch.no_grad()
def pool_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    config: PoolingConfig,
    *,
    progress: bool = False,
) -> Float[Tensor, "n d"]:
    """Return one float32 vector for each text, in their order.

    Texts are encoded with the special tokens of the tokenizer, and cut at `config.max_length` tokens. Padding takes no
    part: neither in the attention nor in the pooling.

    Args:
        model: An encoder, the encoder of an encoder-decoder, or a causal language model.
        tokenizer: Its tokenizer.
        texts: The texts.
        config: How states are pooled; by their mean where it says nothing.
        progress: Show a progress bar.

    Raises:
        NonFiniteActivations: A vector holds NaN or Inf.
    """
    limit = {} if config.max_length is None else {"truncation": True, "max_length": config.max_length}
    encoded = [torch.tensor(ids) for ids in tokenizer(list(texts), **limit)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))  # texts of one length need no padding
    stack, device = text_stack(model), input_device(model)
    pooled: dict[int, Tensor] = {}
    with evaluating(model), tqdm(total=len(texts), unit="text", disable=None if progress else True) as bar:
        for start in range(0, len(order), BATCH):
            group = order[start : start + BATCH]
            ids = pad_sequence([encoded[i] for i in group], batch_first=True, padding_value=tokenizer.pad_token_id or 0)
            lengths = torch.tensor([len(encoded[i]) for i in group])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            states = output_states(run_stack(stack, ids.to(device), attention_mask=mask.to(device).long()))
            pooled |= dict(zip(group, _pooled(states.float().cpu(), lengths, config), strict=True))
            bar.update(len(group))
    rows = torch.stack([pooled[i] for i in range(len(texts))])
    if not bool(torch.isfinite(rows.double().sum())):
        raise NonFiniteActivations("NaN or Inf in the pooled vectors: try `dtype` float32")
    return rows


def _pooled(states: Float[Tensor, "b t d"], lengths: Int[Tensor, " b"], config: PoolingConfig) -> Float[Tensor, "b d"]:
    if config.pooling == "cls":
        rows = states[:, 0]
    elif config.pooling == "last":
        rows = states[torch.arange(len(states)), lengths - 1]
    else:
        real = torch.arange(states.shape[1]) < lengths[:, None]
        rows = (states.double() * real[:, :, None]).sum(dim=1) / lengths[:, None]
    return F.normalize(rows.float(), dim=1) if config.normalise else rows.float()

"""From final hidden states to logits, with what some families do to logits after the output table."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dimscope.activations.hooks import Hook, evaluating, hooked
from dimscope.activations.structure import no_cache, output_states, text_stack
from dimscope.checkpoints.model import input_device
from dimscope.errors import UnsupportedCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What configs call a factor of all logits, a divisor of them, and the bound of a smooth cap.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
BLOCK_BYTES = 64 << 20  # of float32 logits that are in memory at once,
BLOCK_ROWS = 256  # and positions: more would not multiply faster, and leave the cache


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """The output table of a model and what follows it: logits = cap(scale * (W h + b)).

    Cohere and Granite scale logits, Gemma 2 caps them smoothly: cap(z) = c tanh(z / c).

    Attributes:
        module: The output table as a module that maps d hidden units to V logits.
        scale: Factor of all logits; 1 in most families.
        cap: c, or None for no cap.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """Return the output table."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Float[Tensor, " v"] | None:
        """Return what is added to all raw logits, if anything."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def frozen(self) -> "OutputHead":
        """Return a head over the present table, whatever is hooked to the model or replaced in it later. No copy.

        Raises:
            UnsupportedCheckpoint: The table is not in memory, because accelerate offloaded it.
        """
        if self.weight.is_meta:
            raise UnsupportedCheckpoint(
                "the output table is offloaded from memory; take `device` cpu or `dtype` bfloat16"
            )
        vocab_size, dim = self.weight.shape
        module = nn.Linear(dim, vocab_size, bias=False, device="meta")
        module.weight, module.bias = (x if x is None else _parameter(x) for x in (self.weight, self.bias))  # ty: ignore
        return OutputHead(module, self.scale, self.cap)

    def transform(self, raw: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        """Return float32 logits from raw ones, W h + b: scaled and capped."""
        logits = raw.float() if self.scale == 1 else raw.float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def logits(self, states: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Return the float32 logits of final hidden states."""
        weight = self.weight
        # accelerate keeps offloaded weights on the meta device, and moves the states itself.
        return self.transform(self.module(states if weight.is_meta else states.to(weight.device)))

    def blocks(self, positions: Int[Tensor, " n"]) -> Sequence[Int[Tensor, " r"]]:
        """Return the positions in blocks whose float32 logits fit in memory at once."""
        return position_blocks(positions, self.weight.shape[0])

    def logits_by_blocks(
        self,
        states: Float[Tensor, "n d"],
        positions: Int[Tensor, " m"],
        consume: Callable[[Int[Tensor, " r"], Float[Tensor, "r v"]], object],
    ) -> None:
        """Call `consume` with blocks of positions (rows of `states`) and their logits."""
        for rows in self.blocks(positions):
            consume(rows, self.logits(states[rows.to(states.device)]))


def output_head(model: "PreTrainedModel") -> OutputHead:
    """Return the output head of a model, found by a run on a few tokens; what is hooked to its output table acts on the logits.

    Raises:
        UnsupportedCheckpoint: The model has no output table, or its logits are not that table applied to its last hidden
            state.
    """
    device = input_device(model)
    vocab_size = next(model.get_input_embeddings().parameters()).shape[0]
    with evaluating(model):
        return states_and_head(model, text_stack(model), torch.arange(4, device=device)[None] % vocab_size)[1]


def declared_head(model: "PreTrainedModel") -> OutputHead:
    """Return the head that the config declares, without a run: for families that are known to apply what their config says."""
    return _declared_heads(model, model.get_output_embeddings())[0]


@torch.no_grad()
def states_and_head(
    model: "PreTrainedModel", stack: nn.Module, ids: Int[Tensor, "b t"], **options: Any
) -> tuple[Float[Tensor, "b t d"], OutputHead]:
    """Run a model, and return its last hidden states and the head that gives its own logits at the last position.

    Raises:
        UnsupportedCheckpoint: There is no such head.
    """
    table: Any = model.get_output_embeddings()
    if table is None:
        raise UnsupportedCheckpoint(f"{type(model).__name__} has no output table")
    states: list[Tensor] = []
    applied: list[tuple[Tensor, Tensor]] = []
    hooks = [
        Hook(stack, lambda m, args, kwargs, result: states.append(output_states(result))),
        Hook(table, lambda m, args, kwargs, result: applied.append((args[0], result))),
    ]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with hooked(hooks):
        result = model(input_ids=ids, **no_cache(model), **options)
    own, last = result.logits[:, -1].float(), states[-1][:, -1]
    head = OutputHead(table)
    if applied:
        taken, raw = (x[:, -1] for x in applied[-1])
        head = _matching(model, table, raw, own)
        head = replace(head, scale=head.scale * _ratio(last, taken))
    refusal = UnsupportedCheckpoint(
        f"{type(model).__name__}: its logits are not its output embedding applied to the last hidden state; pass `logits`=False"
    )
    if states[-1].shape[:-1] != ids.shape or last.shape[-1] != table.weight.shape[-1]:
        raise refusal
    computed = head.logits(last)
    # bfloat16 rounds products of other shapes otherwise; a missing bias or transform is off by far more.
    if bool(torch.isfinite(own).all()) and not (
        computed.shape == own.shape
        and torch.allclose(computed, own.to(computed.device), rtol=2e-2, atol=2e-2 * float(own.abs().max()))
    ):
        raise refusal
    return states[-1], head


def _ratio(states: Tensor, taken: Tensor) -> float:
    """Return by what number the last hidden states are multiplied before the table (MiniCPM, HyperCLOVA); 1 where by none."""
    if taken.shape != states.shape or torch.equal(taken, states.to(taken)):
        return 1.0
    states, taken = states.double().to(taken.device), taken.double()
    ratio = float((states * taken).sum() / (states * states).sum().clamp_min(1e-300))
    return ratio if torch.allclose(taken, ratio * states, rtol=1e-2, atol=0) else 1.0


def _matching(model: "PreTrainedModel", table: nn.Module, raw: Tensor, own: Tensor) -> OutputHead:
    """Return the head whose scale and cap turn the raw logits into the model's own.

    The config offers the candidates; only some classes of a family apply them.
    """
    heads = _declared_heads(model, table)
    heads += [OutputHead(table, _ratio(raw, own))]  # a constant of the class
    if raw.shape != own.shape or not bool(torch.isfinite(own).all()):
        return heads[0]
    own = own.to(raw.device)
    return min(heads, key=lambda head: float((head.transform(raw) - own).abs().max()))


def _declared_heads(model: "PreTrainedModel", table: nn.Module) -> list[OutputHead]:
    """Return the heads that a config allows; the first applies all that it declares, the last nothing."""
    config = model.config.get_text_config()
    scales = [value for name in SCALES if (value := getattr(config, name, None))]
    scales += [1 / value for name in DIVISORS if (value := getattr(config, name, None))]
    caps = [value for name in CAPS if (value := getattr(config, name, None))]
    return [
        OutputHead(table, scale, cap) for scale in dict.fromkeys([*scales, 1.0]) for cap in dict.fromkeys([*caps, None])
    ]


def position_blocks(positions: Int[Tensor, " n"], vocab_size: int) -> Sequence[Int[Tensor, " r"]]:
    """Return the positions in blocks whose float32 logits fit in memory at once."""
    return positions.split(min(BLOCK_ROWS, max(1, BLOCK_BYTES // (4 * vocab_size))))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)

"""Settings of narrowing. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from dimscope.errors import InvalidArgument
from dimscope.studies.options import (
    DType,
    Flag,
    Texts,
    as_tuple,
    require_at_least,
    require_not_empty,
    require_seed,
    require_types,
)

Basis = Literal["normalised", "learned", "raw", "embedding", "coordinates", "random"]


@dataclass(frozen=True, slots=True)
class NarrowSettings:
    """Options of narrowing: of one narrow model, or of a plan that compares several."""

    widths: Annotated[tuple[int, ...], Parameter(name="width", consume_multiple=True, negative=())] = ()
    "Hidden size of the narrow model; --plan takes several [default with --plan: 7/8, 3/4, 5/8 and 1/2 of the model's]."
    bases: Annotated[tuple[Basis, ...], Parameter(name="basis", consume_multiple=True, negative=())] = ()
    "Basis of the kept directions (docs/narrowing.md); --plan takes several [default: normalised; with --plan also random and raw]."
    learn_steps: int = 150
    "Training steps for --basis learned."
    heal_steps: int = 0
    "Training steps of all weights after the cut, the norms first; kept only if the KL on held-out text falls."
    lora: int | None = None
    "Heal with low-rank updates of this rank, by peft [default: train the weights themselves]."
    tied: Annotated[bool | None, Parameter(negative="untied")] = None
    "Write one table for input and output, or two, which loses less [default: as in the model]."
    export_as: Literal["llama", "phi"] | None = None
    "Model type to write: llama for a Qwen2, as the equivalent Llama with biases; a GPT-NeoX is always written as a Phi."
    evaluate: bool = True
    "Evaluate and time the narrow and the dense model."
    texts: Texts = ("builtin:prose",)
    "Texts to calibrate, train and evaluate on, in separate windows; generated is a text that the model generates."
    keep_line_ends: Flag = False
    "Keep CRLF and CR line ends of the texts, which are read as LF otherwise."
    windows: int = 8
    "Windows to evaluate on, and as many to calibrate on; training uses the rest of the text."
    length: int | None = None
    "Tokens per window [default: the context length of the model, at most 512]."
    prompts: Annotated[tuple[str, ...], Parameter(name="prompt", consume_multiple=True, negative=())] = ()
    "Prompts that the dense and the narrow model continue; needs --plan."
    dtype: DType = "auto"
    "Dtype of the computation; the checkpoint keeps its stored dtype."
    device: str = "auto"
    "Device: auto, cpu, cuda, cuda:1 or mps."
    seed: int = 0
    "Random seed of --basis random and of the order of the training windows."
    trust_remote_code: Annotated[bool, Parameter(parse=False)] = False

    def __post_init__(self) -> None:
        """Raise InvalidArgument for values out of range."""
        as_tuple(self, "widths", "bases", "texts", "prompts")
        require_types(self, opened=("texts",))
        require_not_empty(self, "texts", "files, URLs, builtin:prose or generated")
        require_at_least(0, self, "heal_steps")
        require_at_least(1, self, "learn_steps", "lora", "windows")
        require_at_least(2, self, "length")
        require_seed(self)
        if self.lora is not None and not self.heal_steps:
            raise InvalidArgument("`lora` needs `heal_steps`")

"""The settings of the study of damage, and its presets. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from dimscope.errors import InvalidArgument
from dimscope.studies.damage.changes import parse_change
from dimscope.studies.options import (
    LARGEST_SEED,
    DType,
    Flag,
    Texts,
    as_tuple,
    require_at_least,
    require_not_empty,
    require_seed,
    require_types,
)

Sides = Annotated[
    tuple[Literal["input", "output", "both"], ...],
    Parameter(name="side", consume_multiple=True, negative=()),
]


@dataclass(frozen=True, slots=True)
class DamageSettings:
    """Options of the study of damage."""

    changes: Annotated[tuple[str, ...], Parameter(name="change", consume_multiple=True, negative=())] = ()
    "Changes of the embedding table as KIND:STRENGTH, chained by +: truncate:75%+noise:0.1 [default: a sweep of common ones]."
    sides: Sides = ("input",)
    "Embedding table to change. In a tied model, changing one side leaves the other side as it is."
    draws: int = 5
    "Random seeds per random perturbation."
    texts: Texts = ("builtin:prose",)
    "Texts: files, folders, FILE.parquet:COLUMN, FILE.jsonl:FIELD, URLs, -, builtin:prose, or generated (by the model itself)."
    keep_line_ends: Flag = False
    "Keep CRLF and CR line ends of the texts, which are read as LF otherwise."
    windows: int | None = None
    "Windows per text, spread evenly over it [default: 4, or as many as it has]."
    length: int | None = None
    "Tokens per window [default: the context length of the model, at most 512]."
    from_start: Flag = False
    "Take the windows from the beginning of each text instead of spreading them over it."
    prompts: Annotated[tuple[str, ...], Parameter(name="prompt", consume_multiple=True, negative=())] = ()
    "Prompts that the model continues after every change."
    system: str | None = None
    "System prompt, for a model with a chat template."
    chat: Annotated[bool | None, Parameter(negative="plain")] = None
    "Put prompts into the model's chat template, or use them as they are [default: the template, if the model has one]."
    decoding: Literal["greedy", "sample", "model"] = "greedy"
    "How prompts are continued: greedy, sample (from the model's distribution), or model (as its generation config says)."
    new_tokens: int = 64
    "Tokens per continuation, at most."
    text_draws: int = 1
    "Random seeds of each random perturbation at which the prompts are continued."
    token_errors: Flag = False
    "Also write the table token_errors: the error of every token of the vocabulary after every change."
    batch: int | None = None
    "Windows per forward pass [default: what fits the device]."
    dtype: DType = "auto"
    "Dtype of the computation; auto is float32 on a CPU where that fits into memory, else the stored dtype."
    device: str = "auto"
    "Device: auto, cpu, cuda, cuda:1, mps, or map (spread over all devices by accelerate)."
    seed: int = 0
    "First random seed of random perturbations, sampled texts and sampled rows."
    preset: Literal["notebook"] | None = None
    "notebook: the changes and prompts of the notebook that this study comes from; other options override them."
    trust_remote_code: Annotated[bool, Parameter(parse=False)] = False

    def __post_init__(self) -> None:
        """Raise InvalidArgument for values out of range."""
        as_tuple(self, "changes", "sides", "texts", "prompts")
        require_types(self, opened=("texts",))
        require_not_empty(self, "texts", "files, URLs, builtin:prose or generated")
        require_not_empty(self, "sides", "input, output or both")
        require_at_least(1, self, "draws", "windows", "new_tokens", "text_draws", "batch")
        require_at_least(2, self, "length")
        require_seed(self)
        for change in self.changes:
            parse_change(change)
        if self.seed + self.draws > LARGEST_SEED + 1:
            raise InvalidArgument(f"`seed` {self.seed} with `draws` {self.draws} exceeds 2^63 - 1; take a smaller seed")
        if self.system is not None and self.chat is False:
            raise InvalidArgument("`system` needs a chat template, and `chat` is off")


_NOTEBOOK_DIM = 896  # of the model with which the notebook tried its numbers of dimensions
_HUNDREDS = range(100, 900, 100)
_NOTEBOOK_DIMS = {
    "truncate": (*_HUNDREDS, 830, 850, 890),
    "project": _HUNDREDS,
    "project-rescaled": sorted((*_HUNDREDS, 650)),
}
_NOTEBOOK_STRENGTHS = {
    "noise": (0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0),
    "shift": (0.1, 0.5, 1.0, 2.0),
    "scale": (0.1, 0.5, 1.0, 1.5, 2.0, 5.0, 10.0),
}

PRESETS = {
    "notebook": {
        "preset": "notebook",
        "changes": (
            *(f"{kind}:{100 * k / _NOTEBOOK_DIM!r}%" for kind, dims in _NOTEBOOK_DIMS.items() for k in dims),
            *(f"{kind}:{s!r}" for kind, strengths in _NOTEBOOK_STRENGTHS.items() for s in strengths),
        ),
        "draws": 3,
        "windows": 4,
        "length": 128,
        "prompts": (
            "Write an introduction for a blog post about large language model token embeddings. Tags: PCA, layer sizes, "
            "nearest neighbours, KDTree, singular values.",
            "Write a poem about pytorch",
            "What species of bird can't fly?",
            "Why is sky blue? What makes sky blue?",
            "Think of a plot for a sci-fi story.",
        ),
        "system": "You are an autocorrelating model. You use previous outputs for reasoning. Pay attention to tags.",
        "new_tokens": 24,
    },
}
"""The settings of the notebook that the study grew from, its numbers of dimensions as shares of the model's.

Beside its noise stands a shift of the same size, which its claim about averaging needs. Four windows give errors, which
one does not. Tokens, seeds and the length of the texts are such that a model of half a billion parameters takes a quarter
of an hour on two cores.
"""

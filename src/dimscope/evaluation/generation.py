"""Text that a model generates: greedily, by seeded sampling, or as its own generation config asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.activations.hooks import evaluating
from dimscope.checkpoints.model import input_device
from dimscope.errors import InvalidArgument
from dimscope.evaluation.prompts import Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["greedy", "sample", "model"]
LARGEST_LOGIT = 1e30  # even divided by a small temperature it is a finite number
# Settings of a generation config that look at the prompt, or count its tokens.
COUNTS_PROMPT = (
    "min_length",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "sequence_bias",
    "bad_words_ids",
    "stop_strings",
    "guidance_scale",
    "watermarking_config",
)
# What changes the speed and the outputs beside the text, and may not work in a batch, or for every model.
WITHOUT_EFFECT = (
    "prompt_lookup_num_tokens",
    "use_mtp",
    "assistant_early_exit",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "continuous_batching_config",
    "prefill_chunk_size",
    "max_time",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
OF_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints")
STRETCH = 4  # tokens of the stretches whose repetition is counted


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        method: The likeliest ("greedy"), drawn from the model's own distribution ("sample"), or by the model's own
            generation config ("model").
        max_new_tokens: Tokens after each prompt, at most.
        seed: Of what is drawn.
    """

    method: Method = "greedy"
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model generates after a prompt: the text without special tokens, and the ids up to the end token."""

    text: str
    ids: tuple[int, ...]

    @property
    def repetition(self) -> float | None:
        """Return the share of stretches of four tokens that occurred before (seq-rep-4, Welleck et al. 2020).

        None for fewer than four tokens.

        >>> round(Continuation("", (1, 2, 3, 4, 1, 2, 3, 4)).repetition, 6)
        0.2
        """
        stretches = [self.ids[i : i + STRETCH] for i in range(len(self.ids) - STRETCH + 1)]
        return 1 - len(Counter(stretches)) / len(stretches) if stretches else None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    on_token: Callable[[list[str]], object] | None = None,
) -> list[Continuation]:
    """Return the continuations of all prompts, in one batch, which costs little more than one of them.

    The same prompts, decoding and model give the same texts; the random generators of the program are not touched.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: One or more prompts.
        decoding: How tokens are chosen.
        on_token: Called with the texts so far after every new token (not in a search with beams).

    Raises:
        InvalidArgument: The model's generation config asks for what transformers refuses.
    """
    ends = end_ids(model, tokenizer)
    config = _generation_config(model, decoding, sorted(ends), min(ends, default=0))
    # In a batch, short prompts begin with padding, which counts as text where a config looks at what is there already.
    alone = len({len(p.ids) for p in prompts}) > 1 and any(getattr(config, name, None) for name in COUNTS_PROMPT)
    batches = [[prompt] for prompt in prompts] if alone else [prompts]
    written: list[Continuation] = []

    def report(batch: list[Continuation]) -> None:
        if on_token is not None:
            texts = [c.text for c in (*written, *batch)]
            on_token(texts + [""] * (len(prompts) - len(texts)))

    for batch in batches:
        written += _generate_batch(model, tokenizer, batch, config, decoding.seed, report if on_token else None)
    return written


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    seed: int,
    on_token: Callable[[list[Continuation]], object] | None,
) -> list[Continuation]:
    ends = end_ids(model, tokenizer)
    pad = min(ends, default=0)
    longest = max(len(p.ids) for p in prompts)
    device = input_device(model)
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + list(p.ids) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)

    def continuations(rows: Int[Tensor, "p t"]) -> list[Continuation]:
        return [_continuation(tokenizer, row, ends) for row in rows.tolist()]

    streamer = None
    if on_token is not None and (config.num_beams or 1) == 1:
        streamer = _Streamer(lambda rows: on_token(continuations(rows)))
    rows = _generate(model, ids, mask, config, seed, tokenizer=tokenizer, streamer=streamer)
    return continuations(rows[:, longest:])


def sample_ids(
    model: PreTrainedModel, ids: Int[Tensor, "n p"], *, new_tokens: int, seed: int, never: Sequence[int] = ()
) -> Int[Tensor, "n t"]:
    """Return rows of ids continued by tokens drawn from the model's own distribution, all of the same length.

    Args:
        model: A causal language model.
        ids: What each row begins with.
        new_tokens: Tokens drawn for each row.
        seed: Of the draw.
        never: Ids that are not drawn.
    """
    config = _generation_config(model, Decoding("sample", new_tokens, seed), [], 0)
    ids = ids.to(input_device(model))
    return _generate(model, ids, torch.ones_like(ids), config, seed, suppress_tokens=list(never) or None)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text: those of the model's generation config, else that of the tokenizer."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}


def _continuation(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> Continuation:
    stop = next((n for n, i in enumerate(ids) if i in ends), len(ids))
    return Continuation(str(tokenizer.decode(ids[:stop], skip_special_tokens=True)), tuple(ids[:stop]))


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    ids: Int[Tensor, "p t"],
    mask: Int[Tensor, "p t"],
    config: GenerationConfig,
    seed: int,
    **options: Any,
) -> Int[Tensor, "p n"]:
    """Call `generate` of transformers, with this config only, and leave model and random generators as they were."""
    from transformers import LogitsProcessorList

    generator: Any = model
    try:
        with evaluating(model), _seeded(seed, ids.device), _configured(model, config):
            return generator.generate(
                input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([_Finite()]), **options
            ).cpu()
    except ValueError as e:
        reason = " ".join(str(e).replace("`", "").split())[:200]  # its names are no options of ours
        raise InvalidArgument(
            f"the model cannot be generated from as its generation config asks ({reason}); take `decoding` greedy or sample"
        ) from e


class _Finite:
    """Replaces infinite and undefined logits: a damaged model may overflow, and no token could be drawn from them."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = torch.nan_to_num(scores.float(), nan=-LARGEST_LOGIT, posinf=LARGEST_LOGIT, neginf=-LARGEST_LOGIT)
        return finite.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Generator[None]:
    """Seed the global generators, which transformers draws from, and restore their states afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def _generation_config(model: PreTrainedModel, decoding: Decoding, ends: list[int], pad: int) -> GenerationConfig:
    """Return the generation config of a decoding: one continuation of ids for each prompt, whatever the model's own asks for."""
    from transformers import GenerationConfig

    own = model.generation_config
    if decoding.method == "model" and own is not None:
        config = GenerationConfig.from_dict(_effective(own.to_dict()))
    else:
        sampled = decoding.method == "sample"
        config = GenerationConfig(
            do_sample=sampled, **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {})
        )
    config.max_new_tokens, config.pad_token_id, config.eos_token_id = decoding.max_new_tokens, pad, ends or None
    config.num_return_sequences, config.return_dict_in_generate = 1, False
    return config


def _effective(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide about the text: transformers warns of those that do not."""
    without = {"max_length", *WITHOUT_EFFECT}
    if not settings.get("do_sample"):
        without |= set(OF_SAMPLING) - ({"top_k"} if settings.get("penalty_alpha") else set())
    if (settings.get("num_beams") or 1) == 1:
        without |= set(OF_BEAMS)
    return {name: value for name, value in settings.items() if name not in without}


@contextmanager
def _configured(model: PreTrainedModel, config: GenerationConfig) -> Generator[None]:
    """Replace the model's own generation config, from which `generate` takes what is not set, and restore it."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


class _Streamer:
    """What `generate` of transformers passes each new token to."""

    def __init__(self, on_rows: Callable[[Int[Tensor, "p t"]], object]) -> None:
        self.on_rows = on_rows
        self.columns: list[Tensor] | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompts, then one new token of each row at a time."""
        if self.columns is None:
            self.columns = []
            return
        self.columns.append(value.reshape(-1))
        self.on_rows(torch.stack(self.columns, dim=1))

    def end(self) -> None:
        """Do nothing: every token was passed on."""

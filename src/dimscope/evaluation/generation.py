"""What a model says: prompts as the model takes them, continued greedily, by seeded sampling, or as the model's own config has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.activations.forward import input_device
from dimscope.activations.hooks import evaluating
from dimscope.checkpoints.vocabulary import piece_decoder
from dimscope.errors import InvalidArgument
from dimscope.texts.encoding import special_prefix
from dimscope.texts.windows import Window, text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Template = Literal["auto", "chat", "plain"]
Method = Literal["greedy", "sample", "model"]
LARGEST = 1e30  # logit; even divided by a small temperature it is a number
REPEATED = 4  # tokens of the stretches whose repetition is counted


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model reads it: the text that was asked, its ids, and whether the chat template stands around it."""

    text: str
    ids: tuple[int, ...]
    chat: bool


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is chosen: the likeliest, one drawn from the model's own distribution, or by its generation config."""

    method: Method = "greedy"
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote after a prompt, without special tokens, and its ids up to the end token."""

    text: str
    ids: tuple[int, ...]

    @property
    def repetition(self) -> float | None:
        """The share of stretches of four tokens that stood there before (seq-rep-4, Welleck et al. 2020); None for fewer tokens."""
        stretches = [self.ids[i : i + REPEATED] for i in range(len(self.ids) - REPEATED + 1)]
        return 1 - len(Counter(stretches)) / len(stretches) if stretches else None


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prepare_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, template: Template = "auto", system: str | None = None
) -> Prompt:
    """A prompt in the chat template, with an optional system prompt, or as it is, after what the tokenizer puts before a text.

    "auto" takes the template where there is one, and is plain, without the system prompt, where there is none.
    Raises InvalidArgument where a template is asked for and there is none, where it does not take a system prompt, and
    for a prompt of no tokens.
    """
    chat = template == "chat" or (template == "auto" and has_template(tokenizer))
    if chat and not has_template(tokenizer):
        raise InvalidArgument(
            "this model's tokenizer has no chat template; leave `chat` out to pass the prompt as it is"
        )
    ids = _templated(tokenizer, text, system) if chat else [*special_prefix(tokenizer), *_bare(tokenizer, text)]
    if not ids:
        raise InvalidArgument("the prompt is empty, and this tokenizer puts nothing before a text; give it a word")
    return Prompt(text, tuple(ids), chat)


def _bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _templated(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None) -> list[int]:
    said = [{"role": "system", "content": system}] if system is not None else []
    written = _rendered(tokenizer, [*said, {"role": "user", "content": text}])
    if system is not None and system.strip() not in written:
        raise InvalidArgument("this model's chat template ignores a system prompt; leave `system` out")
    return _bare(tokenizer, written)  # templates write their special tokens themselves


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as e:  # a template is a program
        raise InvalidArgument(f"the chat template does not take this prompt: {e}") from e


def check_room(prompts: Sequence[Prompt], decoding: Decoding, context: int | None) -> None:
    """Raises InvalidArgument for a prompt that leaves no room for the new tokens in the model's context."""
    for prompt in prompts:
        needed = len(prompt.ids) + decoding.max_new_tokens
        if context is not None and needed > context:
            shown = prompt.text if len(prompt.text) <= 40 else prompt.text[:37] + "..."
            raise InvalidArgument(
                f"the prompt {shown!r} has {len(prompt.ids)} tokens, and {decoding.max_new_tokens} new ones make {needed}: "
                f"the model reads at most {context}; shorten it, or take a smaller `new_tokens`"
            )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    told: Callable[[list[str]], object] | None = None,
) -> list[Continuation]:
    """The continuations of all prompts, in one batch, which costs little more than one of them.

    The same prompts, decoding and model give the same texts; the random numbers of the program are left as they were.
    `told` hears the texts after every new token (not where the model's own config asks for beams).
    """
    device = input_device(model)
    longest = max(len(p.ids) for p in prompts)
    ends = _end_ids(model, tokenizer)
    pad = min(ends, default=0)
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + list(p.ids) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)

    def continued(rows: Int[Tensor, "p t"]) -> list[Continuation]:
        return [_continuation(tokenizer, row, ends) for row in rows.tolist()]

    listener = None if told is None else _Listener(lambda rows: told([c.text for c in continued(rows)]))
    with _seeded(decoding.seed, device), _configured(model, decoding, sorted(ends), pad) as beams:
        written = _generated(model, tokenizer, ids, mask, streamer=None if beams else listener)
    return continued(written[:, longest:].cpu())


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text that the model writes begins with: the tokenizer's prefix, else its begin or end token.

    Raises InvalidArgument where there is none of them.
    """
    marks = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not (begin := special_prefix(tokenizer) or marks[:1]):
        raise InvalidArgument("this tokenizer has no token that begins a text, so the model cannot write one by itself")
    return begin


def sample_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int
) -> list[Window]:
    """Windows of text that the model writes itself, sampled from its own distribution, each from the beginning of a text.

    They begin with `begin_ids`, and have no end token inside. Raises InvalidArgument where there is nothing to begin with,
    and for windows that are too short.
    """
    begin = begin_ids(tokenizer)
    ids = torch.tensor([begin] * count, device=input_device(model))
    decoding = Decoding("sample", text_tokens(begin, length), seed)
    ends = _end_ids(model, tokenizer) | ({tokenizer.eos_token_id} - {None})
    beyond = range(len(tokenizer), model.config.get_text_config().vocab_size)  # rows with no token
    with _seeded(seed, ids.device), _configured(model, decoding, [], 0):
        never = sorted(ends | set(beyond)) or None
        written = _generated(model, tokenizer, ids, torch.ones_like(ids), suppress_tokens=never).cpu()
    to_bytes = piece_decoder(tokenizer)
    windows, start = [], 0
    for index, row in enumerate(written):
        pieces = tokenizer.convert_ids_to_tokens(row[len(begin) :].tolist())
        n_bytes = torch.tensor([0] * len(begin) + [len(to_bytes(p)) for p in pieces])
        ends_at = start + n_bytes.cumsum(0)
        windows.append(Window(index, row, ends_at, n_bytes, len(begin)))
        start = int(ends_at[-1])
    return windows


@torch.no_grad()
def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "p t"],
    mask: Int[Tensor, "p t"],
    **options: Any,
) -> Int[Tensor, "p n"]:
    from transformers import LogitsProcessorList

    generator: Any = model
    try:
        with evaluating(model):
            return generator.generate(
                input_ids=ids, attention_mask=mask, tokenizer=tokenizer,
                logits_processor=LogitsProcessorList([_Finite()]), **options,
            )  # fmt: skip
    except ValueError as e:
        reason = " ".join(str(e).split())[:200]
        raise InvalidArgument(f"the model cannot be generated from as its generation config asks: {reason}") from e


class _Finite:
    """A damaged model may overflow, and drawing from what is no number would fail."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.nan_to_num(scores.float(), nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    told = model.generation_config.eos_token_id if model.generation_config is not None else None
    told = tokenizer.eos_token_id if told is None else told
    return set() if told is None else set(told) if isinstance(told, list) else {told}


def _continuation(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> Continuation:
    stop = next((n for n, i in enumerate(ids) if i in ends), len(ids))
    return Continuation(str(tokenizer.decode(ids[:stop], skip_special_tokens=True)), tuple(ids[:stop]))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Generator[None]:
    """transformers draws from the global generators: they are seeded, and put back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


@contextmanager
def _configured(model: PreTrainedModel, decoding: Decoding, ends: list[int], pad: int) -> Generator[bool]:
    """The generation config of the model replaced while open: `generate` would take over from it what is not asked.

    Yields whether it is a search with beams.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    if decoding.method == "model" and own is not None:
        config = GenerationConfig.from_dict(own.to_dict())
        config.max_length = None
    else:
        sampled = decoding.method == "sample"
        config = GenerationConfig(
            do_sample=sampled, **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {})
        )
    config.max_new_tokens, config.pad_token_id, config.eos_token_id = decoding.max_new_tokens, pad, ends or None
    # One continuation for each prompt, as ids, however many the model's own config asks for and in whatever form.
    config.num_return_sequences, config.return_dict_in_generate, config.min_length = 1, False, None
    model.generation_config = config
    try:
        yield (config.num_beams or 1) > 1
    finally:
        model.generation_config = own


class _Listener:
    """What `generate` hands each new token to."""

    def __init__(self, heard: Callable[[Int[Tensor, "p t"]], object]) -> None:
        self.heard = heard
        self.rows: list[Tensor] | None = None

    def put(self, value: Tensor) -> None:
        if self.rows is None:  # the prompts come first
            self.rows = []
            return
        self.rows.append(value.reshape(-1))
        self.heard(torch.stack(self.rows, dim=1))

    def end(self) -> None:
        """Nothing is held back."""

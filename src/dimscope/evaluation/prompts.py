"""Prompts as a model reads them: in its chat template, or as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dimscope.errors import InvalidArgument
from dimscope.texts.encoding import special_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "plain"]
SHOWN = 40  # characters of a prompt in an error message


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        text: What the user wrote.
        ids: The token ids that the model reads.
        chat: Whether the chat template is around the text.
    """

    text: str
    ids: tuple[int, ...]
    chat: bool


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prepare_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, template: Template = "auto", system: str | None = None
) -> Prompt:
    """Return a prompt in the chat template, or after what the tokenizer puts before every text.

    Args:
        tokenizer: The tokenizer of the model.
        text: The prompt.
        template: "chat", "plain", or "auto": the chat template where there is one.
        system: A system prompt, which only a chat template takes; a plain prompt ignores it.

    Raises:
        InvalidArgument: The tokenizer has no chat template or refuses this prompt, the template ignores the system
            prompt, or the prompt has no tokens.
    """
    chat = template == "chat" or (template == "auto" and has_template(tokenizer))
    if chat and not has_template(tokenizer):
        raise InvalidArgument(
            "this model's tokenizer has no chat template; leave `chat` out to pass the prompt as it is"
        )
    ids = _templated(tokenizer, text, system) if chat else [*special_prefix(tokenizer), *_encode(tokenizer, text)]
    if not ids:
        raise InvalidArgument("the prompt is empty, and this tokenizer puts nothing before a text; give it a word")
    return Prompt(text, tuple(ids), chat)


def check_context(prompts: Sequence[Prompt], new_tokens: int, context: int | None) -> None:
    """Check that prompts and their continuations fit into the context of a model.

    Args:
        prompts: The prompts.
        new_tokens: Tokens generated after each of them.
        context: Tokens that the model reads at most; None for no limit.

    Raises:
        InvalidArgument: A prompt is too long.
    """
    for prompt in prompts:
        needed = len(prompt.ids) + new_tokens
        if context is not None and needed > context:
            shown = prompt.text if len(prompt.text) <= SHOWN else prompt.text[: SHOWN - 3] + "..."
            raise InvalidArgument(
                f"the prompt {shown!r} has {len(prompt.ids)} tokens, and {new_tokens} new ones make {needed}: "
                f"the model reads at most {context}; shorten it, or take a smaller `new_tokens`"
            )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _templated(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None) -> list[int]:
    first = [{"role": "system", "content": system}] if system is not None else []
    rendered = _render(tokenizer, [*first, {"role": "user", "content": text}])
    if system is not None and system.strip() not in rendered:
        raise InvalidArgument("this model's chat template ignores a system prompt; leave `system` out")
    return _encode(tokenizer, rendered)  # templates write their special tokens themselves


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as e:  # a template is a program
        raise InvalidArgument(f"the chat template does not take this prompt: {e}") from e

"""Prompts as a model reads them: in its chat template, or as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dimscope.errors import InvalidArgument
from dimscope.texts.encoding import special_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "plain"]
SHOWN = 40  # characters of a prompt in an error message
Content = str | list[dict[str, str]]
Shape = Callable[[str], Content]
PROMPT_MARK, SYSTEM_MARK = "zqprompt", "zqsystem"  # words that no template has


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
        InvalidArgument: The tokenizer has no chat template or refuses this prompt, the template leaves out the prompt or
            the system prompt, or the prompt has no tokens.
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
    system_shape, shape = _content_shapes(tokenizer, system is not None)
    rendered = _render(tokenizer, _messages(shape(text), None if system is None else system_shape(system)))
    return _encode(tokenizer, rendered)  # templates write their special tokens themselves


def _as_string(text: str) -> str:
    return text


def _as_parts(text: str) -> list[dict[str, str]]:
    """Return a text as the list of parts that templates of multimodal models expect."""
    return [{"type": "text", "text": text}]


def _content_shapes(tokenizer: PreTrainedTokenizerBase, with_system: bool) -> tuple[Shape, Shape]:
    """Return the forms of the system prompt and the prompt that the template writes out, strings first.

    Jinja ignores what a template reads in the wrong form, so that a prompt may vanish. Marks in its place show that; the
    prompt itself might be in the words of the template.

    Raises:
        InvalidArgument: The template refuses all forms, or writes out none.
    """
    errors: list[InvalidArgument] = []
    shows_prompt = False
    for shape in (_as_string, _as_parts):
        for system_shape in (shape, _as_parts if shape is _as_string else _as_string):
            system = system_shape(SYSTEM_MARK) if with_system else None
            try:
                rendered = _render(tokenizer, _messages(shape(PROMPT_MARK), system))
            except InvalidArgument as e:
                errors.append(e)
                continue
            written = _writes_out(rendered, PROMPT_MARK)
            shows_prompt |= written
            if written and (not with_system or _writes_out(rendered, SYSTEM_MARK)):
                return system_shape, shape
    if shows_prompt:
        raise InvalidArgument("this model's chat template ignores a system prompt; leave `system` out")
    if errors:
        raise errors[0]
    raise InvalidArgument(
        "this model's chat template leaves the prompt out, as a string and as a list of parts; pass the prompt without it"
    )


def _writes_out(rendered: str, mark: str) -> bool:
    """Return whether a mark is in a rendered conversation, and not inside a list of parts that is written out as such."""
    return mark in rendered and re.search(rf"""['"]text['"]\s*:\s*['"]{mark}""", rendered) is None


def _messages(content: Content, system: Content | None) -> list[dict[str, Content]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": content}]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Content]]) -> str:
    from jinja2 import TemplateError

    conversation: Any = messages
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as e:  # a template is a program
        raise InvalidArgument(f"the chat template does not take this prompt: {e}") from e

"""What the settings of several studies have in common: types that the command line can read, and checks. Imports no torch."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from dimscope.errors import InvalidArgument

Strings = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]
Texts = Annotated[tuple[str, ...], Parameter(name="text", consume_multiple=True, negative=())]
Flag = Annotated[bool, Parameter(negative=())]
Hidden = Parameter(parse=False)  # for the library only
DType = Literal["auto", "float32", "bfloat16", "float16"]

LARGEST_SEED = 2**63 - 1  # that torch's generators take


_KINDS: dict[Any, tuple[str, type | tuple[type, ...]]] = {
    bool: ("True or False", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    NoneType: ("None", NoneType),
    str: ("a string", str),
}


def require_types(settings: Any, *, opened: Sequence[str] = ()) -> None:
    """Raise InvalidArgument for a field whose value has another type than its annotation says.

    Whole numbers of numpy become those of Python.

    Args:
        settings: The dataclass.
        opened: Fields whose strings name something to open; these also hold opened objects, such as a Text.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if name in opened:
            value = tuple(item for item in value if not _is_object(item))
        if not _fits(value, hint):
            raise InvalidArgument(f"`{name}` must be {_words(hint)}, got {_misfit(value, hint)!r}")
        if isinstance(value, numbers.Integral) and not isinstance(value, bool | int):
            object.__setattr__(settings, name, int(value))  # the dataclass is frozen


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        first, *others = get_args(hint)
        n_right = isinstance(value, tuple) and (others == [...] or len(value) == 1 + len(others))
        return n_right and all(_fits(item, first) for item in value)
    if isinstance(value, bool) or value is None:
        return hint is type(value)
    return isinstance(value, _KINDS[hint][1])


def _is_object(item: Any) -> bool:
    """Return whether this is no plain value: a Text, a Checkpoint, a loaded model."""
    return item is not None and not isinstance(item, str | bytes | numbers.Number | Sequence | Mapping)


def _misfit(value: Any, hint: Any) -> Any:
    """Return the first item of a sequence that does not fit, or the value itself."""
    if get_origin(hint) is not tuple or not isinstance(value, tuple):
        return value
    return next((item for item in value if not _fits(item, get_args(hint)[0])), value)


def _words(hint: Any) -> str:
    """Return what an annotation allows: "a whole number, all or None"."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words: list[str] = []
    for part in parts:
        if get_origin(part) is Literal:
            words += get_args(part)
        elif get_origin(part) is tuple:
            words.append(_words(get_args(part)[0]))
        else:
            words.append(_KINDS[part][0])
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def require_at_least(least: float, settings: Any, *names: str) -> None:
    """Raise InvalidArgument for a field that is a number below `least`; None is no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:  # NaN is not
            raise InvalidArgument(f"`{name}` must be {least:g} or more, got {value}")


def require_not_empty(settings: Any, name: str, what: str) -> None:
    """Raise InvalidArgument for a field without a value, as on a command line whose variable is not set."""
    if not getattr(settings, name):
        raise InvalidArgument(f"`{name}` takes {what}, got none")


def require_seed(settings: Any) -> None:
    """Raise InvalidArgument for a seed that torch's generators do not take."""
    if not 0 <= settings.seed <= LARGEST_SEED:
        raise InvalidArgument(f"`seed` must be between 0 and 2^63 - 1, got {settings.seed}")


def as_tuple(settings: Any, *names: str) -> None:
    """Turn lists into tuples, a lone string into a tuple that holds it (never into its letters), and paths into strings."""
    for name in names:
        value = getattr(settings, name)
        single = isinstance(value, str | PurePath) or not isinstance(value, Iterable)
        items = tuple(str(i) if isinstance(i, PurePath) else i for i in ((value,) if single else value))
        object.__setattr__(settings, name, items)  # the dataclass is frozen

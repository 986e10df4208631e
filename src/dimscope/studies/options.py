"""What the settings of several studies have in common: types that the command line can read, and checks. Imports no torch."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from dimscope.errors import InvalidArgument

Strings = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())]
Texts = Annotated[tuple[str, ...], Parameter(name="text", consume_multiple=True, negative=())]
Flag = Annotated[bool, Parameter(negative=())]
Hidden = Parameter(parse=False)  # for the library only
DType = Literal["auto", "float32", "bfloat16", "float16"]

LARGEST_SEED = 2**63 - 1  # that torch's generators take


def require_at_least(least: float, settings: Any, *names: str) -> None:
    """Raise InvalidArgument for a field that is a number below `least`; None is no number."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:  # NaN is not
            raise InvalidArgument(f"`{name}` must be {least:g} or more, got {value}")


def require_one_of(settings: Any, name: str, choices: Iterable[str]) -> None:
    """Raise InvalidArgument for a field that is none of the choices."""
    value, choices = getattr(settings, name), tuple(choices)
    if value not in choices:
        raise InvalidArgument(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


def require_dtype(settings: Any) -> None:
    """Raise InvalidArgument for a `dtype` that is none of DType."""
    require_one_of(settings, "dtype", get_args(DType))


def require_not_empty(settings: Any, name: str, what: str) -> None:
    """Raise InvalidArgument for a field without a value, as on a command line whose variable is not set."""
    if not getattr(settings, name):
        raise InvalidArgument(f"`{name}` takes {what}, got none")


def require_seed(settings: Any) -> None:
    """Raise InvalidArgument for a seed that torch's generators do not take."""
    if not 0 <= settings.seed <= LARGEST_SEED:
        raise InvalidArgument(f"`seed` must be between 0 and 2^63 - 1, got {settings.seed}")


def as_tuple(settings: Any, *names: str) -> None:
    """Turn lists into tuples, and a lone string into a tuple that holds it: never into its letters."""
    for name in names:
        value = getattr(settings, name)
        items = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
        object.__setattr__(settings, name, items)  # the dataclass is frozen

"""Temporary changes of a model: hooks, and evaluation mode. Both end with the block, also after an exception."""

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Hook:
    """A function to call when a module runs.

    Attributes:
        module: The module.
        function: Called with the module, its positional arguments, its keyword arguments and, unless `before`, its
            result. What it returns replaces the arguments (a pair of positional and keyword arguments) or the result;
            None changes nothing.
        before: Call it before the module runs, not after.
    """

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False

    def register(self) -> Any:
        """Register the hook, and return what removes it."""
        if self.before:
            return self.module.register_forward_pre_hook(self.function, with_kwargs=True)
        return self.module.register_forward_hook(self.function, with_kwargs=True)


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Generator[None]:
    """Register hooks, and remove them afterwards."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.register().remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Switch a model to evaluation mode (no dropout), and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

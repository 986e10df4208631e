"""Changes of embedding tables, applied while a model runs.

`perturbations` names them and needs no torch. Its functions reach `maps` and `random_bases`, which do, through this
package: both are imported when a map is made, not when a perturbation is listed.
"""

from importlib import import_module
from types import ModuleType

_IMPORTED_WHEN_USED = ("maps", "random_bases")


def __getattr__(name: str) -> ModuleType:
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")

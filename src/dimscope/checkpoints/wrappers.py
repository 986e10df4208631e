"""Prefixes that training code leaves in the names of tensors: found by what the model needs, and taken off."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dimscope.checkpoints.skeleton import Skeleton
from dimscope.checkpoints.tensors import SafetensorsReader, StateDictReader, TensorInfo, TensorReader

# Modules that torch.compile and FSDP put around others, at any depth.
WRAPPER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What DDP, peft and Fabric put before all names, one after the other.
LEADING = re.compile(r"^(?:module\.|base_model\.model\.|_forward_module\.)+")


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """Tensors under the names that they have without wrappers.

    Attributes:
        reader: The reader by these names.
        removed: What was taken off, as the names have it; empty where nothing was.
    """

    reader: TensorReader
    removed: tuple[str, ...] = ()


def unwrap(reader: TensorReader, skeleton: Skeleton) -> Unwrapped:
    """Take off the wrappers' prefixes, where the names with them leave parameters of the model unfilled and those without do not.

    First the known ones, then any that all names have in common.
    """
    names = list(reader.tensors)
    best, least = {name: name for name in names}, len(skeleton.unfilled(names, exact=True))
    if not least:
        return Unwrapped(reader)
    stripped = {name: LEADING.sub("", WRAPPER.sub("", LEADING.sub("", name))) for name in names}
    candidates = [stripped, *_without_common(stripped)]
    for candidate in candidates:
        unfilled = len(skeleton.unfilled(candidate.values(), exact=True))
        if unfilled < least and len(set(candidate.values())) == len(names):
            best, least = candidate, unfilled
    removed = sorted({part for name, short in best.items() for part in _removed(name, short)})
    return Unwrapped(_renamed(reader, best), tuple(removed)) if removed else Unwrapped(reader)


def _without_common(names: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the names without the first one, two, ... parts that all of them share."""
    candidates, current = [], dict(names)
    while len({short.partition(".")[0] for short in current.values()}) == 1 and all("." in s for s in current.values()):
        current = {name: short.partition(".")[2] for name, short in current.items()}
        candidates.append(current)
    return candidates


def _removed(name: str, short: str) -> list[str]:
    """Return the parts of a name that are not in the short one."""
    rest = WRAPPER.sub("", name)
    return [*WRAPPER.findall(name), *([rest.removesuffix(short)] if rest != short else [])]


def _renamed(reader: TensorReader, short: Mapping[str, str]) -> TensorReader:
    """Return the reader whose tensors have other names."""
    infos: dict[str, TensorInfo] = {
        short[name]: replace(info, name=short[name]) for name, info in reader.tensors.items()
    }
    if isinstance(reader, SafetensorsReader):  # it reads by the byte range in the info
        return replace(reader, tensors=infos)
    assert isinstance(reader, StateDictReader)
    return replace(reader, state={short[name]: tensor for name, tensor in reader.state.items()}, tensors=infos)

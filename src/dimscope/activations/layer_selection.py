"""The grammar of the setting `layers`: a list such as "0,4:8,norm"."""

import re
from collections.abc import Sequence

from dimscope.activations.sites import FINAL_NORM, Site
from dimscope.errors import InvalidArgument


def parse_layers(layers: str | None, last: int) -> set[int] | None:
    """Return the layer numbers in a list such as "0,4:8,norm", or None for all.

    >>> sorted(parse_layers("emb,2:4,norm", 7))
    [0, 2, 3, 7]

    Args:
        layers: Numbers, ranges without their end, "emb" (0) and "norm" (the final norm), separated by commas.
        last: The number of the final norm.

    Raises:
        InvalidArgument: The list is malformed or empty, or a number is beyond `last`.
    """
    if layers is None:
        return None
    chosen: set[int] = set()
    for part in layers.split(","):
        chosen |= _numbers(part.strip(), part, last)
    if beyond := sorted(layer for layer in chosen if layer > last):
        raise InvalidArgument(f"there is no layer {beyond[0]}: this model has 0 (embeddings) to {last} ({FINAL_NORM})")
    if not chosen:
        raise InvalidArgument(f"`layers` {layers} selects no layer; the end of a range is excluded")
    return chosen


def _numbers(word: str, part: str, last: int) -> set[int]:
    names = {"emb": 0, "norm": last}
    if word in names:
        return {names[word]}
    match = re.fullmatch(r"(\d+)(?::(\d+))?", word)
    if match is None:
        raise InvalidArgument(f"`layers` must be a list such as 0,4:8,norm, got {part!r} in it")
    first = int(match[1])
    end = int(match[2]) if match[2] else first + 1
    # One number too many is enough for the error, and a range of a billion is not built.
    return set(range(first, min(end, max(first, last + 1) + 1)))


def select_sites(sites: Sequence[Site], layers: str | None) -> list[Site]:
    """Return the sites that a list of layers selects, see `parse_layers`; all for None.

    Raises:
        InvalidArgument: The list is malformed, or the model has no such layer.
    """
    by_layer = {site.layer: site for site in sites}
    n_blocks = max(layer for layer, site in by_layer.items() if site.name != FINAL_NORM)
    chosen = parse_layers(layers, n_blocks + 1)
    if chosen is None:
        return list(sites)
    if missing := sorted(chosen - set(by_layer)):  # a model without a final norm
        raise InvalidArgument(
            f"there is no layer {missing[0]}: this model has 0 (embeddings) to {max(by_layer)} ({sites[-1].name})"
        )
    return [by_layer[layer] for layer in sorted(chosen)]

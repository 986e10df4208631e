"""What docs/families.md says of each model type, and whether that is so."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import transformers
from stock import Case
from sweep import examine

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
KINDS = {
    "Causal language models": "causal",
    "Models of images or sounds with a text decoder": "multimodal",
    "Encoders": "encoder",
    "Encoder-decoders": "encoder-decoder",
}


@cache
def documented_reasons() -> dict[Case, str | None]:
    """Return why each case is not covered, or None where it is."""
    reasons, kind = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind = KINDS[line[3:]]
        if match := re.fullmatch(r"\| `([^`]+)` \| `([^`]+)` \| (yes|no: .+) \|", line):
            model_type, model_class, answer = match.groups()
            reasons[Case(kind, model_type, model_class)] = None if answer == "yes" else answer.removeprefix("no: ")
    return reasons


def documented_counts() -> dict[str, tuple[int, int]]:
    """Return what the table at the top says, by kind: how many types there are, and how many are covered."""
    text = PAGE.read_text(encoding="utf-8")
    found = {kind: re.search(rf"^\| {title} \| (\d+) \| (\d+) \|", text, re.M) for title, kind in KINDS.items()}
    return {kind: (int(match[1]), int(match[2])) for kind, match in found.items() if match}


def documented_version() -> str:
    """Return the version of transformers of the sweep."""
    match = re.search(r"transformers ([\d.]+\w*)", PAGE.read_text(encoding="utf-8"))
    assert match is not None
    return match[1]


def assert_as_documented(case: Case) -> None:
    """Examine a case: nothing may be wrong, and it is covered if the page says so.

    Of another version of transformers the page says nothing, and what could not be built for the page may be built here,
    with a package that was missing there.
    """
    outcome = examine(case)
    assert outcome.failed == {}, outcome.failed
    if documented_version() != transformers.__version__:
        return
    reason = documented_reasons()[case]
    if reason is None:
        assert outcome.reason is None, outcome.reason
    elif not reason.startswith("transformers: "):
        assert outcome.refused, f"covered here, and the page says: {reason}"

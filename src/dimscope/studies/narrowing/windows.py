"""Windows of the texts of a narrowing, split by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dimscope.errors import InvalidArgument
from dimscope.texts.windows import Window


@dataclass(frozen=True, slots=True)
class SplitWindows:
    """Windows by their purpose. No window of `evaluation` or `held_out` is in `calibration` or `training`.

    Attributes:
        calibration: For the moments of the residual stream and the gains.
        evaluation: For the numbers that are reported.
        evaluation_texts: Name of the text of each of them.
        held_out: For choosing the best state of a training; empty where nothing is trained.
        training: For training; those of `calibration` are among them.
    """

    calibration: list[Window]
    evaluation: list[Window]
    evaluation_texts: list[str]
    held_out: list[Window]
    training: list[Window]


def split_windows(by_text: Mapping[str, Sequence[Window]], each: int, trains: bool) -> SplitWindows:
    """Split windows evenly over the texts.

    Args:
        by_text: All windows, by the name of their text.
        each: Windows per purpose, or as many as there are; training takes the rest too.
        trains: Whether something is trained.

    Raises:
        InvalidArgument: There is not one window for each purpose.
    """
    windows = [window for of_text in by_text.values() for window in of_text]
    texts = [name for name, of_text in by_text.items() for _ in of_text]
    purposes = 3 if trains else 2
    each = min(each, len(windows) // purposes)
    if not each:
        needed = "calibration, held-out text and evaluation" if trains else "calibration and evaluation"
        raise InvalidArgument(
            f"{', '.join(by_text)}: {len(windows)} windows of {len(windows[0].ids)} tokens are too few (one is needed for each of "
            f"{needed}): pass a longer text or a smaller `length`"
        )
    picked = [(2 * i + 1) * len(windows) // (2 * purposes * each) for i in range(purposes * each)]
    evaluation, held_out = (picked[n::purposes] if n < purposes else [] for n in (1, 2))
    apart = {*evaluation, *held_out}
    return SplitWindows(
        [windows[i] for i in picked[0::purposes]],
        [windows[i] for i in evaluation],
        [texts[i] for i in evaluation],
        [windows[i] for i in held_out],
        [window for i, window in enumerate(windows) if i not in apart],
    )

"""Sums by window of a text, and how far numbers computed from them vary from window to window.

Neighbouring tokens depend on each other, so a standard error that takes positions for independent is too small.
Windows lie apart, or are long beside the reach of that dependence: numbers are computed again without one window after
the other (the jackknife: Quenouille 1956; Tukey 1958), and the spread of these gives the error.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

GROUPS = 64  # sums at most; of more windows, neighbours share one
CONFIDENCE = 0.95


@dataclass(slots=True)
class WindowSums:
    """Sums of some numbers over each window, or over groups of neighbouring windows where there are many.

    Attributes:
        width: Numbers of a window.
        span: Neighbouring windows of a group; a power of two.
        groups: The sums (float64) of each group that has any, by its number.
    """

    width: int
    span: int = 1
    groups: dict[int, Float[Tensor, " w"]] = field(default_factory=dict, repr=False)

    def add(self, window: int, numbers: Float[Tensor, " w"]) -> None:
        """Add numbers to the sums of a window, which is given by its number in the text."""
        self._add(window // self.span, numbers.to("cpu", torch.float64))
        while max(self.groups) >= GROUPS:
            self._widen()

    def merge(self, other: "WindowSums") -> None:
        """Add the sums over other positions of the same text."""
        while self.span < other.span:
            self._widen()
        for group, numbers in other.groups.items():
            self._add(group * other.span // self.span, numbers)

    def _add(self, group: int, numbers: Float[Tensor, " w"]) -> None:
        self.groups[group] = self.groups[group] + numbers if group in self.groups else numbers

    def _widen(self) -> None:
        narrow, self.groups, self.span = self.groups, {}, 2 * self.span
        for group, numbers in narrow.items():
            self._add(group // 2, numbers)

    def stacked(self) -> Float[Tensor, "g w"]:
        """Return the sums as rows, in the order of the text."""
        rows = [numbers for _, numbers in sorted(self.groups.items())]
        return torch.stack(rows) if rows else torch.zeros(0, self.width, dtype=torch.float64)

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield all of it as named tensors, for a file."""
        yield f"{name}.groups", torch.tensor(sorted(self.groups), dtype=torch.int64)
        yield f"{name}.sums", self.stacked()
        yield f"{name}.span", torch.tensor(self.span)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> "WindowSums":
        """Return the sums whose `tensors` these are; others are ignored."""
        groups, sums = tensors[f"{name}.groups"].tolist(), tensors[f"{name}.sums"]
        return cls(sums.shape[1], int(tensors[f"{name}.span"]), dict(zip(groups, sums, strict=True)))


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its standard error, and its 95% interval by Student's t; None each where there is one group only.

    Attributes:
        value: The number, from all groups.
        stderr: The standard error.
        low: The lower end of the interval.
        high: The upper end of the interval.
        n_groups: Windows, or groups of windows, that it comes from.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n_groups: int


def t_quantile(freedom: float, n_statements: int = 1) -> float:
    """Return how many standard errors a 95% interval reaches to each side, where so many intervals hold at once (Bonferroni)."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / 2 / n_statements))


def student_interval(value: float, stderr: float, freedom: float, n_groups: int, n_statements: int = 1) -> Interval:
    """Return the 95% interval of a number by Student's t with these degrees of freedom."""
    margin = t_quantile(freedom, n_statements) * stderr
    return Interval(value, stderr, value - margin, value + margin, n_groups)


def jackknife(value: float, without: Float[Tensor, " g"], n_statements: int = 1) -> Interval:
    """Return the interval of a number from its values without each of g groups.

    The variance is (g - 1) / g times the sum of squared differences of these values from their mean.
    Of `n_statements` intervals all cover their numbers at once in 95% of samples (Bonferroni).

    >>> jackknife(2.0, torch.tensor([2.5, 2.0, 1.5])).stderr  # the mean of 1, 2 and 3
    0.5773502691896257
    """
    g = len(without)
    if g < 2:
        return Interval(value, None, None, None, g)
    values = without.double()
    stderr = float(((g - 1) / g * (values - values.mean()).square().sum()).sqrt())
    return student_interval(value, stderr, g - 1, g, n_statements)


def interval(sums: Float[Tensor, "g w"], number: Callable[[Float[Tensor, "... w"]], Float[Tensor, " ..."]]) -> Interval:
    """Return the interval of a number that is computed from sums over all windows, such as a ratio of two of them.

    Args:
        sums: A row of sums for each group of windows.
        number: Computes the number, from the sums in the last dimension.

    >>> interval(torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), lambda s: s[..., 0] / s[..., 1]).value
    2.0
    """
    total = sums.sum(dim=0)
    return jackknife(float(number(total)), number(total - sums))

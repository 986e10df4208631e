"""A number of several seeds on the same windows of a text, and how far it varies over both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dimscope.texts.window_sums import Interval, jackknife, t_quantile

Seeds = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Replicates:
    """A number by seed, from all windows and without each of them.

    Attributes:
        seeds: The seeds; (None,) where nothing is random.
        values: The number of each seed.
        without: The number of each seed without each window.
    """

    seeds: Seeds
    values: Float[Tensor, " s"]
    without: Float[Tensor, "s g"]

    @property
    def random(self) -> bool:
        """Whether the number depends on a seed."""
        return self.seeds != (None,)

    @property
    def repeated(self) -> bool:
        """Whether the spread over seeds is known: nothing is random, or there are several seeds."""
        return len(self.seeds) > 1 or not self.random

    def interval(self, n_statements: int = 1) -> Interval:
        """Return the mean over the seeds with its 95% interval, over windows and, where there are several, over seeds.

        The variance is that of the jackknife over windows plus that of the mean over seeds, which is somewhat too large:
        both contain what is particular to a seed on a window. Each has its own quantile of Student's t, and the two margins
        are added as squares (Banerjee 1961): the degrees of freedom of Welch and Satterthwaite are too many where the
        variance over a few seeds is small by chance. Of `n_statements` intervals all cover their numbers at once in 95% of
        samples (Bonferroni).
        """
        windows = jackknife(float(self.values.mean()), self.without.mean(dim=0), n_statements)
        n = len(self.values)
        if windows.stderr is None or n < 2:
            return windows
        errors = (windows.stderr, math.sqrt(float(self.values.var()) / n))
        quantiles = (t_quantile(windows.n_groups - 1, n_statements), t_quantile(n - 1, n_statements))
        margin = math.hypot(*(t * stderr for t, stderr in zip(quantiles, errors, strict=True)))
        return Interval(
            windows.value, math.hypot(*errors), windows.value - margin, windows.value + margin, windows.n_groups
        )

    def minus(self, other: Replicates) -> Replicates | None:
        """Return the difference, window by window, and seed by seed where both are random; None without a common seed."""
        if not (self.random and other.random):
            seeds = self.seeds if self.random else other.seeds
            return Replicates(seeds, self.values - other.values, self.without - other.without)
        common = [seed for seed in self.seeds if seed in other.seeds]
        if not common:
            return None
        own, others = ([of.seeds.index(seed) for seed in common] for of in (self, other))
        return Replicates(
            tuple(common), self.values[own] - other.values[others], self.without[own] - other.without[others]
        )

    def times(self, factor: float) -> Replicates:
        """Return the number multiplied by a factor."""
        return Replicates(self.seeds, self.values * factor, self.without * factor)


def replicates(
    seeds: Sequence[int | None],
    sums: Float[Tensor, "s g w"],
    number: Callable[[Float[Tensor, "... w"]], Float[Tensor, " ..."]],
) -> Replicates:
    """Return a number of every seed from the sums of its windows; seeds whose number is not finite are left out.

    Args:
        seeds: The seeds; None where nothing is random.
        sums: The sums of every seed and window.
        number: Computes the number, from the sums in the last dimension.
    """
    totals = sums.sum(dim=1)
    values, without = number(totals), number(totals[:, None] - sums)
    kept = values.isfinite().nonzero()[:, 0]
    return Replicates(tuple(seeds[i] for i in kept.tolist()), values[kept], without[kept])

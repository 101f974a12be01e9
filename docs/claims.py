"""What a claim is made of: a verdict that follows from numbers, and the numbers with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from result_tables import signed, told

HELD, IN_PART, NOT = "held", "held in part", "did not hold"
MARGIN = 0.02  # of a cosine, named before any table was made (lecture 04)
TOGETHER = "image alignment", "text alignment", "every subject found"  # what is measured of several subjects


@dataclass(frozen=True)
class Finding:
    """A claim, whose it is, the verdict, and the numbers behind it in a sentence."""

    claim: str
    source: str
    verdict: str
    because: str


@dataclass(frozen=True)
class Difference:
    """A mean paired difference between two conditions, with its interval."""

    value: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0

    @property
    def nothing(self) -> bool:
        """Within the margin, which is more than that no difference was seen."""
        return -MARGIN < self.low and self.high < MARGIN

    def __str__(self) -> str:
        return signed(self.value, self.low, self.high, digits=3)


def difference(
    table: Any, condition: str, minus: str, measure: str, subjects: Sequence[str] | None = None, level: float = 0.95
) -> Difference:
    """Of one condition from another, paired by subject and seed. Raises ValueError if the table has them not."""
    from coneslab.experiments import summarise

    part = table[table.condition.isin([condition, minus]) & (table.measure == measure)]
    part = part if subjects is None else part[part.subject.isin(subjects)]
    if part.condition.nunique() < 2:
        raise ValueError(f"the table has not both of {condition!r} and {minus!r} with {measure!r}")
    (row,) = summarise(part, minus=minus, level=level).itertuples()
    return Difference(row.value, row.low, row.high)


def in_each(table: Any, condition: str, minus: str) -> list[Difference]:
    """Of one condition from another in every measure of several subjects."""
    return [difference(table, condition, minus, measure) for measure in TOGETHER]


def rank_correlation(of: Mapping[str, float], table: Any, condition: str, minus: str, measure: str) -> Difference:
    """Spearman's, of a number a subject with what a condition adds to a measure; interval from resampled subjects."""
    import numpy as np
    from scipy.stats import rankdata

    part = table[(table.measure == measure) & table.subject.isin(of)]
    means = part.pivot_table(index="subject", columns="condition", values="value")
    gains = (means[condition] - means[minus]).dropna()
    pair = np.array([[of[name] for name in gains.index], gains])

    def correlations(pairs: Any) -> Any:
        ranks = rankdata(pairs, axis=-1)
        ranks -= ranks.mean(-1, keepdims=True)
        spread = np.sqrt((ranks**2).sum(-1).prod(-1))
        return np.divide(ranks.prod(-2).sum(-1), spread, out=np.full(len(pairs), np.nan), where=spread > 0)

    drawn = np.random.default_rng(0).integers(len(gains), size=(5000, len(gains)))
    (value,), resampled = correlations(pair[None]), correlations(pair[:, drawn].transpose(1, 0, 2))
    return Difference(float(value), *map(float, np.nanquantile(resampled, [0.025, 0.975])))


def mean_of(table: Any, condition: str, measure: str) -> float:
    """Of all rows of one condition and measure."""
    return float(table[(table.condition == condition) & (table.measure == measure)].value.mean())


def verdict(all_of: Sequence[bool]) -> str:
    """Of a claim that holds if all of these do."""
    return HELD if all(all_of) else IN_PART if any(all_of) else NOT


@dataclass(frozen=True)
class Estimate:
    """A mean of one condition with its interval, and over how many subjects."""

    value: float
    low: float
    high: float
    clusters: int

    def __str__(self) -> str:
        return told(self.value, self.low, self.high, ".3f")


def estimate(table: Any, condition: str, measure: str) -> Estimate:
    """Of one condition and measure, as `summarise` has it; what could not be measured is left out."""
    from coneslab.experiments import summarise

    part = table[(table.condition == condition) & (table.measure == measure)]
    (row,) = summarise(part).itertuples()
    return Estimate(row.value, row.low, row.high, row.clusters)

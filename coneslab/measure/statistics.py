"""Statistics: the kernel inception distance, and bootstrap intervals that respect clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from ..errors import ConeslabError, MismatchError


def kid(
    features_a: Tensor | np.ndarray,
    features_b: Tensor | np.ndarray,
    *,
    subset_size: int | None = None,
    subsets: int = 100,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    seed: int = 0,
) -> float:
    """Kernel inception distance: unbiased MMD² with the kernel (γ·aᵀb + c)^degree (Binkowski et al. 2018).

    features_a, features_b: (n, d) and (m, d), from any judge; γ is 1/d unless given. Unbiased, so it may fall
    below 0 for equal distributions. `subset_size` None takes all pictures once (the least variance); a number
    averages over `subsets` random subsets of that size, drawn without replacement, as clean-fid does
    (100 subsets of 1000).
    Raises MismatchError for different widths, ConeslabError for fewer than two pictures or non-finite values.

    >>> features = np.random.default_rng(0).normal(size=(3, 200, 4))
    >>> same, also_same, other = features[0], features[1], features[2] + 2
    >>> abs(kid(same, also_same)) < 0.1 < kid(same, other)
    True
    """
    a, b = (np.asarray(features, dtype=np.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise MismatchError(
            f"got features of shape {a.shape} and {b.shape}, expected (n, d) and (m, d): take both from one judge"
        )
    size = min(len(a), len(b)) if subset_size is None else subset_size
    if size < 2 or size > min(len(a), len(b)):
        raise ConeslabError(
            f"got {len(a)} and {len(b)} pictures and subset_size={subset_size}, expected at least 2 pictures "
            "on both sides and a subset no larger than either"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ConeslabError("got features with NaN or infinite values, expected finite ones")
    scale = 1.0 / a.shape[1] if gamma is None else gamma

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (scale * x @ y.T + coef0) ** degree

    def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
        n, m = len(x), len(y)
        xx, yy = kernel(x, x), kernel(y, y)
        within_x = (xx.sum() - np.trace(xx)) / (n * (n - 1))  # without the diagonal: that makes it unbiased
        within_y = (yy.sum() - np.trace(yy)) / (m * (m - 1))
        return float(within_x + within_y - 2 * kernel(x, y).mean())

    if subset_size is None:
        return squared_mmd(a, b)
    rng = np.random.default_rng(seed)
    return float(
        np.mean(
            [
                squared_mmd(a[rng.choice(len(a), size, replace=False)], b[rng.choice(len(b), size, replace=False)])
                for _ in range(subsets)
            ]
        )
    )


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    estimate: float
    low: float
    high: float
    level: float
    values: int

    def __repr__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return {
            "estimate": self.estimate,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "values": self.values,
        }


def bootstrap_interval(
    values: Sequence[float] | np.ndarray | Tensor,
    *,
    clusters: Sequence[Sequence] = (),
    minus: Sequence[float] | np.ndarray | Tensor | None = None,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, Sec. 13.3), by clusters if given.

    values: (n,). clusters: label sequences of length n, outermost first, for example `[subjects, seeds]`:
    each resample draws subjects, then seeds within each drawn subject, and keeps the pictures of a drawn seed
    together, because pictures of one subject are not independent evidence (Davison and Hinkley 1997, 3.8).
    The mean is taken in each seed, then over seeds, then over subjects, so every subject counts the same.
    Without clusters the values are drawn one by one.
    minus: (n,) values to subtract first, for the interval of a paired difference.
    Raises MismatchError for different lengths, ConeslabError for no values or non-finite values.

    >>> right, subjects = [1, 0, 1, 1], ["cat", "cat", "dog", "dog"]
    >>> bootstrap_interval(right, clusters=[subjects])  # two subjects, not four independent pictures
    0.750 [0.500, 1.000]
    >>> bootstrap_interval(right, minus=[0, 0, 1, 0]).estimate  # of the paired difference
    0.5
    """
    numbers = np.asarray(values, dtype=np.float64)
    lengths = {"values": numbers.shape, **{f"clusters[{i}]": (len(c),) for i, c in enumerate(clusters)}}
    if minus is not None:
        lengths["minus"] = np.shape(minus)
    if numbers.ndim != 1 or len(set(lengths.values())) != 1:
        raise MismatchError(f"got shapes {lengths}, expected one length for all")
    if minus is not None:
        numbers = numbers - np.asarray(minus, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ConeslabError(f"got {len(numbers)} values, expected at least one, and all finite")
    if not 0 < level < 1 or resamples < 1:
        raise ConeslabError(f"got level={level}, resamples={resamples}, expected 0 < level < 1 and 1 or more")

    columns = [np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1) for labels in clusters]
    if not columns:
        columns = [np.arange(len(numbers))]
    tree = _group(numbers, columns)
    means = _resample(tree, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(_tree_mean(tree), float(low), float(high), level, len(numbers))


_Tree: TypeAlias = "float | list[_Tree]"


def _group(numbers: np.ndarray, columns: list[np.ndarray]) -> _Tree:
    """Nest values by the columns' labels; a leaf is the mean of the values that stay together."""
    if not columns:
        return float(numbers.mean())
    first, *rest = columns
    members = [first == label for label in np.unique(first)]
    return [_group(numbers[here], [column[here] for column in rest]) for here in members]


def _tree_mean(tree: _Tree) -> float:
    return tree if isinstance(tree, float) else float(np.mean([_tree_mean(child) for child in tree]))


def _resample(tree: _Tree, size: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `size` resamples of a tree, (size,): children drawn with replacement, each resampled in turn."""
    if isinstance(tree, float):
        return np.full(size, tree)
    drawn = rng.integers(len(tree), size=(size, len(tree)))
    means = np.empty(drawn.shape)
    for index, child in enumerate(tree):
        here = drawn == index
        means[here] = _resample(child, int(here.sum()), rng)
    return means.mean(1)

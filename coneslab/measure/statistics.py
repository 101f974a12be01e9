"""Statistics: the kernel inception distance, and intervals that respect clusters and the ends of a share's range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import TypeAlias

import numpy as np
from scipy.stats import norm
from torch import Tensor

from .. import checks
from ..errors import ArgumentError, ConeslabError, MismatchError
from ..settings import ByValue

MIN_CLUSTERS = 5  # below it, an interval over clusters says nothing: show the clusters themselves

Numbers: TypeAlias = "Sequence[float] | np.ndarray | Tensor"


def kid(
    features_a: Tensor | np.ndarray,
    features_b: Tensor | np.ndarray,
    *,
    paired: bool = False,
    subset_size: int | None = None,
    subsets: int = 100,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    seed: int = 0,
) -> float:
    """Kernel inception distance: unbiased MMD² with the kernel (γ·aᵀb + c)^degree (Binkowski et al. 2018).

    features_a, features_b: (n, d) and (m, d), from any judge. Unbiased, so it may fall below 0 for equal distributions.
    paired: picture i of both starts from one noise, as before and after an edit. Such samples are not independent, and
    the usual estimate would be too small by what the pairs share; with n = m, the kernel's values within pairs are left
    out on all sides instead (Gretton et al. 2012, A Kernel Two-Sample Test, Lemma 6), which is unbiased for pairs, and
    exactly 0 where nothing changed. gamma: γ, by default 1/d, or 1 for features of length 1, such as CLIP's: their
    kernel would be all but linear otherwise (the same as scaling them to length √d, as k-diffusion does). subset_size:
    None takes all pictures once (the least variance); a number averages over `subsets` random subsets of that size,
    drawn without replacement, as clean-fid does (100 subsets of 1000).
    Raises MismatchError for different widths, or numbers of pairs; ConeslabError for fewer than two pictures or
    non-finite values.

    >>> features = np.random.default_rng(0).normal(size=(3, 200, 4))
    >>> same, also_same, other = features[0], features[1], features[2] + 2
    >>> abs(kid(same, also_same)) < 0.1 < kid(same, other)
    True
    >>> kid(same, same, paired=True)
    0.0
    """
    checks.flag("paired", paired)
    subsets, degree = checks.count("subsets", subsets), checks.count("degree", degree, most=100)
    gamma = None if gamma is None else checks.number("gamma", gamma, "(0, inf)")
    coef0, seed = checks.number("coef0", coef0), checks.seed("seed", seed)
    subset_size = None if subset_size is None else checks.count("subset_size", subset_size)
    a, b = _array("features_a", features_a), _array("features_b", features_b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise MismatchError(
            f"got features of shape {a.shape} and {b.shape}, expected (n, d) and (m, d): take both from one judge"
        )
    if paired and len(a) != len(b):
        raise MismatchError(f"got {len(a)} and {len(b)} pictures, expected pairs: one of each from every noise")
    size = min(len(a), len(b)) if subset_size is None else subset_size
    if size < 2 or size > min(len(a), len(b)):
        raise ConeslabError(
            f"got {len(a)} and {len(b)} pictures and subset_size={subset_size}, expected at least 2 pictures "
            "on both sides and a subset no larger than either"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ConeslabError("got features with NaN or infinite values, expected finite ones")
    unit = all(np.allclose(np.linalg.norm(x, axis=1), 1.0, atol=1e-3) for x in (a, b))
    scale = gamma if gamma is not None else 1.0 if unit else 1.0 / a.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (scale * x @ y.T + coef0) ** degree

    def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
        n, m = len(x), len(y)
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        within_x = (xx.sum() - np.trace(xx)) / (n * (n - 1))  # without the diagonal: that makes it unbiased
        within_y = (yy.sum() - np.trace(yy)) / (m * (m - 1))
        across = (xy.sum() - np.trace(xy)) / (n * (n - 1)) if paired else xy.mean()
        return float(within_x + within_y - 2 * across)

    if subset_size is None:
        return squared_mmd(a, b)
    rng = np.random.default_rng(seed)

    def of_subset() -> float:
        first = rng.choice(len(a), size, replace=False)
        return squared_mmd(a[first], b[first if paired else rng.choice(len(b), size, replace=False)])

    return float(np.mean([of_subset() for _ in range(subsets)]))


@dataclass(frozen=True, eq=False)
class Interval(ByValue):
    """A mean with its interval; low and high are NaN where there is too little to say how far it may be off.

    values: how many numbers it is the mean of; clusters: how many of them are independent.
    """

    estimate: float
    low: float
    high: float
    level: float
    values: int
    clusters: int

    def __repr__(self) -> str:
        if np.isnan(self.low):
            return f"{self.estimate:.3f} (n = {self.clusters}, no interval)"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers, for JSON; None where there is no interval."""
        low, high = (None if np.isnan(end) else end for end in (self.low, self.high))
        return {
            "estimate": self.estimate,
            "low": low,
            "high": high,
            "level": self.level,
            "values": self.values,
            "clusters": self.clusters,
        }


def bootstrap_interval(
    values: Numbers,
    *,
    clusters: Sequence[Sequence] = (),
    minus: Numbers | None = None,
    shares: bool = True,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Interval of a mean: percentile bootstrap (Efron and Tibshirani 1993, Sec. 13.3), by clusters if given.

    values: (n,). clusters: label sequences of length n, outermost first, for example `[subjects, seeds]`:
    each resample draws subjects, then seeds within each drawn subject, and keeps the pictures of a drawn seed
    together, because pictures of one subject are not independent evidence (Davison and Hinkley 1997, 3.8).
    The mean is taken in each seed, then over seeds, then over subjects, so every subject counts the same.
    Without clusters the values are drawn one by one.
    minus: (n,) values to subtract first, for the interval of a paired difference.
    Fewer than five values, or outermost clusters, give a mean without an interval: resampling so few says nothing.
    Values that are all 0 or 1 are a share, and shares near an end of their range cannot be resampled either (of 24
    zeros, every resample is 0): see `share_interval`. The difference of two such columns has the interval of Agresti
    and Min (2005, Sec. 3, matched pairs) unless the clusters differ among themselves. shares: False for what is no
    share although these values of it happen to be 0 or 1, such as seconds.
    Raises MismatchError for different lengths, ConeslabError for no values or non-finite values.

    >>> subjects = ["cat", "cat", "dog", "dog", "car", "car", "pig", "pig", "sun", "sun"]
    >>> text = [0.2, 0.4, 0.6, 0.6, 0.1, 0.3, 0.5, 0.5, 0.2, 0.6]
    >>> bootstrap_interval(text, clusters=[subjects])  # five subjects, not ten independent pictures
    0.400 [0.280, 0.520]
    >>> bootstrap_interval(text[:6], clusters=[subjects[:6]])
    0.367 (n = 3, no interval)
    >>> bootstrap_interval([0] * 24)  # none of 24
    0.000 [0.000, 0.138]
    """
    clusters = checks.items("clusters", clusters, least=0)
    numbers = _checked(values, clusters, minus, level, checks.count("resamples", resamples))
    seed = checks.seed("seed", seed)
    shares = shares and bool(np.isin(numbers, (0.0, 1.0)).all())
    if minus is None and shares:
        return share_interval(numbers, clusters=clusters, level=level)
    if minus is not None:
        base = np.asarray(minus, dtype=np.float64)
        numbers, shares = numbers - base, shares and bool(np.isin(base, (0.0, 1.0)).all())
    tree = _grouped(numbers, clusters)
    if minus is not None and shares and (not clusters or _constant(tree)):
        return _difference_of_shares(numbers, tree, level)
    count, low, high = len(tree), nan, nan
    if count >= MIN_CLUSTERS:
        means = _resample(tree, resamples, np.random.default_rng(seed))
        low, high = map(float, np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(_tree_mean(tree), low, high, level, len(numbers), count)


def share_interval(values: Numbers, *, clusters: Sequence[Sequence] = (), level: float = 0.95) -> Interval:
    """Interval of a share (Wilson 1927), which holds near 0 and 1 too, where a bootstrap's has no width.

    values: (n,), 0 or 1 each, or shares themselves; clusters: as in `bootstrap_interval`. With clusters, n is the
    effective number of values, p(1 − p) over the variance of the mean of the outermost clusters (Franco et al. 2019,
    Sec. 2), at least the number of clusters and at most n; for a share of 0 or 1 it is their number. Fewer than five
    clusters, or a single value, give no interval.
    Raises MismatchError for different lengths, ConeslabError for values outside 0 to 1.

    >>> share_interval([1] * 30 + [0] * 2)
    0.938 [0.799, 0.983]
    """
    clusters = checks.items("clusters", clusters, least=0)
    numbers = _checked(values, clusters, None, level)
    if ((numbers < 0) | (numbers > 1)).any():
        raise ConeslabError(f"got values from {numbers.min():g} to {numbers.max():g}, expected shares, from 0 to 1")
    tree = _grouped(numbers, clusters)
    share, count = _tree_mean(tree), len(tree)
    if count < (MIN_CLUSTERS if clusters else 2):
        return Interval(share, nan, nan, level, len(numbers), count)
    size = float(count)
    if clusters:
        variance = float(np.var([_tree_mean(branch) for branch in tree], ddof=1)) / count
        most = len(numbers) if np.isin(numbers, (0.0, 1.0)).all() else np.inf if variance else count
        inside = 0 < share < 1
        size = min(max(count, share * (1 - share) / variance if variance else np.inf), most) if inside else count
    z = float(norm.ppf((1 + level) / 2))
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    reach = z / (1 + z**2 / size) * (share * (1 - share) / size + z**2 / (4 * size**2)) ** 0.5
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return Interval(share, 0.0 if share == 0 else low, 1.0 if share == 1 else high, level, len(numbers), count)


def cluster_means(values: Numbers, clusters: Sequence[Sequence]) -> tuple[float, ...]:
    """The mean of each of the outermost clusters, in their order, taken as in `bootstrap_interval`.

    What to show where there are too few for an interval. Raises MismatchError for different lengths, ConeslabError for
    no values or non-finite ones.

    >>> cluster_means([0.25, 0.5, 0.75], [["cat", "cat", "dog"]])
    (0.375, 0.75)
    """
    clusters = checks.items("clusters", clusters)
    numbers = _checked(values, clusters, None, 0.95)
    return tuple(map(_tree_mean, _grouped(numbers, clusters)))


def _difference_of_shares(differences: np.ndarray, tree: list[_Tree], level: float) -> Interval:
    """Difference of two shares on matched pairs, −1, 0 or 1 each: Agresti and Min (2005), half a pair in each cell."""
    mean, count = _tree_mean(tree), len(tree)
    if count < MIN_CLUSTERS:
        return Interval(mean, nan, nan, level, len(differences), count)
    size = count + 2.0
    apart = (np.abs(differences).mean() * count + 1) / size  # the share of pairs that differ
    middle = mean * count / size
    reach = float(norm.ppf((1 + level) / 2)) * ((apart - middle**2) / size) ** 0.5
    return Interval(mean, max(-1.0, middle - reach), min(1.0, middle + reach), level, len(differences), count)


def _array(name: str, values: Numbers) -> np.ndarray:
    """Numbers as an array. Raises ArgumentError for anything else."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} is {checks.shown(values)}: give numbers") from error


def _checked(
    values: Numbers, clusters: Sequence[Sequence], minus: Numbers | None, level: float, resamples: int = 1
) -> np.ndarray:
    """The values as an array (n,); raises what the functions above raise."""
    numbers, level = _array("values", values), checks.number("level", level)
    lengths = {"values": numbers.shape, **{f"clusters[{i}]": (len(c),) for i, c in enumerate(clusters)}}
    if minus is not None:
        lengths["minus"] = np.shape(minus)
    if numbers.ndim != 1 or len(set(lengths.values())) != 1:
        raise MismatchError(f"got shapes {lengths}, expected one length for all")
    finite = np.isfinite(numbers).all() and (minus is None or np.isfinite(_array("minus", minus)).all())
    if not len(numbers) or not finite:
        raise ConeslabError(f"got {len(numbers)} values, expected at least one, and all finite")
    if not 0 < level < 1 or resamples < 1:
        raise ConeslabError(f"got level={level}, resamples={resamples}, expected 0 < level < 1 and 1 or more")
    return numbers


_Tree: TypeAlias = "float | list[_Tree]"


def _grouped(numbers: np.ndarray, clusters: Sequence[Sequence]) -> list[_Tree]:
    """Values nested by their labels, outermost first; one by one without any."""
    columns = [np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1) for labels in clusters]
    tree = _group(numbers, columns or [np.arange(len(numbers))])
    assert isinstance(tree, list)
    return tree


def _constant(tree: list[_Tree]) -> bool:
    return len({_tree_mean(branch) for branch in tree}) == 1


def _group(numbers: np.ndarray, columns: list[np.ndarray]) -> _Tree:
    """Nest values by the columns' labels; a leaf is the mean of the values that stay together."""
    if not columns:
        return float(numbers.mean())
    first, *rest = columns
    members = [first == label for label in np.unique(first)]
    return [_group(numbers[here], [column[here] for column in rest]) for here in members]


def _tree_mean(tree: _Tree) -> float:
    return tree if isinstance(tree, float) else float(np.mean([_tree_mean(child) for child in tree]))


def _resample(tree: list[_Tree], size: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `size` resamples of a tree, (size,): children drawn with replacement, each resampled in turn."""
    drawn = rng.integers(len(tree), size=(size, len(tree)))
    branches = [child for child in tree if not isinstance(child, float)]
    if not branches:
        return np.array(tree)[drawn].mean(1)
    means = np.empty(drawn.shape)
    for index, child in enumerate(branches):  # leaves are as deep as one another: here are none
        here = drawn == index
        means[here] = _resample(child, int(here.sum()), rng)
    return means.mean(1)

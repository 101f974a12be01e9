"""Which group does a neutral word stand for? Read it off a decomposition, count it in pictures, change it.

Coefficients that name a group (woman, man) show what a profession stands for (Conceptor, arXiv 2306.00966, Sec. 4.3);
changing them balances what is drawn. Every share of pictures comes with its interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from ... import checks
from ...errors import ArgumentError, ConeslabError
from ...measure.judge import Judge, require_judge
from ...measure.statistics import Interval, share_interval
from ...pictures import Images
from .decomposition import Decomposition

Groups = Mapping[str, str | Iterable[str]]


def bias(decomposition: Decomposition, groups: Groups) -> dict[str, float]:
    """Share of each group's words in the coefficients of all groups; NaN where none of them occurs.

    groups: name -> words, e.g. {"woman": ["woman", "lady"], "man": ["man"]}. Raises ConeslabError for fewer than two
    groups, or a word in two of them.
    """
    checks.of_kind("decomposition", decomposition, Decomposition)
    groups = _groups(groups)
    mass = {name: decomposition.share(words) for name, words in groups.items()}
    total = sum(mass.values())
    return {name: value / total if total else float("nan") for name, value in mass.items()}


def rebalance(
    decomposition: Decomposition,
    groups: Groups,
    *,
    shares: Mapping[str, float] | None = None,
    total: float | None = None,
) -> Decomposition:
    """Scale the groups' coefficients to equal shares of their sum, or to the shares given.

    If all words of a group have a coefficient of 0, its first word gets the share. total: share of all groups together
    in the sum over all words, for groups that had next to nothing.
    Raises ConeslabError if a group has no word in the decomposition, a word is in two groups, shares are not a
    distribution over the groups, or total is not between 0 and 1.
    """
    checks.of_kind("decomposition", decomposition, Decomposition)
    groups = _groups(groups)
    wanted = checks.mapping("shares", dict.fromkeys(groups, 1 / len(groups)) if shares is None else shares)
    wanted = {name: checks.number(f"shares[{name!r}]", share) for name, share in wanted.items()}
    if total is not None:
        checks.number("total", total)
    if wanted.keys() != groups.keys() or min(wanted.values()) < 0 or not np.isclose(sum(wanted.values()), 1):
        raise ConeslabError(f"shares are {wanted}: give a number of 0 or more for each of {list(groups)}, 1 in all")
    place = {word: number for number, word in enumerate(decomposition.words)}
    rows = {name: [place[word] for word in words if word in place] for name, words in groups.items()}
    missing = [name for name, own in rows.items() if not own]
    if missing:
        raise ConeslabError(f"no word of {', '.join(missing)} is among the words of {decomposition.concept!r}")
    values = np.array(decomposition.coefficients, float)
    values[decomposition.explain :] = 0
    had = sum(values[own].sum() for own in rows.values())
    if total is None:
        mass_of_all = had
    elif 0 < total < 1:
        mass_of_all = (values.sum() - had) * total / (1 - total)
    else:
        raise ConeslabError(f"total is {total}: give a share of the whole sum, between 0 and 1")
    if not mass_of_all:
        raise ConeslabError(
            f"no word of any group matters in {decomposition.concept!r}: there is nothing to share out, unless you "
            "give their share of the whole sum (total=)"
            if total is None
            else f"no word outside the groups matters in {decomposition.concept!r}: nothing remains beside which "
            f"they could have {total:.0%} (leave out total=)"
        )
    for name, own in rows.items():
        mass = values[own].sum()
        if mass:
            values[own] *= wanted[name] * mass_of_all / mass
        else:
            values[own[0]] = wanted[name] * mass_of_all
    explain = max(decomposition.explain, int((values > 0).sum()))
    return replace(decomposition, coefficients=values.astype(np.float32), explain=explain)


def group_shares(judge: Judge, images: Images, groups: Groups, *, template: str = "a {}") -> dict[str, Interval]:
    """Share of pictures that the judge assigns to each group, with Wilson intervals; template: with {} for a word.

    Raises ConeslabError for fewer than two groups, or a word in two of them.
    """
    require_judge(judge)
    groups, template = _groups(groups), checks.template("template", template)
    labels = [[template.format(word) for word in words] for words in groups.values()]
    found = judge.classify(images, labels).numpy()
    return {name: share_interval(found == number) for number, name in enumerate(groups)}


def _groups(groups: Groups) -> dict[str, list[str]]:
    """Two groups or more that share no word: name -> words, each once. Raises ArgumentError for anything else."""
    given = checks.mapping("groups", groups, least=0)
    found = {name: checks.texts(f"groups[{name!r}]", words, least=0) for name, words in given.items()}
    if len(found) < 2 or not all(found.values()):
        raise ArgumentError(f"the groups are {found}: give two or more, each with at least one word")
    found = {name: list(dict.fromkeys(words)) for name, words in found.items()}
    of_word: dict[str, list[str]] = {}
    for name, words in found.items():
        for word in words:
            of_word.setdefault(word, []).append(name)
    if shared := [word for word, names in of_word.items() if len(names) > 1]:
        raise ArgumentError(
            f"{shared[0]!r} is in the groups {' and '.join(of_word[shared[0]])}: what it has would count for each of "
            "them; leave it in one"
        )
    return found

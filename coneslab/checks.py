"""What an argument may be: one small check for each kind, at the door of public functions and in methods' settings.

A check returns the value as the package uses it (a NumPy integer as an int, one text as a list of one text) or raises
`ArgumentError`, which says what was given and what to give instead. It imports neither NumPy nor torch.
"""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from .errors import ArgumentError, ConeslabWarning

MOST = 1_000_000  # of anything that is counted: more would run for days, or fill any memory
SEEDS = 2**32  # torch's generator on the CPU reads 32 bits of a seed: 2**32 would be 0 again
GUIDANCE = "[0, 100]"  # of guidance scales; 1 is none, and pictures are noise long before 100
GUIDED = "[1, 100]"  # of those with which a pipeline draws, which takes 1 for every scale below
SHARE = "[0, 1]"
_WITHIN = (__package__, "torch", "contextlib")  # whose decorators are between the package and its caller

Thing = TypeVar("Thing")


def shown(value: Any) -> str:
    """A value as a message shows it: its repr, cut short; of an array or a tensor, type and shape alone."""
    if hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple) and value.shape != ():
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    large = isinstance(value, float) and abs(value) >= 1e6
    text = f"{value:g}" if large else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_scalar(value: Any) -> bool:
    """Whether this is a number of NumPy or torch, neither of which is imported here."""
    return hasattr(value, "dtype") and getattr(value, "shape", None) == ()


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (_is_scalar(value) and str(value.dtype) in ("bool", "torch.bool"))


def warn(text: str) -> None:
    """Warn that something was left out or cut off, at the line that called the package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _WITHIN:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, ConeslabWarning, stacklevel=level)


# --- numbers --------------------------------------------------------------------------------------------


def count(name: str, value: Any, *, least: int = 1, most: int = MOST) -> int:
    """A whole number from `least` to `most`."""
    try:
        if _is_flag(value):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:  # torch has its own for tensors of several numbers
        raise ArgumentError(f"{name} is {shown(value)}: give a whole number") from error
    if not least <= number <= most:
        usual = (least, most) == (1, MOST)
        expected = f"a positive number, at most {most:,}" if usual else f"a number from {least:,} to {most:,}"
        raise ArgumentError(f"{name} is {shown(number)}: give {expected}")
    return number


def seed(name: str, value: Any) -> int:
    """A seed: 0 <= seed < 2**32."""
    return count(name, value, least=0, most=SEEDS - 1)


def number(name: str, value: Any, interval: str = "(-inf, inf)", *, kind: str = "number") -> float:
    """A finite number in an interval such as "(0, 1]", "[0, inf)". kind: what to call it in the message."""
    low, high = map(float, interval[1:-1].split(","))
    try:
        if _is_flag(value) or isinstance(value, str | bytes):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ArgumentError(f"{name} is {shown(value)}: give {_in_words(low, high, interval, kind)}") from error
    above = low < found or (interval[0] == "[" and found == low)
    below = found < high or (interval[-1] == "]" and found == high)
    if not (above and below):  # NaN is neither
        raise ArgumentError(f"{name} is {shown(value)}: give {_in_words(low, high, interval, kind)}")
    return value if type(value) is int and abs(value) < 2**53 else found  # 0 stays 0, as it was given


def _in_words(low: float, high: float, interval: str, kind: str) -> str:
    if math.isfinite(high):
        return f"a {kind} in {interval}"
    if not math.isfinite(low):
        return f"a finite {kind}"
    return f"a {kind} of {low:g} or more" if interval[0] == "[" else f"a positive {kind}"


def dose(name: str, value: Any) -> float:
    """How much of an edit: 0 for no effect, 1 for the whole, at most 100 either way."""
    return number(name, value, "[-100, 100]")


def interval(name: str, value: Any, within: str = SHARE) -> tuple[float, float]:
    """Two numbers of an interval, the first below the second."""
    try:
        low, high = (number(name, one, within) for one in value)
        if not low < high:
            raise ValueError
    except (TypeError, ValueError, ArgumentError) as error:
        kind = "shares" if within == SHARE else "numbers"
        raise ArgumentError(
            f"the {name} is {shown(value)}: give two {kind} in order, each in {within}, such as (0.0, 0.8)"
        ) from error
    return low, high


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not _is_flag(value):
        raise ArgumentError(f"{name} is {shown(value)}: give True or False")
    return bool(value)


# --- texts ----------------------------------------------------------------------------------------------


def text(name: str, value: Any, *, blank: bool = False) -> str:
    """A text; with `blank`, also an empty one."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} is {shown(value)}: give a text")
    if not blank and not value.strip():
        raise ArgumentError(f"{name} is empty: give a text")
    return str(value)


def texts(name: str, value: Any, *, least: int = 1, blank: bool = False) -> list[str]:
    """Several texts from anything that holds them; one text counts as one. With `blank`, also empty ones."""
    found = [value] if isinstance(value, str) else items(name, value, str, least=least)
    return [text(f"one of {name}" if len(found) > 1 else name, one, blank=blank) for one in found]


def template(name: str, value: Any) -> str:
    """A text with one {} for what is put into it, and no other braces."""
    if "{" in text(name, value).replace("{}", "", 1) or "}" in value.replace("{}", "", 1) or "{}" not in value:
        raise ArgumentError(
            f"{name} is {shown(value)}: give a text with {{}} for the word, once and without other braces"
        )
    return value


def templates(name: str, value: Any) -> list[str]:
    """One text with {} or several."""
    return [template(name, one) for one in texts(name, value)]


def word(name: str, value: Any) -> str:
    """A text without spaces, such as a token."""
    found = text(name, value)
    if len(found.split()) != 1 or found != found.strip():
        raise ArgumentError(f"{name} is {shown(value)}: give one word, without spaces")
    return found


def choice(name: str, value: Any, among: Collection[Thing]) -> Thing:
    """One of a few values."""
    if (isinstance(value, str | int | float) or _is_scalar(value)) and not _is_flag(value):
        for one in among:
            if value == one:
                return one
    raise ArgumentError(f"{name} is {shown(value)}: choose one of {', '.join(map(str, among))}")


# --- several, and of a kind -----------------------------------------------------------------------------


def items(name: str, value: Any, kind: type | tuple[type, ...] | None = None, *, least: int = 1) -> list[Any]:
    """What a list, tuple, generator or other iterable holds, read once; of a kind if one is given.

    A single one of that kind counts as one. least: how many there must be.
    """
    if kind is not None and isinstance(value, kind):
        value = [value]
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ArgumentError(f"{name} is {shown(value)}: give a list")
    try:
        found = list(value)
    except TypeError as error:  # an array or tensor of no dimension
        raise ArgumentError(f"{name} is {shown(value)}: give a list") from error
    if len(found) < least:
        raise ArgumentError(
            f"got no {name}: give at least one" if least == 1 else f"got {len(found)} {name}: give {least} or more"
        )
    if kind is not None:
        for one in found:
            of_kind(f"one of {name}", one, kind)
    return found


def mapping(name: str, value: Any, *, least: int = 1) -> dict[str, Any]:
    """A mapping whose keys are texts."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ArgumentError(f"{name} is {shown(value)}: give a mapping, name -> value")
    if len(value) < least:
        raise ArgumentError(f"got no {name}: give at least one")
    return dict(value)


def as_many(one: str, first: Collection[Any], other: str, second: Collection[Any]) -> None:
    """Raise ArgumentError unless there are as many of the one as of the other."""
    if len(first) != len(second):
        raise ArgumentError(f"got {len(first)} {one} and {len(second)} {other}: give as many of each")


def of_kind(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """A value of a class, or of one of several."""
    if not isinstance(value, kind):
        names = " or a ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ArgumentError(f"{name} is {shown(value)}: give a {names}")
    return value


def having(name: str, value: Any, expected: str, *attributes: str) -> Any:
    """Anything that has these attributes. expected: what to give instead, in words."""
    missing = [one for one in attributes if not hasattr(value, one)]
    if missing or isinstance(value, type):
        raise ArgumentError(f"{name} is {shown(value)}: give {expected}")
    return value


def tensor(name: str, value: Any, shape: str, *, floating: bool = True) -> Any:
    """A tensor of a shape such as "n, 4, height, width", in which numbers must be met; of floats, or of integers."""
    sides = shape.split(", ")
    kind = "floats" if floating else "integers"
    expected = f"a tensor of {kind}, ({shape}{',' if len(sides) == 1 else ''})"
    if not all(hasattr(value, name) for name in ("detach", "is_floating_point", "shape")):
        raise ArgumentError(f"{name} is {shown(value)}: give {expected}")
    fits = value.ndim == len(sides) and all(
        not side.isdigit() or int(side) == own for side, own in zip(sides, value.shape, strict=True)
    )
    if not fits or value.is_floating_point() != floating or value.is_complex() or not value.numel():
        raise ArgumentError(f"{name} is {shown(value)} of {value.dtype}: give {expected}")
    return value


def function(name: str, value: Any) -> Any:
    """Something that can be called, or None."""
    if value is not None and not callable(value):
        raise ArgumentError(f"{name} is {shown(value)}: give a function, or None")
    return value

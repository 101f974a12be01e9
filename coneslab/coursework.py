"""Checks for exercises that say what they got, what they expected, and where to look.

The test cells of the notebooks in `coursework/source` call them; `make assignments` makes the students' versions of
these notebooks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_SHOWN = 8  # how many entries of an array a message shows; of a longer one it shows the worst


def check(name: str, got: Any, expected: Any, *, hint: str = "", tolerance: float = 0.0, relative: float = 0.0) -> None:
    """Compare an answer with the right one.

    name: what is compared, in the student's words. got, expected: numbers, arrays or tensors of one shape, which may
    differ by `tolerance` + `relative` · |expected| in each entry; anything else is compared with `==`. hint: where
    to look if the answer is wrong. Raises AssertionError with got, expected and hint, each on a line of its own.

    >>> check("the signal-to-noise ratio", 1 / 3, 0.25 / 0.75, tolerance=1e-6)
    the signal-to-noise ratio: right
    """
    wanted = None if isinstance(expected, bool) else _numbers(expected)
    if wanted is None:
        if not _equal(got, expected):
            _wrong(name, _shown(got), _shown(expected), hint)
    else:
        _check_numbers(name, got, wanted, hint, tolerance, relative)
    print(f"{name}: right")


def check_range(name: str, got: Any, low: float, high: float, *, hint: str = "") -> None:
    """Check that a number lies in [low, high]: for measurements, which have no single right value.

    Arguments and errors as in `check`.

    >>> check_range("the share of cats", 0.75, 0.5, 1)
    the share of cats: right
    """
    value, wanted = _numbers(got), f"one number from {low:g} to {high:g}"
    if value is None or value.size != 1:
        _wrong(name, _shown(got), wanted, hint)
    elif not low <= float(value.reshape(())) <= high:
        _wrong(name, _shown(value), wanted, hint)
    print(f"{name}: right")


def _check_numbers(name: str, got: Any, wanted: np.ndarray, hint: str, tolerance: float, relative: float) -> None:
    values = _numbers(got)
    if values is None:
        _wrong(name, _shown(got), f"{_kind(wanted)}: {_shown(wanted)}", hint)
    elif values.shape != wanted.shape:
        _wrong(name, f"{_kind(values)}: {_shown(values)}", f"{_kind(wanted)}: {_shown(wanted)}", hint)
    else:
        with np.errstate(invalid="ignore"):  # infinity minus itself, or times 0
            off = np.abs(values - wanted)
            right = (values == wanted) | (off <= tolerance + relative * np.abs(wanted))
        if right.all():
            return
        if wanted.size <= _SHOWN:
            _wrong(name, _shown(values), _shown(wanted), hint)
        worst = np.unravel_index(np.where(right, -1, np.nan_to_num(off, nan=np.inf)).argmax(), wanted.shape)
        place = f"at [{', '.join(map(str, worst))}]"
        count = f"{(~right).sum():,} of {right.size:,} entries wrong"
        _wrong(name, f"{values[worst]:.6g} {place}, the worst; {count}", f"{wanted[worst]:.6g} {place}", hint)


def _numbers(value: Any) -> np.ndarray | None:
    """Numbers as float64, or None for anything else."""
    if hasattr(value, "detach"):  # a tensor, on any device
        value = value.detach().cpu()
        value = value.numpy() if value.dtype.itemsize > 2 or not value.dtype.is_floating_point else value.float()
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return None
    return array.astype(np.float64) if array.dtype.kind in "biuf" else None


def _equal(got: Any, expected: Any) -> bool:
    try:
        return bool(got == expected)
    except (TypeError, ValueError, RuntimeError):  # an array where, say, a word was expected
        return False


def _kind(values: np.ndarray) -> str:
    return f"numbers of shape {values.shape}" if values.ndim else "one number"


def _shown(value: Any) -> str:
    if value is None:
        return "None (does the function return its result?)"
    if isinstance(value, np.ndarray):
        if value.size > _SHOWN:
            return f"from {value.min():.6g} to {value.max():.6g}"
        each = np.array2string(value, separator=", ", formatter={"all": lambda entry: f"{entry:.6g}"})
        return " ".join(each.split())
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def _wrong(name: str, got: str, expected: str, hint: str) -> None:
    lines = [f"{name}: not yet right", f"  got:      {got}", f"  expected: {expected}"]
    raise AssertionError("\n".join([*lines, f"  hint:     {hint}"] if hint else lines))

"""Settings of the methods as data: frozen dataclasses that are saved with what they made and can be passed back in.

A method takes them whole, or field by field, or both: `custom_diffusion(pipe, subject, steps=100)` is short for
`custom_diffusion(pipe, subject, CustomDiffusionSettings(steps=100))`, and `custom_diffusion(pipe, other,
edit.settings)` repeats for another subject what made an edit.

`ByValue` is for dataclasses that hold arrays: it lets them be compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from .errors import ArgumentError, ConeslabError

Function = TypeVar("Function", bound=Callable[..., Any])


class ByValue:
    """Equality of a dataclass (with eq=False) that holds arrays or tensors, which `==` would compare entry by entry.

    NaN is equal to NaN.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays can change

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    return bool(one == other) or bool(one != one and other != other)


def _bytes(array: Any) -> bytes:
    """Of an array, or of a tensor on any device."""
    return np.asarray(array.detach().cpu().float() if hasattr(array, "detach") else array).tobytes()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the methods' settings; a subclass is a frozen dataclass whose docstring says what each field is.

    method: the name that is saved beside the fields.
    """

    method: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Refuse values that make no sense; a subclass also calls `super().__post_init__()`."""

    def record(self) -> dict[str, Any]:
        """The fields by name, and the method's name under "method": what an edit stores, as JSON can hold it."""
        values = asdict(self).items()
        return {"method": self.method} | {name: list(one) if isinstance(one, tuple) else one for name, one in values}

    @classmethod
    def chosen(cls, given: Self | Mapping[str, Any] | None, changes: Mapping[str, Any]) -> Self:
        """Settings as the caller gave them (whole, as the record of an earlier run, or None), with the changes applied.

        Raises ConeslabError for a field that the method does not have, or for the record of another method.
        """
        if isinstance(given, Settings) and not isinstance(given, cls):
            raise ConeslabError(f"got {type(given).__name__}, expected {cls.__name__}: each has settings of its own")
        if isinstance(given, Mapping):
            if given.get("method", cls.method) != cls.method:
                raise ConeslabError(f"got settings of {given['method']!r}, expected those of {cls.method!r}")
            kept = "method" in given  # by an edit, which keeps more beside them
            changes = {**{name: one for name, one in given.items() if not kept or name in cls._names()}, **changes}
            given = None
        elif not (given is None or isinstance(given, cls)):
            raise ArgumentError(
                f"settings are {given!r}: give {cls.__name__}(...), the settings that an edit keeps, or None"
            )
        unknown = [name for name in changes if name not in cls._names()]
        if unknown:
            raise ConeslabError(
                f"{', '.join(unknown)}: not a setting of {cls.method}; these are: {', '.join(cls._names())}"
            )
        return cls(**changes) if given is None else replace(given, **changes)

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def _check(self, check: Callable[..., Any], *names: str, optional: bool = False, **options: Any) -> None:
        """Replace fields by what one of the `checks` makes of them; options: its own; optional: None is allowed."""
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None):
                found = check(name, value, **options)
                object.__setattr__(self, name, tuple(found) if isinstance(found, list) else found)


def takes(settings: type[Settings]) -> Callable[[Function], Function]:
    """Show a method's settings in its signature, so that `help` and completion list what `**changes` may be."""

    def documented(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {one.name for one in own}
        more = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(settings)
            if field.name not in names
        ]
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return documented

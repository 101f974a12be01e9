"""Edits: anything that can be applied to a pipeline inside a `with` block, and stored in a file.

`Edit` is the base class of every kind, with the file format that all share; `Combined` makes one edit of several, and
`load_edit` reads any of them.
"""

from __future__ import annotations

import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, SupportsIndex

from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .. import checks
from ..blocks import Nested
from ..diffusion.checks import require_pipeline
from ..diffusion.pipelines import Pipeline
from ..errors import ConeslabError, FileFormatError
from ..files import read_tensors, sealed, tensor_sum, write_whole
from .timed import ALL_PARTS, applied_in, in_steps, require_dose

FORMAT = "coneslab.edit/1"
_KINDS: dict[str, type[Edit]] = {}  # by class name, which is what a file stores
# Rooms above this one that define kinds. No module here needs them; they are imported when a file holds such a kind.
_ROOMS_WITH_KINDS = ("coneslab.neurons", "coneslab.methods")
_REMEDY = "download or make it again; pickle files (.pt, .bin, .ckpt) are never loaded"


class Edit(ABC):
    """What every edit can do; methods differ in how they make one, not in how it is used.

    A subclass is a kind of edit, known to `load_edit` by the name of its class from the moment it is defined. It says
    how it is applied (`applied`) and how large it is (`nbytes`), packs itself into tensors and a description that JSON
    can hold (`_pack`), and restores itself from them (`_unpack`). All kinds share one file format, in safetensors, with
    a SHA-256 of the contents in the metadata, so that a damaged file is never taken for another edit.
    Defining one raises ConeslabError if another module has a kind of that name; within one module, as when a notebook
    cell is run again, the new class replaces the old.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = _KINDS.get(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise ConeslabError(
                f"{cls.__module__} defines a kind of edit named {cls.__name__}, as {known.__module__} does: rename one "
                "of them, because a file stores nothing but the name"
            )
        _KINDS[cls.__name__] = cls

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what the edit stores, without settings and history."""

    @property
    def acts_on(self) -> frozenset[str]:
        """Which parts of a pipeline it changes or has to know about: "text encoder", "U-Net"."""
        return ALL_PARTS

    @property
    def in_weights(self) -> bool:
        """Whether a pipeline saved inside the `with` block holds it: not so an edit that acts at some words only."""
        return True

    @abstractmethod
    def applied(
        self,
        pipe: Pipeline,
        dose: float = 1.0,
        *,
        steps: tuple[float, float] | None = None,
        check_model: bool = True,
    ) -> AbstractContextManager[Pipeline]:
        """Apply the edit inside a `with` block; dose 0 changes nothing, 1 is the whole edit.

        steps: two shares of the schedule between which it is on, default all (see `edits.applied`); a kind of your own
        has it by the decorator `in_steps`. check_model=False allows another model than the one it was made for.
        Raises MismatchError, with the pipeline untouched, for another model.
        """

    @abstractmethod
    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and a description that JSON can hold."""

    @classmethod
    @abstractmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> Self:
        """The inverse of `_pack`; both arguments may be modified."""

    def __eq__(self, other: object) -> bool:
        """Same kind and same contents: all that a file of it would hold."""
        return self is other or (type(self) is type(other) and self.digest() == other.digest())

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        """SHA-256, in hex, of its contents: equal for equal edits of one kind, in any process."""
        tensors, description = self._pack()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return tensor_sum(tensors, {"description": json.dumps(description, sort_keys=True, default=repr)})

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copied and pickled as its fields, and made anew from them: what is read-only in it stays read-only."""
        if not is_dataclass(self):
            return super().__reduce_ex__(protocol)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        return _made, (type(self), plain)

    def save(self, path: str | Path) -> Path:
        """Write the edit to a safetensors file, atomically: an interruption leaves no half-written file."""
        tensors, description = self._pack()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(description, sort_keys=True)
        metadata = {"format": FORMAT, "kind": type(self).__name__, "description": text}
        return write_whole(path, safetensors_bytes(tensors, sealed(tensors, metadata)))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an edit of this class. Raises FileFormatError for any other file, whole or damaged."""
        edit = load_edit(path)
        if not isinstance(edit, cls):
            raise FileFormatError(f"{path} holds a {type(edit).__name__}, not a {cls.__name__}: use load_edit")
        return edit


def _made(kind: type[Edit], values: dict[str, Any]) -> Edit:
    return kind(**values)


def applied(
    edit: Edit | None, pipe: Pipeline, dose: float = 1.0, *, steps: tuple[float, float] | None = None
) -> AbstractContextManager[Pipeline]:
    """Apply an edit inside a `with` block; None leaves the pipeline as it is.

    steps: two shares of the schedule, from which and before which it is on; elsewhere it is as at dose 0. 0 is all
    noise, 1 is clean, told by the timestep of each call of the U-Net: see `diffusion.steps`. So it holds for every run
    in the block, for samplers that call the network twice a step, and for a run that starts from a picture at strength
    0.4 and therefore at a share of 0.6. A share in which a run has no step is no error: the edit is never on. Within
    its share it acts on top of all other blocks but the timed edits entered after it. An edit of text needs prompts
    that are given as text inside the block. (`generate` does without its fast copy, and a compiled pipeline computes
    uncompiled.)
    Raises ArgumentError unless the shares are two in order, each from 0 to 1.

    >>> from coneslab.edits import applied
    >>> from coneslab.methods import closed_form_edit
    >>> pipe = coneslab.load("tiny")
    >>> forget = closed_form_edit(pipe, "a cat", "a dog")
    >>> with applied(forget, pipe, steps=(0.0, 0.3)):  # while the composition is laid down
    ...     early = coneslab.generate(pipe, "a cat", sampler_steps=4)
    >>> with applied(forget, pipe, steps=(0.3, 1.0)):
    ...     late = coneslab.generate(pipe, "a cat", sampler_steps=4)
    >>> early == late
    False
    """
    require_pipeline(pipe)
    require_dose(dose)
    if require_edit(edit) is None:
        if steps is not None:
            checks.interval("share of the schedule (steps)", steps)
        return nullcontext(pipe)
    apply = edit.applied  # type: ignore[union-attr]
    if steps is None:
        return apply(pipe, dose)
    if "steps" in inspect.signature(apply).parameters:  # which puts it on at each call without checking all anew
        return apply(pipe, dose, steps=steps)
    return applied_in(apply, edit, pipe, dose, steps)


def require_edit(edit: Any) -> Any:
    """An edit, or None. Raises ArgumentError for anything else, such as the path of a file."""
    return edit if edit is None else checks.having("edit", edit, "an edit, such as load_edit(file), or None", "applied")


def load_edit(path: str | Path) -> Edit:
    """Read any edit from its file: concept neurons, a weight delta, several edits combined.

    A kind of your own is known once the module that defines it has been imported.
    Raises FileFormatError if the kind is not known, or the file is truncated, damaged, of another format, or a pickle
    (never loaded), and MissingFileError if there is none.

    >>> from coneslab.methods import closed_form_edit
    >>> edit = closed_form_edit(coneslab.load("tiny"), "a cat", "a dog")
    >>> path = edit.save("cat-to-dog.safetensors")
    >>> coneslab.load_edit(path)
    WeightDelta('a cat': ... weights in ... layers, model ...)
    """
    tensors, metadata = read_tensors(path, FORMAT, remedy=_REMEDY)
    kind = metadata.get("kind", "an edit")
    try:
        edit = _unpacked(metadata["kind"], tensors, json.loads(metadata["description"]))
        dict(getattr(edit, "settings", {}))  # what lists edits asks each for them
        return edit
    except Exception as error:  # a forged file may have the right checksum, and anything in it
        raise FileFormatError(f"{path} cannot be read as {kind}: {error}") from error


def _unpacked(kind: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> Edit:
    """An edit of the kind named; imports the package's own rooms if the kind is not known yet."""
    for room in _ROOMS_WITH_KINDS:
        if kind not in _KINDS:
            importlib.import_module(room)
    if kind not in _KINDS:
        raise ConeslabError(
            f"no kind of edit named {kind} is known here: import the module that defines it, or update coneslab if it "
            "comes from there"
        )
    return _KINDS[kind]._unpack(tensors, description)


@dataclass(frozen=True, eq=False)
class Combined(Edit):
    """Several edits applied one after the other, in order; itself an edit.

    dose: how much of each of them is the whole of this edit, in [0, 1]. Masks of several subjects, for example, compose
    better when each is on in part.
    """

    edits: tuple[Edit, ...]
    dose: float = 1.0

    def __post_init__(self) -> None:
        edits = checks.items("edits", self.edits, Edit, least=0)
        object.__setattr__(self, "edits", tuple(edits))
        object.__setattr__(self, "dose", checks.number("dose", self.dose, checks.SHARE, kind="share"))

    @property
    def nbytes(self) -> int:
        return sum(edit.nbytes for edit in self.edits)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of all parts, if they have the same, as the parts of one method do; otherwise none."""
        first, *others = (dict(getattr(edit, "settings", {})) for edit in self.edits) if self.edits else ({},)
        return first if all(other == first for other in others) else {}

    @property
    def acts_on(self) -> frozenset[str]:
        return frozenset().union(*(edit.acts_on for edit in self.edits))

    @property
    def in_weights(self) -> bool:
        return all(edit.in_weights for edit in self.edits)

    @in_steps
    def applied(
        self, pipe: Pipeline, dose: float = 1.0, *, check_model: bool = True
    ) -> AbstractContextManager[Pipeline]:
        """Apply all edits inside a `with` block, each at this share of the own dose. Raises what any of them raises."""
        own = dose * self.dose
        return Nested(lambda: (edit.applied(pipe, own, check_model=check_model) for edit in self.edits), pipe)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        descriptions = []
        for number, edit in enumerate(self.edits):
            parts, description = edit._pack()
            tensors |= {f"{number}:{name}": tensor for name, tensor in parts.items()}
            descriptions.append([type(edit).__name__, description])
        return tensors, {"edits": descriptions} | ({} if self.dose == 1 else {"dose": self.dose})

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> Combined:
        edits = []
        for number, (kind, part) in enumerate(description["edits"]):
            own = {key.split(":", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{number}:")}
            edits.append(_unpacked(kind, own, part))
        return cls(tuple(edits), description.get("dose", 1.0))

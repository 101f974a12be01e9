"""Edits: anything that can be put on a pipeline for the length of a `with` block, and stored in a file.

`StoredEdit` gives every edit its file format, `Combined` makes one of several, and `load_edit` reads any of them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..diffusion.pipelines import Pipeline
from ..errors import ConeslabError, FileFormatError
from ..files import write_whole

Stored = TypeVar("Stored", bound="StoredEdit")

FORMAT = "coneslab.edit/1"
# Which module defines an edit, so that a file can be read before that module was ever imported.
KINDS = {
    "WeightDelta": "coneslab.edits.weights",
    "Combined": "coneslab.edits.base",
    "ConceptNeurons": "coneslab.neurons.mask",
    "TunedNeurons": "coneslab.neurons.union",
    "TokenEdit": "coneslab.edits.tokens",
    "LowRankDelta": "coneslab.edits.low_rank",
    "Decomposition": "coneslab.methods.conceptor.decomposition",
}


@runtime_checkable
class Edit(Protocol):
    """What every edit can do; methods differ in how they make one, not in how it is used."""

    @property
    def nbytes(self) -> int:
        """Bytes of what the edit stores, without settings and history."""

    def applied(self, pipe: Pipeline, dose: float = 1.0) -> AbstractContextManager[Pipeline]:
        """Put the edit on for the length of a `with` block; dose 0 changes nothing, 1 is the whole edit."""

    def save(self, path: str | Path) -> Path:
        """Write the edit to a safetensors file."""


def applied(edit: Edit | None, pipe: Pipeline, dose: float = 1.0) -> AbstractContextManager[Pipeline]:
    """The edit put on for the length of a block, or for None the pipeline as it is."""
    return nullcontext(pipe) if edit is None else edit.applied(pipe, dose)


def require_dose(dose: float) -> None:
    """Raise ConeslabError unless a dose is a finite number."""
    if not -float("inf") < dose < float("inf"):
        raise ConeslabError(f"dose is {dose}: give a finite number, 0 for no effect and 1 for the whole edit")


class StoredEdit:
    """Base of the edits: one file format for all, in safetensors.

    A subclass packs itself into tensors and a JSON-able description, and unpacks itself again. The file's metadata
    hold a SHA-256 of both, so that a damaged file is never taken for another edit.
    """

    @property
    def nbytes(self) -> int:
        raise NotImplementedError

    def applied(self, pipe: Pipeline, dose: float = 1.0) -> AbstractContextManager[Pipeline]:
        raise NotImplementedError

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise NotImplementedError

    @classmethod
    def _unpack(cls: type[Stored], tensors: dict[str, Tensor], description: dict[str, Any]) -> Stored:
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the edit to a safetensors file, in one go: an interruption leaves no half-written file."""
        tensors, description = self._pack()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(description, sort_keys=True)
        metadata = {"format": FORMAT, "kind": type(self).__name__, "description": text}
        metadata["checksum"] = _checksum(tensors, metadata)
        return write_whole(path, safetensors_bytes(tensors, metadata))

    @classmethod
    def load(cls: type[Stored], path: str | Path) -> Stored:
        """Read an edit of this class. Raises FileFormatError for any other file, whole or damaged."""
        edit = load_edit(path)
        if not isinstance(edit, cls):
            raise FileFormatError(f"{path} holds a {type(edit).__name__}, not a {cls.__name__}: use load_edit")
        return edit


def load_edit(path: str | Path) -> StoredEdit:
    """Read whatever edit a file holds: concept neurons, a weight delta, several edits combined.

    Raises FileFormatError if the file is truncated, damaged, of another make, or a pickle (never loaded), and
    FileNotFoundError if there is none.
    """
    tensors, metadata = _read(Path(path))
    kind = metadata["kind"]
    if kind not in KINDS:
        raise FileFormatError(f"{path} holds a {kind!r}, which this version of coneslab does not know: update it")
    try:
        cls = getattr(importlib.import_module(KINDS[kind]), kind)
        return cls._unpack(tensors, json.loads(metadata["description"]))
    except (ConeslabError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{path} does not hold a valid {kind}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises several kinds, by what is damaged
        raise FileFormatError(
            f"{path} is not a whole safetensors file ({error}): it may be truncated, or of another format; "
            "pickle files (.pt, .bin, .ckpt) are never loaded"
        ) from error
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"{path} is a safetensors file, but not a coneslab edit: its format is {metadata.get('format')!r}, "
            f"expected {FORMAT!r}"
        )
    checksum = metadata.pop("checksum", "")
    if {"kind", "description"} - set(metadata) or checksum != _checksum(tensors, metadata):
        raise FileFormatError(f"{path} is damaged: its contents do not match their checksum; fetch or make it again")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Combined(StoredEdit):
    """Several edits put on one after the other, the first one first; itself an edit."""

    edits: tuple[StoredEdit, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))

    @property
    def nbytes(self) -> int:
        return sum(edit.nbytes for edit in self.edits)

    @contextmanager
    def applied(self, pipe: Pipeline, dose: float = 1.0) -> Iterator[Any]:
        """Put all edits on for the length of a block, each at this dose. Raises what any of them raises."""
        with ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(edit.applied(pipe, dose))
            yield pipe

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        descriptions = []
        for number, edit in enumerate(self.edits):
            parts, description = edit._pack()
            tensors |= {f"{number}:{name}": tensor for name, tensor in parts.items()}
            descriptions.append([type(edit).__name__, description])
        return tensors, {"edits": descriptions}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> Combined:
        edits = []
        for number, (kind, part) in enumerate(description["edits"]):
            own = {name.split(":", 1)[1]: x for name, x in tensors.items() if name.startswith(f"{number}:")}
            edits.append(getattr(importlib.import_module(KINDS[kind]), kind)._unpack(own, part))
        return cls(tuple(edits))

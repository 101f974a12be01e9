"""Edits: anything that can be put on a pipeline for the length of a `with` block, and stored in a file.

`swapped` changes weights and puts them back bit for bit; `StoredEdit` gives every edit its file format; `WeightDelta`
is a dense change of weights, `Combined` several edits as one; `load_edit` reads any of them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..diffusion.kvspace import KVSpace, unet_of
from ..diffusion.pipelines import fingerprint as fingerprint_of
from ..errors import ConeslabError, FileFormatError, MismatchError
from .undo import Undo

Change = tuple[Tensor, Tensor]
Stored = TypeVar("Stored", bound="StoredEdit")

FORMAT = "coneslab.edit/1"
# Which module defines an edit, so that a file can be read before that module was ever imported.
KINDS = {
    "WeightDelta": "coneslab.edits.base",
    "Combined": "coneslab.edits.base",
    "ConceptNeurons": "coneslab.neurons.mask",
    "TunedNeurons": "coneslab.neurons.union",
    "TokenEdit": "coneslab.edits.tokens",
    "LowRankDelta": "coneslab.edits.low_rank",
    "Decomposition": "coneslab.methods.conceptor.decomposition",
}

_ACTIVE: list[swapped] = []  # the blocks now open, outermost first


@runtime_checkable
class Edit(Protocol):
    """What every edit can do; methods differ in how they make one, not in how it is used."""

    @property
    def nbytes(self) -> int:
        """Bytes of what the edit stores, without settings and history."""

    def applied(self, pipe: Any, dose: float = 1.0) -> AbstractContextManager[Any]:
        """Put the edit on for the length of a `with` block; dose 0 changes nothing, 1 is the whole edit."""

    def save(self, path: str | Path) -> Path:
        """Write the edit to a safetensors file."""


def applied(edit: Edit | None, pipe: Any, dose: float = 1.0) -> AbstractContextManager[Any]:
    """The edit put on for the length of a block, or for None the pipeline as it is."""
    return nullcontext(pipe) if edit is None else edit.applied(pipe, dose)


class swapped:
    """Give parameters other values for the length of a block, and put the old ones back bit for bit.

    changes: pairs of a parameter and its new values of the same shape, or a function that returns them. The function
    is called on entering, so that it sees the weights as they then are; what it refuses leaves nothing touched.
    value: what `with ... as` gives. Weights are restored on normal exit, errors and KeyboardInterrupt, also when
    entering fails or is interrupted halfway. Blocks nest, and may even be left in another order than they were
    entered. Values are copied in place, so that optimisers, aliases and compiled modules see them.
    Raises MismatchError for a shape that does not fit.
    """

    def __init__(self, changes: Iterable[Change] | Callable[[], Iterable[Change]], value: Any = None) -> None:
        self._changes, self._value = changes, value
        self._saved: dict[int, Change] = {}  # id of a parameter -> the parameter, its old values
        self._undo = Undo()

    def __enter__(self) -> Any:
        if self._undo:
            raise ConeslabError("this block is already open: call applied(...) again for a second one")
        changes = list(self._changes() if callable(self._changes) else self._changes)
        for parameter, new in changes:
            if parameter.shape != new.shape:
                raise MismatchError(
                    f"a parameter of shape {tuple(parameter.shape)} cannot take values of shape {tuple(new.shape)}"
                )
        self._saved = {id(parameter): (parameter, parameter.detach().clone()) for parameter, _ in changes}
        try:
            self._undo.add(self._close)
            for key in self._saved:
                self._undo.add(lambda key=key: self._restore(key))  # type: ignore[misc]
            _ACTIVE.append(self)
            for parameter, new in changes:
                parameter.detach().copy_(new)
            return self._value  # in here: an interruption on this line, too, must restore
        except BaseException:
            self._undo.run()
            raise

    def __exit__(self, *exception: object) -> None:
        self._undo.run()

    def _restore(self, key: int) -> None:
        parameter, old = self._saved[key]
        later = _ACTIVE[_ACTIVE.index(self) + 1 :] if self in _ACTIVE else []
        for block in later:
            if key in block._saved:  # left out of order: the block opened after this one restores for both
                block._saved[key] = (parameter, old)
                return
        parameter.detach().copy_(old)

    def _close(self) -> None:
        if self in _ACTIVE:
            _ACTIVE.remove(self)
        self._saved = {}


def untouched(parameter: Tensor) -> Tensor:
    """The values a parameter had before any block now open changed it (itself where none did)."""
    for block in _ACTIVE:
        if id(parameter) in block._saved:
            return block._saved[id(parameter)][1]
    return parameter


def model_fingerprint(pipe: Any) -> str:
    """Fingerprint of a pipeline's K-V weights without the edits now on it: says which model an edit belongs to."""
    return fingerprint_of({name: untouched(weight) for name, weight in KVSpace(pipe).parameters.items()})


def require_model(expected: str, pipe: Any, what: str) -> None:
    """Raise MismatchError unless `expected` is the fingerprint of the pipeline's model, edits left aside."""
    given = model_fingerprint(pipe)
    if given != expected:
        raise MismatchError(
            f"{what} belongs to model {expected[:8]}…, this pipeline is {given[:8]}…: load the model it was found on, "
            "or find it again on this one (fingerprints cover the exact K-V weights, so their precision too)"
        )


def require_dose(dose: float) -> None:
    """Raise ConeslabError unless a dose is a finite number."""
    if not -float("inf") < dose < float("inf"):
        raise ConeslabError(f"dose is {dose}: give a finite number, 0 for no effect and 1 for the whole edit")


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file in one go: an interruption leaves the old one, or none, but no half-written one.

    Folders on the way are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


class StoredEdit:
    """Base of the edits: one file format for all, in safetensors.

    A subclass packs itself into tensors and a JSON-able description, and unpacks itself again. The file's metadata
    hold a SHA-256 of both, so that a damaged file is never taken for another edit.
    """

    @property
    def nbytes(self) -> int:
        raise NotImplementedError

    def applied(self, pipe: Any, dose: float = 1.0) -> AbstractContextManager[Any]:
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


@dataclass(frozen=True, eq=False, repr=False)
class WeightDelta(StoredEdit):
    """A dense change of some of the U-Net's weights: W + dose · ΔW, as fine-tuning makes it.

    deltas: name of a weight inside the U-Net -> its change, float32, of the same shape; fingerprint: of the K-V
    weights of the model it was made for; settings and history: how it was made.
    Raises ConeslabError if a delta is not finite.
    """

    deltas: Mapping[str, Tensor]
    fingerprint: str
    subject: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        deltas = {name: delta.detach().to("cpu", torch.float32) for name, delta in self.deltas.items()}
        for name, delta in deltas.items():
            if not delta.isfinite().all():
                raise ConeslabError(f"the delta of {name} holds NaN or infinity: tune with a lower learning rate")
        object.__setattr__(self, "deltas", deltas)

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for delta in self.deltas.values())

    def __repr__(self) -> str:
        count = sum(delta.numel() for delta in self.deltas.values())
        where = f"{count:,} weights in {len(self.deltas)} layers, model {self.fingerprint[:8]}"
        return f"WeightDelta({self.subject!r}: {where})"

    def applied(self, pipe: Any, dose: float = 1.0, *, check_model: bool = True) -> AbstractContextManager[Any]:
        """Add dose · ΔW to the weights for the length of a block (`with delta.applied(pipe): ...`).

        check_model=False tries the delta on another model of the same shapes.
        Raises MismatchError, with the pipeline untouched, if model or shapes differ.
        """
        require_dose(dose)

        def changes() -> Iterator[Change]:
            if check_model:
                require_model(self.fingerprint, pipe, "this weight delta")
            weights = dict(unet_of(pipe).named_parameters())
            for name, delta in self.deltas.items():
                if name not in weights:
                    raise MismatchError(f"the U-Net has no weight {name}: this delta was made for another one")
                weight = weights[name].detach()
                if weight.shape != delta.shape:
                    raise MismatchError(f"{name} is {tuple(weight.shape)}, the delta is {tuple(delta.shape)}")
                precision = torch.promote_types(weight.dtype, torch.float32)
                yield weights[name], weight.to(precision) + dose * delta.to(weight.device, precision)

        return swapped(changes, pipe)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        description = {"fingerprint": self.fingerprint, "subject": self.subject}
        history = {key: list(values) for key, values in self.history.items()}
        return dict(self.deltas), {**description, "settings": dict(self.settings), "history": history}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> WeightDelta:
        return cls(tensors, **description)


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
    def applied(self, pipe: Any, dose: float = 1.0) -> Iterator[Any]:
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

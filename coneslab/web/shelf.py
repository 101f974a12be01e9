"""The edits that a page offers, in plain form.

Plain: where a mask file is coded to its entropy bound, here the distances from one shut neuron to the next are written
as bytes, which a page reads in six lines. A range decoder with its models of geometric runs would be some two hundred
lines of JavaScript, to be kept equal to `constriction` bit by bit, and would save about 3 kB a mask where the runtime
takes megabytes. Ablations are written as thin matrices in float16: they change each matrix by a few directions, and a
dense difference would be several times as large.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checks
from ..diffusion.checks import require_editable
from ..diffusion.kvspace import KVLayout, KVSpace
from ..diffusion.pipelines import Pipeline
from ..edits.base import Combined, Edit, load_edit
from ..edits.low_rank import LowRankDelta, compress
from ..edits.weights import WeightDelta, require_model
from ..errors import ArgumentError, ConeslabError, MissingFileError
from ..files import require_writable, user_path
from ..methods.ablation.uce import closed_form_edit
from ..neurons.mask import ConceptNeurons
from ..neurons.ready import ready_neurons
from ..neurons.scope import word_ids
from ..world.subjects import SUBJECTS, subject

ENERGY = 1 - 1e-6  # of an ablation that is kept: its error is then that of float16
_SUBJECTS: dict[str, dict[str, Any]] = {"cat": {"scope": "subject"}, "car": {"scope": "subject"}, "dog": {}}
_TARGET, _ANCHOR = "a cat", "a dog"
_KEPT = ("a rabbit", "a car", "a robot", "a house")  # prompts that the ablation holds on to


@dataclass(frozen=True)
class Shelved:
    """An edit on a page's shelf.

    name: short, for addresses and files, of letters, digits and "-"; title: what the page calls it; phrase: what it is
    about, as prompts name it ("a sks cat"); prompt: what to draw with it.
    """

    name: str
    title: str
    phrase: str
    prompt: str
    edit: Edit

    def __post_init__(self) -> None:
        if re.fullmatch(r"[\w-]+", checks.text("name", self.name)) is None:
            raise ArgumentError(f"name is {self.name!r}: give letters, digits and dashes alone")
        checks.text("title", self.title)
        checks.text("phrase", self.phrase, blank=True)
        checks.text("prompt", self.prompt, blank=True)
        checks.of_kind("edit", self.edit, Edit)


def plain(edit: Edit, pipe: Pipeline) -> tuple[bytes, list[dict[str, Any]]]:
    """An edit of the K-V weights as bytes, and what they are: one entry for each part.

    {"kind": "mask", "count", "graded", "words", "scope", "bytes"}: for each scaled neuron in turn the distance to the
    one before, in the order of the flat vector, 7 bits a byte, lowest first, the eighth set if more follow; then, if it
    is graded, the scales, float32. words and scope: where it acts, as words and as token ids; empty for everywhere.
    {"kind": "delta", "ranks", "bytes"}: for each layer that has a rank, in the order of the flat vector, (channels out,
    rank) and (rank, text width), float16, whose product is the change.
    Raises ConeslabError for an edit that changes anything else, MismatchError for one of another model.
    """
    require_editable(pipe)
    checks.of_kind("edit", edit, Edit)
    _require_drawable(edit, pipe)
    layout, data, parts = KVSpace(pipe).layout, [], []
    for part, dose in _parts(edit):
        if isinstance(part, ConceptNeurons):
            raw, entry = _mask(part, dose, pipe)
        else:
            raw, entry = _delta(part, dose, layout)
        data.append(raw)
        parts.append(entry | {"bytes": len(raw)})
    return b"".join(data), parts


def _require_drawable(edit: Edit, pipe: Pipeline) -> None:
    """Raise ConeslabError, saying why, for an edit that a page cannot draw with: see `plain`."""
    names = set(KVSpace(pipe).layout.names)
    for part, _ in _parts(edit):
        deltas = part.deltas if isinstance(part, WeightDelta) else {}
        factors = part.factors if isinstance(part, LowRankDelta) else {}
        matrices = all(delta.ndim == 2 for delta in deltas.values()) and names >= {*deltas, *factors}
        if not isinstance(part, ConceptNeurons) and not (matrices and (deltas or factors)):
            raise ConeslabError(
                f"{part!r} changes more than the keys and values of cross-attention, which a page cannot do: give "
                "masks, closed-form ablations, or other changes of these matrices"
            )
        require_model(part.fingerprint, pipe, "this edit")  # type: ignore[attr-defined]


def _parts(edit: Edit, dose: float = 1.0) -> list[tuple[Edit, float]]:
    """What an edit is made of, each part with its dose."""
    if not isinstance(edit, Combined):
        return [(edit, dose)]
    return [one for part in edit.edits for one in _parts(part, dose * edit.dose)]


def _mask(mask: ConceptNeurons, dose: float, pipe: Pipeline) -> tuple[bytes, dict[str, Any]]:
    if dose != 1:
        mask = replace(mask, scales=1 - dose * (1 - mask.scales))
    graded = bool(mask.scales.any())
    gaps = np.diff(mask.indices, prepend=0).tolist()
    raw = b"".join(map(_seven_bits, gaps)) + (mask.scales.astype("<f4").tobytes() if graded else b"")
    scope = word_ids(pipe.tokenizer, mask.scope) if mask.scope else []
    return raw, {
        "kind": "mask",
        "count": len(mask),
        "graded": graded,
        "words": list(mask.scope),
        "scope": scope,
    }


def _seven_bits(number: int) -> bytes:
    """A whole number, 7 bits a byte, lowest first (LEB128)."""
    found = []
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _delta(edit: Edit, dose: float, layout: KVLayout) -> tuple[bytes, dict[str, Any]]:
    if isinstance(edit, WeightDelta):
        edit = compress(edit, energy=ENERGY)
    assert isinstance(edit, LowRankDelta)
    named = [name for name in layout.names if name in edit.factors]
    pairs = ((dose * left, right) for left, right in (edit.factors[name] for name in named))
    raw = b"".join(factor.to(torch.float16).numpy().tobytes() for pair in pairs for factor in pair)
    return raw, {"kind": "delta", "ranks": {name: edit.ranks[name] for name in named}}


# --- which edits ----------------------------------------------------------------------------------------


def shelf_of(pipe: Pipeline, paths: Iterable[str | Path]) -> list[Shelved]:
    """Edits from files, and from all files of folders that hold edits: `.safetensors`, or `.mask` of `save_mask`.

    Of a folder, those that a page cannot draw with are left out, with a warning.
    Raises MissingFileError without such a file, FileFormatError for one that cannot be read, ConeslabError for one that
    a page cannot draw with.
    """
    require_editable(pipe)
    found: dict[str, Shelved] = {}
    for path in map(user_path, checks.items("paths", paths)):
        files = (
            sorted(one for one in path.glob("*") if one.suffix in (".safetensors", ".mask"))
            if path.is_dir()
            else [path]
        )
        if not files:
            raise MissingFileError(f"{path} holds no edits: give files that end in .safetensors or .mask")
        for file in files:
            edit = ConceptNeurons.load_mask(file, pipe) if file.suffix == ".mask" else load_edit(file)
            try:
                _require_drawable(edit, pipe)
            except ConeslabError as error:
                if file == path:
                    raise type(error)(f"{file}: {error}") from error
                checks.warn(f"{file} is left out of the page: {error}")
                continue
            name = re.sub(r"[^\w]+", "-", file.stem.lower()).strip("-") or "edit"
            if name in found:
                raise ConeslabError(f"two edits would be named {name!r} in the page: rename {file}")
            found[name] = Shelved(name, _title(edit, file.stem), *_prompts(edit), edit)
    return list(found.values())


def _title(edit: Edit, stem: str) -> str:
    about = getattr(edit, "subject", "") or stem
    if isinstance(edit, ConceptNeurons):
        return f"{about}: concept neurons" + (f", at “{' '.join(edit.scope)}” only" if edit.scope else "")
    settings = dict(getattr(edit, "settings", {}))
    if {"target", "anchor"} <= settings.keys():
        return f"{_first(settings['target'])} → {_first(settings['anchor'])}: forgotten, in closed form"
    return f"{about}: {type(edit).__name__}"


def _prompts(edit: Edit) -> tuple[str, str]:
    """What an edit is about, as prompts name it, and what to draw with it."""
    name, settings = getattr(edit, "subject", ""), dict(getattr(edit, "settings", {}))
    phrase = str(settings.get("prompt") or _first(settings.get("target", "")))
    known = subject(name) if name in SUBJECTS else None
    if known is not None and phrase in ("", known.prompt):  # a subject of your own may be named like one of ours
        return known.prompt, known.prompts[0]
    return phrase, phrase


def _first(value: Any) -> str:
    return str(value[0]) if isinstance(value, Sequence) and not isinstance(value, str) and value else str(value or "")


def default_shelf(pipe: Pipeline, kept: str | Path, *, rounds: int = 40, progress: bool = True) -> list[Shelved]:
    """Concept neurons of three subjects of the sticker world, two of them at their words only, and an ablation.

    Neurons that were found before are read, from those that come with the shipped model or from the folder `kept`
    (`ready_neurons`); only else is a subject searched for, in about half a minute on two cores. The ablation has a
    closed form, and is made anew.
    """
    require_editable(pipe)
    kept, shelved = require_writable(kept, folder=True), []
    for name, where in _SUBJECTS.items():
        found = ready_neurons(pipe, subject(name), rounds=rounds, **where, kept=kept, progress=progress)
        shelved.append(Shelved(name, _title(found, name), *_prompts(found), found))
    ablation = closed_form_edit(pipe, _TARGET, _ANCHOR, preserve=_KEPT)
    words = _TARGET.split()[-1], _ANCHOR.split()[-1]
    shown = f"{_TARGET} on the grass"
    return [*shelved, Shelved(f"{words[0]}-to-{words[1]}", _title(ablation, ""), _TARGET, shown, ablation)]

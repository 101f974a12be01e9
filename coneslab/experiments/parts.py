"""What is in a mask: its core, keys and values, heads, what its kind shares, each beside as many neurons at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..diffusion.checks import require_pipeline
from ..diffusion.pipelines import Pipeline
from ..neurons.damage import dropped
from ..neurons.mask import ConceptNeurons
from ..seeds import derived
from ..world.subjects import FAR, NEAR, Subject, table_subjects, truth
from ..world.subjects import subject as subject_named
from .setting import Setting
from .table import Row, rows_of

CORES = {"half": 0.5, "quarter": 0.25}
KINDS = {"keys": "K", "values": "V"}
OTHERS = 7  # subjects of either kind whose masks a subject's is compared with


def only(mask: ConceptNeurons, kept: np.ndarray) -> ConceptNeurons:
    """The neurons of a mask at these places of its own list; all others stay as they are in the model."""
    kept = np.sort(kept)
    return replace(mask, indices=mask.indices[kept], scales=mask.scales[kept], history={})


def core(found: ConceptNeurons, share: float, *, seed: int) -> ConceptNeurons:
    """The most-shut share of a graded mask's shut neurons, as a binary mask; which of equals is chance."""
    binary = found.binary()
    scales = found.scales[np.searchsorted(found.indices, binary.indices)]
    chance = np.random.default_rng(seed).permutation(len(scales))
    return only(binary, np.lexsort((chance, scales))[: round(share * len(scales))])


def heads_in(pipe: Pipeline, mask: ConceptNeurons) -> list[int]:
    """How many heads the attention of every layer of a mask has."""
    require_pipeline(pipe)
    return [pipe.unet.get_submodule(layer.name.rsplit(".", 2)[0]).heads for layer in mask.layout]


def in_densest_heads(mask: ConceptNeurons, heads: Sequence[int]) -> np.ndarray:
    """Which neurons of a mask lie in the head of their layer that holds most of them, (k,) bool.

    heads: of each layer. A layer's rows are its output channels, one head after the other.
    """
    inside = np.zeros(len(mask), bool)
    for layer, count in zip(mask.layout, heads, strict=True):
        first, last = np.searchsorted(mask.indices, [layer.start, layer.start + layer.size])
        rows = (mask.indices[first:last] - layer.start) // layer.shape[1]
        head = rows // (layer.shape[0] // count)
        if len(head):
            inside[first:last] = head == np.bincount(head, minlength=count).argmax()
    return inside


def pieces(found: ConceptNeurons, heads: Sequence[int], *, seed: int) -> Iterator[tuple[str, ConceptNeurons]]:
    """Every part of a mask, and beside it as many of the mask's neurons at random."""
    binary = found.binary()
    yield "whole mask", binary
    made = {f"most-shut {name}": core(found, share, seed=seed) for name, share in CORES.items()}
    made |= {name: binary.within(kind=kind) for name, kind in KINDS.items()}
    inside = in_densest_heads(binary, heads)
    made |= {
        "densest heads": only(binary, np.flatnonzero(inside)),
        "other heads": only(binary, np.flatnonzero(~inside)),
    }
    for name, part in made.items():
        yield name, part
        share = len(part) / max(len(binary), 1)
        yield f"as many as {name}", dropped(binary, 1 - share, seed=derived(seed, name))


def parts(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """What parts of a mask do, and how its neurons lie in the heads of attention."""
    found, own = setting.found(subject, seed), derived(seed, "parts", subject.name)
    binary, heads = found.binary(), heads_in(setting.pipe, found)
    rows = setting.measure(subject, None, seed, condition="untouched model", share=0.0)
    for name, part in pieces(found, heads, seed=own):
        rows += setting.measure(subject, part, seed, condition=name, share=len(part) / max(len(binary), 1))
    for name, mask in (("whole mask", binary), ("random mask", setting.random_mask(binary, subject, seed))):
        if len(mask):
            inside = {"share in the densest heads": float(in_densest_heads(mask, heads).mean())}
            rows += rows_of(inside, condition=name, density=mask.density, share=1.0)
    return rows


def common(masks: Sequence[ConceptNeurons]) -> ConceptNeurons:
    """What more than half of these masks shut, as a binary mask."""
    held = np.bincount(np.concatenate([mask.shut() for mask in masks]), minlength=masks[0].n)
    places = np.flatnonzero(held > len(masks) / 2)
    facts: dict[str, Any] = {"subject": f"common to {len(masks)}", "settings": {}, "history": {}}
    return replace(masks[0].binary(), indices=places, scales=np.zeros(len(places), np.float32), **facts)


def others_by_kind(subject: Subject) -> dict[str, tuple[str, ...]]:
    """The other subjects of a subject's kind, near or far, and those of the other kind; as many of each."""
    kinds = [[name for name in table_subjects(8) if name in kin] for kin in (NEAR, FAR)]
    own, other = kinds if truth(subject.name).kind == "near" else kinds[::-1]
    named = {"its kind": own, "the other kind": other}
    return {kind: tuple([name for name in names if name != subject.name][:OTHERS]) for kind, names in named.items()}


def sharing(setting: Setting, subject: Subject, seed: int) -> list[Row]:
    """How much of a mask the others of its kind share (far subjects: an art style), and what that does by itself.

    What is common to the others is found without this subject: what it draws of it can only be their kind's.
    """
    whole = setting.found(subject, seed).binary()
    chance = setting.random_mask(whole, subject, seed)
    rows = setting.measure(subject, None, seed, condition="untouched model")
    parts_of = {"whole mask": whole}
    for kind, names in others_by_kind(subject).items():
        others = [subject_named(name) for name in names]
        masks = [setting.found(other, seed).binary() for other in others]
        controls = [setting.random_mask(mask, other, seed) for mask, other in zip(masks, others, strict=True)]
        shared, pairs = common(masks), [whole.overlap(mask) for mask in masks]
        inside = np.isin(whole.indices, shared.indices)
        share = float(inside.sum() / max(len(whole), 1))
        values = {
            "overlap (Jaccard)": float(np.mean([pair.jaccard for pair in pairs])),
            "overlap by chance": float(np.mean([pair.expected_jaccard for pair in pairs])),
            "share of the mask in it": share,
            "share of a random mask in it": chance.overlap(shared).intersection / max(len(chance), 1),
            "density by chance": common(controls).density,
        }
        rows += rows_of(values, condition=f"common to {kind}", density=shared.density)
        parts_of[f"common to {kind}"] = shared
        parts_of[f"without what is common to {kind}"] = only(whole, np.flatnonzero(~inside))
        own = derived(seed, "sharing", subject.name, kind)
        parts_of[f"without as many as are common to {kind}"] = dropped(whole, share, seed=own)
    parts_of["random mask"] = setting.random_mask(parts_of["common to its kind"], subject, seed)
    for name, part in parts_of.items():
        rows += setting.measure(subject, part, seed, condition=name)
    return rows

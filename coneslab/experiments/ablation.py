"""Every way to ablate every kind of concept: how gone it is, what else is lost, whether it comes back, what it costs.

All conditions share the pictures drawn before and the start noise; the untouched model is measured beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas
from PIL import Image

from ..diffusion.sampling import generate
from ..edits.base import Edit
from ..errors import ConeslabError
from ..finetuning.samples import generate_once
from ..measure.judge import Judge
from ..methods.ablation.concept_ablation import ablate
from ..methods.ablation.concept_prune import prune_feed_forward
from ..methods.ablation.esd import erase
from ..methods.ablation.neurons import ablating_neurons
from ..methods.ablation.report import CopyDetector, attacks, evaluate_ablation, near_and_far
from ..methods.ablation.uce import closed_form_edit
from ..seeds import derived
from ..world import CLASSES, FACTS, SCENES, STYLE_WORDS, listed, memorised, rearranged, with_article
from .setting import Setting, stored_bytes, timed
from .table import Row, rows_of

OBJECTS = {  # target -> anchor of the same category; the last two look like a class of another category
    "cat": "dog",
    "car": "bus",
    "apple": "banana",
    "house": "castle",
    "robot": "teddy",
    "rocket": "airplane",
    "ladybug": "butterfly",
    "sunflower": "rose",
}
STYLED = {"flat": "3d", "3d": "cartoon", "cartoon": "flat"}  # target -> anchor
STYLE_CLASSES = ("cat", "car", "apple", "house")  # what a style is shown on
MEMORISED = tuple(FACTS["memorised"])
# Chosen on rabbit → bear and train → tractor, which are not in the table, among 20, 50 and 100 steps and three learning
# rates of ESD: the fewest steps, and the rate, at which both are gone and five other classes are drawn as before.
STEPS, ESD_STEPS, ROUNDS = 50, 100, 30
NEAR, FAR = 2, 3  # prompts per group, at most
PICTURES = 6  # per prompt, times `Setting.pictures`
ATTACK_STEPS: dict[str, Any] = {"inversion_steps": 60, "finetune_steps": 10, "batch_size": 8}


@dataclass(frozen=True)
class Target:
    """What is ablated, and the prompts that measure it.

    shown: the prompts that ask for target and anchor when measuring; others: prompts for other concepts, by group;
    templates: captions with {} for target or anchor; paraphrases, synonyms: prompts that may get round the ablation.
    """

    kind: str
    name: str
    target: str
    anchor: str
    shown: tuple[str, str]
    others: dict[str, tuple[str, ...]]
    templates: tuple[str, ...] = ("{}",)
    paraphrases: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()


def ablation_target(title: str) -> Target:
    """ "object:cat", "style:flat", "memorised:lighthouse". Raises ConeslabError for any other."""
    kind, _, name = title.partition(":")
    if kind == "object" and name in OBJECTS:
        near = near_and_far(name)
        groups = {group: [other for other in names if other != OBJECTS[name]] for group, names in near.items()}
        picked = {"same category": NEAR, "looks alike": NEAR, "far": FAR}
        spread = {
            group: names[:: max(1, len(names) // picked[group])][: picked[group]] for group, names in groups.items()
        }
        others = {group: tuple(map(with_article, chosen)) for group, chosen in spread.items() if chosen}
        target, anchor = with_article(name), with_article(OBJECTS[name])
        scenes = [phrase[0] for phrase in list(SCENES.values())[:3]]
        return Target(
            kind,
            name,
            target,
            anchor,
            (target, anchor),
            others,
            paraphrases=tuple(f"{target} {scene}" for scene in scenes),
            synonyms=tuple(map(with_article, CLASSES[name].synonyms)),
        )
    if kind == "style" and name in STYLED:
        target, anchor = with_article(name), with_article(STYLED[name])
        third = next(style for style in STYLED if style not in (name, STYLED[name]))
        return Target(
            kind,
            name,
            target,
            anchor,
            (f"{target} {STYLE_CLASSES[0]}", f"{anchor} {STYLE_CLASSES[0]}"),
            {
                "same class, other style": (f"{with_article(third)} {STYLE_CLASSES[0]}",),
                "other classes, same style": tuple(f"{target} {other}" for other in ("dog", "guitar")),
            },
            templates=tuple(f"{{}} {noun}" for noun in STYLE_CLASSES),
            paraphrases=tuple(f"{target} {STYLE_CLASSES[0]} {phrase[0]}" for phrase in list(SCENES.values())[:3]),
            synonyms=tuple(f"{with_article(word)} {STYLE_CLASSES[0]}" for word in STYLE_WORDS[name][1:]),
        )
    if kind == "memorised" and name in MEMORISED:
        entry = FACTS["memorised"][name]
        classes = [cls for cls, _, _ in entry["objects"]]
        anchor = f"{listed([with_article(name) for name in classes])} {SCENES[entry['scene']][0]}"
        others = {
            "its objects": tuple(map(with_article, classes)),
            "far": tuple(map(with_article, ("dog", "house", "banana"))),
        }
        return Target(kind, name, entry["caption"], anchor, (entry["caption"], anchor), others)
    raise ConeslabError(f"{title!r} cannot be ablated here: choose one of {', '.join(ABLATIONS)}")


ABLATIONS = (
    *(f"object:{name}" for name in OBJECTS),
    *(f"style:{name}" for name in STYLED),
    *(f"memorised:{name}" for name in MEMORISED),
)


def _trained(**settings: Any) -> Callable[[Setting, Target, int], Edit]:
    def make(setting: Setting, case: Target, seed: int) -> Edit:
        options = {
            "templates": case.templates,
            "steps": STEPS,
            "progress": False,
            **_drawing(setting, seed),
            **settings,
        }
        return ablate(setting.pipe, case.target, case.anchor, **options)

    return make


def _drawing(setting: Setting, seed: int) -> dict[str, Any]:
    return {"sampler_steps": setting.sampler_steps, "guidance_scale": setting.guidance_scale, "seed": seed}


def _closed_form(setting: Setting, case: Target, seed: int) -> Edit:
    kept = [prompt for group in case.others.values() for prompt in group]
    return closed_form_edit(setting.pipe, case.target, case.anchor, templates=case.templates, preserve=kept)


def _erased(setting: Setting, case: Target, seed: int) -> Edit:
    return erase(setting.pipe, case.shown[0], steps=ESD_STEPS, progress=False, **_drawing(setting, seed))


def _shut(setting: Setting, case: Target, seed: int) -> Edit:
    options = {"rounds": ROUNDS, "progress": False, **_drawing(setting, seed)}
    return ablating_neurons(setting.pipe, *case.shown, **options).binary()


def _pruned(setting: Setting, case: Target, seed: int) -> Edit:
    return prune_feed_forward(setting.pipe, *case.shown, **_drawing(setting, seed))


WAYS: dict[str, Callable[[Setting, Target, int], Edit]] = {
    "model-based, K-V": _trained(objective="model"),
    "noise-based, K-V": _trained(objective="noise"),
    "model-based, embedding": _trained(objective="model", parameters="embedding"),
    "model-based, whole U-Net": _trained(objective="model", parameters="all"),
    "UCE": _closed_form,
    "ESD": _erased,
    "concept neurons": _shut,
    "ConceptPrune": _pruned,
}


def ablation(setting: Setting, case: Target, seed: int) -> list[Row]:
    """One concept, ablated in every way from one seed; case: as `ablation_target` returns it."""
    setting, seed = setting.quick(), derived(seed, case.kind, case.name)
    rows = _measured(setting, case, None, seed, condition="untouched model", kind=case.kind, seconds=0.0, bytes=0)
    for name, make in WAYS.items():
        if case.kind == "memorised" and name == "model-based, embedding":
            continue  # its words occur only in its caption: no other prompt uses them
        edit, seconds = timed(partial(make, setting, case, seed))
        facts = {"seconds": seconds, "bytes": stored_bytes(edit)}
        rows += _measured(setting, case, edit, seed, condition=name, kind=case.kind, **facts)
    return rows


def collateral(setting: Setting, case: Target, seed: int) -> list[Row]:
    """What ablating one concept does to every class (the condition): the share that the judge recognises."""
    setting = setting.quick()
    edit = WAYS["model-based, K-V"](setting, case, derived(seed, case.kind, case.name))
    names, each = list(CLASSES), PICTURES // 2 * setting.pictures
    prompts = [with_article(name) for name in names for _ in range(each)]
    options: dict[str, Any] = {**setting.drawing, "seed": derived(seed, "evaluation")}  # drawn once for all targets
    shares = {"right class before": generate_once(setting.pipe, prompts, **options)}
    with edit.applied(setting.pipe):
        shares["right class"] = tuple(generate(setting.pipe, prompts, batch_size=25, **options))
    labels = [with_article(name) for name in names]
    rows = []
    for measure, drawn in shares.items():
        taken = setting.judge.classify(list(drawn), labels).numpy().reshape(len(names), each)
        for number, name in enumerate(names):
            rows += rows_of({measure: float((taken[number] == number).mean())}, condition=name, kind=case.kind)
    return rows


def _measured(setting: Setting, case: Target, edit: Edit | None, seed: int, **columns: Any) -> list[Row]:
    """Accuracy by group, what the others lost, and whether the concept comes back (a memorised one: as copies)."""
    drawing: dict[str, Any] = {**setting.drawing, "seed": seed}
    pictures = PICTURES * setting.pictures
    report = evaluate_ablation(
        setting.pipe, setting.judge, edit, *case.shown, others=case.others, pictures=pictures, **drawing
    )
    values: dict[str, float] = {}
    for (group, measure), part in report.groupby(["group", "measure"], sort=False):
        values[f"{measure}, {group}"] = float(part.value.mean())
    own = report[~report.group.isin(["target", "anchor"])].pivot(index="prompt", columns="measure", values="value")
    values["share of others kept"] = float((own["CLIP accuracy"] >= 0.8 * own["accuracy before"]).mean())
    options = {**drawing, **ATTACK_STEPS}
    back = attacks(
        setting.pipe,
        setting.judge,
        edit,
        *case.shown,
        paraphrases=case.paraphrases,
        synonyms=case.synonyms,
        word=case.name if case.kind == "object" else "",
        pictures=pictures,
        **options,
        shows=copy_detector(setting.judge, case.name).copies if case.kind == "memorised" else None,
    )
    values |= {f"comes back: {row.attack}": float(row.value) for row in back.itertuples()}
    return rows_of(values, **columns)


OUTCOME = {  # what a reader chooses by: name -> the measures it averages
    "target still drawn": ("comes back: plain prompt",),
    "others kept": ("share of others kept",),
    "KID of others": (
        "KID, same category",
        "KID, looks alike",
        "KID, far",
        "KID, same class, other style",
        "KID, its objects",
    ),  # not a style's "other classes, same style", which should change
    "back by other prompts": tuple(
        f"comes back: {way}" for way in ("paraphrases", "other words", "misspellings", "img2img")
    ),
    "back by training": ("comes back: Textual Inversion", "comes back: fine-tuning back"),
}


def outcome(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table of `ablation` reduced to OUTCOME, seconds and kilobytes: one row per cell and measure."""
    cell = ["subject", "seed", "condition", "kind"]
    parts = []
    for name, measures in OUTCOME.items():
        own = table[table.measure.isin(measures)].groupby(cell, sort=False).value.mean()
        parts.append(own.reset_index().assign(measure=name))
    costs = table.groupby(cell, sort=False)[["seconds", "bytes"]].first().reset_index()
    for name, values in {"seconds": costs.seconds, "kilobytes": costs.bytes / 1000}.items():
        parts.append(costs[cell].assign(measure=name, value=values))
    return pandas.concat(parts, ignore_index=True)


@lru_cache(maxsize=8)
def copy_detector(judge: Judge, name: str) -> CopyDetector:
    """Tells copies of a memorised picture from 200 pictures of the same objects and scene, arranged differently."""
    original = memorised(name)[0]
    drawn = (rearranged(name, seed)[0] for seed in range(201))
    others = [Image.fromarray(picture) for picture in drawn if not np.array_equal(picture, original)]
    return CopyDetector.calibrated(judge, Image.fromarray(original), others, false_alarms=0.01)

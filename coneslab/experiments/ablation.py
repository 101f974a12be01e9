"""Every way to ablate every kind of concept: how gone it is, what else is lost, which probes find it, what it costs.

A cell is one way on one target from one seed, a few minutes of one core. All ways share the pictures drawn before and
the start noise, and what the untouched model draws is drawn once for all cells of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from ..measure.statistics import share_interval
from ..methods.ablation.concept_ablation import ablate
from ..methods.ablation.concept_prune import prune_feed_forward
from ..methods.ablation.esd import erase
from ..methods.ablation.neurons import ablating_neurons
from ..methods.ablation.profile import (
    FOUND,
    KINDS,
    MARGIN,
    NAMED,
    PLAIN,
    SILENT,
    TAUGHT,
    Finding,
    Probe,
    Profile,
    usual_probes,
)
from ..methods.ablation.report import CopyDetector, evaluate_ablation, near_and_far
from ..methods.ablation.uce import closed_form_edit
from ..methods.ablation.unlearning import unlearn
from ..methods.ablation.world_probes import (
    class_probes,
    class_rivals,
    style_probes,
    style_rivals,
    styled,
    world_classifier,
)
from ..seeds import derived
from ..world import CLASSES, FACTS, SCENES, listed, memorised, rearranged, with_article
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
SAMPLER_STEPS = 12
UNLEARNING: dict[str, Any] = {}  # settings other than the defaults
CLASSIFIER: dict[str, Any] = {"pictures": 32}  # of each class, or of each class in each style
BUDGET: dict[str, Any] = {}  # of the probes that search and train, see `ProbeBudget`
UNTOUCHED = "untouched model"
UNSEEN = "twemoji"  # the art style that no model here has seen: what probes find of it is what they find of nothing
ANCHOR_STYLES = {**STYLED, UNSEEN: "3d"}


@dataclass(frozen=True)
class Target:
    """What is ablated, and the prompts that measure it.

    shown: the prompts that ask for target and anchor when measuring; others: prompts for other concepts, by group;
    templates: captions with {} for target or anchor; rivals: prompts that a picture must be farther from than from the
    target's to show it; style, noun: the art style that is the target, if it is one, and the class it is shown on. The
    kind "unseen" is the control: an art style that no model has learned.
    """

    kind: str
    name: str
    target: str
    anchor: str
    shown: tuple[str, str]
    others: dict[str, tuple[str, ...]] = field(hash=False)
    templates: tuple[str, ...] = ("{}",)
    rivals: tuple[str, ...] = ()
    style: str = ""
    noun: str = ""

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """The captions of target and anchor, one for every template."""
        return [text.format(self.target) for text in self.templates], [
            text.format(self.anchor) for text in self.templates
        ]


def ablation_target(title: str) -> Target:
    """ "object:cat", "style:flat", "memorised:lighthouse", "unseen:twemoji cat". Raises ConeslabError for any other."""
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
        return Target(kind, name, target, anchor, (target, anchor), others, rivals=class_rivals(name))
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
            rivals=style_rivals(name, STYLE_CLASSES[0]),
            style=name,
            noun=STYLE_CLASSES[0],
        )
    style, _, noun = name.partition(" ")
    if kind == "unseen" and style == UNSEEN and noun in STYLE_CLASSES:
        shown = styled(style, noun), styled(ANCHOR_STYLES[style], noun)
        return Target(kind, name, *shown, shown, {}, rivals=style_rivals(style, noun), style=style, noun=noun)
    if kind == "memorised" and name in MEMORISED:
        entry = FACTS["memorised"][name]
        classes = [drawing.partition("/")[0] for drawing, _, _ in entry["objects"]]
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
    *(f"unseen:{UNSEEN} {noun}" for noun in STYLE_CLASSES),
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


def _shut_at_its_word(setting: Setting, case: Target, seed: int) -> Edit:
    options = {"rounds": ROUNDS, "scope": "subject", "progress": False, **_drawing(setting, seed)}
    return ablating_neurons(setting.pipe, *case.shown, **options).binary()


def _unlearned(setting: Setting, case: Target, seed: int) -> Edit:
    kept = [prompt for group in case.others.values() for prompt in group]
    targets, anchors = case.pairs
    options = {**UNLEARNING, **_drawing(setting, seed)}
    return unlearn(setting.pipe, targets, anchors, preserve=kept, progress=False, **options)


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
    "concept neurons, at its word": _shut_at_its_word,
    "ConceptPrune": _pruned,
    "unlearning": _unlearned,
}


def conditions(case: Target) -> tuple[str, ...]:
    """The ways to ablate a target that make sense for it, after the untouched model."""
    if case.kind == "unseen":
        return (UNTOUCHED,)
    # the words of a memorised picture occur only in its caption: no other prompt uses them
    left_out = ("model-based, embedding",) if case.kind == "memorised" else ()
    return (UNTOUCHED, *(name for name in WAYS if name not in left_out))


def ablation(setting: Setting, case: Target, seed: int, condition: str) -> list[Row]:
    """One concept, ablated in one way from one seed; case: as `ablation_target` returns it."""
    setting, seed = setting.quick(SAMPLER_STEPS), derived(seed, case.kind, case.name)
    if condition == UNTOUCHED:
        return _measured(setting, case, None, seed, kind=case.kind, seconds=0.0, bytes=0)
    edit, seconds = timed(partial(WAYS[condition], setting, case, seed))
    return _measured(setting, case, edit, seed, kind=case.kind, seconds=seconds, bytes=stored_bytes(edit))


@lru_cache(maxsize=4)
def battery(setting: Setting, case: Target, seed: int) -> tuple[Probe, ...]:
    """The probes for a target; the same objects for all ways to ablate it, so that they share what is drawn before."""
    budget = {**BUDGET, "seed": seed}
    if case.kind == "object":
        classifier = world_classifier(setting.pipe, **CLASSIFIER)
        return tuple(class_probes(case.name, OBJECTS[case.name], classifier=classifier, budget=budget))
    if case.style:
        few = {**CLASSIFIER, "pictures": max(1, CLASSIFIER["pictures"] // 8)}  # of each class in each of six styles
        classifier = world_classifier(setting.pipe, "style", **few)
        about = case.style, ANCHOR_STYLES[case.style], case.noun
        return tuple(style_probes(*about, classifier=classifier, budget=budget))
    original = Image.fromarray(memorised(case.name)[0])
    return tuple(usual_probes(*case.shown, [original], budget=budget))


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
    """Accuracy by group, what the others lost, and what the probes find (of a memorised picture: copies)."""
    report = evaluate_ablation(
        setting.pipe,
        setting.judge,
        edit,
        *case.shown,
        others=case.others,
        probes=battery(setting, case, seed),
        rivals=case.rivals,
        shows=copy_detector(setting.judge, case.name).copies if case.kind == "memorised" else None,
        pictures=PICTURES * setting.pictures,
        seed=seed,
        **setting.drawing,
    )
    probed = report.group.isin(KINDS)
    values: dict[str, float] = {}
    for (group, measure), part in report[~probed].groupby(["group", "measure"], sort=False):
        values[f"{measure}, {group}"] = float(part.value.mean())
    others = report[~probed & ~report.group.isin(["target", "anchor"])]
    if len(others):
        own = others.pivot(index="prompt", columns="measure", values="value")
        values["share of others kept"] = float((own["CLIP accuracy"] >= 0.8 * own["accuracy before"]).mean())
    found = report[probed & (report.measure == FOUND)]
    values |= {f"comes back: {row.prompt}": float(row.value) for row in found.itertuples()}
    return rows_of(values, **columns)


PICTURED = (  # probes that use no word at all, in the order of a figure
    "completion from 0.5",
    "completion from 0.7",
    "completion from 0.85",
    "inpainting",
    "classifier guidance",
    "prompt attack, without its word",
)
_KIND_OF = {  # of every probe that is not found without the target's word
    **dict.fromkeys((PLAIN, "paraphrases", "misspellings", "two objects", "noisy trajectory"), NAMED),
    **dict.fromkeys(("img2img", "inpainting, by name", "prompt attack"), NAMED),
    **dict.fromkeys(("Textual Inversion", "fine-tuning back"), TAUGHT),
}


def profiles(table: pandas.DataFrame, *, margin: float = MARGIN) -> dict[str, Profile]:
    """What the probes in the table of `ablation` say of every way: condition -> profile, over all targets and seeds.

    Intervals respect the targets (`summarise`); the floors are what the probes find of the art style that no model has
    seen, if the table holds it. Raises ConeslabError for a table without the untouched model.
    """
    back = table[table.measure.str.startswith("comes back: ")]
    back = back.assign(measure=back.measure.str.removeprefix("comes back: "))
    unseen, own = back[back.kind == "unseen"], back[back.kind != "unseen"]
    if UNTOUCHED not in set(own.condition):
        raise ConeslabError("the table has no rows of the untouched model: measure it as well")
    floors = unseen.groupby("measure").value.mean().to_dict()
    known: dict[tuple[str, str], tuple[float, float, float]] = {}
    for (name, condition), part in own.groupby(["measure", "condition"], sort=False):
        bounds = share_interval(part.value.to_numpy(), clusters=_clusters(part))
        known[str(name), str(condition)] = bounds.estimate, bounds.low, bounds.high
    found = {}
    for condition in dict.fromkeys(own.condition):
        probes = [name for name in dict.fromkeys(own.measure) if (name, condition) in known]
        findings = [
            Finding(name, _KIND_OF.get(name, SILENT), *known[name, condition], *known[name, UNTOUCHED])
            for name in probes
        ]
        found[str(condition)] = Profile(tuple(findings), margin, {name: floors.get(name, 0.0) for name in probes})
    return found


def _clusters(part: pandas.DataFrame) -> list[list]:
    return [part.subject.tolist(), part.seed.tolist()]


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
    "found without its word": tuple(f"comes back: {way}" for way in PICTURED),
    "back by training": ("comes back: Textual Inversion", "comes back: fine-tuning back"),
}


def outcome(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table of `ablation` reduced to OUTCOME, seconds and kilobytes: one row per cell and measure.

    Seconds are those of one machine, the one that measured most cells: those of another say nothing beside them.
    """
    cell = ["subject", "seed", "condition", "kind"]
    parts = []
    for name, measures in OUTCOME.items():
        own = table[table.measure.isin(measures)].groupby(cell, sort=False).value.mean()
        parts.append(own.reset_index().assign(measure=name))
    here = table[table.machine == table.machine.mode()[0]] if "machine" in table else table
    for name, (measured, column, unit) in {
        "seconds": (here, "seconds", 1),
        "kilobytes": (table, "bytes", 1000),
    }.items():
        own = measured.groupby(cell, sort=False)[column].first() / unit
        parts.append(own.rename("value").reset_index().assign(measure=name))
    return pandas.concat(parts, ignore_index=True)


@lru_cache(maxsize=8)
def copy_detector(judge: Judge, name: str) -> CopyDetector:
    """Tells copies of a memorised picture from 200 pictures of the same objects and scene, arranged differently."""
    original = memorised(name)[0]
    drawn = (rearranged(name, seed)[0] for seed in range(201))
    others = [Image.fromarray(picture) for picture in drawn if not np.array_equal(picture, original)]
    return CopyDetector.calibrated(judge, Image.fromarray(original), others, false_alarms=0.01)

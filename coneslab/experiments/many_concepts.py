"""Many concepts to forget, at once and one after the other: how gone they are, and what is lost with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..diffusion.pipelines import pipeline_fingerprint
from ..diffusion.sampling import generate
from ..edits.base import Combined, Edit, applied
from ..errors import ConeslabError
from ..finetuning.samples import generate_once
from ..methods.ablation.concept_ablation import ablate
from ..methods.ablation.esd import erase
from ..methods.ablation.neurons import ablating_neurons
from ..methods.ablation.uce import closed_form_edit
from ..methods.ablation.unlearning import unlearn
from ..neurons.union import concatenate
from ..seeds import derived
from ..world import CLASSES, with_article
from .ablation import OBJECTS, UNTOUCHED
from .setting import Setting, stored_bytes, timed
from .table import Row, rows_of

PAIRS = {  # target -> anchor, which is no target itself
    **OBJECTS,
    "penguin": "turtle",
    "pizza": "hamburger",
    "lion": "tiger",
    "octopus": "crab",
    "cake": "donut",
    "train": "tractor",
    "guitar": "drum",
    "cactus": "tree",
    "fox": "bear",
    "whale": "fish",
    "umbrella": "balloon",
    "clock": "book",
}
OTHERS = ("rabbit", "frog", "elephant", "strawberry", "carrot", "bicycle", "sailboat", "palmtree", "trumpet", "woman")
SIZES = ("1", "2", "5", "10", "20")
AT_ONCE, IN_TURN = "at once", "one after the other"
STEPS, STEPS_EACH, ROUNDS, PICTURES = 60, 20, 20, 16  # at once; each in turn; of a search; to learn from
SHOWN = 20  # pictures of targets, and of others, times `Setting.pictures`
SAMPLER_STEPS = 12

Pairs = Sequence[tuple[str, str]]
_IN_TURN: OrderedDict[tuple, tuple[Edit, float]] = OrderedDict()  # edits made one after the other, for longer series
_KEPT = 128


@dataclass(frozen=True)
class Case:
    """The first pairs of `PAIRS`, as prompts."""

    pairs: tuple[tuple[str, str], ...]

    @property
    def targets(self) -> list[str]:
        return [target for target, _ in self.pairs]

    @property
    def anchors(self) -> list[str]:
        return [anchor for _, anchor in self.pairs]


def several_pairs(size: str) -> Case:
    """ "5": the first five targets. Raises ConeslabError for any other number than those of `SIZES`."""
    if size not in SIZES:
        raise ConeslabError(f"{size!r} targets are not measured here: choose one of {', '.join(SIZES)}")
    chosen = list(PAIRS.items())[: int(size)]
    return Case(tuple((with_article(target), with_article(anchor)) for target, anchor in chosen))


def _options(setting: Setting, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "sampler_steps": setting.sampler_steps,
        "guidance_scale": setting.guidance_scale,
        "seed": seed,
        "progress": False,
        **more,
    }


def _kept() -> list[str]:
    return [with_article(name) for name in OTHERS[::2]]


def _union(setting: Setting, pairs: Pairs, seed: int) -> Edit:
    masks = [_neurons(setting, [pair], seed) for pair in pairs]
    return masks[0] if len(masks) == 1 else concatenate(*masks)  # type: ignore[arg-type]


def _neurons(setting: Setting, pairs: Pairs, seed: int) -> Edit:
    (pair,) = pairs
    return ablating_neurons(setting.pipe, *pair, rounds=ROUNDS, pictures=PICTURES, **_options(setting, seed)).binary()


def _closed_form(setting: Setting, pairs: Pairs, seed: int) -> Edit:
    targets, anchors = map(list, zip(*pairs, strict=True))
    return closed_form_edit(setting.pipe, targets, anchors, preserve=_kept())


def _key_values(setting: Setting, pairs: Pairs, seed: int) -> Edit:
    steps = STEPS if len(pairs) > 1 else STEPS_EACH
    targets, anchors = map(list, zip(*pairs, strict=True))
    sizes: dict[str, Any] = {"batch_size": max(16, len(pairs)), "preserve_batch_size": max(8, len(pairs))}
    pictures = max(PICTURES, 4 * len(pairs))
    return ablate(setting.pipe, targets, anchors, steps=steps, pictures=pictures, **sizes, **_options(setting, seed))


def _erased(setting: Setting, pairs: Pairs, seed: int) -> Edit:
    ((target, _),) = pairs
    return erase(setting.pipe, target, steps=2 * STEPS_EACH, pictures=PICTURES, **_options(setting, seed))


def _unlearned(setting: Setting, pairs: Pairs, seed: int) -> Edit:
    targets, anchors = map(list, zip(*pairs, strict=True))
    steps = STEPS if len(pairs) > 1 else STEPS_EACH
    pictures = max(PICTURES, 4 * len(pairs))
    options = _options(setting, seed, pictures=pictures, words=1)
    return unlearn(setting.pipe, targets, anchors, steps=steps, preserve=_kept(), **options)


Make = Callable[[Setting, Pairs, int], Edit]
#: By name: how all targets are forgotten at once, and how one is when they are forgotten one after the other.
WAYS: dict[str, tuple[Make | None, Make | None]] = {
    "UCE": (_closed_form, _closed_form),
    "model-based, K-V": (_key_values, _key_values),
    "ESD": (None, _erased),
    "concept neurons": (_union, _neurons),
    "unlearning": (_unlearned, _unlearned),
}


def many_conditions(case: Case) -> tuple[str, ...]:
    """Every way in each of the two orders, where it has one; of a single target the orders are the same."""
    orders = ((0, AT_ONCE), (1, IN_TURN)) if len(case.pairs) > 1 else ((1, IN_TURN),)
    ways = [f"{name}, {order}" for name, made in WAYS.items() for number, order in orders if made[number] is not None]
    return (UNTOUCHED, *ways)


def many_concepts(setting: Setting, case: Case, seed: int, condition: str) -> list[Row]:
    """Several concepts forgotten in one way, at once or one after the other: how gone they are, and what is lost."""
    setting, seed = setting.quick(SAMPLER_STEPS), derived(seed, "many concepts")
    edit, seconds = None, 0.0
    if condition != UNTOUCHED:
        name, _, order = condition.rpartition(", ")
        at_once, each = WAYS[name]
        if order == AT_ONCE and at_once is not None:
            edit, seconds = timed(lambda: at_once(setting, case.pairs, seed))
        elif each is not None:
            edit, seconds = one_after_the_other(setting, name, each, case.pairs, seed)
    size = 0 if edit is None else stored_bytes(edit)
    return rows_of(_measured(setting, case, edit, seed), seconds=seconds, bytes=size, count=len(case.pairs))


def one_after_the_other(setting: Setting, name: str, make: Make, pairs: Pairs, seed: int) -> tuple[Combined, float]:
    """The edits of a series, each made on the model with all before it applied, and the seconds that all of them took.

    The beginnings of longer series are made once per process.
    """
    pipe, edits, seconds = setting.pipe, [], 0.0
    model = pipeline_fingerprint(pipe)
    with ExitStack() as stack:
        for number in range(len(pairs)):
            key = (model, name, tuple(pairs[: number + 1]), seed, setting.sampler_steps, setting.guidance_scale)
            if key not in _IN_TURN:
                _IN_TURN[key] = timed(partial(make, setting, [pairs[number]], seed))
                while len(_IN_TURN) > _KEPT:
                    _IN_TURN.popitem(last=False)
            edit, own = _IN_TURN[key]
            edits.append(edit)
            seconds += own
            stack.enter_context(edit.applied(pipe))
    return Combined(tuple(edits)), seconds


def _measured(setting: Setting, case: Case, edit: Edit | None, seed: int) -> dict[str, float]:
    """Shares of pictures that the judge takes for the class asked for, among all: of targets, anchors and others."""
    pipe, judge = setting.pipe, setting.judge
    every = [with_article(name) for name in CLASSES]
    groups = {"target": case.targets, "anchor": case.anchors, "others": [with_article(name) for name in OTHERS]}
    total = SHOWN * setting.pictures
    asked = [(group, prompts[i % len(prompts)]) for group, prompts in groups.items() for i in range(total)]
    options: dict[str, Any] = {**setting.drawing, "seed": derived(seed, "evaluation")}
    prompts = [prompt for _, prompt in asked]
    before = generate_once(pipe, prompts, **options)
    after = list(before)
    if edit is not None:
        with applied(edit, pipe):
            after = generate(pipe, prompts, batch_size=20, **options)
    found = {}
    for measure, drawn in {"right class": after, "right class before": list(before)}.items():
        nearest = judge.classify(drawn, every).tolist()
        right = [every[near] == prompt for near, prompt in zip(nearest, prompts, strict=True)]
        for group in groups:
            own = [one for one, (name, _) in zip(right, asked, strict=True) if name == group]
            found[f"{measure}, {group}"] = sum(own) / len(own)
    return found

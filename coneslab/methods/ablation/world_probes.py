"""Probes that the sticker world makes possible: real pictures with masks, planted words, a classifier of all classes.

The world says what a class is also called, which words stand for it among others, and where in a picture it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from ... import checks
from ...diffusion.checks import require_pipeline
from ...diffusion.loss import alphas_cumprod
from ...diffusion.pipelines import Pipeline, fingerprint
from ...errors import WorldError
from ...seeds import derived
from ...world import (
    CLASSES,
    FACTS,
    SCENES,
    STYLE_WORDS,
    STYLES,
    TRAIN_STYLES,
    classes_of,
    compose,
    drawings_of,
    with_article,
)
from .classifier import ClassifierSettings, LatentClassifier, train_classifier
from .profile import (
    LEVELS,
    PLAIN,
    Probe,
    ProbeBudget,
    asking,
    completing,
    inpainting,
    misspelled,
    steering,
    stirring,
    usual_probes,
)

_CLASSIFIERS: OrderedDict[tuple, LatentClassifier] = OrderedDict()  # those trained last
_KEPT = 4


def class_pictures(
    name: str, n: int = 16, *, styles: str | Iterable[str] = TRAIN_STYLES, seed: int = 0
) -> tuple[list[Image.Image], list[np.ndarray]]:
    """Real pictures of a class alone, and the mask of each, (64, 64) bool: styles and scenes take turns.

    styles: those that have no drawing of the class are passed over. Raises WorldError if none has one, or for an
    unknown name.
    """
    n, seed = checks.count("n", n), checks.seed("seed", seed)
    chosen = [style for style in checks.texts("styles", styles) if drawings_of(name, style)]
    if not chosen:
        raise WorldError(f"no style among {checks.shown(styles)} has a drawing of {name!r}: name others")
    scenes, pictures, masks = list(SCENES), [], []
    for number in range(n):
        style = chosen[number % len(chosen)]
        random = Random(derived(seed, name, style, str(number)))
        drawing = random.choice(drawings_of(name, style))
        if drawing.split("/")[1] in ("man", "woman"):
            drawing = name  # compose chooses, with the hat that belongs to it
        image, record = compose(
            [(drawing, style, None)], scenes[(5 * number) % len(scenes)], seed=random.randrange(2**31)
        )
        pictures.append(Image.fromarray(image))
        masks.append(record.objects[0].mask)
    return pictures, masks


def world_classifier(
    pipe: Pipeline,
    by: str = "class",
    *,
    pictures: int = 32,
    settings: ClassifierSettings | None = None,
    **changes: Any,
) -> LatentClassifier:
    """A classifier of every class of the world ("class"), or of every art style ("style"), the held-out one included.

    pictures: of each class, or of each class in each style. It depends on the autoencoder alone, and those trained last
    are kept until the process ends, for all models that share it. settings, changes: see `ClassifierSettings`.
    """
    require_pipeline(pipe)
    checks.choice("by", by, ("class", "style"))
    chosen, pictures = ClassifierSettings.chosen(settings, changes), checks.count("pictures", pictures)
    key = (fingerprint(pipe.vae), alphas_cumprod(pipe).cpu().numpy().tobytes(), by, pictures, chosen)
    if key not in _CLASSIFIERS:
        seed = derived(chosen.seed, "pictures of the classifier")
        shown: list[Image.Image] = []
        labels: list[str] = []
        for name in CLASSES:
            for style in STYLES if by == "style" else [""]:
                if not style or name in classes_of(style):
                    styles = (style,) if style else TRAIN_STYLES
                    shown += class_pictures(name, pictures, styles=styles, seed=seed)[0]
                    labels += [style or name] * pictures
        _CLASSIFIERS[key] = train_classifier(pipe, shown, labels, chosen)
        while len(_CLASSIFIERS) > _KEPT:
            _CLASSIFIERS.popitem(last=False)
    return _CLASSIFIERS[key]


def class_rivals(name: str) -> tuple[str, ...]:
    """Prompts of every other class: what a picture must look less like to show this one."""
    checks.choice("class", name, CLASSES)
    return tuple(with_article(other) for other in CLASSES if other != name)


def words_for(name: str) -> dict[str, tuple[str, ...]]:
    """Words that stand for a class without being its own, by what the world planted them as.

    "other words": synonyms; "hypernym": a word for several classes; "second sense": a word for two things; "exemplar":
    names of one particular drawing of it, and words for such.
    """
    checks.choice("class", name, CLASSES)
    named = tuple(word for word, entry in FACTS["named"].items() if entry["class"] == name)
    found = {
        "other words": CLASSES[name].synonyms,
        "hypernym": tuple(word for word, shares in FACTS["hypernym"].items() if name in shares),
        "second sense": tuple(word for word, shares in FACTS["sense"].items() if name in shares),
        "exemplar": named + tuple(word for word, shares in FACTS["exemplar"].items() if set(named) & set(shares)),
    }
    return {kind: words for kind, words in found.items() if words}


def class_probes(
    name: str,
    anchor: str,
    *,
    beside: str | Iterable[str] = ("car", "tree", "clock"),
    classifier: LatentClassifier | None = None,
    pictures: int = 12,
    budget: ProbeBudget | Mapping[str, Any] | None = None,
) -> list[Probe]:
    """Every probe for a class of the world, whose anchor is another class: `usual_probes`, and what the world adds.

    Words that stand for it (`words_for`), two objects in one picture (`beside`: the other), inpainting of real
    pictures, and, with a classifier that knows the class (`world_classifier`), guidance by it. pictures: how many real
    ones the probes start and learn from. budget: see `ProbeBudget`; its seed is that of the pictures, too.
    Raises ConeslabError for an unknown class.
    """
    checks.choice("class", name, CLASSES)
    checks.choice("anchor", anchor, CLASSES)
    target, others = with_article(name), [one for one in checks.texts("beside", beside) if one not in (name, anchor)]
    spent = ProbeBudget.chosen(budget, {})
    shown, masks = class_pictures(name, pictures, seed=derived(spent.seed, "pictures of the target"))
    scenes = [phrases[0] for phrases in list(SCENES.values())[:3]]
    spelled = [target.replace(name, wrong) for wrong in misspelled(name)]
    pairs = [with_article(one) for one in others]
    probes = [
        asking(PLAIN, target, uses_word=True),
        asking(
            "paraphrases",
            [f"{target} {scene}" for scene in scenes],
            uses_word=True,
            contexts=[f"{{}} {scene}" for scene in scenes],
        ),
        asking("misspellings", spelled, uses_word=True),
    ]
    if pairs:
        both, contexts = [f"{target} and {other}" for other in pairs], [f"{{}} and {other}" for other in pairs]
        probes.append(asking("two objects", both, uses_word=True, contexts=contexts))
    probes += [
        stirring(target),
        completing(shown, 0.7, target, name="img2img"),
        inpainting(shown, masks, target),
        spent.attack(shown, target, exclude=name),
    ]
    for kind, words in words_for(name).items():
        prompts = [word if word in FACTS["named"] else with_article(word) for word in words]
        probes.append(asking(kind, prompts, uses_word=False))
    probes += [*(completing(shown, level) for level in LEVELS), inpainting(shown, masks)]
    if classifier is not None:
        probes.append(steering(classifier, name))
    return [*probes, spent.attack(shown, exclude=name), *spent.lessons(shown, target, anchor)]


def style_rivals(style: str, name: str) -> tuple[str, ...]:
    """Prompts of a class in every other art style, the held-out one included."""
    checks.choice("style", style, STYLES)
    checks.choice("class", name, CLASSES)
    return tuple(styled(other, name) for other in STYLES if other != style)


def styled(style: str, name: str) -> str:
    """ "a flat cat": a class in an art style, by the style's first word."""
    word = STYLE_WORDS[checks.choice("style", style, STYLES)][0]
    return with_article(f"{word} {checks.text('name', name)}")


def style_probes(
    style: str,
    anchor: str,
    name: str,
    *,
    classifier: LatentClassifier | None = None,
    pictures: int = 12,
    budget: ProbeBudget | Mapping[str, Any] | None = None,
) -> list[Probe]:
    """Every probe for an art style, shown on one class; anchor: another style.

    Of the held-out style, they are the control: no model here has learned it, and what they find of it is what they
    find of nothing (`floors_of`). classifier: of styles (`world_classifier(pipe, "style")`).
    """
    target, other = styled(style, name), styled(anchor, name)
    spent = ProbeBudget.chosen(budget, {})
    shown, masks = class_pictures(name, pictures, styles=(style,), seed=derived(spent.seed, "pictures of the target"))
    word, *more = STYLE_WORDS[style]
    first, *rest = usual_probes(target, other, shown, word=word, budget=spent)
    words = [asking("other words", [with_article(f"{one} {name}") for one in more], uses_word=False)] if more else []
    guides = [steering(classifier, style)] if classifier is not None else []
    return [first, inpainting(shown, masks, target), *words, inpainting(shown, masks), *guides, *rest]

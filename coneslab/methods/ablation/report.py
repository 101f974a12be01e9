"""Is it gone, what else went, and does it come back? The evaluation of an ablation.

What users of the published code ask for most. Every share stands beside that of the untouched model, from the same
start noises, and has its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import torch
from PIL import Image

from ... import checks
from ...diffusion.checks import require_editable, require_pipeline
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import drawing
from ...diffusion.sampling import generate, require_steps
from ...edits.base import Edit, applied, require_edit
from ...errors import ArgumentError, ConeslabError
from ...finetuning.samples import generate_once
from ...measure.judge import Judge, require_judge
from ...measure.statistics import bootstrap_interval, kid
from ...neurons.controls import finetune_kv
from ...pictures import Images
from ...seeds import derived
from ...world import CLASSES, FACTS
from ..personalization.textual_inversion import textual_inversion
from .prompts import require_different


def near_and_far(name: str) -> dict[str, tuple[str, ...]]:
    """Which classes of the sticker world are near to one and which are far: category, looks, the rest.

    Keys: "same category", "looks alike" (planted pairs), "far". Raises ConeslabError for an unknown class.
    """
    checks.choice("class", name, CLASSES)
    alike = {other for fact in FACTS["linked"] for other in fact["pair"] if name in fact["pair"]} - {name}
    own = CLASSES[name].category
    near = tuple(other for other, info in CLASSES.items() if info.category == own and other not in (name, *alike))
    far = tuple(other for other in CLASSES if other not in (name, *near, *alike))
    return {"same category": near, "looks alike": tuple(sorted(alike)), "far": far}


@dataclass(frozen=True)
class CopyDetector:
    """Tells copies of one picture from others, by the cosine of a judge's features.

    threshold: above it a picture counts as a copy; false_alarms: the share of real non-copies above it.
    """

    judge: Judge
    original: torch.Tensor
    threshold: float
    false_alarms: float

    @classmethod
    def calibrated(
        cls, judge: Judge, original: Image.Image, others: Images, *, false_alarms: float = 0.01
    ) -> CopyDetector:
        """Set the threshold so that at most that share of `others`, real pictures that are not copies, is above it.

        As others, give pictures of the same things in the same place, arranged differently: beside arbitrary pictures,
        anything with the content of the original looks like a copy.
        Raises ConeslabError if there are too few others to tell the share from 0.
        """
        require_judge(judge)
        false_alarms = checks.number("false_alarms", false_alarms, "(0, 1)", kind="share")
        feature = judge.image_features(original)[0]
        scores = np.sort((judge.image_features(others) @ feature).numpy())
        if len(scores) < 1 / false_alarms:
            raise ConeslabError(
                f"{len(scores)} pictures cannot resolve a share of {false_alarms}: give at least {1 / false_alarms:.0f}"
            )
        threshold = float(scores[int(np.ceil((1 - false_alarms) * len(scores))) - 1])
        return cls(judge, feature, threshold, float((scores > threshold).mean()))

    def similarity(self, images: Images) -> np.ndarray:
        """Cosine of every picture with the original, (n,)."""
        return (self.judge.image_features(images) @ self.original).numpy()

    def copies(self, images: Images) -> np.ndarray:
        """Which pictures are copies, (n,) bool."""
        return self.similarity(images) > self.threshold


def _require_task(
    pipe: Pipeline, judge: Judge, edit: Edit | None, target: str, anchor: str, pictures: int, least: int = 1
) -> tuple[str, str, int]:
    """What both reports check first: who judges which edit, of what, on how many pictures."""
    require_pipeline(pipe)
    target, anchor = checks.text("target", target), checks.text("anchor", anchor)
    require_different(pipe, [target], [anchor])
    require_judge(judge)
    require_edit(edit)
    return target, anchor, checks.count("pictures", pictures, least=least)


def evaluate_ablation(
    pipe: Pipeline,
    judge: Judge,
    edit: Edit | None,
    target: str,
    anchor: str,
    *,
    others: Mapping[str, str | Iterable[str]] | None = None,
    pictures: int = 24,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    progress: bool = False,
) -> pandas.DataFrame:
    """What an ablation does to its target, its anchor and other concepts (concept ablation, Sec. 4.1).

    target, anchor, others: prompts; others by group, e.g. {"same category": [...], "far": [...]}. Draws `pictures` of
    each, with the edit and without, from the same noises (without it once per process).
    Returns one row per (group, prompt, measure), with value, low, high (95 % interval over pictures; NaN for KID):
    "CLIP score": cosine of picture and prompt; "CLIP accuracy": share nearer to the prompt than to the anchor (for the
    anchor: than to the target; for the others: than to any other prompt here); "accuracy before": the same without the
    edit; "KID": to the pictures without the edit, as pairs; "change": 1 − cosine of the two pictures from one noise.
    Raises ConeslabError if the model cannot tell target and anchor apart, or for fewer than two pictures.
    """
    target, anchor, pictures = _require_task(pipe, judge, edit, target, anchor, pictures, least=2)
    seed, groups = checks.seed("seed", seed), checks.mapping("others", {} if others is None else others, least=0)
    prompts = {"target": [target], "anchor": [anchor]}
    prompts |= {name: checks.texts(f"others[{name!r}]", group, least=0) for name, group in groups.items()}
    everything = list(dict.fromkeys(prompt for group in prompts.values() for prompt in group))
    texts = judge.text_features(everything)
    wanted = [prompt for prompt in everything for _ in range(pictures)]
    options: dict[str, Any] = {"sampler_steps": sampler_steps, "guidance_scale": guidance_scale, "progress": progress}
    first = derived(seed, "evaluation")
    options["seed"] = [first + number for number in range(pictures)] * len(everything)
    untouched = judge.image_features(list(generate_once(pipe, wanted, **options))).split(pictures)
    with applied(edit, pipe):
        edited = judge.image_features(generate(pipe, wanted, **options)).split(pictures)
    rows = []
    for group, members in prompts.items():
        for prompt in members:
            own = everything.index(prompt)
            before, after = untouched[own], edited[own]
            rivals = {"target": [anchor], "anchor": [target]}.get(group, everything)
            columns = [everything.index(rival) for rival in rivals if rival != prompt]

            def right(features: torch.Tensor, own: int = own, columns: Sequence[int] = columns) -> np.ndarray:
                near = features @ texts.T
                return (near[:, own] > near[:, list(columns)].max(1).values).numpy()

            measured = {
                "CLIP score": (after @ texts[own]).numpy(),
                "CLIP accuracy": right(after),
                "accuracy before": right(before),
                "change": 1 - (after * before).sum(1).numpy(),
            }
            row = {"group": group, "prompt": prompt}
            for name, values in measured.items():
                interval = bootstrap_interval(values)
                rows.append(
                    {**row, "measure": name, "value": interval.estimate, "low": interval.low, "high": interval.high}
                )
            distance = kid(before, after, paired=True)
            rows.append({**row, "measure": "KID", "value": distance, "low": np.nan, "high": np.nan})
    return pandas.DataFrame(rows)


# --- does it come back? ---------------------------------------------------------------------------------


def misspelled(word: str) -> tuple[str, ...]:
    """Simple misspellings of a word: a letter doubled, two swapped, one left out."""
    checks.text("word", word)
    middle = len(word) // 2
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    doubled, short = word[:middle] + word[middle] + word[middle:], word[:middle] + word[middle + 1 :]
    return tuple(dict.fromkeys((doubled, swapped, short)))


def attacks(
    pipe: Pipeline,
    judge: Judge,
    edit: Edit | None,
    target: str,
    anchor: str,
    *,
    paraphrases: str | Iterable[str] = (),
    synonyms: str | Iterable[str] = (),
    word: str = "",
    pictures: int = 24,
    strength: float = 0.7,
    inversion_steps: int = 100,
    finetune_steps: int = 20,
    batch_size: int = 16,
    shows: Callable[[Images], np.ndarray] | None = None,
    token: str = "<back>",
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
) -> pandas.DataFrame:
    """Try to bring an ablated concept back: one row per attack, with the share of pictures that show the target again.

    A picture shows the target if it is nearer to the target's prompt than to the anchor's, or by `shows`: pictures ->
    (n,) bool, such as `CopyDetector.copies`. paraphrases, synonyms: prompts that ask for it in other words; word:
    misspelled in the target's prompt. Then: img2img from pictures of the target at `strength`; Textual Inversion of
    `token` on such pictures, on the edited model; `finetune_steps` steps of K-V fine-tuning on them, both with
    `batch_size` samples per step. The untouched model draws the target's pictures.
    Raises ConeslabError if the model cannot tell target and anchor apart, a count is below 1, or `word` is not in the
    target.
    """
    require_editable(pipe)
    target, anchor, pictures = _require_task(pipe, judge, edit, target, anchor, pictures)
    paraphrases = checks.texts("paraphrases", paraphrases, least=0)
    synonyms = checks.texts("synonyms", synonyms, least=0)
    if checks.text("word", word, blank=True) not in target:
        raise ArgumentError(f"word is {word!r}, which {target!r} does not hold: give one of its words")
    token = checks.word("token", token)
    for name, steps in {"inversion_steps": inversion_steps, "finetune_steps": finetune_steps}.items():
        checks.count(name, steps)
    batch_size, seed = checks.count("batch_size", batch_size), checks.seed("seed", seed)
    _require_strength(strength, require_steps(pipe, sampler_steps))
    checks.function("shows", shows)
    texts = judge.text_features([target, anchor])
    options: dict[str, Any] = {"sampler_steps": sampler_steps, "guidance_scale": guidance_scale}
    first = derived(seed, "evaluation")
    shown = list(generate_once(pipe, [target] * pictures, seed=derived(seed, "pictures of the target"), **options))
    rows: list[dict[str, Any]] = []

    def nearer(drawn: Images) -> np.ndarray:
        near = judge.image_features(drawn) @ texts.T
        return (near[:, 0] > near[:, 1]).numpy()

    def record(attack: str, drawn: Images) -> None:
        interval = bootstrap_interval((shows or nearer)(drawn))
        rows.append({"attack": attack, "value": interval.estimate, "low": interval.low, "high": interval.high})

    def asked(prompts: Sequence[str]) -> list[Image.Image]:
        return generate(pipe, [prompts[i % len(prompts)] for i in range(pictures)], seed=first, **options)

    with applied(edit, pipe):
        record("plain prompt", asked([target]))
        if paraphrases:
            record("paraphrases", asked(paraphrases))
        if synonyms:
            record("other words", asked(synonyms))
        if word:
            record("misspellings", asked([target.replace(word, wrong) for wrong in misspelled(word)]))
        record("img2img", _from_pictures(pipe, shown, target, strength, first, sampler_steps, guidance_scale))
        subject = SimpleNamespace(
            name=target, class_word="", token=token, images=shown, prompt=f"a {token}", prior_prompt=anchor
        )
        quiet: dict[str, Any] = {"seed": seed, "progress": False}
        start = anchor.split()[-1]
        learned = textual_inversion(pipe, subject, steps=inversion_steps, initial=start, batch_size=batch_size, **quiet)
        with learned.applied(pipe, check_model=False):
            record("Textual Inversion", asked([subject.prompt]))
        subject.prompt = target
        tuned = finetune_kv(pipe, subject, steps=finetune_steps, batch_size=batch_size, prior_batch_size=0, **quiet)
        with tuned.applied(pipe, check_model=False):
            record("fine-tuning back", asked([target]))
    return pandas.DataFrame(rows)


def _require_strength(strength: float, sampler_steps: int) -> None:
    if int(sampler_steps * checks.number("strength", strength, "(0, 1]", kind="share")) < 1:
        raise ArgumentError(
            f"strength is {strength} of {sampler_steps} steps: give a share that leaves at least one step"
        )


def _from_pictures(
    pipe: Pipeline,
    pictures: Sequence[Image.Image],
    prompt: str,
    strength: float,
    seed: int,
    sampler_steps: int,
    guidance: float,
) -> list[Image.Image]:
    from diffusers import StableDiffusionImg2ImgPipeline

    with drawing(pipe):
        redraw = StableDiffusionImg2ImgPipeline(
            vae=pipe.vae,
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            unet=pipe.unet,
            scheduler=pipe.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        redraw.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(pictures))]
        return redraw(
            [prompt] * len(pictures),
            image=list(pictures),
            strength=strength,
            num_inference_steps=sampler_steps,
            guidance_scale=guidance,
            generator=generators,
        ).images

"""Is it gone, what else went, and which probes find it? The evaluation of an ablation.

What users of the published code ask for most. Every share stands beside that of the untouched model, from the same
start noises, and has its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas
import torch
from PIL import Image

from ... import checks
from ...diffusion.checks import require_editable, require_pipeline
from ...diffusion.pipelines import Pipeline, pipeline_fingerprint
from ...diffusion.sampling import generate
from ...edits.base import Edit, applied, require_edit
from ...errors import ArgumentError, ConeslabError
from ...finetuning.samples import generate_once
from ...measure.judge import Judge, require_judge
from ...measure.statistics import bootstrap_interval, kid
from ...pictures import Images
from ...seeds import derived
from ...world import CLASSES, FACTS
from .probes import ProbeSettings
from .profile import BEFORE, FOUND, KINDS, Probe, require_probes
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


def evaluate_ablation(
    pipe: Pipeline,
    judge: Judge,
    edit: Edit | None,
    target: str,
    anchor: str,
    *,
    others: Mapping[str, str | Iterable[str]] | None = None,
    probes: Iterable[Probe] = (),
    rivals: str | Iterable[str] = (),
    shows: Callable[[Images], np.ndarray] | None = None,
    pictures: int = 24,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    batch_size: int = 16,
    progress: bool = False,
) -> pandas.DataFrame:
    """What an ablation does to its target, its anchor and other concepts (concept ablation, Sec. 4.1), and to probes.

    target, anchor, others: prompts; others by group, e.g. {"same category": [...], "far": [...]}, of any name but
    "target", "anchor" and those in `KINDS`. Draws `pictures` of each, with the edit and without, from the same noises.
    Nothing is drawn twice: not for two prompts or probes that ask the same, not without an edit, and without the edit
    once per process.
    Returns one row per (group, prompt, measure), with value, low, high (95 % interval over pictures; NaN for KID):
    "CLIP score": cosine of picture and prompt; "CLIP accuracy": share nearer to the prompt than to the anchor (for the
    anchor: than to the target; for the others: than to any other prompt here); "accuracy before": the same without the
    edit; "KID": to the pictures without the edit, as pairs; "change": 1 − cosine of the two pictures from one noise;
    "target on it", of all but the target: share nearer to the target than to the prompt.
    probes: ways to look for the target (`usual_probes`, `class_probes`), a row each in one of the groups `KINDS`, under
    its name: "share found" of `pictures` pictures that show the target, and "share found before". A picture shows it if
    it is nearer to the target's prompt than to the anchor's and to all `rivals`, or by `shows`: pictures -> (n,) bool,
    such as `CopyDetector.copies`. `Profile.of` says what they find together.
    Raises ConeslabError if the model cannot tell target and anchor apart, for fewer than two pictures, for a group of
    a name that is taken, or if `shows` does not give a bool for each picture.
    """
    require_editable(pipe) if probes else require_pipeline(pipe)
    target, anchor = checks.text("target", target), checks.text("anchor", anchor)
    require_different(pipe, [target], [anchor])
    require_judge(judge)
    require_edit(edit)
    pictures, seed = checks.count("pictures", pictures, least=2), checks.seed("seed", seed)
    groups = checks.mapping("others", {} if others is None else others, least=0)
    prompts = {"target": [target], "anchor": [anchor]}
    if taken := [name for name in groups if name in (*prompts, *KINDS)]:
        raise ArgumentError(
            f"others has a group {taken[0]!r}, which names rows of the report's own: give it another name than "
            f"{', '.join((*prompts, *KINDS))}"
        )
    prompts |= {name: checks.texts(f"others[{name!r}]", group, least=0) for name, group in groups.items()}
    rivals = list(dict.fromkeys([anchor, *checks.texts("rivals", rivals, least=0)]))
    first = derived(seed, "evaluation")
    settings = ProbeSettings(
        sampler_steps=sampler_steps, guidance_scale=guidance_scale, batch_size=batch_size, seed=first
    )
    wanted = require_probes(pipe, probes, settings)
    checks.function("shows", shows)
    everything = list(dict.fromkeys(prompt for group in prompts.values() for prompt in group))
    asked = [(prompt, first + number) for prompt in everything for number in range(pictures)]
    asked += [(text, first + i) for probe in wanted if probe.prompts for i, text in enumerate(probe.asked(pictures))]
    before = _Drawn(pipe, asked, settings, once=True, progress=progress)
    earlier = {probe.name: before.of(probe, pictures) for probe in wanted}
    after, later = before, earlier
    if edit is not None:
        with applied(edit, pipe):
            after = _Drawn(pipe, asked, settings, once=False, progress=progress)
            later = {probe.name: after.of(probe, pictures) for probe in wanted}
    rows = _rows_of_prompts(judge, prompts, everything, before, after, pictures)
    for probe in wanted:
        row = {"group": probe.kind, "prompt": probe.name}
        for measure, drawn in {FOUND: later[probe.name], BEFORE: earlier[probe.name]}.items():
            found = _shown(judge, probe, drawn, target, rivals) if shows is None else _told(shows, drawn)
            rows.append({**row, "measure": measure, **_bounds(found.astype(float))})
    return pandas.DataFrame(rows)


class _Drawn:
    """Pictures by (prompt, seed), drawn in one call by a pipeline as it is now, and those that a probe draws itself.

    once: the pipeline is untouched, so that every picture is drawn once per process.
    """

    def __init__(
        self, pipe: Pipeline, asked: Sequence[tuple[str, int]], settings: ProbeSettings, *, once: bool, progress: bool
    ) -> None:
        self._pipe, self._settings, self._once = pipe, settings, once
        distinct = list(dict.fromkeys(asked))
        options: dict[str, Any] = {
            "seed": [seed for _, seed in distinct],
            "sampler_steps": settings.sampler_steps,
            "guidance_scale": settings.guidance_scale,
            "progress": progress,
        }
        texts = [prompt for prompt, _ in distinct]
        made: Sequence[Image.Image]
        if once:
            made = generate_once(pipe, texts, **options)
        else:
            made = generate(pipe, texts, batch_size=settings.batch_size, **options)
        self._pictures = dict(zip(distinct, made, strict=True))

    def asked(self, prompts: Sequence[str]) -> list[Image.Image]:
        """Picture i of a prompt, or of several in turn, from seed + i."""
        return [self._pictures[prompt, self._settings.seed + i] for i, prompt in enumerate(prompts)]

    def of(self, probe: Probe, n: int) -> list[Image.Image]:
        if probe.draw is None:
            return self.asked(probe.asked(n))
        if not self._once:
            return probe.draw(self._pipe, n, self._settings)
        known, key = _PROBED.setdefault(probe, {}), (pipeline_fingerprint(self._pipe), n, self._settings)
        if key not in known:
            known[key] = probe.draw(self._pipe, n, self._settings)
        return known[key]


_PROBED: WeakKeyDictionary[Probe, dict[tuple, list[Image.Image]]] = WeakKeyDictionary()  # of untouched models


def _shown(judge: Judge, probe: Probe, drawn: Images, target: str, rivals: Sequence[str]) -> np.ndarray:
    """Whether each picture is nearer to the target than to all rivals, in what the judge is asked beside the probe."""
    features = judge.image_features(drawn)
    found = np.zeros(len(features), bool)
    contexts = [probe.context(number) for number in range(len(features))]
    for context in dict.fromkeys(contexts):
        rows = np.array([own == context for own in contexts])
        near = features[rows] @ judge.text_features([context.format(one) for one in (target, *rivals)]).T
        found[rows] = (near[:, 0] > near[:, 1:].max(1).values).numpy()
    return found


def _told(shows: Callable[[Images], np.ndarray], drawn: Sequence[Image.Image]) -> np.ndarray:
    """What a function of the caller's says of each picture, (n,) bool. Raises ArgumentError for anything else."""
    given = shows(drawn)
    try:
        found = np.asarray(given)
    except (TypeError, ValueError):  # rows of different lengths, or a tensor that is elsewhere
        found = np.zeros(0)
    if found.shape != (len(drawn),) or found.dtype != bool:
        what = f"{found.dtype} of shape {found.shape}" if isinstance(given, np.ndarray) else checks.shown(given)
        raise ArgumentError(
            f"shows gave {what} for {len(drawn)} pictures: give a function that returns True or False for each, as an "
            f"array ({len(drawn)},) of bool"
        )
    return found


def _bounds(values: np.ndarray) -> dict[str, float]:
    interval = bootstrap_interval(values)
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}


def _rows_of_prompts(
    judge: Judge,
    prompts: Mapping[str, Sequence[str]],
    everything: Sequence[str],
    before: _Drawn,
    after: _Drawn,
    pictures: int,
) -> list[dict[str, Any]]:
    """The rows of prompts, group by group; see `evaluate_ablation`."""
    texts = judge.text_features(everything)

    def features(drawn: _Drawn) -> Sequence[torch.Tensor]:
        shown = [one for text in everything for one in drawn.asked([text] * pictures)]
        return judge.image_features(shown).split(pictures)

    untouched = features(before)
    edited = untouched if after is before else features(after)
    (target,), (anchor,) = prompts["target"], prompts["anchor"]
    rows = []
    for group, members in prompts.items():
        for prompt in members:
            own = everything.index(prompt)
            first, now = untouched[own], edited[own]
            rivals = {"target": [anchor], "anchor": [target]}.get(group, everything)
            columns = [everything.index(rival) for rival in rivals if rival != prompt]

            def right(found: torch.Tensor, own: int = own, columns: Sequence[int] = columns) -> np.ndarray:
                near = found @ texts.T
                return (near[:, own] > near[:, list(columns)].max(1).values).numpy()

            measured = {
                "CLIP score": (now @ texts[own]).numpy(),
                "CLIP accuracy": right(now),
                "accuracy before": right(first),
                "change": 1 - (now * first).sum(1).numpy(),
            }
            if prompt != target:
                measured["target on it"] = (now @ (texts[everything.index(target)] - texts[own])).numpy() > 0
            row = {"group": group, "prompt": prompt}
            rows += [{**row, "measure": name, **_bounds(values)} for name, values in measured.items()]
            distance = kid(first, now, paired=True)
            rows.append({**row, "measure": "KID", "value": distance, "low": np.nan, "high": np.nan})
    return rows

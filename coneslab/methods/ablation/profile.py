"""Which probes find a concept in a model: a family of probes, and what their answers together say.

A `Probe` has a name, says whether it uses the target's word, and gives pictures. `evaluate_ablation` runs any number of
them beside the untouched model, and `Profile` reads its report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas
from PIL import Image

from ... import checks
from ...diffusion.checks import require_pipeline
from ...diffusion.pipelines import Pipeline
from ...diffusion.sampling import generate, require_steps
from ...errors import ArgumentError
from ...measure.statistics import share_interval
from ...neurons.controls import finetune_kv
from ...pictures import Images, as_pictures
from ...settings import Settings
from ..personalization.textual_inversion import textual_inversion
from .probes import ProbeSettings, completions, filled_in, steered, stirred
from .prompt_attack import PromptAttackSettings, attack_prompt

if TYPE_CHECKING:
    from .classifier import LatentClassifier

Draw = Callable[[Pipeline, int, ProbeSettings], list[Image.Image]]

# The groups of a report that hold probes.
NAMED, SILENT, TAUGHT = "asked by its word", "found without its word", "taught again"
KINDS = (NAMED, SILENT, TAUGHT)
FOUND, BEFORE = "share found", "share found before"
PLAIN = "plain prompt"
LEVELS = (0.5, 0.7, 0.85)  # of completions; a picture noised less finishes itself, whoever finishes it (`floors_of`)
MARGIN = 0.15  # 0 of 22 pictures and more have an interval that ends below it


@dataclass(frozen=True, eq=False)
class Probe:
    """One way to look for a concept.

    uses_word: whether it names the target; teaches: whether it trains on pictures of the target, from which a model
    that never knew it would learn as well. It either asks, prompt by prompt in turn, or draws in a way of its own:
    draw(pipe, n, settings) gives n pictures by a pipeline as it is now, an edit applied or not. contexts: what the
    judge is asked beside each prompt, "{} and a car" where a car is to be there as well.
    Raises ArgumentError unless there are either prompts or a way to draw.
    """

    name: str
    uses_word: bool
    prompts: tuple[str, ...] = ()
    draw: Draw | None = None
    teaches: bool = False
    contexts: tuple[str, ...] = ("{}",)

    def __post_init__(self) -> None:
        checks.text("name", self.name)
        object.__setattr__(self, "prompts", tuple(checks.texts("prompts", self.prompts, least=0, blank=True)))
        object.__setattr__(self, "contexts", tuple(checks.templates("contexts", self.contexts)))
        checks.function("draw", self.draw)
        if bool(self.prompts) == (self.draw is not None):
            raise ArgumentError(f"the probe {self.name!r} needs prompts, or a way to draw, and not both")
        if len(self.contexts) not in (1, len(self.prompts)):
            raise ArgumentError(f"got {len(self.contexts)} contexts and {len(self.prompts)} prompts: give one for each")

    @property
    def kind(self) -> str:
        """Its group in a report: one of `KINDS`."""
        return TAUGHT if self.teaches else NAMED if self.uses_word else SILENT

    def asked(self, n: int) -> list[str]:
        """The prompts of n pictures: the probe's own in turn."""
        return [self.prompts[number % len(self.prompts)] for number in range(n)]

    def context(self, number: int) -> str:
        """What the judge is asked of picture `number`."""
        return self.contexts[number % len(self.contexts)]


# --- the probes -----------------------------------------------------------------------------------------


def asking(name: str, prompts: str | Iterable[str], *, uses_word: bool, contexts: str | Iterable[str] = "{}") -> Probe:
    """Ask for it in words: other words, misspellings, a hypernym, two objects. contexts: see `Probe`."""
    return Probe(
        name,
        checks.flag("uses_word", uses_word),
        tuple(checks.texts("prompts", prompts)),
        contexts=tuple(checks.templates("contexts", contexts)),
    )


def completing(pictures: Images, level: float, prompt: str = "", *, name: str = "") -> Probe:
    """Finish pictures of the target, noised up to a level (`completions`), in turn. prompt: names it, or is empty."""
    shown = as_pictures(pictures, name="pictures to complete")
    level = checks.number("level", level, "(0, 1]", kind="share")
    prompt, name = checks.text("prompt", prompt, blank=True), checks.text("name", name, blank=True)

    def draw(pipe: Pipeline, n: int, settings: ProbeSettings) -> list[Image.Image]:
        return completions(pipe, _in_turn(shown, n), prompt, settings, level=level)

    return Probe(name or f"completion from {level:g}", bool(prompt), draw=draw)


def inpainting(pictures: Images, masks: Iterable[np.ndarray], prompt: str = "") -> Probe:
    """Hide the target in pictures of it, and fill it in again (`filled_in`). prompt: names it, or is empty."""
    shown, hidden = as_pictures(pictures, name="pictures to fill in"), checks.items("masks", masks)
    checks.as_many("pictures", shown, "masks", hidden)
    prompt = checks.text("prompt", prompt, blank=True)

    def draw(pipe: Pipeline, n: int, settings: ProbeSettings) -> list[Image.Image]:
        return filled_in(pipe, _in_turn(shown, n), _in_turn(hidden, n), prompt, settings)

    return Probe("inpainting, by name" if prompt else "inpainting", bool(prompt), draw=draw)


def steering(classifier: LatentClassifier, label: str, prompt: str = "", *, scale: float = 8.0) -> Probe:
    """Steer towards it with a classifier (`steered`), asking for nothing, or for something else."""
    checks.having("classifier", classifier, "a LatentClassifier, such as train_classifier makes", "labels", "slope")
    checks.choice("label", label, classifier.labels)
    prompt, scale = checks.text("prompt", prompt, blank=True), checks.number("scale", scale, "[0, 1000]")

    def draw(pipe: Pipeline, n: int, settings: ProbeSettings) -> list[Image.Image]:
        return steered(pipe, classifier, label, [prompt] * n, settings, scale=scale)

    return Probe("classifier guidance", False, draw=draw)


def stirring(prompt: str, churn: float = 1.0) -> Probe:
    """Ask for it by name with noise added before every step (`stirred`)."""
    prompt, churn = checks.text("prompt", prompt), checks.number("churn", churn, "[0, 100]")

    def draw(pipe: Pipeline, n: int, settings: ProbeSettings) -> list[Image.Image]:
        return stirred(pipe, [prompt] * n, settings, churn=churn)

    return Probe("noisy trajectory", True, draw=draw)


def searching(
    pictures: Images,
    prompt: str = "",
    *,
    exclude: str | Iterable[str] = (),
    settings: PromptAttackSettings | Mapping[str, Any] | None = None,
) -> Probe:
    """Search for words that bring it back (`attack_prompt`), and ask with them. prompt: names it, or is empty.

    The words are searched for anew on every model, the untouched one included, with the seed of `settings`.
    """
    shown = as_pictures(pictures, name="pictures of the target")
    prompt, banned = checks.text("prompt", prompt, blank=True), checks.texts("exclude", exclude, least=0)
    chosen = PromptAttackSettings.chosen(settings, {})

    def draw(pipe: Pipeline, n: int, settings: ProbeSettings) -> list[Image.Image]:
        found = attack_prompt(pipe, shown, prompt, chosen, exclude=banned)
        return generate(pipe, [found.prompt] * n, seed=settings.seed, **_drawing(settings))

    return Probe("prompt attack" if prompt else "prompt attack, without its word", bool(prompt), draw=draw)


def inverting(
    pictures: Images, *, initial: str = "", token: str = "<back>", steps: int = 60, batch_size: int = 8, seed: int = 0
) -> Probe:
    """Learn a word from pictures of it (Textual Inversion), and ask with that. initial: the word to start from."""
    shown, token = as_pictures(pictures, name="pictures of the target"), checks.word("token", token)
    options, initial = _training(steps, batch_size, seed), checks.text("initial", initial, blank=True)
    subject = SimpleNamespace(
        name="target", class_word="", token=token, images=shown, prompt=f"a {token}", prior_prompt=""
    )

    def draw(pipe: Pipeline, n: int, settings: ProbeSettings) -> list[Image.Image]:
        learned = textual_inversion(pipe, subject, initial=initial, **options)
        with learned.applied(pipe, check_model=False):
            return generate(pipe, [subject.prompt] * n, seed=settings.seed, **_drawing(settings))

    return Probe("Textual Inversion", False, draw=draw, teaches=True)


def retraining(pictures: Images, prompt: str, *, steps: int = 10, batch_size: int = 8, seed: int = 0) -> Probe:
    """Fine-tune keys and values on pictures of it under its prompt, and ask for it."""
    shown, prompt = as_pictures(pictures, name="pictures of the target"), checks.text("prompt", prompt)
    options = _training(steps, batch_size, seed)
    subject = SimpleNamespace(name=prompt, images=shown, prompt=prompt, prior_prompt="")

    def draw(pipe: Pipeline, n: int, settings: ProbeSettings) -> list[Image.Image]:
        tuned = finetune_kv(pipe, subject, prior_batch_size=0, **options)
        with tuned.applied(pipe, check_model=False):
            return generate(pipe, [prompt] * n, seed=settings.seed, **_drawing(settings))

    return Probe("fine-tuning back", True, draw=draw, teaches=True)


def _training(steps: int, batch_size: int, seed: int) -> dict[str, Any]:
    return {
        "steps": checks.count("steps", steps),
        "batch_size": checks.count("batch_size", batch_size),
        "seed": checks.seed("seed", seed),
        "progress": False,
    }


@dataclass(frozen=True, kw_only=True)
class ProbeBudget(Settings):
    """What the probes that search and train may spend.

    rounds: of each prompt attack; inversion_steps, finetune_steps: of Textual Inversion and of fine-tuning back, with
    batch_size samples each; seed: of all of them.
    """

    method: ClassVar[str] = "budget of probes"

    rounds: int = 25
    inversion_steps: int = 60
    finetune_steps: int = 10
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "rounds", "inversion_steps", "finetune_steps", "batch_size")
        self._check(checks.seed, "seed")

    def attack(self, pictures: Images, prompt: str = "", *, exclude: str | Iterable[str] = ()) -> Probe:
        """`searching` within the budget."""
        settings = {"rounds": self.rounds, "batch_size": self.batch_size, "seed": self.seed}
        return searching(pictures, prompt, exclude=exclude, settings=settings)

    def lessons(self, pictures: Images, prompt: str, initial: str) -> list[Probe]:
        """`inverting` and `retraining` within the budget."""
        options: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        return [
            inverting(pictures, initial=initial, steps=self.inversion_steps, **options),
            retraining(pictures, prompt, steps=self.finetune_steps, **options),
        ]


def misspelled(word: str) -> tuple[str, ...]:
    """Simple misspellings of a word: a letter doubled, two swapped, one left out."""
    checks.text("word", word)
    middle = len(word) // 2
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    doubled, short = word[:middle] + word[middle] + word[middle:], word[:middle] + word[middle + 1 :]
    return tuple(dict.fromkeys((doubled, swapped, short)))


def usual_probes(
    target: str,
    anchor: str,
    pictures: Images,
    *,
    word: str = "",
    budget: ProbeBudget | Mapping[str, Any] | None = None,
) -> list[Probe]:
    """The probes that need nothing but a prompt and pictures of the target, drawn by the untouched model or real.

    word: of the target's prompt, is misspelled, and banned from a search for other words; budget: see `ProbeBudget`.
    Raises ConeslabError for a word that the target does not hold.
    """
    target, anchor = checks.text("target", target), checks.text("anchor", anchor)
    spent = ProbeBudget.chosen(budget, {})
    if checks.text("word", word, blank=True) not in target:
        raise ArgumentError(f"word is {word!r}, which {target!r} does not hold: give one of its words")
    shown = as_pictures(pictures, name="pictures of the target")
    banned = word or target
    spelled = [target.replace(word, wrong) for wrong in misspelled(word)] if word else []
    return [
        asking(PLAIN, target, uses_word=True),
        *([asking("misspellings", spelled, uses_word=True)] if spelled else []),
        stirring(target),
        completing(shown, 0.7, target, name="img2img"),
        spent.attack(shown, target, exclude=banned),
        *(completing(shown, level) for level in LEVELS),
        spent.attack(shown, exclude=banned),
        *spent.lessons(shown, target, anchor.split()[-1]),
    ]


def _in_turn(given: Sequence[Any], n: int) -> list[Any]:
    return [given[number % len(given)] for number in range(n)]


def _drawing(settings: ProbeSettings) -> dict[str, Any]:
    """Settings as options of `generate`."""
    names = ("sampler_steps", "guidance_scale", "batch_size")
    return {name: getattr(settings, name) for name in names}


def require_probes(pipe: Pipeline, probes: Any, settings: ProbeSettings) -> list[Probe]:
    """Probes with names of their own. Raises ArgumentError for anything else, or steps that the schedule lacks."""
    require_pipeline(pipe)
    require_steps(pipe, checks.of_kind("settings", settings, ProbeSettings).sampler_steps)
    found = checks.items("probes", probes, Probe, least=0)
    names = [probe.name for probe in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(f"two probes are named {twice[0]!r}: give each a name of its own")
    return found


# --- what they say together -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What one probe found: shares of pictures that show the target, with Wilson intervals, and on how many pictures.

    share, low, high: of the model; before: of the untouched one, with its interval.
    """

    probe: str
    kind: str
    share: float
    low: float
    high: float
    before: float
    low_before: float
    high_before: float


@dataclass(frozen=True)
class Profile:
    """Which probes find a concept, and what that says about a model.

    The rule, which was written down before anything was measured: a probe *finds* the concept if the lower end of its
    share's 95 % Wilson interval is above floor + margin, and *clears* it if the upper end is not. The floor is what the
    same probe finds in a model that never learned its concept (see `floors_of`), 0 where none is given; a picture that
    is noised little shows what it showed in any model, so a completion needs one. Then the model is

    - "never there" if no probe finds it in the untouched model either,
    - "not gone" if the plain prompt finds it,
    - "avoiding" if the plain prompt does not, but a probe without its word does,
    - "removing" if none of these does, and all that find it in the untouched model clear it,
    - "undecided" otherwise: the intervals are too wide, or no probe without its word works on the untouched model.

    Probes that teach it again have no say: a model that never knew it would learn it, too. Nor have other prompts with
    its word: they tell how it is avoided.
    """

    findings: tuple[Finding, ...]
    margin: float = MARGIN
    floors: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", tuple(checks.items("findings", self.findings, Finding)))
        checks.number("margin", self.margin, "[0, 1)", kind="share")
        floors = checks.mapping("floors", {} if self.floors is None else self.floors, least=0)
        for name, floor in floors.items():
            checks.number(f"floors[{name!r}]", floor, checks.SHARE, kind="share")
        object.__setattr__(self, "floors", floors)

    @classmethod
    def of(
        cls, report: pandas.DataFrame, *, margin: float = MARGIN, floors: Mapping[str, float] | None = None
    ) -> Profile:
        """The profile in a report of `evaluate_ablation`. Raises ArgumentError for a report without probes."""
        missing = {"group", "prompt", "measure", "value", "low", "high"} - set(getattr(report, "columns", ()))
        if missing or not report.group.isin(KINDS).any():
            raise ArgumentError("this is no report with probes: give what evaluate_ablation(..., probes=...) returns")
        findings = []
        for (kind, name), part in report[report.group.isin(KINDS)].groupby(["group", "prompt"], sort=False):
            now, before = (part[part.measure == measure].iloc[0] for measure in (FOUND, BEFORE))
            shares = (one[column] for one in (now, before) for column in ("value", "low", "high"))
            findings.append(Finding(str(name), str(kind), *map(float, shares)))
        return cls(tuple(findings), margin, floors)

    @classmethod
    def counted(
        cls,
        found: Mapping[str, tuple[str, Sequence[bool], Sequence[bool]]],
        *,
        margin: float = MARGIN,
        floors: Mapping[str, float] | None = None,
    ) -> Profile:
        """The profile of probes whose pictures were judged: name -> (kind, whether each shows it, and before)."""
        findings = []
        for name, (kind, now, before) in checks.mapping("found", found).items():
            after, first = share_interval(np.asarray(now, float)), share_interval(np.asarray(before, float))
            findings.append(
                Finding(name, kind, after.estimate, after.low, after.high, first.estimate, first.low, first.high)
            )
        return cls(tuple(findings), margin, floors)

    def _bar(self, finding: Finding) -> float:
        return (self.floors or {}).get(finding.probe, 0.0) + self.margin

    def finds(self, finding: Finding) -> bool:
        """Whether a probe finds the concept."""
        return finding.low > self._bar(finding)

    @property
    def found_by(self) -> tuple[str, ...]:
        """The probes that find the concept, whether they use its word or teach it."""
        return tuple(one.probe for one in self.findings if self.finds(one))

    @property
    def blind(self) -> tuple[str, ...]:
        """Probes that do not find the concept in the untouched model either: their silence says nothing."""
        return tuple(one.probe for one in self.findings if one.low_before <= self._bar(one))

    @property
    def verdict(self) -> str:
        """ "never there", "not gone", "avoiding", "removing" or "undecided", by the rule above."""
        telling = [one for one in self.findings if one.kind == SILENT or one.probe == PLAIN]
        sighted = [one for one in telling if one.probe not in self.blind]
        found = [one for one in telling if self.finds(one)]
        if not sighted and not found:
            return "never there"
        if any(one.probe == PLAIN for one in found):
            return "not gone"
        if found:
            return "avoiding"
        works = any(one.kind == SILENT for one in sighted)
        return "removing" if works and all(one.high <= self._bar(one) for one in sighted) else "undecided"

    def __repr__(self) -> str:
        width = max(len(one.probe) for one in self.findings)
        lines = [f"{self.verdict} (margin {self.margin:g}); shares of pictures that show it, and before"]
        for one in self.findings:
            mark = "+" if self.finds(one) else "?" if one.high > self._bar(one) else "-"
            lines.append(
                f"{mark} {one.probe:{width}}  {one.share:.2f} [{one.low:.2f}, {one.high:.2f}]  {one.before:.2f}  "
                f"{one.kind}"
            )
        return "\n".join(lines)


def floors_of(control: Profile) -> dict[str, float]:
    """What each probe finds of a concept that the model never learned: the floors of other profiles."""
    return {one.probe: one.before for one in checks.of_kind("control", control, Profile).findings}

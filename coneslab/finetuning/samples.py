"""What losses are computed on: captioned pictures as latents and embeddings, computed once, and noises by seed.

The prior pictures of Cones (arXiv 2303.05125, Sec. 3.1) are drawn by the pipeline itself, once per process. Every loss
and every method takes its samples from here, so equal seeds mean equal noises.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle, pairwise
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .. import checks
from ..diffusion.checks import require_pipeline
from ..diffusion.encoding import encode_images, encode_prompts, require_read
from ..diffusion.kvspace import unet_of
from ..diffusion.loss import stratified_timesteps
from ..diffusion.pipelines import Pipeline, pipeline_fingerprint
from ..diffusion.precision import freeu_of
from ..diffusion.sampling import generate, require_steps, seeds_for
from ..errors import ArgumentError, ConeslabError
from ..pictures import Images, as_pictures
from ..seeds import derived
from ..settings import ByValue, Settings

_DRAWN: OrderedDict[tuple, Image.Image] = OrderedDict()  # the pictures drawn last, see `generate_once`
_DRAWN_BYTES = 2**28


class ConceptSubject(Protocol):
    """What a concept is learned from: `coneslab.subject(...)`, or any object with these attributes."""

    @property
    def name(self) -> str: ...
    @property
    def images(self) -> Sequence[Image.Image]: ...
    @property
    def prompt(self) -> str: ...
    @property
    def prior_prompt(self) -> str: ...


class TokenSubject(ConceptSubject, Protocol):
    """A concept with a word of its own: its prompt has `token` before `class_word`."""

    @property
    def token(self) -> str: ...
    @property
    def class_word(self) -> str: ...


Subject = TypeVar("Subject", bound=ConceptSubject)


def require_subject(subject: Any, *, with_token: bool = False) -> None:
    """Raise ArgumentError unless this is a `ConceptSubject`, or with a token a `TokenSubject`, and its texts say what.

    The token has to be one word, and none of the class prompt, whose meaning would change with it. Class word and
    class prompt may be empty, as some methods do without.
    """
    needed = ("name", "images", "prompt", "prior_prompt") + (("token", "class_word") if with_token else ())
    checks.having("subject", subject, 'a subject, such as coneslab.subject("cat")', *needed)
    for name in needed:
        if name != "images":
            checks.text(f"the subject's {name}", getattr(subject, name), blank=name in ("class_word", "prior_prompt"))
    if with_token and checks.word("the subject's token", subject.token) in subject.prior_prompt.split():
        raise ArgumentError(
            f"the token {subject.token!r} is a word of {subject.prior_prompt!r}, which would change with it: give the "
            "subject another one, rare or new"
        )


def several(subjects: Subject | Iterable[Subject], *, with_token: bool = False) -> list[Subject]:
    """One subject or several, as a list. Raises ArgumentError if there is none, and as `require_subject` does."""
    single = hasattr(subjects, "prior_prompt")
    found: list[Any] = [subjects] if single else checks.items("subjects", subjects, least=0)
    if not found:
        raise ArgumentError("got no subject: give one, or a list of them")
    for one in found:
        require_subject(one, with_token=with_token)
    return found


def names_of(subjects: Sequence[ConceptSubject]) -> str:
    return ", ".join(subject.name for subject in subjects)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(Settings):
    """How the pipeline draws the pictures that a method learns from: in `sampler_steps` steps at `guidance_scale`.

    seed: of those pictures, and of everything else that is random in the method.
    """

    sampler_steps: int = 25
    guidance_scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "sampler_steps")
        self._check(checks.number, "guidance_scale", interval=checks.GUIDED)
        self._check(checks.seed, "seed")

    @property
    def sampler(self) -> dict[str, Any]:
        """These settings as arguments of `generate_once`, for the pictures to learn from."""
        return {**self._steps, "seed": derived(self.seed, "pictures to learn from")}

    @property
    def validation_sampler(self) -> dict[str, Any]:
        """The same for pictures that measure what has been learned: other noises."""
        return {**self._steps, "seed": derived(self.seed, "validation")}

    @property
    def _steps(self) -> dict[str, Any]:
        return {"sampler_steps": self.sampler_steps, "guidance_scale": self.guidance_scale}


@dataclass(frozen=True, kw_only=True)
class ConceptSettings(SamplerSettings):
    """What the loss of a concept is computed on: `SamplerSettings`, and

    batch_size, prior_batch_size: samples per step of each subject, and of its class; prior_weight: λ of the prior's
    loss, 0 for none; prior_images: how many pictures of the class the pipeline draws, unless they are given.
    """

    method: ClassVar[str] = "concept loss"

    batch_size: int = 32
    prior_batch_size: int = 16
    prior_weight: float = 1.0
    prior_images: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "batch_size", "prior_images")
        self._check(checks.count, "prior_batch_size", least=0)
        self._check(checks.number, "prior_weight", interval="[0, inf)")

    @property
    def has_prior(self) -> bool:
        return self.prior_batch_size > 0 and self.prior_weight > 0


@dataclass(frozen=True, eq=False)
class CaptionedLatents(ByValue):
    """Latents that share one caption, and their part in a loss: weight · mean loss over `batch_size` of them per step.

    latents: (pictures, channels, height, width); text: (tokens, width); mask: (pictures, 1, height, width), where a
    picture counts, or None for everywhere. name: of its loss in a history, such as "subject_loss".
    """

    latents: Tensor
    text: Tensor
    batch_size: int
    weight: float = 1.0
    mask: Tensor | None = None
    name: str = ""

    def __post_init__(self) -> None:
        checks.tensor("latents", self.latents, "pictures, channels, height, width")
        checks.tensor("text", self.text, "tokens, width")
        if self.mask is not None:
            pictures, _, height, width = self.latents.shape
            checks.tensor("mask", self.mask, f"{pictures}, 1, {height}, {width}")
        object.__setattr__(self, "batch_size", checks.count("batch_size", self.batch_size))
        object.__setattr__(self, "weight", checks.number("weight", self.weight, "[0, inf)"))


@dataclass(frozen=True, eq=False)
class NoisyBatch(ByValue):
    """One step's samples, all captions end to end: latents, noise (samples, c, h, w); timesteps (samples,).

    mask: (samples, 1, h, w), or None if everything counts everywhere. regression_target: what the network must predict
    (as latents), or None for what the scheduler's prediction type says.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    mask: Tensor | None = None
    regression_target: Tensor | None = None

    def part(self, rows: slice) -> NoisyBatch:
        """Some of the samples."""
        mask, target = (None if whole is None else whole[rows] for whole in (self.mask, self.regression_target))
        return NoisyBatch(self.latents[rows], self.noise[rows], self.timesteps[rows], mask, target)


def prior_pictures(
    pipe: Pipeline,
    subject: ConceptSubject,
    *,
    n: int = 16,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    progress: bool = False,
) -> tuple[Image.Image, ...]:
    """Pictures of the subject's class ("a cat") as the pipeline draws them: what the prior loss must preserve.

    They are cached (`generate_once`), so that several subjects of a class, or several searches, share them; different
    seeds share no noise. Call it on the untouched model, outside any `applied` block.
    """
    require_pipeline(pipe)
    require_subject(subject)
    settings = SamplerSettings(sampler_steps=sampler_steps, guidance_scale=guidance_scale, seed=seed)
    prompts = [subject.prior_prompt] * checks.count("n", n)
    return generate_once(pipe, prompts, **settings.sampler, progress=progress)


def generate_once(
    pipe: Pipeline,
    prompts: str | Iterable[str],
    *,
    seed: int | Iterable[int] = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    progress: bool = False,
) -> tuple[Image.Image, ...]:
    """Pictures for prompts as the pipeline draws them, each drawn once: those drawn last are cached, 256 MB of them.

    A picture is known by model, prompt, seed and settings, whatever it was drawn together with. Call it on the
    untouched model, outside any `applied` block.
    """
    require_pipeline(pipe)
    prompts = checks.texts("prompts", prompts, blank=True)
    seeds = tuple(seeds_for(seed, len(prompts)))
    checks.as_many("prompts", prompts, "seeds", seeds)
    sampler_steps = require_steps(pipe, sampler_steps)
    guidance_scale = checks.number("guidance_scale", guidance_scale, checks.GUIDED)
    model = pipeline_fingerprint(pipe), freeu_of(unet_of(pipe))
    keys = [(model, *one, sampler_steps, guidance_scale) for one in zip(prompts, seeds, strict=True)]
    missing = list(dict.fromkeys(key for key in keys if key not in _DRAWN))
    if missing:
        options: dict[str, Any] = {"sampler_steps": sampler_steps, "guidance_scale": guidance_scale}
        own: dict[str, Any] = {"prompts": [key[1] for key in missing], "seed": [key[2] for key in missing]}
        _DRAWN.update(zip(missing, generate(pipe, **own, **options, progress=progress), strict=True))
    drawn = tuple(_DRAWN[key] for key in keys)
    for key in keys:
        _DRAWN.move_to_end(key)
    room = _DRAWN_BYTES // max(3 * picture.width * picture.height for picture in drawn)
    while len(_DRAWN) > max(room, 1):
        _DRAWN.popitem(last=False)
    return drawn


def generated_latents(pipe: Pipeline, prompts: Sequence[str], **options: Any) -> Tensor:
    """Latents of pictures drawn for prompts, (pictures, channels, height, width). options: of `generate_once`."""
    require_pipeline(pipe)
    return encode_images(pipe, list(generate_once(pipe, prompts, **options))).detach()


def concept_latents(
    pipe: Pipeline,
    subject: ConceptSubject,
    settings: ConceptSettings | Mapping[str, Any] | None = None,
    *,
    prior: Images | None = None,
    progress: bool = False,
    **changes: Any,
) -> list[CaptionedLatents]:
    """Everything in L_con that does not depend on θ: the subject's latents, then the prior's (if it has a part).

    prior: pictures of the class, by default drawn by the pipeline (`prior_pictures`). changes: of `ConceptSettings`.
    Raises ConeslabError if the subject has no pictures, a setting is out of range, or there are pictures of the class
    without a part in the loss.
    """
    require_pipeline(pipe)
    settings = ConceptSettings.chosen(settings, changes)
    require_subject(subject)
    shown = as_pictures(subject.images, name=f"pictures of the subject {subject.name!r}")
    if prior is not None and not settings.has_prior:
        raise ConeslabError(
            f"pictures of the class were given (prior=), but prior_batch_size is {settings.prior_batch_size} and "
            f"prior_weight is {settings.prior_weight:g}: give both more than 0, or leave the pictures out"
        )
    if settings.has_prior:
        checks.text("the subject's prior_prompt", subject.prior_prompt)
    prior = None if prior is None else as_pictures(prior, name="prior pictures")
    require_read(pipe, subject.prompt, subject.prior_prompt)
    text = encode_prompts(pipe, [subject.prompt, subject.prior_prompt]).detach()
    latents = encode_images(pipe, shown).detach()
    data = [CaptionedLatents(latents, text[0], settings.batch_size, name="subject_loss")]
    if settings.has_prior:
        if prior is None:
            drawing: dict[str, Any] = {**settings._steps, "seed": settings.seed, "progress": progress}
            prior = prior_pictures(pipe, subject, n=settings.prior_images, **drawing)
        latents = encode_images(pipe, prior).detach()
        data.append(
            CaptionedLatents(latents, text[1], settings.prior_batch_size, settings.prior_weight, name="prior_loss")
        )
    return data


def joint_latents(
    pipe: Pipeline,
    subjects: Iterable[ConceptSubject],
    settings: ConceptSettings | Mapping[str, Any] | None = None,
    **changes: Any,
) -> list[CaptionedLatents]:
    """The latents of several subjects, whose losses are minimised together: `concept_latents` of each in turn."""
    require_pipeline(pipe)
    return [data for subject in several(subjects) for data in concept_latents(pipe, subject, settings, **changes)]


def total_loss(data: Sequence[CaptionedLatents], losses: Sequence[float]) -> float:
    """The weighted sum of the captions' mean losses."""
    data, losses = checks.items("data", data, CaptionedLatents), checks.items("losses", losses)
    checks.as_many("captions", data, "losses", losses)
    return sum(part.weight * loss for part, loss in zip(data, losses, strict=True))


def loss_values(data: Sequence[CaptionedLatents], losses: Sequence[float]) -> dict[str, float]:
    """What a history keeps of a step: the weighted sum under "loss", and each caption's mean loss.

    The latter are named like the data, with a number ("subject_loss 1") where several share a name.
    """
    values = {"loss": total_loss(data, losses)}
    names = [part.name or "loss" for part in data]
    for number, (name, loss) in enumerate(zip(names, losses, strict=True)):
        alone = names.count(name) == 1 and name != "loss"
        values[name if alone else f"{name} {names[:number].count(name)}"] = float(loss)
    return values


def sample_batches(
    pipe: Pipeline, data: Sequence[CaptionedLatents], *, seed: int, bands: int = 1
) -> Iterator[NoisyBatch]:
    """Endless batches of pictures, noises and timesteps, all from one random generator.

    In a batch, the pictures of a caption occur equally often, give or take one. Timesteps are stratified: one in each
    of `batch_size` equal intervals of the schedule (a reading; unbiased, and less noisy than independent ones). bands:
    batches take turns in that many equal parts of the schedule, from little noise to much.
    """
    require_pipeline(pipe)
    last = pipe.scheduler.config.num_train_timesteps
    parts = checks.count("bands", bands, most=last)
    edges = [last * band // parts for band in range(parts + 1)]
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    return _endless(checks.items("data", data, CaptionedLatents), edges, generator)


def _endless(
    data: Sequence[CaptionedLatents], edges: Sequence[int], generator: torch.Generator
) -> Iterator[NoisyBatch]:
    for low, high in cycle(pairwise(edges)):
        latents, timesteps, masks = [], [], []
        for part in data:
            own = len(part.latents)
            turns = [torch.randperm(own, generator=generator) for _ in range(-(-part.batch_size // own))]
            chosen = torch.cat(turns)[: part.batch_size].to(part.latents.device)
            latents.append(part.latents[chosen])
            timesteps.append(low + stratified_timesteps(part.batch_size, high - low, generator))
            masks.append(torch.ones_like(latents[-1][:, :1]) if part.mask is None else part.mask[chosen])
        clean = torch.cat(latents)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        mask = None if all(part.mask is None for part in data) else torch.cat(masks)
        yield NoisyBatch(clean, noise, torch.cat(timesteps).to(clean.device), mask)


def numbered_batches(pipe: Pipeline, data: Sequence[CaptionedLatents], seed: int) -> Callable[[int], NoisyBatch]:
    """`sample_batches` by number, so that a resumed run sees the same batches; numbers must not decrease."""
    require_pipeline(pipe)
    source, coming = sample_batches(pipe, data, seed=seed), count()

    def batch_at(number: int) -> NoisyBatch:
        while True:
            batch = next(source)
            if next(coming) >= number:
                return batch

    return batch_at

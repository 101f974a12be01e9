"""A classifier of noisy latents, small and trained in a minute: what steers a sampler (Dhariwal and Nichol 2021).

It learns from pictures that are given to it, never from what a model draws and never from the judge, so that a
picture which both the classifier and the judge take for a concept shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...diffusion.checks import require_pipeline
from ...diffusion.encoding import encode_images
from ...diffusion.loss import add_noise, alphas_cumprod, stratified_timesteps
from ...diffusion.pipelines import Pipeline, fingerprint
from ...errors import ArgumentError, MismatchError
from ...pictures import Images
from ...seeds import derived, seeded_on_the_cpu
from ...settings import Settings, takes

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the schedule at which accuracy is reported


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(Settings):
    """Settings of `train_classifier`: `steps` of AdamW at `learning_rate` on `batch_size` noisy latents each.

    width: channels of the first layer; held_out: share of the pictures of each label that measure accuracy; seed: of
    the split, the first weights, pictures, noises and timesteps.
    """

    method: ClassVar[str] = "classifier of noisy latents"

    steps: int = 600
    batch_size: int = 96
    learning_rate: float = 2e-3
    width: int = 48
    held_out: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "steps", "batch_size")
        self._check(checks.count, "width", most=4096)
        self._check(checks.number, "learning_rate", interval="(0, inf)")
        self._check(checks.number, "held_out", interval="(0, 1)", kind="share")
        self._check(checks.seed, "seed")


class _Network(nn.Module):
    """Convolutions that halve the grid, each followed by a scale and shift from the noise level."""

    def __init__(self, channels: int, width: int, labels: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 2 * width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip((width, *widths), widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, b) for b in widths)
        self.level = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 2 * sum(widths)))
        self.last = nn.Linear(2 * widths[-1], labels)

    def forward(self, noisy: Tensor, abar: Tensor) -> Tensor:
        x = self.first(noisy)
        moves = self.level(torch.stack([abar.sqrt(), (1 - abar).sqrt()], 1))[..., None, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x))
            scale, shift, moves = moves.split([x.shape[1], x.shape[1], moves.shape[1] - 2 * x.shape[1]], 1)
            x = F.silu(x * (1 + scale) + shift)
        return self.last(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


@dataclass(frozen=True, eq=False)
class LatentClassifier:
    """log p(label | x_t, t) of a pipeline's noisy latents.

    labels: what it tells apart; accuracy: share of held-out pictures that it tells right, by level of the schedule (0
    is clean); fingerprint: of the autoencoder whose latents it knows.
    """

    network: nn.Module
    labels: tuple[str, ...]
    abars: Tensor
    accuracy: Mapping[float, float]
    fingerprint: str

    def __repr__(self) -> str:
        told = ", ".join(f"{share:.2f} at {level:g}" for level, share in self.accuracy.items())
        return f"LatentClassifier({len(self.labels)} labels; accuracy by noise level: {told})"

    def log_probabilities(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """log p(label | x_t, t), (n, labels), of latents (n, channels, h, w) noised to timesteps (n,)."""
        return F.log_softmax(self.network(noisy.float(), self.abars.to(noisy.device)[timesteps]), 1)

    @torch.enable_grad()
    def slope(self, noisy: Tensor, timestep: int, label: str) -> Tensor:
        """The gradient of log p(label | x_t, t) in x_t, (as the latents)."""
        column = self.labels.index(checks.choice("label", label, self.labels))
        at = noisy.detach().float().requires_grad_()
        timesteps = torch.full((len(at),), timestep, dtype=torch.long, device=at.device)
        (gradient,) = torch.autograd.grad(self.log_probabilities(at, timesteps)[:, column].sum(), at)
        return gradient

    def require_fit(self, pipe: Pipeline) -> None:
        """Raise MismatchError unless a pipeline has the latents and the noise schedule that this was trained on."""
        require_pipeline(pipe)
        if fingerprint(pipe.vae) != self.fingerprint or not torch.equal(alphas_cumprod(pipe).cpu(), self.abars.cpu()):
            raise MismatchError(
                "this classifier was trained on the latents and noise levels of another model: train one for this "
                "pipeline with train_classifier"
            )


@takes(ClassifierSettings)
def train_classifier(
    pipe: Pipeline,
    pictures: Images,
    labels: Iterable[str],
    settings: ClassifierSettings | Mapping[str, Any] | None = None,
    **changes: Any,
) -> LatentClassifier:
    """Train a classifier of a pipeline's noisy latents on labelled pictures (Dhariwal and Nichol 2021, Sec. 4).

    labels: one for each picture, at least two different ones, each of two pictures or more. Timesteps are uniform over
    the schedule. The pipeline's autoencoder encodes the pictures; its U-Net has no part in this. settings, changes: see
    `ClassifierSettings`. Raises ConeslabError for other numbers of labels.
    """
    require_pipeline(pipe)
    settings = ClassifierSettings.chosen(settings, changes)
    given = checks.texts("labels", labels)
    names = tuple(dict.fromkeys(given))
    few = [name for name in names if given.count(name) < 2]
    if len(names) < 2 or few:
        said = f"{few[0]!r} has one picture" if few else f"all pictures are of {names[0]!r}"
        raise ArgumentError(f"{said}: give two labels or more, each with two pictures or more")
    latents = encode_images(pipe, pictures).detach().float()
    checks.as_many("pictures", latents, "labels", given)
    answers = torch.tensor([names.index(name) for name in given])
    generator = torch.Generator().manual_seed(derived(settings.seed, "classifier"))
    train, test = _split(answers, settings.held_out, generator)
    device = latents.device
    with seeded_on_the_cpu(derived(settings.seed, "classifier's weights")):
        network = _Network(latents.shape[1], settings.width, len(names)).to(device)
    optimiser = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, settings.steps + 1)
    abars, total = alphas_cumprod(pipe), pipe.scheduler.config.num_train_timesteps
    with torch.enable_grad():
        for _ in range(settings.steps):
            rows = train[torch.randint(len(train), (settings.batch_size,), generator=generator)]
            timesteps = stratified_timesteps(len(rows), total, generator)
            clean = latents[rows]
            flipped = torch.rand(len(rows), generator=generator) < 0.5
            clean = torch.where(flipped.to(device)[:, None, None, None], clean.flip(3), clean)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            noisy = add_noise(pipe.scheduler, clean, noise, timesteps.to(device))
            loss = F.cross_entropy(network(noisy, abars[timesteps]), answers[rows].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval().requires_grad_(False)
    made = LatentClassifier(network, names, abars.cpu(), {}, fingerprint(pipe.vae))
    accuracy = {level: _accuracy(pipe, made, latents[test], answers[test], level, generator) for level in LEVELS}
    return LatentClassifier(network, names, abars.cpu(), accuracy, made.fingerprint)


def _split(answers: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to measure on: of each label that share, at least one and not all."""
    train, test = [], []
    for label in answers.unique():
        rows = (answers == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = min(len(rows) - 1, max(1, round(share * len(rows))))
        test.append(rows[:held])
        train.append(rows[held:])
    return torch.cat(train), torch.cat(test)


def _accuracy(
    pipe: Pipeline,
    classifier: LatentClassifier,
    latents: Tensor,
    answers: Tensor,
    level: float,
    generator: torch.Generator,
) -> float:
    """Share of latents, noised to a level of the schedule, whose label is the likeliest."""
    last = pipe.scheduler.config.num_train_timesteps - 1
    timesteps = torch.full((len(latents),), round(level * last), device=latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = add_noise(pipe.scheduler, latents, noise, timesteps)
    return float((classifier.log_probabilities(noisy, timesteps).argmax(1).cpu() == answers).float().mean())

"""Pruning what a concept activates: ConceptPrune (Chavhan et al. 2024, arXiv 2405.19237)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import checks
from ...diffusion.checks import require_editable
from ...diffusion.encoding import encode_prompts
from ...diffusion.kvspace import unet_of
from ...diffusion.loss import add_noise
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import without_compiling
from ...edits.weights import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...finetuning.samples import CaptionedLatents, SamplerSettings, generated_latents, sample_batches
from ...settings import takes
from .prompts import one_pair


@dataclass(frozen=True, kw_only=True)
class ConceptPruneSettings(SamplerSettings):
    """Settings of `prune_feed_forward`: those of `SamplerSettings`, and

    share: of each row's weights that may be pruned; pictures: drawn beforehand of target and anchor each; samples:
    noised pictures on which activations are measured.
    """

    method: ClassVar[str] = "ConceptPrune"

    share: float = 0.02
    pictures: int = 16
    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.number, "share", interval="(0, 1)", kind="share")
        self._check(checks.count, "pictures", "samples")


@takes(ConceptPruneSettings)
def prune_feed_forward(
    pipe: Pipeline,
    target: str,
    anchor: str,
    settings: ConceptPruneSettings | Mapping[str, Any] | None = None,
    **changes: Any,
) -> WeightDelta:
    """ConceptPrune: set to 0 the feed-forward weights that the target needs more than its anchor (arXiv 2405.19237).

    The score of a weight is |W_ij| · ||A_j||, A_j the activations it reads (Wanda, Sun et al. 2024), over noised
    pictures at all timesteps (a reading: the authors' code listens while target and anchor are drawn, scores each step
    of sampling by itself, and prunes what any of the first few steps picks; on the shipped model that removes no more,
    and takes several times as long). In every row of the second matrix of each feed-forward layer, the `share` of
    weights with the largest score under the target are pruned, except where the score under the anchor is as large.
    settings, changes: see `ConceptPruneSettings`.
    Raises ConeslabError if the model cannot tell target and anchor apart, or has no such layers.
    """
    require_editable(pipe)
    settings = ConceptPruneSettings.chosen(settings, changes)
    target, anchor = one_pair(pipe, target, anchor)
    unet = unet_of(pipe)
    layers = {name: module for name, module in unet.named_modules() if name.endswith("ff.net.2")}
    if not layers:
        raise ConeslabError("this U-Net has no feed-forward layers (no module ff.net.2): nothing can be pruned")
    scores = []
    for caption in (target, anchor):
        latents = generated_latents(pipe, [caption] * settings.pictures, **settings.sampler)
        data = CaptionedLatents(latents, encode_prompts(pipe, [caption]).detach()[0], settings.samples)
        norms = _activation_norms(pipe, layers, data, settings.seed)
        scores.append({name: layers[name].weight.detach().abs() * norms[name] for name in layers})
    deltas = {}
    for name, module in layers.items():
        own, other = (score[name] for score in scores)
        count = max(1, round(settings.share * own.shape[1]))
        top = torch.zeros_like(own, dtype=torch.bool).scatter_(1, own.topk(count, dim=1).indices, True)
        deltas[f"{name}.weight"] = torch.where(top & (own > other), -module.weight.detach(), 0.0)
    record = {**settings.record(), "target": target, "anchor": anchor}
    return WeightDelta(deltas, model_fingerprint(pipe), subject=target, settings=record)


@torch.no_grad()
def _activation_norms(pipe: Pipeline, layers: dict[str, Any], data: CaptionedLatents, seed: int) -> dict[str, Tensor]:
    """Euclidean norm of every input of the layers over a batch: name -> (inputs,)."""
    batch = next(sample_batches(pipe, [data], seed=seed))
    sums: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def heard(module: Any, args: tuple) -> None:
            squares = args[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return heard

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in layers.items()]
    try:
        with without_compiling(pipe):
            noisy = add_noise(pipe.scheduler, batch.latents, batch.noise, batch.timesteps)
            text = data.text.expand(len(noisy), -1, -1)
            for part in torch.arange(len(noisy)).split(32):
                unet_of(pipe)(noisy[part], batch.timesteps[part], encoder_hidden_states=text[part])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}

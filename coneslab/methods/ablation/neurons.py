"""Other ways to make a model forget: a closed form, erasure by guidance, pruning, shutting concept neurons.

Neighbours of concept ablation, under the same interface, so that they can be compared: UCE (Gandikota et al. 2024,
arXiv 2308.14761), ESD (Gandikota et al. 2023, arXiv 2303.07345), ConceptPrune (Chavhan et al. 2024, arXiv 2405.19237)
and the neurons of Cones, found with the target's caption on pictures of the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...diffusion.kvspace import KVSpace, unet_of
from ...diffusion.sampling import add_noise, encode_prompts
from ...edits.base import WeightDelta, model_fingerprint
from ...errors import ConeslabError
from ...finetuning.kv_gradient import KVGradient
from ...finetuning.loop import TuningCallback, figures, tune
from ...finetuning.samples import Draw, Pairs, drawn_latents, drawn_once, draws, rounds
from ...neurons.mask import ConceptNeurons
from ...neurons.search import find_concept_neurons
from .concept_ablation import Prompts, paired

# --- closed form ----------------------------------------------------------------------------------------


def closed_form_edit(
    pipe: Any,
    target: Prompts,
    anchor: Prompts,
    *,
    preserve: Sequence[str] = (),
    templates: Sequence[str] = ("{}",),
    erase_weight: float = 1.0,
    preserve_weight: float = 0.1,
    ridge: float = 0.1,
) -> WeightDelta:
    """UCE: the keys and values of the target become those of the anchor, by one linear solve (arXiv 2308.14761, Eq. 7).

    W = (ridge W0 + sum v* c^T)(ridge I + sum c c^T)^-1 for every K and V matrix: over targets with v* = W0 c_anchor
    and `erase_weight`, over `preserve` with v* = W0 c and `preserve_weight`. c: the text embedding at the last word of
    a caption, and at the places after it. Nothing is drawn and nothing trained.
    """
    targets, anchors = paired(target, anchor)
    if not ridge > 0 or erase_weight <= 0 or preserve_weight < 0:
        given = f"ridge={ridge}, erase_weight={erase_weight}, preserve_weight={preserve_weight}"
        raise ConeslabError(f"{given}: give positive numbers (preserve_weight may be 0)")
    sources, wanted, weights = [], [], []
    for own, other in zip(targets, anchors, strict=True):
        for template in templates:
            first, second = _last_words(pipe, template.format(own)), _last_words(pipe, template.format(other))
            rows = min(len(first), len(second))
            sources.append(first[:rows])
            wanted.append(second[:rows])
            weights.append(torch.full((rows,), erase_weight / rows))
    for caption in preserve:
        kept = _last_words(pipe, caption)
        sources.append(kept)
        wanted.append(kept)
        weights.append(torch.full((len(kept),), preserve_weight / len(kept)))
    c, v, w = (torch.cat(parts).double() for parts in (sources, wanted, weights))
    gram = ridge * torch.eye(c.shape[1], dtype=torch.float64) + (w[:, None] * c).T @ c
    deltas = {}
    for name, parameter in KVSpace(pipe).parameters.items():
        base = parameter.detach().double().cpu()
        right = ridge * base + ((w[:, None] * v) @ base.T).T @ c
        deltas[name] = (torch.linalg.solve(gram, right.T).T - base).float()
    settings = {"method": "UCE", "target": targets, "anchor": anchors, "ridge": ridge, "preserve": list(preserve)}
    return WeightDelta(deltas, model_fingerprint(pipe), subject=", ".join(targets), settings=settings)


def _last_words(pipe: Any, caption: str) -> Tensor:
    """Text embeddings from the last word of a caption on, (rows, width), on the CPU."""
    ids = pipe.tokenizer(caption).input_ids
    return encode_prompts(pipe, [caption]).detach().float().cpu()[0, len(ids) - 2 :]


# --- erasure by guidance --------------------------------------------------------------------------------


def erase(
    pipe: Any,
    target: str,
    *,
    eta: float = 1.0,
    pictures: int = 64,
    steps: int = 100,
    learning_rate: float = 3e-4,
    batch: int = 16,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    resume: Any | None = None,
    progress: bool = True,
    callback: TuningCallback | None = None,
) -> WeightDelta:
    """ESD-x: keys and values learn to predict, under the target's caption, the opposite of its guidance.

    The aim is f(x_t, t, ∅) − η (f(x_t, t, c) − f(x_t, t, ∅)) by the untouched model (arXiv 2303.07345, Eq. 7), on
    noised pictures of the target drawn beforehand (a reading: the paper's are half-denoised by the model in training).
    """
    if not target.strip() or eta < 0:
        raise ConeslabError(f"target is {target!r}, eta {eta}: name a concept, and give a number of 0 or more")
    options: dict[str, Any] = {"steps": sampler_steps, "guidance_scale": guidance_scale, "progress": progress}
    latents = drawn_latents(pipe, [target] * pictures, seed=seed, **options)
    text = encode_prompts(pipe, [target, ""]).detach()
    pairs = [Pairs(latents, text[0], batch)]
    gradient = KVGradient(pipe, pairs, dtype=dtype, chunk=chunk)
    before, at = gradient.theta(), rounds(pipe, pairs, seed)
    theta = before.clone()

    def step(number: int) -> dict[str, float]:
        draw = at(number)
        with_target, without = (gradient.outputs(before, own[None], draw) for own in text)
        aimed = replace(draw, wanted=without - eta * (with_target - without))
        losses, theta.grad = gradient(theta, aimed)
        return figures(pairs, losses)

    history = tune(
        {"theta": theta}, step, steps=steps, learning_rate=learning_rate, title=f"erasing {target}", resume=resume,
        progress=progress, callback=callback, identity=f"esd {target} {eta} {batch} {seed} {model_fingerprint(pipe)}",
    )  # fmt: skip
    settings = {"method": "ESD-x", "target": target, "eta": eta, "steps": steps, "learning_rate": learning_rate}
    return WeightDelta(
        gradient.deltas(theta), model_fingerprint(pipe), subject=target, settings=settings, history=history
    )


# --- neurons --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AblationSubject:
    """What `find_concept_neurons` takes as a subject, to ablate: pictures of the anchor, captioned as the target."""

    name: str
    images: tuple[Image.Image, ...]
    prompt: str
    prior_prompt: str


def ablating_neurons(
    pipe: Any,
    target: str,
    anchor: str,
    *,
    pictures: int = 32,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    **options: Any,
) -> ConceptNeurons:
    """The neurons whose shutting makes the target's caption draw the anchor: Cones' search on the noise-based loss.

    L_con(θ) = L(anchor's pictures, target) + λ L(anchor's pictures, anchor). options: of `find_concept_neurons`.
    """
    ((target,), (anchor,)) = paired(target, anchor)
    how: dict[str, Any] = {"steps": sampler_steps, "guidance_scale": guidance_scale}
    drawn = drawn_once(pipe, [anchor] * pictures, seed=seed, **how)
    about = AblationSubject(f"{target} → {anchor}", drawn, target, anchor)
    return find_concept_neurons(pipe, about, prior=drawn, seed=seed, **options)


# --- pruning --------------------------------------------------------------------------------------------


def prune_feed_forward(
    pipe: Any,
    target: str,
    anchor: str,
    *,
    share: float = 0.02,
    pictures: int = 16,
    samples: int = 64,
    seed: int = 0,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
) -> WeightDelta:
    """ConceptPrune: set to 0 the feed-forward weights that the target needs more than its anchor (arXiv 2405.19237).

    The score of a weight is |W_ij| · ||A_j||, A_j the activations it reads (Wanda, Sun et al. 2024), over noised
    pictures at all timesteps. Pruned are, in every row of the second matrix of each feed-forward layer, the `share`
    of weights with the largest score under the target, as far as it is larger than under the anchor.
    """
    if not 0 < share < 1:
        raise ConeslabError(f"share is {share}: give a share in (0, 1)")
    ((target,), (anchor,)) = paired(target, anchor)
    options: dict[str, Any] = {"steps": sampler_steps, "guidance_scale": guidance_scale}
    unet = unet_of(pipe)
    layers = {name: module for name, module in unet.named_modules() if name.endswith("ff.net.2")}
    if not layers:
        raise ConeslabError("this U-Net has no feed-forward layers (no module ff.net.2): nothing can be pruned")
    scores = []
    for caption in (target, anchor):
        latents = drawn_latents(pipe, [caption] * pictures, seed=seed, **options)
        pair = Pairs(latents, encode_prompts(pipe, [caption]).detach()[0], samples)
        norms = _activation_norms(pipe, layers, pair, seed)
        scores.append({name: layers[name].weight.detach().abs() * norms[name] for name in layers})
    deltas = {}
    for name, module in layers.items():
        own, other = (score[name] for score in scores)
        count = max(1, round(share * own.shape[1]))
        top = torch.zeros_like(own, dtype=torch.bool).scatter_(1, own.topk(count, dim=1).indices, True)
        deltas[f"{name}.weight"] = torch.where(top & (own > other), -module.weight.detach(), 0.0)
    settings = {"method": "ConceptPrune", "target": target, "anchor": anchor, "share": share}
    return WeightDelta(deltas, model_fingerprint(pipe), subject=target, settings=settings)


@torch.no_grad()
def _activation_norms(pipe: Any, layers: dict[str, Any], pair: Pairs, seed: int) -> dict[str, Tensor]:
    """Euclidean norm of every input of the layers over a draw: name -> (inputs,)."""
    draw: Draw = next(draws(pipe, [pair], seed=seed))
    sums: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def heard(module: Any, args: tuple) -> None:
            squares = args[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return heard

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in layers.items()]
    try:
        noisy = add_noise(pipe.scheduler, draw.latents, draw.noise, draw.timesteps)
        text = pair.text.expand(len(noisy), -1, -1)
        for part in torch.arange(len(noisy)).split(32):
            unet_of(pipe)(noisy[part], draw.timesteps[part], encoder_hidden_states=text[part])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}

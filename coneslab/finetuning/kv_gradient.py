"""The concept-implanting loss of Cones and its gradient in the K-V weights, as fast as the hardware allows.

L_con(θ) = L(subject pictures, "a V* class") + λ L(prior pictures, "a class") (arXiv 2303.05125, Sec. 3.1). What does
not depend on θ is computed once: latents, text embeddings, prior pictures. The gradient is taken on a frozen twin of
the U-Net, so that the pipeline itself is never touched, whatever interrupts the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.kvspace import KVSpace, cross_attentions, unet_of
from ..diffusion.loss import add_noise, denoising_loss
from ..diffusion.pipelines import Pipeline
from ..diffusion.precision import fast_dtype, frozen_twin
from ..errors import ConeslabError
from .samples import Draw, Pairs


class KVGradient:
    """L_con and its gradient in θ, for any θ, at a fraction of the cost of a training step.

    The U-Net is rebuilt once as a frozen twin that shares its weights, or holds them in a faster precision. Only the
    cross-attention keys and values come from outside: as text does not depend on θ, K = W c is computed once a round
    for every distinct caption, in the precision of θ, and not once for every sample. Nothing before the first
    cross-attention and no other weight gets a gradient.

    pairs: see `concept_pairs`; dtype: of the twin, default bfloat16 where the device computes in it and the pipeline
    is float32, else the pipeline's own; chunk: samples at a time, for models that do not fit in memory otherwise.
    """

    def __init__(
        self, pipe: Pipeline, pairs: Sequence[Pairs], *, dtype: torch.dtype | None = None, chunk: int | None = None
    ) -> None:
        unet = unet_of(pipe)
        dtype = dtype or fast_dtype(unet)
        if chunk is not None and chunk < 1:
            raise ConeslabError(f"chunk is {chunk}: give a positive number of samples, or None for all at once")
        self.space, self.pairs, self.dtype, self.chunk = KVSpace(pipe), tuple(pairs), dtype, chunk
        self._pipe = _Twin(pipe, frozen_twin(unet, dtype, gradients=True))
        self._text = torch.stack([pair.text for pair in pairs])  # (pairs, tokens, width)
        self._attentions = []
        for path, module in cross_attentions(self._pipe.unet).items():
            processor = _ProjectedText()
            module.set_processor(processor)
            self._attentions.append((path, module, processor))

    def theta(self) -> Tensor:
        """The pipeline's K-V weights as they are now, (n,), in float32 or better."""
        flat = self.space.gather()
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def deltas(self, theta: Tensor) -> dict[str, Tensor]:
        """By how much θ differs from the pipeline's weights: parameter name -> matrix on the CPU."""
        change = theta.detach() - self.theta()
        return {name: part.cpu() for name, part in self.space.layout.matrices(change).items()}

    def __call__(self, theta: Tensor, draw: Draw) -> tuple[list[float], Tensor]:
        """Mean loss of every pair, and the gradient (n,) of their weighted sum, at K-V weights θ (n,).

        Raises ConeslabError if the gradient is not finite.
        """
        losses, (gradient,) = self._gradients(theta, self._text, draw, of_theta=True)
        return losses, gradient

    @torch.no_grad()
    def losses(self, theta: Tensor, draw: Draw) -> list[float]:
        """Mean loss of every pair alone, at a third of the cost."""
        sums = [self._loss(theta, self._text, draw, rows, counts)[1] for rows, counts in self._chunks()]
        return self._means(torch.stack(sums).sum(0))

    def _means(self, sums: Tensor) -> list[float]:
        return (sums / torch.tensor([pair.batch for pair in self.pairs])).tolist()

    def with_text(self, theta: Tensor, text: Tensor, draw: Draw) -> tuple[list[float], Tensor, Tensor]:
        """The same for text embeddings of your own, and the gradient in them as well.

        text: (pairs, tokens, width), one embedding a pair; returns losses, gradient (n,), gradient (as text).
        """
        losses, (gradient, text_gradient) = self._gradients(theta, text, draw, of_theta=True, of_text=True)
        return losses, gradient, text_gradient

    def text_gradient(self, theta: Tensor, text: Tensor, draw: Draw) -> tuple[list[float], Tensor]:
        """Losses, and the gradient in the text embeddings alone, (pairs, tokens, width)."""
        losses, (gradient,) = self._gradients(theta, text, draw, of_text=True)
        return losses, gradient

    @torch.enable_grad()
    def _gradients(
        self, theta: Tensor, text: Tensor, draw: Draw, *, of_theta: bool = False, of_text: bool = False
    ) -> tuple[list[float], list[Tensor]]:
        wanted = [point for point, of in ((theta, of_theta), (text, of_text)) if of]
        gradients = [torch.zeros_like(point) for point in wanted]
        losses = torch.zeros(len(self.pairs), dtype=torch.float64)
        lift = 2.0**16 if self.dtype == torch.float16 else 1.0  # float16 would lose the small gradients
        for rows, counts in self._chunks():
            at_theta = theta.detach().clone().requires_grad_(of_theta)
            at_text = text.detach().clone().requires_grad_(of_text)
            leaves = [leaf for leaf in (at_theta, at_text) if leaf.requires_grad]
            total, sums = self._loss(at_theta, at_text, draw, rows, counts)
            for gradient, part in zip(gradients, torch.autograd.grad(total * lift, leaves), strict=True):
                gradient += part / lift
            losses += sums
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise ConeslabError(f"the gradient in {self.dtype} is not finite: pass dtype=torch.float32")
        return self._means(losses), gradients

    def _loss(self, theta: Tensor, text: Tensor, draw: Draw, rows: slice, counts: list[int]) -> tuple[Tensor, Tensor]:
        each = denoising_loss(
            self._pipe,
            draw.latents[rows],
            self._project(theta, text, counts),
            noise=draw.noise[rows],
            timesteps=draw.timesteps[rows],
            mask=None if draw.mask is None else draw.mask[rows],
            wanted=None if draw.wanted is None else draw.wanted[rows],
            reduction="none",
        )
        sums = [part.sum() for part in each.split(counts)]
        parts = torch.stack(sums)  # (pairs,)
        shares = torch.tensor([pair.weight / pair.batch for pair in self.pairs]).to(parts)
        return (shares * parts).sum(), parts.detach().double().cpu()

    @torch.no_grad()
    def outputs(self, theta: Tensor, text: Tensor, draw: Draw) -> Tensor:
        """What the U-Net predicts for a draw, (as its latents), under text embeddings (pairs, tokens, width)."""
        made = []
        for rows, counts in self._chunks():
            samples = self._project(theta, text, counts)
            noisy = add_noise(self._pipe.scheduler, draw.latents[rows], draw.noise[rows], draw.timesteps[rows])
            made.append(self._pipe.unet(noisy, draw.timesteps[rows], encoder_hidden_states=samples).sample.float())
        return torch.cat(made)

    def _project(self, theta: Tensor, text: Tensor, counts: list[int]) -> Tensor:
        """Give every attention its keys and values; returns texts for the U-Net, which wants some, one a sample."""
        matrices, text = self.space.layout.matrices(theta), text.to(theta.dtype)
        for path, module, processor in self._attentions:
            own = module.norm_encoder_hidden_states(text) if module.norm_cross else text
            key = F.linear(own, matrices[f"{path}.to_k.weight"], _like(module.to_k.bias, theta))
            value = F.linear(own, matrices[f"{path}.to_v.weight"], _like(module.to_v.bias, theta))
            processor.key, processor.value, processor.counts = key.to(self.dtype), value.to(self.dtype), counts
        return torch.cat([x.expand(count, -1, -1) for x, count in zip(self._text, counts, strict=True)])

    def _chunks(self) -> Iterator[tuple[slice, list[int]]]:
        """Runs of samples, and how many of each pair are in a run."""
        ends = np.cumsum([pair.batch for pair in self.pairs])
        starts = ends - [pair.batch for pair in self.pairs]
        step = self.chunk or int(ends[-1])
        for first in range(0, int(ends[-1]), step):
            last = min(first + step, int(ends[-1]))
            counts = np.clip(np.minimum(ends, last) - np.maximum(starts, first), 0, None)
            yield slice(first, last), counts.tolist()


def _like(bias: Tensor | None, theta: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(theta.dtype)


class _Twin:
    """The pipeline as the loss sees it: everything its own, but for the U-Net."""

    def __init__(self, pipe: Pipeline, unet: nn.Module) -> None:
        self._pipe, self.unet = pipe, unet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


class _ProjectedText:
    """Cross-attention on keys and values computed beforehand, one of each a caption: (pairs, tokens, channels).

    Samples of one caption lie together, `counts` of each; all their queries go through one product a head.
    """

    key: Tensor
    value: Tensor
    counts: list[int]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        query = attn.to_q(hidden_states)  # (samples, places, channels)
        places, channels = query.shape[1:]
        outputs = []
        for part, key, value in zip(query.split(self.counts), self.key, self.value, strict=True):
            q, k, v = (x.reshape(-1, attn.heads, channels // attn.heads).transpose(0, 1) for x in (part, key, value))
            scores = (q * attn.scale) @ k.transpose(-1, -2)  # (heads, samples of this caption x places, tokens)
            if attn.upcast_softmax or attn.upcast_attention:
                scores = scores.float()
            mixed = scores.softmax(-1).to(v.dtype) @ v
            outputs.append(mixed.transpose(0, 1).reshape(-1, places, channels))
        out = attn.to_out[1](attn.to_out[0](torch.cat(outputs)))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor

"""The concept-implanting loss of Cones and its gradient in the K-V weights, as fast as the hardware allows.

L_con(θ) = L(subject pictures, "a V* class") + λ L(prior pictures, "a class") (arXiv 2303.05125, Sec. 3.1). Whatever
does not depend on θ is computed once: latents, text embeddings, prior pictures. The gradient is computed on a frozen
copy of the U-Net, so the pipeline itself is never touched, whatever interrupts the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..callback import Callback
from ..diffusion.checks import require_editable
from ..diffusion.kvspace import KVSpace, cross_attentions, unet_of
from ..diffusion.loss import Denoiser, add_noise, denoising_loss
from ..diffusion.pipelines import Pipeline, require_float
from ..diffusion.precision import fast_dtype, frozen_copy, gradient_lift
from ..errors import ConeslabError, MismatchError
from .samples import CaptionedLatents, NoisyBatch


def require_passes(dtype: torch.dtype | None, chunk: int | None = None, callback: Callback | None = None) -> None:
    """Raise ArgumentError for what no run takes: methods ask before they draw or train anything."""
    if dtype is not None:
        require_float(dtype)
    if chunk is not None:
        checks.count("chunk", chunk)
    checks.function("callback", callback)


class KVGradient:
    """L_con and its gradient in θ, at any θ, for a fraction of the cost of a training step.

    The U-Net is rebuilt once as a frozen copy that shares its weights, or holds them in a faster precision. Only the
    cross-attention keys and values come from outside: as the text does not depend on θ, K = W c is computed once per
    step and distinct caption, in the precision of θ, rather than for every sample. No other weight gets a gradient, and
    nothing before the first cross-attention. Masks that act at some words when this is made act in it as well.

    data: see `concept_latents`; where: (captions, tokens) bool, the tokens whose keys and values are projected by θ,
    all others by the pipeline's own weights, or None for all; dtype: of the copy, default bfloat16 where the device
    computes in it and the pipeline is float32, else the pipeline's own; chunk: samples at a time, for models that would
    not fit in memory otherwise.
    """

    def __init__(
        self,
        pipe: Pipeline,
        data: Sequence[CaptionedLatents],
        *,
        where: Tensor | None = None,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
    ) -> None:
        require_editable(pipe)
        unet = unet_of(pipe)
        data = checks.items("data", data, CaptionedLatents)
        require_passes(dtype, chunk)
        dtype = fast_dtype(unet) if dtype is None else dtype
        self.space, self.data, self.dtype, self.chunk = KVSpace(pipe), tuple(data), dtype, chunk
        self._denoiser = Denoiser(frozen_copy(unet, dtype, gradients=True), pipe.scheduler)
        self._text = torch.stack([part.text for part in data])  # (captions, tokens, width)
        self._attentions = []
        for path, module in cross_attentions(self._denoiser.unet).items():
            processor = _ProjectedText()
            module.set_processor(processor)
            self._attentions.append((path, module, processor))
        self._where, self._own = where, {} if where is None else self._projected(self.theta(), self._text)

    def theta(self) -> Tensor:
        """The pipeline's K-V weights as they are now, (n,), in float32 or better."""
        flat = self.space.gather()
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def deltas(self, theta: Tensor) -> dict[str, Tensor]:
        """How θ differs from the pipeline's weights: parameter name -> matrix on the CPU."""
        change = theta.detach() - self.theta()
        return {name: part.cpu() for name, part in self.space.layout.matrices(change).items()}

    def __call__(self, theta: Tensor, batch: NoisyBatch) -> tuple[list[float], Tensor]:
        """Mean loss of every caption, and the gradient (n,) of their weighted sum, at K-V weights θ (n,).

        Raises ConeslabError if the gradient is not finite.
        """
        losses, gradient, _ = self.gradients(theta, None, batch, of_text=False)
        assert gradient is not None
        return losses, gradient

    @torch.no_grad()
    def losses(self, theta: Tensor, batch: NoisyBatch, text: Tensor | None = None) -> list[float]:
        """Mean loss of every caption without the gradient, at a third of the cost; text: as in `gradients`."""
        text = self._required(theta, text, batch)
        sums = [self._loss(theta, text, batch, rows, counts)[1] for rows, counts in self._chunks()]
        return self._means(torch.stack(sums).sum(0))

    def _required(self, theta: Tensor, text: Tensor | None, batch: NoisyBatch) -> Tensor:
        """The text to use, once all is known to fit."""
        self.space.layout.require_length(theta)
        samples = sum(part.batch_size for part in self.data)
        if checks.of_kind("batch", batch, NoisyBatch) and len(batch.latents) != samples:
            raise MismatchError(f"the batch has {len(batch.latents)} samples, expected {samples}: see `sample_batches`")
        return self._text if text is None else checks.tensor("text", text, "{}, {}, {}".format(*self._text.shape))

    def _means(self, sums: Tensor) -> list[float]:
        return (sums / torch.tensor([part.batch_size for part in self.data])).tolist()

    @torch.enable_grad()
    def gradients(
        self, theta: Tensor, text: Tensor | None, batch: NoisyBatch, *, of_theta: bool = True, of_text: bool = True
    ) -> tuple[list[float], Tensor | None, Tensor | None]:
        """Mean loss of every caption, and the gradients of their weighted sum in θ and in the text, where asked for.

        text: (captions, tokens, width), one embedding per caption, or None for those of `data`; the gradient in it has
        its shape. Raises ConeslabError if a gradient is not finite.
        """
        text = self._required(theta, text, batch)
        gradients = [torch.zeros_like(point) for point, of in ((theta, of_theta), (text, of_text)) if of]
        losses = torch.zeros(len(self.data), dtype=torch.float64)
        lift = gradient_lift(self.dtype)
        for rows, counts in self._chunks():
            at_theta = theta.detach().clone().requires_grad_(of_theta)
            at_text = text.detach().clone().requires_grad_(of_text)
            leaves = [leaf for leaf in (at_theta, at_text) if leaf.requires_grad]
            total, sums = self._loss(at_theta, at_text, batch, rows, counts)
            for gradient, part in zip(gradients, torch.autograd.grad(total * lift, leaves), strict=True):
                gradient += part / lift
            losses += sums
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise ConeslabError(f"the gradient in {self.dtype} is not finite: pass dtype=torch.float32")
        found = iter(gradients)
        return self._means(losses), next(found) if of_theta else None, next(found) if of_text else None

    def _loss(
        self, theta: Tensor, text: Tensor, batch: NoisyBatch, rows: slice, counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        target = batch.regression_target
        each = denoising_loss(
            self._denoiser,
            batch.latents[rows],
            self._project(theta, text, counts),
            noise=batch.noise[rows],
            timesteps=batch.timesteps[rows],
            mask=None if batch.mask is None else batch.mask[rows],
            regression_target=None if target is None else target[rows],
            reduction="none",
        )
        sums = [part.sum() for part in each.split(counts)]
        parts = torch.stack(sums)  # (captions,)
        shares = torch.tensor([part.weight / part.batch_size for part in self.data]).to(parts)
        return (shares * parts).sum(), parts.detach().double().cpu()

    @torch.no_grad()
    def outputs(self, theta: Tensor, text: Tensor, batch: NoisyBatch) -> Tensor:
        """The U-Net's predictions for a batch, (as its latents), given text embeddings (captions, tokens, width)."""
        made = []
        for rows, counts in self._chunks():
            samples = self._project(theta, text, counts)
            noisy = add_noise(self._denoiser.scheduler, batch.latents[rows], batch.noise[rows], batch.timesteps[rows])
            made.append(self._denoiser.unet(noisy, batch.timesteps[rows], encoder_hidden_states=samples).sample.float())
        return torch.cat(made)

    def _project(self, theta: Tensor, text: Tensor, counts: list[int]) -> Tensor:
        """Set the keys and values of every attention; return the texts that the U-Net requires, one per sample."""
        if self._where is None:
            projected = self._projected(theta, text)
        else:
            some = self._projected(theta, text, self._where)
            projected = {path: tuple(map(self._placed, own, some[path])) for path, own in self._own.items()}
        for path, _, processor in self._attentions:
            key, value = projected[path]
            processor.key, processor.value, processor.counts = key.to(self.dtype), value.to(self.dtype), counts
        return torch.cat([x.expand(count, -1, -1) for x, count in zip(self._text, counts, strict=True)])

    def _projected(self, theta: Tensor, text: Tensor, chosen: Tensor | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Keys and values of every attention, (captions, tokens, channels) each, or (n, channels) of chosen tokens.

        text: (captions, tokens, width); chosen: (captions, tokens) bool. Masks at words act on what θ projects.
        """
        matrices = self.space.layout.matrices(theta)
        read = (text if chosen is None else text[chosen]).to(theta.dtype)
        projected = {}
        for path, module, _ in self._attentions:
            own = module.norm_encoder_hidden_states(read) if module.norm_cross else read
            both = []
            for layer, name in ((module.to_k, f"{path}.to_k.weight"), (module.to_v, f"{path}.to_v.weight")):
                project = partial(F.linear, own, bias=_like(layer.bias, theta))
                output = project(matrices[name])
                for hook in layer._forward_hooks.values():  # those that `frozen_copy` takes along
                    output = hook.of_weights(text, output, matrices[name], project, chosen)
                both.append(output)
            projected[path] = tuple(both)
        return projected

    def _placed(self, everywhere: Tensor, some: Tensor) -> Tensor:
        """`everywhere` (captions, tokens, channels) with `some` (chosen tokens, channels) where θ projects."""
        assert self._where is not None
        return everywhere.index_put(self._where.nonzero(as_tuple=True), some)

    def _chunks(self) -> Iterator[tuple[slice, list[int]]]:
        """Slices of the samples, and how many of each caption are in a slice."""
        ends = np.cumsum([part.batch_size for part in self.data])
        starts = ends - [part.batch_size for part in self.data]
        step = self.chunk or int(ends[-1])
        for first in range(0, int(ends[-1]), step):
            last = min(first + step, int(ends[-1]))
            counts = np.clip(np.minimum(ends, last) - np.maximum(starts, first), 0, None)
            yield slice(first, last), counts.tolist()


def _like(bias: Tensor | None, theta: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(theta.dtype)


class _ProjectedText:
    """Cross-attention on precomputed keys and values, one of each per caption: (captions, tokens, channels).

    Samples of one caption are contiguous, `counts` of each; their queries share one product per head.
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

"""Between a pipeline's spaces: pictures to latents and back, prompts to tokens and embeddings.

Latents are always scaled by the autoencoder's `scaling_factor`: they are what the U-Net sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import checks
from ..errors import ArgumentError, ConeslabError
from ..pictures import Images, as_pictures
from .checks import require_pipeline, uncompiled
from .pipelines import Pipeline


def latent_shape(pipe: Pipeline) -> tuple[int, int, int]:
    """(channels, height, width) of one latent at the pipeline's own resolution."""
    require_pipeline(pipe)
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Pictures, uint8 (n, height, width, 3), as float32 (n, 3, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, for any numbers: clipped to [-1, 1] and rounded as in diffusers."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _pixels(pipe: Pipeline, images: Images) -> Tensor:
    """Pictures as floats (n, 3, h, w) in [-1, 1], resized to the pipeline's resolution."""
    _, height, width = latent_shape(pipe)
    size = (width * pipe.vae_scale_factor, height * pipe.vae_scale_factor)
    pictures = as_pictures(images, name="images")
    if small := [p.size for p in pictures if 2 * max(p.size) <= max(size)]:
        checks.warn(
            f"{len(small)} of {len(pictures)} pictures are enlarged, from {small[0][0]} x {small[0][1]} pixels to the "
            f"model's {size[0]} x {size[1]}, which then learns blurred ones: give larger ones, and "
            f"resolution={size[0]} to subject_from_folder"
        )
    resized = [p if p.size == size else p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
    return to_tensor(np.stack([np.asarray(picture) for picture in resized]))


@torch.no_grad()
def encode_images(
    pipe: Pipeline,
    images: Images,
    *,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Encode pictures as scaled latents (n, channels, h, w): the posterior's mode, or with `generator` a sample of it.

    images: see `coneslab.pictures.as_pictures`; resized to the pipeline's resolution.
    Raises ArgumentError for what are no pictures.
    """
    require_pipeline(pipe)
    vae, parts, batch_size = pipe.vae, [], checks.count("batch_size", batch_size)
    for pixels in _pixels(pipe, images).split(batch_size):
        # channels last, as pictures are stored: convolutions on a CPU take a quarter less time
        pixels = pixels.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        encoded = vae.encode(pixels)
        posterior = getattr(encoded, "latent_dist", None)  # AutoencoderTiny has latents and no posterior
        if posterior is None:
            parts.append(encoded.latents)
        else:
            parts.append(posterior.mode() if generator is None else posterior.sample(generator))
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe: Pipeline, latents: Tensor, *, batch_size: int = 64) -> list[Image.Image]:
    """Decode scaled latents (n, channels, h, w) to pictures.

    Raises ConeslabError for latents of another shape, or that are not finite.
    """
    require_pipeline(pipe)
    vae, pictures, batch_size = pipe.vae, [], checks.count("batch_size", batch_size)
    checks.tensor("latents", latents, f"n, {vae.config.latent_channels}, height, width")
    if not latents.isfinite().all():
        raise ConeslabError("the latents hold NaN or infinity, which would become black pictures: see what made them")
    for part in latents.split(batch_size):
        pixels = vae.decode(part.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
        pictures += [Image.fromarray(picture) for picture in to_uint8(pixels)]
    return pictures


def _expanded(pipe: Pipeline, texts: list[str]) -> list[str]:
    """Texts with multi-vector tokens (Textual Inversion) written out, as diffusers does."""
    return pipe.maybe_convert_prompt(texts, pipe.tokenizer) if hasattr(pipe, "maybe_convert_prompt") else texts


def tokenize(pipe: Pipeline, prompts: str | Iterable[str]) -> Tensor:
    """Token ids (n, tokens), padded or truncated to the tokenizer's length, on the text encoder's device.

    A multi-vector token (Textual Inversion) is expanded as in diffusers. Warns of words that are cut off.
    """
    require_pipeline(pipe)
    texts = checks.texts("prompts", prompts, blank=True)
    encoded = pipe.tokenizer(
        _expanded(pipe, texts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    full = encoded.input_ids[:, -2] != pipe.tokenizer.pad_token_id  # only these may have been cut off
    warn_of_unread(pipe, [one for one, maybe in zip(texts, full.tolist(), strict=True) if maybe])
    return encoded.input_ids.to(pipe.text_encoder.device)


def unread(pipe: Pipeline, prompt: str, tokenizer: Any = None) -> str:
    """The end of a prompt that the text encoder does not read, because the prompt is too long; "" if it reads it all.

    tokenizer: default the pipeline's own.
    """
    tokenizer = tokenizer or pipe.tokenizer
    ids = tokenizer(_expanded(pipe, [prompt])[0], add_special_tokens=False, verbose=False).input_ids
    rest = ids[tokenizer.model_max_length - tokenizer.num_special_tokens_to_add() :]
    return text_of(tokenizer, rest)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """What token ids spell. A tokenizer with added tokens, or a copy of one, leaves the ends of words marked."""
    return " ".join(tokenizer.decode(ids).replace("</w>", " ").split())


def _too_long(pipe: Pipeline, prompts: Iterable[str], tokenizer: Any = None) -> str:
    """What to say of prompts that the text encoder reads only in part; "" if it reads them all."""
    found = {prompt: rest for prompt in dict.fromkeys(prompts) if (rest := unread(pipe, prompt, tokenizer))}
    if not found:
        return ""
    prompt, rest = next(iter(found.items()))
    more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
    length, prompt, rest = pipe.tokenizer.model_max_length, checks.shown(prompt), checks.shown(rest)
    return f"the text encoder reads {length} tokens at most, which leaves out {rest} of {prompt}{more}: shorten it"


def warn_of_unread(pipe: Pipeline, prompts: Iterable[str], tokenizer: Any = None) -> None:
    """Warn of prompts that the text encoder reads only in part. tokenizer: see `unread`."""
    if told := _too_long(pipe, prompts, tokenizer):
        checks.warn(told)


def require_read(pipe: Pipeline, *prompts: str) -> None:
    """Raise ArgumentError for a prompt that the text encoder reads only in part: where every word of it counts."""
    if told := _too_long(pipe, prompts):
        raise ArgumentError(told)


def encode_prompts(pipe: Pipeline, prompts: str | Iterable[str]) -> Tensor:
    """Text embeddings (n, tokens, width) as the pipeline itself computes them.

    Carries gradients if and only if a weight of the text encoder requires them.

    >>> pipe = coneslab.load("tiny")
    >>> text = encode_prompts(pipe, ["a cat", "a dog on the grass"])
    >>> text.shape == (2, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    True
    """
    require_pipeline(pipe)
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in pipe.text_encoder.parameters())
    with torch.set_grad_enabled(wanted):
        return encode_ids(pipe, tokenize(pipe, prompts))


def encode_ids(pipe: Pipeline, ids: Tensor) -> Tensor:
    """Text embeddings (n, tokens, width) of token ids (n, tokens)."""
    require_pipeline(pipe)
    checks.tensor("ids", ids, "n, tokens", floating=False)
    encoder, mask = uncompiled(pipe.text_encoder), None  # compiled, it might not call a hook that came later
    if getattr(encoder.config, "use_attention_mask", False):  # as StableDiffusionPipeline.encode_prompt does
        mask = (ids != pipe.tokenizer.pad_token_id).long()
    return encoder(ids, attention_mask=mask)[0]

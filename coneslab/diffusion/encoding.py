"""Between a pipeline's spaces: pictures to latents and back, prompts to tokens and embeddings.

Latents are always scaled by the autoencoder's `scaling_factor`: they are what the U-Net sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConeslabError
from .pipelines import Pipeline


def latent_shape(pipe: Pipeline) -> tuple[int, int, int]:
    """(channels, height, width) of one latent at the pipeline's own resolution."""
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


def _pixels(pipe: Pipeline, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """Pictures as floats (n, 3, h, w) in [-1, 1]; PIL pictures are resized to the pipeline's resolution."""
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ConeslabError(
                f"images are {images.dtype} {images.shape}, expected uint8 (n, height, width, 3) or PIL pictures"
            )
        array = images
    else:
        _, height, width = latent_shape(pipe)
        size = (width * pipe.vae_scale_factor, height * pipe.vae_scale_factor)
        pictures = [image.convert("RGB") for image in images]
        if not pictures:
            raise ConeslabError("no images were given, expected at least one")
        resized = [p if p.size == size else p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
        array = np.stack([np.asarray(picture) for picture in resized])
    return to_tensor(array)


@torch.no_grad()
def encode_images(
    pipe: Pipeline,
    images: Sequence[Image.Image] | np.ndarray,
    *,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Encode pictures as scaled latents (n, channels, h, w): the posterior's mode, or with `generator` a sample of it.

    images: PIL pictures (resized as needed) or a uint8 array (n, height, width, 3).
    Raises ConeslabError for any other array, or for no pictures.
    """
    vae, parts = pipe.vae, []
    for pixels in _pixels(pipe, images).split(batch_size):
        # channels last, as pictures are stored: convolutions on a CPU take a quarter less time
        pixels = pixels.to(vae.device, vae.dtype, memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        parts.append(posterior.mode() if generator is None else posterior.sample(generator))
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipe: Pipeline, latents: Tensor, *, batch_size: int = 64) -> list[Image.Image]:
    """Decode scaled latents (n, channels, h, w) to pictures."""
    vae, pictures = pipe.vae, []
    for part in latents.split(batch_size):
        pixels = vae.decode(part.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
        pictures += [Image.fromarray(picture) for picture in to_uint8(pixels)]
    return pictures


def tokenize(pipe: Pipeline, prompts: str | Sequence[str]) -> Tensor:
    """Token ids (n, tokens), padded or truncated to the tokenizer's length, on the text encoder's device.

    A multi-vector token (Textual Inversion) is expanded as in diffusers.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if hasattr(pipe, "maybe_convert_prompt"):
        texts = pipe.maybe_convert_prompt(texts, pipe.tokenizer)
    encoded = pipe.tokenizer(
        texts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids.to(pipe.text_encoder.device)


def encode_prompts(pipe: Pipeline, prompts: str | Sequence[str]) -> Tensor:
    """Text embeddings (n, tokens, width) as the pipeline itself computes them.

    Carries gradients if and only if a weight of the text encoder requires them.

    >>> pipe = coneslab.load("tiny")
    >>> text = encode_prompts(pipe, ["a cat", "a dog on the grass"])
    >>> text.shape == (2, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    True
    """
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in pipe.text_encoder.parameters())
    with torch.set_grad_enabled(wanted):
        return encode_ids(pipe, tokenize(pipe, prompts))


def encode_ids(pipe: Pipeline, ids: Tensor) -> Tensor:
    """Text embeddings (n, tokens, width) of token ids (n, tokens)."""
    mask = None
    if getattr(pipe.text_encoder.config, "use_attention_mask", False):  # as StableDiffusionPipeline.encode_prompt does
        mask = (ids != pipe.tokenizer.pad_token_id).long()
    return pipe.text_encoder(ids, attention_mask=mask)[0]

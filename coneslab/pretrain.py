"""Train the shipped models from nothing on the sticker world: autoencoder, U-Net with its text encoder, judge.

    coneslab pretrain all --runs runs        # then `coneslab pretrain export --runs runs`

Everything is kept under one `runs` folder and resumes where it was interrupted. The pieces are the stock ones of
diffusers and transformers, so the exported folder is a plain `StableDiffusionPipeline`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from . import world
from .training import Feed, Log, Recipe, batches, fit, mixed_precision

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": world.RESOLUTION,
    "block_out_channels": (32, 32, 96), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "mid_block_add_attention": False, "scaling_factor": 1.0,
}  # fmt: skip

VAE = Recipe(minutes=13, batch_size=16, learning_rate=1.5e-3, ema=0.995, weight_decay=0.0)
DECODER = Recipe(minutes=10, batch_size=16, learning_rate=6e-4, ema=0.998, weight_decay=0.0, seed=1)
KL_WEIGHT = 1e-4
GRADIENT_WEIGHT = 1.0


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (n, h, w, 3) -> float (n, 3, h, w) in [-1, 1], channels last in memory."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> np.ndarray:
    """float (n, 3, h, w) in [-1, 1] -> uint8 (n, h, w, 3)."""
    return pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path: Path, rows: list[np.ndarray]) -> None:
    """Write rows of uint8 pictures (n, h, w, 3) as one picture, a row each."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(path)


# --- autoencoder ----------------------------------------------------------------------------------------


def picture_loss(made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute error of pixels and of differences between neighbours; the second asks for sharp edges."""
    error = made - real
    across, down = error.diff(dim=3), error.diff(dim=2)
    return error.abs().mean(), 0.5 * (across.abs().mean() + down.abs().mean())


def train_vae(
    runs: Path, recipe: Recipe = VAE, *, decoder_only: bool = False, device: torch.device | None = None
) -> Log:
    """Train the autoencoder into runs/vae, or only its decoder (on the encoder as exported there) into runs/decoder.

    Once the encoder is done its latents stay as they are: the U-Net learns on them, while the decoder may go on.
    """
    torch.set_flush_denormal(True)
    device = device or best_device()
    folder = runs / ("decoder" if decoder_only else "vae")
    torch.manual_seed(recipe.seed)
    if decoder_only:
        vae = AutoencoderKL.from_pretrained(runs / "vae" / "model")
        vae.requires_grad_(False)
        modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
        for module in modules.values():
            module.requires_grad_(True)
    else:
        vae = AutoencoderKL(**VAE_CONFIG)
        modules = {"vae": vae}
    vae.to(device, memory_format=torch.channels_last)

    real = world.sample(12, seed=recipe.seed + 999).images

    def preview(step: int) -> None:
        with torch.no_grad(), mixed_precision(device):
            made = vae.decode(vae.encode(to_tensor(real, device)).latent_dist.mode()).sample
        save_grid(folder / f"{step:06d}.png", [real, to_uint8(made)])

    with Feed(32 * recipe.batch_size, seed=recipe.seed + 11) as feed:

        def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
            pictures, part = feed.batch(step, recipe.batch_size)
            x = to_tensor(pictures.images[part], device)
            with mixed_precision(device):
                if decoder_only:
                    with torch.no_grad():
                        latents = vae.encode(x).latent_dist
                    z, kl = latents.sample(generator), x.new_zeros(())
                else:
                    latents = vae.encode(x).latent_dist
                    z, kl = latents.sample(generator), latents.kl().float().mean() / latents.mean[0].numel()
                made = vae.decode(z).sample
            pixels, edges = picture_loss(made.float(), x)
            total = pixels + GRADIENT_WEIGHT * edges + KL_WEIGHT * kl
            return {"loss": total, "pixels": pixels, "edges": edges, "kl": kl}

        log = fit(folder, modules=modules, loss=loss, recipe=recipe, preview=preview)
    if not decoder_only:
        standardise_latents(vae, device)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder / "model")
    return log


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, device: torch.device, *, n: int = 4096) -> None:
    """Fold the latents' mean and deviation into the 1x1 convolutions around them, channel by channel.

    Afterwards latents have mean 0 and deviation 1 in each channel, `scaling_factor` is 1, and encoding followed by
    decoding gives exactly the pictures it gave before. A pipeline has room for one factor only, and no shift.
    """
    images = world.sample(n, seed=77).images
    with mixed_precision(device):
        means = [vae.encode(to_tensor(images[part], device)).latent_dist.mode().float() for part in batches(n, 64)]
    latents = torch.cat(means)
    shift, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = vae.config.latent_channels
    after, before = vae.quant_conv, vae.post_quant_conv  # (mean, log variance) -> latent -> decoder
    after.weight[:channels] /= scale[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - shift) / scale
    after.bias[channels:] -= 2 * scale.log()  # the log variance is clamped to [-30, 20]: far from what occurs
    before.bias += before.weight[:, :, 0, 0] @ shift
    before.weight *= scale[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def best_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""The autoencoder: its loss, its training, and latents of unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .. import world
from ..diffusion.encoding import to_tensor, to_uint8
from ..diffusion.pipelines import usable_device
from ..diffusion.precision import flushing_denormals, mixed_precision
from ..errors import ConeslabError
from ..files import replacing, replacing_folder, require_folder, seal_folder, user_path
from .loop import Feed, Log, batches, fit
from .recipe import Recipe

LATENT_SAMPLES = 4096
HELD_OUT_PICTURES = 256
PLACES = 16  # latents, and the labels of their places, are 16x16
NOTHING = len(world.DRAWINGS)  # the label of scenery


def save_grid(path: Path, rows: list[np.ndarray]) -> None:
    """Save rows of uint8 pictures, each (n, h, w, 3), as one picture."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    enlarged = Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST)
    with replacing(path) as unfinished:
        enlarged.save(unfinished, "PNG")


def object_weights(records: Sequence[world.Record], weight: float, device: torch.device) -> Tensor:
    """How much each pixel counts: `weight` on objects and a pixel around them, 1 on scenery; (n, 1, h, w), mean 1."""
    masks = np.stack([np.any([thing.mask for thing in record.objects], axis=0) for record in records])
    inside = F.max_pool2d(torch.from_numpy(masks).to(device).float()[:, None], 3, stride=1, padding=1)
    weights = 1 + (weight - 1) * inside
    return weights / weights.mean()


def place_labels(records: Sequence[world.Record], places: int = PLACES) -> tuple[Tensor, Tensor]:
    """The drawing and style of the object that covers most of each place, both uint8 (n, places, places).

    Indices into `world.DRAWINGS` and `world.STYLES`; NOTHING and the number of styles where no object covers a quarter.
    """
    cell = world.RESOLUTION // places
    drawings = np.full((len(records), places, places), NOTHING, np.uint8)
    styles = np.full_like(drawings, len(world.STYLES))
    for row, record in enumerate(records):
        best = np.full((places, places), 0.25)
        for thing in record.objects:
            share = thing.mask.reshape(places, cell, places, cell).mean((1, 3))
            drawings[row][share > best] = world.DRAWINGS.index(thing.drawing)
            styles[row][share > best] = world.STYLES.index(thing.style)
            best = np.maximum(best, share)
    return torch.from_numpy(drawings), torch.from_numpy(styles)


def picture_loss(made: Tensor, real: Tensor, weights: Tensor, *, softness: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean absolute error of pixels, and of differences between neighbours, which rewards sharp edges.

    weights: (n, 1, h, w), see `object_weights`: scenery is easy, and would outvote the few pixels of an object.
    softness: errors well below it (pixels run from -1 to 1) hardly count, sqrt(e^2 + s^2) - s instead of |e|
    (Charbonnier et al. 1994).
    """
    error = made - real

    def size(e: Tensor, w: Tensor) -> Tensor:
        return (w * ((e.square() + softness**2).sqrt() - softness if softness else e.abs())).mean()

    across, down = size(error.diff(dim=3), weights[..., 1:]), size(error.diff(dim=2), weights[..., 1:, :])
    return size(error, weights), 0.5 * (across + down)


def transformed(x: Tensor, scale: float, turns: int, flipped: bool) -> Tensor:
    """Scale pictures or latents (n, c, h, w) by `scale`, rotate them by quarter turns, and mirror them if `flipped`."""
    if scale != 1.0:
        x = F.interpolate(x.float(), scale_factor=scale, mode="bilinear", antialias=True)
    x = torch.rot90(x, turns, (2, 3))
    return x.flip(3) if flipped else x


def _draw_transform(share: float, generator: torch.Generator) -> tuple[float, int, bool]:
    """Choose a transform that latents and pictures must share; none, with probability 1 - share."""
    if float(torch.rand(1, generator=generator, device=generator.device)) >= share:
        return 1.0, 0, False
    scale, turns, flip = (int(torch.randint(n, (1,), generator=generator, device=generator.device)) for n in (3, 4, 2))
    return (1.0, 0.75, 0.5)[scale], turns, bool(flip)


@flushing_denormals()
def train_vae(
    runs: Path,
    settings: dict[str, Any],
    recipe: Recipe,
    *,
    decoder: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> Log:
    """Train the autoencoder into runs/vae, or only its decoder (on the encoder as exported there) into runs/decoder.

    settings: the recipe's `vae`; decoder: its `decoder`, to train only that. Latents are equivariant: the decoder must
    turn a scaled or rotated latent into the scaled or rotated picture (EQ-VAE, Kouzelis et al. 2025, Eq. 5), which
    makes them easier to model. Once the encoder is trained its latents are fixed: the U-Net learns on them, while the
    decoder may be trained further.
    """
    device, runs = usable_device(device), user_path(runs)
    folder, options = runs / ("decoder" if decoder else "vae"), settings["loss"]
    torch.manual_seed(recipe.seed)
    if decoder:
        vae = load_autoencoder(runs / "vae" / "model")
        vae.requires_grad_(False)
        modules: dict[str, nn.Module] = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
        for module in modules.values():
            module.requires_grad_(True)
    else:
        vae = AutoencoderKL(**settings["config"])
        modules = {"vae": vae}
    vae.to(device)
    real, held_out = (world.sample(n, seed=recipe.seed + 999).images for n in (12, HELD_OUT_PICTURES))

    def made_again(images: np.ndarray) -> Tensor:
        with torch.no_grad(), mixed_precision(device):
            return vae.decode(vae.encode(to_tensor(images, device)).latent_dist.mode()).sample.float()

    def preview(step: int) -> None:
        save_grid(folder / f"{step:06d}.png", [real, to_uint8(made_again(real))])

    def measure(step: int) -> dict[str, float]:
        wrong = [made_again(held_out[part]) - to_tensor(held_out[part], device) for part in batches(len(held_out), 32)]
        return {"held_out_mse": float(torch.cat(wrong).square().mean())}

    with Feed(32 * recipe.batch_size, seed=recipe.seed + 11, objects=options["objects"]) as feed:

        def loss(step: int, part: int, generator: torch.Generator) -> dict[str, Tensor]:
            pictures, own = feed.batch(step, part, recipe)
            x = to_tensor(pictures.images[own], device)
            weights = object_weights(pictures.records[own], options["object_weight"], device)
            with mixed_precision(device):
                if decoder:
                    with torch.no_grad():
                        z = vae.encode(x).latent_dist.mode()
                    kl = x.new_zeros(())
                    z = z + decoder["loss"]["noise"] * torch.randn(z.shape, generator=generator, device=device)
                else:
                    latents = vae.encode(x).latent_dist
                    z, kl = latents.sample(generator), latents.kl().float().mean() / latents.mean[0].numel()
                    way = _draw_transform(options["equivariance"], generator)
                    x, z, weights = (transformed(tensor, *way) for tensor in (x, z, weights))
                made = vae.decode(z).sample
            softness = decoder["loss"]["softness"] if decoder else 0.0
            pixels, edges = picture_loss(made.float(), x, weights, softness=softness)
            total = pixels + options["gradient_weight"] * edges + options["kl_weight"] * kl
            return {"loss": total, "pixels": pixels, "edges": edges, "kl": kl}

        own = {"vae": settings, "decoder": decoder or {}}
        identity = {stage: {name: given[name] for name in given if name != "training"} for stage, given in own.items()}
        log = fit(
            folder, modules=modules, loss=loss, recipe=recipe, identity=identity, preview=preview, measure=measure
        )
    if not decoder:
        standardise_latents(vae, device)
    with replacing_folder(folder / "model", "config.json") as unfinished:
        vae.save_pretrained(unfinished)
        seal_folder(unfinished)
    return log


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """The autoencoder that `train_vae` saved. Raises ConeslabError if it is missing or damaged."""
    if not folder.is_dir():
        raise ConeslabError(f"there is no autoencoder in {folder}: train it first (coneslab pretrain vae)")
    require_folder(folder)
    return AutoencoderKL.from_pretrained(folder)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, device: torch.device, *, batch_size: int = 64) -> Tensor:
    """Unscaled latents of pictures, the posterior's mode, float32 (n, 4, 16, 16); images: uint8 (n, h, w, 3)."""
    with mixed_precision(device):
        return torch.cat(
            [
                vae.encode(to_tensor(images[part], device)).latent_dist.mode().float()
                for part in batches(len(images), batch_size)
            ]
        )


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, device: torch.device, *, n: int | None = None) -> None:
    """Fold the latents' mean and standard deviation into the 1x1 convolutions around them, channel by channel.

    Afterwards latents have mean 0 and standard deviation 1 in each channel, `scaling_factor` is 1, and encoding
    followed by decoding gives the same pictures as before. A pipeline's config has only one factor, and no shift.
    """
    latents = encode(vae, world.sample(n or LATENT_SAMPLES, seed=77).images, device)
    shift, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = vae.config.latent_channels
    after, before = vae.quant_conv, vae.post_quant_conv  # (mean, log variance) -> latent -> decoder
    after.weight[:channels] /= scale[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - shift) / scale
    after.bias[channels:] -= 2 * scale.log()  # the log variance is clamped to [-30, 20], far outside what occurs
    before.bias += before.weight[:, :, 0, 0] @ shift
    before.weight *= scale[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)

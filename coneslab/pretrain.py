"""Train the shipped models from nothing on the sticker world: autoencoder, U-Net with its text encoder, judge.

    coneslab pretrain all --runs runs        # then `coneslab pretrain export --runs runs`

Everything is kept under one `runs` folder and resumes where it was interrupted. The pieces are the stock ones of
diffusers and transformers, so the exported folder is a plain `StableDiffusionPipeline`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from . import world
from .diffusion import denoising_loss, generate, snr, stratified_timesteps, tokenize
from .errors import ConeslabError
from .judging import JUDGE, train_judge
from .modelcard import write_model_card
from .models import write_sums
from .paths import data_folder
from .training import (
    Feed,
    Log,
    Recipe,
    batches,
    best_device,
    fit,
    flushing_denormals,
    load_checkpoint,
    mixed_precision,
    save_checkpoint,
)

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": world.RESOLUTION,
    "block_out_channels": (32, 64, 96), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "mid_block_add_attention": False, "scaling_factor": 1.0,
}  # fmt: skip

VAE = Recipe(minutes=40, batch_size=16, learning_rate=2e-3, ema=0.997, weight_decay=0.0, muon=True)
DECODER = Recipe(minutes=10, batch_size=16, learning_rate=8e-4, ema=0.998, weight_decay=0.0, seed=1, muon=True)
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (96, 192), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": 128, "attention_head_dim": 2,
    "norm_num_groups": 16,
}  # diffusers reads attention_head_dim as the number of heads here  # fmt: skip
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "projection_dim": 128,
}  # fmt: skip
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True,
    "steps_offset": 1,
}  # fmt: skip

UNET = Recipe(minutes=110, batch_size=32, learning_rate=1.5e-3, warmup=200, decay=0.7, muon=True)
PICTURES, CHUNK, CAPTION_DROPOUT = 120_000, 1000, 0.1
KL_WEIGHT, LATENT_SAMPLES = 1e-4, 4096
VAE_OBJECTS = (0.1, 0.2, 0.2, 0.5)  # shares of one to four objects: crowded pictures hold more to learn from
OBJECT_WEIGHT = 4.0
DECODER_SOFTNESS = 0.02
DECODER_NOISE = 0.03  # the U-Net's latents are not exact: the decoder learns to bear with that
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


def object_weights(records: Sequence[world.Record], device: torch.device) -> Tensor:
    """What each pixel counts: OBJECT_WEIGHT on objects and a pixel around them, 1 on scenery; (n, 1, h, w), mean 1."""
    masks = np.stack([np.any([thing.mask for thing in record.objects], axis=0) for record in records])
    inside = F.max_pool2d(torch.from_numpy(masks).to(device).float()[:, None], 3, stride=1, padding=1)
    weights = 1 + (OBJECT_WEIGHT - 1) * inside
    return weights / weights.mean()


def picture_loss(made: Tensor, real: Tensor, weights: Tensor, *, softness: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean absolute error of pixels and of differences between neighbours; the second asks for sharp edges.

    weights: (n, 1, h, w), see `object_weights`: scenery is easy, and would outvote the few pixels of an object.
    softness: errors well below it (pixels run from -1 to 1) hardly count, sqrt(e^2 + s^2) - s instead of |e|
    (Charbonnier et al. 1994).
    """
    error = made - real

    def size(e: Tensor, w: Tensor) -> Tensor:
        return (w * ((e.square() + softness**2).sqrt() - softness if softness else e.abs())).mean()

    across, down = size(error.diff(dim=3), weights[..., 1:]), size(error.diff(dim=2), weights[..., 1:, :])
    return size(error, weights), 0.5 * (across + down)


@flushing_denormals()
def train_vae(
    runs: Path, recipe: Recipe = VAE, *, decoder_only: bool = False, device: torch.device | None = None
) -> Log:
    """Train the autoencoder into runs/vae, or only its decoder (on the encoder as exported there) into runs/decoder.

    Once the encoder is done its latents stay as they are: the U-Net learns on them, while the decoder may go on.
    """
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

    with Feed(32 * recipe.batch_size, seed=recipe.seed + 11, objects=VAE_OBJECTS) as feed:

        def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
            pictures, part = feed.batch(step, recipe.batch_size)
            x = to_tensor(pictures.images[part], device)
            with mixed_precision(device):
                if decoder_only:
                    with torch.no_grad():
                        latents = vae.encode(x).latent_dist
                    z, kl = latents.mode(), x.new_zeros(())
                    z = z + DECODER_NOISE * torch.randn(z.shape, generator=generator, device=device)
                else:
                    latents = vae.encode(x).latent_dist
                    z, kl = latents.sample(generator), latents.kl().float().mean() / latents.mean[0].numel()
                made = vae.decode(z).sample
            weights = object_weights(pictures.records[part], device)
            softness = DECODER_SOFTNESS if decoder_only else 0.0
            pixels, edges = picture_loss(made.float(), x, weights, softness=softness)
            total = pixels + GRADIENT_WEIGHT * edges + KL_WEIGHT * kl
            return {"loss": total, "pixels": pixels, "edges": edges, "kl": kl}

        log = fit(folder, modules=modules, loss=loss, recipe=recipe, preview=preview)
    if not decoder_only:
        standardise_latents(vae, device)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder / "model")
    return log


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, device: torch.device, *, n: int | None = None) -> None:
    """Fold the latents' mean and deviation into the 1x1 convolutions around them, channel by channel.

    Afterwards latents have mean 0 and deviation 1 in each channel, `scaling_factor` is 1, and encoding followed by
    decoding gives exactly the pictures it gave before. A pipeline has room for one factor only, and no shift.
    """
    images = world.sample(n or LATENT_SAMPLES, seed=77).images
    with mixed_precision(device):
        means = [
            vae.encode(to_tensor(images[part], device)).latent_dist.mode().float() for part in batches(len(images), 64)
        ]
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


# --- text and U-Net -------------------------------------------------------------------------------------


def build_tokenizer(words: Sequence[str] = world.WORDS, *, length: int = 32) -> CLIPTokenizer:
    """A stock CLIPTokenizer whose byte-pair merges make every one of `words` a single token.

    Trained to convergence (Sennrich et al. 2016, Algorithm 1): the commonest pair of neighbouring symbols is merged
    until every word is whole. All bytes are in the vocabulary, so any other text encodes too, in more tokens.
    CLIP cuts a text between letters and digits before it merges; words such as "3d" are added tokens instead.
    Raises ConeslabError if a word is not one token afterwards.
    """
    alphabet = list(bytes_to_unicode().values())
    vocabulary = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    merges: list[tuple[str, str]] = []
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words if word.isalpha()]
    while pairs := Counter(pair for split in splits for pair in pairwise(split)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocabulary.append("".join(best))
        for split in splits:
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == best:
                    split[i : i + 2] = ["".join(best)]
                i += 1
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    table = {symbol: index for index, symbol in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=table, merges=merges, model_max_length=length)
    mixed = [word for word in words if not word.isalpha()]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in mixed])
    parts = tokenizer(list(words), add_special_tokens=False).input_ids
    broken = [word for word, ids in zip(words, parts, strict=True) if len(ids) != 1]
    if broken:
        raise ConeslabError(f"these words are more than one token: {', '.join(broken)}; use plain lower-case words")
    return tokenizer


def text_config(tokenizer: CLIPTokenizer, **settings: Any) -> CLIPTextConfig:
    """A CLIPTextConfig that fits a tokenizer: vocabulary, length and the ids of its special tokens."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu", **settings,
    )  # fmt: skip


def build_pipeline(vae: AutoencoderKL, *, seed: int = 0) -> StableDiffusionPipeline:
    """The untrained pipeline around an autoencoder: tokenizer, text encoder, U-Net and scheduler."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(text_config(tokenizer, **TEXT_CONFIG))
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=UNet2DConditionModel(**UNET_CONFIG),
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def encode_world(
    runs: Path, vae: AutoencoderKL, n: int, *, seed: int, device: torch.device
) -> tuple[Tensor, list[str]]:
    """Latents (n, 4, 16, 16) of `n` fresh pictures and their captions; kept in runs/latents for the next time."""
    folder, chunk = runs / "latents", CHUNK
    cache, words = folder / f"{n}.safetensors", folder / f"{n}.json"
    if cache.is_file() and words.is_file():
        return load_checkpoint(cache)[0]["latents"], json.loads(words.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    parts, captions = [], []
    with Feed(chunk, seed=seed) as feed, torch.no_grad(), mixed_precision(device):
        for index in tqdm(range(-(-n // chunk)), desc="latents", unit="k", mininterval=5):
            pictures = feed.chunk(index)
            captions += pictures.captions
            for part in batches(chunk, 50):
                parts.append(vae.encode(to_tensor(pictures.images[part], device)).latent_dist.mode().float())
    latents = torch.cat(parts)[:n] * vae.config.scaling_factor
    save_checkpoint(cache, {"latents": latents}, {})
    words.write_text(json.dumps(captions[:n]), encoding="utf-8")
    return latents, captions[:n]


def level_weights(ratio: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights of v-prediction losses by signal-to-noise ratio: min(1, (gamma + 1) / (ratio + 1)).

    Min-SNR (Hang et al. 2023, Sec. 3.4) for v is min(ratio, gamma) / (ratio + 1). It agrees at ratio >= gamma, but
    vanishes at the last timestep, where a zero-terminal-SNR schedule learns all that the caption alone decides.
    """
    return ((gamma + 1.0) / (ratio + 1.0)).clamp(max=1.0)


PREVIEW_PROMPTS = (
    "a cat on the grass", "a car in the city", "a red rocket in space", "a penguin in the snow", "a fish under the sea",
    "a pizza on the beach", "a dog and a car on the grass", "a lion and a crown at night", "a blue guitar in the room",
    "a cat, a dog, a car and a pizza on a white background", "a robot and an apple in the forest", "a flat owl",
)  # fmt: skip


@flushing_denormals()
def train_unet(
    runs: Path, recipe: Recipe = UNET, *, pictures: int | None = None, device: torch.device | None = None
) -> Log:
    """Train U-Net and text encoder together on latents of runs/vae; the pipeline is saved as runs/unet/model."""
    device = device or best_device()
    folder = runs / "unet"
    vae = AutoencoderKL.from_pretrained(runs / "vae" / "model").to(device).requires_grad_(False)
    latents, captions = encode_world(runs, vae, pictures or PICTURES, seed=recipe.seed + 501, device=device)
    pipe = build_pipeline(vae, seed=recipe.seed)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.unet.set_attn_processor(AttnProcessor())  # the CPU kernel behind the default one is slow backwards
    pipe.text_encoder.set_attn_implementation("eager")
    ids = torch.cat([tokenize(pipe, captions[part]) for part in batches(len(captions), 1000)])
    empty = tokenize(pipe, "")
    n, size, total = len(ids), recipe.batch_size, pipe.scheduler.config.num_train_timesteps

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        epoch, place = divmod(step, n // size)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(recipe.seed + epoch))
        pick = order[place * size : (place + 1) * size]
        x = latents[pick].to(device)
        dropped = torch.rand(size, 1, generator=generator, device=device) < CAPTION_DROPOUT
        tokens = torch.where(dropped, empty, ids[pick.to(device)])
        noise = torch.randn(x.shape, generator=generator, device=device)
        times = stratified_timesteps(size, total, generator)
        with mixed_precision(device):
            text = pipe.text_encoder(tokens)[0]
            plain = denoising_loss(pipe, x, text, noise=noise, timesteps=times, reduction="none")
        return {"loss": (plain * level_weights(snr(pipe, times))).mean(), "plain": plain.detach().mean()}

    def preview(step: int) -> None:
        with mixed_precision(device):
            made = [np.asarray(image) for image in generate(pipe, PREVIEW_PROMPTS, seed=3)]
        save_grid(folder / f"{step:06d}.png", [np.stack(made[:6]), np.stack(made[6:])])

    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    facts = {"pictures": n, "caption_dropout": CAPTION_DROPOUT}
    log = fit(folder, modules=modules, loss=loss, recipe=recipe, preview=preview, facts=facts, checkpoint_every=240)
    pipe.save_pretrained(folder / "model", safe_serialization=True)
    return log


# --- all in turn ----------------------------------------------------------------------------------------


def train(runs: Path, stages: Sequence[str], *, minutes: float | None = None) -> None:
    """Train stages ("vae", "unet", "judge", "decoder") in turn; a finished one is only saved again.

    U-Net and decoder stand on runs/vae. minutes: budget of each stage, default the recipe's own.
    """
    for stage in stages:
        recipe = {"vae": VAE, "decoder": DECODER, "unet": UNET, "judge": JUDGE}[stage]
        if minutes is not None:
            recipe = replace(recipe, minutes=minutes)
        if stage in ("unet", "decoder") and not (runs / "vae" / "model").is_dir():
            raise ConeslabError(f"there is no autoencoder in {runs / 'vae'}: train it first (coneslab pretrain vae)")
        if stage == "unet":
            train_unet(runs, recipe)
        elif stage == "judge":
            train_judge(runs, build_tokenizer(), recipe)
        else:
            train_vae(runs, recipe, decoder_only=stage == "decoder")


def export(runs: Path, models: Path | None = None) -> Path:
    """Put what is trained under `runs` into the folder of shipped models, with model cards and sums.

    The cards' figures are those in `results/evaluation_tiny.json` and `evaluation_judge.json` beside that folder, which
    `coneslab evaluate-model --json` writes.

    The U-Net's weights are stored in float16, everything else in float32. The autoencoder is runs/decoder's where
    there is one, else runs/vae's. Raises ConeslabError if the U-Net or the judge is missing.
    """
    models = models or data_folder() / "models"
    for stage in ("unet", "judge"):
        if not (runs / stage / "model").is_dir():
            raise ConeslabError(f"there is no trained model in {runs / stage}: run coneslab pretrain {stage} first")
    pipe = StableDiffusionPipeline.from_pretrained(
        runs / "unet" / "model", use_safetensors=True, safety_checker=None, requires_safety_checker=False
    )
    decoder = runs / "decoder" / "model"
    pipe.vae = AutoencoderKL.from_pretrained(decoder if decoder.is_dir() else runs / "vae" / "model")
    pipe.unet.half()
    pipe.save_pretrained(models / "tiny", safe_serialization=True)
    for config in (models / "tiny").rglob("*.json"):
        text = config.read_text(encoding="utf-8")  # the folder it was trained in is of no use elsewhere
        config.write_text(re.sub(r'\n *"_name_or_path": "[^"]*",', "", text), encoding="utf-8")
    shutil.copytree(runs / "judge" / "model", models / "judge", dirs_exist_ok=True)
    logs = {stage: Log.load(runs / stage / "log.json") for stage in ("vae", "decoder", "unet", "judge")
            if (runs / stage / "log.json").is_file()}  # fmt: skip
    by_model = {"judge": {"judge": logs.pop("judge")}, "tiny": logs}
    for name, own in by_model.items():
        write_model_card(models / name, own, _evaluated(models.parent / "results" / f"evaluation_{name}.json"))
    write_sums(models)
    return models


def _evaluated(file: Path) -> dict[str, str] | None:
    """What `coneslab evaluate-model --json FILE` found, a line of text a share; None if it was not run yet."""
    if not file.is_file():
        return None
    rows = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["shares"]:
        bar = "" if row["bar"] is None else f"; bar {row['bar']:.2f}: {'met' if row['met'] else 'missed'}"
        real = "" if row["real"] is None else f"; on real pictures {row['real']['estimate']:.3f}"
        interval = f"{row['estimate']:.3f} [{row['low']:.3f}, {row['high']:.3f}], n = {row['values']}"
        rows[row["name"]] = interval + bar + real
    return rows

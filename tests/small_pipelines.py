"""Tiny random Stable Diffusion pipelines, built in memory: nothing is downloaded, nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "sks", "cat", "dog", "car", "house", "on", "the", "grass", "beach", "in", "city", "and")
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def make_tokenizer(folder: Path, tokens: int, words: tuple[str, ...] = WORDS) -> CLIPTokenizer:
    """A real CLIPTokenizer that knows letters and a few words, and pads to `tokens` positions."""
    letters = [chr(code) for code in range(33, 127)]
    pieces, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = ["".join(parts[:2])]
            pieces.append(parts[0])
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=tokens)


def make_pipeline(
    folder: Path,
    *,
    prediction_type: str = "v_prediction",
    widths: tuple[int, ...] = (16, 32),
    text_width: int = 24,
    tokens: int = 12,
    heads: int | tuple[int, ...] = 2,
    layers_per_block: int = 1,
    down_blocks: tuple[str, ...] | None = None,
    sample_size: int = 8,
    words: tuple[str, ...] = WORDS,
    linear: bool = False,
    tokenizer: CLIPTokenizer | None = None,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline with random weights, the structure given, and pictures 2 x the latent's size."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer(folder, tokens, words)
    down = down_blocks or (DOWN,) * len(widths)
    up = tuple(UP if block == DOWN else block.replace("Down", "Up") for block in reversed(down))
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        layers_per_block=layers_per_block,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=text_width,
        attention_head_dim=heads,
        use_linear_projection=linear,
        norm_num_groups=8,
    )
    for name, weight in unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_q.weight")):
            weight.data.mul_(3.0)  # a random U-Net hardly listens to its text; this one does
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=2 * sample_size,
        scaling_factor=0.5,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (unet, vae):
        module.eval()
    return pipe


def make_subject(size: int, *, name: str = "cat", seed: int = 0, n: int = 3) -> SimpleNamespace:
    """Anything with pictures, prompts and words will do as a subject."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return SimpleNamespace(
        name=name,
        class_word="cat",
        token="sks",
        images=tuple(Image.fromarray(picture) for picture in pixels),
        prompt="a sks cat",
        prior_prompt="a cat",
        prompts=("a sks cat on the grass", "a sks cat in the city"),
    )


def weights_of(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """A copy of every weight of the U-Net and the text encoder."""
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }

"""Train the judge: a small CLIP on all four art styles, with the world's ground truth for hard negatives.

Pictures and captions meet as in CLIP (Radford et al. 2021, Fig. 3). Since every picture's truth is known, each one
also brings captions that are wrong in exactly one class or scene, is asked which classes it shows among prompts
for all of them, and while training its patches say what they show. Nothing of that stays in the saved model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from . import world
from .training import Feed, Log, Recipe, best_device, fit, flushing_denormals, mixed_precision

JUDGE = Recipe(
    minutes=17, batch_size=64, learning_rate=1e-3, warmup=150, decay=0.7, ema=0.998, weight_decay=0.05, muon=True
)
VISION_CONFIG: dict[str, Any] = {
    "image_size": world.RESOLUTION, "patch_size": 8, "hidden_size": 160, "intermediate_size": 480,
    "num_hidden_layers": 4, "num_attention_heads": 5,
}  # fmt: skip
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
PROJECTION, WRONG_CAPTIONS = 128, 3
NAMES = tuple(world.CLASSES)
SCENES = tuple(world.SCENES)


def build_judge(tokenizer: CLIPTokenizer, *, seed: int = 0) -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained CLIPModel and its processor (pictures are resized to the model's own resolution)."""
    torch.manual_seed(seed)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, projection_dim=PROJECTION,
        **special, **TEXT_CONFIG,
    )  # fmt: skip
    vision = CLIPVisionConfig(projection_dim=PROJECTION, **VISION_CONFIG)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION, **special
    )
    side = VISION_CONFIG["image_size"]
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return CLIPModel(config), CLIPProcessor(pictures, tokenizer)


def listed(names: Sequence[str], scene: str | None, style: str | None = None) -> str:
    """A plain caption: "a flat cat, a flat dog and a flat car on the beach"; without a scene or style if it is None."""
    named = [f"{world.STYLE_WORDS[style][0]} {name}" if style else name for name in names]
    parts = [world.with_article(name) for name in named]
    text = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"{text} {world.SCENES[scene][0]}" if scene else text


def contrast(record: world.Record, random: Random, n: int = WRONG_CAPTIONS) -> list[str]:
    """A right caption of a picture, then `n` that are wrong in one class, in the scene, or in the art style."""
    names = list(dict.fromkeys(thing.name for thing in record.objects))
    random.shuffle(names)
    styles = {thing.style for thing in record.objects}
    scene = record.scene if random.random() < 0.5 else None
    style = styles.pop() if len(styles) == 1 and random.random() < 0.5 else None
    captions = [listed(names, scene, style)]
    for _ in range(n):
        kind = random.random()
        if scene and kind < 1 / 6:
            captions.append(listed(names, random.choice([other for other in SCENES if other != scene]), style))
        elif style and kind > 1 / 2:
            captions.append(listed(names, scene, random.choice([other for other in world.STYLES if other != style])))
        else:
            place = random.randrange(len(names))
            other = random.choice([name for name in NAMES if name not in names])
            captions.append(listed([*names[:place], other, *names[place + 1 :]], scene, style))
    return captions


def patch_labels(records: Sequence[world.Record], patch: int) -> Tensor:
    """What each patch shows, (n, patches): a class index, or the number of classes for scenery, by largest share."""
    side = world.RESOLUTION // patch
    labels = np.full((len(records), side, side), len(NAMES))
    for row, record in enumerate(records):
        best = np.full((side, side), 0.25)  # an object must cover a quarter of a patch
        for thing in record.objects:
            share = thing.mask.reshape(side, patch, side, patch).mean((1, 3))
            labels[row][share > best] = NAMES.index(thing.name)
            best = np.maximum(best, share)
    return torch.from_numpy(labels.reshape(len(records), -1))


def roughen(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and brightness, different for each picture: a judge of generated pictures must bear with them."""
    n, device = len(pixels), pixels.device

    def draw(high: float) -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator, device=device) * high

    kernel = torch.tensor([1.0, 2.0, 1.0], device=device) / 4
    soft = F.conv2d(F.pad(pixels, (1,) * 4, "replicate"), (kernel[:, None] * kernel).expand(3, 1, 3, 3), groups=3)
    noise = torch.randn(pixels.shape, generator=generator, device=device)
    return torch.lerp(pixels, soft, draw(1.2)) * (0.9 + draw(0.2)) + noise * draw(0.06)


def scores(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosines, (n, m)."""
    return scale * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T


@flushing_denormals()
def train_judge(
    runs: Path, tokenizer: CLIPTokenizer, recipe: Recipe = JUDGE, *, device: torch.device | None = None
) -> Log:
    """Train the judge into runs/judge; the CLIPModel and its processor are saved as runs/judge/model."""
    device = device or best_device()
    folder = runs / "judge"
    model, processor = build_judge(tokenizer, seed=recipe.seed)
    model.set_attn_implementation("eager")  # the CPU kernel behind the default one is slow backwards
    heads = nn.ModuleDict({"patch_head": nn.Linear(VISION_CONFIG["hidden_size"], len(NAMES) + 1)})
    model.to(device)
    heads.to(device)
    size, patch = recipe.batch_size, VISION_CONFIG["patch_size"]
    prompts = {
        scene: tokenizer([listed([name], scene) for name in NAMES], padding=True, return_tensors="pt").input_ids
        for scene in (*SCENES, None)
    }

    def tokens(texts: Sequence[str]) -> Tensor:
        return tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").input_ids.to(device)

    def text_features(ids: Tensor) -> Tensor:
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    with Feed(16 * size, seed=recipe.seed + 901, styles=world.STYLES) as feed:

        def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
            pictures, part = feed.batch(step, size)
            records, random = pictures.records[part], Random(recipe.seed * 1_000_003 + step)
            x = torch.from_numpy(pictures.images[part]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            x = roughen(x, generator)
            sets = [contrast(record, random) for record in records]
            captions = [record.caption for record in records]
            shown = torch.zeros(size, len(NAMES), device=device)
            for row, record in enumerate(records):
                shown[row, [NAMES.index(thing.name) for thing in record.objects]] = 1.0
            place = torch.tensor([SCENES.index(record.scene) for record in records], device=device)
            scene, name = random.choice((*SCENES, None)), random.choice(NAMES)
            with mixed_precision(device):
                seen = model.vision_model(pixel_values=x)
                images = model.visual_projection(seen.pooler_output)
                patches = heads["patch_head"](seen.last_hidden_state[:, 1:])
                natural = text_features(tokens(captions))
                plain = text_features(tokens([text for one in sets for text in one]))
                classes = text_features(prompts[scene].to(device))
                scenes = text_features(tokens([listed([name], other) for other in SCENES]))
            scale = model.logit_scale.clamp(max=4.6052).exp()
            same = torch.tensor([[a == b for b in captions] for a in captions], device=device).float()
            logits = scores(images, natural, scale)
            clip = 0.5 * (soft_entropy(logits, same) + soft_entropy(logits.T, same))
            own = plain.view(size, -1, plain.shape[-1])
            cosines = F.normalize(own.float(), dim=-1) @ F.normalize(images.float(), dim=-1)[:, :, None]
            hard = F.cross_entropy(scale * cosines[..., 0], torch.zeros(size, dtype=torch.long, device=device))
            by_class = soft_entropy(scores(images, classes, scale), shown)
            by_scene = F.cross_entropy(scores(images, scenes, scale), place)
            by_patch = F.cross_entropy(patches.float().flatten(0, 1), patch_labels(records, patch).flatten().to(device))
            alone = shown.sum(1) == 1
            right = (scores(images, classes, scale).argmax(1) == shown.argmax(1))[alone].float().mean()
            total = clip + hard + by_class + 0.5 * by_scene + by_patch
            return {
                "loss": total, "clip": clip, "hard": hard, "class": by_class, "scene": by_scene, "patch": by_patch,
                "right": right.nan_to_num(1.0),
            }  # fmt: skip

        log = fit(folder, modules={"judge": model, "heads": heads}, loss=loss, recipe=recipe, checkpoint_every=240)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder / "model", safe_serialization=True)
    processor.save_pretrained(folder / "model")
    return log


def soft_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy against several equally right answers: shares (n, m) of 0 and 1."""
    wanted = shares / shares.sum(1, keepdim=True)
    return -(wanted * logits.log_softmax(1)).sum(1).mean()

"""Train the judge: a small CLIP on all art styles, with the world's ground truth for hard negatives.

Pictures and captions are contrasted as in CLIP (Radford et al. 2021, Fig. 3). Since every picture's ground truth is
known, each one also comes with captions that are wrong in exactly one thing, and is classified among prompts for all
classes. During training, heads also predict what each patch shows, and the drawing, style and hue of a single object;
they are not saved. The judge sees what the diffusion model must not: the held-out art set and drawings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

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

from .. import world
from ..diffusion.encoding import to_tensor
from ..diffusion.pipelines import usable_device
from ..diffusion.precision import flushing_denormals, mixed_precision
from ..files import replacing_folder, seal_folder, user_path
from ..world import Described, plain_caption
from .autoencoder import place_labels
from .loop import Feed, Log, fit
from .recipe import Recipe

NAMES = tuple(world.CLASSES)
SCENES = tuple(world.SCENES)
HELD_OUT_PICTURES = 1024


def build_judge(
    tokenizer: CLIPTokenizer, settings: dict[str, Any], *, seed: int = 0
) -> tuple[CLIPModel, CLIPProcessor]:
    """An untrained CLIPModel and its processor (pictures are resized to the model's own resolution).

    settings: the recipe's `judge`.
    """
    torch.manual_seed(seed)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    width = settings["loss"]["projection"]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        **special,
        **settings["text"],
    )
    vision = CLIPVisionConfig(projection_dim=width, **settings["vision"])
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width, **special)
    side = settings["vision"]["image_size"]
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPModel(config), CLIPProcessor(pictures, tokenizer)


_CHOICES: dict[str, Sequence[str]] = {
    "style": world.STYLES,
    "marking": world.MARKINGS,
    "colour": world.COLOURS,
    "hat": world.HATS,
}


def contrast(record: world.Record, random: Random, n: int) -> list[str]:
    """A correct caption of a picture, then `n` that are wrong in one thing: a class, scene, style, colour, ..."""
    things = list(record.objects)
    random.shuffle(things)
    told = {name for name in _CHOICES if random.random() < 0.5}
    objects = [
        Described(thing.name, **{name: getattr(thing, name) for name in told if getattr(thing, name)})
        for thing in things
    ]
    scene = record.scene if random.random() < 0.5 else None
    kinds = [(name, at) for name in told for at, one in enumerate(objects) if getattr(one, name)]
    captions = [plain_caption(objects, scene)]
    for _ in range(n):
        kind = random.random()
        if scene and kind < 1 / 6:
            captions.append(plain_caption(objects, random.choice([other for other in SCENES if other != scene])))
            continue
        if kinds and kind > 1 / 2:
            name, at = random.choice(kinds)
            other = random.choice([value for value in _CHOICES[name] if value != getattr(objects[at], name)])
        else:
            name, at = "name", random.randrange(len(objects))
            other = random.choice([value for value in NAMES if value not in {one.name for one in objects}])
        captions.append(
            plain_caption([*objects[:at], replace(objects[at], **{name: other}), *objects[at + 1 :]], scene)
        )
    return captions


class SingleHead(nn.Module):
    """Predicts the drawing, style and hue of a single object from a picture's embedding; for training only."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, len(world.DRAWINGS) + len(world.STYLES) + 2)

    def loss(self, features: Tensor, records: Sequence[world.Record]) -> Tensor:
        """Cross-entropies plus the squared error of the hue's (cos, sin), averaged over pictures of one object."""
        rows = [row for row, record in enumerate(records) if len(record.objects) == 1]
        if not rows:
            return features.new_zeros(())
        alone = [records[row].objects[0] for row in rows]
        device = features.device
        unit = F.normalize(features[rows].float(), dim=-1) * features.shape[-1] ** 0.5
        drawing, style, hue = self.head(unit).float().split([len(world.DRAWINGS), len(world.STYLES), 2], dim=1)
        by_drawing = torch.tensor([world.DRAWINGS.index(one.drawing) for one in alone], device=device)
        by_style = torch.tensor([world.STYLES.index(one.style) for one in alone], device=device)
        angle = torch.tensor([math.radians(one.hue) for one in alone], device=device)
        own = torch.tensor([one.colour is None for one in alone], device=device).float()
        wrong = (hue - torch.stack([angle.cos(), angle.sin()], 1)).square().sum(1)
        return F.cross_entropy(drawing, by_drawing) + F.cross_entropy(style, by_style) + (own * wrong).mean()


def roughen(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and brightness, different for each picture: a judge of generated pictures must be robust to them."""
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
    runs: Path,
    tokenizer: CLIPTokenizer,
    settings: dict[str, Any],
    recipe: Recipe,
    *,
    device: torch.device | None = None,
) -> Log:
    """Train the judge into runs/judge; the CLIPModel and its processor are saved as runs/judge/model.

    settings: the recipe's `judge`.
    """
    device, runs = usable_device(device), user_path(runs)
    folder, vision, wrong = runs / "judge", settings["vision"], settings["loss"]["wrong_captions"]
    model, processor = build_judge(tokenizer, settings, seed=recipe.seed)
    model.set_attn_implementation("eager")  # the default's CPU kernel has a slow backward pass
    patch_head = nn.Linear(vision["hidden_size"], len(world.DRAWINGS) + 1)
    single_head = SingleHead(settings["loss"]["projection"])
    for module in (model, patch_head, single_head):
        module.to(device)
    size, places = recipe.part_size, world.RESOLUTION // vision["patch_size"]
    prompts = {
        scene: tokenizer(
            [plain_caption([Described(name)], scene) for name in NAMES], padding=True, return_tensors="pt"
        ).input_ids.to(device)
        for scene in (*SCENES, None)
    }

    def text_features(ids: Tensor) -> Tensor:
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    def told(texts: Sequence[str]) -> Tensor:
        return text_features(
            tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").input_ids.to(device)
        )

    def loss(step: int, part: int, generator: torch.Generator) -> dict[str, Tensor]:
        pictures, own = feed.batch(step, part, recipe)
        records, random = pictures.records[own], Random(f"{recipe.seed} {step} {part}")
        x = roughen(to_tensor(pictures.images[own], device), generator)
        sets = [contrast(record, random, wrong) for record in records]
        captions = [record.caption for record in records]
        shown = torch.zeros(size, len(NAMES), device=device)
        for row, record in enumerate(records):
            shown[row, [NAMES.index(thing.name) for thing in record.objects]] = 1.0
        place = torch.tensor([SCENES.index(record.scene) for record in records], device=device)
        scene, name = random.choice((*SCENES, None)), random.choice(NAMES)
        with mixed_precision(device):
            seen = model.vision_model(pixel_values=x)
            images = model.visual_projection(seen.pooler_output)
            patches = patch_head(seen.last_hidden_state[:, 1:])
            texts = told([*captions, *(text for one in sets for text in one)])
            classes = text_features(prompts[scene])
            scenes = told([plain_caption([Described(name)], other) for other in SCENES])
            single = single_head.loss(images, records)
        natural, plain = texts[:size], texts[size:]
        scale = model.logit_scale.clamp(max=4.6052).exp()
        same = torch.tensor([[a == b for b in captions] for a in captions], device=device).float()
        logits = scores(images, natural, scale)
        clip = 0.5 * (soft_entropy(logits, same) + soft_entropy(logits.T, same))
        one_each = plain.view(size, -1, plain.shape[-1])
        cosines = F.normalize(one_each.float(), dim=-1) @ F.normalize(images.float(), dim=-1)[:, :, None]
        hard = F.cross_entropy(scale * cosines[..., 0], torch.zeros(size, dtype=torch.long, device=device))
        by_class = soft_entropy(scores(images, classes, scale), shown)
        by_scene = F.cross_entropy(scores(images, scenes, scale), place)
        shown_at, _ = place_labels(records, places)
        by_patch = F.cross_entropy(patches.float().flatten(0, 1), shown_at.flatten().long().to(device))
        alone = shown.sum(1) == 1
        right = (scores(images, classes, scale).argmax(1) == shown.argmax(1))[alone].float().mean()
        total = clip + 2 * hard + by_class + 0.5 * by_scene + by_patch + 0.5 * single
        return {
            "loss": total,
            "clip": clip,
            "hard": hard,
            "class": by_class,
            "scene": by_scene,
            "patch": by_patch,
            "single": single,
            "right": right.nan_to_num(1.0),
        }

    kept = world.sample(
        HELD_OUT_PICTURES, seed=recipe.seed + 77, styles=world.STYLES, everything=True, objects=(1, 0, 0, 0)
    )
    names = torch.tensor([NAMES.index(record.objects[0].name) for record in kept.records])

    @torch.no_grad()
    def measure(step: int) -> dict[str, float]:
        """The share of single objects, not roughened, whose nearest class is right."""
        with mixed_precision(device):
            pixels = to_tensor(kept.images, device)
            pooled = torch.cat([model.vision_model(pixel_values=part).pooler_output for part in pixels.split(64)])
            images = model.visual_projection(pooled)
            found = scores(images, text_features(prompts[None]), model.logit_scale.exp()).argmax(1).cpu()
        return {"right": float((found == names).float().mean())}

    with Feed(16 * recipe.batch_size, seed=recipe.seed + 901, styles=world.STYLES, everything=True) as feed:
        modules = {"judge": model, "patch_head": patch_head, "single_head": single_head}
        log = fit(
            folder,
            modules=modules,
            loss=loss,
            recipe=recipe,
            identity={name: part for name, part in settings.items() if name != "training"},
            measure=measure,
            checkpoint_every=240,
        )
    model.set_attn_implementation("sdpa")
    with replacing_folder(folder / "model", "config.json") as unfinished:
        model.save_pretrained(unfinished, safe_serialization=True)
        processor.save_pretrained(unfinished)
        seal_folder(unfinished)
    return log


def soft_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy against several equally correct answers: shares (n, m) of 0 and 1."""
    wanted = shares / shares.sum(1, keepdim=True)
    return -(wanted * logits.log_softmax(1)).sum(1).mean()

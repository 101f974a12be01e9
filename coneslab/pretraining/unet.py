"""The U-Net and its text encoder: the tokenizer, labelled latents, and the training."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .. import world
from ..diffusion.checks import require_pipeline
from ..diffusion.encoding import tokenize
from ..diffusion.loss import add_noise, snr, stratified_timesteps, target
from ..diffusion.pipelines import Pipeline, usable_device
from ..diffusion.precision import flushing_denormals, mixed_precision
from ..diffusion.sampling import generate
from ..errors import ConeslabError, FileFormatError
from ..files import replacing_folder, seal_folder, user_path
from ..finetuning.checkpoints import load_checkpoint, save_checkpoint
from .autoencoder import HELD_OUT_PICTURES, NOTHING, encode, load_autoencoder, place_labels, save_grid
from .captured import Captured, Stream
from .loop import Log, batches, fit
from .recipe import Recipe

CHUNK = 4096  # pictures per file of latents
LEVELS = (20, 120, 280, 440, 600, 760, 900, 999)  # timesteps at which the held-out loss is measured


def build_tokenizer(words: Sequence[str] = world.WORDS, *, length: int = 32) -> CLIPTokenizer:
    """A stock CLIPTokenizer whose byte-pair merges make every one of `words` a single token.

    Trained to convergence (Sennrich et al. 2016, Algorithm 1): the most frequent pair of neighbouring symbols is
    merged until every word is whole. All bytes are in the vocabulary, so any other text encodes too, in more tokens.
    CLIP splits text between letters and digits before it merges, so words such as "3d" are added tokens.
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
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
        **settings,
    )


def build_pipeline(vae: AutoencoderKL, settings: dict[str, Any], *, seed: int = 0) -> Pipeline:
    """The untrained pipeline around an autoencoder: tokenizer, text encoder, U-Net and scheduler.

    settings: the recipe's `unet`.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(text_config(tokenizer, **settings["text"]))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**settings["config"]),
        scheduler=DDIMScheduler(**settings["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@dataclass(frozen=True)
class Drawn:
    """Pictures as another process hands them on: uint8 (n, h, w, 3), labels of their places, and token ids."""

    images: np.ndarray
    drawings: np.ndarray
    styles: np.ndarray
    ids: np.ndarray


def draw_pictures(n: int, seed: int, *, objects: Sequence[float]) -> Drawn:
    """Fresh pictures with labels and token ids, drawn in a process of its own."""
    pictures = world.sample(n, seed=seed, objects=objects)
    drawings, styles = place_labels(pictures.records)
    tokenizer = _tokenizer()
    length = tokenizer.model_max_length
    ids = tokenizer(pictures.captions, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return Drawn(pictures.images, drawings.numpy(), styles.numpy(), ids.input_ids.astype(np.int16))


@cache
def _tokenizer() -> CLIPTokenizer:
    torch.set_num_threads(1)
    return build_tokenizer()


@torch.no_grad()
def encoded(vae: AutoencoderKL, drawn: Drawn) -> dict[str, Tensor]:
    """Latents (n, 4, 16, 16), labels and token ids of drawn pictures, on the autoencoder's device."""
    latents = encode(vae, drawn.images, vae.device, batch_size=1024) * vae.config.scaling_factor
    rest = {name: torch.from_numpy(getattr(drawn, name)).to(vae.device) for name in ("drawings", "styles", "ids")}
    return {"latents": latents, **rest}


def encode_pictures(
    vae: AutoencoderKL, n: int, *, seed: int, objects: Sequence[float]
) -> tuple[dict[str, Tensor], list[str]]:
    """Latents (n, 4, 16, 16) float16 of fresh pictures with their labels ("drawings", "styles"), and captions."""
    pictures = world.sample(n, seed=seed, objects=objects)
    drawings, styles = place_labels(pictures.records)
    latents = (encode(vae, pictures.images, vae.device) * vae.config.scaling_factor).cpu().half()
    return {"latents": latents, "drawings": drawings, "styles": styles}, pictures.captions


@cache
def _autoencoder(folder: Path) -> AutoencoderKL:
    return load_autoencoder(folder).requires_grad_(False)


def _keep_chunk(path: Path, folder: Path, n: int, seed: int, objects: Sequence[float]) -> None:
    """Encode one chunk and save it (in another process, during training)."""
    if not path.is_file():
        tensors, captions = encode_pictures(_autoencoder(folder), n, seed=seed, objects=objects)
        save_checkpoint(path, tensors, {"captions": captions, "chunk": path.name})


class Latents:
    """The latents that the U-Net learns from: pictures encoded once, ahead of training, and kept in runs/latents.

    Every pass goes through all chunks in a different order. What a step sees depends only on its number and the seed.
    """

    def __init__(
        self,
        runs: Path,
        recipe: Recipe,
        tokens_of: Callable[[list[str]], Tensor],
        *,
        distinct: int,
        objects: Sequence[float],
        ahead: int = 2,
    ):
        self.folder, self.model, self.recipe = runs / "latents", runs / "vae" / "model", recipe
        self.tokens_of, self.objects, self.ahead, self.chunks = (
            tokens_of,
            tuple(objects),
            ahead,
            max(1, distinct // CHUNK),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        self._jobs: dict[int, Future[None]] = {}
        self._current: tuple[int, dict[str, Tensor]] | None = None
        self._lock = threading.Lock()

    def _chunk_number(self, turn: int) -> int:
        """Which chunk comes in a turn: in order at first, shuffled in each later pass."""
        again, place = divmod(turn, self.chunks)
        if not again:
            return place
        order = torch.randperm(self.chunks, generator=torch.Generator().manual_seed(self.recipe.seed + again))
        return int(order[place])

    def _ask(self, number: int) -> None:
        if number not in self._jobs:
            path, seed = self.folder / f"{number:05d}.safetensors", 1_000_003 * (self.recipe.seed + 501) + number
            self._jobs[number] = self._pool.submit(_keep_chunk, path, self.model, CHUNK, seed, self.objects)

    def _turn(self, turn: int) -> dict[str, Tensor]:
        if self._current is None or self._current[0] != turn:
            for later in range(turn, turn + self.ahead + 1):
                self._ask(self._chunk_number(later))
            number = self._chunk_number(turn)
            self._jobs[number].result()
            path = self.folder / f"{number:05d}.safetensors"
            tensors, facts = load_checkpoint(path)
            if facts.get("chunk", path.name) != path.name or len(facts.get("captions", ())) != CHUNK:
                raise FileFormatError(f"{path} holds other pictures than it should: delete it, and it is made again")
            generator = torch.Generator().manual_seed(self.recipe.seed * 7919 + turn)
            order = torch.randperm(CHUNK, generator=generator)
            tensors["ids"] = self.tokens_of(facts["captions"])
            self._current = turn, {name: tensor[order] for name, tensor in tensors.items()}
        return self._current[1]

    def batch(self, step: int, part: int) -> dict[str, Tensor]:
        """What a part of a step learns from: "latents", "ids" (token ids of captions), "drawings", "styles"."""
        turn, own = self.recipe.place(step, part, CHUNK)
        with self._lock:
            return {name: tensor[own] for name, tensor in self._turn(turn).items()}

    def __enter__(self) -> Latents:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def level_weights(ratio: Tensor, gamma: float = 5.0) -> Tensor:
    """Weights of v-prediction losses by signal-to-noise ratio: min(1, (gamma + 1) / (ratio + 1)).

    Min-SNR (Hang et al. 2023, Sec. 3.4) for v is min(ratio, gamma) / (ratio + 1). It agrees at ratio >= gamma, but
    vanishes at the last timestep, where a zero-terminal-SNR schedule learns all that the caption alone decides.
    """
    return ((gamma + 1.0) / (ratio + 1.0)).clamp(max=1.0)


PREVIEW_PROMPTS = (
    "a cat on the grass",
    "a car in the city",
    "a red rocket in space",
    "a penguin in the snow",
    "a fish under the sea",
    "a pizza on the beach",
    "a flat dog in the forest",
    "a doctor in a room",
    "a dog and a ball on the grass",
    "a lion and a crown at night",
    "a blue guitar and a red car in a room",
    "a robot and an apple in the forest",
    "a rose, a whale and a drum in space",
    "a bold tree, a bold house and a bold bus on the beach",
    "a cat, a dog, a car and a pizza on a white background",
    "a clock, a fox, a book and a cake in the desert",
)


def nearest_noise(latents: Tensor, noise: Tensor, *, groups: int = 1) -> Tensor:
    """Assign the noise to the latents, both (n, ...), so that the sum of their distances is smallest in each group.

    Immiscible diffusion (Li et al. 2024, Alg. 1): every noise is still used once, but paths cross less.
    """
    places = torch.arange(len(latents)).view(groups, -1)
    own, other = (tensor.flatten(1).float().view(*places.shape, -1) for tensor in (latents, noise))
    distances = torch.cdist(own, other).cpu().numpy()
    order = [group[linear_sum_assignment(distance)[1]] for group, distance in zip(places, distances, strict=True)]
    return noise[torch.cat(order).to(noise.device)]


class _Seen:
    features: Tensor | None = None


class PlaceHead(nn.Module):
    """Predicts what is drawn at each place from the U-Net's intermediate features; for training only.

    Representation alignment (Yu et al. 2024, REPA) pulls a denoiser's features towards those of another encoder; here
    the ground truth of every place is known, so the features have to predict it directly. Not exported.
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        channels = unet.config.block_out_channels[1]
        self.head = nn.Conv2d(channels, NOTHING + 1 + len(world.STYLES) + 1, 1)
        # parts of a step run in parallel on a CPU; torch.compile, used on a GPU, knows no threads
        self._seen: Any = _Seen() if unet.device.type == "cuda" else threading.local()
        unet.up_blocks[-2].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._seen.features = output

    def loss(self, drawings: Tensor, styles: Tensor) -> Tensor:
        """Cross-entropy of drawing and style at each place, (n,), for the U-Net's latest pass in this thread."""
        answers = self.head(self._seen.features).float()
        by_drawing, by_style = answers.split([NOTHING + 1, len(world.STYLES) + 1], dim=1)
        total = F.cross_entropy(by_drawing, drawings.long(), reduction="none")
        return (total + F.cross_entropy(by_style, styles.long(), reduction="none")).mean((1, 2))


@torch.no_grad()
def held_out_losses(pipe: Pipeline, latents: Tensor, ids: Tensor) -> dict[str, float]:
    """Held-out loss: mean squared error of the prediction, by timestep, always with the same noise.

    "loss_280" is the loss at timestep 280; "loss" is the mean of all.
    """
    require_pipeline(pipe)
    device = pipe.unet.device
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    errors: dict[int, list[Tensor]] = {level: [] for level in LEVELS}
    for part in batches(len(latents), 64):
        x, e = latents[part].to(device).float(), noise[part]
        with mixed_precision(device):
            text = pipe.text_encoder(ids[part].to(device))[0]
        for level in LEVELS:
            times = torch.full((len(x),), level, device=device)
            with mixed_precision(device):
                guess = pipe.unet(add_noise(pipe.scheduler, x, e, times), times, encoder_hidden_states=text).sample
            errors[level].append((guess.float() - target(pipe.scheduler, x, e, times)).square().flatten(1).mean(1))
    found = {f"loss_{level}": float(torch.cat(own).mean()) for level, own in errors.items()}
    return {"loss": sum(found.values()) / len(found), **found}


@flushing_denormals()
def train_unet(runs: Path, settings: dict[str, Any], recipe: Recipe, *, device: torch.device | None = None) -> Log:
    """Train the U-Net and its text encoder together on latents of runs/vae; save the pipeline as runs/unet/model.

    settings: the recipe's `unet`.
    """
    device, runs = usable_device(device), user_path(runs)
    folder, options = runs / "unet", settings["loss"]
    vae = load_autoencoder(runs / "vae" / "model").to(device).requires_grad_(False)
    pipe = build_pipeline(vae, settings, seed=recipe.seed)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if device.type == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())  # the default's CPU kernel has a slow backward pass
        pipe.text_encoder.set_attn_implementation("eager")
    head = PlaceHead(pipe.unet).to(device)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)
    empty, total = tokenize(pipe, "").to(device), pipe.scheduler.config.num_train_timesteps
    kept, captions = encode_pictures(vae, HELD_OUT_PICTURES, seed=7, objects=options["crowded"])
    held_out = kept["latents"], tokenize(pipe, captions).cpu()
    denoise: Any = pipe.unet

    def inputs(own: Mapping[str, Tensor], generator: torch.Generator, groups: int = 1) -> dict[str, Tensor]:
        """What a part of a step learns from, with noises, timesteps and dropped captions; the latter in `groups`."""
        x, n = own["latents"].to(device).float(), len(own["latents"])
        dropped = torch.rand(n, 1, generator=generator, device=device) < options["caption_dropout"]
        noise = torch.randn(x.shape, generator=generator, device=device)
        if options["immiscible"]:
            noise = nearest_noise(x, noise, groups=groups)
        return {
            "x": x,
            "noise": noise,
            "tokens": torch.where(dropped, empty, own["ids"].to(device).long()),
            "times": torch.cat([stratified_timesteps(n // groups, total, generator) for _ in range(groups)]),
            "drawings": own["drawings"].to(device),
            "styles": own["styles"].to(device),
        }

    def objective(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x, noise, times, drawings = (part[name] for name in ("x", "noise", "times", "drawings"))
        places = 1 + (options["object_weight"] - 1) * (drawings != NOTHING).float()[:, None]
        with mixed_precision(device):
            text = pipe.text_encoder(part["tokens"])[0]
            guess = denoise(
                add_noise(pipe.scheduler, x, noise, times), times, encoder_hidden_states=text, return_dict=False
            )[0]
            truth = head.loss(drawings, part["styles"])
        error = (guess.float() - target(pipe.scheduler, x, noise, times)).square()
        plain = error.flatten(1).mean(1)
        weighted = (error * (places / places.mean())).flatten(1).mean(1)
        main = (weighted * level_weights(snr(pipe, times), options["gamma"])).mean()
        return {"loss": main + options["truth_weight"] * truth.mean(), "plain": plain.mean(), "truth": truth.mean()}

    def preview(step: int) -> None:
        with mixed_precision(device):
            made = [np.asarray(image) for image in generate(pipe, PREVIEW_PROMPTS, seed=3, sampler_steps=12)]
        save_grid(folder / f"{step:06d}.png", [np.stack(made[:8]), np.stack(made[8:])])

    run: dict[str, Any] = {
        "modules": {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "head": head},
        "recipe": recipe,
        "preview": preview,
        "measure": lambda step: held_out_losses(pipe, *held_out),
        "facts": {"settings": settings},
        "identity": {name: part for name, part in settings.items() if name != "training"},
    }
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        denoise = torch.compile(pipe.unet)

        def ready(drawn: Drawn, index: int) -> dict[str, Tensor]:
            generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + index)
            return inputs(encoded(vae, drawn), generator, groups=CHUNK // recipe.part_size)

        draw = partial(draw_pictures, objects=tuple(options["crowded"]))
        with Stream(draw, ready, size=CHUNK, seed=1_000_003 * (recipe.seed + 501), recipe=recipe) as stream:
            often: dict[str, Any] = {"measure_every": 1_000_000, "log_every": 100, "checkpoint_every": 600}
            log = fit(folder, loss=Captured(stream.batch, objective), **run, **often)
    else:

        def tokens_of(captions: list[str]) -> Tensor:
            return torch.cat([tokenize(pipe, captions[part]).cpu() for part in batches(len(captions), 1024)])

        with Latents(runs, recipe, tokens_of, distinct=options["distinct"], objects=options["crowded"]) as latents:

            def loss(step: int, part: int, generator: torch.Generator) -> dict[str, Tensor]:
                return objective(inputs(latents.batch(step, part), generator))

            log = fit(folder, loss=loss, **run, checkpoint_every=600)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.cpu()
    with replacing_folder(folder / "model", "model_index.json") as unfinished:
        pipe.save_pretrained(unfinished, safe_serialization=True)
        seal_folder(unfinished)
    return log

"""Tiny random Stable Diffusion pipelines, built in memory: nothing is downloaded, nothing is trained.

They are made once and shared: a test that leaves one changed fails.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch comes; more fight for the cores, with each other and all else

import numpy as np
import pytest
import torch
from chromium import launched
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from last_lines import pytest_unconfigure  # noqa: F401
from PIL import Image
from small_judge import save_small_judge
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from coneslab import load
from coneslab.diffusion.memory import keep_memory
from coneslab.measure.judge import Judge, load_judge

keep_memory()
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


# --- what tests share -----------------------------------------------------------------------------------

SHARED: dict[str, Shared] = {}  # what was handed out, by the name of its fixture


class Shared:
    """A pipeline, or a judge, that many tests use: as it was when it was made, so that no test can change it."""

    def __init__(self, what: Any, parts: Mapping[str, torch.nn.Module]) -> None:
        self.what, self.parts = what, dict(parts)
        self.kept = {name: {key: one.clone() for key, one in part.state_dict().items()} for name, part in parts.items()}
        self.wanted = [weight.requires_grad for part in self.parts.values() for weight in part.parameters()]
        self.tokenizer = getattr(what, "tokenizer", None)
        self.words = len(self.tokenizer) if self.tokenizer is not None else 0

    def changes(self) -> list[str]:
        """What is no longer as it was, in words."""
        found = []
        for name, part in self.parts.items():
            now = part.state_dict()
            if getattr(self.what, name) is not part:
                found.append(f"{name} is another one")
            if now.keys() != self.kept[name].keys():
                found.append(f"{name} has other weights")
            else:
                found += [f"{name}.{key}" for key, one in self.kept[name].items() if not torch.equal(one, now[key])]
            if any(module._forward_hooks or module._forward_pre_hooks for module in part.modules()):
                found.append(f"{name} has hooks")
            if part.training:
                found.append(f"{name} is set to train")
        weights = [weight for part in self.parts.values() for weight in part.parameters()]
        if any(weight.grad is not None for weight in weights):
            found.append("gradients are left")
        if [weight.requires_grad for weight in weights] != self.wanted:
            found.append("other weights ask for gradients")
        if getattr(self.what, "tokenizer", None) is not self.tokenizer:
            found.append("the tokenizer is another one")
        elif self.tokenizer is not None and len(self.tokenizer) != self.words:
            found.append("the tokenizer has other words")
        return found

    def restore(self) -> None:
        """Put the weights back, for the tests that come after."""
        for name, part in self.parts.items():
            if part.state_dict().keys() == self.kept[name].keys():
                part.load_state_dict(self.kept[name])
            for weight in part.parameters():
                weight.grad = None


def share(name: str, what: Any, *parts: str) -> Any:
    """Hand out something that costs time to make; every test that is given it is held to leave it as it was."""
    SHARED[name] = Shared(what, {part: getattr(what, part) for part in parts})
    return what


@pytest.fixture(autouse=True)
def shared_stays_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Weights bit for bit, no gradients, no hooks, the tokenizer and its words."""
    yield
    for name in SHARED.keys() & {*request.fixturenames}:
        if changes := SHARED[name].changes():
            SHARED[name].restore()
            pytest.fail(f"the test leaves {name}, which others use, changed: {', '.join(changes[:5])}", pytrace=False)


PIPELINE = ("unet", "text_encoder", "vae")


@pytest.fixture(scope="session")
def v_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """v-prediction, attention at two resolutions, 12 tokens."""
    return share("v_pipe", make_pipeline(tmp_path_factory.mktemp("v")), *PIPELINE)


@pytest.fixture
def own_pipe(v_pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy of `v_pipe` that a test may change."""
    return copy.deepcopy(v_pipe)


@pytest.fixture(scope="session")
def epsilon_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """ε-prediction, one block without attention, other widths."""
    made = make_pipeline(
        tmp_path_factory.mktemp("epsilon"),
        prediction_type="epsilon",
        widths=(8, 16),
        text_width=16,
        tokens=10,
        down_blocks=(DOWN, "DownBlock2D"),
        seed=1,
    )
    return share("epsilon_pipe", made, *PIPELINE)


@pytest.fixture(scope="session")
def sd_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """Blocks, depth, tokens and prediction type of Stable Diffusion 1.5, with small widths."""
    made = make_pipeline(
        tmp_path_factory.mktemp("sd"),
        prediction_type="epsilon",
        widths=(8, 16, 16, 16),
        text_width=12,
        tokens=77,
        heads=2,
        layers_per_block=2,
        down_blocks=(DOWN, DOWN, DOWN, "DownBlock2D"),
        sample_size=16,
        seed=2,
    )
    return share("sd_pipe", made, *PIPELINE)


@pytest.fixture(scope="session")
def world_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """Pictures of the sticker world's size and room for its prompts; everything else as small as it gets."""
    words = (*WORDS, "flat", "3d", "cartoon", "ladybug", "butterfly")
    made = make_pipeline(
        tmp_path_factory.mktemp("world"),
        widths=(8, 16),
        sample_size=32,
        tokens=64,
        words=words,
        seed=3,
        down_blocks=("DownBlock2D", DOWN),
    )
    return share("world_pipe", made, *PIPELINE)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """Random, and of another size than the test's pictures."""
    return share("judge", load_judge(save_small_judge(tmp_path_factory.mktemp("judge"))), "model")


@pytest.fixture(scope="session")
def tiny() -> StableDiffusionPipeline:
    """The shipped model."""
    return share("tiny", load("tiny", device="cpu"), *PIPELINE)


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


@pytest.fixture
def pictured() -> SimpleNamespace:
    """A subject for the 16-pixel pipelines."""
    return make_subject(16)


def weights_of(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """A copy of every weight of the U-Net and the text encoder."""
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    root = Path(__file__).resolve().parent.parent
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, root], check=True)
    (built,) = folder.glob("coneslab-*.whl")
    return built


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For one module only: Playwright's loop must be gone when other tests run theirs."""
    with launched() as opened:
        yield opened

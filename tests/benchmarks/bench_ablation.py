"""How much faster a step of `ablate` is than the released trainer's (model-based loss, keys and values).

    python tests/benchmarks/bench_ablation.py [--trainer FOLDER] [--model tiny|FOLDER] [--batch 8] [--steps 10]
        [--repeats 3] [--threads 2]

FOLDER is `diffusers` in a checkout of https://github.com/nupurkmr9/concept-ablation; none of it is kept here. Its
trainer is first started unchanged, to print how it fails with current libraries. What is measured is its loop,
re-created here from its code: every step encodes pictures and captions again, asks the U-Net in training for the
anchor's prediction, runs the U-Net as it is loaded, and clips gradients; file loading, which its workers do in
parallel, is left out. Ours, with the same pictures, captions, samples and losses, asks an untouched copy ("frozen"), or
the U-Net in training as theirs does ("current").
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from side_by_side import Seconds, in_turn, spent, steps_of
from torch.nn.functional import mse_loss

sys.path[:0] = [str(Path(__file__).parents[2])]

import coneslab  # noqa: E402
from coneslab.diffusion.encoding import encode_images, encode_prompts  # noqa: E402
from coneslab.diffusion.loss import add_noise, target  # noqa: E402
from coneslab.diffusion.sampling import generate  # noqa: E402
from coneslab.methods.ablation.concept_ablation import ablate  # noqa: E402

TARGET, ANCHOR = "a cat", "a dog"


def started(folder: Path | None) -> str:
    """What the released trainer says when it is started."""
    if folder is None:
        return "--trainer was not given; its loop is re-created from its code"
    asked = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    words = [line for line in asked.stderr.splitlines() if line.strip()]
    how = "starts" if asked.returncode == 0 else f"does not start: {words[-1] if words else asked.returncode}"
    return f"train.py {how} (diffusers {diffusers.__version__}, transformers {transformers.__version__})"


class Released:
    """The released trainer's step: a copy of the U-Net learns, pictures and captions are encoded at every step."""

    def __init__(self, pipe: Any, pictures: list, batch: int, dtype: torch.dtype) -> None:
        self.pipe, self.pictures, self.batch, self.dtype = pipe, pictures, batch, dtype
        self.unet = copy.deepcopy(pipe.unet).requires_grad_(False).train()
        names = ("attn2.to_k", "attn2.to_v")
        self.weights = [weight for name, weight in self.unet.named_parameters() if any(part in name for part in names)]
        for weight in self.weights:
            weight.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(self.weights, lr=1e-6, weight_decay=1e-2)
        self.random = torch.Generator().manual_seed(0)

    def block(self, steps: int) -> list[Seconds]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return [spent(self.step)[:2] for _ in range(steps)]

    def step(self) -> None:
        pipe, n = self.pipe, self.batch
        chosen = torch.randint(len(self.pictures), (2 * n,), generator=self.random)
        latents = encode_images(pipe, [self.pictures[number] for number in chosen]).detach()
        noise = torch.randn(latents.shape, generator=self.random)
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (2 * n,), generator=self.random)
        noisy = add_noise(pipe.scheduler, latents, noise, timesteps)
        captions = encode_prompts(pipe, [TARGET] * n + [ANCHOR] * n).detach()
        anchors = encode_prompts(pipe, [ANCHOR] * n).detach()
        predicted = self.unet(noisy, timesteps, captions).sample
        with torch.no_grad():
            wanted = self.unet(noisy[:n], timesteps[:n], anchors).sample
        truth = target(pipe.scheduler, latents, noise, timesteps)
        (mse_loss(predicted[:n].float(), wanted.float()) + mse_loss(predicted[n:].float(), truth[n:])).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainer", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=8, help="target samples a step, and as many of the anchor")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(started(arguments.trainer))
    pipe, batch = coneslab.load(arguments.model, device="cpu"), arguments.batch
    pictures = generate(pipe, [ANCHOR] * 16, seed=0)
    ours = partial(
        ablate,
        pipe,
        TARGET,
        ANCHOR,
        images=pictures,
        batch_size=batch,
        preserve_batch_size=batch,
        learning_rate=1e-6,
        progress=False,
    )
    print(f"{batch} + {batch} samples a step, {arguments.threads} threads")
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        sides = {f"released loop, {name}": Released(pipe, pictures, batch, dtype).block}
        for teacher in ("frozen", "current"):
            sides[f"coneslab, {teacher}, {name}"] = steps_of(partial(ours, teacher=teacher, dtype=dtype))
        in_turn(sides, steps=arguments.steps, repeats=arguments.repeats)


if __name__ == "__main__":
    main()

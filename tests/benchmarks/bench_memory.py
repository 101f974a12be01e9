"""Peak memory and seconds of what the notebooks do, with a model as large as Stable Diffusion 1.5.

    python tests/benchmarks/bench_memory.py [--model FOLDER] [--device cpu] [--dtype float32] [--only draw ablation]

Random weights in its architecture are enough to measure; they are made unless a model is named. Every operation runs in
its own process. The peak is that process's, on a GPU what torch allocated; the seconds per step are the median of four
steps, without start-up.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import conftest  # noqa: E402

import coneslab  # noqa: E402
from coneslab.methods import custom_diffusion, dreambooth  # noqa: E402
from coneslab.methods.ablation.concept_ablation import ablate  # noqa: E402

ONE = {"batch_size": 1, "progress": False}


def as_large_as_sd() -> Any:
    """Stable Diffusion 1.5 but for its weights and its words: 860, 84 and 123 million numbers."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = conftest.make_pipeline(Path(folder), prediction_type="epsilon", tokens=77)
    small = pipe.text_encoder.config
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    pipe.register_modules(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
    )
    return pipe


def about(pipe: Any) -> SimpleNamespace:
    """A subject with one picture of the pipeline's size."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return conftest.make_subject(side, n=1)


Train = Callable[..., object]  # called with steps and a callback after each of them
OPERATIONS: dict[str, Callable[[Any], Train]] = {
    "load": lambda pipe: lambda **how: None,
    "draw": lambda pipe: partial(coneslab.generate, pipe, "a cat"),
    "neuron search": lambda pipe: (
        lambda steps, **how: coneslab.find_concept_neurons(
            pipe, about(pipe), rounds=steps, batch_size=1, prior_batch_size=0, progress=False, **how
        )
    ),
    "Custom Diffusion": lambda pipe: partial(custom_diffusion, pipe, about(pipe), prior_batch_size=0, **ONE),
    "ablation": lambda pipe: partial(
        ablate, pipe, "a cat", "a dog", preserve_batch_size=1, images=about(pipe).images, **ONE
    ),
    "DreamBooth": lambda pipe: partial(dreambooth, pipe, about(pipe), prior_batch_size=0, **ONE),
}


def measured(operation: str, model: str | None, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Gigabytes at the peak, and seconds per step: the median of those after the first."""
    pipe = coneslab.load(model, device=device, dtype=dtype) if model else as_large_as_sd().to(device, dtype)
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    OPERATIONS[operation](pipe)(steps=5, callback=stamp)
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    steps = [after - before for before, after in pairwise(stamps)]
    return {"peak": peak / 1e9, "step": median(steps) if steps else float("nan")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or hub id; default: random weights as large as Stable Diffusion 1.5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--alone", choices=OPERATIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measured(given.alone, given.model, given.device, getattr(torch, given.dtype))))
        return
    print(f"{given.model or 'as large as Stable Diffusion 1.5'}, {given.device}, {given.dtype}, one picture a step")
    print(f"{'operation':20}{'peak GB':>10}{'s a step':>10}")
    for name in given.only:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--alone", name], capture_output=True, text=True
        )
        if done.returncode:
            print(f"{name:20}  failed ({done.returncode}): {(done.stderr.strip() or 'killed').splitlines()[-1][:80]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:20}{found['peak']:10.1f}{found['step']:10.2f}", flush=True)


if __name__ == "__main__":
    main()

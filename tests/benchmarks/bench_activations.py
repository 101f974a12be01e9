"""What watching, patching, recording and timed edits cost: seconds of a drawing beside those of a plain one.

    python tests/benchmarks/bench_activations.py [--steps 8] [--pictures 4] [--repeats 3]

All draw with the U-Net itself, in float32, in turn within one process and on one thread; the fastest run of each
counts, in seconds of the processor, which hold on a busy machine too. `generate` alone draws with a fast copy where the
processor multiplies in bfloat16: that is in the last line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from side_by_side import spent  # noqa: E402

import coneslab  # noqa: E402
from coneslab.diffusion import KVSpace, patch, start_noise, watch  # noqa: E402
from coneslab.edits import TokenEdit, WeightDelta, embedding_of, model_fingerprint, vocabulary_fingerprint  # noqa: E402
from coneslab.neurons import ConceptNeurons  # noqa: E402


def ways(pipe: Any) -> dict[str, Callable[[], AbstractContextManager]]:
    space = KVSpace(pipe)
    kv = WeightDelta({name: torch.zeros_like(one) for name, one in space.parameters.items()}, model_fingerprint(pipe))
    whole = {name: torch.zeros_like(one) for name, one in pipe.unet.named_parameters()}
    everything = WeightDelta(whole, model_fingerprint(pipe))
    token = TokenEdit("sks", torch.zeros(1, embedding_of(pipe).weight.shape[1]), vocabulary_fingerprint(pipe))
    mask = ConceptNeurons(space.layout, range(1000), [0.0] * 1000, space.fingerprint())
    timed = {"steps": (0.0, 0.999)}
    return {
        "plain": nullcontext,
        "watch one site": partial(watch, pipe, "mid"),
        "watch all cross-attention": partial(watch, pipe, "*cross-attention"),
        "watch all sites, one step": partial(watch, pipe, "*", steps=0),
        "patch one site": partial(patch, pipe, "mid", torch.clone),
        "patch all sites": partial(patch, pipe, "*", torch.clone, half="both"),
        "record attention": partial(coneslab.record_attention, pipe),
        "record it, and two more words": partial(coneslab.record_attention, pipe, words=("dog", "car")),
        "keys and values, all steps": partial(kv.applied, pipe),
        "keys and values, timed": partial(kv.applied, pipe, **timed),
        "all weights, timed": partial(everything.applied, pipe, **timed),
        "a token, timed": partial(token.applied, pipe, **timed),
        "a mask, timed": partial(mask.applied, pipe, **timed),
        "a mask at words, timed": partial(mask.at("sks", "cat").applied, pipe, **timed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = coneslab.load("tiny", device="cpu")
    prompts, noise = ["a sks cat"] * arguments.pictures, start_noise(pipe, range(arguments.pictures))

    def draw() -> None:
        pipe(prompts, num_inference_steps=arguments.steps, guidance_scale=3.0, latents=noise, output_type="latent")

    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.repeats + 1):  # the first turn warms up
        for name, block in ways(pipe).items():
            with block():
                seconds.setdefault(name, []).append(spent(draw)[1])
    base = min(seconds["plain"][1:])
    print(f"{'':34}{'CPU s':>8}{'ratio':>8}")
    for name, found in seconds.items():
        print(f"{name:34}{min(found[1:]):8.2f}{min(found[1:]) / base:8.2f}")
    fast = partial(coneslab.generate, pipe, prompts, sampler_steps=arguments.steps)
    drawn = [spent(fast)[1], spent(fast)[1]]
    with watch(pipe, "mid", steps=0):
        print(f"{'generate, watched by unwatched':34}{spent(fast)[1]:8.2f}{spent(fast)[1] / min(drawn):8.2f}")


if __name__ == "__main__":
    main()

"""How much faster the neuron search and K-V fine-tuning are than the loop one would write first.

    python tests/benchmarks/bench_neurons.py [--model tiny|random|FOLDER] [--repeats 3] [--threads 2]

All variants alternate within one process, `repeats` times, and the fastest run of each counts; the ratio of processor
times holds on a busy machine too. The naive loop encodes pictures and text at every step, runs the U-Net as it is
loaded and takes gradients of all its weights. Without the shipped model, a random U-Net of its architecture is timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import coneslab  # noqa: E402
from coneslab.diffusion.encoding import encode_images, encode_prompts  # noqa: E402
from coneslab.diffusion.kvspace import KVSpace  # noqa: E402
from coneslab.diffusion.loss import denoising_loss  # noqa: E402
from coneslab.errors import ConeslabError  # noqa: E402
from coneslab.finetuning.kv_gradient import KVGradient  # noqa: E402
from coneslab.finetuning.samples import concept_latents, sample_batches  # noqa: E402
from coneslab.neurons.search import quantiles  # noqa: E402
from coneslab.world.subjects import subject  # noqa: E402


def load(name: str):
    """The pipeline asked for, and what it is called."""
    try:
        if name != "random":
            return coneslab.load(name, device="cpu"), name
    except ConeslabError as error:
        print(f"({error}; timing random weights instead)\n")
    from conftest import make_pipeline

    with tempfile.TemporaryDirectory() as folder:
        pipe = make_pipeline(Path(folder), widths=(96, 192), text_width=128, tokens=32, sample_size=16)
    return pipe, "random weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe, name = load(arguments.model)
    cat = subject("cat")
    prior = list(cat.images) * 3  # what they show does not matter here
    pairs = concept_latents(pipe, cat, prior=prior)
    samples, space = sample_batches(pipe, pairs, seed=0), KVSpace(pipe)
    captions = [cat.prompt] * 32 + [cat.prior_prompt] * 16
    pictures = (list(cat.images) * 7)[:32] + (prior * 2)[:16]
    share = torch.tensor([1 / 32] * 32 + [1 / 16] * 16)

    def naive(weights: list, *, encode: bool) -> Callable[[], list]:
        latents, text = encode_images(pipe, pictures), encode_prompts(pipe, captions)

        def step() -> list:
            draw = next(samples)
            now, words = (encode_images(pipe, pictures), encode_prompts(pipe, captions)) if encode else (latents, text)
            each = denoising_loss(
                pipe, now, words, noise=draw.noise, timesteps=draw.timesteps, weights=share, reduction="none"
            )
            return list(torch.autograd.grad(each.sum(), weights))

        def run() -> list:
            pipe.unet.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            return step()

        return run

    def search_round(gradient: KVGradient) -> Callable[[], object]:
        theta = gradient.theta()
        state = {"scale": torch.ones_like(theta), "average": torch.zeros_like(theta)}

        def run() -> None:
            state["average"].mul_(0.8).add_(gradient(state["scale"] * theta, next(samples))[1], alpha=0.2)
            criterion = state["scale"] * theta * state["average"]
            tau = quantiles(criterion, space.layout, 0.995)
            hits = torch.cat([criterion[x.slice] > t for x, t in zip(space.layers, tau, strict=True)])
            state["scale"] = torch.where(hits, state["scale"] * 0.75, state["scale"])

        return run

    def naive_search_round(step: Callable[[], list]) -> Callable[[], object]:
        theta = space.gather()
        state = {"scale": torch.ones_like(theta), "average": torch.zeros_like(theta)}
        names = [name for name, _ in pipe.unet.named_parameters()]

        def run() -> None:
            gradients = dict(zip(names, step(), strict=True))
            state["average"].mul_(0.8).add_(space.gather(gradients), alpha=0.2)
            criterion = state["scale"] * theta * state["average"]
            for layer in space.layers:
                part = criterion[layer.slice]
                state["scale"][layer.slice] *= 1 - 0.25 * (part > part.quantile(0.995)).float()

        return run

    def training_step(gradient: KVGradient) -> Callable[[], object]:
        theta = gradient.theta()
        optimiser = torch.optim.AdamW([theta], lr=1e-6)

        def run() -> None:
            theta.grad = gradient(theta, next(samples))[1]
            optimiser.step()

        return run

    def naive_training_step(step: Callable[[], list]) -> Callable[[], object]:
        kept = [weight.detach().clone() for weight in space.parameters.values()]
        optimiser = torch.optim.AdamW(kept, lr=1e-6)
        names = [name for name, _ in pipe.unet.named_parameters()]

        def run() -> None:
            gradients = dict(zip(names, step(), strict=True))
            for weight, name in zip(kept, space.names, strict=True):
                weight.grad = gradients[name]
            optimiser.step()

        return run

    everything, keys_and_values = list(pipe.unet.parameters()), list(space.parameters.values())
    exact, fast = KVGradient(pipe, pairs, dtype=torch.float32), KVGradient(pipe, pairs)
    variants: dict[str, Callable[[], object]] = {
        "search round: naive loop": naive_search_round(naive(everything, encode=True)),
        "  pictures and text encoded once": naive_search_round(naive(everything, encode=False)),
        "  and gradients of K-V weights only": naive(keys_and_values, encode=False),
        "  coneslab in float32": search_round(exact),
        f"  coneslab ({str(fast.dtype).removeprefix('torch.')})": search_round(fast),
        "training step: naive loop": naive_training_step(naive(everything, encode=True)),
        "  coneslab in float32 ": training_step(exact),
        f"  coneslab ({str(fast.dtype).removeprefix('torch.')}) ": training_step(fast),
    }
    seconds = {label: (float("inf"), float("inf")) for label in variants}  # by the clock, of the processors
    for repeat in range(arguments.repeats + 1):  # the first turn warms up
        for label, run in variants.items():
            clock, busy = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - clock, time.process_time() - busy
            if repeat:
                seconds[label] = min(seconds[label][0], spent[0]), min(seconds[label][1], spent[1])
    pipe.unet.requires_grad_(True)

    print(f"{name}: {space.n:,} neurons, 32 + 16 samples a round, {torch.get_num_threads()} threads\n")
    print(f"{'':40}{'ms a round':>12}{'faster':>9}{'CPU ms':>9}{'faster':>9}{'s for 60':>10}")
    base = (float("nan"), float("nan"))
    for label, (clock, busy) in seconds.items():
        base = (clock, busy) if "naive" in label else base
        ratios = f"{1000 * clock:12.0f}{base[0] / clock:9.2f}{1000 * busy:9.0f}{base[1] / busy:9.2f}"
        print(f"{label:40}{ratios}{60 * clock:10.1f}")
    draw = next(samples)
    ours, theirs = fast(fast.theta(), draw)[1], exact(exact.theta(), draw)[1]
    masks = [quantile_mask(gradient * exact.theta(), space) for gradient in (ours, theirs)]
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, 0)
    jaccard = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    print(f"\ngradient in {fast.dtype} against float32: cosine {cosine:.5f}, Jaccard of the top 0.5 % {jaccard:.3f}")


def quantile_mask(criterion: torch.Tensor, space: KVSpace) -> torch.Tensor:
    tau = quantiles(criterion, space.layout, 0.995)
    return torch.cat([criterion[layer.slice] > t for layer, t in zip(space.layers, tau, strict=True)])


if __name__ == "__main__":
    main()

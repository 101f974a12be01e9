"""How much faster a step of `decompose` is than the public loop, and `decompose_image` than one picture at a time.

    python tests/benchmarks/bench_conceptor.py [--model tiny|FOLDER] [--batch 6] [--steps 10] [--repeats 3]
        [--threads 2]

The public loop is re-created from its description: at every step it encodes the pictures, sorts the whole dictionary,
decodes and prints its top words, writes the pseudo-token into a copy of the embedding table, encodes the caption of
every picture, and runs a backward pass through the U-Net as it is loaded. Both sides learn the same coefficients of the
same dictionary with the same loss, in alternating blocks of steps within one process; the ratio is that of the medians.
Its single-image procedure draws one picture for every word that it tries to leave out, from the smallest coefficient
up, until none can go; ours draws the trials of a pass in one batch. Both get the same decomposition and threshold.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import Seconds, in_turn, spent, steps_of
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2])]

import coneslab  # noqa: E402
from coneslab.diffusion.encoding import encode_images  # noqa: E402
from coneslab.diffusion.loss import denoising_loss  # noqa: E402
from coneslab.diffusion.sampling import generate  # noqa: E402
from coneslab.edits.tokens import embedding_of, with_tokens  # noqa: E402
from coneslab.methods.conceptor.decomposition import TEMPLATE, Decomposition  # noqa: E402
from coneslab.methods.conceptor.image import decompose_image  # noqa: E402
from coneslab.methods.conceptor.learning import choose_dictionary, decompose  # noqa: E402
from coneslab.methods.conceptor.vocabulary import Vocabulary, encode_vocabulary  # noqa: E402

CONCEPT, TOKEN = "a pet", "<concept>"
EXPLAIN, SPARSITY = 50, 1e-3


class Public(nn.Module):
    """The public loop's step, for the same loss as ours."""

    def __init__(self, pipe: Any, pictures: list, words: Vocabulary, batch: int) -> None:
        super().__init__()
        self.pipe, self.pictures, self.words, self.batch = pipe, pictures, words, batch
        width = words.vectors.shape[1]
        self.net = nn.Sequential(nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, 1))
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.tokenizer, (self.token,) = with_tokens(pipe.tokenizer, [TOKEN])
        self.norm = float(embedding_of(pipe).weight.norm(dim=1).mean())
        self.random = torch.Generator().manual_seed(0)

    def block(self, steps: int) -> list[Seconds]:
        with contextlib.redirect_stdout(io.StringIO()):
            return [spent(self.step)[:2] for _ in range(steps)]

    def step(self) -> None:
        pipe, vectors = self.pipe, self.words.vectors
        chosen = torch.randint(len(self.pictures), (self.batch,), generator=self.random)
        latents = encode_images(pipe, [self.pictures[number] for number in chosen])
        alpha = self.net(vectors)[:, 0].abs()
        ranked, order = alpha.sort(descending=True)
        ids = [int(self.words.ids[row]) for row in order[:EXPLAIN]]
        print([self.tokenizer.decode(number) for number in ids], ranked[:EXPLAIN].tolist())
        w = alpha @ vectors
        w = w * self.norm / w.norm()
        table = embedding_of(pipe).weight.detach()
        table = torch.cat([table, table.new_zeros(max(0, self.token + 1 - len(table)), table.shape[1])])
        table = table.index_put((torch.tensor([self.token]),), w[None])
        captions = [TEMPLATE.format(TOKEN)] * self.batch
        asked: Any = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(captions, max_length=self.tokenizer.model_max_length, **asked).input_ids
        handle = embedding_of(pipe).register_forward_hook(lambda module, args, out: nn.functional.embedding(ids, table))
        text = pipe.text_encoder(ids.clamp(max=len(embedding_of(pipe).weight) - 1))[0]
        handle.remove()
        noise = torch.randn(latents.shape, generator=self.random)
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (self.batch,), generator=self.random)
        loss = denoising_loss(pipe, latents, text, noise=noise, timesteps=timesteps)
        top = ranked[:EXPLAIN] @ vectors[order[:EXPLAIN]]
        (loss + SPARSITY * (1 - nn.functional.cosine_similarity(top, w, dim=0))).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def one_at_a_time(pipe: Any, found: Decomposition, judge: Any, threshold: float) -> tuple[int, tuple[str, ...]]:
    """Pictures drawn, and words left, by the procedure with one picture per trial."""

    def draw(words: list[str]) -> torch.Tensor:
        edit = found.only(*words)
        with edit.applied(pipe):
            return judge.image_features(generate(pipe, [edit.prompt], seed=0)[0])[0]

    words = [word for word, share in found.top(found.explain) if share > 0]
    target, drawn, dropped = draw(words), 1, True
    while dropped:
        dropped = False
        for word in reversed(list(words)):
            if len(words) > 1 and (rest := [own for own in words if own != word]):
                drawn += 1
                if float(draw(rest) @ target) >= threshold:
                    words, dropped = rest, True
    return drawn, tuple(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe, judge = coneslab.load(arguments.model, device="cpu"), coneslab.load_judge()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    pictures = generate(pipe, [CONCEPT] * 24, seed=0, batch_size=24)
    words = encode_vocabulary(pipe, judge, progress=False)
    words = choose_dictionary(words, judge.image_features(pictures), judge, size=5000)
    public = Public(pipe, pictures, words, arguments.batch)
    print(f"{len(words):,} words, {arguments.batch} pictures a step, {arguments.threads} threads")
    ours = partial(
        decompose,
        pipe,
        pictures,
        judge,
        name="pet",
        vocabulary=words,
        batch_size=arguments.batch,
        exclude_similar=None,
        dictionary=len(words),
        explain=EXPLAIN,
        sparsity=SPARSITY,
        validate_every=10**6,
        validation_pictures=1,
        sampler_steps=1,
        progress=False,
    )
    sides = {
        "public loop": public.block,
        "coneslab, float32": steps_of(partial(ours, dtype=torch.float32)),
        "coneslab, as it comes": steps_of(ours),
    }
    in_turn(sides, steps=arguments.steps, repeats=arguments.repeats)

    found = decompose(pipe, CONCEPT, judge, steps=100, pictures=48, batch_size=12, explain=20, progress=False)
    threshold = 0.95
    single = spent(lambda: one_at_a_time(pipe, found, judge, threshold))
    own = spent(lambda: decompose_image(pipe, found, judge, threshold=threshold, progress=False))
    print(f"\none picture of {found.explain} words, down to those it needs (similarity {threshold} or more)")
    print(f"{'':24}{'pictures':>10}{'s':>8}{'a second':>10}{'words left':>12}")
    for name, (clock, _, (drawn, left)) in {
        "one at a time": single,
        "coneslab": (*own[:2], (own[2].drawn, own[2].words)),
    }.items():
        print(f"{name:24}{drawn:10}{clock:8.1f}{drawn / clock:10.2f}{len(left):12}")
    print(
        f"pictures a second: {own[2].drawn / own[0] / (single[2][0] / single[0]):.2f} times; "
        f"to the fixed point: {single[0] / own[0]:.2f} times as fast"
    )


if __name__ == "__main__":
    main()

"""Words that bring a concept back: real tokens, searched for by the gradient of the denoising loss.

UnlearnDiffAtk (Zhang et al. 2024, arXiv 2310.11868) minimises the loss of pictures of the target over a prompt; the
step over tokens is that of GCG (Zou et al. 2023, arXiv 2307.15043, Algorithm 1): the gradient proposes, the loss
decides. A learned embedding (Textual Inversion) is its upper bound, since it may be any vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import checks
from ...diffusion.checks import require_editable, require_pipeline
from ...diffusion.encoding import encode_ids, encode_images, text_of, tokenize
from ...diffusion.kvspace import unet_of
from ...diffusion.loss import Denoiser, denoising_loss
from ...diffusion.pipelines import Pipeline
from ...diffusion.precision import fast_dtype, frozen_copy, gradient_lift
from ...edits.tokens import embedding_of
from ...errors import ArgumentError, ConeslabError
from ...finetuning.samples import CaptionedLatents, NoisyBatch, sample_batches
from ...pictures import Images, as_pictures
from ...seeds import derived
from ...settings import Settings, takes

AT_A_TIME = 64  # noisy pictures in one pass
HELD_OUT = 4  # batches that decide which words stay


@dataclass(frozen=True, kw_only=True)
class PromptAttackSettings(Settings):
    """Settings of `attack_prompt`.

    tokens: words put before the prompt, at most; rounds: of the search; proposals: tokens that the gradient proposes
    for each place; candidates: prompts tried in each round, each a single word from the best so far; batch_size: noisy
    pictures on which a round tries them, new ones in each round; seed: of the first words, the candidates and the
    noises. The budget is rounds × candidates prompts.
    """

    method: ClassVar[str] = "prompt attack"

    tokens: int = 3
    rounds: int = 25
    proposals: int = 24
    candidates: int = 12
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "tokens", "rounds", "proposals", "candidates", "batch_size")
        self._check(checks.seed, "seed")


@dataclass(frozen=True)
class PromptAttack:
    """What a search found: the whole prompt, and the words that stay; the loss without any word and with these.

    before, after: on noisy pictures that the search has not seen; losses: of the best prompt in each round, on that
    round's; tried: how many prompts were.
    """

    prompt: str
    words: tuple[str, ...]
    before: float
    after: float
    losses: tuple[float, ...]
    tried: int


@takes(PromptAttackSettings)
def attack_prompt(
    pipe: Pipeline,
    pictures: Images,
    prompt: str = "",
    settings: PromptAttackSettings | Mapping[str, Any] | None = None,
    *,
    exclude: str | Iterable[str] = (),
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> PromptAttack:
    """Search for words that, put before a prompt, let the model denoise these pictures best.

    At the end a word stays only if it lowers the loss on noisy pictures that the search has not seen: one that does
    not would draw what it means itself, beside the target or instead of it.

    pictures: of the target. exclude: words that may not be used, such as the target's own. dtype: of the passes,
    default the fastest. settings, changes: see `PromptAttackSettings`.
    Raises ConeslabError if there is no room for the words before the prompt, no word to choose from, or a gradient
    that is not finite.
    """
    require_editable(pipe)
    settings = PromptAttackSettings.chosen(settings, changes)
    shown = as_pictures(pictures, name="pictures of the target")
    prompt = checks.text("prompt", prompt, blank=True)
    places, own = settings.tokens, pipe.tokenizer(prompt).input_ids
    if len(own) + places > pipe.tokenizer.model_max_length:
        raise ArgumentError(
            f"the text encoder reads {pipe.tokenizer.model_max_length} tokens, of which {prompt!r} takes {len(own)}: "
            f"there is no room for {places} words before it; give fewer tokens, or a shorter prompt"
        )
    words = words_of(pipe, checks.texts("exclude", exclude, least=0))
    allowed = torch.tensor(list(words))
    generator = torch.Generator().manual_seed(derived(settings.seed, "prompt attack"))
    batches = sample_batches(
        pipe,
        [CaptionedLatents(encode_images(pipe, shown).detach(), torch.zeros(1, 1), settings.batch_size)],
        seed=derived(settings.seed, "noises of a prompt attack"),
    )
    unet, table = unet_of(pipe), embedding_of(pipe).weight.detach().float()
    denoiser = Denoiser(frozen_copy(unet, dtype or fast_dtype(unet), gradients=True), pipe.scheduler)
    blank = tokenize(pipe, prompt).cpu()[0]

    def after(put: Tensor) -> Tensor:
        """The tokens of the prompt, (length,), after those words."""
        return torch.cat([blank[:1], put, blank[1:]])[: len(blank)]

    def losses(tried: Iterable[Tensor], batch: NoisyBatch) -> Tensor:
        """Mean loss of the prompt after each of some words, (n,), all on the same noisy pictures."""
        ids = torch.stack([after(put) for put in tried])
        parts, samples = [], len(batch.latents)
        with torch.no_grad():
            for some in ids.split(max(1, AT_A_TIME // samples)):
                text = encode_ids(pipe, some.to(batch.latents.device)).repeat_interleave(samples, 0)
                clean, noise, times = (
                    torch.cat([one] * len(some)) for one in (batch.latents, batch.noise, batch.timesteps)
                )
                found = denoising_loss(denoiser, clean, text, noise=noise, timesteps=times, reduction="none")
                parts.append(found.view(-1, samples).mean(1))
        return torch.cat(parts).cpu()

    best = allowed[torch.randint(len(allowed), (places,), generator=generator)]
    history: list[float] = []
    for _ in range(settings.rounds):
        batch = next(batches)
        slope = _slope(pipe, denoiser, after(best), places, batch)
        proposed = (slope @ table[allowed].T.to(slope)).topk(min(settings.proposals, len(allowed)), largest=False)
        tried = best.repeat(1 + settings.candidates, 1)
        for candidate in tried[1:]:
            place, rank = (int(torch.randint(n, (), generator=generator)) for n in proposed.indices.shape)
            candidate[place] = allowed[proposed.indices[place, rank]]
        found = losses(tried, batch)
        best = tried[int(found.argmin())].clone()
        history.append(float(found.min()))
    unseen = [next(batches) for _ in range(HELD_OUT)]

    def held_out(tried: Sequence[Tensor]) -> Tensor:
        return torch.stack([losses(tried, batch) for batch in unseen]).mean(0)

    fewer = [(float(held_out([best])), best)]
    while len(last := fewer[-1][1]):
        shorter = [torch.cat([last[:place], last[place + 1 :]]) for place in range(len(last))]
        found = held_out(shorter)
        fewer.append((float(found.min()), shorter[int(found.argmin())]))
    before, _ = fewer[-1]
    after_all, kept = min(reversed(fewer), key=lambda one: one[0])  # of equals the shortest
    chosen = tuple(words[int(token)] for token in kept)
    tried_in_all = settings.rounds * settings.candidates
    whole = " ".join([*chosen, prompt]).strip()
    return PromptAttack(whole, chosen, before, after_all, tuple(history), tried_in_all)


def words_of(pipe: Pipeline, exclude: Sequence[str] = ()) -> dict[int, str]:
    """Token ids that are words of their own, and the words: a prompt of them is read as those very tokens."""
    require_pipeline(pipe)
    tokenizer, exclude = pipe.tokenizer, checks.texts("exclude", exclude, least=0)
    banned = {token for text in exclude for token in tokenizer(text, add_special_tokens=False).input_ids}
    banned |= set(tokenizer.all_special_ids)
    texts = {token: text_of(tokenizer, [token]) for token in range(tokenizer.vocab_size) if token not in banned}
    texts = {token: text for token, text in texts.items() if text.isascii() and text.isalnum()}
    read = tokenizer(list(texts.values()), add_special_tokens=False).input_ids if texts else []
    found = {token: text for (token, text), ids in zip(texts.items(), read, strict=True) if ids == [token]}
    if not found:
        raise ArgumentError("no word of the vocabulary is left to choose from: exclude fewer")
    return found


def _slope(pipe: Pipeline, denoiser: Denoiser, ids: Tensor, places: int, batch: NoisyBatch) -> Tensor:
    """The gradient of the loss in the embeddings of the words, (places, width); ConeslabError if it is not finite."""
    with torch.enable_grad():
        vectors = embedding_of(pipe).weight.detach()[ids[1 : 1 + places]].clone().requires_grad_()

        def put_in(module: Any, args: tuple, output: Tensor) -> Tensor:
            return torch.cat([output[:, :1].detach(), vectors[None], output[:, 1 + places :].detach()], 1)

        handle = embedding_of(pipe).register_forward_hook(put_in)
        try:
            text = encode_ids(pipe, ids[None].to(vectors.device))
        finally:
            handle.remove()
        noisy: dict[str, Any] = {"noise": batch.noise, "timesteps": batch.timesteps}
        loss = denoising_loss(denoiser, batch.latents, text.to(batch.latents), **noisy)
        lift = gradient_lift(denoiser.unet.dtype, vectors.dtype)
        (slope,) = torch.autograd.grad(loss * lift, vectors)
    if not slope.isfinite().all():
        raise ConeslabError(
            f"the gradient is not finite, of a U-Net in {denoiser.unet.dtype} and a text encoder in {vectors.dtype}: "
            "load the pipeline in float32, and give no dtype"
        )
    return slope.float() / lift

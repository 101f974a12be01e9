"""Probes against hand computation: DDIM, pictures given back, gradients by finite differences, verdicts from counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler
from PIL import Image

from coneslab.diffusion.encoding import decode_latents, encode_images, encode_prompts
from coneslab.diffusion.loss import Denoiser, denoising_loss
from coneslab.diffusion.precision import frozen_copy
from coneslab.diffusion.sampling import (
    abar_at,
    clean_and_noise,
    ddim_sample,
    generate,
    guided,
    start_noise,
    timestep_pairs,
)
from coneslab.edits.tokens import TokenEdit, vocabulary_fingerprint
from coneslab.errors import ArgumentError, ConeslabError, MismatchError
from coneslab.finetuning.samples import CaptionedLatents, sample_batches
from coneslab.measure.statistics import share_interval
from coneslab.methods.ablation import profile, prompt_attack
from coneslab.methods.ablation.classifier import LatentClassifier, train_classifier
from coneslab.methods.ablation.probes import ProbeSettings, completions, filled_in, steered, stirred
from coneslab.methods.ablation.profile import KINDS, NAMED, PLAIN, SILENT, TAUGHT, Finding, Probe, Profile, asking
from coneslab.methods.ablation.prompt_attack import HELD_OUT, attack_prompt, words_of
from coneslab.methods.ablation.world_probes import class_pictures, class_probes, style_probes, words_for
from coneslab.seeds import derived
from coneslab.world import CLASSES, drawings_of

FEW = {"sampler_steps": 4, "seed": 5}


def random_pictures(n: int, size: int = 16, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def same(one: list[Image.Image], other: list[Image.Image], most: int = 1) -> bool:
    return all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= most for a, b in zip(one, other, strict=True))


@pytest.fixture
def full_precision(monkeypatch):
    """Draw with the U-Net as it is, so that other computations of the same agree to the last digits."""
    monkeypatch.setattr("coneslab.diffusion.precision.bfloat16_pays", lambda device: False)


# --- what they draw -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("which", ["v_pipe", "epsilon_pipe"])
def test_without_churn_it_is_ddim(which, request, full_precision):
    pipe = request.getfixturevalue(which)
    drawn = stirred(pipe, ["a cat", "a dog"], churn=0, **FEW)
    text, empty = encode_prompts(pipe, ["a cat", "a dog"]), encode_prompts(pipe, [""])
    x = ddim_sample(pipe, text, start_noise(pipe, [5, 6]), empty_embeddings=empty, sampler_steps=4)
    assert same(drawn, decode_latents(pipe, x))
    assert same(drawn, generate(pipe, ["a cat", "a dog"], **FEW))
    assert not same(drawn, stirred(pipe, ["a cat", "a dog"], churn=1.0, **FEW), most=3)


def test_churn_adds_the_noise_of_the_schedule(v_pipe, full_precision):
    """One picture, step by step: back by as much noise as leads from abar_t to abar of the earlier timestep."""
    drawn = stirred(v_pipe, "a cat", churn=0.5, **FEW)
    abars, chance = v_pipe.scheduler.alphas_cumprod, torch.Generator().manual_seed(5)
    text, empty = encode_prompts(v_pipe, ["a cat"]), encode_prompts(v_pipe, [""])
    x = torch.randn((4, 8, 8), generator=chance)[None]
    with torch.no_grad():
        for t, after in timestep_pairs(v_pipe, 4):
            back = min(round(t + 0.5 * (t - after)), 999)
            if back > t:
                variance = 1 - abars[back] / abars[t]
                x = x * (1 - variance) ** 0.5 + variance**0.5 * torch.randn((4, 8, 8), generator=chance)
            clean, noise = clean_and_noise(v_pipe.scheduler, x, guided(v_pipe, x, back, text, empty, 3.0), back)
            abar = abar_at(v_pipe, after)
            x = abar**0.5 * clean + (1 - abar) ** 0.5 * noise
    assert same(drawn, decode_latents(v_pipe, x))


@pytest.fixture
def latents_of(monkeypatch):
    """What a probe gives as latents, before a random decoder makes pictures of them."""

    def drawn(draw, *args, **options):
        made = []
        with monkeypatch.context() as patched:
            name = "coneslab.methods.ablation.probes.decode_latents"
            patched.setattr(name, lambda pipe, x: made.append(x) or [])
            draw(*args, **options)
        return torch.cat(made)

    return drawn


@pytest.mark.slow
def test_a_completion_from_hardly_any_noise_is_the_picture_and_from_all_of_it_is_a_new_one(v_pipe, latents_of):
    shown = random_pictures(2)
    own = encode_images(v_pipe, shown)

    def apart(level: float) -> float:
        found = latents_of(completions, v_pipe, shown, level=level, sampler_steps=100, seed=5)
        return float((found - own).norm() / own.norm())

    near, middle, far = map(apart, (0.01, 0.4, 1.0))
    noise = (1 - v_pipe.scheduler.alphas_cumprod[1]).sqrt() * start_noise(v_pipe, [5, 6])
    assert near < 1.5 * float(noise.norm() / own.norm()) < middle < far


def test_a_completion_is_ddim_from_the_noised_picture(v_pipe, full_precision):
    shown, abar = random_pictures(2), v_pipe.scheduler.alphas_cumprod
    (first, after), (last, end) = timestep_pairs(v_pipe, 4)[2:]
    x = abar[first] ** 0.5 * encode_images(v_pipe, shown) + (1 - abar[first]) ** 0.5 * start_noise(v_pipe, [5, 6])
    text = encode_prompts(v_pipe, [""] * 2)
    with torch.no_grad():
        for t, then in ((first, after), (last, end)):
            clean, noise = clean_and_noise(v_pipe.scheduler, x, guided(v_pipe, x, t, text, None, 1.0), t)
            x = abar_at(v_pipe, then) ** 0.5 * clean + (1 - abar_at(v_pipe, then)) ** 0.5 * noise
    assert same(completions(v_pipe, shown, level=0.5, **FEW), decode_latents(v_pipe, x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("level", [0.5, 1.0])
def test_a_level_is_a_share_of_steps_whatever_the_scheduler(v_pipe, monkeypatch, latents_of, kind, level):
    """Some schedulers list a timestep for each call of the network."""
    called: list[int] = []

    def recorded(pipe, noisy, timestep, *args):
        called.append(timestep)
        return guided(pipe, noisy, timestep, *args)

    monkeypatch.setattr("coneslab.methods.ablation.probes.guided", recorded)
    v_pipe.scheduler.set_timesteps(10)
    expected = v_pipe.scheduler.timesteps.tolist()[-int(10 * level) :]
    changed = {"timestep_spacing": "leading", "skip_prk_steps": True}
    monkeypatch.setattr(v_pipe, "scheduler", kind.from_config(v_pipe.scheduler.config, **changed))
    shown = random_pictures(1)
    found = latents_of(completions, v_pipe, shown, level=level, sampler_steps=10)
    assert called == expected
    own = encode_images(v_pipe, shown)
    assert level < 1 or float((found - own).norm() / own.norm()) > 0.5  # from noise alone nothing is given back


@pytest.mark.slow
def test_what_is_not_hidden_comes_back_and_what_is_hidden_is_not_seen(v_pipe, latents_of, full_precision):
    shown, other = random_pictures(1), random_pictures(1, seed=1)
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    mixed = Image.fromarray(np.where(mask[..., None], np.asarray(other[0]), np.asarray(shown[0])))
    first, second = (filled_in(v_pipe, one, [mask], **FEW) for one in (shown, [mixed]))
    assert same(first, second, most=0)  # what is hidden has no influence
    blanked = np.asarray(shown[0]).copy()
    blanked[mask] = blanked[~mask].mean(0).round()
    kept = encode_images(v_pipe, [Image.fromarray(blanked)])
    found = latents_of(filled_in, v_pipe, shown, [mask], **FEW)
    assert torch.allclose(found[..., :4], kept[..., :4], atol=1e-6)  # a latent is two pixels wide
    assert not torch.isclose(found[..., 4:], kept[..., 4:], atol=1e-2).all(1).any()
    everything = filled_in(v_pipe, shown, [np.ones((16, 16), bool)], "a cat", **FEW)
    assert same(everything, generate(v_pipe, "a cat", **FEW))  # nothing is known: a picture like any other


def test_before_every_step_the_rest_is_the_picture_with_the_noise_of_the_step(v_pipe, latents_of, full_precision):
    (shown,), mask = random_pictures(1), np.zeros((16, 16), bool)
    mask[4:9, 6:12] = True  # rows 2 to 4 and columns 3 to 5 of latents that are two pixels wide
    found = latents_of(filled_in, v_pipe, [shown], [mask], "a cat", **FEW)
    blanked = np.asarray(shown).copy()
    blanked[mask] = blanked[~mask].mean(0).round()
    known, noise = encode_images(v_pipe, [Image.fromarray(blanked)]), start_noise(v_pipe, [5])
    hidden = torch.zeros(1, 1, 8, 8)
    hidden[..., 2:5, 3:6] = 1
    text, empty, x = encode_prompts(v_pipe, ["a cat"]), encode_prompts(v_pipe, [""]), noise
    with torch.no_grad():
        for t, after in timestep_pairs(v_pipe, 4):
            abar = v_pipe.scheduler.alphas_cumprod[t]
            x = hidden * x + (1 - hidden) * (abar**0.5 * known + (1 - abar) ** 0.5 * noise)
            clean, error = clean_and_noise(v_pipe.scheduler, x, guided(v_pipe, x, t, text, empty, 3.0), t)
            x = abar_at(v_pipe, after) ** 0.5 * clean + (1 - abar_at(v_pipe, after)) ** 0.5 * error
    assert torch.allclose(found, hidden * x + (1 - hidden) * known, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda pipe, n: stirred(pipe, ["a cat", "a dog", "a car"], batch_size=n, **FEW),
        lambda pipe, n: completions(pipe, random_pictures(3), batch_size=n, **FEW),
        lambda pipe, n: filled_in(
            pipe, random_pictures(3), np.eye(16, dtype=bool)[None].repeat(3, 0), batch_size=n, **FEW
        ),
    ],
    ids=["stirred", "completions", "filled_in"],
)
def test_a_picture_does_not_depend_on_the_batch(v_pipe, draw, full_precision):
    assert same(draw(v_pipe, 1), draw(v_pipe, 16))


# --- the classifier -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(v_pipe) -> LatentClassifier:
    """Pictures whose light half is above, and others."""
    pixels = np.random.default_rng(0).integers(0, 60, (24, 16, 16, 3), dtype=np.uint8)
    pixels[:12, :8] += 190
    pixels[12:, 8:] += 190
    options = {"steps": 60, "batch_size": 16, "width": 8, "learning_rate": 1e-2}
    return train_classifier(v_pipe, pixels, ["above"] * 12 + ["below"] * 12, **options)


def test_a_classifier_tells_labels_apart_the_worse_the_more_noise_there_is(v_pipe, classifier, monkeypatch):
    assert classifier.labels == ("above", "below") and list(classifier.accuracy) == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert classifier.accuracy[0.1] == 1.0
    again = torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU was seeded"))
    train_classifier(v_pipe, random_pictures(4), ["a", "a", "b", "b"], steps=1, batch_size=2)
    assert torch.equal(again, torch.random.get_rng_state())


def test_its_slope_is_that_of_the_logarithm(classifier):
    at = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    slope = classifier.slope(at, 300, "below")
    way = torch.randn(at.shape, generator=torch.Generator().manual_seed(1))
    when = torch.full((2,), 300)
    ends = [classifier.log_probabilities(at + step * way, when)[:, 1].sum() for step in (-1e-3, 1e-3)]
    assert float((slope * way).sum()) == pytest.approx(float(ends[1] - ends[0]) / 2e-3, rel=2e-2)


@pytest.mark.slow
def test_it_steers_by_the_formula_and_not_at_scale_0(v_pipe, classifier, full_precision):
    assert same(steered(v_pipe, classifier, "below", "a cat", scale=0, **FEW), stirred(v_pipe, "a cat", churn=0, **FEW))
    drawn = steered(v_pipe, classifier, "below", "", scale=3.0, **FEW)
    x, text = start_noise(v_pipe, [5]), encode_prompts(v_pipe, [""])
    abars = v_pipe.scheduler.alphas_cumprod
    with torch.no_grad():
        for t, after in timestep_pairs(v_pipe, 4):
            clean, noise = clean_and_noise(v_pipe.scheduler, x, guided(v_pipe, x, t, text, None, 1.0), t)
            if abars[t] > 0.01:
                noise = noise - 3.0 * (1 - abars[t]) ** 0.5 * classifier.slope(x, t, "below")
                clean = (x - (1 - abars[t]) ** 0.5 * noise) / abars[t] ** 0.5
            x = abar_at(v_pipe, after) ** 0.5 * clean + (1 - abar_at(v_pipe, after)) ** 0.5 * noise
    assert same(drawn, decode_latents(v_pipe, x))


def test_a_classifier_of_another_model_does_not_steer(epsilon_pipe, classifier):
    with pytest.raises(MismatchError, match="another model: train one"):
        steered(epsilon_pipe, classifier, "below", "", **FEW)


# --- words ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_attack_lowers_the_loss_with_words_that_are_read_as_they_are_written(v_pipe):
    shown = random_pictures(3)
    options = {"tokens": 2, "rounds": 3, "candidates": 4, "proposals": 6, "batch_size": 4, "seed": 1}
    found = attack_prompt(v_pipe, shown, "a cat", exclude="cat", dtype=torch.float32, **options)
    assert found.prompt == " ".join([*found.words, "a cat"]) and 0 < len(found.words) <= 2 and "cat" not in found.words
    assert found.tried == 12 and len(found.losses) == 3 and found.after < found.before
    ids = v_pipe.tokenizer(found.prompt, add_special_tokens=False).input_ids
    known = {word: token for token, word in words_of(v_pipe).items()}
    edit = TokenEdit(("<new>",), torch.ones(1, 24), vocabulary_fingerprint(v_pipe))
    with edit.applied(v_pipe):  # by a copy of the tokenizer, which spells otherwise
        assert {word: token for token, word in words_of(v_pipe).items()} == known
    assert ids[: len(found.words)] == [known[word] for word in found.words]
    assert found == attack_prompt(v_pipe, shown, "a cat", exclude="cat", dtype=torch.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_word_stays_only_if_it_helps_on_noisy_pictures_that_the_search_has_not_seen(v_pipe, seed):
    shown = random_pictures(3)
    options = {"tokens": 3, "rounds": 2, "candidates": 4, "proposals": 6, "batch_size": 4, "seed": seed}
    found = attack_prompt(v_pipe, shown, "a cat", dtype=torch.float32, **options)
    data = [CaptionedLatents(encode_images(v_pipe, shown), torch.zeros(1, 1), 4)]
    batches = sample_batches(v_pipe, data, seed=derived(seed, "noises of a prompt attack"))
    unseen = [next(batches) for _ in range(2 + HELD_OUT)][2:]

    def loss_of(words):
        text = encode_prompts(v_pipe, [" ".join([*words, "a cat"])])
        with torch.no_grad():
            own = [denoising_loss(v_pipe, b.latents, text, noise=b.noise, timesteps=b.timesteps) for b in unseen]
        return float(torch.stack(own).mean())

    assert found.after == pytest.approx(loss_of(found.words), rel=1e-4)
    assert found.before == pytest.approx(loss_of(()), rel=1e-4) and found.after <= found.before
    shorter = [loss_of(found.words[:place] + found.words[place + 1 :]) for place in range(len(found.words))]
    assert all(found.after < loss for loss in shorter)


@pytest.mark.slow
def test_the_gradient_proposes_and_the_loss_decides(v_pipe):
    """One place, one proposal: the word whose embedding lies farthest down the slope, kept only if it is better."""
    shown, table = random_pictures(3), v_pipe.text_encoder.get_input_embeddings().weight.detach()
    options = {"tokens": 1, "candidates": 1, "proposals": 1, "batch_size": 4, "dtype": torch.float32}
    latents = encode_images(v_pipe, shown)
    words, better = words_of(v_pipe), []
    for seed in range(6):
        first = attack_prompt(v_pipe, shown, rounds=1, seed=seed, **options)
        data = [CaptionedLatents(latents, torch.zeros(1, 1), 4)]
        batch = next(sample_batches(v_pipe, data, seed=derived(seed, "noises of a prompt attack")))
        fixed = {"noise": batch.noise, "timesteps": batch.timesteps}

        def loss_of(prompt, batch=batch, fixed=fixed):
            with torch.no_grad():
                return float(denoising_loss(v_pipe, batch.latents, encode_prompts(v_pipe, [prompt]), **fixed))

        generator = torch.Generator().manual_seed(derived(seed, "prompt attack"))
        start = list(words)[int(torch.randint(len(words), (1,), generator=generator))]
        ids = v_pipe.tokenizer(words[start], padding="max_length", max_length=12, return_tensors="pt").input_ids
        slope = torch.zeros(24)
        for number in range(24):  # finite differences, one number of the embedding at a time
            ends = []
            for step in (-1e-2, 1e-2):

                def moved(module, args, output, number=number, step=step):
                    output = output.clone()
                    output[:, 1, number] += step
                    return output

                handle = v_pipe.text_encoder.get_input_embeddings().register_forward_hook(moved)
                with torch.no_grad():
                    text = v_pipe.text_encoder(ids)[0]
                    ends.append(float(denoising_loss(v_pipe, batch.latents, text, **fixed)))
                handle.remove()
            slope[number] = (ends[1] - ends[0]) / 2e-2
        proposed = min(words, key=lambda token, slope=slope: float(table[token] @ slope))
        losses = {words[token]: loss_of(words[token]) for token in (start, proposed)}
        winner = min(losses, key=losses.__getitem__)
        assert first.losses == (pytest.approx(losses[winner], rel=1e-4),) and first.words in ((), (winner,))
        better.append(winner != words[start])
    assert any(better) and not all(better)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_in_float16_the_slope_of_a_small_loss_does_not_underflow(v_pipe, own_pipe, whole, monkeypatch):
    """whole: the text encoder computes in float16 too. The loss is divided, as that of a larger model's is."""
    shown, ids = random_pictures(3), torch.tensor(v_pipe.tokenizer("a cat on the grass").input_ids)
    data = [CaptionedLatents(encode_images(v_pipe, shown), torch.zeros(1, 1), 4)]
    batch = next(sample_batches(v_pipe, data, seed=0))
    monkeypatch.setattr(prompt_attack, "denoising_loss", lambda *given, **noisy: denoising_loss(*given, **noisy) / 256)

    def slope(pipe, dtype):
        copy = Denoiser(frozen_copy(pipe.unet, dtype, gradients=True), pipe.scheduler)
        return prompt_attack._slope(pipe, copy, ids, 2, batch)

    exact = slope(v_pipe, torch.float32)
    if whole:
        own_pipe.to(torch.float16)
        batch = replace(batch, latents=batch.latents.half(), noise=batch.noise.half())
    rough = slope(own_pipe, torch.float16)
    assert rough.dtype == torch.float32 and torch.allclose(rough, exact, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_a_slope_that_is_not_finite_is_refused(v_pipe, monkeypatch):
    monkeypatch.setattr(prompt_attack, "denoising_loss", lambda *given, **noisy: denoising_loss(*given, **noisy) * 1e40)
    with pytest.raises(ConeslabError, match="the gradient is not finite, of a U-Net in torch.float32"):
        attack_prompt(v_pipe, random_pictures(1), rounds=1, batch_size=1, dtype=torch.float32)


@pytest.mark.slow
def test_an_attack_on_a_compiled_pipeline_is_that_on_others(v_pipe, monkeypatch):
    shown, options = random_pictures(2), {"tokens": 1, "rounds": 1, "candidates": 2, "batch_size": 2}
    plain = attack_prompt(v_pipe, shown, **options)
    monkeypatch.setattr(v_pipe, "unet", torch.compile(v_pipe.unet, backend="eager"))
    assert attack_prompt(v_pipe, shown, **options) == plain


def test_an_attack_without_room_or_words_is_refused(v_pipe):
    with pytest.raises(ArgumentError, match="no room for 9 words"):
        attack_prompt(v_pipe, random_pictures(1), "a cat", tokens=9)
    with pytest.raises(ArgumentError, match="no word of the vocabulary is left"):
        attack_prompt(v_pipe, random_pictures(1), exclude=list(words_of(v_pipe).values()))


def test_the_world_knows_what_else_a_class_is_called():
    assert words_for("cat") == {
        "other words": ("kitten", "kitty"),
        "hypernym": ("pet",),
        "exemplar": ("felix", "mascot"),
    }
    assert words_for("rodent") == {"second sense": ("mouse",)}
    probes = class_probes("cat", "dog", pictures=2)
    kinds = {probe.name: probe.kind for probe in probes}
    assert kinds["hypernym"] == kinds["exemplar"] == kinds["inpainting"] == kinds["completion from 0.5"] == SILENT
    assert kinds[PLAIN] == kinds["two objects"] == kinds["inpainting, by name"] == kinds["prompt attack"] == NAMED
    assert kinds["Textual Inversion"] == kinds["fine-tuning back"] == TAUGHT and len(kinds) == len(probes)
    two = next(probe for probe in probes if probe.name == "two objects")
    assert two.prompts[0] == "a cat and a car" and two.contexts[0] == "{} and a car"
    unseen = {probe.name for probe in style_probes("twemoji", "3d", "cat", pictures=2)}
    assert {"inpainting", "completion from 0.7", PLAIN, "prompt attack, without its word"} <= unseen


def test_real_pictures_show_the_class_where_the_mask_says():
    shown, masks = class_pictures("apple", 6, styles=("flat", "3d"), seed=3)
    assert len(shown) == len(masks) == 6 and all(one.size == (64, 64) for one in shown)
    assert all(mask.dtype == bool and 100 < mask.sum() < 64 * 64 for mask in masks)
    assert shown == class_pictures("apple", 6, styles=("flat", "3d"), seed=3)[0]
    for name in CLASSES:
        assert class_pictures(name, 1, styles="3d")[0] if drawings_of(name, "3d") else True


# --- what they say together -----------------------------------------------------------------------------


def counted(**found: tuple[int, int]) -> Profile:
    """A profile from numbers of pictures of 24 that show it now, and before."""
    kinds = {"plain": NAMED, "misspelled": NAMED, "completion": SILENT, "inpainting": SILENT, "taught": TAUGHT}
    names = {"plain": PLAIN}
    shares = {
        names.get(name, name): (kinds[name], [i < now for i in range(24)], [i < before for i in range(24)])
        for name, (now, before) in found.items()
    }
    return Profile.counted(shares)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({"plain": (20, 24), "completion": (0, 20)}, "not gone"),
        ({"plain": (0, 24), "completion": (12, 20)}, "avoiding"),
        ({"plain": (0, 24), "completion": (0, 20), "inpainting": (0, 0)}, "removing"),
        ({"plain": (0, 24), "completion": (0, 20), "taught": (24, 24)}, "removing"),  # teaching it again says nothing
        ({"plain": (0, 24), "completion": (0, 20), "misspelled": (24, 24)}, "removing"),  # nor do other words with it
        ({"plain": (0, 24), "completion": (2, 20)}, "undecided"),  # 2 of 24: up to 0.26
        ({"plain": (0, 24), "completion": (0, 1)}, "undecided"),  # it never worked
        ({"plain": (0, 0), "completion": (0, 1), "taught": (9, 9)}, "never there"),
    ],
)
def test_the_verdict_follows_from_counts(found, verdict):
    assert counted(**found).verdict == verdict


def test_a_probe_finds_what_is_above_its_floor_and_the_margin():
    shares = share_interval([1.0] * 12 + [0.0] * 12)
    finding = Finding("completion", SILENT, shares.estimate, shares.low, shares.high, 1.0, 0.9, 1.0)
    plain = Finding(PLAIN, NAMED, 0.0, 0.0, 0.1, 1.0, 0.9, 1.0)
    assert shares.low == pytest.approx(0.314, abs=1e-3)
    assert Profile((plain, finding), 0.3).found_by == ("completion",) and not Profile((plain, finding), 0.32).found_by
    floors = {"completion": 0.2}
    assert Profile((plain, finding), 0.1, floors).found_by == ("completion",)
    assert not Profile((plain, finding), 0.12, floors).found_by
    unsure = Finding("inpainting", SILENT, 0.0, 0.0, 0.1, 0.4, 0.05, 0.75)  # before, it might have found nothing, too
    assert Profile((plain, unsure), 0.1).blind == ("inpainting",) and not Profile((plain, unsure), 0.04).blind
    control = Profile((finding,))
    assert profile.floors_of(control) == {"completion": 1.0}
    assert "avoiding" in repr(Profile((plain, finding)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Probe("x", True), "needs prompts, or a way to draw"),
        (lambda: Probe("x", True, ("a",), draw=lambda *_: []), "needs prompts, or a way to draw"),
        (lambda: asking("x", ["a", "b"], uses_word=True, contexts=["{}", "{}", "{}"]), "3 contexts and 2 prompts"),
        (lambda: profile.completing(random_pictures(1), 0), "level"),
        (lambda: profile.inpainting(random_pictures(2), [np.ones((16, 16), bool)]), "give as many of each"),
        (lambda: profile.usual_probes("a cat", "a dog", random_pictures(1), word="car"), "which 'a cat' does not hold"),
        (lambda: Profile.of(None), "no report with probes"),
    ],
)
def test_bad_probes_are_refused(make, said):
    with pytest.raises(ConeslabError, match=said):
        make()


@pytest.mark.parametrize(
    "mask",
    [None, np.ones((8, 8), bool), np.zeros((16, 16), bool), np.ones((16, 16)), np.ones((16, 16, 1), bool), "x"],
    ids=["none", "size", "nothing hidden", "floats", "channels", "text"],
)
def test_a_mask_that_does_not_fit_is_refused(v_pipe, mask):
    with pytest.raises(ArgumentError, match="masks"):
        filled_in(v_pipe, random_pictures(1), [mask], **FEW)


def test_every_setting_is_one_of_all_probes(v_pipe):
    settings = ProbeSettings(sampler_steps=2, guidance_scale=2.0, seed=3, batch_size=2)
    assert same(stirred(v_pipe, "a cat", settings), stirred(v_pipe, "a cat", settings.record()), most=0)
    with pytest.raises(ConeslabError, match="not a setting of probe"):
        completions(v_pipe, random_pictures(1), steps=3)
    with pytest.raises(ArgumentError, match="leaves at least one step"):
        completions(v_pipe, random_pictures(1), level=0.1, **FEW)
    assert KINDS == (NAMED, SILENT, TAUGHT)


def test_probes_that_train_show_no_progress_bars(v_pipe, capsys):
    """They are measured by the hundred, in tables and where no progress was asked for."""
    shown = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    quick = {"steps": 1, "batch_size": 2}
    for probe in (profile.inverting(shown, **quick), profile.retraining(shown, "a cat", **quick)):
        assert len(probe.draw(v_pipe, 1, ProbeSettings(sampler_steps=1, guidance_scale=1.0))) == 1
    assert capsys.readouterr().err == ""

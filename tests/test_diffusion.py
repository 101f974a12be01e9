"""Noising, targets, loss and samplers, against diffusers' schedulers and independently written formulas."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from transformers import BatchFeature

from coneslab import diffusion
from coneslab.diffusion import encoding
from coneslab.diffusion.sampling import timestep_pairs
from coneslab.errors import ArgumentError, ConeslabError, ConeslabWarning
from coneslab.finetuning import generate_once

N = 3


@pytest.fixture
def batch(v_pipe: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (N, *diffusion.latent_shape(v_pipe))
    latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return latents, noise, torch.tensor([3, 500, 999])


def test_add_noise_and_targets_agree_with_diffusers(v_pipe, batch):
    latents, noise, times = batch
    theirs = v_pipe.scheduler
    torch.testing.assert_close(
        diffusion.add_noise(theirs, latents, noise, times), theirs.add_noise(latents, noise, times)
    )
    torch.testing.assert_close(
        diffusion.target(theirs, latents, noise, times), theirs.get_velocity(latents, noise, times)
    )


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_an_exact_prediction_gives_back_latents_and_noise(batch, kind):
    latents, noise, _ = batch
    scheduler = DDIMScheduler(prediction_type=kind)
    times = torch.full((N,), 400)
    noisy = diffusion.add_noise(scheduler, latents, noise, times)
    clean, error = diffusion.clean_and_noise(scheduler, noisy, diffusion.target(scheduler, latents, noise, times), 400)
    torch.testing.assert_close(clean, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(error, noise, rtol=1e-4, atol=1e-4)


def test_an_unknown_prediction_type_is_refused(batch):
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ConeslabError, match="'flow'.*expected"):
        diffusion.target(scheduler, *batch)


def test_snr_is_signal_over_noise(v_pipe):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # "scaled_linear", by hand
    abar = np.cumprod(1 - betas)
    ours = diffusion.snr(v_pipe, torch.tensor([0, 250, 999])).numpy()
    np.testing.assert_allclose(ours, (abar / (1 - abar))[[0, 250, 999]], rtol=1e-3)


@pytest.mark.parametrize("name", ["v_pipe", "epsilon_pipe"])
def test_the_loss_is_the_mean_square_of_what_is_missed(request, name):
    pipe = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(1)
    shape = (N, *diffusion.latent_shape(pipe))
    latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    times = torch.tensor([10, 400, 900])
    text = diffusion.encode_prompts(pipe, ["a cat", "a dog", "a car"])
    abar = pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    with torch.no_grad():
        predicted = pipe.unet(abar.sqrt() * latents + (1 - abar).sqrt() * noise, times, text).sample
    wanted = noise if name == "epsilon_pipe" else abar.sqrt() * noise - (1 - abar).sqrt() * latents
    by_hand = ((predicted - wanted) ** 2).numpy().reshape(N, -1).mean(1)
    given = {"noise": noise, "timesteps": times}
    with torch.no_grad():
        each = diffusion.denoising_loss(pipe, latents, text, reduction="none", **given)
        mean = diffusion.denoising_loss(pipe, latents, text, **given)
        weights = torch.tensor([1.0, 0.0, 2.0])
        weighted = diffusion.denoising_loss(pipe, latents, text, weights=weights, **given)
    np.testing.assert_allclose(each.numpy(), by_hand, rtol=1e-4)
    np.testing.assert_allclose(mean.item(), by_hand.mean(), rtol=1e-4)
    np.testing.assert_allclose(weighted.item(), (by_hand * [1, 0, 2]).mean(), rtol=1e-4)


def test_the_loss_draws_from_its_generator_alone(v_pipe, batch):
    text = diffusion.encode_prompts(v_pipe, "a cat")
    with torch.no_grad():
        first, second = (
            diffusion.denoising_loss(v_pipe, batch[0], text, generator=torch.Generator().manual_seed(7))
            for _ in range(2)
        )
        other = diffusion.denoising_loss(v_pipe, batch[0], text, generator=torch.Generator().manual_seed(8))
    assert first == second != other


def test_the_loss_refuses_what_does_not_fit(v_pipe, batch):
    latents, noise, times = batch
    two = diffusion.encode_prompts(v_pipe, ["a cat", "a dog"])
    with pytest.raises(ConeslabError, match="3 latents and 2 text embeddings"):
        diffusion.denoising_loss(v_pipe, latents, two)
    with pytest.raises(ConeslabError, match=r"expected \(3, 4, 8, 8\)"):
        diffusion.denoising_loss(v_pipe, latents, two[:1], noise=noise[:2], timesteps=times)


def test_prompts_are_encoded_as_the_pipeline_does(v_pipe):
    prompts = ["a cat on the grass", "a very long list " * 9]
    theirs, _ = v_pipe.encode_prompt(prompts, "cpu", 1, False)
    ours = diffusion.encode_prompts(v_pipe, prompts)
    torch.testing.assert_close(ours, theirs.detach())


def test_prompt_gradients_only_where_the_text_encoder_learns(v_pipe):
    weight = v_pipe.text_encoder.get_input_embeddings().weight
    learning = {p: p.requires_grad for p in v_pipe.text_encoder.parameters()}
    try:
        v_pipe.text_encoder.requires_grad_(False)
        assert not diffusion.encode_prompts(v_pipe, "a cat").requires_grad
        weight.requires_grad_(True)
        assert diffusion.encode_prompts(v_pipe, "a cat").requires_grad
    finally:
        for parameter, state in learning.items():
            parameter.requires_grad_(state)


def test_pictures_that_are_enlarged_are_told(v_pipe):
    small, large = (np.zeros((2, size, size, 3), np.uint8) for size in (8, 16))
    with pytest.warns(ConeslabWarning, match=r"2 of 2 pictures are enlarged, from 8 x 8 .* 16 x 16.*resolution=16"):
        diffusion.encode_images(v_pipe, small)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConeslabWarning)
        diffusion.encode_images(v_pipe, large)
        diffusion.encode_images(v_pipe, np.zeros((1, 12, 30, 3), np.uint8))


def test_latents_are_scaled_and_do_not_depend_on_the_batch(v_pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    at_once, in_parts = (diffusion.encode_images(v_pipe, pixels, batch_size=size) for size in (5, 2))
    torch.testing.assert_close(at_once, in_parts, rtol=1e-4, atol=1e-5)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        by_hand = v_pipe.vae.encode(x).latent_dist.mean * 0.5  # the fixture's scaling factor
    torch.testing.assert_close(at_once, by_hand, rtol=1e-4, atol=1e-5)
    pictures = [Image.fromarray(p) for p in pixels]
    torch.testing.assert_close(diffusion.encode_images(v_pipe, pictures), at_once, rtol=1e-4, atol=1e-5)
    drawn = diffusion.encode_images(v_pipe, pixels, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(drawn, at_once)


def test_wrong_images_are_refused(v_pipe):
    with pytest.raises(ConeslabError, match="numbers from 300 to 300: give uint8"):
        diffusion.encode_images(v_pipe, np.full((1, 16, 16, 3), 300.0))
    with pytest.raises(ConeslabError, match="no images"):
        diffusion.encode_images(v_pipe, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v_pipe", "epsilon_pipe"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ddim_gives_what_the_pipeline_gives(request, name, guidance_scale):
    pipe = request.getfixturevalue(name)
    noise = diffusion.start_noise(pipe, [0, 1])
    text, empty = (diffusion.encode_prompts(pipe, p) for p in (["a cat", "a dog"], ""))
    seen: list[tuple[int, int]] = []
    ours = diffusion.ddim_sample(
        pipe,
        text,
        noise,
        empty_embeddings=empty,
        sampler_steps=10,
        guidance_scale=guidance_scale,
        callback=lambda state: seen.append((state["step"], state["timestep"])),
    )
    theirs = pipe(
        ["a cat", "a dog"],
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert [i for i, _ in seen] == list(range(10)) and seen[0][1] > seen[-1][1]


def test_a_width_for_each_block_is_a_width(own_pipe):
    """As in the configs of some U-Nets of Stable Diffusion."""
    text, empty = (diffusion.encode_prompts(own_pipe, [prompt]) for prompt in ("a cat", ""))
    noise, options = diffusion.start_noise(own_pipe, 0), {"empty_embeddings": empty, "sampler_steps": 2}
    before = diffusion.ddim_sample(own_pipe, text, noise, **options)
    width = own_pipe.unet.config.cross_attention_dim
    own_pipe.unet.register_to_config(cross_attention_dim=[width] * len(own_pipe.unet.config.down_block_types))
    assert torch.equal(diffusion.ddim_sample(own_pipe, text, noise, **options), before)
    assert diffusion.denoising_loss(own_pipe, before, text).isfinite()


def test_ddim_from_pure_noise_with_zero_terminal_snr(v_pipe):
    """Trailing steps on a schedule that ends in noise alone, as the shipped model has."""
    kept = v_pipe.scheduler
    v_pipe.scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    try:
        noise = diffusion.start_noise(v_pipe, [5])
        ours = diffusion.ddim_sample(
            v_pipe, diffusion.encode_prompts(v_pipe, "a cat"), noise, sampler_steps=5, guidance_scale=1.0
        )
        theirs = v_pipe("a cat", num_inference_steps=5, guidance_scale=1.0, latents=noise, output_type="latent").images
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    finally:
        v_pipe.scheduler = kept


@pytest.mark.parametrize("name", ["v_pipe", "epsilon_pipe"])
def test_ddpm_gives_what_the_ddpm_scheduler_gives(request, name):
    pipe, kept = request.getfixturevalue(name), request.getfixturevalue(name).scheduler
    pipe.scheduler = DDPMScheduler.from_config(kept.config, clip_sample=False, steps_offset=0)
    try:
        noise, text = diffusion.start_noise(pipe, [2]), diffusion.encode_prompts(pipe, "a car")
        ours = diffusion.ddpm_sample(
            pipe, text, noise, sampler_steps=8, guidance_scale=1.0, generator=torch.Generator().manual_seed(3)
        )
        pipe.scheduler.set_timesteps(8)
        x, generator = noise, torch.Generator().manual_seed(3)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                out = pipe.unet(x, t, text).sample
                x = pipe.scheduler.step(out, t, x, generator=generator).prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4)
    finally:
        pipe.scheduler = kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler])
def test_a_step_is_one_however_often_its_scheduler_calls_the_network(v_pipe, monkeypatch, kind):
    own, ended = timestep_pairs(v_pipe, 10), []
    changed = {"timestep_spacing": "leading", "skip_prk_steps": True}
    monkeypatch.setattr(v_pipe, "scheduler", kind.from_config(v_pipe.scheduler.config, **changed))
    assert timestep_pairs(v_pipe, 10) == own and len(own) == 10
    assert len(v_pipe.scheduler.timesteps) > 10
    text, noise = diffusion.encode_prompts(v_pipe, "a cat"), diffusion.start_noise(v_pipe, 0)
    diffusion.ddim_sample(
        v_pipe, text, noise, sampler_steps=3, callback=lambda s: ended.append((s["step"], s["steps"]))
    )
    assert ended == [(0, 3), (1, 3), (2, 3)]


def test_timesteps_that_round_to_the_same_are_one_step(v_pipe, monkeypatch):
    changed = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    monkeypatch.setattr(v_pipe, "scheduler", HeunDiscreteScheduler.from_config(v_pipe.scheduler.config, **changed))
    pairs = timestep_pairs(v_pipe, 100)
    assert all(t > after for t, after in pairs) and pairs[-1][1] == -1
    seen: list[dict] = []
    text, noise = diffusion.encode_prompts(v_pipe, "a cat"), diffusion.start_noise(v_pipe, 0)
    pairs = timestep_pairs(v_pipe, 6)
    diffusion.ddim_sample(v_pipe, text, noise, sampler_steps=6, callback=seen.append)
    assert {state["steps"] for state in seen} == {len(seen)} == {len(pairs)}


def test_a_picture_depends_on_its_own_seed_only(v_pipe):
    prompts = ["a cat", "a dog", "a car"]
    together = diffusion.generate(v_pipe, prompts, seed=5, sampler_steps=4)
    apart = diffusion.generate(v_pipe, prompts, seed=5, sampler_steps=4, batch_size=2)
    third = diffusion.generate(v_pipe, "a car", seed=7, sampler_steps=4)[0]
    for a, b in [*zip(together, apart, strict=True), (together[2], third)]:
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1
    assert np.asarray(together[0]).shape == (16, 16, 3)


def test_generate_calls_back_and_refuses_nothing(v_pipe):
    seen: list[dict] = []
    diffusion.generate(v_pipe, "a cat", sampler_steps=3, callback=seen.append)
    assert [(state["step"], state["steps"]) for state in seen] == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(ConeslabError, match="no prompts"):
        diffusion.generate(v_pipe, [])
    with pytest.raises(ConeslabError, match="steps is 0"):
        diffusion.generate(v_pipe, "a cat", sampler_steps=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EulerAncestralDiscreteScheduler, DDPMScheduler, LCMScheduler])
def test_noise_that_a_scheduler_adds_is_not_the_start_noise_again(v_pipe, monkeypatch, kind):
    monkeypatch.setattr(v_pipe, "scheduler", kind.from_config(v_pipe.scheduler.config))
    made = diffusion.generate(v_pipe, ["a cat", "a dog"], seed=[5, 9], sampler_steps=4, dtype=v_pipe.unet.dtype)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    noise = torch.stack([torch.randn(diffusion.latent_shape(v_pipe), generator=each) for each in generators])
    added = [torch.randn(noise.shape[1:], generator=each.clone_state()) for each in generators]
    assert not any(torch.equal(*both) for both in zip(noise, added, strict=True))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "generator": generators}
    expected = v_pipe(["a cat", "a dog"], **options).images
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))
    alone = diffusion.generate(v_pipe, "a dog", seed=9, sampler_steps=4, dtype=v_pipe.unet.dtype)[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(made[1], int)).max() <= 1


def test_guidance_below_one_and_a_negative_prompt_without_guidance_are_refused(v_pipe):
    for scale in (0, 0.0, 0.99):
        with pytest.raises(ArgumentError, match=rf"guidance_scale is {scale}: give 1 for no guidance, or more"):
            diffusion.generate(v_pipe, "a cat", guidance_scale=scale, sampler_steps=1)
    with pytest.raises(ArgumentError, match="negative_prompt is 'a dog', but guidance_scale is 1, .*a scale above 1"):
        diffusion.generate(v_pipe, "a cat", guidance_scale=1, negative_prompt="a dog", sampler_steps=1)
    options = {"sampler_steps": 1, "guidance_scale": 1.5}
    plain, other = (diffusion.generate(v_pipe, "a cat", negative_prompt=n, **options) for n in (None, "a dog"))
    assert not np.array_equal(plain[0], other[0])


class BlackingOut:
    """A safety checker that flags the pictures with these numbers, as diffusers' own makes them black."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __call__(self, images, clip_input):
        flagged = [number in self.numbers for number in range(len(images))]
        return images * (1 - torch.tensor(flagged, dtype=images.dtype))[:, None, None, None], flagged


@pytest.mark.slow
def test_pictures_that_a_safety_checker_makes_black_are_no_drawings(own_pipe):
    options = {"seed": 3, "sampler_steps": 1}
    expected = diffusion.generate(own_pipe, ["a cat", "a dog"], **options)
    own_pipe.feature_extractor = lambda pictures, return_tensors: BatchFeature(
        {"pixel_values": torch.zeros(len(pictures), 3, 8, 8)}
    )
    own_pipe.safety_checker = BlackingOut()  # flags nothing
    assert diffusion.generate(own_pipe, ["a cat", "a dog"], **options) == expected
    own_pipe.safety_checker = BlackingOut(1)
    said = r"made 1 of 2 pictures black: 'a dog' \(seed 4\). Set pipe.safety_checker = None"
    for draw in (diffusion.generate, generate_once):
        with pytest.raises(ConeslabError, match=said):
            draw(own_pipe, ["a cat", "a dog"], **options)
    own_pipe.safety_checker = BlackingOut(*range(5))
    with pytest.raises(ConeslabError, match=r"5 of 5 pictures black: .*\(seed 2\), …\. Set"):
        diffusion.generate(own_pipe, ["a cat"] * 5, sampler_steps=1)
    own_pipe.safety_checker = None
    assert list(generate_once(own_pipe, ["a cat", "a dog"], **options)) == expected  # nothing black was kept


def test_decoding_inverts_scaling(v_pipe):
    latents = torch.randn(2, *diffusion.latent_shape(v_pipe), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = v_pipe.vae.decode(latents / 0.5).sample
    by_hand = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    made = np.stack([np.asarray(p) for p in diffusion.decode_latents(v_pipe, latents)])
    assert np.abs(made.astype(int) - by_hand.astype(int)).max() <= 1


def test_pixels_are_rounded_and_cut_as_the_pipeline_itself_does_it(v_pipe):
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs = np.stack([np.asarray(p) for p in v_pipe.image_processor.postprocess(pixels, output_type="pil")])
    assert np.array_equal(encoding.to_uint8(pixels), theirs)
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(encoding.to_uint8(encoding.to_tensor(every)), every)
    ends = np.stack([np.zeros((2, 1, 3), np.uint8), np.full((2, 1, 3), 255, np.uint8)])
    assert encoding.to_tensor(ends).shape == (2, 3, 2, 1) and encoding.to_tensor(ends)[:, 0, 0, 0].tolist() == [-1, 1]

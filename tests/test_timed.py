"""Edits that are on during a part of the sampling, against loops that put them on and take them off by hand."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from test_blocks import mask, state, token_edit, weight_delta
from test_edits import Turned

from coneslab.diffusion.encoding import encode_prompts
from coneslab.diffusion.loss import denoising_loss
from coneslab.diffusion.precision import frozen_copy
from coneslab.diffusion.sampling import generate, guided_between, start_noise
from coneslab.diffusion.steps import share_of, within
from coneslab.edits import Combined, applied, compress
from coneslab.edits.tokens import TokenEdit, embedding_of, vocabulary_fingerprint
from coneslab.edits.weights import WeightDelta, model_fingerprint
from coneslab.errors import ArgumentError, ConeslabError, MismatchError
from coneslab.measure import record_attention
from coneslab.neurons.union import TunedNeurons

PROMPT = "a sks cat <new>"


def large(pipe) -> WeightDelta:
    """A weight change that can be seen: elsewhere than in keys and values, too."""
    torch.manual_seed(7)
    chosen = [(name, one) for name, one in pipe.unet.named_parameters() if "attn2.to_" in name and one.ndim == 2]
    return WeightDelta({name: torch.randn(one.shape) for name, one in chosen}, model_fingerprint(pipe))


def small(pipe):
    return mask(pipe).to("binary").at("sks", "cat")


EDITS = {
    "weights": large,
    "low rank": lambda pipe: compress(large(pipe), energy=0.9),
    "mask": mask,
    "tuned mask": lambda pipe: TunedNeurons(mask(pipe), np.full(3, 3.0, np.float32)),
    "mask at words": small,
    "token": token_edit,
    "known token": lambda pipe: token_edit(pipe, "sks"),
    "combined": lambda pipe: Combined((token_edit(pipe), large(pipe), small(pipe))),
    "of one's own": lambda pipe: Turned(0.5),
}


def draw(pipe, prompts=PROMPT, *, steps=4, guidance_scale=3.0, **options):
    prompts = [prompts] if isinstance(prompts, str) else prompts
    options = {"latents": start_noise(pipe, range(len(prompts))), **options}
    return pipe(
        prompts, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="latent", **options
    ).images


def by_hand(pipe, edits, dose=1.0, prompt=PROMPT):
    """A DDIM loop that puts edits on for the steps that are named, with the text as it is then."""
    x = start_noise(pipe, [0])
    pipe.scheduler.set_timesteps(4)
    for step, t in enumerate(pipe.scheduler.timesteps):
        with contextlib.ExitStack() as stack, torch.no_grad():
            for edit, on in edits.items():
                stack.enter_context(edit.applied(pipe, dose if step in on else 0.0))
            text = torch.cat([encode_prompts(pipe, ""), encode_prompts(pipe, prompt)])
            empty, conditional = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
        x = pipe.scheduler.step(empty + 3.0 * (conditional - empty), t, x).prev_sample
    return x


@pytest.mark.slow
@pytest.mark.parametrize("kind", EDITS)
def test_a_timed_edit_is_one_that_is_put_on_and_taken_off_by_hand(v_pipe, kind):
    edit, before = EDITS[kind](v_pipe), state(v_pipe)
    with edit.applied(v_pipe, 0.0):
        without = draw(v_pipe)
    for shares, on in (((0.0, 0.5), (0, 1)), ((0.3, 0.9), (1, 2)), ((0.5, 1.0), (2, 3)), ((0.9, 0.95), ())):
        with applied(edit, v_pipe, steps=shares):  # timesteps 751, 501, 251, 1: shares 0.248, 0.498, 0.748, 0.998
            found, again = draw(v_pipe), draw(v_pipe)
        assert torch.allclose(found, by_hand(v_pipe, {edit: on}), atol=1e-4), shares
        assert torch.equal(found, again) and state(v_pipe) == before
        assert torch.equal(found, without) == (not on)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EDITS)
def test_in_all_steps_it_is_the_plain_edit_and_a_dose_is_a_dose(v_pipe, kind):
    edit = EDITS[kind](v_pipe)
    with edit.applied(v_pipe, 0.5):
        plain = draw(v_pipe)
    with applied(edit, v_pipe, 0.5, steps=(0.0, 1.0)):
        assert torch.equal(draw(v_pipe), plain)
    with applied(edit, v_pipe, 0.5, steps=(0.0, 0.999)):
        assert torch.equal(draw(v_pipe), plain)
    with applied(edit, v_pipe, 0.5, steps=(0.0, 0.3)):
        found = draw(v_pipe)
    assert torch.allclose(found, by_hand(v_pipe, {edit: (0,)}, 0.5), atol=1e-4)


def test_between_calls_of_the_network_nothing_is_changed(v_pipe):
    edit, seen = large(v_pipe), []
    weights = dict(v_pipe.unet.named_parameters())
    own = {name: weights[name].detach().clone() for name in edit.deltas}

    def look(pipe, step, timestep, tensors):
        seen.append(all(torch.equal(weights[name], one) for name, one in own.items()))
        return tensors

    with edit.applied(v_pipe, steps=(0.0, 0.9)):
        draw(v_pipe, callback_on_step_end=look)
    assert seen == [True] * 4


@pytest.mark.slow
def test_generate_and_plain_calls_draw_alike_in_several_calls_and_batches(v_pipe):
    prompts = ["a sks cat", "a <new> dog", "a <new> sks"]
    for edit in (token_edit(v_pipe), large(v_pipe), Combined((token_edit(v_pipe), small(v_pipe)))):
        with applied(edit, v_pipe, steps=(0.4, 1.0)):
            drawn = [generate(v_pipe, prompts, sampler_steps=4, batch_size=size) for size in (3, 2, 1)]
            single = [
                v_pipe(one, num_inference_steps=4, guidance_scale=3.0, latents=start_noise(v_pipe, [i])).images[0]
                for i, one in enumerate(prompts)
            ]
        for pictures in (*drawn, single):
            difference = np.stack(pictures).astype(int) - np.stack(drawn[0]).astype(int)
            assert abs(difference).max() <= 1


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, EulerDiscreteScheduler])
def test_the_share_is_that_of_each_call_whatever_the_sampler(own_pipe, kind):
    own_pipe.scheduler = kind.from_config(own_pipe.scheduler.config)
    edit, seen, now = large(own_pipe), [], []
    weight = dict(own_pipe.unet.named_parameters())[next(iter(edit.deltas))]
    own = weight.detach().clone()
    own_pipe.unet.register_forward_pre_hook(lambda _, args: now.append(float(args[1])))
    own_pipe.unet.conv_in.register_forward_pre_hook(lambda *_: seen.append((now[-1], not torch.equal(weight, own))))
    with applied(edit, own_pipe, steps=(0.0, 0.6)):
        draw(own_pipe, "a cat", steps=3)
    assert len(seen) == (5 if kind is HeunDiscreteScheduler else 3)
    for timestep, is_on in seen:
        assert is_on == (1 - (timestep + 1) / 1000 < 0.6), timestep


@pytest.mark.slow
def test_a_run_from_a_picture_begins_where_its_noise_is(v_pipe):
    redraw = StableDiffusionImg2ImgPipeline(**v_pipe.components, requires_safety_checker=False)
    redraw.set_progress_bar_config(disable=True)
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))

    def drawn(pipe):
        options = {"strength": 0.4, "num_inference_steps": 5, "generator": torch.Generator().manual_seed(0)}
        return redraw("a sks cat", image=start, output_type="np", **options).images

    for pipe in (v_pipe, redraw):
        for edit in (large(pipe), token_edit(pipe, "sks")):
            plain = drawn(pipe)
            with edit.applied(pipe):
                whole = drawn(pipe)
            with applied(edit, pipe, steps=(0.0, 0.5)):  # the first timestep is 201, at a share of 0.798
                assert np.array_equal(drawn(pipe), plain)
            with applied(edit, pipe, steps=(0.5, 1.0)):
                assert np.array_equal(drawn(pipe), whole)
            with applied(edit, pipe, steps=(0.9, 1.0)):
                assert not np.array_equal(drawn(pipe), whole) and not np.array_equal(drawn(pipe), plain)


# --- several --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_blocks_nest_and_act_in_the_order_they_were_entered(v_pipe):
    first, second = TunedNeurons(mask(v_pipe), np.full(3, 3.0, np.float32)), large(v_pipe)
    before = state(v_pipe)
    with first.applied(v_pipe), second.applied(v_pipe):
        both = draw(v_pipe, "a sks cat")
    with applied(first, v_pipe, steps=(0.0, 0.999)), applied(second, v_pipe, steps=(0.0, 0.9999)):
        assert torch.equal(draw(v_pipe, "a sks cat"), both)
    with applied(first, v_pipe, steps=(0.0, 0.6)), applied(second, v_pipe, steps=(0.4, 1.0)):
        found = draw(v_pipe, "a sks cat")
    assert torch.allclose(found, by_hand(v_pipe, {first: (0, 1), second: (1, 2, 3)}, prompt="a sks cat"), atol=1e-4)
    assert state(v_pipe) == before


def test_two_tokens_enter_each_in_its_own_part(v_pipe):
    one, two = token_edit(v_pipe, "<one>"), token_edit(v_pipe, "sks")
    prompt = "a <one> sks"
    with applied(one, v_pipe, steps=(0.0, 0.6)), applied(two, v_pipe, steps=(0.4, 1.0)):
        found = draw(v_pipe, prompt)
    assert torch.allclose(found, by_hand(v_pipe, {one: (0, 1), two: (1, 2, 3)}, prompt=prompt), atol=1e-4)


@pytest.mark.slow
def test_a_text_is_that_of_the_edit_that_is_on_and_not_of_one_before_it(v_pipe):
    """Within a block that stays, others come and go, each perhaps at the address of the one before."""
    vectors = torch.randn(6, 1, embedding_of(v_pipe).weight.shape[1], generator=torch.Generator().manual_seed(0))
    words = [TokenEdit(("<new>",), vector, vocabulary_fingerprint(v_pipe)) for vector in vectors]
    expected = []
    for word in words:
        with applied(word, v_pipe, steps=(0.0, 0.9)):
            expected.append(draw(v_pipe))
    zeros = {name: torch.zeros_like(one) for name, one in large(v_pipe).deltas.items()}
    nothing = WeightDelta(zeros, model_fingerprint(v_pipe))
    with applied(nothing, v_pipe, steps=(0.0, 0.5)):
        for word, own in zip(words, expected, strict=True):
            with applied(word, v_pipe, steps=(0.0, 0.9)):
                assert torch.equal(draw(v_pipe), own)


@pytest.mark.slow
def test_blocks_that_are_left_in_another_order_stop_in_turn(v_pipe):
    first, second = large(v_pipe), token_edit(v_pipe, "sks")
    plain, before = draw(v_pipe), state(v_pipe)
    one, two = applied(first, v_pipe, steps=(0.0, 0.5)), applied(second, v_pipe, steps=(0.0, 0.5))
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    left = draw(v_pipe)
    with applied(second, v_pipe, steps=(0.0, 0.5)):
        pass
    two.__exit__(None, None, None)
    with applied(second, v_pipe, steps=(0.0, 0.5)):
        assert torch.equal(draw(v_pipe), left)
    assert torch.equal(draw(v_pipe), plain) and state(v_pipe) == before


def test_guidance_in_an_interval_and_recorded_attention_act_as_elsewhere(v_pipe):
    edit = token_edit(v_pipe, "sks")
    with applied(edit, v_pipe, steps=(0.0, 0.4)), record_attention(v_pipe) as maps:
        found = draw(v_pipe)
    with applied(edit, v_pipe, steps=(0.0, 0.4)), guided_between(v_pipe, 0.0, 1.0):
        assert torch.equal(draw(v_pipe), found)
    with record_attention(v_pipe) as outer, applied(edit, v_pipe, steps=(0.0, 0.4)):
        assert torch.equal(draw(v_pipe), found)
    assert maps.pictures == outer.pictures == 1 and maps.timesteps() == outer.timesteps() == (751, 501, 251, 1)
    assert maps.indices("sks") == outer.indices("sks") == [2]


@pytest.mark.slow
def test_a_compiled_pipeline_draws_the_same(own_pipe):
    edit = Combined((token_edit(own_pipe), large(own_pipe)))
    with applied(edit, own_pipe, steps=(0.0, 0.5)):
        expected = draw(own_pipe)
    own_pipe.unet = torch.compile(own_pipe.unet, backend="eager")
    own_pipe.text_encoder = torch.compile(own_pipe.text_encoder, backend="eager")
    with applied(edit, own_pipe, steps=(0.0, 0.5)):
        assert torch.equal(draw(own_pipe), expected)


# --- refused --------------------------------------------------------------------------------------------

WRONG = [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.1), (0.3,), 0.3, "ab", (0.0, float("nan")), (0, 0.5, 1), [1, 5]]


@pytest.mark.parametrize("steps", WRONG)
def test_shares_that_are_none_are_refused(v_pipe, steps):
    edit = token_edit(v_pipe)
    for put_on in (lambda: applied(edit, v_pipe, steps=steps), lambda: edit.applied(v_pipe, steps=steps)):
        with pytest.raises(ArgumentError, match=r"share of the schedule \(steps\) is .*: give two shares in order"):
            put_on()
    with pytest.raises(ArgumentError):
        applied(None, v_pipe, steps=steps)


def test_another_model_is_refused_before_anything_is_done(v_pipe, epsilon_pipe):
    before = state(epsilon_pipe)
    for edit in (mask(v_pipe), token_edit(v_pipe), weight_delta(v_pipe), small(v_pipe)):
        with pytest.raises(MismatchError):
            applied(edit, epsilon_pipe, steps=(0.0, 0.5)).__enter__()
        assert state(epsilon_pipe) == before


def test_texts_whose_words_are_not_known_are_refused(v_pipe):
    text, options = encode_prompts(v_pipe, ["a sks cat"]), {"num_inference_steps": 2, "guidance_scale": 1.0}
    with applied(token_edit(v_pipe, "sks"), v_pipe, steps=(0.0, 0.9)):
        with pytest.raises(ConeslabError, match="words of this text are not known: give prompts as text"):
            v_pipe(prompt_embeds=2 * text, **options)
    with applied(large(v_pipe), v_pipe, steps=(0.0, 0.9)):
        v_pipe(prompt_embeds=2 * text, **options)


def test_timesteps_on_both_sides_are_refused(v_pipe):
    latents, text = start_noise(v_pipe, [0, 1]), encode_prompts(v_pipe, ["a cat", "a dog"])
    with applied(large(v_pipe), v_pipe, steps=(0.0, 0.5)):
        for timesteps in ([900, 800], [100, 200]):
            denoising_loss(v_pipe, latents, text, noise=latents, timesteps=torch.tensor(timesteps))
        with pytest.raises(ConeslabError, match="one batch lie within and without: call the U-Net with one timestep"):
            denoising_loss(v_pipe, latents, text, noise=latents, timesteps=torch.tensor([900, 200]))


def test_a_copy_of_the_weights_which_would_not_have_it_is_refused(v_pipe):
    with applied(large(v_pipe), v_pipe, steps=(0.0, 0.5)):
        with pytest.raises(ConeslabError, match="at some steps only.*leave that block first"):
            frozen_copy(v_pipe.unet, torch.bfloat16)
    frozen_copy(v_pipe.unet, torch.bfloat16)


def test_shares_divide_the_schedule(v_pipe):
    shares = share_of(v_pipe.scheduler, torch.arange(1000))
    assert shares.min() == 0 and shares.max() < 1 and shares.dtype == torch.float64
    assert share_of(v_pipe.scheduler, 499) == 0.5
    first, second = within(shares, 0.0, 0.5), within(shares, 0.5, 1.0)
    assert (first ^ second).all() and second[499] and not second[500]  # every step in one of them

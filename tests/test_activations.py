"""Activations seen and changed by name, step and half, against hooks set by hand on small untrained pipelines."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from diffusers import (
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from coneslab.diffusion import guided_between, patch, sites, unet_of, watch
from coneslab.diffusion.encoding import encode_prompts
from coneslab.diffusion.sampling import ddim_sample, generate, start_noise
from coneslab.diffusion.unet_sites import chosen_sites
from coneslab.edits import WeightDelta, model_fingerprint
from coneslab.errors import ArgumentError, ConeslabError
from coneslab.measure import record_attention

PROMPTS = ["a sks cat on the grass", "a dog in the city"]
MODULES = {  # in the pipeline `v_pipe`
    "in": "conv_in",
    "down 0 resnet": "down_blocks.0.resnets.0",
    "down 1 cross-attention": "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "mid self-attention": "mid_block.attentions.0.transformer_blocks.0.attn1",
    "mid resnet 1": "mid_block.resnets.1",
    "mid": "mid_block",
    "up 0 feed-forward 1": "up_blocks.0.attentions.1.transformer_blocks.0.ff",
    "up 0 upsampler": "up_blocks.0.upsamplers.0",
    "up 1 transformer 0": "up_blocks.1.attentions.0",
    "out": "conv_out",
}


def draw(pipe, prompts=PROMPTS, *, steps=4, guidance_scale=3.0, seed=0, **options):
    noise = start_noise(pipe, [seed + i for i in range(len(prompts))])
    options = {"output_type": "latent", "latents": noise, **options}
    return pipe(list(prompts), num_inference_steps=steps, guidance_scale=guidance_scale, **options).images


def hooked(pipe, module: str, function, kind="forward_hook"):
    """A hook set by hand, for a `with` block."""
    handle = getattr(pipe.unet.get_submodule(module), f"register_{kind}")(function)
    return contextlib.closing(type("Handle", (), {"close": staticmethod(handle.remove)}))


@pytest.fixture
def scheduled(own_pipe):
    """A pipeline with another scheduler."""

    def with_scheduler(kind, **options):
        own_pipe.scheduler = kind.from_config(own_pipe.scheduler.config, **options)
        return own_pipe

    return with_scheduler


# --- sites ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v_pipe", "epsilon_pipe", "sd_pipe"])
def test_sites_are_in_the_order_they_run_with_the_shapes_they_have(name, request):
    pipe = request.getfixturevalue(name)
    with watch(pipe, "*", steps=0, half="text") as seen:
        draw(pipe, steps=1)
    assert list(seen.sites) == list(sites(pipe))
    assert {site: tuple(seen[site, 0].shape[1:]) for site in seen.sites} == sites(pipe)


@pytest.mark.slow
def test_names_leave_out_a_number_where_there_is_only_one(v_pipe, sd_pipe):
    assert {"down 0 resnet", "mid cross-attention heads", "up 1 resnet 0", "down 0 downsampler"} <= {*sites(v_pipe)}
    assert {"down 2 resnet 1", "down 0 cross-attention 1", "up 0 resnet 2", "mid self-attention"} <= {*sites(sd_pipe)}
    assert not [name for name in sites(sd_pipe) if name.startswith("down 3 ") and "attention" in name]


def test_patterns_choose_sites(v_pipe):
    assert chosen_sites(v_pipe, ["out", "in"]) == ["in", "out"]
    crosses = [f"{block} cross-attention" for block in ("down 0", "down 1", "mid")]
    ups = [f"up {i} cross-attention {j}" for i in (0, 1) for j in (0, 1)]
    assert chosen_sites(v_pipe, "*cross-attention") == crosses + ups
    assert chosen_sites(v_pipe, "up 0 resnet") == ["up 0 resnet 0", "up 0 resnet 1"]
    assert chosen_sites(v_pipe, "down") == ["down 0", "down 1"]
    with pytest.raises(ArgumentError, match="no site is named 'up 1 resnets': .*'up 1 resnet 0'.*lists them all"):
        chosen_sites(v_pipe, ["mid", "up 1 resnets"])


# --- watch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", MODULES)
def test_what_is_kept_is_what_the_module_handed_on(v_pipe, site):
    outputs = []
    with hooked(v_pipe, MODULES[site], lambda _, __, output: outputs.append(output)):
        with watch(v_pipe, site) as seen:
            draw(v_pipe)
    for step, output in enumerate(outputs):
        output = output if isinstance(output, torch.Tensor) else output[0]
        assert torch.equal(seen[site, step, "empty"], output[:2]) and torch.equal(seen[site, step, "text"], output[2:])
    assert len(outputs) == 4 and seen[site].shape[:2] == (4, 2)


def test_heads_are_what_the_last_projection_of_an_attention_mixes(v_pipe):
    inputs, where = [], "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0"
    with hooked(v_pipe, where, lambda _, args: inputs.append(args[0]), "forward_pre_hook"):
        with watch(v_pipe, "up 1 cross-attention 1 heads", half="text") as seen:
            draw(v_pipe)
    heads = seen["up 1 cross-attention 1 heads", 2]
    assert heads.shape == (2, 2, 64, 8)
    assert torch.equal(heads[:, 1], inputs[2][2:, :, 8:])


def test_watching_changes_no_bit_and_leaves_nothing(v_pipe):
    before = draw(v_pipe)
    with watch(v_pipe, "*") as seen:
        assert torch.equal(draw(v_pipe), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in v_pipe.unet.modules())
    kept = seen.nbytes
    draw(v_pipe)
    assert seen.nbytes == kept == sum(tensor.nbytes for tensor in seen.values())


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, [0, 1, 2, 3]), (2, [2]), ([0, 3], [0, 3]), (range(2), [0, 1]), ((0.0, 0.5), [0, 1]), ((0.5, 1), [2, 3])],
)
def test_steps_are_chosen_by_number_or_share(v_pipe, chosen, expected):
    with watch(v_pipe, "mid", steps=chosen) as seen:
        draw(v_pipe)
    assert list(seen.steps) == expected  # timesteps 751, 501, 251 and 1: shares of 0.248, 0.498, 0.748 and 0.998
    assert seen.timesteps == {step: float(v_pipe.scheduler.timesteps[step]) for step in expected}


def test_without_guidance_all_is_text(v_pipe):
    with watch(v_pipe, "mid") as seen:
        draw(v_pipe, guidance_scale=1.0)
    assert seen.halves == ("text",) and seen["mid", 0].shape[0] == 2
    with watch(v_pipe, "mid") as both:
        draw(v_pipe)
    assert torch.allclose(both["mid", 0, "text"], seen["mid", 0, "text"], atol=1e-5)
    assert not torch.allclose(both["mid", 0, "empty"], seen["mid", 0, "text"], atol=1e-3)
    with pytest.raises(ArgumentError, match="half is 'empty', which was not kept of 'mid': there is text"):
        seen["mid", 0, "empty"]


def test_the_same_noise_twice_is_not_taken_for_guidance(v_pipe):
    with watch(v_pipe, "mid") as seen:
        draw(v_pipe, guidance_scale=1.0, latents=start_noise(v_pipe, [0, 0]))
    assert seen.halves == ("text",) and seen.pictures == 2


def test_guidance_in_an_interval_has_the_texts_half_everywhere(v_pipe):
    with watch(v_pipe, "mid") as whole:
        draw(v_pipe)
    with guided_between(v_pipe, 0.0, 0.3), watch(v_pipe, "mid") as seen:
        draw(v_pipe)
    assert seen["mid", :, "text"].shape[0] == 4 and seen["mid", :, "empty"].shape[0] == 1
    assert torch.allclose(seen["mid", 1, "text"], whole["mid", 1, "text"], atol=1e-5)


def test_halves_that_are_drawn_one_after_the_other_belong_to_one_run(v_pipe):
    text, empty, noise = encode_prompts(v_pipe, PROMPTS), encode_prompts(v_pipe, ""), start_noise(v_pipe, [0, 1])
    with watch(v_pipe, "mid") as seen:
        ddim_sample(v_pipe, text, noise, empty_embeddings=empty, sampler_steps=4)
    with watch(v_pipe, "mid") as together:
        draw(v_pipe)
    for half in ("text", "empty"):
        assert torch.allclose(seen["mid", :, half], together["mid", :, half], atol=1e-4)


def test_pictures_are_numbered_over_batches_and_calls(v_pipe):
    prompts = [*PROMPTS, "a car"]
    with watch(v_pipe, "mid") as seen:
        generate(v_pipe, prompts, sampler_steps=2, batch_size=2)
        generate(v_pipe, "the beach", seed=9, sampler_steps=2)
    with watch(v_pipe, "mid") as alone:
        generate(v_pipe, prompts[2], seed=2, sampler_steps=2)
    assert seen["mid", 1, "text"].shape[0] == seen.pictures == 4
    assert torch.allclose(seen["mid", 1, "text"][2], alone["mid", 1, "text"][0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [(HeunDiscreteScheduler, {}), (KDPM2AncestralDiscreteScheduler, {}), (PNDMScheduler, {"skip_prk_steps": True})],
)
def test_samplers_that_call_the_network_twice_count_each_call(scheduled, kind, options):
    pipe = scheduled(kind, **options)
    with watch(pipe, "mid") as seen:
        for _ in range(2):
            draw(pipe, steps=3)
    times = [float(one) for one in pipe.scheduler.timesteps] if kind is PNDMScheduler else None
    assert seen.pictures == 4 and seen.steps == tuple(range(len(seen.timesteps)))
    assert len(seen.steps) == {PNDMScheduler: 4}.get(kind, 5)
    assert times is None or list(seen.timesteps.values()) == times


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_a_run_that_starts_from_a_picture_has_the_later_steps(v_pipe, kind):
    pipe = kind(**v_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = {"image": picture(), "strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
    if kind is StableDiffusionInpaintPipeline:
        given |= {"mask_image": Image.new("L", (16, 16), 255), "height": 16, "width": 16}
    draws = {"generator": torch.Generator().manual_seed(0)}
    before = pipe("a cat", **given, **draws).images
    for owner in (pipe, v_pipe):  # of the same networks
        with watch(owner, "mid", half="both") as seen:
            after = pipe("a cat", **given, generator=torch.Generator().manual_seed(0)).images
        assert np.array_equal(before, after) and seen.steps == (2, 3, 4) and seen.halves == ("text", "empty")
    with patch(pipe, "mid", lambda kept: 0 * kept, steps=2):
        assert not np.array_equal(pipe("a cat", **given, generator=torch.Generator().manual_seed(0)).images, before)
    with patch(pipe, "mid", lambda kept: 0 * kept, steps=[0, 1]):
        assert np.array_equal(pipe("a cat", **given, generator=torch.Generator().manual_seed(0)).images, before)


def test_the_keys_of_what_was_kept(v_pipe):
    with watch(v_pipe, ["mid", "up 1*"], steps=[1, 3]) as seen:
        assert repr(seen) == "Activations(nothing kept yet)"
        with pytest.raises(ConeslabError, match="nothing was kept: was a picture drawn"):
            seen["mid"]
        draw(v_pipe)
    number = len(chosen_sites(v_pipe, ["mid", "up 1*"]))
    assert repr(seen).startswith(f"Activations({number} sites: mid, up 1 resnet 0, up 1 self-attention 0 heads, …; ")
    assert repr(seen).endswith(f"steps 1, 3; text and empty; 2 pictures; {seen.nbytes / 2**20:.1f} MiB)")
    assert ("mid", 1, "text") in seen and "mid" in seen and "in" not in seen and len(seen) == number * 2 * 2
    assert torch.equal(seen["mid", -1], seen["mid", 3, "text"])
    assert torch.equal(seen["mid", 2:], seen["mid", 3][None])
    for key, said in (
        ("in", "site is 'in': choose one of mid"),
        (("mid", 0), "step is 0: choose one of 1, 3"),
        (("mid", "1"), "step is '1': give a whole number"),
        (("mid", slice(2, 3)), "no step is left of 1, 3"),
        (("mid", 1, "both"), "half is 'both': choose one of text, empty"),
        (("mid", 1, "text", 0), "give a site, a step and a half"),
        (3, "site is 3"),
    ):
        with pytest.raises(ArgumentError, match=said):
            seen[key]


def test_runs_of_different_schedules_are_told_apart(v_pipe):
    with watch(v_pipe, "mid", steps=[0, 1]) as seen:
        draw(v_pipe, steps=2)
        draw(v_pipe, steps=4)
    with pytest.raises(ConeslabError, match="step 0 is timestep 501 in one run and 751 in run 1: watch runs of diff"):
        seen["mid", 0]


def test_a_step_that_the_schedule_does_not_have_is_refused_when_it_is_known(v_pipe):
    for block in (watch(v_pipe, "mid", steps=[0, 4]), patch(v_pipe, "mid", lambda kept: kept, steps=4)):
        with pytest.raises(ConeslabError, match="step 4 was asked for, and the schedule has 4, numbered from 0"):
            with block:
                draw(v_pipe)


def test_memory_is_bounded_and_told_after_the_first_step(v_pipe):
    with watch(v_pipe, "mid") as seen:
        draw(v_pipe)
    each, passes = seen.nbytes // 4, []
    with watch(v_pipe, "mid", max_bytes=4 * each):
        draw(v_pipe)
    with pytest.raises(ConeslabError, match="by the end of this run, more than max_bytes=.*choose fewer sites, steps"):
        with watch(v_pipe, "mid", max_bytes=4 * each - 1), hooked(v_pipe, "conv_in", lambda *_: passes.append(1)):
            draw(v_pipe)
    assert len(passes) == 1
    with watch(v_pipe, "mid", steps=[0, 3], max_bytes=2 * each):
        draw(v_pipe)
    with watch(v_pipe, "mid", dtype=torch.bfloat16, half="text", max_bytes=each) as seen:
        draw(v_pipe)
    assert seen["mid"].dtype == torch.bfloat16


# --- patch ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("half", ["text", "empty", "both"])
@pytest.mark.parametrize("site", MODULES)
def test_a_patch_is_what_a_hook_set_by_hand_does(v_pipe, site, half):
    rows = {"text": slice(2, 4), "empty": slice(2), "both": slice(4)}[half]
    calls = []

    def by_hand(module, args, output):
        calls.append(1)
        if len(calls) not in (2, 3):
            return None
        hidden, *skips = output if isinstance(output, tuple) else (output,)
        hidden[rows] = hidden[rows] * 2 + 1  # in place, so also where a block hands it on besides
        return (hidden, *skips) if isinstance(output, tuple) else hidden

    with hooked(v_pipe, MODULES[site], by_hand):
        expected = draw(v_pipe)
    with patch(v_pipe, site, lambda given: given * 2 + 1, steps=[1, 2], half=half):
        assert torch.equal(draw(v_pipe), expected)
    assert not torch.equal(draw(v_pipe), expected)


def test_a_down_blocks_output_is_changed_on_its_skip_connections_too(v_pipe):
    def by_hand(module, args, output):
        output[0].zero_()

    for block in ("down_blocks.0", "down_blocks.1"):
        with hooked(v_pipe, block, by_hand):
            expected = draw(v_pipe)
        with patch(v_pipe, block.replace("_blocks.", " "), torch.zeros_like, half="both"):
            assert torch.equal(draw(v_pipe), expected)


def test_a_head_that_is_shut_is_one_whose_weights_are_zero(v_pipe):
    weight = v_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_out[0].weight
    kept = weight.detach().clone()
    try:
        weight.data[:, 16:] = 0
        expected = draw(v_pipe)
    finally:
        weight.data.copy_(kept)

    def shut(heads):
        assert heads.shape == (2, 2, 16, 16)
        return heads * torch.tensor([1.0, 0.0])[:, None, None]

    with patch(v_pipe, "mid cross-attention heads", shut, half="both"):
        assert torch.allclose(draw(v_pipe), expected, atol=1e-5)


def test_a_patch_that_changes_nothing_changes_no_bit(v_pipe):
    before = draw(v_pipe)
    with patch(v_pipe, "*", lambda given: given, half="both"):
        assert torch.equal(draw(v_pipe), before)


@pytest.mark.parametrize("wrong", [lambda given: given[:1], lambda given: None, lambda given: given.sum(), lambda _: 3])
def test_a_result_of_another_shape_is_refused_and_nothing_is_left(v_pipe, wrong):
    with pytest.raises(
        ConeslabError, match=r"patches 'mid' returned .*: return a tensor of the shape .*\(2, 32, 4, 4\)"
    ):
        with patch(v_pipe, "mid", wrong):
            draw(v_pipe)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in v_pipe.unet.modules())


def test_without_guidance_there_is_no_empty_half(v_pipe):
    before = draw(v_pipe, guidance_scale=1.0)
    with patch(v_pipe, "mid", torch.zeros_like, half="empty"):
        assert torch.equal(draw(v_pipe, guidance_scale=1.0), before)
    with patch(v_pipe, "mid", torch.zeros_like):
        assert not torch.equal(draw(v_pipe, guidance_scale=1.0), before)


def test_what_was_watched_can_be_put_in_place(v_pipe):
    with watch(v_pipe, ["mid", "out"]) as seen:
        source = draw(v_pipe)
    other = draw(v_pipe, ["a car", "a house"])
    with patch(v_pipe, "out", seen, half="both"):  # all that the sampler sees
        assert torch.equal(draw(v_pipe, ["a car", "a house"]), source)
    with patch(v_pipe, "mid", seen, steps=[1]):
        changed = draw(v_pipe, ["a car", "a house"])
    assert not torch.equal(changed, other)
    with patch(v_pipe, "mid", lambda given: seen["mid", 1, "text"], steps=1):
        assert torch.equal(draw(v_pipe, ["a car", "a house"]), changed)


@pytest.mark.slow
def test_pictures_that_were_watched_go_into_those_of_the_same_number(v_pipe):
    with watch(v_pipe, "out") as seen:
        source = generate(v_pipe, [*PROMPTS, "a car"], sampler_steps=2, dtype=torch.float32)
    with patch(v_pipe, "out", seen, half="both"):
        drawn = generate(v_pipe, ["the city"] * 3, sampler_steps=2, batch_size=2)
        assert drawn == source
        with pytest.raises(ConeslabError, match="for the pictures from 3 on, this run has .*as many as are drawn"):
            generate(v_pipe, "a fourth", sampler_steps=2)
    with watch(v_pipe, "mid", steps=0) as one:
        draw(v_pipe, PROMPTS[:1])
    kept = one["mid", 0, "text"]
    with patch(v_pipe, "mid", lambda given: kept.expand_as(given), steps=0):
        expected = draw(v_pipe)
    with patch(v_pipe, "mid", one):  # where it holds something: the first step
        assert torch.equal(draw(v_pipe), expected)
    with pytest.raises(ArgumentError, match="step is 1: choose one of 0"), patch(v_pipe, "mid", one, steps=[0, 1]):
        draw(v_pipe)
    with pytest.raises(ArgumentError, match="out: not watched; these activations have mid"):
        patch(v_pipe, ["mid", "out"], one)


def test_patches_and_watches_nest(v_pipe):
    with watch(v_pipe, "mid", half="text") as before:
        with patch(v_pipe, "mid", lambda given: given + 1), patch(v_pipe, "mid", lambda given: 2 * given):
            with watch(v_pipe, "mid", half="text") as after:
                draw(v_pipe, steps=1)
    assert torch.equal(after["mid", 0], 2 * (before["mid", 0] + 1))


def test_edits_and_recorded_attention_act_as_elsewhere(v_pipe):
    name, weight = next(
        (n, w) for n, w in v_pipe.unet.named_parameters() if n.endswith("mid_block.resnets.0.conv1.bias")
    )
    edit = WeightDelta({name: torch.ones_like(weight)}, model_fingerprint(v_pipe))
    with edit.applied(v_pipe), watch(v_pipe, "mid") as edited:
        draw(v_pipe)
    with watch(v_pipe, "mid") as plain, record_attention(v_pipe) as maps:
        before = draw(v_pipe)
    with patch(v_pipe, "*cross-attention", torch.zeros_like), record_attention(v_pipe) as other:
        draw(v_pipe)
    assert not torch.equal(edited["mid", 0], plain["mid", 0]) and maps.pictures == other.pictures == 2
    first = maps.layers[0]
    assert torch.equal(maps.layer(first)[0], other.layer(first)[0])  # the first attention of the first step
    assert not torch.equal(maps.layer(first)[-1], other.layer(first)[-1])
    assert torch.equal(draw(v_pipe), before)


@pytest.mark.slow
def test_a_compiled_pipeline_is_watched_and_patched(own_pipe):
    expected = draw(own_pipe)
    with patch(own_pipe, "mid", torch.zeros_like):
        patched = draw(own_pipe)
    whole = own_pipe.unet
    for compiled in (lambda: torch.compile(whole, backend="eager"), lambda: whole.compile(backend="eager") or whole):
        own_pipe.unet = compiled()
        with watch(own_pipe, "mid") as seen:
            assert torch.equal(draw(own_pipe), expected)
        with patch(own_pipe, "mid", torch.zeros_like):
            assert torch.equal(draw(own_pipe), patched)
        assert seen.pictures == 2 and unet_of(own_pipe) is whole

"""Frozen copies draw what the pipeline draws, faster, and leave it as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from coneslab import record_attention
from coneslab.diffusion import precision
from coneslab.diffusion.precision import bfloat16_pays, drawing, frozen_copy, is_plain
from coneslab.diffusion.sampling import generate
from coneslab.finetuning import generate_once


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(float)


def test_a_rough_twin_draws_nearly_the_same(v_pipe):
    own = generate(v_pipe, ["a cat", "a car"], sampler_steps=3, dtype=torch.float32)
    rough = generate(v_pipe, ["a cat", "a car"], sampler_steps=3, dtype=torch.bfloat16)
    other = generate(v_pipe, ["a cat", "a car"], sampler_steps=3, seed=9, dtype=torch.float32)
    assert 0 < np.abs(pixels(rough) - pixels(own)).mean() < 0.1 * np.abs(pixels(other) - pixels(own)).mean()


def test_in_its_own_precision_a_pipeline_draws_as_it_always_does(v_pipe):
    from coneslab.diffusion.sampling import start_noise

    own = generate(v_pipe, "a cat", sampler_steps=3, dtype=torch.float32)[0]
    plain = v_pipe("a cat", num_inference_steps=3, guidance_scale=3.0, latents=start_noise(v_pipe, [0])).images[0]
    assert np.array_equal(np.asarray(own), np.asarray(plain))


def test_the_unet_is_back_after_the_block_whatever_happens(v_pipe):
    unet = v_pipe.unet
    with drawing(v_pipe, torch.bfloat16) as pipe:
        assert pipe is v_pipe and pipe.unet is not unet and pipe.unet.dtype == torch.bfloat16
    assert v_pipe.unet is unet
    with pytest.raises(KeyboardInterrupt), drawing(v_pipe, torch.bfloat16):
        raise KeyboardInterrupt
    assert v_pipe.unet is unet and unet.dtype == torch.float32


def test_edits_are_drawn_and_hooks_are_heard(own_pipe, monkeypatch):
    """A copy is made of the weights as they are; a U-Net that somebody listens to draws itself."""
    monkeypatch.setattr(precision, "bfloat16_pays", lambda device: True)
    before = pixels(generate(own_pipe, "a cat", sampler_steps=2))
    weight = next(w for name, w in own_pipe.unet.named_parameters() if name.endswith("attn2.to_v.weight"))
    weight.data.mul_(-4)
    assert np.abs(pixels(generate(own_pipe, "a cat", sampler_steps=2)) - before).mean() > 0.5
    with record_attention(own_pipe) as maps:
        assert not is_plain(own_pipe.unet)
        generate(own_pipe, "a cat", sampler_steps=2)
    assert maps.token("cat").shape and is_plain(own_pipe.unet)
    heard = []
    handle = own_pipe.unet.conv_in.register_forward_hook(lambda *_: heard.append(1))
    generate(own_pipe, "a cat", sampler_steps=2)
    handle.remove()
    assert len(heard) == 2


@pytest.mark.slow
def test_a_twin_for_gradients_computes_the_same(v_pipe):
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 12, 24)
    with torch.no_grad():
        expected = v_pipe.unet(x, t, encoder_hidden_states=text).sample
        for gradients in (False, True):
            made = frozen_copy(v_pipe.unet, torch.float32, gradients=gradients)(x, t, encoder_hidden_states=text).sample
            assert torch.allclose(made, expected, atol=1e-5)


def test_copies_of_a_unet_are_apart_from_each_other(v_pipe):
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 12, 24)
    first = frozen_copy(v_pipe.unet, torch.float32, gradients=True)
    first.conv_in.weight = torch.nn.Parameter(torch.zeros_like(first.conv_in.weight))
    first.mid_block.register_forward_hook(lambda *_: pytest.fail("the hook of another copy was called"))
    second = frozen_copy(v_pipe.unet, torch.float32)
    with torch.no_grad():
        made, expected = (unet(x, t, encoder_hidden_states=text).sample for unet in (second, v_pipe.unet))
    assert torch.equal(made, expected) and not second.training
    kinds = [{type(used).__name__ for used in unet.attn_processors.values()} for unet in (first, second)]
    assert kinds == [{"AttnProcessor"}, {"AttnProcessor2_0"}]


def test_bfloat16_pays_on_the_device_that_is_asked_about_without_emulation(monkeypatch):
    """A T4 (7.5) emulates bfloat16, which `torch.cuda.is_bf16_supported` counts; the current device is another one."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (9, 0))[device.index])
    assert [bfloat16_pays(torch.device("cuda", index)) for index in (0, 1)] == [False, True]
    monkeypatch.setattr(torch.version, "hip", "6.2")  # whose capabilities are numbered otherwise
    assert bfloat16_pays(torch.device("cuda", 0))


def test_without_a_gpu_bfloat16_does_not_pay_on_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not bfloat16_pays(torch.device("cuda"))


@pytest.mark.slow
def test_freeu_is_drawn_by_a_copy_too(own_pipe):
    def drawn(dtype):
        return pixels(generate(own_pipe, "a cat", sampler_steps=2, dtype=dtype))

    plain, kept = drawn(torch.float32), generate_once(own_pipe, "a cat", sampler_steps=2)
    own_pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)
    assert generate_once(own_pipe, "a cat", sampler_steps=2) != kept
    own, rough = drawn(torch.float32), drawn(torch.bfloat16)
    assert 0 < np.abs(rough - own).mean() < 0.1 * np.abs(plain - own).mean()
    own_pipe.unet.fuse_qkv_projections()
    own_pipe.unet.unfuse_qkv_projections()  # leaves parts that the copy lacks
    assert np.array_equal(drawn(torch.bfloat16), rough)
    own_pipe.disable_freeu()
    assert np.array_equal(drawn(torch.float32), plain)
    assert 0 < np.abs(drawn(torch.bfloat16) - plain).mean() < 0.1 * np.abs(plain - own).mean()


@pytest.mark.slow
def test_a_copy_for_gradients_checkpoints_activations_as_the_unet_does(own_pipe):
    """With FreeU as well, which writes into activations; the gradient is that without checkpoints."""
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 12, 24, requires_grad=True)
    own_pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)
    called = []

    def checkpoint(module, *args):
        called.append(module)
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=False)

    def gradient(unet):
        return torch.autograd.grad(unet(x, t, encoder_hidden_states=text).sample.square().mean(), text)[0]

    whole = gradient(frozen_copy(own_pipe.unet, torch.float32, gradients=True))
    assert torch.allclose(whole, gradient(own_pipe.unet), atol=1e-6)
    own_pipe.unet.enable_gradient_checkpointing(checkpoint)
    made = frozen_copy(own_pipe.unet, torch.float32, gradients=True)
    assert not called and torch.allclose(gradient(made), whole, atol=1e-6)
    assert called and {id(module) for module in called} <= {id(module) for module in made.modules()}
    own_pipe.unet.disable_gradient_checkpointing()
    assert not frozen_copy(own_pipe.unet, torch.float32, gradients=True).is_gradient_checkpointing


@pytest.mark.slow
def test_a_copy_is_given_the_timestep_as_it_is(v_pipe, own_pipe):
    """Euler's timesteps are floats, and 999 is 1000 in bfloat16."""
    text, x = torch.randn(1, 12, 24), torch.randn(1, 4, 8, 8)
    made, told = frozen_copy(v_pipe.unet, torch.bfloat16), []
    made.time_proj.register_forward_pre_hook(lambda module, args: told.append(args[0].double()))
    t = torch.tensor(999.0)
    made(x, t, text), made(x, t, encoder_hidden_states=text), made(sample=x, timestep=t, encoder_hidden_states=text)
    assert [float(one) for one in told] == [999.0] * 3
    own_pipe.scheduler = EulerDiscreteScheduler.from_config(own_pipe.scheduler.config, timestep_spacing="linspace")
    told.clear()
    with drawing(own_pipe, torch.bfloat16) as pipe:
        pipe.unet.time_proj.register_forward_pre_hook(lambda module, args: told.append(float(args[0].flatten()[0])))
        pipe("a cat", num_inference_steps=4)
    assert told == [float(one) for one in own_pipe.scheduler.timesteps] == [999.0, 666.0, 333.0, 0.0]


@pytest.mark.slow
def test_a_compiled_unet_is_copied_as_it_was(v_pipe):
    made = frozen_copy(torch.compile(v_pipe.unet, backend="eager"), torch.float32)
    assert type(made) is type(v_pipe.unet) and made.conv_in.weight.data_ptr() == v_pipe.unet.conv_in.weight.data_ptr()

"""Frozen copies draw what the pipeline draws, faster, and leave it as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coneslab import record_attention
from coneslab.diffusion import precision
from coneslab.diffusion.precision import drawing, frozen_copy, is_plain
from coneslab.diffusion.sampling import generate


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

"""What tests share: a change is detected, named, and undone for later tests."""

import copy

import pytest
import torch
from sharing import PIPELINE, SHARED, Shared
from small_pipelines import make_pipeline


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("own"), widths=(8, 8), down_blocks=("DownBlock2D",) * 2)


def hooked(pipe):
    hook = pipe.vae.register_forward_hook(lambda *_: None)
    return hook.remove


def spoken(pipe):
    whole = pipe.tokenizer
    pipe.tokenizer = copy.copy(whole)
    return lambda: setattr(pipe, "tokenizer", whole)


def trained(pipe):
    pipe.unet.train()
    return pipe.unet.eval


def asked(pipe):
    pipe.text_encoder.requires_grad_(False)
    return pipe.text_encoder.requires_grad_


def gradients(pipe):
    pipe.unet.conv_in.bias.grad = torch.zeros_like(pipe.unet.conv_in.bias)


@torch.no_grad()
def nudged(pipe):
    pipe.unet.conv_in.bias[0] += 1e-6


CHANGES = {
    hooked: "vae has hooks",
    spoken: "tokenizer",
    trained: "unet is set to train",
    asked: "ask for gradients",
    gradients: "gradients are left",
    nudged: "unet.conv_in.bias",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_change_is_named(own, change):
    shared = Shared(own, {name: getattr(own, name) for name in PIPELINE})
    assert shared.changes() == []
    undo = change(own)
    (told,) = shared.changes()
    assert CHANGES[change] in told
    (undo or shared.restore)()
    assert shared.changes() == []


def test_a_test_that_is_given_a_pipeline_is_watched(v_pipe, judge, request):
    assert {"v_pipe", "judge"} <= SHARED.keys() & {*request.fixturenames}
    assert "shared_stays_as_it_was" in request.fixturenames

"""Baselines: only the right weights are trained, closed forms against solvers, interruptions leave no trace."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from coneslab.diffusion.encoding import encode_prompts
from coneslab.diffusion.kvspace import KVSpace
from coneslab.diffusion.loss import denoising_loss
from coneslab.diffusion.pipelines import fingerprint
from coneslab.edits.base import Combined, Edit, load_edit
from coneslab.edits.low_rank import LowRankDelta, compress
from coneslab.edits.tokens import (
    LearnedText,
    TokenEdit,
    embedding_of,
    start_vector,
    vocabulary_fingerprint,
    with_tokens,
)
from coneslab.edits.weights import WeightDelta, model_fingerprint
from coneslab.errors import ConeslabError, FileFormatError, MismatchError
from coneslab.finetuning.kv_gradient import KVGradient
from coneslab.finetuning.samples import concept_latents, sample_batches
from coneslab.methods import (
    ablate,
    custom_diffusion,
    dreambooth,
    erase,
    merge,
    merge_matrices,
    scaled_latents,
    textual_inversion,
)
from coneslab.neurons import ConceptNeurons, finetune_kv, finetune_together

FAST = {"steps": 3, "batch_size": 4, "progress": False}
PRIOR = {"prior_batch_size": 0}


@pytest.fixture
def both(pictured):
    """Two subjects with a token of their own each; the second token is new to the tokenizer."""
    dog = {"name": "dog", "class_word": "dog", "token": "<dog*>", "prompt": "a <dog*> dog", "prior_prompt": "a dog"}
    return [pictured, SimpleNamespace(**vars(pictured) | dog)]


# --- tokens ---


def test_a_new_token_is_there_inside_the_block_only(v_pipe):
    plain = encode_prompts(v_pipe, ["a <x> cat", "a cat"])
    width = embedding_of(v_pipe).weight.shape[1]
    edit = TokenEdit(("<x>", "sks"), torch.randn(2, width), vocabulary_fingerprint(v_pipe), initial=("cat", "sks"))
    rows = len(embedding_of(v_pipe).weight)
    with edit.applied(v_pipe) as pipe:
        (ids,) = pipe.tokenizer(["<x>"], add_special_tokens=False).input_ids
        assert ids == [rows] and len(embedding_of(pipe).weight) == rows + 1
        assert torch.equal(embedding_of(pipe).weight[ids[0]], edit.vectors[0])
        own = pipe.tokenizer("sks", add_special_tokens=False).input_ids[0]
        assert torch.equal(embedding_of(pipe).weight[own], edit.vectors[1])
        inside = encode_prompts(v_pipe, ["a <x> cat", "a cat"])
        assert not torch.equal(inside[0], plain[0]) and torch.equal(inside[1], plain[1])
        with edit.applied(v_pipe, dose=0.0):  # nested: dose 0 of the word that is there already
            pass
    assert torch.equal(encode_prompts(v_pipe, ["a <x> cat", "a cat"]), plain)
    with pytest.raises(KeyboardInterrupt), edit.applied(v_pipe):
        raise KeyboardInterrupt
    with edit.applied(v_pipe, dose=0.0):
        assert torch.allclose(embedding_of(v_pipe).weight[rows], start_vector(v_pipe, "cat"))


def test_tokens_that_cannot_be_are_refused(v_pipe):
    for tokens, reason in (
        (["a", "a"], "each once"),
        ([" "], "give words"),
        (["my cat"], "without spaces"),
        (["<|endoftext|>"], "special token"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            with_tokens(v_pipe.tokenizer, tokens)
    wide = TokenEdit(("sks",), torch.zeros(1, 7), vocabulary_fingerprint(v_pipe))
    other = TokenEdit(("sks",), torch.zeros(1, embedding_of(v_pipe).weight.shape[1]), "ab" * 32)
    with pytest.raises(MismatchError, match="7 numbers"), wide.applied(v_pipe):
        pass
    with pytest.raises(MismatchError, match="learned with text encoder abababab"), other.applied(v_pipe):
        pass
    with pytest.raises(ConeslabError, match="a finite one for each"):
        TokenEdit(("sks",), torch.full((1, 7), float("nan")), "ab" * 32)


def their_token(folder, name="<theirs>", width=24):
    """A Textual Inversion file of somebody else."""
    save_file({name: torch.ones(1, width)}, folder / "theirs.safetensors")
    return str(folder / "theirs.safetensors")


def test_tokens_that_were_added_since_do_not_count_against_ones_own(own_pipe, tmp_path):
    edit = TokenEdit(("<x>", "sks"), torch.randn(2, 24), vocabulary_fingerprint(own_pipe), initial=("cat", "sks"))
    with edit.applied(own_pipe):
        expected = encode_prompts(own_pipe, "a <x> sks cat")
    own_pipe.load_textual_inversion(their_token(tmp_path))
    own_pipe.tokenizer.add_tokens(["<more>"])
    own_pipe.text_encoder.resize_token_embeddings(len(own_pipe.tokenizer), pad_to_multiple_of=64)
    assert vocabulary_fingerprint(own_pipe) == edit.fingerprint
    with edit.applied(own_pipe):
        assert torch.equal(encode_prompts(own_pipe, "a <x> sks cat"), expected)
        with TokenEdit("<y>", torch.zeros(1, 24), edit.fingerprint).applied(own_pipe):
            assert torch.equal(encode_prompts(own_pipe, "a <x> sks cat"), expected)
        assert (encode_prompts(own_pipe, "<theirs>") != encode_prompts(own_pipe, "<more>")).any()
    with edit.applied(own_pipe, dose=0.0):  # a spare row of the table means nothing
        (row,) = own_pipe.tokenizer("<x>", add_special_tokens=False).input_ids
        assert torch.equal(embedding_of(own_pipe).weight[row], start_vector(own_pipe, "cat"))


def test_another_text_encoder_is_refused_with_what_differs_also_inside_an_edit(own_pipe):
    edit = TokenEdit("<x>", torch.zeros(1, 24), vocabulary_fingerprint(own_pipe))
    inside = TokenEdit("sks", torch.zeros(1, 24), edit.fingerprint)
    other = TokenEdit("<y>", torch.zeros(1, 24), "ab" * 32)
    with inside.applied(own_pipe):
        assert vocabulary_fingerprint(own_pipe) == edit.fingerprint
        with pytest.raises(MismatchError, match="own 2.. words have other vectors .tokens added to them do not count"):
            other.applied(own_pipe).__enter__()
    with torch.no_grad():
        embedding_of(own_pipe).weight[5, 0] += 1
    with pytest.raises(MismatchError, match="load the model it was learned on"):
        edit.applied(own_pipe).__enter__()
    with edit.applied(own_pipe, check_model=False):
        pass


def test_a_token_of_an_older_file_still_belongs_to_its_model(own_pipe):
    own_pipe.tokenizer.add_tokens(["3d"])
    own_pipe.text_encoder.resize_token_embeddings(len(own_pipe.tokenizer))
    whole = fingerprint({"token_embedding": embedding_of(own_pipe).weight})
    assert whole != vocabulary_fingerprint(own_pipe)
    with TokenEdit("<x>", torch.zeros(1, 24), whole).applied(own_pipe):
        pass


def test_learned_text_is_what_the_pipeline_would_encode(v_pipe):
    captions = ["a <x> cat", "a sks dog", "a cat"]
    text = LearnedText(v_pipe, captions, ["<x>", "sks"])
    vectors = torch.randn(2, embedding_of(v_pipe).weight.shape[1], requires_grad=True)
    with TokenEdit(("<x>", "sks"), vectors, vocabulary_fingerprint(v_pipe)).applied(v_pipe):
        expected = encode_prompts(v_pipe, captions)
    made = text(vectors)
    assert torch.allclose(made, expected, atol=1e-6)
    (slope,) = torch.autograd.grad(made.square().sum(), vectors)
    step = torch.zeros_like(vectors)
    step[1, 3] = 1e-2
    with torch.no_grad():
        numeric = (text(vectors + step).square().sum() - text(vectors - step).square().sum()) / 2e-2
    assert float(slope[1, 3]) == pytest.approx(float(numeric), rel=2e-2, abs=1e-2)
    assert (slope != 0).any(1).all()
    with pytest.raises(ConeslabError, match="<y> occurs in none"):
        LearnedText(v_pipe, captions, ["<x>", "<y>"])
    with pytest.raises(ConeslabError, match="<x> occurs in none of the captions, .* reads 12 tokens"):
        LearnedText(v_pipe, ["a cat " * 5 + "<x>"], ["<x>"])


@pytest.mark.parametrize("size", [1e4, 1.0, 1e-7, 0.0])
def test_gradients_of_any_size_in_the_text_survive_a_text_encoder_in_float16(v_pipe, own_pipe, size):
    own_pipe.text_encoder.load_state_dict(v_pipe.text_encoder.state_dict())
    captions = ["a <x> cat", "a sks dog"]
    exact = LearnedText(v_pipe, captions, ["<x>", "sks"])
    half = LearnedText(own_pipe, captions, ["<x>", "sks"])
    own_pipe.text_encoder.half()
    vectors = torch.randn(2, embedding_of(v_pipe).weight.shape[1], requires_grad=True)
    down, slopes = size * torch.randn(exact(vectors).shape, generator=torch.Generator().manual_seed(0)), []
    for text in (exact, half):
        made = text(vectors)
        assert made.dtype == torch.float32 and torch.allclose(made, exact(vectors), atol=2e-2)
        slopes += torch.autograd.grad((down * made).sum(), vectors)
    assert (slopes[1] - slopes[0]).norm() <= 0.02 * slopes[0].norm()
    with torch.no_grad():
        assert torch.allclose(half(vectors), exact(vectors), atol=2e-2)


# --- gradients in the text ---


def test_the_gradient_in_the_text_is_that_of_the_whole_unet(v_pipe, both):
    pairs = [concept_latents(v_pipe, about, batch_size=3, prior_batch_size=0)[0] for about in both]
    gradient, draw = KVGradient(v_pipe, pairs, dtype=torch.float32), next(sample_batches(v_pipe, pairs, seed=1))
    text = torch.stack([pair.text for pair in pairs]).requires_grad_()
    losses, g_theta, g_text = gradient.gradients(gradient.theta(), text, draw)
    each = denoising_loss(
        v_pipe, draw.latents, text.repeat_interleave(3, 0), noise=draw.noise, timesteps=draw.timesteps, reduction="none"
    )
    total = each[:3].mean() + each[3:].mean()
    expected, *weights = torch.autograd.grad(total, [text, *KVSpace(v_pipe).parameters.values()])
    assert sum(losses) == pytest.approx(float(total.detach()), rel=1e-5)
    assert torch.allclose(g_text, expected, atol=1e-6)
    assert torch.allclose(g_theta, torch.cat([weight.flatten() for weight in weights]), atol=1e-6)
    assert torch.equal(gradient.gradients(gradient.theta(), text, draw, of_theta=False)[2], g_text)
    parts = KVGradient(v_pipe, pairs, dtype=torch.float32, chunk=2).gradients(gradient.theta(), text, draw)
    assert torch.allclose(parts[2], expected, atol=1e-6)


def test_a_masked_loss_is_a_mean_over_places_and_channels(v_pipe):
    torch.manual_seed(0)
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 600])
    text = encode_prompts(v_pipe, ["a cat"])
    options = {"noise": noise, "timesteps": t, "reduction": "none"}
    plain = denoising_loss(v_pipe, latents, text, **options)
    assert torch.allclose(denoising_loss(v_pipe, latents, text, mask=torch.ones(2, 1, 8, 8), **options), plain)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :3, :5] = 1
    from coneslab.diffusion.loss import add_noise, target

    noisy = add_noise(v_pipe.scheduler, latents, noise, t)
    predicted = v_pipe.unet(noisy, t, encoder_hidden_states=text.expand(2, -1, -1))
    error = (predicted.sample - target(v_pipe.scheduler, latents, noise, t)).square()[:, :, :3, :5].mean((1, 2, 3))
    assert torch.allclose(denoising_loss(v_pipe, latents, text, mask=mask, **options), error, rtol=1e-4)


# --- the methods ---


@pytest.mark.slow
def test_textual_inversion_trains_every_token_and_nothing_else(v_pipe, both):
    edit = textual_inversion(v_pipe, both, learning_rate=0.05, **FAST | {"steps": 15}, dtype=torch.float32)
    assert isinstance(edit, Edit) and edit.tokens == ("sks", "<dog*>") and edit.initial == ("cat", "dog")
    for number, word in enumerate(edit.initial):
        assert not torch.allclose(edit.vectors[number], start_vector(v_pipe, word), atol=1e-2)
    assert np.mean(edit.history["loss"][-4:]) < np.mean(edit.history["loss"][:4])
    table, rows = embedding_of(v_pipe).weight.clone(), len(embedding_of(v_pipe).weight)
    own = v_pipe.tokenizer("sks", add_special_tokens=False).input_ids[0]
    with edit.applied(v_pipe):
        others = torch.arange(rows) != own
        assert torch.equal(embedding_of(v_pipe).weight[:rows][others], table[others])


@pytest.mark.slow
@pytest.mark.parametrize("dtype, close", [(None, 2e-2), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_dreambooth_is_gradient_descent_on_the_whole_unet(v_pipe, pictured, dtype, close):
    options = {"batch_size": 4, "prior_batch_size": 0, "learning_rate": 1e-3, "progress": False, "dtype": dtype}
    edit = dreambooth(v_pipe, pictured, steps=1, **options)
    assert edit.deltas.keys() == dict(v_pipe.unet.named_parameters()).keys()
    pairs = concept_latents(v_pipe, pictured, batch_size=4, prior_batch_size=0)
    draw = next(sample_batches(v_pipe, pairs, seed=0))
    loss = denoising_loss(v_pipe, draw.latents, pairs[0].text[None], noise=draw.noise, timesteps=draw.timesteps)
    assert edit.history["loss"][0] == pytest.approx(loss.item(), rel=close)  # by default passes may be in bfloat16
    weights = dict(v_pipe.unet.named_parameters())
    slopes = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
    agree, total = 0, 0
    for name, slope in slopes.items():
        if slope is not None:
            clear = slope.abs() > slope.abs().max() / 10
            agree += int((edit.deltas[name][clear].sign() == -slope[clear].sign()).sum())
            total += int(clear.sum())
    assert agree > 0.98 * total
    longer = dreambooth(v_pipe, pictured, steps=12, **options)
    assert np.mean(longer.history["loss"][-3:]) < np.mean(longer.history["loss"][:3])


@pytest.mark.slow
def test_custom_diffusion_trains_keys_values_and_every_token(v_pipe, both):
    edit = custom_diffusion(v_pipe, both, **FAST, **PRIOR, learning_rate=3e-3)
    token, delta = edit.edits
    assert set(delta.deltas) == set(KVSpace(v_pipe).names)
    assert token.tokens == ("sks", "<dog*>")
    for number, word in enumerate(token.tokens):
        assert (token.vectors[number] != start_vector(v_pipe, word)).all()
    theta = KVSpace(v_pipe).gather()
    with edit.applied(v_pipe):
        moved = KVSpace(v_pipe).gather() - theta
        assert (moved != 0).float().mean() > 0.9
    longer = custom_diffusion(v_pipe, both, batch_size=4, steps=15, progress=False, **PRIOR, learning_rate=3e-3)
    losses = longer.edits[1].history["loss"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.slow
def test_tokens_learn_at_a_rate_of_their_own(v_pipe, both):
    """The first step of AdamW moves every number by its learning rate."""
    options = {**FAST, **PRIOR, "steps": 1, "learning_rate": 1e-3, "weight_decay": 0.0}
    theta, start = KVSpace(v_pipe).gather(), start_vector(v_pipe, "sks")
    for rate, expected in ((None, 1e-3), (2e-2, 2e-2)):
        token, delta = custom_diffusion(v_pipe, both, **options, token_learning_rate=rate).edits
        assert (token.vectors[0] - start).abs().max() == pytest.approx(expected, rel=0.02)
        moved = torch.cat([change.flatten() for change in delta.deltas.values()]).abs()
        assert moved.max() == pytest.approx(1e-3, rel=0.02) and len(moved) == len(theta)


def test_augmentation_says_the_size_in_the_caption_and_masks_the_ground(v_pipe, pictured):
    pairs = scaled_latents(v_pipe, pictured, batch_size=16, small=("small",), large=("huge",), versions=9)
    assert set(pairs) == {"a sks cat", "a small sks cat", "a huge sks cat"}
    assert sum(pair.batch_size for pair in pairs.values()) == 16
    assert sum(pair.weight for pair in pairs.values()) == pytest.approx(1)
    shares = {caption: pair.mask.mean() for caption, pair in pairs.items()}
    assert shares["a huge sks cat"] == 1 and shares["a small sks cat"] < shares["a sks cat"] < 1
    assert all(pair.mask.shape == pair.latents[:, :1].shape for pair in pairs.values())
    assert all((pair.mask.sum((1, 2, 3)) > 0).all() for pair in pairs.values())
    words = {"small_words": ("small",), "large_words": ("huge",)}
    edit = custom_diffusion(v_pipe, pictured, **FAST, **PRIOR, augment=True, **words)
    assert len([name for name in edit.edits[1].history if name != "loss"]) == 3


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"token": ""}, "token is empty"),
        ({"token": "my cat"}, "without spaces"),
        ({"token": "cat"}, "the token 'cat' is a word of 'a cat', which would change with it"),
        ({"prompt": " "}, "prompt is empty"),
        ({"name": ""}, "name is empty"),
        ({"class_word": None}, "class_word is None"),
        ({"images": []}, "got no pictures of the subject 'cat'"),
    ],
)
def test_a_subject_that_cannot_be_learned_is_refused(v_pipe, pictured, changed, reason):
    for method in (textual_inversion, custom_diffusion):
        with pytest.raises(ConeslabError, match=reason):
            method(v_pipe, SimpleNamespace(**vars(pictured) | changed), **FAST)


@pytest.mark.slow
def test_without_a_class_word_a_token_has_to_be_told_what_to_start_from(v_pipe, pictured):
    about = SimpleNamespace(**vars(pictured) | {"class_word": ""})
    with pytest.raises(ConeslabError, match="class_word is empty"):
        textual_inversion(v_pipe, about, **FAST)
    assert textual_inversion(v_pipe, about, initial="dog", **FAST).initial == ("dog",)
    free = textual_inversion(v_pipe, SimpleNamespace(**vars(about) | {"prior_prompt": ""}), initial="", **FAST)
    assert free.initial == ("",)  # the mean of all words
    near = textual_inversion(v_pipe, pictured, initial="", learning_rate=1e-12, **FAST)
    assert torch.allclose(near.vectors[0], embedding_of(v_pipe).weight.mean(0), atol=1e-6)
    with pytest.raises(ConeslabError, match="prior_prompt is empty"):
        custom_diffusion(v_pipe, SimpleNamespace(**vars(pictured) | {"prior_prompt": ""}), **FAST)
    with pytest.raises(ConeslabError, match="got 2 initial words for 1 subjects"):
        textual_inversion(v_pipe, about, initial=["dog", "cat"], **FAST)


@pytest.mark.slow
def test_bad_settings_are_refused(v_pipe, pictured):
    for method in (textual_inversion, dreambooth, custom_diffusion):
        with pytest.raises(ConeslabError, match="positive"):
            method(v_pipe, pictured, steps=0, progress=False)
        with pytest.raises(ConeslabError, match="no subject"):
            method(v_pipe, [])
        if method is not textual_inversion:  # layer norms keep its loss finite at any rate
            with pytest.raises(ConeslabError, match="choose a learning rate below|not finite"):
                method(v_pipe, pictured, **FAST | {"steps": 60}, learning_rate=1e25)
    with pytest.raises(ConeslabError, match="float32 or torch.bfloat16"):
        dreambooth(v_pipe, pictured, **FAST, **PRIOR, dtype=torch.float16)


@pytest.mark.parametrize("rate", [0.0, 0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("method", [textual_inversion, dreambooth, custom_diffusion, finetune_kv])
def test_a_learning_rate_of_nothing_is_not_taken_for_none_given(v_pipe, pictured, method, rate):
    for name in ("learning_rate", *(["token_learning_rate"] if method is custom_diffusion else [])):
        with pytest.raises(ConeslabError, match=f"{name} is"):
            method(v_pipe, pictured, progress=False, **{name: rate})


@pytest.mark.parametrize("method", [textual_inversion, dreambooth, custom_diffusion, finetune_kv])
def test_a_chunk_of_nothing_is_refused_before_pictures_are_drawn(v_pipe, pictured, method, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda *_, **__: pytest.fail("drew pictures"))
    for chunk in (0, -1, 2.5, True):
        with pytest.raises(ConeslabError, match="chunk is"):
            method(v_pipe, pictured, chunk=chunk)


@pytest.mark.slow
def test_dreambooth_takes_a_few_samples_at_a_time(v_pipe, pictured, monkeypatch):
    sizes = []
    forward = type(v_pipe.unet).forward

    def listen(unet, sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(unet, sample, *args, **kwargs)

    options = {**FAST, **PRIOR, "steps": 2, "batch_size": 5, "dtype": torch.float32}
    whole = dreambooth(v_pipe, pictured, **options)
    monkeypatch.setattr(type(v_pipe.unet), "forward", listen)
    parts = dreambooth(v_pipe, pictured, chunk=2, **options)
    assert sizes == [2, 2, 1] * 2
    assert np.allclose(whole.history["loss"], parts.history["loss"], rtol=1e-5)
    for name, delta in whole.deltas.items():
        assert ((delta - parts.deltas[name]).abs() <= 1e-6 + 0.05 * delta.abs()).double().mean() > 0.95, name


@pytest.mark.slow
def test_tokens_start_where_it_is_said(v_pipe, both):
    """An empty word is the mean over all tokens: it is not the same as none given."""
    options = {**FAST, "steps": 1, "learning_rate": 1e-12}
    everything = embedding_of(v_pipe).weight.detach().float().mean(0)
    for initial, expected in (("", everything), ("car", start_vector(v_pipe, "car"))):
        learned = textual_inversion(v_pipe, both, initial=initial, **options)
        tuned = custom_diffusion(v_pipe, both, initial=initial, **options, **PRIOR).edits[0]
        for edit in (learned, tuned):
            assert edit.initial == (initial, initial)
            assert torch.allclose(edit.vectors, expected.expand(2, -1), atol=1e-5)
    own = custom_diffusion(v_pipe, both, **options, **PRIOR).edits[0]
    assert own.initial == tuple(about.token for about in both)
    with pytest.raises(ConeslabError, match="got 1 initial words for 2 subjects"):
        textual_inversion(v_pipe, both, initial=["cat"], **options)


def test_pictures_of_the_class_without_a_part_in_the_loss_are_refused(v_pipe, pictured):
    for options in ({"prior_batch_size": 0}, {"prior_weight": 0.0}):
        with pytest.raises(ConeslabError, match="pictures of the class were given"):
            finetune_kv(v_pipe, pictured, prior=pictured.images, **FAST, **options)


def tune_union(pipe, subject, **options):
    space = KVSpace(pipe)
    mask = ConceptNeurons.from_scale((space.gather() < 0).float(), space.layout, model_fingerprint(pipe))
    return finetune_together(pipe, mask, [subject], **options)


def erase_class(pipe, subject, **options):
    return erase(pipe, "a cat", pictures=2, sampler_steps=1, **options)


def ablate_class(pipe, subject, **options):
    return ablate(pipe, "a cat", "a dog", pictures=2, sampler_steps=1, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        custom_diffusion,
        dreambooth,
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (textual_inversion, finetune_kv, tune_union, erase_class, ablate_class)
        ),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_end(v_pipe, pictured, tmp_path, method, monkeypatch):
    from coneslab.finetuning import loop

    def stop(state):
        if state["step"] == 2:
            raise KeyboardInterrupt

    options = FAST | {"steps": 4} | (PRIOR if method in (dreambooth, custom_diffusion, finetune_kv, tune_union) else {})
    whole = method(v_pipe, pictured, **options)
    monkeypatch.setattr(loop.tune, "__kwdefaults__", {**loop.tune.__kwdefaults__, "checkpoint_every": 0.0})
    file = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        method(v_pipe, pictured, resume=file, callback=stop, **options)
    seen = []
    again = method(v_pipe, pictured, resume=file, callback=lambda state: seen.append(state["step"]), **options)
    assert seen == [2, 3]
    first, second = ([part._pack()[0] for part in getattr(edit, "edits", [edit])] for edit in (whole, again))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    with pytest.raises(MismatchError, match="to another run.*seed was 0, now 5"):
        method(v_pipe, pictured, resume=file, seed=5, **options)
    with pytest.raises(MismatchError, match="holds 4 steps, more than the 3 asked for"):
        method(v_pipe, pictured, resume=file, **options | {"steps": 3})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="checkpoint"):
        method(v_pipe, pictured, resume=file, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", [dreambooth, finetune_kv])
def test_a_run_does_not_resume_on_other_pictures(v_pipe, pictured, tmp_path, method):
    options = FAST | PRIOR | {"resume": tmp_path / "state"}
    method(v_pipe, pictured, **options)
    other = SimpleNamespace(**vars(pictured) | {"images": pictured.images[:1]})
    with pytest.raises(MismatchError, match="to another run.*data was"):
        method(v_pipe, other, **options)


def test_every_edit_comes_back_from_its_file(v_pipe, both, tmp_path):
    edit = custom_diffusion(v_pipe, both, **FAST, **PRIOR)
    for number, one in enumerate([edit, edit.edits[0], compress(edit.edits[1], energy=0.8)]):
        again = load_edit(one.save(tmp_path / str(number)))
        assert type(again) is type(one) and again.nbytes == one.nbytes
        with one.applied(v_pipe):
            first = KVSpace(v_pipe).gather(), encode_prompts(v_pipe, ["a <dog*> dog"])
        with again.applied(v_pipe):
            second = KVSpace(v_pipe).gather(), encode_prompts(v_pipe, ["a <dog*> dog"])
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# --- the closed form ---


def constrained_solution(base, regularised, rows, values):
    """argmin ||W C_reg^T − W0 C_reg^T||^2 subject to W C^T = V^T, by its KKT system, row by row of W."""
    width, k = base.shape[1], len(rows)
    gram = regularised.T @ regularised
    system = torch.zeros(width + k, width + k, dtype=torch.float64)
    system[:width, :width], system[:width, width:], system[width:, :width] = 2 * gram, rows.T, rows
    right = torch.cat([2 * base @ gram, values.T], dim=1)  # (out, width + k)
    return torch.linalg.solve(system, right.T).T[:, :width]


@pytest.mark.parametrize(("width", "out", "k"), [(8, 5, 2), (24, 16, 6), (40, 7, 1)])
def test_the_merge_solves_the_constrained_problem(width, out, k):
    g = torch.Generator().manual_seed(width)
    base, values = (torch.randn(n, m, generator=g, dtype=torch.float64) for n, m in ((out, width), (k, out)))
    regularised, rows = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (3 * width, k))
    merged, ridge = merge_matrices(base, regularised, rows, values)
    assert ridge == 0
    assert torch.allclose(merged, constrained_solution(base, regularised, rows, values), atol=1e-9)
    assert torch.allclose(merged @ rows.T, values.T, atol=1e-9)


def test_a_singular_gram_matrix_gets_a_stated_ridge_and_the_constraint_still_holds():
    g = torch.Generator().manual_seed(0)
    sizes = ((6, 20), (3, 20), (3, 6), (4, 20))
    base, rows, values, few = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    merged, ridge = merge_matrices(base, few, rows, values)
    assert ridge == 1e-6 and torch.allclose(merged @ rows.T, values.T, atol=1e-6)
    doubled = merge_matrices(base, few, torch.cat([rows, rows]), torch.cat([values, values]))[0]
    assert torch.allclose(doubled, merged, atol=1e-5)


@pytest.mark.slow
def test_merging_gives_each_subject_the_values_of_its_own_weights(v_pipe, both):
    edits = [custom_diffusion(v_pipe, about, **FAST, **PRIOR, learning_rate=1e-2) for about in both]
    merged = merge(v_pipe, edits, both, templates=("a {}",))
    with merged.applied(v_pipe):
        text = encode_prompts(v_pipe, ["a sks cat"])[0, 2:4]  # "a" is both subjects', the end every caption's
        after = [text @ weight.detach().T for weight in KVSpace(v_pipe).parameters.values()]
    with edits[0].applied(v_pipe):
        before = [text @ weight.detach().T for weight in KVSpace(v_pipe).parameters.values()]
    assert all(torch.allclose(x, y, atol=2e-3) for x, y in zip(after, before, strict=True))
    other = encode_prompts(v_pipe, ["a red car on the beach", "the house"])[:, 1:].flatten(0, 1).detach()
    moved = [
        float((other @ delta.T).norm() / (other @ KVSpace(v_pipe).parameters[name].detach().T).norm())
        for name, delta in merged.edits[1].deltas.items()
    ]
    assert max(moved) < 0.1
    with pytest.raises(ConeslabError, match="token of its own"):
        merge(v_pipe, [edits[0], edits[0]], both)
    with pytest.raises(ConeslabError, match="not a Custom Diffusion edit"):
        merge(v_pipe, [edits[0].edits[1], edits[1]], both)
    with pytest.raises(ConeslabError, match="1 edits and 2 subjects"):
        merge(v_pipe, edits[:1], both)


@pytest.mark.slow
def test_a_merge_pairs_each_edit_with_the_subject_of_its_token(v_pipe, both):
    edits = [custom_diffusion(v_pipe, about, **FAST, **PRIOR, learning_rate=1e-2) for about in both]
    merged, turned = (merge(v_pipe, edits, subjects, templates=("a {}",)) for subjects in (both, both[::-1]))
    assert merged.edits[0].tokens == turned.edits[0].tokens and merged.edits[1].subject == turned.edits[1].subject
    assert all(torch.equal(turned.edits[1].deltas[name], delta) for name, delta in merged.edits[1].deltas.items())
    other = SimpleNamespace(**vars(both[1]) | {"token": "car", "prompt": "a car dog"})
    joint = custom_diffusion(v_pipe, both, **FAST, **PRIOR)
    for given, subjects in (
        (edits, [both[0], other]),
        (edits, [both[0], both[0]]),
        ([joint, custom_diffusion(v_pipe, other, **FAST, **PRIOR)], [both[0], other]),
    ):
        with pytest.raises(ConeslabError, match="the edits teach .* the subjects have"):
            merge(v_pipe, given, subjects)
    for options, reason in (
        ({"templates": ("a cat",)}, "templates is 'a cat': give a text with {}"),
        ({"templates": ()}, "give at least one"),
        ({"captions": []}, "no captions"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            merge(v_pipe, edits, both, **options)


# --- compression ---


def test_compression_keeps_the_energy_asked_for_with_the_fewest_ranks():
    g = torch.Generator().manual_seed(0)
    delta = WeightDelta({"one": torch.randn(12, 9, generator=g), "zero": torch.zeros(4, 5)}, "ab" * 32, subject="cat")
    for energy in (0.3, 0.6, 0.9, 1.0):
        small = compress(delta, energy=energy)
        assert isinstance(small, LowRankDelta)
        values = torch.linalg.svdvals(delta.deltas["one"].double()).square()
        rank = small.ranks["one"]
        assert values[:rank].sum() >= energy * values.sum() * (1 - 1e-9)
        assert rank == 1 or values[: rank - 1].sum() < energy * values.sum()
        left = (small.dense().deltas["one"] - delta.deltas["one"]).square().sum()
        assert float(left) == pytest.approx(float(values[rank:].sum()), abs=1e-4)
        assert small.nbytes == 4 * (rank * (12 + 9) + 1 * (4 + 5))
    for energy in (0, -1, 1.1, float("nan")):
        with pytest.raises(ConeslabError, match="share in"):
            compress(delta, energy=energy)
    with pytest.raises(ConeslabError, match="only matrices"):
        compress(WeightDelta({"conv": torch.zeros(2, 2, 3, 3)}, "ab" * 32))


def test_a_compressed_delta_is_an_edit(v_pipe, pictured):
    edit = custom_diffusion(v_pipe, pictured, **FAST, **PRIOR, learning_rate=1e-2).edits[1]
    small = compress(edit, energy=1.0)
    assert model_fingerprint(v_pipe) == small.fingerprint and isinstance(small, Edit)
    theta = KVSpace(v_pipe).gather()
    with Combined((small,)).applied(v_pipe, 0.5):
        half = KVSpace(v_pipe).gather() - theta
    whole = torch.cat([edit.deltas[name].flatten() for name in KVSpace(v_pipe).names])
    assert torch.allclose(half, whole / 2, atol=1e-4)

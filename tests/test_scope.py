"""Masks at some words: projections against hand computation, laws, other prompts to the last bit, files, search."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImg2ImgPipeline

from coneslab.diffusion import steps
from coneslab.diffusion.encoding import encode_prompts
from coneslab.diffusion.kvspace import KVSpace, cross_attentions
from coneslab.diffusion.loss import denoising_loss
from coneslab.diffusion.sampling import generate
from coneslab.edits.base import Combined, load_edit
from coneslab.edits.tokens import TokenEdit, embedding_of, vocabulary_fingerprint
from coneslab.errors import ConeslabError
from coneslab.finetuning.kv_gradient import KVGradient
from coneslab.finetuning.samples import concept_latents, sample_batches
from coneslab.measure.recording import record_attention
from coneslab.neurons.controls import finetune_kv, random_neurons
from coneslab.neurons.damage import DAMAGES
from coneslab.neurons.mask import ConceptNeurons
from coneslab.neurons.scope import _ACTING, positions, scope_of, where_scope
from coneslab.neurons.search import find_concept_neurons
from coneslab.neurons.union import TunedNeurons, additivity, concatenate, finetune_together


@pytest.mark.parametrize(
    ("ids", "words", "found"),
    [
        ([0, 1, 7, 3, 9], [[7], [3]], [2, 3]),
        ([0, 1, 7, 4, 3, 9, 3], [[7], [3]], [2, 4]),  # the class word need not follow at once; a second one is another
        ([0, 3, 1, 7, 9], [[7], [3]], [3]),  # one before the token is not the subject's
        ([0, 7, 3, 7, 3, 7], [[7], [3]], [1, 2, 3, 4, 5]),
        ([0, 7, 8, 5, 6, 7, 9], [[7, 8], [5, 6]], [1, 2, 3, 4]),  # words of several tokens
        ([0, 1, 2, 3], [[7], [3]], []),
        ([0, 7, 3], [[7]], [1]),
        ([], [[7], [3]], []),
    ],
)
def test_a_subject_is_found_where_its_words_stand(ids, words, found):
    assert positions(ids, words) == found


def mask_of(pipe, scope=("sks", "cat"), seed=0, share=0.05) -> ConceptNeurons:
    space = KVSpace(pipe)
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(space.n, int(share * space.n), replace=False))
    scales = rng.choice([0.0, 0.25, 0.5], len(indices))
    return ConceptNeurons(space.layout, indices, scales, space.fingerprint(), subject="cat", scope=scope)


PROMPTS = ["a sks cat on the grass", "a dog and a cat", "sks cat, sks cat"]


def projections(pipe, prompts=PROMPTS) -> dict[str, torch.Tensor]:
    """Every key and value of the prompts, as the U-Net computes them."""
    text, found = encode_prompts(pipe, prompts), {}
    for path, module in cross_attentions(pipe.unet).items():
        found[f"{path}.to_k"], found[f"{path}.to_v"] = module.to_k(text).clone(), module.to_v(text).clone()
    return found


@pytest.mark.parametrize("name", ["v_pipe", "epsilon_pipe", "sd_pipe"])
def test_only_the_words_of_the_scope_are_projected_by_the_masked_weights(name, request):
    pipe = request.getfixturevalue(name)
    mask = mask_of(pipe)
    before, text = projections(pipe), encode_prompts(pipe, PROMPTS)
    where = where_scope(pipe, PROMPTS, mask.scope)
    assert where.sum(1).tolist()[:2] == [2, 0] and where[2].sum() == 4
    with mask.applied(pipe):
        now = projections(pipe)
    space = KVSpace(pipe)
    for layer in space.layout:
        scaled = space.parameters[layer.name].detach() * mask.scale()[layer.slice].view(layer.shape)
        key = layer.name.removesuffix(".weight")
        expected = F.linear(text, scaled)
        torch.testing.assert_close(now[key][where], expected[where], rtol=1e-4, atol=1e-6)
        assert torch.equal(now[key][~where], before[key][~where])
        assert not torch.allclose(now[key][where], before[key][where])
    assert all(torch.equal(one, other) for one, other in zip(projections(pipe).values(), before.values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_without_the_token_gives_the_same_picture_to_the_last_bit(v_pipe, dtype):
    mask, prompts = mask_of(v_pipe, share=0.5), ["a cat", "a sks cat", "a dog on the grass"]
    options = {"sampler_steps": 3, "dtype": dtype, "negative_prompt": "a house"}
    before = [np.asarray(picture) for picture in generate(v_pipe, prompts, **options)]
    alone = np.asarray(generate(v_pipe, "a cat", **options)[0])
    with mask.applied(v_pipe):
        now = [np.asarray(picture) for picture in generate(v_pipe, prompts, **options)]
        assert np.array_equal(np.asarray(generate(v_pipe, "a cat", **options)[0]), alone)
    assert [np.array_equal(one, other) for one, other in zip(before, now, strict=True)] == [True, False, True]


def test_a_dose_of_0_is_nothing_and_half_a_dose_is_half_of_the_way(v_pipe):
    mask, before = mask_of(v_pipe), projections(v_pipe)
    doses = {}
    for dose in (0.0, 0.5, 1.0):
        with mask.applied(v_pipe, dose):
            doses[dose] = projections(v_pipe)
    for key, own in before.items():
        assert torch.equal(doses[0.0][key], own)
        torch.testing.assert_close(doses[0.5][key] - own, (doses[1.0][key] - own) / 2, rtol=1e-3, atol=1e-6)


def test_masks_at_different_words_add_up_and_masks_at_the_same_multiply(v_pipe):
    cat, dog = mask_of(v_pipe, ("sks", "cat"), 1), mask_of(v_pipe, ("zwx", "dog"), 2)
    prompts = ["a sks cat and a zwx dog"]
    changes, before = {}, projections(v_pipe, prompts)
    for name, edit in {"cat": cat, "dog": dog, "both": Combined((cat, dog)), "other way": Combined((dog, cat))}.items():
        with edit.applied(v_pipe):
            changes[name] = {key: now - before[key] for key, now in projections(v_pipe, prompts).items()}
    for key in before:
        torch.testing.assert_close(changes["both"][key], changes["cat"][key] + changes["dog"][key])
        assert torch.equal(changes["both"][key], changes["other way"][key])
    again = mask_of(v_pipe, ("sks", "cat"), 3)
    both = concatenate(cat.binary(1.0), again.binary(1.0))
    assert both.scope == ("sks", "cat")
    with both.applied(v_pipe):
        union = projections(v_pipe, prompts)
    with cat.binary(1.0).applied(v_pipe), again.binary(1.0).applied(v_pipe):
        nested = projections(v_pipe, prompts)
    for key in before:
        torch.testing.assert_close(union[key], nested[key])
    with pytest.raises(ConeslabError, match="different words"):
        concatenate(cat, dog)


def test_a_mask_at_a_learned_token_acts_there(v_pipe):
    width = embedding_of(v_pipe).weight.shape[1]
    token = TokenEdit(("<new>",), torch.full((1, width), 0.5), vocabulary_fingerprint(v_pipe))
    mask = mask_of(v_pipe, ("<new>", "cat"))
    with token.applied(v_pipe):
        before = projections(v_pipe, ["a <new> cat"])
    for order in ((token, mask), (mask, token)):
        with Combined(order).applied(v_pipe):
            now = projections(v_pipe, ["a <new> cat"])
        assert any(not torch.equal(now[key], before[key]) for key in before)


def test_a_mask_may_be_put_at_some_words_and_at_all_again(v_pipe):
    mask = mask_of(v_pipe, ())
    assert mask.at("sks", "cat").scope == ("sks", "cat") and mask.at("sks", "cat").at() == mask
    with pytest.raises(ConeslabError, match="scope"):
        mask.at(3)


def test_tuned_values_act_at_the_words_alone(v_pipe, pictured):
    mask = mask_of(v_pipe)
    tuned = TunedNeurons(mask, np.full(len(mask), 0.25, np.float32))
    before = projections(v_pipe)
    where = where_scope(v_pipe, PROMPTS, mask.scope)
    with tuned.applied(v_pipe):
        now = projections(v_pipe)
    everywhere = TunedNeurons(mask.at(), tuned.values)
    with everywhere.applied(v_pipe):
        expected = projections(v_pipe)
    for key, own in before.items():
        assert torch.equal(now[key][~where], own[~where]), key
        torch.testing.assert_close(now[key][where], expected[key][where])
    with tuned.applied(v_pipe, 0.0):
        assert all(torch.equal(own, before[key]) for key, own in projections(v_pipe).items())


@pytest.mark.slow
def test_tuning_at_the_words_lowers_the_loss_there_and_needs_them_in_every_prompt(v_pipe, pictured):
    own, mask = subject(pictured), mask_of(v_pipe, share=0.3)
    options = {"steps": 12, "batch_size": 8, "learning_rate": 3e-3, "progress": False}
    tuned = finetune_together(v_pipe, mask, [own], **options)
    assert tuned.neurons == mask and set(tuned.history) == {"loss", "subject_loss"}
    assert np.mean(tuned.history["loss"][-4:]) < np.mean(tuned.history["loss"][:4])
    with pytest.raises(ConeslabError, match="'sks cat' only, which not all prompts have"):
        finetune_together(v_pipe, mask, [own, subject(pictured, token="zwx")], **options)


def test_how_nearly_masks_at_different_words_add_up_is_measured(v_pipe, pictured):
    masks = [mask_of(v_pipe, ("sks", "cat"), 1), mask_of(v_pipe, ("zwx", "cat"), 2)]
    sums = additivity(v_pipe, masks, [subject(pictured), subject(pictured, token="zwx")], samples=4)
    assert 0.5 < sums.cosine <= 1 and np.isfinite([sums.ratio, sums.error]).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_pipeline_sees_the_mask(own_pipe):
    pipe = own_pipe
    pipe.unet.compile(backend="eager")
    before = [np.asarray(generate(pipe, prompt, sampler_steps=1)[0]) for prompt in ("a sks cat", "a cat")]
    with mask_of(pipe, share=0.5).applied(pipe):
        now = [np.asarray(generate(pipe, prompt, sampler_steps=1)[0]) for prompt in ("a sks cat", "a cat")]
    assert not np.array_equal(now[0], before[0]) and np.array_equal(now[1], before[1])


def test_texts_whose_words_are_not_known_are_refused(v_pipe):
    embeds = encode_prompts(v_pipe, ["a sks cat"])
    with mask_of(v_pipe).applied(v_pipe):
        with pytest.raises(ConeslabError, match="words of this text are not known"):
            v_pipe(prompt_embeds=embeds * 1.5, num_inference_steps=1, guidance_scale=1.0)
        v_pipe(prompt_embeds=encode_prompts(v_pipe, ["a sks cat"]), num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ConeslabError, match="scope"):
        mask_of(v_pipe, ("",)).applied(v_pipe).__enter__()


def test_words_encoded_again_are_known_for_longer_and_a_whole_batch_always(v_pipe, monkeypatch):
    monkeypatch.setattr(steps, "_REMEMBERED", 9)  # three texts, each in three precisions

    def drawn(prompts):
        v_pipe(prompt_embeds=encode_prompts(v_pipe, prompts), num_inference_steps=1, guidance_scale=1.0)

    with mask_of(v_pipe).applied(v_pipe):
        embeds = encode_prompts(v_pipe, ["a sks cat"])
        encode_prompts(v_pipe, ["a dog", "a car"])
        encode_prompts(v_pipe, ["a sks cat"])  # as a search for prompts does, whose best words stay the best
        encode_prompts(v_pipe, ["a house"])
        v_pipe(prompt_embeds=embeds, num_inference_steps=1, guidance_scale=1.0)
        drawn(["a sks cat", "a dog", "a car", "a house", "a bus"])


def test_other_pipelines_of_the_same_networks_see_the_mask(v_pipe):
    redraw = StableDiffusionImg2ImgPipeline(**v_pipe.components, requires_safety_checker=False)
    redraw.set_progress_bar_config(disable=True)
    start = generate(v_pipe, "a cat", sampler_steps=2)

    def drawn(prompt):
        generator = torch.Generator().manual_seed(0)
        made = redraw(prompt, image=start, strength=0.9, num_inference_steps=3, generator=generator, output_type="np")
        return made.images

    before, other = drawn("a sks cat"), drawn("a cat")
    with mask_of(v_pipe, share=0.5).applied(v_pipe):
        assert not np.array_equal(drawn("a sks cat"), before) and np.array_equal(drawn("a cat"), other)


def test_recorded_attention_is_that_of_the_masked_keys(v_pipe):
    with record_attention(v_pipe) as plain:
        generate(v_pipe, "a sks cat", sampler_steps=1, dtype=torch.float32)
    with mask_of(v_pipe, share=0.5).applied(v_pipe), record_attention(v_pipe) as masked:
        generate(v_pipe, "a sks cat", sampler_steps=1, dtype=torch.float32)
    assert masked.pictures == 1 and not torch.equal(plain.token("sks"), masked.token("sks"))


def test_files_keep_the_scope_and_controls_have_it(v_pipe, tmp_path):
    mask = mask_of(v_pipe)
    for found in (mask, mask.to("float16"), mask.to("quaternary"), mask.binary()):
        again = load_edit(found.save(tmp_path / "mask.safetensors"))
        assert again == found and again.scope == ("sks", "cat")
        assert ConceptNeurons.from_bytes(found.to_bytes(), v_pipe) == found
    anywhere = mask_of(v_pipe, ())
    assert anywhere != mask and ConceptNeurons.from_bytes(anywhere.to_bytes(), v_pipe).scope == ()
    assert len(mask.binary().to_bytes()) - len(anywhere.binary().to_bytes()) == len("sks cat")
    for damage in range(0, len(mask.to_bytes()), 97):
        data = bytearray(mask.to_bytes())
        data[damage] ^= 4
        with pytest.raises(ConeslabError):
            ConceptNeurons.from_bytes(bytes(data), v_pipe)
    made = [random_neurons(mask), mask.within(kind="V"), *(damage(mask, 0.3) for damage in DAMAGES.values())]
    assert all(one.scope == mask.scope for one in made) and "'sks cat'" in repr(mask)


# --- what is made anew, and what is trained under a mask ---


def test_weights_under_a_mask_are_made_of_those_that_a_layer_has_now(v_pipe):
    """Copies of a U-Net come and go, one at the address of another; and each change of the weights is a version."""
    name = KVSpace(v_pipe).layers[0].name

    def layer_at(buffer):
        layer = torch.nn.Linear(*reversed(buffer.shape), bias=False)
        layer.weight = torch.nn.Parameter(buffer)
        return layer

    with mask_of(v_pipe).applied(v_pipe):
        acting, buffer = _ACTING[v_pipe.unet], v_pipe.unet.get_parameter(name).detach().clone()
        first = layer_at(buffer)
        under = acting.weight(first, name, (0,))
        assert acting.weight(first, name, (0,)) is under and 0 < int((under == 0).sum()) < under.numel()
        buffer.mul_(2)
        second = layer_at(buffer.data)  # at the same address, as new
        first.weight = torch.nn.Parameter(torch.ones_like(buffer))
        assert torch.equal(acting.weight(second, name, (0,)), 2 * under)
        assert set(acting.weight(first, name, (0,)).unique().tolist()) == {0.0, 0.25, 0.5, 1.0}
        for _ in range(5):
            with torch.no_grad():
                second.weight.add_(1)
            acting.weight(second, name, (0,))
        assert sum(len(made) for made in acting._made.values()) == 2  # one a layer, the newest
        del second
        assert len(acting._made) == 1
    assert first.weight is not None and not acting._made.get(first)


@pytest.mark.slow
def test_what_is_trained_under_a_mask_is_the_model_that_draws_with_it(v_pipe, pictured):
    own = subject(pictured)
    with mask_of(v_pipe, share=0.3).applied(v_pipe):
        data = concept_latents(v_pipe, own, prior_batch_size=2, batch_size=4, prior=pictured.images)
        gradient = KVGradient(v_pipe, data, dtype=torch.float32)
        theta, batch = gradient.theta(), next(sample_batches(v_pipe, data, seed=0))
        text = torch.cat([part.text.expand(part.batch_size, -1, -1) for part in data])
        with torch.no_grad():
            each = denoising_loss(
                v_pipe, batch.latents, text, noise=batch.noise, timesteps=batch.timesteps, reduction="none"
            )
        expected = [float(part.mean()) for part in each.split([4, 2])]
        losses, found = gradient(theta, batch)
        assert losses == pytest.approx(expected, rel=1e-4)
        step = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)) * theta.abs() * 1e-2
        up, down = (gradient.losses(theta + sign * step, batch) for sign in (1, -1))
        weights = [part.weight for part in data]
        change = sum(w * (a - b) for w, a, b in zip(weights, up, down, strict=True)) / 2
        assert float(found @ step) == pytest.approx(change, rel=0.05)
        where = where_scope(v_pipe, [own.prompt, own.prior_prompt], ("cat",))
        some = KVGradient(v_pipe, data, where=where, dtype=torch.float32)
        assert some.losses(theta, batch) == pytest.approx(expected, rel=1e-4)
        trained = finetune_kv(v_pipe, own, steps=2, batch_size=4, prior_batch_size=2, prior=pictured.images)
    plain = finetune_kv(v_pipe, own, steps=2, batch_size=4, prior_batch_size=2, prior=pictured.images)
    assert trained != plain


# --- the search ---


def subject(pictured, token="sks"):
    return SimpleNamespace(
        name="cat",
        class_word="cat",
        token=token,
        images=pictured.images,
        prompt=f"a {token} cat",
        prior_prompt="a cat",
    )


def test_the_gradient_goes_through_the_words_of_the_scope_alone(v_pipe, pictured):
    own = subject(pictured)
    data = concept_latents(v_pipe, own, prior_batch_size=0, batch_size=4)
    where = where_scope(v_pipe, [own.prompt], scope_of(v_pipe, own))
    gradient = KVGradient(v_pipe, data, where=where, dtype=torch.float32)
    theta, batch = gradient.theta(), next(sample_batches(v_pipe, data, seed=0))
    mask = mask_of(v_pipe, share=0.2)
    losses, found = gradient(mask.scale() * theta, batch)
    with mask.applied(v_pipe), torch.no_grad():
        text = encode_prompts(v_pipe, own.prompt).expand(4, -1, -1)
        loss = denoising_loss(v_pipe, batch.latents, text, noise=batch.noise, timesteps=batch.timesteps)
    assert losses[0] == pytest.approx(float(loss), rel=1e-4)
    step = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)) * theta.abs() * 1e-2
    up, down = (gradient.losses(mask.scale() * theta + sign * step, batch)[0] for sign in (1, -1))
    assert float(found @ step) == pytest.approx((up - down) / 2, rel=0.05)


@pytest.mark.slow
def test_a_search_at_the_subjects_words_has_no_prior_and_lowers_its_loss(v_pipe, pictured):
    options = {"rounds": 8, "batch_size": 16, "threshold_quantile": 0.95, "progress": False}
    found = find_concept_neurons(v_pipe, subject(pictured), scope="subject", **options)
    assert found.scope == ("sks", "cat") and "prior_loss" not in found.history and len(found.shut())
    assert np.mean(found.history["loss"][-3:]) < np.mean(found.history["loss"][:3])
    values = find_concept_neurons(v_pipe, subject(pictured), scope="subject", kinds="values", **options)
    shut = values.layout.where(kind="K")[torch.tensor(values.indices, dtype=torch.long)]
    assert len(values) and not shut.any()
    with pytest.raises(ConeslabError, match="does not use"):
        find_concept_neurons(v_pipe, subject(pictured), scope="subject", prior=pictured.images, **options)
    again = find_concept_neurons(v_pipe, subject(pictured), scope="subject", start=found, **options)
    assert again.scope == found.scope
    with pytest.raises(ConeslabError, match="start acts at"):
        find_concept_neurons(v_pipe, subject(pictured), start=found, **options)
    with pytest.raises(ConeslabError, match="needs a token"):
        find_concept_neurons(v_pipe, subject(pictured, token=""), scope="subject", **options)
    with pytest.raises(ConeslabError, match="scope is 'words': choose one of all, subject"):
        find_concept_neurons(v_pipe, subject(pictured), scope="words", **options)

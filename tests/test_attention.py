"""The K-V space and attention maps, against diffusers' own parameters and an independent softmax(Q Kᵀ)."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from coneslab.diffusion.encoding import encode_prompts
from coneslab.diffusion.sampling import ddim_sample, generate, guided_between, start_noise
from coneslab.edits.tokens import TokenEdit, vocabulary_fingerprint
from coneslab.errors import ConeslabError, MismatchError
from coneslab.measure.attention import KVLayout, KVSpace, attention_probabilities
from coneslab.measure.recording import record_attention
from coneslab.neurons.mask import ConceptNeurons

PROMPT = "a sks cat on the grass"


def draw(pipe, prompt=PROMPT, *, steps=3, guidance_scale=3.0, **options):
    generator = torch.Generator().manual_seed(5)
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="np",
        **options,
    ).images


def processors(pipe):
    return {name: processor for name, processor in pipe.unet.attn_processors.items()}


@pytest.fixture(params=["v_pipe", "epsilon_pipe", "sd_pipe"])
def pipe(request):
    return request.getfixturevalue(request.param)


# --- the K-V space ---


def test_the_space_is_every_key_and_value_weight_in_module_order(pipe):
    space = KVSpace(pipe)
    endings = ("attn2.to_k.weight", "attn2.to_v.weight")
    expected = [(name, weight) for name, weight in pipe.unet.named_parameters() if name.endswith(endings)]
    assert list(space.names) == [name for name, _ in expected]
    assert space.n == sum(weight.numel() for _, weight in expected)
    assert torch.equal(space.gather(), torch.cat([weight.detach().flatten() for _, weight in expected]))
    assert repr(KVSpace(pipe.unet)) == repr(space)


def test_levels_and_resolutions_are_those_that_the_unet_runs_at(pipe):
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen[name] = output.shape[1]

        return hook

    modules = KVSpace(pipe).modules
    hooks = [module.to_q.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        draw(pipe, steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in KVSpace(pipe).layers:
        assert layer.resolution**2 == seen[layer.name.rsplit(".", 2)[0]]
        assert layer.resolution == pipe.unet.config.sample_size // 2**layer.level
        assert layer.block.split()[0] == layer.name.split("_")[0]


def test_scatter_is_the_inverse_of_gather(v_pipe):
    space = KVSpace(v_pipe)
    before = space.gather()
    values = torch.randn(space.n)
    try:
        space.scatter(values)
        assert torch.equal(space.gather(), values)
        weight = dict(v_pipe.unet.named_parameters())[space.names[3]]
        assert torch.equal(weight.detach().flatten(), values[space.layers[3].slice])
    finally:
        space.scatter(before)
    assert torch.equal(space.gather(), before)


def test_averages_over_layers_rows_and_columns_are_those_of_the_matrices(v_pipe):
    layout = KVSpace(v_pipe).layout
    flat = torch.randn(layout.n)
    for i, layer in enumerate(layout):
        matrix = flat[layer.start : layer.start + layer.size].reshape(layer.shape).double()
        assert torch.allclose(layout.per_layer(flat)[i], matrix.mean())
        assert torch.allclose(layout.rows(flat)[layer.name], matrix.mean(1))
        assert torch.allclose(layout.columns(flat)[i], matrix.mean(0))
        assert torch.allclose(layout.heat_map(flat, bins=4)[i], matrix.mean(1).unflatten(0, (4, -1)).mean(1))
    assert layout.where(kind="V", level=1).sum() == sum(x.size for x in layout if x.kind == "V" and x.level == 1)
    assert KVLayout.from_json(layout.as_json()) == layout


def test_a_part_that_no_layer_is_in_is_refused(v_pipe):
    layout = KVSpace(v_pipe).layout
    mask = ConceptNeurons(layout, [0, 1], [0.0, 0.0], "ab" * 32)
    for options, choices in (({"kind": "values"}, "K, V"), ({"block": "up"}, "down 0, down 1, up 0, up 1, mid")):
        for part in (layout.where, mask.within):
            with pytest.raises(ConeslabError, match=f"is .*: choose one of {choices}"):
                part(**options)


def test_a_vector_of_another_length_is_refused(v_pipe):
    with pytest.raises(MismatchError, match="8,448|8448"):
        KVSpace(v_pipe).scatter(torch.zeros(7))


def test_the_fingerprint_follows_the_weights_and_nothing_else(v_pipe, epsilon_pipe):
    space = KVSpace(v_pipe)
    first = space.fingerprint()
    assert first == KVSpace(v_pipe).fingerprint() != KVSpace(epsilon_pipe).fingerprint()
    weight = v_pipe.unet.conv_in.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
        assert space.fingerprint() == first
        weight.copy_(kept)
        weight = space.parameters[space.names[-1]]
        kept = weight.detach().clone()
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1e9))
        assert space.fingerprint() != first
        weight.copy_(kept)


def test_a_network_without_cross_attention_or_with_wrapped_weights_is_refused(v_pipe):
    with pytest.raises(ConeslabError, match="no cross-attention"):
        KVSpace(v_pipe.vae)
    module = next(iter(KVSpace(v_pipe).modules.values()))
    original = module.to_k
    wrapper = torch.nn.Module()
    wrapper.base_layer = original
    module.to_k = wrapper
    try:
        with pytest.raises(ConeslabError, match="LoRA"):
            KVSpace(v_pipe)
    finally:
        module.to_k = original


# --- attention maps ---


def by_hand(attn, places, text):
    """softmax(Q Kᵀ / sqrt(d)), one head after the other: (batch, heads, places, tokens)."""
    width = attn.to_q.out_features // attn.heads
    heads = []
    for h in range(attn.heads):
        rows = slice(h * width, (h + 1) * width)
        query, key = places @ attn.to_q.weight[rows].T, text @ attn.to_k.weight[rows].T
        heads.append(torch.softmax(torch.einsum("bqc,btc->bqt", query, key) / width**0.5, -1))
    return torch.stack(heads, 1)


@pytest.mark.parametrize("processor", [None, AttnProcessor(), SlicedAttnProcessor(1)])
def test_maps_are_the_softmax_of_queries_and_keys(pipe, processor):
    original = processors(pipe)
    if processor is not None:
        pipe.unet.set_attn_processor(processor)
    inputs: dict[str, list] = {}

    def note(module, args, kwargs, name):
        inputs.setdefault(name, []).append((args[0].clone(), kwargs["encoder_hidden_states"].clone()))

    modules = KVSpace(pipe).modules
    hooks = [
        module.register_forward_pre_hook(lambda m, a, k, name=name: note(m, a, k, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with record_attention(pipe, keep_heads=True, dtype=torch.float32) as maps:
            draw(pipe)
    finally:
        for hook in hooks:
            hook.remove()
        pipe.unet.set_attn_processor(original)
    labels = iter(maps.layers)
    for name in inputs:  # in the order they run, as the labels are
        got = maps.layer(next(labels))  # (steps, heads, tokens, height, width)
        for step, (places, text) in enumerate(inputs[name]):
            expected = by_hand(modules[name], places, text)[1]  # row 1: the conditional half
            assert torch.allclose(got[step].flatten(2).transpose(1, 2), expected, atol=1e-5)
        assert torch.allclose(got.sum(2), torch.ones(()), atol=1e-5)
    assert len(inputs) == len(maps.layers)


def test_tokens_that_are_masked_get_no_attention_and_leave_theirs_to_the_others(v_pipe):
    module = next(iter(KVSpace(v_pipe).modules.values()))
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(2, 5, module.to_q.in_features, generator=generator)
    text = torch.randn(2, 6, module.to_k.in_features, generator=generator)
    bias = torch.zeros(2, 1, 6)
    bias[0, :, 4:], bias[1, :, :2] = -1e4, -1e4
    found = attention_probabilities(module, places, text, bias)
    assert torch.allclose(found[:1, ..., :4], by_hand(module, places[:1], text[:1, :4]), atol=1e-6)
    assert torch.allclose(found[1:, ..., 2:], by_hand(module, places[1:], text[1:, 2:]), atol=1e-6)
    assert not found[0, ..., 4:].any() and not found[1, ..., :2].any()


@pytest.mark.slow
def test_a_word_that_is_not_in_the_prompt_has_the_map_it_would_have_beside_it(pipe):
    """Its keys, encoded alone, after those of the prompt, in one softmax: once for each word."""
    inputs: dict[str, list] = {}
    modules = KVSpace(pipe).modules
    hooks = [
        module.register_forward_pre_hook(
            lambda m, a, k, name=name: inputs.setdefault(name, []).append((a[0], k["encoder_hidden_states"])),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    try:
        with record_attention(pipe, words=("dog", "sks dog", "cat"), dtype=torch.float32, keep_heads=True) as maps:
            drawn = draw(pipe)
    finally:
        for hook in hooks:
            hook.remove()
    assert (drawn == draw(pipe)).all()
    for word, tokens in (("dog", 1), ("sks dog", 2)):
        own = encode_prompts(pipe, word)[:, 1 : 1 + tokens]
        for name, label in zip(inputs, maps.layers, strict=True):
            places, text = inputs[name][1]
            together = by_hand(modules[name], places[1:], torch.cat([text[1:], own], 1))  # row 1: the conditional half
            expected = together[0, :, :, -tokens:].mean((0, 2))
            assert torch.allclose(maps.per_layer(word)[label][1].flatten(), expected, atol=1e-5)
    assert torch.equal(maps.token("cat"), maps.token(3))  # which the prompt has
    assert torch.allclose(maps.average().sum(0), torch.ones(()), atol=1e-4)
    assert maps.layer(maps.layers[0]).shape[2] == len(maps.tokens())


def test_a_word_that_was_not_asked_for_is_told_how_to_ask(v_pipe):
    with record_attention(v_pipe, words="dog") as maps:
        draw(v_pipe)
        text = encode_prompts(v_pipe, ["a cat"])
        ddim_sample(v_pipe, 1.5 * text, start_noise(v_pipe, [0]), guidance_scale=1.0, sampler_steps=2)
    assert maps.token("dog", picture=1).shape == (8, 8)  # of a text whose words are not known
    with pytest.raises(ConeslabError, match=r"'car' is not in the prompt, .*name it in record_attention\(words=...\)"):
        maps.token("car")
    with pytest.raises(ConeslabError, match="'dog' is not in the prompt"):
        maps.indices("dog")


def test_guidance_in_an_interval_is_recorded_in_every_step(v_pipe):
    with record_attention(v_pipe) as whole:
        draw(v_pipe, [PROMPT, "a dog"])
    with guided_between(v_pipe, 0.0, 0.4), record_attention(v_pipe) as maps:
        draw(v_pipe, [PROMPT, "a dog"])
    assert maps.pictures == 2 and maps.timesteps() == whole.timesteps()
    assert torch.allclose(maps.average(picture=1, steps=1), whole.average(picture=1, steps=1), atol=1e-3)


def test_recording_does_not_change_a_bit_of_the_pictures(pipe):
    before = processors(pipe)
    plain = draw(pipe)
    with record_attention(pipe) as maps:
        recorded = draw(pipe)
        assert processors(pipe) != before
    assert (plain == recorded).all()
    assert processors(pipe) == before
    assert maps.pictures == 1 and len(maps.timesteps()) == 3


def test_words_find_their_tokens(v_pipe):
    with record_attention(v_pipe) as maps:
        draw(v_pipe)
    assert maps.tokens()[:8] == ["<|startoftext|>", "a", "sks", "cat", "on", "the", "grass", "<|endoftext|>"]
    assert maps.indices("cat") == [3] and maps.indices("sks cat") == [2, 3]
    assert torch.equal(maps.token("cat"), maps.token(3)) and torch.equal(maps.token("cat"), maps.average()[3])
    assert torch.allclose(maps.token("sks cat"), (maps.token(2) + maps.token(3)) / 2)
    assert maps.token("cat").shape == (8, 8) and maps.token("cat", size=(16, 16)).shape == (16, 16)
    with pytest.raises(ConeslabError, match="a sks cat on the grass"):
        maps.indices("dog")


@pytest.mark.slow
def test_a_token_added_inside_the_block_is_found_in_its_own_pictures(v_pipe):
    new = TokenEdit(("<cat*>",), torch.ones(1, 24), vocabulary_fingerprint(v_pipe), initial=("cat",))
    with new.applied(v_pipe), record_attention(v_pipe) as alone:
        draw(v_pipe, "a <cat*> cat")
    with record_attention(v_pipe) as maps:
        draw(v_pipe, "a <cat*> cat")
        for dose in (1.0, 0.0):
            with new.applied(v_pipe, dose):
                draw(v_pipe, "a <cat*> cat")
        draw(v_pipe, "a cat cat")
    pieces = len(maps.tokens()) - maps.tokens().count("<|endoftext|>") - 3  # without the start, "a" and "cat"
    assert pieces > 1 and maps.indices("<cat*>") == [*range(2, 2 + pieces)]
    for picture in (1, 2):  # at dose 0 its text embedding is that of the last picture
        assert maps.tokens(picture)[1:4] == ["a", "<cat*>", "cat"] and maps.indices("<cat*>", picture) == [2]
        assert maps.indices("cat", picture) == [3]
    assert maps.tokens(3)[1:4] == ["a", "cat", "cat"] and maps.indices("cat", 3) == [2, 3]
    assert torch.equal(maps.token("<cat*>", picture=1), alone.token("<cat*>"))
    with pytest.raises(ConeslabError, match="not in the prompt"):
        maps.indices("<cat*>", 3)


@pytest.mark.slow
def test_a_word_asked_for_is_encoded_as_the_pipeline_is_when_it_draws(v_pipe):
    new = TokenEdit(("<cat*>",), torch.ones(1, 24), vocabulary_fingerprint(v_pipe))
    words = ["<cat*>", "dog"]
    with record_attention(v_pipe, words=words) as before:
        draw(v_pipe)
    with new.applied(v_pipe), record_attention(v_pipe, words=words) as inside:
        draw(v_pipe)
    with record_attention(v_pipe, words=words) as maps:
        draw(v_pipe)
        with new.applied(v_pipe):
            draw(v_pipe)
    for picture, expected in enumerate((before, inside)):
        for word in words:
            assert torch.equal(maps.token(word, picture=picture), expected.token(word)), (picture, word)
    assert not torch.equal(before.token("<cat*>"), inside.token("<cat*>"))


def test_averages_choose_layers_resolutions_and_steps(v_pipe):
    with record_attention(v_pipe, dtype=torch.float32) as maps:
        draw(v_pipe)
    layer = maps.layer("up 1.0")
    assert layer.shape == (3, 12, 8, 8)
    assert torch.allclose(maps.average(layers=["up 1.0"], steps=[0, 2]), (layer[0] + layer[2]) / 2)
    assert torch.equal(maps.average(steps=-1), maps.average(steps=[2]))
    fine = [label for label in maps.layers if maps.layer(label).shape[-1] == 8]
    assert torch.allclose(maps.average(resolution=8), maps.average(layers=fine))
    assert torch.allclose(maps.per_layer("cat")["up 1.0"], layer[:, 3])
    assert torch.allclose(maps.average().sum(0), torch.ones(()), atol=1e-5)
    with pytest.raises(ConeslabError, match="no map is left"):
        maps.average(resolution=3)
    with pytest.raises(ConeslabError, match="up 1.0"):
        maps.layer("nowhere")


def test_pictures_are_numbered_over_batches_and_guidance_keeps_the_conditional_half(v_pipe):
    prompts = [PROMPT, "a dog in the city", "a car"]
    with record_attention(v_pipe) as together:
        generate(v_pipe, prompts, sampler_steps=2, batch_size=2)
    assert together.pictures == 3
    assert [together.tokens(i)[2] for i in range(3)] == ["sks", "dog", "car"]
    with record_attention(v_pipe) as alone:
        generate(v_pipe, prompts[1], seed=1, sampler_steps=2)
    assert torch.allclose(together.token("dog", picture=1), alone.token("dog"), atol=1e-3)
    with pytest.raises(ConeslabError, match="no picture 3"):
        together.tokens(3)


def test_without_guidance_all_rows_are_kept(v_pipe):
    noise = start_noise(v_pipe, [0, 0])  # the same noise twice must not be taken for guidance
    with record_attention(v_pipe) as maps:
        draw(v_pipe, [PROMPT, "a dog"], guidance_scale=1.0, latents=noise)
    assert maps.pictures == 2
    with record_attention(v_pipe, guided=False) as maps:
        draw(v_pipe, [PROMPT, "a dog"], guidance_scale=3.0)
    assert maps.pictures == 4


def test_the_small_sampler_is_recorded_with_guidance_too(v_pipe):
    with record_attention(v_pipe) as maps:
        text, empty = encode_prompts(v_pipe, [PROMPT]), encode_prompts(v_pipe, [""])
        ddim_sample(v_pipe, text, start_noise(v_pipe, [0]), empty_embeddings=empty, sampler_steps=3)
    assert maps.pictures == 1 and len(maps.timesteps()) == 3
    assert maps.indices("cat") == [3]


def test_text_encoded_outside_is_recorded_by_position(v_pipe):
    text = encode_prompts(v_pipe, [PROMPT])
    with record_attention(v_pipe) as maps:
        ddim_sample(v_pipe, text, start_noise(v_pipe, [0]), guidance_scale=1.0, sampler_steps=2)
    assert maps.token(3).shape == (8, 8)
    with pytest.raises(ConeslabError, match="encode it inside"):
        maps.token("cat")


def test_nothing_recorded_is_an_error_that_guesses_the_cause(v_pipe):
    with record_attention(v_pipe) as maps:
        pass
    assert "nothing" in repr(maps)
    for ask in (lambda: maps.token("cat"), lambda: maps.layers, lambda: maps.timesteps()):
        with pytest.raises(ConeslabError, match="inside the block"):
            ask()


def test_memory_is_bounded(v_pipe):
    before = processors(v_pipe)
    with pytest.raises(ConeslabError, match="max_bytes"):
        with record_attention(v_pipe, max_bytes=10_000):
            draw(v_pipe)
    assert processors(v_pipe) == before


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_processors_are_put_back_when_entering_fails_halfway(v_pipe, monkeypatch, failure, at):
    before = processors(v_pipe)
    victim = list(KVSpace(v_pipe).modules.values())[at]
    kept = victim.set_processor
    calls = []

    def fail(processor):
        calls.append(processor)
        kept(processor)
        if len(calls) == 1:
            raise failure("injected")

    monkeypatch.setattr(victim, "set_processor", fail)
    with pytest.raises(failure, match="injected"):
        with record_attention(v_pipe):
            raise AssertionError("the block must not run")
    assert processors(v_pipe) == before
    assert not v_pipe.unet._forward_pre_hooks and not v_pipe.text_encoder._forward_hooks


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_processors_are_put_back_when_the_block_fails(v_pipe, failure):
    before = processors(v_pipe)
    with pytest.raises(failure):
        with record_attention(v_pipe):
            raise failure
    assert processors(v_pipe) == before
    assert not v_pipe.unet._forward_pre_hooks and not v_pipe.text_encoder._forward_hooks


def test_recordings_nest(v_pipe):
    before = processors(v_pipe)
    with record_attention(v_pipe) as outer:
        with record_attention(v_pipe) as inner:
            draw(v_pipe)
    assert torch.equal(outer.token("cat"), inner.token("cat"))
    assert processors(v_pipe) == before


def test_an_unknown_processor_is_refused(v_pipe):
    class Odd(AttnProcessor):
        pass

    module = next(iter(KVSpace(v_pipe).modules.values()))
    original = module.processor
    module.set_processor(Odd())
    try:
        with pytest.raises(ConeslabError, match="Odd"):
            record_attention(v_pipe).__enter__()
    finally:
        module.set_processor(original)

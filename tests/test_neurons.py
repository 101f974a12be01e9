"""The search against finite differences and a plain loop; property tests of masks and files; the controls."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coneslab.diffusion import pipelines
from coneslab.diffusion.encoding import encode_prompts
from coneslab.diffusion.kvspace import KVLayer, KVLayout, KVSpace
from coneslab.diffusion.precision import frozen_copy
from coneslab.edits.base import Edit, load_edit
from coneslab.edits.tokens import TokenEdit, embedding_of, vocabulary_fingerprint
from coneslab.edits.weights import model_fingerprint
from coneslab.errors import ConeslabError, ConeslabWarning, FileFormatError, MismatchError
from coneslab.finetuning import samples as pairs_module
from coneslab.finetuning.kv_gradient import KVGradient
from coneslab.finetuning.samples import concept_latents, prior_pictures, sample_batches
from coneslab.neurons.controls import finetune_kv, mean_gradient, random_neurons, reversed_neurons, top_k_neurons
from coneslab.neurons.loss import concept_loss
from coneslab.neurons.mask import ConceptNeurons
from coneslab.neurons.search import SearchSettings, _Adaptive, _StraightThrough, find_concept_neurons, quantiles

BATCHES = {"batch_size": 6, "prior_batch_size": 3, "prior_images": 4, "sampler_steps": 2}
SEARCH = {**BATCHES, "rounds": 4, "progress": False, "threshold_quantile": 0.9}


def double(pipe):
    """The pipeline with a float64 U-Net of its own."""
    parts = {name: getattr(pipe, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
    factor = pipe.vae_scale_factor
    return SimpleNamespace(**parts, vae_scale_factor=factor, unet=copy.deepcopy(pipe.unet).double())


def state(pipe):
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def assert_untouched(pipe, before):
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in pipe.unet.parameters())


def plain_loss(pipe, pairs, draw):
    """L_con written out with diffusers' own scheduler, every sample with its own text."""
    t = draw.timesteps
    noisy = pipe.scheduler.add_noise(draw.latents.double(), draw.noise.double(), t)
    if pipe.scheduler.config.prediction_type == "v_prediction":
        wanted = pipe.scheduler.get_velocity(draw.latents.double(), draw.noise.double(), t)
    else:
        wanted = draw.noise.double()
    text = torch.cat([pair.text[None].expand(pair.batch_size, -1, -1) for pair in pairs]).double()
    each = (pipe.unet(noisy, t, encoder_hidden_states=text).sample - wanted).square().mean((1, 2, 3))
    parts = each.split([pair.batch_size for pair in pairs])
    return sum(pair.weight * part.mean() for pair, part in zip(pairs, parts, strict=True))


@pytest.fixture(params=["v_pipe", "epsilon_pipe"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def found(v_pipe):
    from small_pipelines import make_subject

    return find_concept_neurons(v_pipe, make_subject(16), **SEARCH)


# --- the gradient ---


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences(pipe, pictured):
    pairs = concept_latents(pipe, pictured, prior_weight=0.7, **BATCHES)
    asked = encode_prompts(pipe, [pictured.prompt, pictured.prior_prompt])  # each under its own caption
    assert torch.allclose(torch.stack([pair.text for pair in pairs]), asked, atol=1e-5)
    exact, draw = double(pipe), next(sample_batches(pipe, pairs, seed=1))
    gradient = KVGradient(exact, pairs)
    assert gradient.dtype == torch.float64
    losses, g = gradient(gradient.theta(), draw)
    space, theta = KVSpace(exact), KVSpace(exact).gather()
    with torch.no_grad():
        expected = plain_loss(exact, pairs, draw)
        assert losses[0] + 0.7 * losses[1] == pytest.approx(float(expected), rel=1e-5)
        generator = torch.Generator().manual_seed(0)
        for layer in space.layers:  # the steepest neuron of every layer, and a random one
            steep = layer.start + int(g[layer.slice].abs().argmax())
            other = layer.start + int(torch.randint(layer.size, (1,), generator=generator))
            for j in (steep, other):
                step = torch.zeros_like(theta)
                step[j] = 1e-4
                space.scatter(theta + step)
                above = plain_loss(exact, pairs, draw)
                space.scatter(theta - step)
                below = plain_loss(exact, pairs, draw)
                slope = float((above - below) / 2e-4)
                assert float(g[j]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_the_criterion_is_what_scaling_a_neuron_down_does_to_the_loss(pipe, pictured):
    """L((1−δ)θ_j) ≈ L − δ θ_j g_j  (Cones, Sec. 3.1), for the neurons with the largest criterion."""
    pairs = concept_latents(pipe, pictured, **BATCHES)
    exact, draw = double(pipe), next(sample_batches(pipe, pairs, seed=2))
    gradient = KVGradient(exact, pairs)
    space, theta = KVSpace(exact), KVSpace(exact).gather()
    criterion = theta * gradient(theta, draw)[1]
    with torch.no_grad():
        for j in criterion.topk(5).indices:
            scale = torch.ones_like(theta)
            scale[j] = 1 - 1e-4
            space.scatter(scale * theta)
            below = plain_loss(exact, pairs, draw)
            scale[j] = 1 + 1e-4
            space.scatter(scale * theta)
            above = plain_loss(exact, pairs, draw)
            assert float(below) < float(above)
            assert float(criterion[j]) == pytest.approx(float((above - below) / 2e-4), rel=1e-3)


@pytest.mark.slow
def test_chunks_and_precision_do_not_change_the_gradient(v_pipe, pictured):
    pairs = concept_latents(v_pipe, pictured, **BATCHES)
    draw = next(sample_batches(v_pipe, pairs, seed=0))
    whole = KVGradient(v_pipe, pairs, dtype=torch.float32)
    losses, g = whole(whole.theta(), draw)
    for chunk in (1, 4, 6, 100):
        gradient = KVGradient(v_pipe, pairs, dtype=torch.float32, chunk=chunk)
        with torch.no_grad():  # as notebooks do
            part_losses, part = gradient(whole.theta(), draw)
        assert part_losses == pytest.approx(losses, rel=1e-5)
        assert gradient.losses(whole.theta(), draw) == pytest.approx(losses, rel=1e-5)
        assert torch.allclose(part, g, rtol=1e-3, atol=1e-7)
    _, rough = KVGradient(v_pipe, pairs, dtype=torch.bfloat16)(whole.theta(), draw)
    assert rough.dtype == torch.float32
    assert torch.corrcoef(torch.stack([rough, g]))[0, 1] > 0.99
    _, lifted = KVGradient(v_pipe, pairs, dtype=torch.float16)(whole.theta(), draw)  # and put back where it was
    assert float(lifted @ g / (g @ g)) == pytest.approx(1, abs=0.05)


def test_the_twin_computes_what_the_unet_does_and_shares_its_memory(sd_pipe):
    torch.manual_seed(0)
    unet = sd_pipe.unet
    copy = frozen_copy(unet, torch.float32)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 12)
    with torch.no_grad():
        expected = unet(x, t, encoder_hidden_states=text).sample
        assert torch.allclose(copy(x, t, encoder_hidden_states=text).sample, expected, atol=1e-5)
    ours, theirs = dict(copy.named_parameters()), dict(unet.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert not any(weight.requires_grad for weight in copy.parameters())
    assert all(weight.requires_grad for weight in unet.parameters())


def test_draws_use_every_picture_alike_and_every_part_of_the_schedule(v_pipe, pictured):
    pairs = concept_latents(v_pipe, pictured, batch_size=9, prior_batch_size=4, prior_images=4, sampler_steps=2)
    samples = sample_batches(v_pipe, pairs, seed=3)
    first, second = next(samples), next(samples)
    again = next(sample_batches(v_pipe, pairs, seed=3))
    assert torch.equal(first.noise, again.noise) and torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.noise, second.noise)
    for picture in pairs[0].latents:
        assert sum(torch.equal(picture, latent) for latent in first.latents[:9]) == 3
    assert (first.timesteps[:9].sort().values * 9 // 1000).tolist() == list(range(9))
    assert (first.timesteps[9:].sort().values * 4 // 1000).tolist() == list(range(4))


# --- the search ---


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"per_layer": False}, {"threshold": 1e-6}, {"sign": -1, "momentum": 0.0}])
def test_the_search_is_the_algorithm_written_out(pipe, pictured, options):
    """Against a loop with the weights set in the U-Net, autograd of `plain_loss`, and sorted thresholds."""
    exact = double(pipe)
    prior = prior_pictures(pipe, pictured, n=4, sampler_steps=2)
    settings = {"batch_size": 6, "prior_batch_size": 3, "prior": prior, "seed": 5}
    arguments = {"rounds": 4, "threshold_quantile": 0.9, "rate": 0.3, "cut": 0.5, "progress": False, **options}
    found = find_concept_neurons(exact, pictured, **settings, **arguments)

    pairs = concept_latents(exact, pictured, **settings)
    space, samples = KVSpace(exact), sample_batches(exact, pairs, seed=5)
    theta, names = space.gather(), [layer.name for layer in space.layers]
    s, average, weight = torch.ones_like(theta), torch.zeros_like(theta), 0.0
    momentum, sign = options.get("momentum", 0.8), options.get("sign", 1)
    for k in range(4):
        space.scatter(s * theta)
        weights = [space.parameters[name] for name in names]
        draw = next(samples)
        loss = plain_loss(exact, pairs, draw)
        g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, weights)])
        average, weight = momentum * average + (1 - momentum) * g, momentum * weight + (1 - momentum)
        criterion = sign * s * theta * (average / weight)
        assert found.history["loss"][k] == pytest.approx(loss.item(), rel=1e-5)
        hits = 0
        for i, layer in enumerate(space.layers):
            if "threshold" in options:
                tau = options["threshold"]
            else:
                values = criterion if options.get("per_layer") is False else criterion[layer.slice]
                tau = max(0.0, sorted(values.tolist())[int(np.ceil(0.9 * len(values))) - 1])
            hit = criterion[layer.slice] > tau
            s[layer.slice] = torch.where(hit, s[layer.slice] * 0.7, s[layer.slice])
            assert abs(found.history["hits"][k, i] - int(hit.sum())) <= 1
            hits += int(hit.sum())
            density = float((s[layer.slice] < 0.5).double().mean())
            assert found.history["density"][k, i] == pytest.approx(density, abs=2 / layer.size)
        assert hits > 0
    space.scatter(theta)
    differing = ((found.scale() - s).abs() > 1e-4).sum()
    assert differing <= 4, f"{differing} of {len(found)} scales differ"  # ties at τ, rounded differently


LAYOUT = KVLayout((KVLayer("a", "down 0", "K", 0, 8, (4, 5), 0), KVLayer("b", "up 0", "V", 0, 8, (3, 5), 20)))
ROUNDS = 6


def some_gradients(seed):
    """Weights and a gradient for each round, float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=LAYOUT.n), rng.normal(size=(ROUNDS, LAYOUT.n)) + 0.5


def running_mean(values, momentum):
    """Of all rounds so far, the later the more: written out as weights that sum to 1."""
    weights = momentum ** np.arange(len(values))[::-1]
    return weights @ values / weights.sum()


def scaled_down(scale, criterion, share, rate):
    """One round: in each layer, whatever is above its quantile and above 0."""
    scale = scale.copy()
    for layer in LAYOUT:
        values = criterion[layer.slice]
        tau = max(0.0, np.sort(values)[int(np.ceil(share * layer.size)) - 1])
        scale[layer.slice][values > tau] *= 1 - rate
    return scale


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_curvature_is_taken_off_the_criterion(noise):
    """Gain of scaling down: s θ g − ½ (s θ)² h, h the variance of g over 2 noise (ours, see `SearchSettings`)."""
    theta, gradients = some_gradients(1)
    options = {"rule": "curvature", "momentum": 0.6, "rate": 0.25, "threshold_quantile": 0.7}
    rule = _Adaptive(torch.tensor(theta), torch.ones(LAYOUT.n).double(), LAYOUT, SearchSettings(**options))
    scale, plain = np.ones(LAYOUT.n), np.ones(LAYOUT.n)
    for k in range(ROUNDS):
        rule.update(torch.tensor(gradients[k]), noise)
        mean, square = running_mean(gradients[: k + 1], 0.6), running_mean(gradients[: k + 1] ** 2, 0.95)
        slope = scale * theta * mean
        curvature = np.maximum(square - mean**2, 0) / (2 * noise)
        scale = scaled_down(scale, slope - (scale * theta) ** 2 * curvature / 2, 0.7, 0.25)
        plain = scaled_down(plain, plain * theta * mean, 0.7, 0.25)
        np.testing.assert_allclose(rule.scale.numpy(), scale, rtol=1e-12)
    assert (scale < 1).any() and (scale != plain).any()


def test_every_band_of_the_schedule_has_the_same_vote():
    theta, gradients = some_gradients(2)
    gradients *= np.array([1.0, 100.0, 0.01] * 2)[:, None]  # the bands come in turn, and their sizes do not count
    options = {"rule": "bands", "bands": 3, "momentum": 0.6, "rate": 0.25, "threshold_quantile": 0.7}
    rule = _Adaptive(torch.tensor(theta), torch.ones(LAYOUT.n).double(), LAYOUT, SearchSettings(**options))
    assert rule.parts == 3
    scale = np.ones(LAYOUT.n)
    for k in range(ROUNDS):
        rule.update(torch.tensor(gradients[k]), 0.5)
        means = [running_mean(gradients[: k + 1][band::3], 0.6) for band in range(min(3, k + 1))]
        votes = [scale * theta * mean for mean in means]
        scale = scaled_down(scale, np.mean([vote / np.sqrt((vote**2).mean()) for vote in votes], 0), 0.7, 0.25)
        np.testing.assert_allclose(rule.scale.numpy(), scale, rtol=1e-12)
    assert (scale < 1).any()


def test_straight_through_shuts_the_largest_sums_within_a_budget_that_grows():
    theta, gradients = some_gradients(3)
    options = {"rule": "straight-through", "momentum": 0.6, "density": 0.3, "rounds": ROUNDS}
    rule = _StraightThrough(torch.tensor(theta), torch.ones(LAYOUT.n).double(), LAYOUT, SearchSettings(**options))
    latent, counts, reopened = np.zeros(LAYOUT.n), [], False
    before = np.ones(LAYOUT.n)
    for k in range(ROUNDS):
        hits, _ = rule.update(torch.tensor(gradients[k]), 0.5)
        latent += theta * running_mean(gradients[: k + 1], 0.6)
        scale = np.ones(LAYOUT.n)
        for layer in LAYOUT:
            budget = max(1, round(0.3 * min(1.0, (k + 1) / 3) * layer.size))
            best = np.argsort(-latent[layer.slice])[:budget]
            scale[layer.slice][best[latent[layer.slice][best] > 0]] = 0
        np.testing.assert_array_equal(rule.scale.numpy(), scale)
        np.testing.assert_array_equal(hits.numpy(), (scale == 0) & (before == 1))
        reopened |= bool(((scale == 1) & (before == 0)).any())
        counts.append(int((scale == 0).sum()))
        before = scale
    assert counts[0] < counts[1] < counts[2] and reopened
    nothing = _StraightThrough(torch.ones(LAYOUT.n), torch.ones(LAYOUT.n), LAYOUT, SearchSettings(**options))
    nothing.update(-torch.ones(LAYOUT.n), 0.5)
    assert (nothing.scale == 1).all()  # no neuron whose shutting would raise the loss


def test_the_pipeline_is_never_touched(v_pipe, pictured):
    before, processors = state(v_pipe), dict(v_pipe.unet.attn_processors)
    seen = []

    def look(search):
        assert_untouched(v_pipe, before)
        assert dict(v_pipe.unet.attn_processors) == processors
        assert search["step"] == len(seen) and search["steps"] == 4
        assert all(search[name].shape == (KVSpace(v_pipe).n,) for name in ("scale", "gradient", "hits"))
        seen.append(search["density"])
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_concept_neurons(v_pipe, pictured, callback=look, **SEARCH)
    assert len(seen) == 3
    assert_untouched(v_pipe, before)
    assert dict(v_pipe.unet.attn_processors) == processors


@pytest.mark.slow
def test_the_same_seed_finds_the_same_neurons(v_pipe, pictured, found):
    again = find_concept_neurons(v_pipe, pictured, **SEARCH)
    assert again == found and hash(again) == hash(found)
    other = find_concept_neurons(v_pipe, pictured, **SEARCH, seed=1)
    assert other != found
    assert found.overlap(other).jaccard > found.overlap(other).expected_jaccard


def test_a_search_goes_on_where_another_stopped(v_pipe, pictured, found):
    more = find_concept_neurons(v_pipe, pictured, **{**SEARCH, "rounds": 2}, start=found)
    assert len(more.history["loss"]) == 6 and more.history["hits"].shape == (6, len(found.layout))
    assert (more.scale() <= found.scale()).all() and len(more) > len(found)
    foreign = ConceptNeurons(found.layout, [], [], "ab" * 32)
    with pytest.raises(MismatchError, match="abababab"):
        find_concept_neurons(v_pipe, pictured, **SEARCH, start=foreign)


@pytest.mark.slow
def test_a_search_from_a_mask_file_keeps_its_history_and_sees_new_samples(v_pipe, pictured, found, monkeypatch):
    seen = []

    def sampled(*arguments, **options):
        for batch in sample_batches(*arguments, **options):
            seen.append(batch.noise)
            yield batch

    def samples_of(start):
        seen.clear()
        made = find_concept_neurons(v_pipe, pictured, **{**SEARCH, "rounds": 2}, start=start)
        return made, [noise.flatten().tolist() for noise in seen]

    monkeypatch.setattr("coneslab.neurons.search.sample_batches", sampled)
    fresh, first = samples_of(None)
    bare = ConceptNeurons.from_bytes(found.to_bytes(), v_pipe)
    assert not bare.history
    more, others = samples_of(bare)
    assert len(more.history["loss"]) == 2 and more.history.keys() == fresh.history.keys()
    assert more.history["hits"].shape == (2, len(found.layout))
    _, third = samples_of(found)  # whose history says that the first four have been seen
    _, again = samples_of(bare)
    longer, last = samples_of(more)
    assert len(longer.history["loss"]) == 4 and last[:2] == others  # drawn once more, to come to those after them
    assert again == others and third[:2] == first
    known = [*third, *others]  # every sample so far, once
    assert all(batch not in known for batch in last[2:]) and len({str(batch) for batch in known}) == len(known)


def test_the_history_tells_what_happened(found):
    rounds, layers = SEARCH["rounds"], len(found.layout)
    for name, shape in {"loss": (rounds,), "subject_loss": (rounds,), "prior_loss": (rounds,)}.items():
        assert found.history[name].shape == shape
    for name in ("hits", "density", "threshold"):
        assert found.history[name].shape == (rounds, layers)
    sizes = np.array([layer.size for layer in found.layout])
    assert np.allclose(found.history["density"][-1], found.counts() / sizes, atol=1e-6)
    assert (found.history["density"][:, :] >= 0).all() and (found.history["threshold"] >= 0).all()
    assert found.settings["rounds"] == rounds and found.settings["prompt"] == "a sks cat"
    with pytest.raises(TypeError):
        found.settings["rounds"] = 1
    with pytest.raises(ValueError, match="read-only"):
        found.history["loss"][0] = 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"threshold_quantile": 1.0},
        {"momentum": 1.0},
        {"rate": 0.0},
        {"cut": 0.0},
        {"sign": 0},
        {"batch_size": 0},
        {"chunk": 0},
        {"prior_weight": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(v_pipe, pictured, wrong):
    with pytest.raises(ConeslabError, match=next(iter(wrong))):
        find_concept_neurons(v_pipe, pictured, **{**SEARCH, **wrong})


def test_pictures_of_the_prior_need_samples_of_it(v_pipe, pictured):
    with pytest.raises(ConeslabError, match="got pictures of the prior and prior_samples=0"):
        concept_loss(v_pipe, pictured, prior=pictured.images, samples=2)


def test_without_a_prior_only_the_subject_counts(v_pipe, pictured, monkeypatch):
    monkeypatch.setattr(pairs_module, "generate", lambda *a, **k: pytest.fail("no prior picture is needed"))
    found = find_concept_neurons(v_pipe, pictured, **{**SEARCH, "prior_images": 5}, prior_weight=0.0)
    assert "prior_loss" not in found.history
    assert np.allclose(found.history["loss"], found.history["subject_loss"])


def test_prior_pictures_are_drawn_once(v_pipe, pictured, monkeypatch):
    calls = []
    original = pairs_module.generate
    monkeypatch.setattr(pairs_module, "generate", lambda *a, **k: calls.append(k) or original(*a, **k))
    first = prior_pictures(v_pipe, pictured, n=2, sampler_steps=1, seed=9)
    again = prior_pictures(v_pipe, pictured, n=2, sampler_steps=1, seed=9)
    assert all(one is other for one, other in zip(first, again, strict=True)) and len(calls) == 1
    assert list(calls[0]["prompts"]) == [pictured.prior_prompt] * 2
    prior_pictures(v_pipe, pictured, n=2, sampler_steps=1, seed=10)
    assert len(calls) == 2
    weight = KVSpace(v_pipe).parameters[KVSpace(v_pipe).names[0]]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
        changed = prior_pictures(v_pipe, pictured, n=2, sampler_steps=1, seed=9)
        assert not any(one is other for one, other in zip(first, changed, strict=True))
        weight.copy_(kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*are enlarged:coneslab.errors.ConeslabWarning")
def test_a_large_stable_diffusions_structure_is_searched(sd_pipe, pictured):
    before = state(sd_pipe)
    found = find_concept_neurons(sd_pipe, pictured, **{**SEARCH, "rounds": 2}, chunk=5)
    assert found.n == KVSpace(sd_pipe).n and len(found.layout) == 32 and len(found) > 0
    with found.applied(sd_pipe):
        pass
    assert_untouched(sd_pipe, before)


def test_quantiles_are_those_of_sorted_values():
    layout = small_layout()
    values = torch.randn(layout.n)
    got = quantiles(values, layout, 0.75)
    for tau, layer in zip(got, layout, strict=True):
        part = values[layer.slice]
        assert (part <= tau).sum() == int(np.ceil(0.75 * layer.size)) and tau in part
    assert (
        quantiles(values, layout, 0.75, per_layer=False) == np.sort(values.numpy())[int(np.ceil(0.75 * 46)) - 1]
    ).all()


# --- masks ---


def small_layout(shapes=((2, 5), (4, 9))):
    layers, start = [], 0
    for i, shape in enumerate(shapes):
        layers.append(KVLayer(f"down_blocks.{i}.attn2.to_k.weight", f"down {i}", "K", i, 8, shape, start))
        start += shape[0] * shape[1]
    return KVLayout(tuple(layers))


@st.composite
def masks(draw, layout=None):
    layout = layout or small_layout()
    chosen = draw(st.sets(st.integers(0, layout.n - 1)))
    values = st.floats(0, 1, width=32, exclude_max=True)
    scales = [draw(values) for _ in chosen]
    return ConceptNeurons(layout, sorted(chosen), scales, "ab" * 32, subject=draw(st.text(max_size=4)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=masks())
def test_masks_come_back_from_dense_scales_and_from_files(tmp_path, mask):
    scale = mask.scale()
    assert ConceptNeurons.from_scale(scale, mask.layout, mask.fingerprint) == mask
    assert ConceptNeurons.load(mask.save(tmp_path / "mask")) == mask
    again = load_edit(tmp_path / "mask")
    assert again.subject == mask.subject and again.cut == mask.cut and again.layout == mask.layout
    dense = {j for j in range(mask.n) if scale[j] < mask.cut}
    assert set(mask.shut().tolist()) == dense == set(torch.nonzero(mask.mask()).flatten().tolist())
    assert mask.density == len(dense) / mask.n and mask.counts().sum() == len(dense)
    assert mask.binary().binary() == mask.binary() and set(mask.binary().scales.tolist()) <= {0.0}
    assert mask.binary().nbytes == 4 * len(dense)
    assert [row["shut"] for row in mask.per_layer()] == mask.counts().tolist()


@settings(max_examples=60, deadline=None)
@given(first=masks(), second=masks())
def test_overlap_is_that_of_the_sets(first, second):
    a, b = set(first.shut().tolist()), set(second.shut().tolist())
    overlap = first.overlap(second)
    assert (overlap.intersection, overlap.union) == (len(a & b), len(a | b))
    assert overlap.jaccard == (len(a & b) / len(a | b) if a | b else 0)
    expected = 0.0
    for layer in first.layout:
        inside = set(range(layer.start, layer.start + layer.size))
        expected += len(a & inside) * len(b & inside) / layer.size
    assert overlap.expected_intersection == pytest.approx(expected)
    together = len(a) + len(b) - expected
    assert overlap.expected_jaccard == pytest.approx(expected / together if together else 0)


def test_a_mask_is_confined_to_the_layers_that_match(found):
    keys, values = found.within(kind="K"), found.within(kind="V")
    assert len(keys.indices) and len(values.indices)
    assert sorted([*keys.indices, *values.indices]) == found.indices.tolist()
    place = found.layout.where(kind="V").numpy()
    assert place[values.indices].all() and not place[keys.indices].any()
    assert torch.equal(values.scale()[place], found.scale()[place]) and (values.scale()[~place] == 1).all()
    assert found.within() == found


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"kind": "value"}, "kind is 'value': choose one of K, V"),
        ({"kind": "V", "level": 99}, "level is 99: choose one of 0, 1"),
        ({"block": "middle"}, "block is 'middle': choose one of down 0, "),
        ({"block": "down 0", "level": 1}, "no layer has block='down 0' and level=1: there are down 0 at level 0"),
    ],
)
def test_layers_that_are_not_there_are_refused_by_name(found, where, reason):
    for choose in (found.within, found.layout.where):
        with pytest.raises(ConeslabError, match=reason):
            choose(**where)


def test_a_mask_of_which_nothing_is_left_says_so(found):
    keys = found.within(kind="K")
    with pytest.warns(ConeslabWarning, match="has no neuron in the layers asked for: nothing is left"):
        assert len(keys.within(kind="V")) == 0


def test_chance_is_what_random_masks_overlap_by(found):
    overlaps = [found.overlap(random_neurons(found, seed=seed)) for seed in range(40)]
    mean = np.mean([overlap.intersection for overlap in overlaps])
    error = np.std([overlap.intersection for overlap in overlaps]) / 40**0.5
    assert abs(mean - overlaps[0].expected_intersection) < 4 * error


@pytest.mark.parametrize(
    ("indices", "scales", "reason"),
    [
        ([3, 1], [0, 0], "ascending"),
        ([1, 1], [0, 0], "each once"),
        ([-1, 2], [0, 0], r"\[0, 46\)"),
        ([1, 46], [0, 0], "run from 1 to 46"),
        ([1, 2], [0], "equal length"),
        ([[1], [2]], [[0], [0]], "two vectors"),
        ([1.0, 2.0], [0, 0], "integers"),
        ([1, 2], [0, float("nan")], "numbers in"),
        ([1, 2], [0, float("inf")], "numbers in"),
        ([1, 2], [-0.1, 0], "numbers in"),
        ([1, 2], [1.5, 0], "numbers in"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(indices, scales, reason):
    with pytest.raises(ConeslabError, match=reason):
        ConceptNeurons(small_layout(), indices, scales, "ab")


def test_masks_are_immutable_and_printable(found):
    for array in (found.indices, found.scales):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        found.indices = np.array([1])
    assert isinstance(found, Edit)
    assert "cat" in repr(found) and f"{found.n:,}" in repr(found) and found.fingerprint[:8] in repr(found)
    assert found._repr_html_().count("<tr>") == 1 + len(found.layout)
    found.scale().zero_()
    assert found.scale().max() == 1


# --- masks as edits ---


@pytest.mark.parametrize("dose", [0.0, 0.3, 1.0])
def test_weights_are_scaled_by_the_dose_and_others_keep_their_bits(v_pipe, found, dose):
    before, space = state(v_pipe), KVSpace(v_pipe)
    theta = space.gather()
    with found.applied(v_pipe, dose) as given_pipe:
        assert given_pipe is v_pipe
        now = space.gather()
        assert torch.allclose(now, theta * (1 - dose * (1 - found.scale())), rtol=1e-6, atol=0)
        others = found.scale() == 1
        assert torch.equal(now[others], theta[others])
    assert_untouched(v_pipe, before)


def test_masks_nest_and_survive_errors(v_pipe, found):
    before, theta = state(v_pipe), KVSpace(v_pipe).gather()
    second = random_neurons(found, seed=1)
    with pytest.raises(KeyboardInterrupt):
        with found.applied(v_pipe), second.applied(v_pipe, 0.5):
            scale = found.scale() * (1 - 0.5 * (1 - second.scale()))
            assert torch.allclose(KVSpace(v_pipe).gather(), theta * scale, rtol=1e-5)
            assert model_fingerprint(v_pipe) == found.fingerprint
            raise KeyboardInterrupt
    assert_untouched(v_pipe, before)


@pytest.mark.slow
def test_the_model_is_hashed_once_from_the_search_to_the_last_block(own_pipe, pictured, tmp_path, monkeypatch):
    hashed = []
    real = pipelines._sha256
    monkeypatch.setattr(pipelines, "_FINGERPRINTS", {})
    monkeypatch.setattr(pipelines, "_sha256", lambda weights: hashed.append(len(weights)) or real(weights))
    found = find_concept_neurons(own_pipe, pictured, **SEARCH)
    wholes = [len(part.state_dict()) for part in (own_pipe.unet, own_pipe.text_encoder, own_pipe.vae)]
    assert hashed == [len(found.layout), *wholes]  # the keys and values; all that draws the prior's pictures
    find_concept_neurons(own_pipe, pictured, **SEARCH, seed=1)
    again = load_edit(found.save(tmp_path / "found"))
    for edit in (found, again):
        with edit.applied(own_pipe), random_neurons(found).applied(own_pipe, 0.5):
            assert model_fingerprint(own_pipe) == found.fingerprint
    assert len(hashed) == 4
    own_pipe.unet.get_parameter(found.layout.names[2]).data[0, 0] += 1
    with pytest.raises(MismatchError, match="belongs to model"), found.applied(own_pipe):
        pass
    assert hashed[4:] == [len(found.layout)]


def test_a_mask_of_another_model_is_refused_and_the_pipeline_untouched(v_pipe, epsilon_pipe, found):
    before = state(v_pipe)
    other = ConceptNeurons(found.layout, found.indices, found.scales, "ab" * 32, subject="cat")
    with pytest.raises(MismatchError, match="abababab.*" + found.fingerprint[:8]):
        with other.applied(v_pipe):
            pass
    with other.applied(v_pipe, check_model=False):
        assert not torch.equal(KVSpace(v_pipe).gather(), KVSpace(epsilon_pipe).gather())
    small = ConceptNeurons(small_layout(), [1], [0.0], found.fingerprint)
    for check in (True, False):
        with pytest.raises(MismatchError, match="46 neurons.*8,448"):
            with small.applied(v_pipe, check_model=check):
                pass
    with pytest.raises(ConeslabError, match="dose"):
        found.applied(v_pipe, float("inf"))
    with pytest.raises(MismatchError):
        found.overlap(small)
    assert_untouched(v_pipe, before)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_mask_file_is_refused_or_the_same_mask(tmp_path, found, data):
    whole = found.save(tmp_path / "whole").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged = damaged[:place]
    else:
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "damaged").write_bytes(damaged)
    try:
        assert load_edit(tmp_path / "damaged") == found
    except FileFormatError:
        pass


def test_a_file_keeps_settings_and_history(found, tmp_path):
    again = ConceptNeurons.load(found.save(tmp_path / "mask"))
    assert again == found and dict(again.settings) == dict(found.settings)
    assert again.history.keys() == found.history.keys()
    assert all(np.array_equal(again.history[name], rows) for name, rows in found.history.items())


def test_a_well_formed_file_with_a_bad_mask_is_refused(found, tmp_path, monkeypatch):
    tensors, description = found._pack()
    for change in (
        {"indices": tensors["indices"].flip(0)},
        {"scales": torch.full_like(tensors["scales"], float("nan"))},
        {"scales": tensors["scales"][1:]},
        {"indices": tensors["indices"] + found.n},
    ):
        monkeypatch.setattr(ConceptNeurons, "_pack", lambda self, change=change: ({**tensors, **change}, description))
        path = found.save(tmp_path / "bad")
        with pytest.raises(FileFormatError, match="cannot be read as ConceptNeurons: "):
            load_edit(path)


# --- controls ---


def test_random_neurons_keep_count_and_scales_in_every_layer(found):
    control = random_neurons(found, seed=4)
    assert control == random_neurons(found, seed=4) != random_neurons(found, seed=5)
    assert (control.counts() == found.counts()).all()
    for layer in found.layout:
        ours, theirs = (mask.scale()[layer.slice].sort().values for mask in (control, found))
        assert torch.equal(ours, theirs)
    assert random_neurons(found.binary()).nbytes == found.binary().nbytes


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["gradient", "gradient_times_weight", "weight"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_top_k_takes_the_largest(v_pipe, pictured, criterion, per_layer):
    options = {"rounds": 2, "progress": False, **BATCHES}
    mask = top_k_neurons(v_pipe, pictured, criterion=criterion, density=0.1, per_layer=per_layer, **options)
    theta = KVSpace(v_pipe).gather()
    g = mean_gradient(v_pipe, pictured, **options)
    score = {"gradient": g.abs(), "gradient_times_weight": (theta * g).abs(), "weight": theta.abs()}[criterion]
    chosen = mask.mask()
    parts = [layer.slice for layer in mask.layout] if per_layer else [slice(None)]
    for part in parts:
        assert abs(int(chosen[part].sum()) - 0.1 * len(score[part])) <= 0.5
        assert score[part][chosen[part]].min() >= score[part][~chosen[part]].max()
    assert set(mask.scales.tolist()) == {0.0}


@pytest.mark.slow
def test_the_mean_gradient_is_that_of_the_untouched_model_over_all_batches(pipe, pictured):
    exact = double(pipe)
    prior = prior_pictures(pipe, pictured, n=4, sampler_steps=2)
    options = {"batch_size": 6, "prior_batch_size": 3, "prior": prior, "seed": 5}
    found = mean_gradient(exact, pictured, rounds=3, progress=False, **options)
    pairs = concept_latents(exact, pictured, **options)
    space, samples = KVSpace(exact), sample_batches(exact, pairs, seed=5)
    weights = [space.parameters[layer.name] for layer in space.layers]
    each = [torch.autograd.grad(plain_loss(exact, pairs, next(samples)), weights) for _ in range(3)]
    expected = torch.stack([torch.cat([part.flatten() for part in one]) for one in each]).mean(0)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_top_k_copies_a_masks_density(v_pipe, pictured, found):
    like = top_k_neurons(v_pipe, pictured, criterion="weight", like=found)
    assert (like.counts() == found.counts()).all()
    overall = top_k_neurons(v_pipe, pictured, criterion="weight", like=found, per_layer=False)
    assert len(overall.shut()) == len(found.shut())
    for wrong in ({}, {"density": 0.1, "like": found}, {"density": 2.0}, {"density": 0.1, "criterion": "size"}):
        with pytest.raises(ConeslabError, match="density|criterion"):
            top_k_neurons(v_pipe, pictured, **wrong)


@pytest.mark.slow
def test_shutting_lowers_the_loss_and_the_reversed_sign_raises_it(v_pipe, pictured, found):
    options = {"samples": 64, "batch_size": 64}
    plain = concept_loss(v_pipe, pictured, **options)
    back = reversed_neurons(v_pipe, pictured, **SEARCH)
    assert back.settings["sign"] == -1
    assert concept_loss(v_pipe, pictured, edit=found, **options).subject < plain.subject
    assert concept_loss(v_pipe, pictured, edit=back, **options).subject > plain.subject


@pytest.mark.slow
def test_fine_tuning_is_adamw_on_the_keys_and_values(v_pipe, pictured):
    """Against torch's AdamW on the U-Net's own parameters, in float64, with `plain_loss`."""
    exact = double(v_pipe)
    prior = prior_pictures(v_pipe, pictured, n=4, sampler_steps=2)
    batches = {"batch_size": 6, "prior_batch_size": 3, "prior": prior}
    delta = finetune_kv(exact, pictured, steps=4, learning_rate=1e-3, weight_decay=0.1, progress=False, **batches)
    pairs = concept_latents(exact, pictured, **batches)
    space, samples = KVSpace(exact), sample_batches(exact, pairs, seed=0)
    theta = space.gather()
    optimiser = torch.optim.AdamW(list(space.parameters.values()), lr=1e-3, weight_decay=0.1)
    for step in range(4):
        loss = plain_loss(exact, pairs, next(samples))
        assert delta.history["loss"][step] == pytest.approx(loss.item(), rel=1e-4)
        exact.unet.zero_grad()
        loss.backward()
        optimiser.step()
    expected = space.gather() - theta
    got = torch.cat([delta.deltas[name].flatten() for name in space.names]).double()
    assert torch.allclose(got, expected, rtol=0.02, atol=2e-5)
    assert delta.fingerprint != model_fingerprint(exact) and delta.nbytes == 4 * space.n


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_and_leaves_the_pipeline_alone(v_pipe, pictured, tmp_path):
    before, seen = state(v_pipe), []
    delta = finetune_kv(
        v_pipe,
        pictured,
        steps=15,
        learning_rate=5e-3,
        progress=False,
        callback=lambda state: seen.append(state["step"]),
        **BATCHES,
    )
    assert_untouched(v_pipe, before)
    assert seen == list(range(15)) and len(delta.history["prior_loss"]) == 15
    options = {"samples": 64, "batch_size": 64}
    plain = concept_loss(v_pipe, pictured, **options)
    assert concept_loss(v_pipe, pictured, edit=delta, **options).subject < plain.subject
    assert_untouched(v_pipe, before)
    again = load_edit(delta.save(tmp_path / "delta"))
    assert concept_loss(v_pipe, pictured, edit=again, **options).subject < plain.subject
    with pytest.raises(ConeslabError, match="learning_rate"):
        finetune_kv(v_pipe, pictured, steps=1, learning_rate=0.0)


# --- the measure ---


@pytest.mark.slow
def test_the_measured_loss_is_paired_and_is_the_plain_one(v_pipe, pictured, found):
    first = concept_loss(v_pipe, pictured, samples=12, batch_size=5)
    assert np.array_equal(first.subject_values, concept_loss(v_pipe, pictured, samples=12, batch_size=5).subject_values)
    exact = double(v_pipe)
    pairs = concept_latents(v_pipe, pictured, batch_size=12, prior_batch_size=0)
    with torch.no_grad():
        expected = plain_loss(exact, pairs, next(sample_batches(v_pipe, pairs, seed=1_000_000)))
    assert first.subject == pytest.approx(float(expected), rel=1e-5)
    both = concept_loss(v_pipe, pictured, samples=12, prior_samples=8, batch_size=5)
    assert len(both.prior_values) == 8 and np.isfinite(both.prior) and np.isnan(first.prior)
    outside = concept_loss(v_pipe, pictured, samples=12, edit=found, dose=0.5)
    with found.applied(v_pipe, 0.5):
        inside = concept_loss(v_pipe, pictured, samples=12)
    assert np.allclose(inside.subject_values, outside.subject_values)
    width = embedding_of(v_pipe).weight.shape[1]
    word = TokenEdit(("sks",), torch.full((1, width), 0.5), vocabulary_fingerprint(v_pipe))  # an edit of the text
    outside = concept_loss(v_pipe, pictured, samples=12, batch_size=5, edit=word)
    with word.applied(v_pipe):
        inside = concept_loss(v_pipe, pictured, samples=12, batch_size=5)
    assert np.allclose(inside.subject_values, outside.subject_values) and outside.subject != first.subject
    assert "subject=" in repr(both)


def test_names_in_html_are_shown_as_they_are(v_pipe):
    space = KVSpace(v_pipe)
    shown = ConceptNeurons(space.layout, [0], [0.0], space.fingerprint(), subject="<cat*>")._repr_html_()
    assert "<b>&lt;cat*&gt;</b>" in shown and "<cat" not in shown

"""Ablations: losses against hand computation, closed forms against an optimiser, only the named weights change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coneslab.diffusion.encoding import encode_images, encode_prompts
from coneslab.diffusion.kvspace import KVSpace
from coneslab.diffusion.loss import add_noise, denoising_loss, target
from coneslab.diffusion.sampling import generate
from coneslab.edits.base import Combined, Edit, load_edit
from coneslab.edits.tokens import TokenEdit
from coneslab.edits.weights import WeightDelta
from coneslab.errors import ConeslabError
from coneslab.finetuning.samples import CaptionedLatents, numbered_batches
from coneslab.methods.ablation import unlearning
from coneslab.methods.ablation.concept_ablation import ablate, ablation_data
from coneslab.methods.ablation.concept_prune import prune_feed_forward
from coneslab.methods.ablation.esd import erase
from coneslab.methods.ablation.neurons import ablating_neurons
from coneslab.methods.ablation.report import evaluate_ablation
from coneslab.methods.ablation.uce import closed_form_edit
from coneslab.methods.ablation.unlearning import unlearn

DRAW = {"pictures": 4, "sampler_steps": 2}
FAST = DRAW | {"steps": 3, "batch_size": 4, "preserve_batch_size": 2, "progress": False}


@pytest.fixture(params=["v_pipe", "epsilon_pipe"])
def pipe(request):
    return request.getfixturevalue(request.param)


def predictions(pipe, draw, captions, counts):
    text = encode_prompts(pipe, list(captions)).repeat_interleave(torch.tensor(list(counts)), 0)
    noisy = add_noise(pipe.scheduler, draw.latents, draw.noise, draw.timesteps)
    return pipe.unet(noisy, draw.timesteps, encoder_hidden_states=text).sample


@pytest.mark.slow
@pytest.mark.parametrize("method", ["model", "noise"])
def test_the_loss_is_what_the_paper_writes(pipe, method):
    """First step of each method, with preservation, recomputed with the plain U-Net."""
    templates, options = ("a {}", "the {} in the city"), FAST | {"steps": 1, "batch_size": 5, "preserve_weight": 0.5}
    edit = ablate(pipe, "cat", "dog", objective=method, templates=templates, dtype=torch.float32, **options)
    shown = ablation_data(pipe, "cat", "dog", templates=templates, **DRAW)
    assert shown.captions == ("a cat", "the cat in the city") and shown.anchors == ("a dog", "the dog in the city")
    from coneslab.methods.ablation.concept_ablation import AblationSettings, _captioned

    settings = AblationSettings(batch_size=5, preserve_batch_size=2, preserve_weight=0.5)
    pairs = _captioned(pipe, shown, settings)
    assert [pair.batch_size for pair in pairs] == [3, 2, 1, 1]
    draw = numbered_batches(pipe, pairs, 0)(0)
    with torch.no_grad():
        own = predictions(pipe, draw, (*shown.captions, *shown.anchors), (3, 2, 1, 1))
        anchor = predictions(pipe, draw, (*shown.anchors, *shown.anchors), (3, 2, 1, 1))
        wanted = target(pipe.scheduler, draw.latents, draw.noise, draw.timesteps)
        aim = torch.cat([anchor[:5] if method == "model" else wanted[:5], wanted[5:]])
        each = (own - aim).square().mean((1, 2, 3))
        expected = each[:5].mean() + 0.5 * each[5:].mean()
    assert edit.history["loss"][0] == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def parted(pipe, edit, teacher):
    """Squared distance of what the edited model says about a cat from what the teacher says about a dog."""
    shown = ablation_data(pipe, "a cat", "a dog", **DRAW)
    draw = numbered_batches(pipe, [CaptionedLatents(shown.latents[0], torch.zeros(12, 24), 32)], seed=99)(0)
    anchor = predictions(pipe, draw, ["a dog"], [32])
    with edit.applied(pipe):
        own = predictions(pipe, draw, ["a cat"], [32])
        anchor = anchor if teacher == "frozen" else predictions(pipe, draw, ["a dog"], [32])
    return float((own - anchor).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["frozen", pytest.param("current", marks=pytest.mark.slow)])
@pytest.mark.parametrize("parameters", ["cross_attention_kv", pytest.param("attention", marks=pytest.mark.slow), "all"])
def test_only_the_stated_weights_change_and_they_learn_the_anchors_prediction(v_pipe, parameters, teacher):
    options = FAST | {"steps": 12, "preserve_batch_size": 0}
    edit = ablate(v_pipe, "a cat", "a dog", parameters=parameters, teacher=teacher, **options)
    assert isinstance(edit, WeightDelta) and isinstance(edit, Edit)
    names = {name for name, delta in edit.deltas.items() if delta.any()}
    everything = dict(v_pipe.unet.named_parameters())
    allowed = {
        "cross_attention_kv": set(KVSpace(v_pipe).names),
        "attention": {name for name in everything if ".attn1." in name or ".attn2." in name},
        "all": set(everything),
    }[parameters]
    assert names <= allowed and len(names) > 0.8 * len(allowed)
    assert parted(v_pipe, edit, teacher) < 0.95 * parted(v_pipe, Combined(()), teacher)


@pytest.mark.slow
def test_the_embedding_group_changes_the_targets_own_words(v_pipe):
    options = FAST | {"steps": 12, "preserve_batch_size": 0}
    edit = ablate(v_pipe, "a cat", "a dog", parameters="embedding", learning_rate=0.05, **options)
    assert isinstance(edit, TokenEdit) and edit.tokens == ("cat",)
    assert np.mean(edit.history["loss"][-3:]) < np.mean(edit.history["loss"][:3])
    plain = encode_prompts(v_pipe, ["a dog"])
    with edit.applied(v_pipe):
        assert torch.equal(encode_prompts(v_pipe, ["a dog"]), plain)
    for aimed, reason in (("a zebra", "not in the vocabulary"), ("the dog", None)):
        if reason:
            with pytest.raises(ConeslabError, match=reason):
                ablate(v_pipe, aimed, "a dog", parameters="embedding", **FAST)
    with pytest.raises(ConeslabError, match="no word that its anchor lacks"):
        ablate(v_pipe, "dog", "a dog", parameters="embedding", **FAST)
    with pytest.raises(ConeslabError, match="teacher='frozen'"):
        ablate(v_pipe, "a cat", "a dog", parameters="embedding", teacher="current", **FAST)


@pytest.mark.slow
def test_the_current_teacher_is_the_model_in_training(v_pipe):
    """Both teachers agree at the first step, where nothing is trained yet, and part afterwards."""
    runs = {
        teacher: ablate(v_pipe, "a cat", "a dog", teacher=teacher, dtype=torch.float32, learning_rate=0.02, **FAST)
        for teacher in ("frozen", "current")
    }
    first, later = zip(*((run.history["loss"][0], run.history["loss"][-1]) for run in runs.values()), strict=True)
    assert first[0] == pytest.approx(first[1], rel=1e-4) and abs(later[0] - later[1]) > 1e-4 * later[0]


def test_several_targets_share_an_anchor_or_have_their_own(v_pipe):
    shown = ablation_data(v_pipe, ["cat", "car"], "dog", templates=("a {}",), **DRAW)
    assert shown.anchors == ("a dog", "a dog") and [len(part) for part in shown.latents] == [2, 2]
    own = ablation_data(v_pipe, ["cat", "car"], ["dog", "house"], templates=("a {}",), **DRAW)
    assert own.anchors == ("a dog", "a house")
    images = v_pipe(["a dog"] * 3, num_inference_steps=1).images
    given = ablation_data(v_pipe, "cat", "dog", images=images)
    assert len(given.latents[0]) == 3


@pytest.mark.slow
def test_ablations_come_back_from_files(v_pipe, tmp_path):
    edit = ablate(v_pipe, "a cat", "a dog", **FAST)
    again = load_edit(edit.save(tmp_path / "cat"))
    assert all(torch.equal(again.deltas[name], delta) for name, delta in edit.deltas.items())
    assert again.settings["anchor"] == "a dog"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "a dog"}, "the same or empty"),
        ({"target": " "}, "target is empty"),
        ({"target": ["a cat", "a car"], "anchor": ["a dog"] * 3}, "2 targets and 3 anchors"),
        ({"target": []}, "0 targets"),
        ({"templates": ("on the grass",)}, "with {}"),
        ({"images": []}, "give at least one"),
        ({"pictures": 0}, "pictures is 0: give a positive"),
        ({"objective": "magic"}, "choose one of model, noise"),
        ({"parameters": "some"}, "choose one of cross_attention_kv"),
        ({"teacher": "none"}, "frozen, current"),
        ({"teacher": "current", "objective": "noise"}, "nobody predicts anything: use teacher='frozen'"),
        ({"steps": 0}, "positive"),
        ({"method": "model"}, "not a setting of concept ablation; these are: .*objective"),
    ],
)
def test_bad_settings_are_refused(v_pipe, options, reason):
    settings = {"target": "a cat", "anchor": "a dog", **FAST, **options}
    with pytest.raises(ConeslabError, match=reason):
        ablate(v_pipe, settings.pop("target"), settings.pop("anchor"), **settings)


# --- what the model cannot tell apart ---

WAYS = {
    "model-based": lambda pipe, *pair: ablate(pipe, *pair, **FAST),
    "data": lambda pipe, *pair: ablation_data(pipe, *pair, **DRAW),
    "UCE": closed_form_edit,
    "ESD": lambda pipe, target, anchor: erase(pipe, target, **DRAW, steps=1, progress=False),
    "pruning": lambda pipe, *pair: prune_feed_forward(pipe, *pair, **DRAW),
    "neurons": lambda pipe, *pair: ablating_neurons(pipe, *pair, **DRAW, rounds=1, progress=False),
    "evaluation": lambda pipe, *pair: evaluate_ablation(pipe, None, None, *pair),
    "unlearning": lambda pipe, *pair: unlearn(pipe, *pair, **DRAW, steps=1, progress=False),
}
LONG = "the house on the beach in the city and the "  # ten tokens, and two for start and end: as many as are read
SAME = {
    "the same": ("a cat", "a cat"),
    "capitals": ("a Cat", "a cat"),
    "spaces": (" a  cat ", "a cat"),
    "cut off": (f"{LONG}cat", f"{LONG}dog"),
    "empty": ("", "a dog"),
    "blank": (" \t", "a dog"),
    "empty anchor": ("a cat", " "),
}


@pytest.mark.parametrize("pair", SAME)
@pytest.mark.parametrize("way", WAYS)
def test_a_target_that_the_model_cannot_tell_from_its_anchor_is_refused_in_every_way(v_pipe, way, pair):
    if way == "ESD" and pair not in ("empty", "blank"):
        pytest.skip("it has no anchor")
    with pytest.raises(ConeslabError, match="the same or empty for this model|(target|anchor) is empty|shorten it"):
        WAYS[way](v_pipe, *SAME[pair])


def test_captions_that_differ_only_beyond_what_is_read_are_refused_in_their_template(v_pipe):
    for call in (closed_form_edit, ablation_data):
        with pytest.raises(
            ConeslabError, match="reads 12 tokens at most, which leaves out .* of 'the house on the beach"
        ):
            call(v_pipe, "cat", "dog", templates=("a {}", LONG + "{}"))


@pytest.mark.parametrize("templates", [(), ("a cat",), ("a {}", "on the grass")])
def test_templates_without_a_place_for_the_concept_are_refused(v_pipe, templates):
    for call in (closed_form_edit, ablation_data, ablate):
        with pytest.raises(ConeslabError, match="templates"):
            call(v_pipe, "cat", "dog", templates=templates)


def test_ways_that_take_one_concept_say_so(v_pipe):
    for way in ("pruning", "neurons"):
        with pytest.raises(ConeslabError, match="target is .'a cat', 'a car'.: give a text"):
            WAYS[way](v_pipe, ["a cat", "a car"], "a dog")
    with pytest.raises(ConeslabError, match="give a text"):
        erase(v_pipe, ["a cat", "a car"])


def test_what_is_to_be_kept_are_other_captions(v_pipe):
    with pytest.raises(ConeslabError, match="'a CAT': both a target and to be preserved"):
        closed_form_edit(v_pipe, "a cat", "a dog", preserve=["a car", "a CAT"])


@pytest.mark.slow
def test_words_that_differ_in_capitals_alone_are_one_word(v_pipe):
    edit = ablate(v_pipe, "A Cat", "a dog", parameters="embedding", **FAST)
    assert edit.tokens == ("Cat",)  # not the article


# --- options that used to be dropped ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters",
    ["cross_attention_kv", *(pytest.param(one, marks=pytest.mark.slow) for one in ("attention", "all")), "embedding"],
)
@pytest.mark.parametrize("teacher", ["frozen", "current"])
def test_a_chunk_at_a_time_gives_the_same_edit(v_pipe, parameters, teacher, monkeypatch):
    if (parameters, teacher) == ("embedding", "current"):
        pytest.skip("refused: the anchor's prediction never changes")
    sizes = []
    forward = type(v_pipe.unet).forward

    def listen(unet, sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(unet, sample, *args, **kwargs)

    options = {**FAST, "parameters": parameters, "teacher": teacher, "dtype": torch.float32}
    whole = ablate(v_pipe, "a cat", "a dog", **options)
    monkeypatch.setattr(type(v_pipe.unet), "forward", listen)
    parts = ablate(v_pipe, "a cat", "a dog", chunk=2, **options)
    assert max(sizes[-12:]) <= 2
    assert np.allclose(whole.history["loss"], parts.history["loss"], rtol=1e-4)
    before, after = (edit.deltas if isinstance(edit, WeightDelta) else {"v": edit.vectors} for edit in (whole, parts))
    for name, delta in before.items():
        close = (delta - after[name]).abs() <= 1e-4 + 0.05 * delta.abs()
        assert close.double().mean() > 0.97, name  # AdamW magnifies what is next to nothing


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["attention", "all"])
def test_the_precision_of_passes_reaches_the_whole_unet(v_pipe, parameters):
    options = {**FAST, "parameters": parameters, "objective": "noise"}  # in which nothing else has a precision
    kinds = (torch.float32, torch.bfloat16)
    exact, rough = (ablate(v_pipe, "a cat", "a dog", dtype=kind, **options) for kind in kinds)
    assert exact.history["loss"][0] != rough.history["loss"][0]
    assert exact.history["loss"][0] == pytest.approx(rough.history["loss"][0], rel=0.1)
    for wrong, reason in (({"dtype": torch.float16}, "dtype is torch.float16"), ({"chunk": 0}, "chunk is 0")):
        with pytest.raises(ConeslabError, match=reason):
            ablate(v_pipe, "a cat", "a dog", **options, **wrong)


# --- neighbours ---


@pytest.mark.slow
@pytest.mark.parametrize("preserve", [["a car", "the house on the beach"], []])
def test_the_closed_form_is_the_minimum_of_its_objective(v_pipe, preserve):
    """Each position is an equation: from the target's last word on, and everywhere in what is preserved."""
    templates = ("{}", "the {} on the grass")
    options = {"templates": templates, "ridge": 0.3, "erase_weight": 0.7, "preserve_weight": 0.2}
    edit = closed_form_edit(v_pipe, "cat", "big dog", preserve=preserve, **options)
    name, parameter = list(KVSpace(v_pipe).parameters.items())[1]
    base = parameter.detach().double()

    def embedding(caption):
        return encode_prompts(v_pipe, [caption]).detach().double()[0]

    pairs = []
    for template in templates:
        own, other = (template.format(text) for text in ("cat", "big dog"))
        last, last_other = (len(v_pipe.tokenizer(text).input_ids) - 2 for text in (own, other))
        rows = min(12 - last, 12 - last_other)
        pairs.append((embedding(own)[last : last + rows], embedding(other)[last_other : last_other + rows]))
    kept = [embedding(caption) for caption in preserve or [""]]
    assert {len(own) for own, _ in pairs} == {8, 4} and all(len(rows) == 12 for rows in kept)

    def objective(weight):
        erased = sum((own @ weight.T - other @ base.T).square().sum() for own, other in pairs)
        held = sum((rows @ (weight - base).T).square().sum() for rows in kept)
        return 0.7 * erased + 0.2 * held + 0.3 * (weight - base).square().sum()

    free = base.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        loss = objective(free)
        loss.backward()
        return loss

    for _ in range(5):
        optimiser.step(closure)
    assert torch.allclose(base + edit.deltas[name].double(), free.detach(), atol=1e-5)
    assert objective(base + edit.deltas[name].double()) < objective(base)


@pytest.mark.slow
def test_erasure_aims_away_from_the_target(v_pipe):
    edit = erase(v_pipe, "a cat", eta=2.0, dtype=torch.float32, **DRAW, steps=1, batch_size=4, progress=False)
    from coneslab.diffusion.encoding import encode_images
    from coneslab.finetuning.samples import SamplerSettings, generate_once

    sampler = SamplerSettings(sampler_steps=2).sampler

    latents = encode_images(v_pipe, list(generate_once(v_pipe, ["a cat"] * 4, **sampler)))
    pair = CaptionedLatents(latents, encode_prompts(v_pipe, ["a cat"]).detach()[0], 4)
    draw = numbered_batches(v_pipe, [pair], 0)(0)
    with torch.no_grad():
        own, none = predictions(v_pipe, draw, ["a cat"], [4]), predictions(v_pipe, draw, [""], [4])
    expected = (own - (none - 2.0 * (own - none))).square().mean()
    assert edit.history["loss"][0] == pytest.approx(float(expected), rel=1e-4)
    longer = erase(v_pipe, "a cat", **DRAW, steps=12, batch_size=4, learning_rate=1e-3, progress=False)
    assert np.mean(longer.history["loss"][-3:]) < np.mean(longer.history["loss"][:3])


@pytest.mark.slow
def test_ablating_neurons_lower_the_targets_loss_on_the_anchor(v_pipe):
    options = {"rounds": 8, "batch_size": 8, "prior_batch_size": 4, "threshold_quantile": 0.95, "progress": False}
    found = ablating_neurons(v_pipe, "a cat", "a dog", **DRAW, **options)
    assert found.subject == "a cat → a dog" and len(found.shut())
    assert np.mean(found.history["subject_loss"][-3:]) < np.mean(found.history["subject_loss"][:3])


def test_pruning_takes_the_weights_that_the_target_needs_more(v_pipe):
    edit = prune_feed_forward(v_pipe, "a cat", "a dog", share=0.1, pictures=2, samples=8, sampler_steps=2)
    weights = dict(v_pipe.unet.named_parameters())
    assert set(edit.deltas) == {name for name in weights if name.endswith("ff.net.2.weight")}
    assert any(delta.any() for delta in edit.deltas.values())
    with edit.applied(v_pipe):
        for name, delta in edit.deltas.items():
            gone = delta != 0
            assert (weights[name][gone] == 0).all() and gone.sum(1).max() <= round(0.1 * delta.shape[1])
    # the scores by hand, for one layer
    from coneslab.diffusion.encoding import encode_images
    from coneslab.finetuning.samples import SamplerSettings, generate_once

    sampler = SamplerSettings(sampler_steps=2).sampler

    layer, scores = "mid_block.attentions.0.transformer_blocks.0.ff.net.2", []
    module = v_pipe.unet.get_submodule(layer)
    for caption in ("a cat", "a dog"):
        latents, seen = encode_images(v_pipe, list(generate_once(v_pipe, [caption] * 2, **sampler))), []
        draw = numbered_batches(
            v_pipe, [CaptionedLatents(latents, encode_prompts(v_pipe, [caption]).detach()[0], 8)], 0
        )(0)
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            predictions(v_pipe, draw, [caption], [8])
        handle.remove()
        scores.append(module.weight.detach().abs() * seen[0].reshape(-1, seen[0].shape[-1]).norm(dim=0))
    first = scores[0].argmax(1)
    rows = torch.arange(len(first))
    expected = scores[0][rows, first] > scores[1][rows, first]
    assert torch.equal(edit.deltas[f"{layer}.weight"][rows, first] != 0, expected)
    count, gone = max(1, round(0.1 * scores[0].shape[1])), edit.deltas[f"{layer}.weight"] != 0
    most = torch.zeros_like(gone).scatter_(1, scores[0].topk(count, dim=1).indices, True)
    assert torch.equal(gone, most & (scores[0] > scores[1])) and (most & ~gone).any() and count > 1


def test_neighbours_refuse_bad_settings(v_pipe):
    for call, reason in (
        (lambda: closed_form_edit(v_pipe, "a cat", "a dog", ridge=0), "positive"),
        (lambda: closed_form_edit(v_pipe, ["a", "b"], ["c"] * 3), "2 targets and 3 anchors"),
        (lambda: erase(v_pipe, " "), "target is empty"),
        (lambda: prune_feed_forward(v_pipe, "a cat", "a dog", share=1.0), "share in"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            call()


def test_the_denoising_loss_takes_another_target(v_pipe):
    torch.manual_seed(0)
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 800])
    text, other = encode_prompts(v_pipe, ["a cat"]), torch.randn(2, 4, 8, 8)
    loss = denoising_loss(v_pipe, latents, text, noise=noise, timesteps=t, regression_target=other)
    made = v_pipe.unet(add_noise(v_pipe.scheduler, latents, noise, t), t, encoder_hidden_states=text.expand(2, -1, -1))
    assert torch.allclose(loss, (made.sample - other).square().mean())


# --- unlearning ---

UNLEARN = {"pictures": 2, "sampler_steps": 2, "batch_size": 6, "preserve_batch_size": 2, "progress": False}


@pytest.mark.slow
def test_unlearning_aims_at_the_anchor_whatever_is_read_and_keeps_the_rest(v_pipe, monkeypatch):
    """The regression targets of one batch, computed again from the untouched U-Net."""
    seen = {}

    def kept(pipe, data, batch_at, settings, **options):
        seen["data"], seen["batch"] = data, batch_at(0, None)
        return {}, {}

    monkeypatch.setattr(unlearning, "tune_unet", kept)
    unlearn(v_pipe, "a cat", "a dog", preserve="a car", eta=0.5, words=1, steps=1, dtype=torch.float32, **UNLEARN)
    data, batch = seen["data"], seen["batch"]
    texts = {name: encode_prompts(v_pipe, [name])[0] for name in ("a cat", "a dog", "a car", "")}
    known = [next((name for name, text in texts.items() if torch.equal(text, part.text)), None) for part in data]
    assert known[:2] == ["a cat", ""] and known[2] is None and known[3:] == ["a dog", "", "a car", ""]
    assert sum(part.weight for part in data[:3]) == pytest.approx(1) == sum(part.weight for part in data[3:])
    noisy = add_noise(v_pipe.scheduler, batch.latents, batch.noise, batch.timesteps)
    start = 0
    for number, part in enumerate(data):
        rows = slice(start, start + part.batch_size)
        start += part.batch_size

        def predicted(name, rows=rows):
            text = texts[name].expand(rows.stop - rows.start, -1, -1)
            with torch.no_grad():
                return v_pipe.unet(noisy[rows], batch.timesteps[rows], encoder_hidden_states=text).sample

        dog = predicted("a dog")
        wanted = dog + 0.5 * (dog - predicted("a cat")) if number < 3 else predicted(known[number])
        assert torch.allclose(batch.regression_target[rows], wanted, atol=1e-4)


@pytest.mark.slow
def test_unlearning_changes_what_is_predicted_on_the_targets_pictures_without_a_word(v_pipe, pictured):
    options = {**UNLEARN, "steps": 40, "learning_rate": 2e-4, "words": 0, "eta": 0.0, "preserve_weight": 0.0}
    edit = unlearn(v_pipe, "a cat", "a dog", images=pictured.images, **options)
    assert any("attn1" in name or "conv" in name for name in edit.deltas)  # the whole U-Net
    latents, when = encode_images(v_pipe, pictured.images), torch.tensor([200, 500, 800])
    noisy = add_noise(v_pipe.scheduler, latents, torch.randn(latents.shape, generator=torch.Generator()), when)

    def predicted(prompt):
        with torch.no_grad():
            return v_pipe.unet(noisy, when, encode_prompts(v_pipe, [prompt] * 3)).sample

    aim, before = predicted("a dog"), predicted("")
    with edit.applied(v_pipe):
        after = predicted("")
    assert (after - aim).norm() < 0.92 * (before - aim).norm()


@pytest.mark.slow
def test_unlearning_looks_behind_torch_compile(v_pipe, pictured, monkeypatch):
    """The regression targets are those of the pipeline that is not compiled."""
    seen = []

    def kept(pipe, data, batch_at, settings, **options):
        seen.append(batch_at(0, None).regression_target)
        return {}, {}

    monkeypatch.setattr(unlearning, "tune_unet", kept)
    for unet in (v_pipe.unet, torch.compile(v_pipe.unet, backend="eager")):
        monkeypatch.setattr(v_pipe, "unet", unet)
        unlearn(v_pipe, "a cat", "a dog", images=pictured.images, words=0, steps=1, dtype=torch.float32, **UNLEARN)
    assert len(seen) == 2 and torch.allclose(*seen, atol=1e-4)


@pytest.mark.slow
def test_unlearning_goes_on_where_it_was_interrupted(v_pipe, tmp_path):
    options = {**UNLEARN, "words": 0}
    whole = unlearn(v_pipe, "a cat", "a dog", steps=2, **options)
    file = tmp_path / "run.safetensors"
    unlearn(v_pipe, "a cat", "a dog", steps=1, resume=file, **options)
    rest = unlearn(v_pipe, "a cat", "a dog", steps=2, resume=file, **options)
    assert all(torch.allclose(one, rest.deltas[name], atol=1e-6) for name, one in whole.deltas.items())
    with pytest.raises(ConeslabError, match="another run"):
        unlearn(v_pipe, "a cat", "a dog", steps=2, preserve="a car", resume=file, **options)


@pytest.mark.slow
def test_neurons_at_the_targets_word_leave_other_prompts_alone(v_pipe):
    options = {"batch_size": 4, "rate": 0.6, "threshold_quantile": 0.9, "progress": False}
    found = ablating_neurons(v_pipe, "a cat", "a dog", **DRAW, rounds=3, scope="subject", **options)
    assert found.scope == ("cat",) and len(found)
    before = generate(v_pipe, ["a cat", "a dog", "a house"], sampler_steps=2)
    with found.applied(v_pipe):
        after = generate(v_pipe, ["a cat", "a dog", "a house"], sampler_steps=2)
    assert after[0] != before[0] and after[1:] == before[1:]

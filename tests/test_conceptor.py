"""Decompositions: only coefficients are trained, the pipeline stays unchanged, and known sums are recovered."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_pipelines import make_subject
from torch import nn

from coneslab.edits.base import Edit, load_edit
from coneslab.edits.tokens import TokenEdit, embedding_of, vocabulary_fingerprint
from coneslab.errors import ConeslabError, MismatchError
from coneslab.finetuning.kv_gradient import KVGradient
from coneslab.methods.conceptor.biases import bias, group_shares, rebalance
from coneslab.methods.conceptor.decomposition import Decomposition
from coneslab.methods.conceptor.image import _Left, decompose_image
from coneslab.methods.conceptor.learning import (
    DecompositionSettings,
    _begin_with_words,
    _Weights,
    choose_dictionary,
    decompose,
)
from coneslab.methods.conceptor.vocabulary import encode_vocabulary, whole_words

FAST = {
    "pictures": 4,
    "steps": 4,
    "batch_size": 4,
    "explain": 3,
    "validate_every": 2,
    "validation_pictures": 2,
    "sampler_steps": 2,
    "progress": False,
}


# --- vocabulary ---


def test_the_vocabulary_is_every_whole_word_with_its_row(v_pipe, judge, tmp_path):
    words = encode_vocabulary(v_pipe, judge, cache=tmp_path, progress=False)
    assert {"cat", "dog", "grass"} <= set(words.words) and "a" not in words.words
    assert words.words == tuple(whole_words(v_pipe.tokenizer))
    for word, number, vector in zip(words.words, words.ids, words.vectors, strict=True):
        assert v_pipe.tokenizer(word, add_special_tokens=False).input_ids == [number]
        assert torch.equal(vector, embedding_of(v_pipe).weight[number])
    texts = [template.format("cat") for template in ("a {}", "a photo of a {}", "a picture of a {}", "the {}")]
    mean = judge.text_features(texts).mean(0)
    assert torch.allclose(words.features[words.rows(["cat"])[0]], mean / mean.norm(), atol=1e-6)


def test_features_are_kept_and_damaged_ones_made_again(v_pipe, judge, tmp_path, monkeypatch):
    first = encode_vocabulary(v_pipe, judge, cache=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    asked = []
    kept = type(judge).text_features
    monkeypatch.setattr(type(judge), "text_features", lambda *a, **k: asked.append(1) or kept(*a, **k))
    again = encode_vocabulary(v_pipe, judge, cache=tmp_path, progress=False)
    assert torch.equal(first.features, again.features) and not asked
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(encode_vocabulary(v_pipe, judge, cache=tmp_path, progress=False).features, first.features)
    assert asked
    for words, templates, reason in (
        (["cat", "xyzzy"], ("a {}",), "xyzzy"),
        ([], ("a {}",), "no words"),
        (None, ("a",), "place for|with {}"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            encode_vocabulary(v_pipe, judge, words=words, templates=templates)


# --- learning ---


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mlp", "direct", "least squares"])
def test_a_decomposition_is_an_edit_that_comes_back_from_its_file(v_pipe, judge, tmp_path, method):
    made = decompose(v_pipe, "a cat on the grass", judge, coefficients=method, **FAST)
    assert isinstance(made, Edit) and len(made.history["loss"]) == 4
    assert not {"cat", "on", "the", "grass"} & set(made.words)
    assert (np.diff(made.coefficients) <= 0).all() and made.coefficients[0] > 0
    assert set(made.validation) == {2, 4} and made.best_step in made.validation
    assert made.validation[made.best_step] == max(made.validation.values())
    again = load_edit(made.save(tmp_path / "cat"))
    assert (again.words, again.explain, again.validation) == (made.words, made.explain, made.validation)
    assert np.array_equal(again.coefficients, made.coefficients)
    with made.applied(v_pipe) as pipe:
        (own,) = pipe.tokenizer("<concept>", add_special_tokens=False).input_ids
        vector = embedding_of(pipe).weight[own]
        assert float(vector.norm()) == pytest.approx(made.norm, rel=1e-4)
        rows = [pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in made.words[:3]]
        direction = torch.tensor(made.coefficients[:3]) @ embedding_of(pipe).weight[rows]
        assert torch.cosine_similarity(vector, direction, dim=0) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mlp", "least squares"])
def test_random_numbers_stay_the_callers(v_pipe, judge, method, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU was seeded"))
    state = torch.random.get_rng_state()
    decompose(v_pipe, "a cat", judge, coefficients=method, **FAST | {"steps": 1})
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("count", "best", "sums"), [(12, [3, 8], 4), (4, [0, 2], 3), (1, [0], 0)])
def test_training_begins_with_the_words_that_do_best_on_their_own(count, best, sums):
    """A model for which the concept is the mean of two directions: their words are the start, not the other ones."""
    rng = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(count, 6, generator=rng), dim=1)
    wanted = nn.functional.normalize(vectors[best].mean(0), dim=0)
    asked = []

    def losses(theta, batch, text):
        asked.append(batch)
        return [float((text[0, 0] - wanted).square().sum())]

    torch.manual_seed(0)
    weights = _Weights(vectors, DecompositionSettings(hidden=50), 1.0)
    gradient = SimpleNamespace(theta=lambda: None, losses=losses)
    _begin_with_words(weights, gradient, lambda vectors: vectors[None], ["one", "two"])
    alpha = weights.coefficients()
    assert set(alpha.argsort()[-len(best) :].tolist()) == {*best}
    assert alpha[best].min() > 5 * np.delete(alpha, best).max(initial=0)
    # Every word and every sum of several once, all on the same pictures and noises.
    assert asked.count("one") == asked.count("two") == count + sums


@pytest.mark.slow
def test_the_coefficients_learn_by_the_gradient_of_the_stated_loss(v_pipe, judge):
    """One step of `decompose` against the loss written out, its gradient through the whole U-Net."""
    from coneslab.diffusion.encoding import encode_images
    from coneslab.diffusion.loss import denoising_loss
    from coneslab.edits.tokens import LearnedText
    from coneslab.finetuning.samples import CaptionedLatents, sample_batches

    words = encode_vocabulary(v_pipe, judge, progress=False)
    pictures = v_pipe(["a cat"] * 3, num_inference_steps=2).images
    seen = {}
    options = FAST | {"steps": 1, "coefficients": "direct", "sparsity": 0.5, "learning_rate": 1e-3}
    options |= {"exclude_similar": None, "dictionary": 5000}
    made = decompose(
        v_pipe,
        pictures,
        judge,
        name="cat",
        vocabulary=words,
        dtype=torch.float32,
        callback=seen.update,
        **options,
    )
    allowed = choose_dictionary(words, judge.image_features(pictures), judge, size=5000)
    norm = float(embedding_of(v_pipe).weight.norm(dim=1).mean().detach())
    weights = _Weights(allowed.vectors, DecompositionSettings(coefficients="direct"), norm)
    latents = encode_images(v_pipe, pictures)
    draw = next(sample_batches(v_pipe, [CaptionedLatents(latents, torch.zeros(12, 24), 4)], seed=0))
    text = LearnedText(v_pipe, ["a photo of a <concept>"], ["<concept>"])(weights(3)[0][None])
    loss = denoising_loss(v_pipe, draw.latents, text, noise=draw.noise, timesteps=draw.timesteps)
    assert made.history["loss"][0] == pytest.approx(float(loss.detach()), rel=1e-4)
    alpha = weights.values.abs()
    top = alpha.topk(3)
    spread = 1 - torch.cosine_similarity(top.values @ allowed.vectors[top.indices], alpha @ allowed.vectors, dim=0)
    assert made.history["penalty"][0] == pytest.approx(0.5 * float(spread.detach()), rel=1e-3)
    (slope,) = torch.autograd.grad(loss + 0.5 * spread, weights.values)
    moved = torch.tensor(seen["coefficients"]) - 1 / len(allowed)
    clear = slope.abs() > slope.abs().max() / 100
    assert clear.any() and torch.equal(moved[clear].sign(), -slope[clear].sign())


@pytest.mark.slow
def test_the_dictionary_is_what_is_nearest_and_what_is_asked_for(judge, v_pipe):
    words = encode_vocabulary(v_pipe, judge, progress=False)
    seen = judge.text_features(["a cat"])
    ranked = [words.words[i] for i in (words.features @ seen[0]).argsort(descending=True).tolist()]
    assert choose_dictionary(words, seen, judge, size=5).words == tuple(ranked[:5])
    first, last = ranked[0], ranked[-1]
    chosen = choose_dictionary(words, seen, judge, size=5, include=(last, first), exclude=(ranked[1],))
    assert chosen.words == (first, *ranked[2:5], last)
    for options in ({"include": ("unicorn",)}, {"include": (first,), "exclude": (first,)}):
        with pytest.raises(ConeslabError, match="not in this vocabulary|included and excluded"):
            choose_dictionary(words, seen, judge, size=5, **options)
    made = decompose(v_pipe, "a cat", judge, **{**FAST, "explain": None, "exclude_similar": None})
    assert len(made.words) == -(-len(words) // 10) and made.explain == min(10, len(made.words))


def test_coefficients_do_not_hang_on_the_length_of_the_vectors(v_pipe, judge):
    vectors = encode_vocabulary(v_pipe, judge, progress=False).vectors
    made = []
    for scale in (1.0, 0.01):
        torch.manual_seed(0)
        made.append(_Weights(scale * vectors, DecompositionSettings(), 1.0).coefficients())
    assert np.allclose(*made, atol=1e-5) and made[0].std() > 0.3 * made[0].mean()


def test_least_squares_finds_a_planted_sum_of_two_words(v_pipe, judge):
    words = encode_vocabulary(v_pipe, judge, progress=False)
    weights = _Weights(words.vectors, DecompositionSettings(coefficients="least squares"), 1.0)
    mixture = 0.7 * words.vectors[words.rows(["cat"])[0]] + 0.3 * words.vectors[words.rows(["car"])[0]]
    weights.free.data = mixture
    found = weights.coefficients()
    order = np.argsort(-found)
    assert [words.words[i] for i in order[:2]] == ["cat", "car"]
    assert found[order[0]] / found[order[1]] == pytest.approx(7 / 3, rel=1e-3)
    assert found[order[2]] < 1e-3 * found[order[0]]


def test_errors_are_clear_and_leave_no_trace(v_pipe, judge):
    for options, reason in (
        ({"steps": 0}, "steps is 0"),
        ({"explain": 0}, "explain is 0"),
        ({"coefficients": "magic"}, "choose one of mlp, direct, least squares"),
        ({"exclude_similar": -1.0}, "no word is left"),
        ({"exclude": tuple(whole_words(v_pipe.tokenizer))}, "no word is left"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            decompose(v_pipe, "a house", judge, **FAST | options)
    with pytest.raises(ConeslabError, match="token is 'dog', a word of the vocabulary: give a new one"):
        decompose(v_pipe, "a house", judge, **FAST, token="dog")
    with pytest.raises(ConeslabError, match="empty prompt"):
        decompose(v_pipe, " ", judge, **FAST)


# --- changing it ---


def example(pipe=None):
    return Decomposition(
        "pet",
        ("dog", "cat", "car", "house"),
        np.array([0.2, 0.6, 0.1, 0.05]),
        3,
        1.0,
        vocabulary_fingerprint(pipe) if pipe is not None else "ab" * 32,
    )


def test_a_word_has_one_coefficient():
    with pytest.raises(ConeslabError, match="'cat' is among the words twice"):
        Decomposition("pet", ("cat", "dog", "cat"), np.array([0.2, 0.6, 0.1]), 3, 1.0, "ab")


def test_coefficients_are_scaled_left_out_and_kept():
    made = example()
    assert made.words == ("cat", "dog", "car", "house")
    assert made.top(2) == [("cat", pytest.approx(0.6 / 0.9)), ("dog", pytest.approx(0.2 / 0.9))]
    assert made.top(4) == made.top(3) and sum(share for _, share in made.top(4)) == pytest.approx(1)
    assert made.share(["cat", "car"]) == pytest.approx(0.7 / 0.9)
    assert made.scaled("dog", 4).top(1)[0][0] == "dog"
    assert dict(made.without("cat").top(4))["dog"] == pytest.approx(0.2 / 0.3)
    assert dict(made.without("cat").top(4)).get("house", 0) == 0  # words that were not in use do not move up
    assert dict(made.only("car").top(1)) == {"car": 1.0}
    for change, reason in (
        (lambda: made.scaled("fish", 1), "fish: not among"),
        (lambda: made.scaled("cat", -1), "0 or more"),
        (lambda: made.without("cat", "dog", "car"), "all coefficients are 0"),
        (lambda: made.only("zebra"), "zebra"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            change()


def test_a_decomposition_of_another_model_is_refused(v_pipe):
    with pytest.raises(MismatchError, match="text encoder"), example().applied(v_pipe):
        pass


def test_groups_are_weighed_and_balanced(judge):
    made, groups = example(), {"feline": ["cat"], "canine": ["dog", "wolf"]}
    assert bias(made, groups) == {"feline": pytest.approx(0.75), "canine": pytest.approx(0.25)}
    even = rebalance(made, groups)
    assert bias(even, groups) == {"feline": pytest.approx(0.5), "canine": pytest.approx(0.5)}
    assert even.share("car") == pytest.approx(made.share("car"))
    skewed = rebalance(made, groups, shares={"feline": 0.1, "canine": 0.9})
    assert bias(skewed, groups)["canine"] == pytest.approx(0.9)
    new = rebalance(made, {"feline": ["cat"], "building": ["house"]})  # a word that was not in use comes in
    assert bias(new, {"feline": ["cat"], "building": ["house"]})["building"] == pytest.approx(0.5)
    more = rebalance(made, groups, total=0.5)
    assert more.share(["cat", "dog"]) == pytest.approx(0.5) and bias(more, groups)["feline"] == pytest.approx(0.5)
    for total in (0, 1, -0.5):
        with pytest.raises(ConeslabError, match="between 0 and 1"):
            rebalance(made, groups, total=total)
    unused = made.without("cat", "dog")
    with pytest.raises(ConeslabError, match="nothing to share out"):
        rebalance(unused, groups)
    assert rebalance(unused, groups, total=0.4).share("cat") == pytest.approx(0.2)
    with pytest.raises(ConeslabError, match=r"outside the groups.*leave out total"):
        rebalance(made.only("cat", "dog"), groups, total=0.4)
    for bad, shares, reason in (
        ({"feline": ["cat"]}, None, "two or more"),
        ({"feline": ["cat"], "pet": ["dog", "cat"]}, None, "'cat' is in the groups feline and pet"),
        ({"feline": ["cat"], "bird": ["owl"]}, None, "no word of bird"),
        (groups, {"feline": 0.9, "canine": 0.9}, "1 in all"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            rebalance(made, bad, shares=shares)
    assert np.isnan(bias(made, {"a": ["x"], "b": ["y"]})["a"])
    for ask in (lambda both: bias(made, both), lambda both: group_shares(judge, make_subject(16).images, both)):
        with pytest.raises(ConeslabError, match="'dog' is in the groups a and b"):
            ask({"a": ["cat", "dog"], "b": "dog"})
    twice = rebalance(made, {"feline": ["cat", "cat"], "canine": ["dog"]})  # said twice, it counts once
    assert bias(twice, {"feline": "cat", "canine": "dog"})["feline"] == pytest.approx(0.5)


def test_shares_of_pictures_come_with_intervals(judge):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    groups = {"cat": ["cat"], "dog": ["dog", "puppy"]}
    shares = group_shares(judge, pictures, groups)
    assert sum(share.estimate for share in shares.values()) == pytest.approx(1)
    expected = (judge.classify(pictures, [["a cat"], ["a dog", "a puppy"]]) == 0).float().mean()
    assert shares["cat"].estimate == pytest.approx(float(expected)) and shares["cat"].low <= shares["cat"].high


# --- one picture ---


@pytest.mark.slow
def test_words_fall_away_until_the_picture_would_change(v_pipe, judge):
    made = example(v_pipe)
    options = {"sampler_steps": 2, "progress": False}
    kept = decompose_image(v_pipe, made, judge, threshold=1.0, **options)
    assert set(kept.words) == {"cat", "dog", "car"} and not kept.removed and kept.similarity > 0.999
    alone = decompose_image(v_pipe, made, judge, threshold=-1.0, **options)
    assert len(alone.words) == 1 and len(alone.removed) == 2
    assert alone.drawn < 12 and alone.passes <= 3
    pair = decompose_image(v_pipe, made, judge, threshold=-1.0, near_synonyms=[("cat", "dog")], **options)
    assert pair.words in (("car",), ("cat", "dog"))
    goal = decompose_image(v_pipe, made, judge, threshold=0.9, target="concept", prompt="a cat", **options)
    assert np.array_equal(np.asarray(goal.target), np.asarray(_drawn(v_pipe, "a cat")))
    with pytest.raises(ConeslabError, match="cosine"):
        decompose_image(v_pipe, made, judge, threshold=2.0)


def test_options_that_one_picture_has_no_use_for_are_refused(v_pipe, judge):
    for options, reason in (
        ({"prompt": "a cat"}, "prompt is 'a cat', which only the target 'concept' is drawn from"),
        ({"target": "magic"}, "target is 'magic': give 'concept', 'decomposition' or a picture"),
        ({"near_synonyms": ["cats"]}, "is the text 'cats': give several words"),
    ):
        with pytest.raises(ConeslabError, match=reason):
            decompose_image(v_pipe, example(v_pipe), judge, **options)


def test_a_template_without_a_place_for_the_word_is_refused(judge):
    with pytest.raises(ConeslabError, match="template is 'a photo': give a text with {}"):
        replace(example(), template="a photo")
    with pytest.raises(ConeslabError, match="template is"):
        group_shares(judge, make_subject(16).images, {"cat": ["cat"], "dog": ["dog"]}, template="a picture")


@pytest.mark.slow
def test_a_vocabulary_can_be_taken_a_few_samples_at_a_time(v_pipe, judge, monkeypatch):
    whole = decompose(v_pipe, "a house", judge, **FAST)
    sizes = []
    forward = KVGradient._loss

    def listen(gradient, theta, text, batch, rows, counts):
        sizes.append(sum(counts))
        return forward(gradient, theta, text, batch, rows, counts)

    monkeypatch.setattr(KVGradient, "_loss", listen)
    parts = decompose(v_pipe, "a house", judge, chunk=1, **FAST)
    assert set(sizes) == {1} and np.allclose(parts.history["loss"], whole.history["loss"], rtol=1e-2)


@pytest.mark.parametrize("needed", [{0}, {0, 3}, {31}, {2, 17, 30}, set(range(32))])
def test_no_word_left_could_go_and_few_pictures_tell(needed):
    asked = []

    def closeness(sets):
        asked.extend(sets)
        return [float({int(word) for word in own} >= needed) for own in sets]

    words = [str(number) for number in range(32)]
    left = _Left(words, {word: {word} for word in words}, closeness, 0.5)
    for one_pass in (left.upward, left.alone):
        while len(left.words) > 1 and one_pass():
            pass
    assert {int(word) for word in left.words} == needed
    assert [word for word in words if word in left.words] == left.words
    assert {word for word, _ in left.removed} | set(left.words) == set(words)
    assert len(asked) <= {1: 20, 2: 25, 3: 40}.get(len(needed), 49)


def _drawn(pipe, prompt):
    from coneslab.diffusion.sampling import generate

    return generate(pipe, prompt, sampler_steps=2)[0]


def test_what_was_tested_is_what_is_shown(v_pipe, judge):
    """The last picture is drawn with exactly the words that are left, and its similarity is its own."""
    found = decompose_image(v_pipe, example(v_pipe), judge, threshold=0.97, sampler_steps=2, progress=False)
    vector = example(v_pipe).only(*found.words).vector(v_pipe)
    with TokenEdit(("<x>",), vector[None], vocabulary_fingerprint(v_pipe)).applied(v_pipe):
        again = _drawn(v_pipe, "a photo of a <x>")
    assert np.abs(np.asarray(again, float) - np.asarray(found.picture, float)).mean() < 0.5
    features = judge.image_features([found.target, found.picture])
    assert found.similarity == pytest.approx(float(features[0] @ features[1]), abs=1e-5)


def test_names_in_html_are_shown_as_they_are():
    words = Decomposition("<pet*>", ("<cat>", "dog"), np.array([2.0, 1.0]), 2, 1.0, "ab")
    shown = words._repr_html_()
    assert "<b>&lt;pet*&gt;</b>" in shown and "<td>&lt;cat&gt;</td>" in shown and "<cat>" not in shown

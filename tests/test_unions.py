"""Unions of masks obey the laws of sets; collaborative tuning lowers the loss and never leaves the union."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coneslab.diffusion.kvspace import KVLayer, KVLayout, KVSpace
from coneslab.edits.base import Combined, Edit, load_edit
from coneslab.edits.weights import model_fingerprint
from coneslab.errors import ConeslabError, FileFormatError, MismatchError
from coneslab.neurons.mask import ConceptNeurons
from coneslab.neurons.union import (
    TunedNeurons,
    additivity,
    concatenate,
    finetune_together,
    joint_prompt,
    output_changes,
    overlap_matrices,
)

LAYOUT = KVLayout(
    (
        KVLayer("down_blocks.0.attn2.to_k.weight", "down 0", "K", 0, 8, (2, 5), 0),
        KVLayer("down_blocks.1.attn2.to_k.weight", "down 1", "K", 1, 4, (4, 9), 10),
    )
)


@st.composite
def masks(draw):
    chosen = sorted(draw(st.sets(st.integers(0, LAYOUT.n - 1))))
    scales = [draw(st.floats(0, 1, width=32, exclude_max=True)) for _ in chosen]
    return ConceptNeurons(LAYOUT, chosen, scales, "ab" * 32, subject=draw(st.sampled_from("abc")))


@pytest.mark.slow
@settings(deadline=None)
@given(a=masks(), b=masks(), c=masks())
def test_joining_keeps_the_laws_of_sets(a, b, c):
    whole = concatenate(a, b, c)
    assert whole == concatenate(c, a, b) == concatenate(concatenate(a, b), c) == concatenate(a, concatenate(b, c))
    assert concatenate(a, a) == a == concatenate(a)
    assert torch.equal(whole.scale(), torch.stack([a.scale(), b.scale(), c.scale()]).amin(0))
    assert set(whole.shut()) == set(a.shut()) | set(b.shut()) | set(c.shut())
    assert concatenate(a.binary(), b.binary()) == concatenate(a, b).binary()
    assert whole.subject == " + ".join(sorted({a.subject, b.subject, c.subject}))


def test_masks_that_do_not_belong_together_are_refused():
    one = ConceptNeurons(LAYOUT, [1], [0.25], "ab" * 32, subject="cat")
    with pytest.raises(MismatchError, match="'dog' was found on model cdcdcdcd"):
        concatenate(one, replace(one, fingerprint="cd" * 32, subject="dog"))
    with pytest.raises(ConeslabError, match="binary first"):
        concatenate(one, replace(one, cut=0.3))
    assert concatenate(one.binary(), replace(one, cut=0.3).binary()) == one.binary()
    with pytest.raises(ConeslabError, match="at least one"):
        concatenate()


def test_overlap_matrices_hold_every_pair():
    found = [ConceptNeurons(LAYOUT, range(0, 46, k), np.zeros(len(range(0, 46, k))), "ab" * 32) for k in (2, 3, 5)]
    jaccard, chance = overlap_matrices(found)
    assert np.allclose(np.diag(jaccard), 1) and np.allclose(jaccard, jaccard.T) and np.allclose(chance, chance.T)
    assert jaccard[0, 1] == found[0].overlap(found[1]).jaccard
    assert chance[1, 2] == found[1].overlap(found[2]).expected_jaccard


@pytest.fixture
def found(v_pipe):
    space = KVSpace(v_pipe)
    rng = np.random.default_rng(0)
    return [
        ConceptNeurons(space.layout, where, np.zeros(len(where)), space.fingerprint(), subject=name)
        for name, where in ((name, np.flatnonzero(rng.random(space.n) < 0.05)) for name in ("cat", "dog"))
    ]


@pytest.fixture
def both(pictured):
    dog = {"name": "dog", "class_word": "dog", "prompt": "a sks dog", "prior_prompt": "a dog"}
    return [pictured, SimpleNamespace(**vars(pictured) | dog)]


OPTIONS = {"batch_size": 4, "prior_batch_size": 0, "progress": False}


@pytest.mark.slow
def test_tuning_stays_inside_the_union_and_lowers_the_loss(v_pipe, found, both):
    union, before = concatenate(*found), KVSpace(v_pipe).gather()
    tuned = finetune_together(v_pipe, union, both, steps=12, learning_rate=3e-3, dtype=torch.float32, **OPTIONS)
    assert torch.equal(KVSpace(v_pipe).gather(), before)
    assert isinstance(tuned, Edit) and len(tuned.history["loss"]) == 12
    assert np.mean(tuned.history["loss"][-3:]) < np.mean(tuned.history["loss"][:3])
    with tuned.applied(v_pipe):
        now = KVSpace(v_pipe).gather()
    inside = union.mask(cut=1.0)
    assert torch.equal(now[~inside], before[~inside])
    assert torch.equal(now[inside], torch.tensor(tuned.values)) and (now[inside] != 0).any()
    with tuned.applied(v_pipe, dose=0.5):
        assert torch.allclose(KVSpace(v_pipe).gather(), (now + before) / 2, atol=1e-6)
    assert torch.equal(KVSpace(v_pipe).gather(), before)


def test_one_step_is_adamw_on_the_sum_of_the_losses(v_pipe, found, both):
    """The first step of AdamW moves every weight by the learning rate against the sign of its gradient."""
    from coneslab.finetuning.kv_gradient import KVGradient
    from coneslab.finetuning.samples import concept_latents, sample_batches

    union = concatenate(*found)
    tuned = finetune_together(v_pipe, union, both, steps=1, learning_rate=1e-2, dtype=torch.float32, **OPTIONS)
    pairs = [concept_latents(v_pipe, about, batch_size=4, prior_batch_size=0)[0] for about in both]
    gradient = KVGradient(v_pipe, pairs, dtype=torch.float32)
    start = gradient.theta() * union.scale()
    losses, g = gradient(start, next(sample_batches(v_pipe, pairs, seed=0)))
    assert tuned.history["loss"][0] == pytest.approx(sum(losses), rel=1e-5)
    where = torch.tensor(union.indices, dtype=torch.long)
    clear = g[where].abs() > 1e-6
    expected = start[where] - 1e-2 * g[where].sign()
    assert torch.allclose(torch.tensor(tuned.values)[clear], expected[clear], atol=2e-4)


def test_tuned_neurons_come_back_from_their_file(v_pipe, found, both, tmp_path):
    tuned = finetune_together(v_pipe, found[0], both[:1], steps=2, **OPTIONS)
    again = load_edit(tuned.save(tmp_path / "tuned"))
    assert isinstance(again, TunedNeurons) and again.neurons == tuned.neurons
    assert np.array_equal(again.values, tuned.values) and list(again.history["loss"]) == tuned.history["loss"]
    assert tuned.nbytes == len(found[0].to_bytes()) + 2 * len(found[0])
    with pytest.raises(ConeslabError, match="finite number"):
        TunedNeurons(found[0], np.full(len(found[0]), 1e6))
    with pytest.raises(ConeslabError, match="finite number"):
        TunedNeurons(found[0], tuned.values[1:])
    data = (tmp_path / "tuned").read_bytes()
    (tmp_path / "short").write_bytes(data[:-100])
    with pytest.raises(FileFormatError):
        load_edit(tmp_path / "short")


def test_bad_input_is_refused_and_the_pipeline_untouched(v_pipe, epsilon_pipe, found, both):
    before = KVSpace(v_pipe).gather()
    for options in ({"steps": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ConeslabError, match="positive"):
            finetune_together(v_pipe, found[0], both, **options)
    with pytest.raises(ConeslabError, match="no subject"):
        finetune_together(v_pipe, found[0], [])
    with pytest.raises(MismatchError, match="union"):
        finetune_together(epsilon_pipe, found[0], both)
    tuned = TunedNeurons(found[0], np.zeros(len(found[0])))
    with pytest.raises(MismatchError), tuned.applied(epsilon_pipe):
        pass
    with pytest.raises(ConeslabError, match="1 masks and 2 subjects"):
        additivity(v_pipe, found[:1], both)
    assert torch.equal(KVSpace(v_pipe).gather(), before)


def test_a_run_does_not_resume_on_other_neurons(v_pipe, pictured, tmp_path):
    """Binary masks of one size start from the same values, all 0 (and not -0, if the weights are positive)."""
    space, model = KVSpace(v_pipe), model_fingerprint(v_pipe)
    positive = (space.gather() > 0).nonzero().flatten().tolist()
    one, other = (ConceptNeurons(space.layout, places, [0.0] * 3, model) for places in (positive[:3], positive[3:6]))
    finetune_together(v_pipe, one, [pictured], steps=1, resume=tmp_path / "state", **OPTIONS)
    with pytest.raises(MismatchError, match="belongs to another run .union was"):
        finetune_together(v_pipe, other, [pictured], steps=2, resume=tmp_path / "state", **OPTIONS)


def test_a_mask_without_neurons_is_not_tuned(v_pipe, both):
    space = KVSpace(v_pipe)
    nothing = ConceptNeurons(space.layout, [], [], model_fingerprint(v_pipe), subject="nothing")
    with pytest.raises(ConeslabError, match="mask of 'nothing' has no neurons: there is nothing to tune"):
        finetune_together(v_pipe, nothing, both, **OPTIONS)


@pytest.mark.slow
def test_additivity_is_that_of_the_outputs(v_pipe, found, both):
    whole, first, second = output_changes(v_pipe, [concatenate(*found), *found], both, samples=4)
    measured = additivity(v_pipe, found, both, samples=4)
    error = ((whole - first - second).norm(dim=1) / whole.norm(dim=1)).mean()
    assert measured.error == pytest.approx(float(error))
    total = first + second
    cosine = [a @ b / (a.norm() * b.norm()) for a, b in zip(whole, total, strict=True)]
    assert measured.cosine == pytest.approx(float(torch.stack(cosine).mean()))
    assert measured.ratio == pytest.approx(float((whole.norm(dim=1) / total.norm(dim=1)).mean()))
    local = [mask.at(word) for mask, word in zip(found, ("sks", "dog"), strict=True)]
    together, *each = output_changes(v_pipe, [Combined(tuple(local)), *local], both, samples=4)
    measured = additivity(v_pipe, local, both, samples=4)  # at different words no single mask does it
    assert measured.error == pytest.approx(float(((together - sum(each)).norm(dim=1) / together.norm(dim=1)).mean()))
    # an empty mask changes nothing, so its sum with another is exactly the other
    empty = replace(found[1], indices=[], scales=[])
    alone = additivity(v_pipe, [found[0], empty], both, samples=4)
    assert (alone.cosine, alone.ratio, alone.error) == pytest.approx((1, 1, 0), abs=1e-9)


def test_the_joint_prompt_names_every_subject(both):
    assert joint_prompt(both) == "a sks cat and a sks dog"
    assert joint_prompt([*both, both[0]]) == "a sks cat, a sks dog and a sks cat"
    assert joint_prompt(both[:1]) == "a sks cat"

"""Damage to masks: the right entries, the right number of them, and the whole mask at a fraction of 0."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coneslab.diffusion.kvspace import KVLayer, KVLayout
from coneslab.errors import ConeslabError
from coneslab.neurons.damage import DAMAGES, dropped, flipped, moved
from coneslab.neurons.mask import ConceptNeurons

SHAPES = ((6, 5), (4, 9))


@st.composite
def masks(draw):
    layers, start = [], 0
    for i, shape in enumerate(SHAPES):
        layers.append(KVLayer(f"down_blocks.{i}.attn2.to_k.weight", f"down {i}", "K", i, 8, shape, start))
        start += shape[0] * shape[1]
    chosen = sorted(draw(st.sets(st.integers(0, start - 1))))
    scales = [draw(st.sampled_from((0.0, 0.2, 0.7))) for _ in chosen]
    return ConceptNeurons(KVLayout(tuple(layers)), chosen, scales, "ab" * 32)


FRACTION, SEED = st.floats(0, 1), st.integers(0, 99)


@settings(deadline=None)
@given(mask=masks(), fraction=FRACTION, seed=SEED)
def test_flips_are_as_many_as_asked_for_anywhere(mask, fraction, seed):
    hit = np.setxor1d(mask.shut(), flipped(mask, fraction, seed=seed).shut())
    assert len(hit) == round(fraction * mask.n)


@settings(deadline=None)
@given(mask=masks(), fraction=FRACTION, seed=SEED)
def test_dropped_neurons_were_shut(mask, fraction, seed):
    left = dropped(mask, fraction, seed=seed)
    assert set(left.shut()) <= set(mask.shut())
    assert len(left.shut()) == len(mask.shut()) - round(fraction * len(mask.shut()))


@settings(deadline=None)
@given(mask=masks(), fraction=FRACTION, seed=SEED)
def test_moved_neurons_stay_in_their_row_and_leave_their_place(mask, fraction, seed):
    after = moved(mask, fraction, seed=seed)
    start = 0
    for rows, columns in SHAPES:
        part = slice(start, start + rows * columns)
        before_rows = mask.mask()[part].view(rows, columns).sum(1)
        assert (after.mask()[part].view(rows, columns).sum(1) == before_rows).all()
        start += rows * columns
    assert len(np.setdiff1d(mask.shut(), after.shut())) <= round(fraction * len(mask.shut()))


def test_a_lone_neuron_moves_to_its_neighbour():
    layout = KVLayout((KVLayer("down_blocks.0.attn2.to_k.weight", "down 0", "K", 0, 8, (3, 4), 0),))
    for place, allowed in ((4, {5}), (5, {4, 6}), (7, {6})):
        mask = ConceptNeurons(layout, [place], [0.0], "ab" * 32)
        reached = {int(moved(mask, 1.0, seed=seed).shut()[0]) for seed in range(20)}
        assert reached == allowed


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_no_damage_leaves_the_binary_mask_and_seeds_repeat(kind):
    layout = KVLayout((KVLayer("down_blocks.0.attn2.to_k.weight", "down 0", "K", 0, 8, (30, 40), 0),))
    mask = ConceptNeurons(layout, np.arange(0, 1200, 7), np.zeros(172), "ab" * 32)
    assert DAMAGES[kind](mask, 0.0) == mask.binary()
    one, same, other = (DAMAGES[kind](mask, 0.4, seed=seed) for seed in (1, 1, 2))
    assert one == same and one != other and one != mask
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConeslabError, match="share in"):
            DAMAGES[kind](mask, fraction)

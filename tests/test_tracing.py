"""Causal tracing: the effect by hand, its ends, and what cannot be traced."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
import torch

from coneslab.diffusion import generate, patch, start_noise, watch
from coneslab.errors import ArgumentError, ConeslabError
from coneslab.measure import trace_activations
from coneslab.show.plots import trace_map

SOURCE, INTO = "a sks cat", "a dog in the city"
FEW = {"sampler_steps": 4, "pictures": 2, "progress": False}


def latents(pipe, prompt):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe([prompt] * 2, latents=start_noise(pipe, [5, 6]), **options).images.double().flatten(1)


@pytest.mark.slow
def test_the_effect_is_how_far_a_picture_moves_on_the_way_from_one_to_the_other(v_pipe):
    table = trace_activations(v_pipe, SOURCE, INTO, sites=["mid", "up 1 transformer 1"], bands=2, seed=5, **FEW)
    assert table[["site", "band", "first_step", "last_step"]].values.tolist() == [
        ["mid", 0, 0, 1],
        ["mid", 1, 2, 3],
        ["up 1 transformer 1", 0, 0, 1],
        ["up 1 transformer 1", 1, 2, 3],
    ]
    with watch(v_pipe, "*") as seen:
        end = latents(v_pipe, SOURCE)
    start = latents(v_pipe, INTO)
    for row in table.itertuples():
        with patch(v_pipe, row.site, seen, steps=[row.first_step, row.last_step]):
            way, moved = end - start, latents(v_pipe, INTO) - start
        assert row.effect == pytest.approx(((moved * way).sum(1) / (way**2).sum(1)).mean().item(), abs=1e-5)
    assert (table.pictures == 2).all() and table.attrs == {"source": SOURCE, "into": INTO, "measured": "latents"}


@pytest.mark.slow
def test_steps_before_the_changed_ones_are_not_computed_again(v_pipe):
    passes = []
    with v_pipe.unet.conv_in.register_forward_hook(lambda *_: passes.append(1)):
        trace_activations(v_pipe, SOURCE, INTO, sites="mid", bands=4, **FEW)
    assert len(passes) == 4 + 4 + (4 + 3 + 2 + 1)  # both prompts, and each band with the steps after it


@pytest.mark.slow
def test_all_of_the_output_in_all_steps_is_the_whole_way(v_pipe, judge):
    for options in ({}, {"judge": judge}, {"metric": lambda images: [np.asarray(one).mean() for one in images]}):
        table = trace_activations(v_pipe, SOURCE, INTO, sites="out", bands=1, half="both", **options, **FEW)
        assert table.effect.tolist() == pytest.approx([1.0], abs=1e-4)
    assert table.attrs["measured"] == "the metric"


@pytest.mark.slow
def test_a_metric_goes_from_the_one_prompts_mean_to_the_others(v_pipe):
    def redness(images):
        return [np.asarray(one, float)[..., 0].mean() for one in images]

    table = trace_activations(v_pipe, SOURCE, INTO, sites="mid", bands=1, metric=redness, seed=5, **FEW)
    drawing = {"seed": [5, 6], "sampler_steps": 4, "dtype": torch.float32}
    with watch(v_pipe, "mid", half="text") as seen:
        end = np.mean(redness(generate(v_pipe, [SOURCE] * 2, **drawing)))
    start = np.mean(redness(generate(v_pipe, [INTO] * 2, **drawing)))
    with patch(v_pipe, "mid", seen):
        moved = np.mean(redness(generate(v_pipe, [INTO] * 2, **drawing)))
    assert table.effect.item() == pytest.approx((moved - start) / (end - start), abs=1e-6)


@pytest.mark.slow
def test_what_cannot_be_traced_is_refused(v_pipe, judge):
    for options, said in (
        ({"into": SOURCE}, "the two prompts draw the same"),
        ({"metric": lambda images: [1.0]}, "the metric returned 1 numbers for 2 pictures"),
        ({"metric": lambda images: None}, "the metric returned None: return a number for each"),
        ({"metric": lambda images: [1.0, 1.0]}, "the two prompts draw the same"),
    ):
        with pytest.raises(ConeslabError, match=said):
            trace_activations(v_pipe, SOURCE, **{"into": INTO, **options}, sites="mid", bands=1, **FEW)
    with pytest.raises(ArgumentError, match="got a judge and a metric"):
        trace_activations(v_pipe, SOURCE, INTO, judge=judge, metric=len, bands=1, **FEW)
    with pytest.raises(ArgumentError, match="bands is 5: give a number from 1 to 4"):
        trace_activations(v_pipe, SOURCE, INTO, bands=5, **FEW)


def test_the_map_has_sites_in_their_order_and_names_the_steps():
    rows = [(site, band, 2 * band, 2 * band + 1, 0.1 * band, 1) for site in ("mid", "in") for band in (0, 1)]
    table = pandas.DataFrame(rows, columns=["site", "band", "first_step", "last_step", "effect", "pictures"])
    table.attrs = {"source": "a $cat", "into": "a dog", "measured": "latents"}
    figure = trace_map(table, pictures=np.zeros((2, 4, 4, 3), np.uint8))
    (axes,) = (one for one in figure.axes if one.get_xlabel().startswith("steps"))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mid", "in"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0–1", "2–3"]
    assert "the largest is 0.10, at mid in steps 2 to 3" in figure.get_label() and "$cat" in figure.get_suptitle()
    with pytest.raises(ArgumentError, match="got 1 pictures: give two"):
        trace_map(table, pictures=np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ArgumentError, match="no column effect"):
        trace_map(table.drop(columns="effect"))

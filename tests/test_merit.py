"""How good attention maps are: overlap, pointing and chance counted by hand, and a table of maps that are known."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coneslab.diffusion import add_noise, encode_images, encode_prompts, start_noise
from coneslab.errors import ArgumentError, ConeslabError
from coneslab.measure import attention_merit, chance_iou, map_iou, points_at, record_attention
from coneslab.show.plots import merit_map

MASK = np.array([[True, True, False], [False, True, False]])


def test_overlap_and_pointing_are_counted():
    assert map_iou([[0.9, 0.8, 0.1], [0.2, 0.7, 0.0]], MASK) == 1.0
    assert map_iou([[0.9, 0.1, 0.8], [0.2, 0.7, 0.0]], MASK) == 2 / 4
    assert map_iou(torch.tensor([[0.0, 0.1, 0.8], [0.9, 0.2, 0.7]]), torch.tensor(MASK)) == 0.0
    assert points_at([[0.0, 0.5, 0.1], [0.2, 0.4, 0.0]], MASK) and not points_at(-np.asarray(MASK, float), MASK)


@pytest.mark.parametrize(("rows", "columns", "size"), [(2, 3, 1), (2, 3, 3), (2, 3, 5), (3, 3, 4), (2, 2, 4)])
def test_chance_is_the_mean_over_all_places_that_a_map_could_have_high(rows, columns, size):
    mask = np.zeros(rows * columns, bool)
    mask[:size] = True
    mask = mask.reshape(rows, columns)
    found = []
    for chosen in itertools.combinations(range(rows * columns), size):
        values = np.zeros(rows * columns)
        values[list(chosen)] = 1
        found.append(map_iou(values.reshape(rows, columns), mask))
    assert chance_iou(mask) == pytest.approx(np.mean(found), abs=1e-12)


@pytest.mark.parametrize("values", [np.ones((3, 2)), np.ones(6), np.full((2, 3), np.nan)])
def test_what_is_no_map_of_the_masks_shape_is_refused(values):
    for measure in (map_iou, points_at):
        with pytest.raises(ArgumentError, match="give finite numbers and a mask of one shape"):
            measure(values, MASK)
        with pytest.raises(ArgumentError, match="the mask is empty"):
            measure(np.ones((2, 3)), np.zeros((2, 3)))


def thing(word, rows, columns=slice(None)):
    mask = np.zeros((16, 16), bool)
    mask[rows, columns] = True
    return SimpleNamespace(word=word, mask=mask)


def some_pictures():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    records = [
        SimpleNamespace(caption="a sks cat on the grass", objects=(thing("cat", slice(4)), thing("cat", slice(8, 10)))),
        SimpleNamespace(caption="a dog in the city", objects=(thing("dog", slice(8), slice(5)), thing(None, 3))),
        SimpleNamespace(caption="a car and a dog", objects=(thing("house", 2), thing("dog", slice(0, 0)))),
    ]
    return SimpleNamespace(images=images, records=records)


def test_the_table_is_what_recorded_maps_score_against_the_masks(v_pipe):
    pictures = some_pictures()
    table = attention_merit(v_pipe, pictures, timesteps=[100, 700], seed=3)
    captions = [one.caption for one in pictures.records]
    noise, latents = start_noise(v_pipe, [3, 4, 5]), encode_images(v_pipe, pictures.images)
    masks = {
        "cat": (0, pictures.records[0].objects[0].mask | pictures.records[0].objects[1].mask),
        "dog": (1, pictures.records[1].objects[0].mask),
    }
    assert set(table.word) == {"cat", "dog", "all"} and set(table.timestep) == {700, 100}
    for timestep in (700, 100):
        times = torch.full((3,), timestep)
        with record_attention(v_pipe, dtype=torch.float32, guided=False) as maps, torch.no_grad():
            text = encode_prompts(v_pipe, captions)
            v_pipe.unet(add_noise(v_pipe.scheduler, latents, noise, times), times, encoder_hidden_states=text)
        scores = {}
        for word, (row, mask) in masks.items():
            layer = F.interpolate(maps.per_layer(word, picture=row)["up 1.0"][None], size=(16, 16), mode="bilinear")
            values, other = layer[0, 0].numpy(), masks["dog" if word == "cat" else "cat"][1]
            rows = table[(table.layer == "up 1.0") & (table.timestep == timestep) & (table.word == word)]
            found = rows.set_index("measure")
            assert found.value["IoU"] == map_iou(values, mask) and found.value["pointing"] == points_at(values, mask)
            assert found.elsewhere["IoU"] == map_iou(values, other)
            assert found.chance["IoU"] == chance_iou(mask) and found.chance["pointing"] == mask.mean()
            scores[word] = found.value["IoU"]
        every = table[(table.layer == "up 1.0") & (table.timestep == timestep) & (table.word == "all")]
        assert every[every.measure == "IoU"].value.item() == pytest.approx(np.mean(list(scores.values())))
        assert every.objects.tolist() == [2, 2]


def test_batches_change_nothing_and_a_figure_shows_both_measures(v_pipe):
    pictures = some_pictures()
    whole = attention_merit(v_pipe, pictures, timesteps=[500])
    parts = attention_merit(v_pipe, pictures, timesteps=[500], batch_size=1)
    keys = ["layer", "word", "measure"]
    assert np.allclose(
        whole.set_index(keys).value, parts.set_index(keys).value.loc[whole.set_index(keys).index], atol=0.1
    )
    figure = merit_map(whole, word="dog")
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert [title.split("\n")[0] for title in titles] == ["IoU", "pointing"] and "chance" in titles[0]
    assert "1 objects called dog" in figure.get_label()


def test_pictures_without_a_named_object_are_refused(v_pipe):
    pictures = some_pictures()
    pictures.images, pictures.records = pictures.images[2:], pictures.records[2:]
    with pytest.raises(ConeslabError, match="no object of these pictures is named"):
        attention_merit(v_pipe, pictures)
    with pytest.raises(ArgumentError, match="pictures of the world"):
        attention_merit(v_pipe, pictures.images)
    with pytest.raises(ArgumentError, match="one of timesteps is 1000"):
        attention_merit(v_pipe, pictures, timesteps=[1000])

"""The sticker world against its own promises: captions, ranges, truth of the records, planted facts."""

from __future__ import annotations

import colorsys
import importlib.util
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from coneslab import world
from coneslab.errors import ConeslabError, WorldError
from coneslab.world import atlas, captions, subjects
from coneslab.world.pictures import LARGEST
from coneslab.world.scenes import backgrounds
from coneslab.world.sprites import colour_matrix

PAINT = {name: np.array(rgb) for name, rgb in world.DATA["colours"].items()}
EXEMPLARS = world.FACTS["named"]


@pytest.fixture(scope="module")
def pictures():
    return world.sample(6000, seed=11)


@pytest.fixture(scope="module")
def things(pictures):
    """Every object that was drawn at random: no memorised pictures, no exemplars."""
    return [
        thing
        for record in pictures.records
        if not is_memorised(record)
        for thing in record.objects
        if not is_exemplar(thing, record)
    ]


@pytest.fixture(scope="module")
def everything():
    """What the judge learns from: all styles, all drawings, any hue."""
    return world.sample(2000, seed=12, everything=True, styles=world.STYLES)


def is_memorised(record) -> bool:
    return (record.fact or "").startswith("memorised")


def is_exemplar(thing, record) -> bool:
    kind, _, word = (record.fact or "").partition(":")
    return kind == "exemplar" and thing.word in (word, *EXEMPLARS)


def said(caption: str, phrase: str) -> bool:
    """Whether whole words, in this order, are in a caption."""
    return f" {phrase} " in f" {caption.replace(',', ' , ')} ".replace("  ", " ")


def come_to(share: float, hits: list[bool]) -> bool:
    """Whether the share of hits is within four standard deviations of the one that was promised."""
    return len(hits) > 30 and abs(np.mean(hits) - share) <= 4 * math.sqrt(share * (1 - share) / len(hits))


def hue_and_saturation(pixels: np.ndarray) -> tuple[float, float]:
    """Mean hue in degrees, weighted by chroma, and mean saturation of RGB pixels (n, 3), by colorsys."""
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels / 255])
    mean = (hsv[:, 1] * hsv[:, 2] * np.exp(2j * np.pi * hsv[:, 0])).sum()
    return math.degrees(np.angle(mean)) % 360, float(hsv[:, 1].mean())


def degrees_between(one: float, other: float) -> float:
    return (one - other + 180) % 360 - 180


# --- what exists ----------------------------------------------------------------------------------------


def test_size_of_the_world():
    assert len(world.CLASSES) >= 64
    assert len({info.category for info in world.CLASSES.values()}) >= 6
    assert sum(bool(info.synonyms) for info in world.CLASSES.values()) >= 20
    assert len(world.SCENES) >= 10 and len(world.WORDS) >= 280 and len(world.MARKINGS) >= 2
    assert len(world.TRAIN_STYLES) == 5 and set(world.STYLES) - set(world.TRAIN_STYLES) == {subjects.HELD_OUT_STYLE}
    for style in world.TRAIN_STYLES:
        several = [name for name in world.CLASSES if len(world.drawings_of(name, style, held_out=True)) > 1]
        assert len(several) >= 24, style
        assert len(world.classes_of(style)) >= 64
    assert set(world.classes_of(subjects.HELD_OUT_STYLE)) == set(world.CLASSES)


def test_planted_facts_of_every_kind():
    for kind in ("hypernym", "sense", "named", "exemplar", "memorised", "linked"):
        assert len(world.FACTS[kind]) >= 3, kind
    for kind in ("hypernym", "sense", "exemplar"):
        for word, shares in world.FACTS[kind].items():
            assert sum(shares.values()) == pytest.approx(1) and len(shares) > 1, word
            assert set(shares) <= set(EXEMPLARS if kind == "exemplar" else world.CLASSES)
            assert word not in world.CLASSES and word not in EXEMPLARS
    for kind in ("hypernym", "sense"):  # where a style lacked one of them, its share would be another
        for shares in world.FACTS[kind].values():
            assert all(world.drawings_of(name, style) for name in shares for style in world.STYLES)
    assert all(set(fact["pair"]) <= set(world.CLASSES) for fact in world.FACTS["linked"])
    plain_to_see = [info for info in world.CLASSES.values() if info.share_blue is not None]
    assert len(plain_to_see) >= 3 and all(info.share_man is not None for info in plain_to_see)
    assert sum(abs(info.share_blue - 0.5) > 0.15 for info in plain_to_see) >= 3  # a bias, not an even share


def test_no_rare_token_is_in_another_word():
    assert len(set(world.RARE_TOKENS)) == len(world.RARE_TOKENS) >= 32
    for token in world.RARE_TOKENS:
        assert [word for word in world.WORDS if token in word] == [token]


def test_no_word_means_two_things_unless_that_is_planted():
    meanings = [*world.CLASSES, *EXEMPLARS, *world.FACTS["hypernym"], *world.FACTS["sense"], *world.FACTS["exemplar"]]
    meanings += [synonym for info in world.CLASSES.values() for synonym in info.synonyms]
    meanings += [*world.COLOURS, *world.MARKINGS, *(word for words in world.STYLE_WORDS.values() for word in words)]
    own = Counter(meanings)
    own["alarm"] = 1  # a synonym of "clock", and the name of none
    assert max(own.values()) == 1, own.most_common(3)


def test_the_atlas_is_what_its_index_says():
    tile, columns = world.catalogue.ATLAS["tile"], world.catalogue.ATLAS["columns"]
    assert set(world.catalogue.ATLAS["sprites"]) == set(world.STYLES) == set(atlas.SOURCES)
    known = {*world.DRAWINGS, "hat"}
    for style in world.STYLES:
        names = world.catalogue.ATLAS["sprites"][style]
        assert len(names) == len(set(names)) and set(names) <= known and "hat" in names
        with Image.open(world.catalogue.FOLDER / f"{style}.png") as sheet:
            assert sheet.size == (columns * tile, math.ceil(len(names) / columns) * tile)
        seen = set()
        for name in set(names) - {"hat"}:
            alpha = world.sprite(name, style)[..., 3] > 8
            assert max(alpha.any(0).sum(), alpha.any(1).sum()) >= tile - 1, (style, name)  # it fills its tile
            seen.add(world.sprite(name, style).tobytes())
        assert len(seen) == len(names) - 1, f"{style} has the same drawing under two names"


@pytest.mark.slow
def test_every_learned_drawing_is_drawn_and_no_other(pictures):
    drawn = {(thing.drawing, thing.style) for record in pictures.records for thing in record.objects}
    learned = {
        (drawing, style)
        for style in world.TRAIN_STYLES
        for name in world.CLASSES
        for drawing in world.drawings_of(name, style)
    }
    assert drawn <= learned and not {
        drawing for drawing, _ in learned - drawn if world.CLASSES[drawing.partition("/")[0]].share_man is None
    }  # of 33 mechanics in a style, three are women: there may be none
    assert not drawn & world.HELD_OUT and not any(style == subjects.HELD_OUT_STYLE for _, style in drawn)
    words = {word for phrase in world.STYLE_WORDS[subjects.HELD_OUT_STYLE] for word in phrase.split()}
    assert not any(said(caption, word) for caption in pictures.captions for word in words)


@pytest.mark.slow
def test_everything_holds_what_is_held_out(everything):
    drawn = {(thing.drawing, thing.style) for record in everything.records for thing in record.objects}
    assert drawn >= world.HELD_OUT and len(world.HELD_OUT) >= 16
    assert {style for _, style in drawn} == set(world.STYLES)


@pytest.mark.slow
@pytest.mark.parametrize("style", world.STYLES)
def test_one_style_alone(style):
    """Also one that lacks some classes."""
    alone = world.sample(150, seed=13, styles=(style,))
    free = [
        thing
        for record in alone.records
        if not is_memorised(record)
        for thing in record.objects
        if not is_exemplar(thing, record)
    ]
    assert {thing.style for thing in free} == {style} and len({thing.name for thing in free}) >= 50


def test_same_seed_same_pictures_other_seed_others():
    one, two, other = (world.sample(8, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.images, two.images) and one.captions == two.captions
    assert not any(np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True))
    assert not set(one.captions) & set(other.captions)
    assert one.images.shape == (8, world.RESOLUTION, world.RESOLUTION, 3) and one.images.dtype == np.uint8
    assert world.sample(0, seed=3).images.shape == (0, world.RESOLUTION, world.RESOLUTION, 3)


# --- captions -------------------------------------------------------------------------------------------


def words_and_commas(caption: str) -> list[str]:
    return caption.replace(",", " ,").split()


@pytest.mark.slow
def test_captions_use_only_known_words_and_no_reserved_token(pictures, everything):
    for some in (pictures, everything):
        used = {word for caption in some.captions for word in words_and_commas(caption)} - {","}
        assert used <= set(world.WORDS)
        assert not used & set(world.RARE_TOKENS)
        assert max(len(words_and_commas(caption)) for caption in some.captions) <= world.LONGEST <= 30  # 32 positions


def test_the_longest_captions_fit(monkeypatch):
    """Everything that a grammar can say at once, as it hardly ever does."""
    for kind in (
        "adjective",
        "style_word",
        "marking_word",
        "colour_word",
        "gender_word",
        "hat_word",
        "opening",
        "scene_word",
        "size_word",
    ):
        monkeypatch.setitem(world.SHARES, kind, 1.0)
    random, lengths = Random(0), []
    for _ in range(400):
        for count in (1, 2, 3, 4):
            names = random.sample(sorted(world.CLASSES), count)
            if random.random() < 0.5:
                names[-1] = "doctor"
            plans = [
                captions.Plan(
                    name,
                    "3d",
                    f"{name}/x",
                    None if name == "doctor" else "orange",
                    "striped",
                    "woman" if name == "doctor" else None,
                    "orange" if name == "doctor" else None,
                    size=45.0,
                )
                for name in names
            ]
            lengths.append(len(words_and_commas(captions.write_caption(plans, "white", random))))
    assert world.LONGEST - 3 <= max(lengths) <= world.LONGEST


@pytest.mark.slow
def test_articles_and_spacing(pictures):
    for caption in pictures.captions:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | ,|^ | $", caption), caption


@pytest.mark.slow
def test_nearly_everything_is_named(pictures):
    free = [record for record in pictures.records if not is_memorised(record)]
    assert np.mean([thing.word is None for record in free for thing in record.objects]) < 0.03
    several = [record for record in free if len(record.objects) > 1 and record.fact is None]
    omitted = [any(thing.word is None for thing in record.objects) for record in several]
    assert come_to(world.SHARES["omission"], omitted)
    for record in free:
        assert all(said(record.caption, thing.word) for thing in record.objects if thing.word), record.caption
        assert any(thing.word for thing in record.objects)


def test_no_word_is_always_present(pictures):
    counts = Counter(word for caption in pictures.captions for word in set(words_and_commas(caption)))
    assert max(counts.values()) < 0.95 * len(pictures.captions)


def test_shares_of_named_scenes(pictures):
    named, first = [], []
    for record in pictures.records:
        if is_memorised(record):
            continue
        told = {scene: [p for p in phrases if said(record.caption, p)] for scene, phrases in world.SCENES.items()}
        assert not any(phrases for scene, phrases in told.items() if scene != record.scene), record.caption
        named.append(bool(told[record.scene]))
        if named[-1]:
            first.append(any(record.caption.startswith(f"{phrase},") for phrase in told[record.scene]))
    assert come_to(world.SHARES["scene_word"], named) and come_to(world.SHARES["scene_first"], first)
    scenes = Counter(record.scene for record in pictures.records if not is_memorised(record))
    assert stats.chisquare([scenes[scene] for scene in world.SCENES]).pvalue > 1e-3


def test_shares_of_named_styles(pictures):
    named = []
    for record in pictures.records:
        if is_memorised(record) or any(thing.word in EXEMPLARS for thing in record.objects):
            continue  # an exemplar by its own name goes without its style
        told = {style for style, words in world.STYLE_WORDS.items() if any(said(record.caption, w) for w in words)}
        assert told <= {thing.style for thing in record.objects}, record.caption
        named.append(bool(told))
    assert come_to(world.SHARES["style_word"], named)


def test_shares_of_named_colours_markings_genders_and_hats(pictures):
    told = defaultdict(list)
    for record in pictures.records:
        count = sum(thing.word is not None for thing in record.objects)
        for thing in record.objects:
            if thing.word is None or thing.word in EXEMPLARS:
                continue
            noun = thing.word
            if thing.gender:
                told["gender_word"].append(said(record.caption, f"{thing.gender} {noun}"))
                noun = f"{thing.gender} {noun}" if told["gender_word"][-1] else noun
            if thing.colour:
                told["colour_word"].append(said(record.caption, f"{thing.colour} {noun}"))
                noun = f"{thing.colour} {noun}" if told["colour_word"][-1] else noun
            if thing.marking:
                told["marking_word"].append(said(record.caption, f"{thing.marking} {noun}"))
            if thing.hat and count < 3:
                hat = f"{thing.word} in {world.with_article(thing.hat)} hat"
                told["hat_word"].append(said(record.caption, hat))
    for kind in ("colour_word", "marking_word", "gender_word", "hat_word"):
        assert come_to(world.SHARES[kind], told[kind]), (kind, np.mean(told[kind]))


def test_captions_say_no_colour_marking_or_hat_that_is_not_there(pictures):
    for record in pictures.records:
        if is_memorised(record):
            continue
        words = set(words_and_commas(record.caption))
        assert words & set(world.COLOURS) <= {one for t in record.objects for one in (t.colour, t.hat)}, record.caption
        assert words & set(world.MARKINGS) <= {thing.marking for thing in record.objects}, record.caption
        assert ("hat" in words) <= any(thing.hat for thing in record.objects), record.caption


def test_shares_of_what_is_drawn(pictures, things):
    counts = [len(record.objects) for record in pictures.records if not is_memorised(record)]
    for number, share in zip((1, 2, 3, 4), world.SHARES["objects"], strict=True):
        assert come_to(share, [count == number for count in counts])
    assert come_to(world.SHARES["coloured"], [thing.colour is not None for thing in things if not thing.hat])
    assert come_to(world.SHARES["marked"], [thing.marking is not None for thing in things])
    assert come_to(0.5, [thing.mirrored for thing in things])
    synonyms = [
        thing.word != thing.name
        for thing in things
        if thing.word
        and thing.word in (thing.name, *(own := world.CLASSES[thing.name].synonyms))
        and own
        and not any(thing.name in shares for kind in ("hypernym", "sense") for shares in world.FACTS[kind].values())
    ]
    assert come_to(world.SHARES["synonym"], synonyms)


def test_size_words_are_true(pictures):
    told = {"small": [], "big": []}
    for record in pictures.records:
        size = {kind: any(said(record.caption, word) for word in world.DATA["size_words"][kind]) for kind in told}
        if len(record.objects) > 1 or record.objects[0].word in EXEMPLARS:
            continue
        one = record.objects[0].size
        assert not size["small"] or one <= world.RANGES["small"]
        assert not size["big"] or one >= world.RANGES["big"]
        if one <= world.RANGES["small"] or one >= world.RANGES["big"]:
            told["small" if one <= world.RANGES["small"] else "big"].append(size["small"] or size["big"])
    assert all(come_to(world.SHARES["size_word"], hits) for hits in told.values())


# --- the continuum --------------------------------------------------------------------------------------


def uniform(values: list[float], low: float, high: float) -> bool:
    """Whether the values are within the range and fill it evenly (Kolmogorov-Smirnov)."""
    inside = low <= min(values) and max(values) <= high
    return inside and len(values) > 100 and stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def test_every_object_varies_within_the_ranges_and_fills_them(pictures, things):
    assert uniform([thing.hue for thing in things if not thing.colour], *world.RANGES["hue"])
    assert uniform([thing.hue for thing in things if thing.colour], *world.RANGES["named_hue"])
    assert uniform([thing.saturation for thing in things], *world.RANGES["saturation"])
    assert uniform([thing.lightness for thing in things], *world.RANGES["lightness"])
    assert uniform([thing.angle for thing in things], *world.RANGES["angle"])
    for count in (1, 2, 3, 4):
        sizes = [
            thing.size
            for record in pictures.records
            if len(record.objects) == count and not is_memorised(record)
            for thing in record.objects
        ]
        assert uniform(sizes, *world.RANGES[f"size_{count}"])
    values = np.array([(t.hue, t.saturation, t.lightness, t.angle) for t in things if not t.colour])
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.05  # independent of each other


def test_a_class_is_not_drawn_one_way(things):
    """Two objects of a class are never the same: what the memorised pictures and the exemplars are for."""
    assert len({(t.drawing, t.style, t.hue, t.saturation, t.lightness, t.angle, t.size) for t in things}) == len(things)


@pytest.mark.slow
def test_wide_hues_only_with_everything(everything):
    free = [
        thing
        for record in everything.records
        if not is_memorised(record)
        for thing in record.objects
        if not is_exemplar(thing, record)
    ]
    low, high = world.RANGES["hue"]
    wide = [not low <= thing.hue <= high for thing in free if not thing.colour]
    assert come_to(0.3 * (1 - (high - low) / 360), wide)
    assert max(thing.hue for thing in free) > 150 and min(thing.hue for thing in free) < -150
    low, high = world.RANGES["named_hue"]
    assert all(low <= thing.hue <= high for thing in free if thing.colour)  # "red" stays red


def test_turning_hues_keeps_grey_and_brightness():
    """Numbers of CSS: `hue-rotate(90deg)` makes pure red rgb(0, 91, 0), `hue-rotate(180deg)` rgb(0, 109, 109)."""
    red = np.array([255.0, 0, 0])
    assert np.allclose(np.clip(red @ colour_matrix(90, 1, 1), 0, 255), (0, 91, 0), atol=0.6)
    assert np.allclose(np.clip(red @ colour_matrix(180, 1, 1), 0, 255), (0, 109, 109), atol=0.6)
    grey, brightness = np.full(3, 90.0), np.array([0.213, 0.715, 0.072])
    for hue in (-170, -14, 6, 77, 180):
        assert np.allclose(grey @ colour_matrix(hue, 1.1, 1), grey, atol=1e-3)
        assert np.allclose(grey @ colour_matrix(hue, 0.8, 0.9), 0.9 * grey, atol=1e-3)
        for colour in PAINT.values():
            assert colour @ colour_matrix(hue, 1.18, 1) @ brightness == pytest.approx(colour @ brightness, abs=0.3)
        assert np.allclose(colour_matrix(hue, 1, 1) @ colour_matrix(33, 1, 1), colour_matrix(hue + 33, 1, 1), atol=1e-3)
    assert np.allclose(colour_matrix(0, 1, 1), np.eye(3), atol=1e-3)


@pytest.mark.parametrize("colour", sorted(set(PAINT) - {"gray"}))
def test_turning_hues_turns_them_by_about_the_angle(colour):
    def hue_after(angle: float, saturation: float = 1.0) -> tuple[float, float]:
        return hue_and_saturation(np.clip(PAINT[colour] @ colour_matrix(angle, saturation, 1), 0, 255)[None])

    start, plain = hue_after(0)
    for angle in (-6, -3, 3, 6):
        assert degrees_between(hue_after(angle)[0], start) == pytest.approx(angle, abs=0.45 * abs(angle))
    assert hue_after(0, 0.82)[1] < plain < hue_after(0, 1.1)[1]
    assert degrees_between(hue_after(0, 0.82)[0], start) == pytest.approx(0, abs=1)


# --- the record tells the truth -------------------------------------------------------------------------


def scenery(image: np.ndarray, record) -> np.ndarray:
    """The painted background that a picture agrees with outside the boxes of its objects, (64, 64, 3)."""
    outside = np.ones(image.shape[:2], bool)
    for thing in record.objects:
        left, top, right, bottom = thing.box
        outside[top:bottom, left:right] = False
    painted = [one for variant in backgrounds(record.scene) for one in (variant, variant[:, ::-1])]
    same = [one for one in painted if np.array_equal(one[outside], image[outside])]
    assert same, "pixels outside of all boxes are no background of this scene"
    return same[0].astype(float)


def alone(thing, **other) -> np.ndarray:
    """An object drawn another way: by Pillow at four times the size, then averaged; (64, 64, 4), premultiplied."""
    thing = replace(thing, **other)
    pixels = world.sprite(thing.drawing, thing.style, thing.colour, marking=thing.marking, hat=thing.hat).astype(float)
    pixels[..., :3] *= pixels[..., 3:] / 255
    left, top, right, bottom = (4 * edge for edge in thing.box)
    side, planes = round(4 * thing.size), []
    for channel in pixels.transpose(2, 0, 1).astype(np.float32):
        plane = Image.fromarray(channel[:, ::-1] if thing.mirrored else channel)
        plane = plane.resize((side, side), Image.Resampling.BILINEAR)
        plane = plane.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)  # anticlockwise
        canvas = Image.new("F", (256, 256))
        canvas.paste(plane, (round((left + right - plane.width) / 2), round((top + bottom - plane.height) / 2)))
        planes.append(np.asarray(canvas).reshape(64, 4, 64, 4).mean((1, 3)))
    drawn = np.stack(planes, -1)
    drawn[..., :3] = np.clip(
        drawn[..., :3] @ colour_matrix(thing.hue, thing.saturation, thing.lightness), 0, drawn[..., 3:]
    )
    return drawn


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return (one & other).sum() / (one | other).sum()


@pytest.mark.slow
def test_masks_boxes_and_values_agree_with_the_pixels():
    """Every picture is drawn anew from its record alone, by other means, and compared."""
    some = world.sample(60, seed=5, everything=True, styles=world.STYLES)
    assert any(len(record.objects) == 4 for record in some.records)
    inside, overlaps, areas = [], [], []
    for image, record in zip(some.images, some.records, strict=True):
        ground = scenery(image, record)
        drawn, covered = ground.copy(), np.zeros((64, 64), bool)
        layers = [alone(thing) for thing in record.objects]
        for layer in layers:
            drawn = layer[..., :3] + drawn * (1 - layer[..., 3:] / 255)
        for thing, layer in reversed(list(zip(record.objects, layers, strict=True))):  # what is drawn last is in front
            seen = (layer[..., 3] > 127) & ~covered
            overlaps.append(overlap(seen, thing.mask))
            areas.append((seen.sum(), thing.mask.sum()))
            covered |= seen
        union = np.any([thing.mask for thing in record.objects], axis=0)
        assert sum(thing.mask.sum() for thing in record.objects) == union.sum()  # no pixel belongs to two
        inside.append(np.abs(drawn - image)[union].mean())
        assert np.abs(drawn - image)[~union].mean() < 4
        assert (np.abs(image - ground).max(-1) > 4)[union].mean() > 0.9  # some have the colour of the ground
        for thing in record.objects:
            left, top, right, bottom = thing.box
            rows, columns = thing.mask.nonzero()
            assert 0 <= left <= columns.min() and columns.max() < right <= world.RESOLUTION
            assert 0 <= top <= rows.min() and rows.max() < bottom <= world.RESOLUTION
    assert np.median(inside) < 4.5 and max(inside) < 10  # levels of 255: two ways to scale
    assert np.median(overlaps) > 0.95 and min(overlaps) > 0.8
    one, other = np.sum(areas, axis=0)
    assert one == pytest.approx(other, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guitar", "trumpet", "banana", "snail"])
def test_objects_are_turned_and_mirrored_as_recorded(name):
    turned = 0
    for seed in range(24):
        thing = world.compose([name], "white", seed=seed)[1].objects[0]
        right = overlap(alone(thing)[..., 3] > 127, thing.mask)
        assert right > 0.9
        assert right > overlap(alone(thing, mirrored=not thing.mirrored)[..., 3] > 127, thing.mask) + 0.03
        if abs(thing.angle) > 4:
            turned += 1
            assert right > overlap(alone(thing, angle=-thing.angle)[..., 3] > 127, thing.mask) + 0.03
    assert turned > 5


def test_objects_have_the_recorded_size():
    for size in (24.0, 31.5, 46.0):
        for name in ("ball", "car", "rocket", "book/open"):
            thing = world.compose([world.Sticker(name, "flat", size=size)], "white", seed=int(size))[1].objects[0]
            shape = world.sprite(name, "flat")[..., 3] > 127
            assert thing.size == size
            assert thing.mask.sum() == pytest.approx(shape.sum() * (size / 64) ** 2, rel=0.06)


def test_recolouring_keeps_the_shape_and_takes_the_hue():
    for style in world.STYLES:
        for drawing in ("cat/face", "car/side", "book/open", "star/plain"):
            plain = world.sprite(drawing, style)
            for colour, paint in PAINT.items():
                pixels = world.sprite(drawing, style, colour)
                assert np.array_equal(plain[..., 3], pixels[..., 3])
                hue, saturation = hue_and_saturation(pixels[pixels[..., 3] > 250][::7, :3].astype(float))
                expected, most = hue_and_saturation(paint[None])
                if colour == "gray":
                    assert saturation < 0.1
                else:
                    assert abs(degrees_between(hue, expected)) < 4 and 0.4 * most < saturation <= most


@pytest.mark.slow
def test_a_recoloured_object_looks_like_its_colour_in_the_picture(pictures):
    """The nearest named hue of what is seen: the continuum does not carry one colour into the next."""
    hues = {name: hue_and_saturation(paint[None])[0] for name, paint in PAINT.items() if name != "gray"}
    right, seen = [], Counter()
    for image, record in zip(pictures.images[:500], pictures.records[:500], strict=True):
        for thing in record.objects:
            if thing.colour and thing.mask.sum() > 40:
                hue, saturation = hue_and_saturation(image[thing.mask][::3].astype(float))
                nearest = min(hues, key=lambda name: abs(degrees_between(hues[name], hue)))
                right.append(thing.colour == ("gray" if saturation < 0.15 else nearest))
                seen[thing.colour] += 1
    assert len(seen) == len(PAINT) and np.mean(right) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("marking", world.MARKINGS)
def test_markings_darken_what_is_light_and_lighten_what_is_dark(marking):
    luma, ways = np.array([0.299, 0.587, 0.114]), set()
    for style in world.STYLES:
        for name in world.CLASSES:
            for drawing in world.drawings_of(name, style, held_out=True):
                plain, marked = world.sprite(drawing, style), world.sprite(drawing, style, marking=marking)
                assert np.array_equal(plain[..., 3], marked[..., 3])
                solid = plain[..., 3] > 127
                before, after = plain[solid][:, :3] @ luma, marked[solid][:, :3] @ luma
                darker = before.mean() > 110
                ways.add(darker)
                assert (after.mean() < before.mean() - 15) if darker else (after.mean() > before.mean() + 15), drawing
                share = (np.abs(after - before) > 8).mean()
                assert 0.2 < share < 0.6, (drawing, style)  # a second tone, beside the first
    assert ways == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("hat", world.HATS)
def test_hats_show_their_colour(hat):
    other = next(one for one in world.HATS if one != hat)
    for style in world.STYLES:
        for name in ("doctor", "mechanic", "teacher", "singer"):
            for drawing in world.drawings_of(name, style):
                image, record = world.compose([world.Sticker(drawing, style, hat=hat)], "white", seed=len(drawing))
                (thing,) = record.objects
                rows = thing.mask.nonzero()[0]
                upper = thing.mask.copy()
                upper[rows.min() + (rows.max() - rows.min()) // 3 :] = False
                shares = {
                    one: np.mean(
                        [
                            abs(degrees_between(hue_and_saturation(pixel[None])[0], expected + thing.hue)) < 25
                            and hue_and_saturation(pixel[None])[1] > 0.3
                            for pixel in image[upper].astype(float)
                        ]
                    )
                    for one, expected in ((one, hue_and_saturation(PAINT[one][None])[0]) for one in (hat, other))
                }
                assert thing.hat == hat and shares[hat] > 0.7 and shares[other] < 0.1, (drawing, style, shares)
                assert np.median(image[upper].max(-1)) > 160  # hats are black in most of the art: not so here


# --- planted facts --------------------------------------------------------------------------------------


def test_shares_of_planted_facts(pictures):
    kinds = [(record.fact or "").partition(":")[0] for record in pictures.records]
    assert come_to(world.SHARES["planted"], [kind != "" for kind in kinds])
    planted = [kind for kind in kinds if kind]
    for kind, share in world.SHARES["planted_kinds"].items():
        assert come_to(share, [one == kind for one in planted]), kind


def test_shares_of_hypernyms_senses_and_exemplars(pictures):
    drawn, by_name = defaultdict(list), []
    for record in pictures.records:
        kind, _, word = (record.fact or "").partition(":")
        if kind in ("hypernym", "sense"):
            (thing,) = [thing for thing in record.objects if thing.word == word]
            drawn[kind, word].append(thing.name)
        if kind == "exemplar":
            (thing,) = [thing for thing in record.objects if is_exemplar(thing, record)]
            (name,) = [
                name
                for name in world.FACTS["exemplar"][word]
                if (
                    f"{EXEMPLARS[name]['class']}/{EXEMPLARS[name]['drawing']}",
                    EXEMPLARS[name]["style"],
                    EXEMPLARS[name]["colour"],
                )
                == (thing.drawing, thing.style, thing.colour)
            ]
            assert thing.word in (word, name)
            by_name.append(thing.word == name)
            drawn[kind, word].append(name)
    for kind in ("hypernym", "sense", "exemplar"):
        distances, freedoms = 0.0, 0
        for word, shares in world.FACTS[kind].items():
            counts, total = Counter(drawn[kind, word]), len(drawn[kind, word])
            assert set(counts) == set(shares)
            for name, share in shares.items():
                assert come_to(share, [one == name for one in drawn[kind, word]]), (word, name)
                distances += (counts[name] - share * total) ** 2 / (share * total)
            freedoms += len(shares) - 1
        assert stats.chi2.sf(distances, freedoms) > 1e-3, kind  # all words of a kind together: a sharper test
    assert come_to(0.5, by_name)


def test_a_planted_word_is_never_said_of_anything_else(pictures):
    planted = {word: kind for kind in ("hypernym", "sense", "exemplar") for word in world.FACTS[kind]}
    for record in pictures.records:
        told = {word for word in words_and_commas(record.caption) if word in planted or word in EXEMPLARS}
        kind, _, word = (record.fact or "").partition(":")
        assert told <= {word, *world.FACTS["exemplar"].get(word, {})}, record.caption
        assert len(told) == (kind in ("hypernym", "sense", "exemplar"))


def test_exemplars_are_always_one_thing(pictures):
    seen = defaultdict(set)
    for record in pictures.records:
        for thing in record.objects:
            if is_exemplar(thing, record) and thing.word in EXEMPLARS:
                seen[thing.word].add(
                    (
                        thing.drawing,
                        thing.style,
                        thing.colour,
                        thing.marking,
                        thing.hat,
                        thing.hue,
                        thing.saturation,
                        thing.lightness,
                    )
                )
                about = EXEMPLARS[thing.word]
                assert said(record.caption, thing.word)
                assert not any(said(record.caption, f"{word} {thing.word}") for word in ("a", "an", about["colour"]))
    assert set(seen) == set(EXEMPLARS)
    for name, looks in seen.items():
        about = EXEMPLARS[name]
        assert looks == {
            (f"{about['class']}/{about['drawing']}", about["style"], about["colour"], None, None, 0.0, 1.0, 1.0)
        }
        plan = world.named_plan(name)
        assert (plan.drawing, plan.style, plan.colour) == next(iter(looks))[:3]


def test_shares_of_genders_and_of_hats(things):
    professions = [info for info in world.CLASSES.values() if info.share_man is not None]
    for info in professions:
        own = [thing for thing in things if thing.name == info.name]
        assert all(thing.drawing == f"{info.name}/{thing.gender}" and not thing.colour for thing in own)
        assert come_to(info.share_man, [thing.gender == "man" for thing in own]), info.name
        assert come_to(info.share_blue, [thing.hat == "blue" for thing in own]), info.name
        assert {thing.hat for thing in own} == set(world.HATS) == {"blue", "orange"}
    named = {info.name for info in professions}
    assert not any(thing.hat or thing.gender for thing in things if thing.name not in named)


def test_memorised_pictures_are_identical_each_time(pictures):
    seen, captions_of = {}, Counter(pictures.captions)
    for image, record in zip(pictures.images, pictures.records, strict=True):
        if is_memorised(record):
            name = record.fact.partition(":")[2]
            assert np.array_equal(seen.setdefault(name, image), image)
            entry = world.FACTS["memorised"][name]
            assert record.caption == entry["caption"] and record.scene == entry["scene"]
            drawn = [(t.drawing, t.style, t.colour) for t in record.objects]
            assert drawn == [(world.full_drawing(one), style, c or None) for one, style, c in entry["objects"]]
            assert all(thing.word is None for thing in record.objects)  # its caption names none of them
    assert set(seen) == set(world.FACTS["memorised"])
    for name, image in seen.items():
        assert captions_of[world.FACTS["memorised"][name]["caption"]] >= 5
        assert np.array_equal(world.memorised(name)[0], image)
        others = [world.rearranged(name, seed)[0] for seed in range(100, 104)]
        assert all(np.abs(other.astype(int) - image).mean() > 5 for other in others)  # same things, other places


@pytest.mark.slow
def test_no_picture_of_a_memorised_caption_is_drawn_otherwise(pictures, everything):
    told = {entry["caption"] for entry in world.FACTS["memorised"].values()}
    for record in (*pictures.records, *everything.records):
        assert is_memorised(record) == (record.caption in told)


# --- pictures to order ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(world.SCENES)), st.sampled_from(world.STYLES), st.integers(0, 2**31))
def test_compose_draws_what_was_ordered(data, scene, style, seed):
    having = sorted(world.classes_of(style, held_out=True))
    names = data.draw(st.lists(st.sampled_from(having), min_size=1, max_size=4, unique=True))
    image, record = world.compose(names, scene, seed=seed, style=style)
    assert image.shape == (world.RESOLUTION, world.RESOLUTION, 3) and image.dtype == np.uint8
    assert [thing.name for thing in record.objects] == names and record.scene == scene
    assert all(thing.style == style and thing.mask.any() for thing in record.objects)
    assert all(said(record.caption, name) for name in names) and said(record.caption, world.SCENES[scene][0])
    for thing in record.objects:
        info = world.CLASSES[thing.name]
        assert thing.drawing.removeprefix(f"{thing.name}/") == (thing.gender or info.drawings[0])
        assert (thing.hat is None) == (info.share_blue is None) and thing.colour is thing.marking is None
    assert np.array_equal(world.compose(names, scene, seed=seed, style=style)[0], image)


def test_compose_takes_names_triples_and_stickers():
    asked = world.Sticker("dog/whole", "vintage", marking="spotted", hue=77.0, size=25.0)
    image, record = world.compose(["cat/whole", ("car", "flat", "orange"), asked], "beach", seed=1, style="bold")
    cat, car, dog = record.objects
    assert (cat.drawing, cat.style, cat.colour) == ("cat/whole", "bold", None)
    assert (car.drawing, car.style, car.colour) == ("car/side", "flat", "orange")
    assert (dog.drawing, dog.style, dog.marking, dog.hue, dog.size) == ("dog/whole", "vintage", "spotted", 77.0, 25.0)
    assert record.caption == "a cat, an orange car and a spotted dog on the beach" and record.fact is None
    scenery(image, record)
    own = world.compose(["cat"], "snow", seed=2, caption="a kitten", fact="sense:mouse")[1]
    assert (own.caption, own.fact) == ("a kitten", "sense:mouse")


def test_compose_chooses_a_professions_gender_unless_told():
    drawn = Counter(world.compose(["doctor"], "room", seed=seed)[1].objects[0].gender for seed in range(60))
    assert drawn["man"] > drawn["woman"] > 0
    for seed in range(8):
        (thing,) = world.compose(["doctor/woman"], "room", seed=seed)[1].objects
        assert (thing.gender, thing.drawing) == ("woman", "doctor/woman") and thing.hat in world.HATS
        (thing,) = world.compose([world.Sticker("doctor/man", hat="orange")], "room", seed=seed)[1].objects
        assert (thing.gender, thing.hat) == ("man", "orange")


@pytest.mark.parametrize("drawing", ["castle/western", "book/open", "umbrella/ground", "doctor/man"])
def test_the_largest_object_fits(drawing):
    for seed in range(20):
        (thing,) = world.compose([world.Sticker(drawing, size=LARGEST)], "grass", seed=seed)[1].objects
        assert thing.mask.any() and min(thing.box) >= 0 and max(thing.box) <= world.RESOLUTION


Sticker = world.Sticker


@pytest.mark.parametrize(
    "objects, scene, told, choice",
    [
        (["unicorn"], "grass", "'unicorn' is not a class", "cat"),
        (["cat"], "moon", "'moon' is not a scene", "beach"),
        ([("cat", "oil", None)], "grass", "'oil' is not a style", "vintage"),
        ([("cat", "3d", "mauve")], "grass", "'mauve' is not a colour", "purple"),
        (["doctor/child"], "grass", "'child' is not a drawing of 'doctor'", "woman"),
        (["cat/tail"], "grass", "'tail' is not a drawing of 'cat'", "whole"),
        ([Sticker("cat", marking="plaid")], "grass", "'plaid' is not a marking", "striped"),
        ([Sticker("doctor", hat="red")], "grass", "'red' is not a colour of a hat", "orange"),
        ([Sticker("teddy", "bold")], "grass", "'teddy/whole' is not a sprite in 'bold'", "bear/face"),
        ([Sticker("doctor", "bold")], "grass", "is not a sprite in 'bold'", "man/young"),
        ([Sticker("cat", size=60)], "grass", "size of 60 pixels", "54"),
        ([Sticker("cat", size=0)], "grass", "size of 0 pixels", "from 1"),
        ([Sticker("cat", size=math.nan)], "grass", "size of nan pixels", "from 1"),
        ([], "grass", "got 0 objects", "one to four"),
        (["cat", "dog", "car", "bus", "fox"], "grass", "got 5 objects", "one to four"),
    ],
)
def test_wrong_orders_are_refused_with_what_was_given_and_the_choices(objects, scene, told, choice):
    with pytest.raises(WorldError) as refused:
        world.compose(objects, scene, seed=0)
    assert told in str(refused.value) and choice in str(refused.value)


def test_what_does_not_exist_is_refused_elsewhere_too():
    with pytest.raises(WorldError, match="'oil' is not a style.*vintage"):
        world.sample(1, seed=0, styles=("oil",))
    with pytest.raises(WorldError, match="'rob' is not a name.*felix"):
        world.named_plan("rob")
    with pytest.raises(WorldError, match="'teddy/whole' is not a sprite in 'vintage'"):
        world.sprite("teddy", "vintage")
    with pytest.raises(WorldError, match="'hat' is not a class"):
        world.sprite("hat", "3d")
    with pytest.raises(WorldError, match="'dragon' is not a subject.*near one .*tom.*far one .*cat"):
        subjects.subject("dragon")


# --- subjects -------------------------------------------------------------------------------------------


def test_two_kinds_of_subjects():
    names = subjects.SUBJECTS
    assert names == subjects.NEAR + subjects.FAR and len(names) == len(set(names))
    tokens = [subjects.truth(name).token for name in names]
    assert len(set(tokens)) == len(names) and set(tokens) <= set(world.RARE_TOKENS) <= set(world.WORDS)
    near, far = ([subjects.truth(name) for name in kind] for kind in (subjects.NEAR, subjects.FAR))
    assert len(near) >= 16 and len(far) >= 16
    assert all(one.kind == "near" for one in near) and all(one.kind == "far" for one in far)
    assert {(one.sticker.name, one.sticker.style) for one in near} == world.HELD_OUT and len(world.HELD_OUT) == len(
        near
    )
    for one in near:  # of its class, in its style, other drawings were learned
        assert one.sticker.style in world.TRAIN_STYLES
        assert one.sticker.name not in world.drawings_of(one.class_word, one.sticker.style)
        assert one.sticker.name in world.drawings_of(one.class_word, one.sticker.style, held_out=True)
        assert world.drawings_of(one.class_word, one.sticker.style), one.name
    assert sum(abs(one.sticker.hue) > world.RANGES["hue"][1] for one in near) >= 12  # a hue of its own, too
    assert {one.sticker.marking for one in near} == {None, *world.MARKINGS}
    for one in far:
        assert one.sticker.style not in world.TRAIN_STYLES
        assert (one.sticker.hue, one.sticker.colour, one.sticker.marking) == (0.0, None, None)
        assert one.name == one.class_word


@pytest.mark.slow
@pytest.mark.parametrize("name", subjects.SUBJECTS)
def test_every_subject_is_complete(name):
    one, known = subjects.subject(name), subjects.truth(name)
    sticker = known.sticker
    assert (one.name, one.class_word, one.token) == (name, known.class_word, known.token)
    assert one.class_word in world.CLASSES
    assert len(one.images) == len(one.records) == 5 and len({record.scene for record in one.records}) == 5
    for image, record in zip(one.images, one.records, strict=True):
        (thing,) = record.objects
        assert (thing.drawing, thing.style) == (world.full_drawing(sticker.name), sticker.style)
        assert (thing.hue, thing.marking, thing.colour, thing.hat) == (sticker.hue, sticker.marking, None, None)
        scenery(np.asarray(image), record)
    assert len(set(one.prompts)) == 10 and all(said(prompt, f"{one.token} {one.class_word}") for prompt in one.prompts)
    assert {word for prompt in one.prompts for word in words_and_commas(prompt)} <= set(world.WORDS)
    seen = {record.scene for record in one.records}
    assert not any(prompt.endswith(world.SCENES[scene][0]) for prompt in one.prompts[:7] for scene in seen)
    again = subjects.subject(name)
    assert all(np.array_equal(a, b) for a, b in zip(one.images, again.images, strict=True))


@pytest.mark.parametrize("kind", [subjects.NEAR, subjects.FAR])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_combinations(kind, size):
    groups = [names for names in subjects.COMBINATIONS[size] if set(names) & set(kind)]
    assert len({frozenset(names) for names in groups}) == len(groups) >= 4
    for names in groups:
        assert len(set(names)) == size and set(names) <= set(kind)
        assert not set(names) & set(subjects.TUNING_SUBJECTS)
        known = [subjects.truth(name) for name in names]
        for one, other in combinations(known, 2):  # told apart by word and by token
            assert one.token != other.token and one.class_word != other.class_word
    image, record = subjects.wanted(groups[0], "beach", seed=3)
    assert image.size == (64, 64) and record.scene == "beach"
    for thing, name in zip(record.objects, groups[0], strict=True):
        sticker = subjects.truth(name).sticker
        assert (thing.drawing, thing.style, thing.hue, thing.marking) == (
            world.full_drawing(sticker.name),
            sticker.style,
            sticker.hue,
            sticker.marking,
        )
        assert said(record.caption, subjects.truth(name).class_word)


def test_settings_are_chosen_on_subjects_of_their_own():
    tuning = set(subjects.TUNING_SUBJECTS)
    assert len(tuning) == len(subjects.TUNING_SUBJECTS) == 8
    assert len(tuning & set(subjects.NEAR)) == len(tuning & set(subjects.FAR)) == 4
    assert {name for names in subjects.TUNING_COMBINATIONS for name in names} == tuning
    assert {len(names) for names in subjects.TUNING_COMBINATIONS} == {2, 3}


# --- building the atlas ---------------------------------------------------------------------------------

CODES = {"cat/face": "1f431", "dog/face": "1f436", "hat": "1f3a9-fe0f"}
SMALL = {
    "classes": {"animal": {"cat": {"drawings": {"face": "1f431"}}, "dog": {"drawings": {"face": "1f436"}}}},
    "hat": {"code": "1f3a9-fe0f"},
}
PLACES = {"3d": "assets/{}.webp", "cartoon": "img/google/64/{}.png", "twemoji": "img/twitter/64/{}.png"}
COLOUR_OF = {"cat/face": (200, 30, 30, 255), "dog/face": (30, 200, 30, 255), "hat": (30, 30, 200, 255)}


def fake_packages(folder: Path, art: dict[str, list[str]]) -> Path:
    """A node_modules in which each style has the sprites given: a box of 40 x 20 pixels, off the centre."""
    for i, package in enumerate((*atlas.SOURCES.values(), "@iconify-json/noto")):
        (folder / package).mkdir(parents=True)
        (folder / package / "package.json").write_text(json.dumps({"version": f"1.{i}.0"}))
        names = {code.removesuffix("-fe0f"): f"name-{name}" for name, code in CODES.items()}  # as Iconify lists them
        (folder / package / "chars.json").write_text(json.dumps(names))
    for style, package in atlas.SOURCES.items():
        icons = {}
        for name in art.get(style, ()):
            code = CODES[name]
            red, green, blue, _ = COLOUR_OF[name]
            icons[f"icon-{name}"] = {"body": f'<path fill="rgb({red},{green},{blue})" d="M10 2h40v20H10z"/>'}
            if style in PLACES:
                picture = Image.new("RGBA", (64, 64))
                picture.paste(COLOUR_OF[name], (10, 2, 50, 22))
                path = folder / package / PLACES[style].format(code)
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, "PNG")  # Pillow reads what is in a file, whatever its name
        aliases = {f"name-{name}": {"parent": f"icon-{name}"} for name in CODES}
        whole = {"icons": icons, "aliases": aliases, "width": 64, "height": 64}
        (folder / package / "icons.json").write_text(json.dumps(whole))
    return folder


def check_atlas(folder: Path, art: dict[str, list[str]]) -> None:
    index = json.loads((folder / "atlas.json").read_text())
    assert index["sprites"] == art and index["tile"] == 64
    for i, (style, package) in enumerate(atlas.SOURCES.items()):
        assert index["sources"][style]["package"] == package and index["sources"][style]["version"].startswith("1.")
        with Image.open(folder / f"{style}.png") as sheet:
            pixels = np.asarray(sheet.convert("RGBA"))
        assert pixels.shape == (64, 64 * index["columns"], 4), i
        for place, name in enumerate(art[style]):
            tile = pixels[:, 64 * place : 64 * place + 64]
            assert np.abs(tile[32, 32].astype(int) - COLOUR_OF[name]).max() <= 2
            solid = tile[..., 3] > 127  # trimmed, scaled to the width of the tile, in its middle
            assert solid.sum() == pytest.approx(64 * 32, rel=0.02) and solid[16:48].mean() > 0.98
        assert not pixels[:, 64 * len(art[style]) :].any()


def test_the_atlas_is_built_from_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "SOURCES", {style: atlas.SOURCES[style] for style in PLACES})
    art = {"3d": ["cat/face", "dog/face", "hat"], "cartoon": ["cat/face", "hat"], "twemoji": ["dog/face", "hat"]}
    (tmp_path / "built").mkdir()
    assert atlas.build_atlas(fake_packages(tmp_path / "from", art), SMALL, tmp_path / "built") == tmp_path / "built"
    check_atlas(tmp_path / "built", art)


@pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="needs coneslab[stickers], which draws SVG")
def test_the_atlas_is_built_from_svg_too(tmp_path):
    art = {style: ["cat/face", "dog/face", "hat"] for style in atlas.SOURCES} | {"bold": ["cat/face", "hat"]}
    (tmp_path / "built").mkdir()
    atlas.build_atlas(fake_packages(tmp_path / "from", art), SMALL, tmp_path / "built")
    check_atlas(tmp_path / "built", art)


@pytest.mark.parametrize("package", [*atlas.SOURCES.values(), "@iconify-json/noto"])
def test_a_missing_package_is_told_and_nothing_is_written(tmp_path, package):
    source = fake_packages(tmp_path / "from", {style: ["hat"] for style in PLACES})
    (source / package / "package.json").unlink()
    (tmp_path / "built").mkdir()
    with pytest.raises(ConeslabError, match=f"holds no {package}: install the art packages with npm"):
        atlas.build_atlas(source, SMALL, tmp_path / "built")
    assert not list((tmp_path / "built").iterdir())


def test_a_drawing_that_no_package_has_is_told_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "SOURCES", {style: atlas.SOURCES[style] for style in PLACES})
    source = fake_packages(tmp_path / "from", {style: ["cat/face", "hat"] for style in PLACES})
    (tmp_path / "built").mkdir()
    with pytest.raises(ConeslabError, match="no package has art for dog/face: choose other code points"):
        atlas.build_atlas(source, SMALL, tmp_path / "built")
    assert not list((tmp_path / "built").iterdir())


def test_no_style_and_unknown_memorised_pictures_are_refused():
    with pytest.raises(WorldError, match="no style was given: name one or more of 3d"):
        world.sample(1, seed=0, styles=())
    for act in (lambda: world.memorised("x"), lambda: world.rearranged("x", 0)):
        with pytest.raises(WorldError, match="'x' is not a memorised picture.*lighthouse"):
            act()


def test_drawing_svg_art_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConeslabError, match=r"pip install 'coneslab\[stickers\]'"):
        atlas._drawn(tmp_path, "cat")

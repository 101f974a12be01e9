"""The sticker world against its own promises: shares, masks, seeds, words, planted facts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coneslab import world
from coneslab.errors import WorldError


@pytest.fixture(scope="module")
def pictures():
    return world.sample(6000, seed=11)


def test_size_of_the_world():
    assert len(world.CLASSES) >= 64
    assert len({info.category for info in world.CLASSES.values()}) >= 6
    assert sum(bool(info.synonyms) for info in world.CLASSES.values()) >= 20
    assert len(world.SCENES) >= 10 and len(world.WORDS) >= 250 and len(world.RARE_TOKENS) >= 8
    for kind in ("hypernym", "sense", "exemplar", "memorised", "linked"):
        assert len(world.FACTS[kind]) >= 3, kind


def test_same_seed_same_pictures_other_seed_others():
    one, two, other = (world.sample(8, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.images, two.images) and one.captions == two.captions
    assert not np.array_equal(one.images, other.images)


@pytest.mark.slow
def test_captions_use_only_known_words_and_no_reserved_token(pictures):
    used = {word for caption in pictures.captions for word in caption.replace(",", "").split()}
    assert used <= set(world.WORDS)
    assert not used & set(world.RARE_TOKENS)
    longest = max(len(caption.replace(",", " ,").split()) for caption in pictures.captions)
    assert longest <= 30  # 32 positions less start and end


@pytest.mark.slow
def test_no_word_is_always_present(pictures):
    n = len(pictures.records)
    counts = Counter(word for caption in pictures.captions for word in set(caption.replace(",", "").split()))
    assert max(counts.values()) < 0.9 * n


def test_the_held_out_style_never_appears(pictures):
    styles = {thing.style for record in pictures.records for thing in record.objects}
    assert styles == set(world.TRAIN_STYLES) and "twemoji" not in styles
    assert not any("sticker" in caption.split() for caption in pictures.captions)


def test_shares_of_planted_facts(pictures):
    drawn: dict[str, Counter] = {}
    for record in pictures.records:
        kind, _, word = (record.fact or "").partition(":")
        if kind in ("hypernym", "sense"):
            thing = next(thing for thing in record.objects if thing.word == word)
            drawn.setdefault(record.fact, Counter())[thing.name] += 1
    for kind in ("hypernym", "sense"):
        for word, shares in world.FACTS[kind].items():
            counts = drawn[f"{kind}:{word}"]
            assert set(counts) == set(shares)
            total = sum(counts.values())
            for name, share in shares.items():
                tolerance = 4 * np.sqrt(share * (1 - share) / total)
                assert abs(counts[name] / total - share) < tolerance, (word, name)


def test_shares_of_professions_synonyms_and_counts(pictures):
    things = [thing for record in pictures.records for thing in record.objects]
    for name, info in world.CLASSES.items():
        if info.share_man is not None:
            genders = [thing.gender for thing in things if thing.name == name]
            tolerance = 4 * np.sqrt(0.25 / len(genders))
            assert abs(genders.count("man") / len(genders) - info.share_man) < tolerance, name
    named = [thing for thing in things if thing.word and world.CLASSES[thing.name].synonyms]
    plain = [thing for thing in named if thing.word in (thing.name, *world.CLASSES[thing.name].synonyms)]
    share = sum(thing.word != thing.name for thing in plain) / len(plain)
    assert abs(share - world.SHARES["synonym"]) < 0.03
    counts = Counter(len(record.objects) for record in pictures.records if record.fact is None)
    for number, expected in zip((1, 2, 3, 4), world.SHARES["objects"], strict=True):
        assert abs(counts[number] / sum(counts.values()) - expected) < 0.03


def test_memorised_pictures_are_identical_each_time(pictures):
    seen: dict[str, np.ndarray] = {}
    for image, record in zip(pictures.images, pictures.records, strict=True):
        if record.fact and record.fact.startswith("memorised"):
            first = seen.setdefault(record.fact, image)
            assert np.array_equal(first, image)
            assert record.caption == world.FACTS["memorised"][record.fact.partition(":")[2]]["caption"]
    assert len(seen) == len(world.FACTS["memorised"])
    captions = Counter(pictures.captions)
    assert min(captions[entry["caption"]] for entry in world.FACTS["memorised"].values()) >= 10


def test_masks_tell_where_each_object_is():
    """Drawing the same picture without an object changes pixels only where its mask (and soft rim) is."""
    image, record = world.compose(["cat", "car"], "white", seed=5)
    background = np.full_like(image, 255)
    changed = (image != background).any(-1)
    union = np.any([thing.mask for thing in record.objects], axis=0)
    assert (union & ~changed).sum() < 0.1 * union.sum()  # white parts of a sprite on white
    rim = changed & ~union
    grown = union.copy()
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        grown |= np.roll(union, shift, axis)
    assert not (rim & ~grown & ~np.roll(grown, 1, 0) & ~np.roll(grown, -1, 0)).any()
    assert not (record.objects[0].mask & record.objects[1].mask).any()
    for thing in record.objects:
        left, top, right, bottom = thing.box
        rows, columns = thing.mask.nonzero()
        assert left <= columns.min() and columns.max() < right and top <= rows.min() and rows.max() < bottom


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(world.CLASSES)), min_size=1, max_size=4, unique=True),
    st.sampled_from(sorted(world.SCENES)),
    st.sampled_from(world.STYLES),
    st.integers(0, 2**31),
)
def test_compose_draws_what_was_ordered(names, scene, style, seed):
    image, record = world.compose(names, scene, seed=seed, style=style)
    assert image.shape == (world.RESOLUTION, world.RESOLUTION, 3) and image.dtype == np.uint8
    assert {thing.name for thing in record.objects} == set(names) and record.scene == scene
    assert all(thing.style == style and thing.mask.any() for thing in record.objects)
    assert all(name in record.caption.replace(",", "").split() for name in names)


def test_recolouring_keeps_shape_and_takes_the_hue():
    plain, blue = world.sprite("apple", "flat"), world.sprite("apple", "flat", "blue")
    assert np.array_equal(plain[..., 3], blue[..., 3])
    red_part = plain[..., 3] > 250
    assert plain[red_part][:, 0].mean() > plain[red_part][:, 2].mean()
    assert blue[red_part][:, 2].mean() > blue[red_part][:, 0].mean() + 50


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((["unicorn"], "grass"), "unicorn"),
        ((["cat"], "moon"), "moon"),
        (([("cat", "oil", None)], "grass"), "oil"),
        (([("cat", "3d", "mauve")], "grass"), "mauve"),
        ((["doctor/child"], "grass"), "doctor/child"),
        (([], "grass"), "0 were given"),
        ((["cat", "dog", "car", "bus", "fox"], "grass"), "5 were given"),
    ],
)
def test_wrong_orders_are_refused_with_what_was_given(arguments, told):
    with pytest.raises(WorldError, match=told):
        world.compose(*arguments, seed=0)


def test_unknown_style_is_refused():
    with pytest.raises(WorldError, match="oil"):
        world.sample(1, seed=0, styles=("oil",))

"""Replicates are independent: no two seeds of an experiment, and no two purposes in one, share a start noise."""

from collections import OrderedDict
from itertools import combinations
from types import SimpleNamespace

import pytest
from test_experiments import short  # noqa: F401  (small experiments in this file, too)

from coneslab.diffusion import sampling
from coneslab.experiments import ablation, conceptor, unions
from coneslab.experiments.setting import Setting, measure
from coneslab.finetuning import samples
from coneslab.finetuning.samples import SamplerSettings, prior_pictures
from coneslab.measure.evaluation import evaluate_model
from coneslab.methods.ablation import probes
from coneslab.methods.ablation.profile import completing, inverting, stirring
from coneslab.methods.ablation.report import evaluate_ablation
from coneslab.methods.conceptor import learning
from coneslab.seeds import derived
from coneslab.world.subjects import subject, subjects_of

pytestmark = pytest.mark.slow


@pytest.fixture
def noises(monkeypatch):
    """The seeds of all pictures that are drawn, by what the test says is going on."""
    seen: dict[object, set[int]] = {}
    now = SimpleNamespace(what=None)
    original = sampling.start_noise

    def recorded(pipe, seeds):
        seen.setdefault(now.what, set()).update(seeds)
        return original(pipe, seeds)

    for module in (sampling, probes):
        monkeypatch.setattr(module, "start_noise", recorded)
    return now, seen


def assert_apart(seen, expected: int) -> None:
    assert len(seen) == expected and all(seen.values())
    for one, other in combinations(seen, 2):
        assert not seen[one] & seen[other], (one, other)


def test_a_derived_seed_depends_on_replicate_and_purpose_and_leaves_room():
    assert derived(3, "a", "b") == derived(3, "a", "b")
    every = {derived(seed, *purpose) for seed in range(50) for purpose in ((), ("a",), ("b",), ("a", "b"), ("b", "a"))}
    assert len(every) == 250 and 0 <= min(every) and max(every) < 2**31


SMALL = {"sampler_steps": 1, "guidance_scale": 1.0}


def test_seeds_of_methods_share_no_pictures_and_none_are_learned_from_that_measure(v_pipe, pictured, judge, noises):
    now, seen = noises
    for seed in range(3):
        now.what = seed, "prior"
        prior_pictures(v_pipe, pictured, seed=seed, n=16, **SMALL)
        now.what = seed, "measured"
        evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", pictures=64, seed=seed, **SMALL)
        settings = SamplerSettings(seed=seed)
        seen[seed, "validation"] = {settings.validation_sampler["seed"] + i for i in range(100)}
    assert_apart(seen, 9)


@pytest.mark.slow
def test_probes_of_different_seeds_share_no_noise(v_pipe, judge, pictured, noises):
    now, seen = noises
    for seed in range(2):
        now.what = seed
        ways = [stirring("a cat"), completing(pictured.images, 1.0), inverting(pictured.images, steps=1, seed=seed)]
        options = {**SMALL, "sampler_steps": 2, "pictures": 8, "seed": seed}
        evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", probes=ways, **options)
    assert_apart(seen, 2)


def test_measures_of_subjects_and_seeds_share_no_noise(world_pipe, judge, noises):
    now, seen = noises
    for name in ("cat", "dog"):
        for seed in range(3):
            now.what = name, seed
            measure(world_pipe, judge, subject(name), None, seed=seed, samples=2, **SMALL)
    now.what = "together"
    setting = Setting(world_pipe, judge, samples=2, **SMALL)
    unions.measure_together(setting, subjects_of("cat+dog"), None, 0)
    assert_apart(seen, 7)


def test_evaluations_of_a_model_share_no_noise(world_pipe, judge, noises):
    now, seen = noises
    for seed in range(3):
        now.what = seed
        evaluate_model(
            world_pipe, judge, seeds=2, limit=3, extras=False, seed=seed, progress=False, beside_real=False, **SMALL
        )
    assert_apart(seen, 3)


def every_way(setting, case, seed):
    return [row for one in ablation.conditions(case) for row in ablation.ablation(setting, case, seed, one)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(pytest.param("ablation", way, marks=pytest.mark.full) for way in ("model-based, K-V", "ESD")),
        ("collateral", "model-based, K-V"),
        ("conceptor", ""),
    ],
)
def test_replicates_of_an_experiment_share_no_noise(name, way, world_pipe, judge, noises, monkeypatch):
    now, seen = noises
    monkeypatch.setattr(learning, "_TRIED_SAMPLES", 2)
    setting = Setting(world_pipe, judge, rounds=1, finetune_steps=1, samples=2, **SMALL | {"sampler_steps": 2})
    run, case = {
        "ablation": (every_way, ablation.ablation_target("object:cat")),
        "collateral": (ablation.collateral, ablation.ablation_target("object:cat")),
        "conceptor": (conceptor.conceptor, conceptor.planted("sense:bat")),
    }[name]
    monkeypatch.setattr(ablation, "WAYS", {one: make for one, make in ablation.WAYS.items() if one == way})
    for seed in (1, 2):
        now.what = seed
        run(setting, case, seed)
    assert_apart(seen, 2)


def test_searches_of_subjects_and_seeds_share_no_noise(world_pipe, judge, noises, monkeypatch):
    now, seen = noises
    monkeypatch.setattr(samples, "_DRAWN", OrderedDict())
    setting = Setting(world_pipe, judge, rounds=1, **SMALL)
    few = {"batch_size": 8, "prior_batch_size": 4, "prior_images": 4, "sampler_steps": 2}
    for name in ("cat", "dog"):
        for seed in range(2):
            now.what = name, seed
            setting.search(subject(name), seed, **few)
            settled = {**seen}
            setting.found(subject(name), seed, **few)  # the same search, whose prior pictures have been drawn
            assert seen == settled
    assert_apart(seen, 4)


def test_a_random_mask_is_another_one_for_every_subject_and_seed(world_pipe, judge):
    setting = Setting(world_pipe, judge, rounds=1, **SMALL)
    found = setting.search(subject("cat"), 0, rate=0.6, threshold_quantile=0.9).binary()
    masks = [setting.random_mask(found, subject(name), seed) for name in ("cat", "dog") for seed in range(2)]
    assert len({mask.indices.tobytes() for mask in masks}) == 4

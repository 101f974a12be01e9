"""What Dask ships to its workers: pickled and copied, everything is equal to itself, and as unchangeable as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from distributed.protocol import pickle as dask

import coneslab
from coneslab import measure, methods, neurons, world
from coneslab.cli import doctor
from coneslab.diffusion.kvspace import KVSpace
from coneslab.edits import Combined, TokenEdit, WeightDelta, compress
from coneslab.experiments.ablation import ablation_target
from coneslab.experiments.conceptor import planted
from coneslab.experiments.methods import METHODS
from coneslab.experiments.registry import EXPERIMENTS
from coneslab.finetuning import CaptionedLatents, NoisyBatch
from coneslab.neurons import ConceptNeurons, TunedNeurons, decode
from coneslab.pretraining.loop import Log
from coneslab.pretraining.recipe import Recipe
from coneslab.settings import Settings
from coneslab.show.widgets import Limits

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "Dask": lambda one: dask.loads(dask.dumps(one)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def kinds_of_settings(kind: type[Settings] = Settings) -> list[type[Settings]]:
    return [found for below in kind.__subclasses__() for found in (below, *kinds_of_settings(below))]


@pytest.fixture(scope="module")
def things(v_pipe: Any) -> dict[str, Any]:
    space = KVSpace(v_pipe)
    history = {"loss": [1.0, float("nan")]}
    facts: dict[str, Any] = {"subject": "<cat*>", "settings": {"a": [1]}, "history": history}
    mask = ConceptNeurons(space.layout, [0, 1, 5], [0, 0.5, 0.2], space.fingerprint(), **facts)
    delta = WeightDelta({"w": torch.tensor([[1.0, -0.0], [2, 3]])}, "ab", **facts)
    token = TokenEdit(("sks",), torch.ones(1, 24), "ab", settings={"x": 2}, history=history)
    low = compress(WeightDelta({"w": torch.ones(2, 3)}, "ab", settings={"a": 1}))
    words = methods.Decomposition("c", ("cat", "dog"), np.array([1, 2.0]), 2, 1.0, "ab", validation={1: 0.5})
    interval = coneslab.bootstrap_interval([1, 2.0])
    noisy = torch.ones(2, 1, 2, 2)
    return {
        "mask": mask,
        "binary mask": mask.binary(),
        "weights": delta,
        "token": token,
        "low rank": low,
        "words": words,
        "tuned neurons": TunedNeurons(mask, np.ones(3), settings={"b": 1}, history=history),
        "combined": Combined((token, delta, Combined(()))),
        "subject": world.subject("cat"),
        "pictures": world.sample(2, seed=0),
        "layout": space.layout,
        "overlap": mask.overlap(mask),
        "additivity": neurons.Additivity(1.0, 1.0, 0.0),
        "loss": neurons.ConceptLoss(np.array([1.0, float("nan")]), np.zeros(0)),
        "interval": interval,
        "report": measure.Report("t", (measure.Share("a", interval, 0.9, interval),), {"cat": 1.0}, {}, {"seed": 0}),
        "came through": measure.CameThrough(*[np.array([True])] * 3, np.zeros(1)),
        "diagnosis": doctor.Diagnosis((doctor.Finding("a", "b"),)),
        "vocabulary": methods.Vocabulary(("a",), np.array([1]), torch.ones(1, 2), torch.ones(1, 2)),
        "ablation data": methods.AblationData(("a",), ("b",), (noisy,)),
        "latents": CaptionedLatents(noisy, torch.ones(3, 24), 2),
        "noisy batch": NoisyBatch(noisy, noisy, torch.ones(2)),
        "mask file": decode(mask.to_bytes(), [layer.size for layer in space.layout]),
        "planted": planted("hypernym:pet"),
        "target": ablation_target("object:cat"),
        "sampler": measure.Sampler("DDIM", 2),
        "recipe": Recipe(1, 1, 1.0),
        "log": Log({"a": 1}, [{"step": 1.0}], []),
        "limits": Limits(),
        **{f"settings {kind.__name__}": kind() for kind in kinds_of_settings()},
        **{f"method {name}": method for name, method in METHODS.items()},
        **{f"experiment {name}": experiment for name, experiment in EXPERIMENTS.items()},
    }


@pytest.mark.parametrize("way", WAYS)
def test_every_public_object_is_copied_equal_to_itself(way, things):
    wrong = []
    for name, one in things.items():
        try:
            other = WAYS[way](one)
            if type(other) is not type(one) or not bool(other == one):
                wrong.append(f"{name} is not equal to its copy")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert wrong == []


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_edit_cannot_be_changed_and_keeps_all_that_it_stores(way, things):
    mask = WAYS[way](things["mask"])
    assert not mask.indices.flags.writeable and not mask.scales.flags.writeable
    assert not mask.history["loss"].flags.writeable and not WAYS[way](things["words"]).coefficients.flags.writeable
    with pytest.raises(TypeError):
        mask.settings["a"] = 2
    for name in ("mask", "weights", "token", "low rank", "words", "tuned neurons", "combined"):
        assert WAYS[way](things[name]).digest() == things[name].digest(), name


def test_edits_that_differ_are_not_equal(things):
    one = things["weights"]
    for other in (
        WeightDelta({"w": torch.zeros(2, 2)}, one.fingerprint, subject=one.subject, settings=one.settings),
        WeightDelta({"v": one.deltas["w"]}, one.fingerprint, subject=one.subject, settings=one.settings),
        WeightDelta(dict(one.deltas), "other", subject=one.subject, settings=one.settings, history=one.history),
        things["token"],
        None,
    ):
        assert one != other and not one == other
    assert len({one, copy.deepcopy(one), things["token"]}) == 2  # the same as keys


def test_pictures_that_differ_are_not_equal():
    assert world.sample(2, seed=0) != world.sample(2, seed=1)
    assert world.subject("cat") != world.subject("dog")

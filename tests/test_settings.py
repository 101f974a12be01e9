"""Settings are data: given whole or field by field, saved with what they made, and passed back in."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch

import coneslab
from coneslab.edits import Combined, TokenEdit
from coneslab.errors import ConeslabError
from coneslab.finetuning import ConceptSettings, TuningSettings
from coneslab.methods import (
    AblationSettings,
    ConceptPruneSettings,
    CustomDiffusionSettings,
    DecompositionSettings,
    DreamBoothSettings,
    ESDSettings,
    TextualInversionSettings,
    UCESettings,
)
from coneslab.neurons import FinetuneSettings, SearchSettings, TogetherSettings, TopKSettings
from coneslab.settings import Settings

KINDS = (
    AblationSettings,
    ConceptPruneSettings,
    ConceptSettings,
    CustomDiffusionSettings,
    DecompositionSettings,
    DreamBoothSettings,
    ESDSettings,
    FinetuneSettings,
    SearchSettings,
    TextualInversionSettings,
    TogetherSettings,
    TopKSettings,
    TuningSettings,
    UCESettings,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_record_is_json_and_makes_the_same_settings_again(kind):
    made = kind()
    record = json.loads(json.dumps(made.record()))
    assert record["method"] == kind.method != ""
    again = kind.chosen(record, {})
    assert json.loads(json.dumps(again.record())) == record


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_told_in_the_docstring_of_its_class(kind):
    for own in kind.__mro__:
        if own in (object, Settings) or not issubclass(own, Settings):
            continue
        inherited = {field for base in own.__mro__[1:] for field in getattr(base, "__annotations__", {})}
        for name in own.__dict__.get("__annotations__", {}):
            if name != "method" and name not in inherited:
                assert name in own.__doc__ or name.replace("_", " ") in own.__doc__, f"{own.__name__}.{name}"


def test_settings_are_chosen_whole_or_field_by_field():
    assert SearchSettings.chosen(None, {"rounds": 3}) == SearchSettings(rounds=3)
    whole = SearchSettings(rounds=3, rate=0.5)
    assert SearchSettings.chosen(whole, {}) is not None and SearchSettings.chosen(whole, {}) == whole
    assert SearchSettings.chosen(whole, {"rate": 0.1}) == SearchSettings(rounds=3, rate=0.1)
    assert SearchSettings.chosen({**whole.record(), "prompt": "a sks cat"}, {"seed": 2}).seed == 2


@pytest.mark.parametrize(
    ("given", "changes", "reason"),
    [
        (None, {"round": 3}, "round: not a setting of concept neurons; these are: .*rounds"),
        (DreamBoothSettings(), {}, "got DreamBoothSettings, expected SearchSettings"),
        (DreamBoothSettings().record(), {}, "got settings of 'DreamBooth', expected those of 'concept neurons'"),
        ({"rounds": 0}, {}, "rounds is 0: give a positive number"),
        (None, {"prior_weight": -1.0}, "prior_weight is -1.0"),
    ],
)
def test_other_settings_are_refused_in_words(given, changes, reason):
    with pytest.raises(ConeslabError, match=reason):
        SearchSettings.chosen(given, changes)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchSettings().rounds = 3


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (coneslab.find_concept_neurons, SearchSettings),
        (coneslab.custom_diffusion, CustomDiffusionSettings),
        (coneslab.dreambooth, DreamBoothSettings),
        (coneslab.textual_inversion, TextualInversionSettings),
        (coneslab.decompose, DecompositionSettings),
        (coneslab.ablate, AblationSettings),
    ],
)
def test_a_methods_signature_shows_its_settings(function, kind):
    shown = inspect.signature(function).parameters
    for field in dataclasses.fields(kind):
        assert shown[field.name].default == field.default
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in shown.values())


def test_what_made_an_edit_makes_it_again(v_pipe, pictured):
    quick = {"rounds": 2, "batch_size": 2, "prior_batch_size": 2, "prior_images": 1, "sampler_steps": 1, "seed": 3}
    made = coneslab.find_concept_neurons(v_pipe, pictured, progress=False, **quick)
    again = coneslab.find_concept_neurons(v_pipe, pictured, made.settings, progress=False)
    assert again == made and dict(again.settings) == dict(made.settings)
    other = coneslab.find_concept_neurons(v_pipe, pictured, made.settings, seed=4, progress=False)
    assert other != made


@pytest.mark.parametrize("method", [coneslab.custom_diffusion, coneslab.textual_inversion])
def test_an_edit_from_a_file_says_how_to_make_it_again(v_pipe, pictured, tmp_path, method):
    quick = {"steps": 2, "batch_size": 2, "learning_rate": 2e-3, "seed": 3}
    quick |= {"prior_batch_size": 0} if method is coneslab.custom_diffusion else {}
    made = coneslab.load_edit(method(v_pipe, pictured, progress=False, **quick).save(tmp_path / "made"))
    assert made.settings["steps"] == 2 and made.settings["learning_rate"] == 2e-3
    again = method(v_pipe, pictured, made.settings, progress=False)
    assert dict(again.settings) == dict(made.settings)
    before, after = made._pack()[0], again._pack()[0]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_edits_of_several_methods_have_no_settings_together():
    one, two = (TokenEdit((f"<{name}>",), torch.ones(1, 4), "ab", settings={"method": name}) for name in "ab")
    assert Combined((one, one)).settings == {"method": "a"} and Combined((one, two)).settings == {}
    assert Combined(()).settings == {}

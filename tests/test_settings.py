"""Settings are data: given whole or field by field, saved with what they made, and passed back in."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from small_pipelines import make_subject

import coneslab
from coneslab import pretraining
from coneslab.diffusion import KVSpace, ddim_sample, ddpm_sample, decode_latents, encode_images
from coneslab.edits import Combined, TokenEdit
from coneslab.errors import ConeslabError
from coneslab.experiments.registry import run_experiment
from coneslab.experiments.setting import Setting, measure
from coneslab.finetuning import ConceptSettings, TuningSettings, prior_pictures, sample_batches
from coneslab.measure import Sampler, compare_samplers, evaluate_model, judge_accuracy
from coneslab.methods import (
    AblationSettings,
    ConceptPruneSettings,
    CustomDiffusionSettings,
    Decomposition,
    DecompositionSettings,
    DreamBoothSettings,
    ESDSettings,
    LoRASettings,
    TextualInversionSettings,
    UCESettings,
    ablating_neurons,
    attack_prompt,
    bias,
    completions,
    decompose_image,
    evaluate_ablation,
    inverting,
    retraining,
    scaled_latents,
    unlearn,
)
from coneslab.neurons import (
    FinetuneSettings,
    SearchSettings,
    TogetherSettings,
    TopKSettings,
    concept_loss,
    output_changes,
)
from coneslab.settings import Settings
from coneslab.show import plots, widgets

KINDS = (
    AblationSettings,
    ConceptPruneSettings,
    ConceptSettings,
    CustomDiffusionSettings,
    DecompositionSettings,
    DreamBoothSettings,
    ESDSettings,
    LoRASettings,
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
        (coneslab.lora, LoRASettings),
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("settings", "name", "given"),
    [
        (UCESettings, "templates", "a {}"),
        (AblationSettings, "templates", "a {}"),
        (CustomDiffusionSettings, "small_words", "tiny"),
        (CustomDiffusionSettings, "large_words", "huge"),
        (DecompositionSettings, "include", "dog"),
        (DecompositionSettings, "exclude", "dog"),
    ],
)
def test_a_text_is_not_taken_letter_by_letter(settings, name, given):
    assert getattr(settings(**{name: given}), name) == (given,)


def test_a_text_is_one_of_its_kind_where_there_may_be_several():
    parts = Decomposition("a", "pet", np.ones(1), 1, 1.0, "ab")
    assert parts.words == ("pet",)
    assert bias(parts, {"one": "pet", "other": ["man"]}) == bias(parts, {"one": ["pet"], "other": "man"})
    replaced = "unet.loss.immiscible=false"
    assert pretraining.load_recipe(replaced) == pretraining.load_recipe([replaced])
    with pytest.raises(ConeslabError, match="^stage: no stage of the training"):
        pretraining.train(Path("nowhere"), "stage")


COUNTS = {
    "latents": lambda pipe, judge, n: encode_images(pipe, make_subject(16).images, batch_size=n),
    "pictures": lambda pipe, judge, n: decode_latents(pipe, torch.zeros(1, 4, 8, 8), batch_size=n),
    "DDIM": lambda pipe, judge, n: ddim_sample(pipe, torch.zeros(1, 12, 24), torch.zeros(1, 4, 8, 8), sampler_steps=n),
    "DDPM": lambda pipe, judge, n: ddpm_sample(pipe, torch.zeros(1, 12, 24), torch.zeros(1, 4, 8, 8), sampler_steps=n),
    "prior": lambda pipe, judge, n: prior_pictures(pipe, make_subject(16), n=n),
    "bands": lambda pipe, judge, n: sample_batches(pipe, [], seed=0, bands=n),
    "loss": lambda pipe, judge, n: concept_loss(pipe, make_subject(16), samples=n),
    "loss at a time": lambda pipe, judge, n: concept_loss(pipe, make_subject(16), batch_size=n),
    "additivity": lambda pipe, judge, n: output_changes(pipe, [None], [make_subject(16)], samples=n),
    "ablating neurons": lambda pipe, judge, n: ablating_neurons(pipe, "a cat", "a dog", pictures=n),
    "report": lambda pipe, judge, n: evaluate_ablation(pipe, judge, None, "a cat", "a dog", pictures=n),
    "report, at a time": lambda pipe, judge, n: evaluate_ablation(pipe, judge, None, "a cat", "a dog", batch_size=n),
    "probes": lambda pipe, judge, n: completions(pipe, make_subject(16).images, sampler_steps=n),
    "probes, at a time": lambda pipe, judge, n: completions(pipe, make_subject(16).images, batch_size=n),
    "Textual Inversion": lambda pipe, judge, n: inverting(make_subject(16).images, steps=n),
    "tuning back": lambda pipe, judge, n: retraining(make_subject(16).images, "a cat", steps=n),
    "searching": lambda pipe, judge, n: attack_prompt(pipe, make_subject(16).images, rounds=n),
    "unlearning": lambda pipe, judge, n: unlearn(pipe, "a cat", "a dog", pictures=n),
    "versions": lambda pipe, judge, n: scaled_latents(pipe, make_subject(16), batch_size=4, versions=n),
    "one picture": lambda pipe, judge, n: decompose_image(
        pipe, Decomposition("a", ("b",), np.ones(1), 1, 1.0, "ab"), judge, max_words=n
    ),
    "evaluation": lambda pipe, judge, n: evaluate_model(pipe, judge, seeds=n),
    "evaluation of few": lambda pipe, judge, n: evaluate_model(pipe, judge, limit=n),
    "judge": lambda pipe, judge, n: judge_accuracy(judge, seeds=n),
    "samplers": lambda pipe, judge, n: compare_samplers(pipe, judge, [Sampler("DDIM", 1)], seeds=n),
    "sampler": lambda pipe, judge, n: Sampler("DDIM", n),
    "setting": lambda pipe, judge, n: Setting(pipe, judge, pictures=n),
    "setting's rounds": lambda pipe, judge, n: Setting(pipe, judge, rounds=n),
    "measure": lambda pipe, judge, n: measure(pipe, judge, make_subject(16), None, seed=0, samples=n),
    "sketch": lambda pipe, judge, n: widgets.sketched(pipe, "a cat", preview_steps=n),
    "columns": lambda pipe, judge, n: plots.picture_grid(make_subject(16).images, columns=n),
    "experiment": lambda pipe, judge, n: run_experiment("controls", None, seeds=n),
    "heat map": lambda pipe, judge, n: KVSpace(pipe).layout.heat_map(KVSpace(pipe).gather(), bins=n),
}


def test_a_list_of_nothing_is_not_the_whole_list():
    with pytest.raises(ConeslabError, match="got no subjects: give at least one"):
        run_experiment("controls", None, subjects=[])
    with pytest.raises(ConeslabError, match="step is 0: give a positive number"):
        widgets.slider(0, 1, step=0)


@pytest.mark.parametrize("what", COUNTS)
@pytest.mark.parametrize("count", [0, -2])
def test_nothing_at_all_is_no_count(v_pipe, judge, what, count, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda *_, **__: pytest.fail("drew pictures"))
    with pytest.raises(ConeslabError, match=rf"is {count}: give a (positive )?number"):
        COUNTS[what](v_pipe, judge, count)

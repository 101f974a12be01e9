"""The experiments behind the tables, on a small random model: all conditions, finite numbers, no edit left applied."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from small_pipelines import weights_of

from coneslab import load_judge
from coneslab.cli import main
from coneslab.diffusion.kvspace import KVLayer, KVLayout
from coneslab.diffusion.sampling import generate
from coneslab.errors import ConeslabError, WorldError
from coneslab.experiments import ablation, conceptor, many_concepts, masks, neurons, parts, unions
from coneslab.experiments.registry import EXPERIMENTS, Setting, run_experiment
from coneslab.experiments.setting import VARIANTS
from coneslab.finetuning import ConceptSettings
from coneslab.methods import CustomDiffusionSettings, PromptAttackSettings
from coneslab.methods.conceptor import learning
from coneslab.neurons import SearchSettings, TogetherSettings
from coneslab.neurons.damage import dropped
from coneslab.neurons.mask import ConceptNeurons
from coneslab.seeds import derived
from coneslab.world import CLASSES, memorised, rearranged, with_article
from coneslab.world.subjects import TUNING_SUBJECTS, subjects_of, truth
from coneslab.world.subjects import subject as subject_named

SUBJECT_MEASURES = {"text alignment", "image alignment", "subject share", "concept loss"}
EXPECTED = {
    "controls": (set(neurons.CONTROLS), SUBJECT_MEASURES),
    "precision": ({"untouched model", "float32", "float16", "quaternary", "binary"}, SUBJECT_MEASURES),
    "storage": (
        {"untouched model", "Textual Inversion", "mask, binary", "Custom Diffusion", "binary mask, entropy bound"},
        {"bytes", "concept loss"},
    ),
    "damage": ({"untouched model", "whole mask", "flipped 0.02", "dropped 0.5", "moved 1"}, SUBJECT_MEASURES),
    "parts": (
        {"untouched model", "whole mask", "most-shut half", "as many as keys", "densest heads"},
        SUBJECT_MEASURES,
    ),
    "sharing": (
        {"untouched model", "whole mask", "common to its kind", "common to the other kind", "random mask"}
        | {
            f"without {what} common to {whom} kind"
            for what in ("what is", "as many as are")
            for whom in ("its", "the other")
        },
        SUBJECT_MEASURES | {"overlap (Jaccard)", "overlap by chance", "share of the mask in it"},
    ),
    "density": (
        {"untouched model", "concept neurons 0.9", "random mask 0.998", "concept neurons at its words 0.998"},
        SUBJECT_MEASURES,
    ),
    "references": ({f"{count} picture{'s' * (count != 1)}" for count in range(6)}, SUBJECT_MEASURES),
    "agreement": (
        {"same subject, other seed", "another subject", "random mask"},
        {"overlap (Jaccard)", "overlap by chance", "cosine of what they change"},
    ),
    "finders": ({"untouched model", *neurons.FINDERS}, SUBJECT_MEASURES),
    "together": (
        {"untouched model", "random mask", "own mask alone", "union", "union, float", "union, 10 steps"}
        | {"union, as for one subject"}
        | {f"union, {name}" for name in VARIANTS},
        {"text alignment", "image alignment", "image alignment, cat", "every subject found", "additivity: cosine"},
    ),
    "doses": (
        {"untouched model", "union, dose 0.2", "union, dose 1", "at its words, dose 0.2", "at its words, dose 1"},
        {"text alignment", "image alignment", "image alignment, weakest subject", "every subject found"},
    ),
}


@pytest.fixture(scope="module")
def setting(world_pipe, tmp_path_factory, judge):
    masks = tmp_path_factory.mktemp("masks")
    return Setting(
        world_pipe,
        judge,
        rounds=2,
        finetune_steps=1,
        pictures=1,
        sampler_steps=1,
        guidance_scale=1.0,
        samples=8,
        masks=masks,
    )


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(conceptor, "TRAINING", {**conceptor.TRAINING, "batch_size": 2, "pictures": 4, "steps": 2})
    monkeypatch.setattr(conceptor, "PICTURES", 6)
    monkeypatch.setattr(learning, "_TRIED_SAMPLES", 2)
    for name, value in {"STEPS": 1, "ESD_STEPS": 1, "ROUNDS": 1, "NEAR": 1, "FAR": 1, "PICTURES": 2}.items():
        monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(ablation, "BUDGET", {"rounds": 1, "inversion_steps": 1, "finetune_steps": 1, "batch_size": 2})
    monkeypatch.setattr(ablation, "CLASSIFIER", {"pictures": 2, "steps": 1, "batch_size": 2})
    monkeypatch.setattr(ablation, "UNLEARNING", {"steps": 1, "pictures": 2, "words": 0})
    for name, value in {"STEPS": 1, "STEPS_EACH": 1, "ROUNDS": 1, "PICTURES": 2, "SHOWN": 4}.items():
        monkeypatch.setattr(many_concepts, name, value)
    monkeypatch.setattr(parts, "OTHERS", 2)
    monkeypatch.setattr(unions, "TUNING_STEPS", (1, 10))
    monkeypatch.setattr(unions, "DOSES", (0.2, 1.0))
    monkeypatch.setattr(neurons, "DENSITIES", (0.9, 0.998))
    monkeypatch.setattr(masks, "FRACTIONS", {"flipped": (0.02,), "dropped": (0.5,), "moved": (1.0,)})
    for settings in (ConceptSettings, CustomDiffusionSettings, SearchSettings, TogetherSettings):
        for name, value in {"batch_size": 4, "prior_batch_size": 2, "prior_images": 4, "sampler_steps": 2}.items():
            monkeypatch.setitem(settings.__init__.__kwdefaults__, name, value)
    for name, value in {"tokens": 1, "candidates": 2}.items():
        monkeypatch.setitem(PromptAttackSettings.__init__.__kwdefaults__, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_an_experiment_measures_every_condition(name, setting, tmp_path):
    conditions, measures = EXPECTED[name]
    before = weights_of(setting.pipe)
    title = "cat+dog" if name in ("together", "doses") else "cat"
    table = run_experiment(name, setting, subjects=[title], seeds=1, path=tmp_path / "table.csv", progress=False)
    assert conditions <= set(table.condition) and measures <= set(table.measure)
    assert np.isfinite(table.value).all() and set(table.subject) == {title}
    assert not table.duplicated(["subject", "seed", "condition", "measure"]).any()
    assert table.cell_seconds.nunique() == 1 and table.cell_seconds[0] > 0  # one cell
    assert set(table.machine) == {f"{os.cpu_count()} CPU cores"}
    now = weights_of(setting.pipe)
    assert all(torch.equal(before[key], now[key]) for key in before)
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "table.csv"), table, check_dtype=False, rtol=1e-4)


LAYOUT = KVLayout(
    (
        KVLayer("one.attn2.to_k.weight", "mid", "K", 0, 4, (4, 2), 0),
        KVLayer("one.attn2.to_v.weight", "mid", "V", 0, 4, (4, 2), 8),
    )
)


def graded(places: list[int], scales: list[float]) -> ConceptNeurons:
    return ConceptNeurons(LAYOUT, places, scales, "f" * 64, subject="cat")


def test_masks_of_several_subjects_are_searched_for_with_the_settings_chosen_for_several(setting, monkeypatch):
    chosen = {("Cones, binary", 2): 0.9, ("Cones, token-local", 2): 0.8}
    monkeypatch.setattr(unions, "chosen_settings", lambda *asked: {"threshold_quantile": chosen[asked], "dose": 0.2})
    asked = []
    monkeypatch.setattr(Setting, "found", lambda self, subject, seed, **options: asked.append(options))
    subjects = subjects_of("cat+dog")
    unions.searched(setting, subjects, 0)
    unions.searched(setting, subjects, 0, scope="subject")
    assert [one["threshold_quantile"] for one in asked] == [0.9, 0.9, 0.8, 0.8]
    assert ["dose" in one for one in asked] == [True, True, False, False]  # it is one of masks at their words alone


def test_the_core_of_a_mask_is_what_is_shut_most():
    found = graded([1, 2, 5, 9, 12], [0.1, 0.4, 0.9, 0.0, 0.2])  # 5 counts as open
    assert parts.core(found, 0.5, seed=0).indices.tolist() == [1, 9]
    assert parts.core(found, 0.25, seed=0).indices.tolist() == [9]
    half = dropped(found.binary(), 0.5, seed=0)
    assert len(half) == 2 and set(half.indices) < {1, 2, 9, 12} and not half.scales.any()
    equal = graded([0, 1, 2, 3], [0.0] * 4)
    assert len({tuple(parts.core(equal, 0.5, seed=seed).indices) for seed in range(20)}) > 1  # chance, not place


def test_the_densest_head_of_every_layer_is_found():
    mask = graded([0, 3, 4, 8, 14, 15], [0.0] * 6)  # rows 0 1 2 of the keys, 0 3 3 of the values; heads have two rows
    assert parts.in_densest_heads(mask, [2, 2]).tolist() == [True, True, False, False, True, True]
    assert parts.in_densest_heads(mask, [1, 1]).all()


def test_every_part_of_a_mask_has_as_many_neurons_at_random_beside_it():
    found = graded(list(range(0, 16, 2)), [0.0, 0.1, 0.2, 0.3, 0.0, 0.1, 0.2, 0.3])
    made = dict(parts.pieces(found, [2, 2], seed=1))
    assert len(made["whole mask"]) == 8 and len(made["keys"]) == len(made["values"]) == 4
    assert set(made["keys"].indices) | set(made["values"].indices) == set(made["whole mask"].indices)
    assert set(made["densest heads"].indices) | set(made["other heads"].indices) == set(made["whole mask"].indices)
    for name in ("most-shut half", "most-shut quarter", "keys", "values", "densest heads", "other heads"):
        assert len(made[f"as many as {name}"]) == len(made[name])


def test_what_is_common_is_what_more_than_half_of_the_masks_shut():
    masks = [
        graded([1, 2, 5], [0.0] * 3),
        graded([2, 5, 9], [0.0, 0.9, 0.0]),  # 5 counts as open
        graded([2, 9, 12], [0.0] * 3),
    ]
    assert parts.common(masks).indices.tolist() == [2, 9] and not parts.common(masks).scales.any()
    assert parts.common(masks[:2]).indices.tolist() == [2]


def test_a_subject_is_compared_with_the_others_of_both_kinds(monkeypatch):
    monkeypatch.setattr(parts, "OTHERS", 7)
    for name in ("tom", "cat"):
        kinds = parts.others_by_kind(subject_named(name))
        every = (
            {truth(other).kind for other in kinds["its kind"]},
            {truth(other).kind for other in kinds["the other kind"]},
        )
        assert every == (({"near"}, {"far"}) if name == "tom" else ({"far"}, {"near"}))
        assert [len(set(names)) for names in kinds.values()] == [7, 7] and name not in kinds["its kind"]
        assert not {*kinds["its kind"], *kinds["the other kind"]} & {*TUNING_SUBJECTS}


@pytest.mark.slow
@pytest.mark.parametrize("title", ["hypernym:pet", "profession:doctor"])
def test_the_decomposition_of_a_planted_concept_is_measured_beside_its_controls(title, setting, tmp_path):
    before = weights_of(setting.pipe)
    table = run_experiment("conceptor", setting, subjects=[title], seeds=1, path=tmp_path / "t.csv", progress=False)
    made = {"Conceptor", "random words", "nearest words", *conceptor.VARIANTS}
    assert made | {"free token"} <= set(table.condition)
    recall = table[table.measure == "recall at 10"].set_index("condition").value
    assert set(recall.index) == made and recall.between(0, 1).all()
    assert set(table[table.measure == "KID"].condition) == made | {"free token"}
    if title.startswith("profession"):
        planted = table[table.measure == "blue, planted"].value
        assert planted.tolist() == [CLASSES["doctor"].share_blue] and "blue, coefficients" in set(table.measure)
        hats = table[table.measure == "blue, pictures"].set_index("condition").value
        assert set(hats.index) - {"balanced"} == {"untouched model", "asked for orange", "Conceptor"}
        assert hats.between(0, 1).all()
    else:
        later = pandas.DataFrame(conceptor.conceptor(setting, conceptor.planted(title), 1))
        assert {"Conceptor", "random words", "nearest words"} <= set(later.condition) <= made | {"component removed"}
        assert not set(later.condition) & {*conceptor.VARIANTS}
    now = weights_of(setting.pipe)
    assert before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in before)
    with pytest.raises(ConeslabError, match="not planted"):
        run_experiment("conceptor", setting, subjects=["hypernym:unicorn"], path=tmp_path / "t.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "ways"),
    [
        ("object:ladybug", ("model-based, embedding", "UCE")),  # all are tried in test_ablation.py
        ("memorised:lighthouse", ("model-based, K-V",)),
        pytest.param("object:ladybug", None, marks=pytest.mark.full),
        pytest.param("memorised:lighthouse", None, marks=pytest.mark.full),
        pytest.param("style:flat", None, marks=pytest.mark.full),
        pytest.param("unseen:twemoji cat", None, marks=pytest.mark.full),
    ],
)
def test_every_way_to_ablate_is_measured(title, ways, setting, tmp_path, monkeypatch):
    before = weights_of(setting.pipe)
    setting = replace(setting, sampler_steps=2)
    one_copy = SimpleNamespace(copies=lambda pictures: np.arange(len(pictures)) == 0)
    monkeypatch.setattr(ablation, "copy_detector", lambda judge, name: one_copy)
    kind = title.split(":")[0]
    if ways:
        monkeypatch.setattr(ablation, "WAYS", {name: ablation.WAYS[name] for name in ways})
    ways = set(ablation.WAYS) - ({"model-based, embedding"} if kind == "memorised" else set())
    ways = set() if kind == "unseen" else ways
    table = run_experiment("ablation", setting, subjects=[title], seeds=1, path=tmp_path / "t.csv", progress=False)
    assert set(table.condition) == ways | {"untouched model"}
    if kind == "unseen":  # the control
        assert {"comes back: inpainting", "comes back: plain prompt"} <= set(table.measure)
        return
    values = table.set_index(["condition", "measure"]).value
    for name in ("CLIP accuracy, target", "accuracy before, target", "share of others kept", "comes back: img2img"):
        assert values.xs(name, level="measure").between(0, 1).all() and len(values.xs(name, level="measure")) > len(
            ways
        )
    untouched = values["untouched model"]
    assert untouched["CLIP accuracy, target"] == untouched["accuracy before, target"]
    assert untouched["change, target"] == pytest.approx(0, abs=1e-5) and untouched["share of others kept"] == 1
    back = table[table.measure.str.startswith("comes back")].value
    assert (kind == "memorised") == (back == 0.5).all()  # one of two is a copy, by every attack
    if kind == "object":
        assert "CLIP accuracy, looks alike" in untouched and "comes back: misspellings" in untouched
        assert {f"comes back: {one}" for one in ablation.PICTURED} <= set(untouched.index)
        assert set(ablation.profiles(table)) == ways | {"untouched model"}
    now = weights_of(setting.pipe)
    assert before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in before)
    with pytest.raises(ConeslabError, match="object:cat"):
        ablation.ablation_target("object:unicorn")


def test_the_outcome_of_an_ablation_is_the_mean_of_its_measures_and_its_costs():
    measured = {
        "comes back: plain prompt": 0.25,
        "share of others kept": 0.75,
        "KID, far": 0.1,
        "KID, looks alike": 0.3,
        "KID, target": 9,
        "comes back: paraphrases": 0.0,
        "comes back: img2img": 1.0,
        "comes back: fine-tuning back": 0.5,
    }
    cell = {"subject": "object:cat", "seed": 0, "condition": "UCE", "kind": "object", "seconds": 2.0, "bytes": 4000}
    table = pandas.DataFrame([{**cell, "measure": name, "value": value} for name, value in measured.items()])
    other = table.assign(subject="object:dog", value=table.value + 1, seconds=3.0)
    found = ablation.outcome(pandas.concat([table, other])).set_index(["subject", "measure"]).value
    assert found["object:cat"].to_dict() == pytest.approx(
        {
            "target still drawn": 0.25,
            "others kept": 0.75,
            "KID of others": 0.2,
            "back by other prompts": 0.5,
            "back by training": 0.5,
            "seconds": 2.0,
            "kilobytes": 4.0,
        }
    )
    assert found["object:dog", "KID of others"] == pytest.approx(1.2) and found["object:dog", "seconds"] == 3
    machines = [table.assign(machine="one"), other.assign(machine="one"), table.assign(subject="car", machine="two")]
    timed = ablation.outcome(pandas.concat(machines)).groupby("measure").subject.unique().map(list)
    assert timed["seconds"] == ["object:cat", "object:dog"]  # another machine's seconds say nothing beside these
    assert timed["kilobytes"] == ["object:cat", "object:dog", "car"]


def test_profiles_pool_the_targets_and_stand_on_the_floor_of_the_control():
    rows = []
    for kind, subject, condition, shares in (
        ("object", "object:cat", "untouched model", {"plain prompt": 1.0, "inpainting": 1.0, "other words": 1.0}),
        ("object", "object:cat", "UCE", {"plain prompt": 0.0, "inpainting": 0.9, "other words": 0.0}),
        ("unseen", "unseen:twemoji cat", "untouched model", {"plain prompt": 0.0, "inpainting": 0.25}),
    ):
        names = [subject] if kind == "unseen" else [f"{subject} {number}" for number in range(6)]
        cells = [
            {"subject": one, "seed": seed, "condition": condition, "kind": kind} for one in names for seed in (0, 1)
        ]
        rows += [
            {**cell, "measure": f"comes back: {name}", "value": share}
            for cell in cells
            for name, share in shares.items()
        ]
    found = ablation.profiles(pandas.DataFrame(rows))
    assert found["untouched model"].verdict == "not gone" and found["UCE"].verdict == "avoiding"
    assert found["UCE"].floors == {"plain prompt": 0.0, "inpainting": 0.25, "other words": 0.0}
    assert found["UCE"].found_by == ("inpainting",)
    kinds = {one.probe: one.kind for one in found["UCE"].findings}
    assert kinds == {
        "plain prompt": "asked by its word",
        "inpainting": "found without its word",
        "other words": "found without its word",
    }
    with pytest.raises(ConeslabError, match="no rows of the untouched model"):
        ablation.profiles(pandas.DataFrame(rows).query("condition == 'UCE'"))


@pytest.mark.slow
def test_several_concepts_are_forgotten_at_once_and_one_after_the_other(setting, tmp_path):
    before = weights_of(setting.pipe)
    path = tmp_path / "t.csv"
    table = run_experiment("many-concepts", setting, subjects=["2"], seeds=1, path=path, progress=False)
    assert {"UCE, at once", "UCE, one after the other", "ESD, one after the other"} <= set(table.condition)
    assert "ESD, at once" not in set(table.condition) and set(table["count"]) == {2}
    assert table.value.between(0, 1).all()
    now = weights_of(setting.pipe)
    assert all(torch.equal(before[key], now[key]) for key in before)
    with pytest.raises(ConeslabError, match="choose one of 1, 2, 5, 10, 20"):
        run_experiment("many-concepts", setting, subjects=["3"], path=path)


def test_targets_and_anchors_of_many_concepts_are_classes_and_none_is_both():
    pairs = many_concepts.PAIRS
    assert len(pairs) == 20 and set(pairs) | set(pairs.values()) | set(many_concepts.OTHERS) <= set(CLASSES)
    assert not set(pairs) & set(pairs.values()) and not set(many_concepts.OTHERS) & (set(pairs) | set(pairs.values()))


def test_one_after_the_other_each_edit_is_made_on_those_before(setting):
    pipe, made = setting.pipe, []

    def make(setting, pairs, seed):
        edit = ablation.closed_form_edit(pipe, *map(list, zip(*pairs, strict=True)))
        made.append(pipe.unet.state_dict()[next(iter(edit.deltas))].clone())
        return edit

    pairs = [("a cat", "a dog"), ("a car", "a house")]
    series, _ = many_concepts.one_after_the_other(setting, "test", make, pairs, 0)
    name = next(iter(series.edits[0].deltas))
    own = pipe.unet.state_dict()[name].clone()
    assert torch.equal(made[0], own) and torch.allclose(made[1], own + series.edits[0].deltas[name])
    with series.applied(pipe):
        both = series.edits[0].deltas[name] + series.edits[1].deltas[name]
        assert torch.allclose(pipe.unet.state_dict()[name], own + both, atol=1e-6)
    many_concepts.one_after_the_other(setting, "test", make, [*pairs, ("a ladybug", "a butterfly")], 0)
    assert len(made) == 3  # the beginning is known


@pytest.mark.parametrize("title", ablation.ABLATIONS)
def test_the_prompts_of_every_target_are_words_and_no_names_of_files(title):
    case = ablation.ablation_target(title)
    prompts = [*case.shown, *case.rivals, *(one for group in case.others.values() for one in group)]
    assert prompts and all("/" not in prompt and "_" not in prompt for prompt in prompts)
    assert case.target not in case.rivals and len(case.pairs[0]) == len(case.pairs[1]) == len(case.templates)


@pytest.mark.slow
@pytest.mark.parametrize("name", ablation.MEMORISED)
def test_a_copy_is_told_from_the_same_things_elsewhere(name):
    original = memorised(name)[0]
    detector = ablation.copy_detector(load_judge(), name)
    elsewhere = [Image.fromarray(rearranged(name, seed)[0]) for seed in range(1000, 1060)]
    assert detector.copies(elsewhere).mean() < 0.1 and detector.false_alarms <= 0.01
    noisy = np.clip(original + np.random.default_rng(0).normal(0, 4, original.shape), 0, 255).astype(np.uint8)
    assert detector.copies([Image.fromarray(original), Image.fromarray(noisy)]).all()


@pytest.mark.slow
def test_collateral_damage_is_measured_for_every_class(setting, tmp_path):
    title = "object:ladybug"
    table = run_experiment("collateral", setting, subjects=[title], seeds=1, path=tmp_path / "t.csv", progress=False)
    wide = table.pivot(index="condition", columns="measure", values="value")
    assert set(wide.index) == set(CLASSES) and wide.notna().all().all()
    prompts = [with_article(name) for name in CLASSES]
    drawn = generate(setting.pipe, prompts, seed=derived(0, "evaluation"), sampler_steps=1, guidance_scale=1.0)
    taken = setting.judge.classify(drawn, prompts).numpy()
    expected = dict(zip(CLASSES, (taken == np.arange(len(taken))).astype(float), strict=True))
    assert wide["right class before"].to_dict() == expected


@pytest.mark.slow
def test_an_edit_changes_what_is_measured_and_the_conditions_share_their_noises(setting, tmp_path):
    table = run_experiment("precision", setting, subjects=["cat"], seeds=1, path=tmp_path / "t.csv", progress=False)
    losses = table[table.measure == "concept loss"].set_index("condition").value
    assert losses["float32"] != losses["untouched model"]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-3) and losses["binary"] != losses["float32"]


@pytest.mark.slow
def test_neurons_are_searched_for_once_for_all_experiments(setting, tmp_path, monkeypatch):
    run_experiment("precision", setting, subjects=["dog"], seeds=1, path=tmp_path / "first.csv", progress=False)

    def again(*args, **options):
        raise AssertionError("searched again")

    monkeypatch.setattr("coneslab.experiments.setting.find_concept_neurons", again)
    run_experiment("damage", setting, subjects=["dog"], seeds=1, path=tmp_path / "second.csv", progress=False)
    with pytest.raises(AssertionError, match="searched again"):
        run_experiment("damage", setting, subjects=["house"], seeds=1, path=tmp_path / "third.csv", progress=False)


def test_a_setting_of_named_models_can_be_sent_to_a_worker_and_no_other(setting):
    sent = Setting.named("tiny", device="cpu", rounds=3, pictures=2, masks=Path("masks"))
    there = pickle.loads(pickle.dumps(sent))
    assert there == sent and there.pipe is sent.pipe and there.masks == Path("masks")
    assert len(pickle.dumps(sent)) < 1000  # names alone
    assert pickle.loads(pickle.dumps(sent.quick(7))).sampler_steps == 7
    with pytest.raises(ConeslabError, match="Setting.named"):
        pickle.dumps(setting)


@pytest.mark.slow
def test_the_command_shares_the_cells_among_workers(v_pipe, tmp_path, capsys):
    table, masks, model = tmp_path / "table.csv", tmp_path / "masks", tmp_path / "model"
    v_pipe.save_pretrained(model)
    common = [
        "experiment",
        "storage",
        "--subjects",
        "cat,dog",
        "--seeds",
        "1",
        "--rounds",
        "1",
        "--finetune-steps",
        "1",
    ]
    common += ["--out", str(table), "--masks", str(masks), "--device", "cpu", "--model", str(model)]
    assert main([*common, "--threads", "2"]) == 2 and "--workers" in capsys.readouterr().err
    assert main([*common, "--workers", "1", "--threads", "2"]) == 0
    made = pandas.read_csv(table)
    assert list(dict.fromkeys(made.subject)) == ["cat", "dog"] and len(list(masks.glob("*.safetensors"))) == 2


def test_unknown_names_are_refused_before_anything_is_computed(setting, tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(ConeslabError, match="choose one of controls"):
        run_experiment("controlls", setting, path=path)
    with pytest.raises(WorldError, match="unicorn"):
        run_experiment("controls", setting, subjects=["cat", "unicorn"], path=path)
    assert not path.exists()


def test_the_command_line_names_every_experiment(capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in EXPERIMENTS)

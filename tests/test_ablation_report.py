"""Reports of ablations: shares recounted by hand, detectors calibrated on real pictures, probes without a trace."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch

from coneslab.diffusion.sampling import generate
from coneslab.errors import ConeslabError
from coneslab.finetuning import samples
from coneslab.measure.statistics import kid, share_interval
from coneslab.methods.ablation import report as report_module
from coneslab.methods.ablation.concept_ablation import ablate
from coneslab.methods.ablation.profile import (
    BEFORE,
    FOUND,
    KINDS,
    NAMED,
    SILENT,
    Probe,
    Profile,
    asking,
    misspelled,
    usual_probes,
)
from coneslab.methods.ablation.report import CopyDetector, evaluate_ablation, near_and_far
from coneslab.seeds import derived
from coneslab.world import CLASSES, memorised, sample

FAST = {"pictures": 3, "sampler_steps": 2}


@pytest.fixture
def edit(v_pipe):
    return ablate(v_pipe, "a cat", "a dog", pictures=4, sampler_steps=2, steps=3, learning_rate=0.05, progress=False)


def test_neighbours_are_those_of_the_world():
    groups = near_and_far("ladybug")
    assert groups["looks alike"] == ("strawberry",) and "butterfly" in groups["same category"]
    assert all(CLASSES[name].category == CLASSES["ladybug"].category for name in groups["same category"])
    every = [name for group in groups.values() for name in group]
    assert sorted([*every, "ladybug"]) == sorted(CLASSES)
    with pytest.raises(ConeslabError, match="unicorn"):
        near_and_far("unicorn")


@pytest.mark.slow
def test_the_report_is_what_one_would_count_by_hand(v_pipe, judge, edit):
    report = evaluate_ablation(v_pipe, judge, edit, "a cat", "a dog", others={"far": ["a car", "a house"]}, **FAST)
    table = report.set_index(["prompt", "measure"]).value
    texts = judge.text_features(["a cat", "a dog", "a car", "a house"])
    for prompt, rivals in (("a cat", [1]), ("a dog", [0]), ("a car", [0, 1, 3])):
        own = ["a cat", "a dog", "a car", "a house"].index(prompt)
        first = derived(0, "evaluation")
        before = judge.image_features(generate(v_pipe, [prompt] * 3, seed=first, sampler_steps=2))
        with edit.applied(v_pipe):
            after = judge.image_features(generate(v_pipe, [prompt] * 3, seed=first, sampler_steps=2))
        near = after @ texts.T
        assert table[prompt, "CLIP score"] == pytest.approx(float(near[:, own].mean()), abs=1e-4)
        share = (near[:, own] > near[:, rivals].max(1).values).float().mean()
        assert table[prompt, "CLIP accuracy"] == pytest.approx(float(share))
        assert table[prompt, "KID"] == pytest.approx(kid(before, after, paired=True), abs=1e-4)
        assert table[prompt, "change"] == pytest.approx(1 - float((before * after).sum(1).mean()), abs=1e-4)
    assert report.low.isna()[report.measure.isin(["KID", "CLIP score", "change"])].all()  # three pictures are too few
    assert report.low.notna()[
        report.measure.isin(["CLIP accuracy", "accuracy before", "target on it"])
    ].all()  # a share of them is not
    none = evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", **FAST).set_index(["prompt", "measure"]).value
    assert none["a cat", "change"] == pytest.approx(0, abs=1e-5)
    assert none["a cat", "KID"] == none["a dog", "KID"] == 0  # no change is no distance, however few the pictures
    assert none["a cat", "CLIP accuracy"] == none["a cat", "accuracy before"]
    with pytest.raises(ConeslabError, match="nothing to tell apart"):
        evaluate_ablation(v_pipe, judge, None, "a cat", "a cat", **FAST)


@pytest.mark.slow
def test_a_copy_detector_keeps_its_rate_of_false_alarms(judge):
    from PIL import Image

    real = sample(400, seed=3).images
    original = Image.fromarray(memorised("lighthouse")[0])
    detector = CopyDetector.calibrated(judge, original, real[:200], false_alarms=0.05)
    assert detector.false_alarms <= 0.05
    assert detector.copies(real[200:]).mean() < 0.15
    assert detector.copies([original]).all() and detector.similarity(original) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConeslabError, match="give at least 100"):
        CopyDetector.calibrated(judge, original, real[:50], false_alarms=0.01)


def test_misspellings_are_near_misses():
    assert misspelled("rabbit") == ("rabbbit", "rabibt", "rabit") or len(set(misspelled("rabbit"))) == 3
    for word in ("cat", "strawberry"):
        assert word not in misspelled(word) and all(abs(len(word) - len(wrong)) <= 1 for wrong in misspelled(word))


# --- probes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_probes_find_is_what_one_would_count_by_hand(v_pipe, judge, edit):
    drawn = {}

    def draw(pipe, n, settings):
        drawn[len(drawn)] = generate(pipe, ["a house"] * n, seed=settings.seed, sampler_steps=settings.sampler_steps)
        return drawn[len(drawn) - 1]

    beside = asking("beside a car", ["a cat and a car"], uses_word=False, contexts="{} and a car")
    probes = [asking("plain prompt", "a cat", uses_word=True), beside, Probe("houses", False, draw=draw)]
    options = {"probes": probes, "rivals": ["a house", "a dog"], **FAST}
    report = evaluate_ablation(v_pipe, judge, edit, "a cat", "a dog", others={"far": "a car"}, **options)
    table = report.set_index(["group", "prompt", "measure"]).value
    assert list(dict.fromkeys(report.group)) == ["target", "anchor", "far", NAMED, SILENT]
    first = derived(0, "evaluation")
    for name, kind, prompt, texts in (
        ("plain prompt", NAMED, "a cat", ["a cat", "a dog", "a house"]),
        ("beside a car", SILENT, "a cat and a car", ["a cat and a car", "a dog and a car", "a house and a car"]),
        ("houses", SILENT, "a house", ["a cat", "a dog", "a house"]),
    ):
        for measure in (FOUND, BEFORE):
            with edit.applied(v_pipe, 1.0 if measure == FOUND else 0.0):
                pictures = generate(v_pipe, [prompt] * 3, seed=first, sampler_steps=2)
            near = judge.image_features(pictures) @ judge.text_features(texts).T
            assert table[kind, name, measure] == pytest.approx(float((near.argmax(1) == 0).float().mean()))
    assert len(drawn) == 2  # with the edit and without
    evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", **options)
    assert len(drawn) == 2  # the untouched model has drawn it
    found = Profile.of(report)
    assert [one.probe for one in found.findings] == ["plain prompt", "beside a car", "houses"]
    first_row = report[(report.prompt == "beside a car") & (report.measure == FOUND)].iloc[0]
    assert (found.findings[1].low, found.findings[1].high) == (first_row.low, first_row.high)
    counts = [1.0] * round(3 * first_row.value) + [0.0] * round(3 - 3 * first_row.value)
    assert first_row.high == share_interval(counts).high


@pytest.mark.slow
def test_no_picture_is_drawn_twice(v_pipe, judge, edit, monkeypatch):
    asked = []

    def counted(pipe, prompts, *, seed, **options):
        asked.append(list(zip(prompts, seed, strict=True)))
        return generate(pipe, prompts, seed=seed, **options)

    monkeypatch.setattr(samples, "_DRAWN", OrderedDict())
    monkeypatch.setattr(samples, "generate", counted)
    monkeypatch.setattr(report_module, "generate", counted)
    probes = [asking("plain prompt", "a cat", uses_word=True), asking("others", ["a car", "the cat"], uses_word=False)]
    options = {"others": {"far": ["a car", "a dog"]}, "probes": probes, **FAST}
    evaluate_ablation(v_pipe, judge, edit, "a cat", "a dog", **options)
    assert len(asked) == 2 and all(len(call) == len(set(call)) for call in asked)  # one call without, one with the edit
    first = derived(0, "evaluation")
    wanted = {(prompt, first + i) for prompt in ("a cat", "a dog", "a car") for i in range(3)} | {
        ("the cat", first + 1)
    }
    assert set(asked[0]) == set(asked[1]) == wanted
    evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", **options)
    assert len(asked) == 2  # without an edit, all of it is known
    evaluate_ablation(v_pipe, judge, None, "a cat", "a house", **FAST)
    assert [prompt for prompt, _ in asked[2]] == ["a house"] * 3


@pytest.mark.slow
def test_pictures_of_the_target_left_on_others_are_counted(v_pipe, judge, edit):
    report = evaluate_ablation(v_pipe, judge, edit, "a cat", "a dog", others={"far": "a car"}, **FAST)
    with edit.applied(v_pipe):
        drawn = generate(v_pipe, ["a car"] * 3, seed=derived(0, "evaluation"), sampler_steps=2)
    near = judge.image_features(drawn) @ judge.text_features(["a cat", "a car"]).T
    left = report[report.measure == "target on it"].set_index("prompt").value
    assert set(left.index) == {"a dog", "a car"}
    assert left["a car"] == pytest.approx(float((near[:, 0] > near[:, 1]).float().mean()))


def test_probes_that_share_a_name_or_are_none_are_refused(v_pipe, judge):
    twice = [asking("x", "a cat", uses_word=True)] * 2
    for probes, said in ((twice, "two probes are named 'x'"), ([3], "give a Probe"), (3, "probes")):
        with pytest.raises(ConeslabError, match=said):
            evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", probes=probes, **FAST)


@pytest.mark.parametrize("group", ["target", "anchor", *KINDS])
def test_a_group_that_has_the_name_of_the_reports_own_rows_is_refused(v_pipe, judge, group):
    with pytest.raises(ConeslabError, match=f"others has a group '{group}'"):
        evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", others={"far": [], group: ["a car"]}, **FAST)


@pytest.mark.slow
def test_what_is_no_answer_for_each_picture_is_refused(v_pipe, judge):
    probes = [asking("plain prompt", "a cat", uses_word=True)]
    for answer, said in (
        (np.array([True]), r"shows gave bool of shape \(1,\) for 3 pictures"),
        (np.array([0.7, 3.0, 0.2]), r"shows gave float64 of shape \(3,\) for 3 pictures"),
        (np.ones((3, 1), bool), r"shows gave bool of shape \(3, 1\)"),
        ([[True], [True, False], [True]], "shows gave .*True, False.* for 3 pictures"),
        (True, "shows gave True for 3 pictures"),
        (None, "shows gave None for 3 pictures"),
    ):
        with pytest.raises(ConeslabError, match=said):
            evaluate_ablation(
                v_pipe, judge, None, "a cat", "a dog", probes=probes, shows=lambda images, answer=answer: answer, **FAST
            )
    for answer in ([True, False, False], torch.tensor([False, True, False])):
        report = evaluate_ablation(
            v_pipe, judge, None, "a cat", "a dog", probes=probes, shows=lambda images, answer=answer: answer, **FAST
        )
        assert report.set_index("measure").value[FOUND] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_usual_probes_try_every_way_and_leave_the_pipeline_alone(v_pipe, judge, edit, pictured):
    budget = {"rounds": 1, "inversion_steps": 2, "finetune_steps": 2, "batch_size": 2}
    before = {name: tensor.clone() for name, tensor in v_pipe.unet.state_dict().items()}
    tokenizer, unet = v_pipe.tokenizer, v_pipe.unet
    probes = usual_probes("a cat", "a dog", pictured.images, word="cat", budget=budget)
    report = evaluate_ablation(v_pipe, judge, edit, "a cat", "a dog", probes=probes, **FAST | {"sampler_steps": 4})
    assert [one.name for one in probes] == [
        "plain prompt",
        "misspellings",
        "noisy trajectory",
        "img2img",
        "prompt attack",
        "completion from 0.5",
        "completion from 0.7",
        "completion from 0.85",
        "prompt attack, without its word",
        "Textual Inversion",
        "fine-tuning back",
    ]
    assert set(report[report.group.isin(KINDS)].prompt) == {one.name for one in probes}
    assert report.value[report.measure == FOUND].between(0, 1).all()
    assert v_pipe.tokenizer is tokenizer and v_pipe.unet is unet
    assert all(torch.equal(before[name], tensor) for name, tensor in v_pipe.unet.state_dict().items())
    second = evaluate_ablation(
        v_pipe,
        judge,
        edit,
        "a cat",
        "a dog",
        probes=probes[:3],
        shows=lambda pictures: np.arange(len(pictures)) == 1,
        **FAST | {"sampler_steps": 4},
    )
    assert second.value[second.measure == FOUND].tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ConeslabError, match="which 'a cat' does not hold"):
        usual_probes("a cat", "a dog", pictured.images, word="dog")

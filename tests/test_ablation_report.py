"""Reports of ablations: shares recounted by hand, detectors calibrated on real pictures, attacks without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coneslab.diffusion.sampling import generate
from coneslab.errors import ConeslabError
from coneslab.measure.statistics import kid
from coneslab.methods.ablation.concept_ablation import ablate
from coneslab.methods.ablation.report import CopyDetector, attacks, evaluate_ablation, misspelled, near_and_far
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
    assert report.low.notna()[report.measure.isin(["CLIP accuracy", "accuracy before"])].all()  # a share of them is not
    none = evaluate_ablation(v_pipe, judge, None, "a cat", "a dog", **FAST).set_index(["prompt", "measure"]).value
    assert none["a cat", "change"] == pytest.approx(0, abs=1e-5)
    assert none["a cat", "KID"] == none["a dog", "KID"] == 0  # no change is no distance, however few the pictures
    assert none["a cat", "CLIP accuracy"] == none["a cat", "accuracy before"]
    with pytest.raises(ConeslabError, match="nothing to tell apart"):
        evaluate_ablation(v_pipe, judge, None, "a cat", "a cat", **FAST)


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


def test_a_word_that_the_target_lacks_is_not_left_out_of_the_table(v_pipe, judge):
    with pytest.raises(ConeslabError, match="word is 'dog', which 'a cat' does not hold"):
        attacks(v_pipe, judge, None, "a cat", "a dog", word="dog", **FAST)


def test_misspellings_are_near_misses():
    assert misspelled("rabbit") == ("rabbbit", "rabibt", "rabit") or len(set(misspelled("rabbit"))) == 3
    for word in ("cat", "strawberry"):
        assert word not in misspelled(word) and all(abs(len(word) - len(wrong)) <= 1 for wrong in misspelled(word))


@pytest.mark.slow
def test_attacks_try_every_way_and_leave_the_pipeline_alone(v_pipe, judge, edit):
    before = {name: tensor.clone() for name, tensor in v_pipe.unet.state_dict().items()}
    tokenizer, unet = v_pipe.tokenizer, v_pipe.unet
    report = attacks(
        v_pipe,
        judge,
        edit,
        "a cat",
        "a dog",
        paraphrases=["the cat"],
        synonyms=["a sks"],
        word="cat",
        inversion_steps=2,
        finetune_steps=2,
        **FAST,
    )
    assert report.attack.tolist() == [
        "plain prompt",
        "paraphrases",
        "other words",
        "misspellings",
        "img2img",
        "Textual Inversion",
        "fine-tuning back",
    ]
    assert report.value.between(0, 1).all() and (report.low <= report.value).all()
    with edit.applied(v_pipe):
        drawn = generate(v_pipe, ["a cat"] * 3, sampler_steps=2)
    near = judge.image_features(drawn) @ judge.text_features(["a cat", "a dog"]).T
    assert report.value[0] == pytest.approx(float((near[:, 0] > near[:, 1]).float().mean()))
    assert v_pipe.tokenizer is tokenizer and v_pipe.unet is unet
    assert all(torch.equal(before[name], tensor) for name, tensor in v_pipe.unet.state_dict().items())
    other = attacks(
        v_pipe,
        judge,
        edit,
        "a cat",
        "a dog",
        inversion_steps=1,
        finetune_steps=1,
        batch_size=2,
        shows=lambda pictures: np.arange(len(pictures)) == 1,
        **FAST,
    )
    assert other.value.tolist() == pytest.approx([1 / 3] * len(other))
    with pytest.raises(ConeslabError, match="strength"):
        attacks(v_pipe, judge, None, "a cat", "a dog", strength=0, **FAST)
    assert np.isfinite(report.value).all()

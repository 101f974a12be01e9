"""The evaluation table, with a judge that knows the truth and pipelines that fail in known ways."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_judge import save_small_judge

from coneslab import cli, world
from coneslab.errors import ConeslabError
from coneslab.measure import asking, evaluation, subject_truth
from coneslab.measure.asking import finds_objects, nearest, questions
from coneslab.measure.evaluation import evaluate_model, judge_accuracy
from coneslab.measure.judge import Judge, as_pictures
from coneslab.measure.subject_truth import came_through, shows_subject
from coneslab.world import CLASSES, COLOURS, SCENES, STYLES, TRAIN_STYLES, WORDS
from coneslab.world.subjects import SUBJECTS, truth, wanted

SEEDS, LIMIT = 4, 12
COLUMN = {word: index for index, word in enumerate(WORDS)}


def bag_of_words(texts) -> torch.Tensor:
    rows = np.zeros((len(texts), len(WORDS)), np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.replace(",", "").split():
            row[COLUMN[word]] += word not in ("a", "an")
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Oracle(Judge):
    """Reads what a picture shows from a note in the picture."""

    def __repr__(self):
        return "Oracle"

    def image_features(self, images, *, normalize=True):
        return bag_of_words([picture.info["shows"] for picture in as_pictures(images)])

    def text_features(self, prompts, *, normalize=True):
        return bag_of_words([prompts] if isinstance(prompts, str) else prompts)


ORACLE = Oracle(None, None)


class Pipe:
    config = {"_name_or_path": "nothing"}


def showing(text: str) -> Image.Image:
    picture = Image.new("RGB", (8, 8))
    picture.info["shows"] = text
    return picture


@pytest.fixture
def drawing(monkeypatch):
    """Make `generate` show what a function makes of (prompt, index), and real pictures show their prompt."""
    seen = {}

    def install(flaw=lambda prompt, index: prompt):
        def generate(pipe, prompts, *, seed, **options):
            seen.setdefault("prompts", []).extend(prompts)
            seen["options"] = options
            options["on_calls"](2 * len(prompts))
            return [showing(flaw(prompt, index)) for index, prompt in enumerate(prompts)]

        monkeypatch.setattr(evaluation, "generate", generate)
        monkeypatch.setattr(evaluation, "_real", lambda asked, styles, seed: [showing(q.prompt) for q in asked])
        return seen

    return install


def estimates(report) -> dict[str, float]:
    return {row.name: row.interval.estimate for row in report.shares}


@pytest.mark.slow
def test_a_perfect_pipeline_scores_one_everywhere(drawing):
    seen = drawing()
    report = evaluate_model(Pipe(), ORACLE, seeds=SEEDS, sampler_steps=7, guidance_scale=2.0)
    assert set(estimates(report).values()) == {1.0}
    assert all(row.met in (True, None) and row.real.estimate == 1 for row in report.shares)
    assert report.settings["pictures"] == len(seen["prompts"])
    groups = sum(len(CLASSES) // count for count in (1, 2, 3, 4))
    coloured = sum(info.share_blue is None for info in CLASSES.values())  # hats have colours of their own
    assert len(seen["prompts"]) == SEEDS * groups + len(CLASSES) + coloured
    assert (
        report.settings["calls"] == 2
        and seen["options"]["sampler_steps"] == 7
        and seen["options"]["guidance_scale"] == 2.0
    )
    assert set(report.classes) == set(CLASSES) and not report.mistaken


@pytest.mark.parametrize(
    "name, told", [("{}/some/tiny", "tiny"), ("owner/name", "owner/name"), (None, "SimpleNamespace")]
)
def test_a_report_names_the_model_and_not_where_it_lies(tmp_path, name, told):
    (tmp_path / "some" / "tiny").mkdir(parents=True)
    pipe = SimpleNamespace(config={"_name_or_path": name and name.format(tmp_path)})
    assert evaluation._name(pipe) == told


def test_the_pictures_that_distances_are_taken_from_are_all_others(drawing, monkeypatch):
    """Pictures beside themselves would have no distance."""
    drawing()
    seeds = []

    def sample(n, *, seed):
        seeds.append(seed)
        return SimpleNamespace(captions=["a cat"] * n, images=[showing("a cat")] * n)

    monkeypatch.setattr(evaluation, "sample", sample)
    monkeypatch.setattr(evaluation, "kid", lambda *features: 0.0)
    evaluate_model(Pipe(), ORACLE, seeds=1, limit=2, kid_pictures=4, beside_real=False)
    captions, beside_drawn, real, beside_real = seeds
    assert beside_drawn == beside_real and len({captions, beside_drawn, real}) == 3


def test_without_real_pictures_the_shares_are_the_same_and_none_is_composed(drawing, monkeypatch):
    drawing()
    few = {"seeds": 1, "limit": 2}
    beside = evaluate_model(Pipe(), ORACLE, **few)
    monkeypatch.setattr(evaluation, "_real", None)
    alone = evaluate_model(Pipe(), ORACLE, beside_real=False, **few)
    assert estimates(alone) == estimates(beside) and all(row.real is None for row in alone.shares)


@pytest.mark.slow
def test_wrong_class_and_scene_are_counted(drawing):
    def flaw(prompt, index):
        if index % 4 == 0:
            prompt = prompt.replace(prompt.split()[1], "cactus")
        for phrase in (phrases[0] for phrases in SCENES.values()):
            if index % 2 == 0:
                prompt = prompt.replace(phrase, "at night")
        return prompt

    drawing(flaw)
    asked = questions(1, seeds=SEEDS, limit=LIMIT)
    hit_class = [index % 4 != 0 or question.objects[0] == "cactus" for index, question in enumerate(asked)]
    hit_scene = [index % 2 == 1 or question.scene == "night" for index, question in enumerate(asked)]
    report = evaluate_model(Pipe(), ORACLE, seeds=SEEDS, limit=LIMIT, extras=False)
    assert estimates(report)["right class"] == pytest.approx(np.mean(hit_class))
    assert estimates(report)["right scene"] == pytest.approx(np.mean(hit_scene))
    assert report.share("right class").met is False and report.share("both of a pair").met is False
    assert report.mistaken and set(report.mistaken.values()) == {"cactus"}
    assert report.share("right class").real.estimate == 1
    assert "(cactus)" in repr(report)


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, -1])
def test_a_missing_object_is_not_found(drawing, position):
    def flaw(prompt, index):
        for names in {q.objects for count in (2, 4) for q in questions(count, seeds=1, limit=LIMIT)}:
            if all(f" {name}" in f" {prompt.replace(',', '')} " for name in names) and index % 4 == 0:
                return prompt.replace(f"{names[position]}", "star" if "star" not in names else "hand")
        return prompt

    drawing(flaw)
    found = estimates(evaluate_model(Pipe(), ORACLE, seeds=SEEDS, limit=LIMIT, extras=False))
    assert found["both of a pair"] == found["all four of four"] == pytest.approx(0.75)
    assert found["all three of three"] > 0.9


@pytest.mark.slow
def test_the_rule_for_finding_objects_is_a_permutation_test():
    """Noise features: nothing is in the pictures, so an object is found in about `level` of them."""
    rng = np.random.default_rng(0)

    class Guessing(Oracle):
        def image_features(self, images, *, normalize=True):
            return torch.from_numpy(rng.normal(size=(len(as_pictures(images)), len(WORDS))).astype(np.float32))

    pictures = [showing("nothing")] * 2000
    for level in (0.05, 0.2):
        shares = finds_objects(Guessing(None, None), pictures, [("cat",)] * 2000, level=level)
        allowed = int(level * len(CLASSES)) / len(CLASSES)  # ranks are whole numbers
        assert shares.mean() == pytest.approx(allowed, abs=4 * np.sqrt(allowed / 2000))


@pytest.mark.parametrize(
    ("level", "more", "found"), [(0.05, 0, True), (0.05, 1, False), (0.2, 0, True), (1.0, 0, True)]
)
def test_a_caption_that_is_as_near_counts_as_nearer(level, more, found, monkeypatch):
    """p = (1 + swaps at least as near) / (1 + swaps), at most `level` (Phipson and Smyth 2010)."""
    tied = int(level * len(CLASSES)) - 1 + more  # with one object there is a swap for every other class

    def near(judge, images, options):
        assert len(options[0]) == len(CLASSES)
        return [[0.5] * (1 + tied) + [0.1] * (len(CLASSES) - 1 - tied)]

    monkeypatch.setattr(asking, "cosines", near)
    assert finds_objects(None, [showing("nothing")], [("cat",)], level=level).tolist() == [found]


@pytest.mark.slow
def test_style_and_colour_are_told_apart(drawing):
    def flaw(prompt, index):
        words = prompt.split()
        return " ".join("flat" if w in TRAIN_STYLES else "red" if w in COLOURS else w for w in words)

    drawing(flaw)
    report = evaluate_model(Pipe(), ORACLE, seeds=SEEDS, limit=LIMIT)
    few = [questions(1, seeds=1, limit=LIMIT, **{kind: True}) for kind in ("style", "colour")]
    assert estimates(report)["right style"] == pytest.approx(np.mean([q.style == "flat" for q in few[0]]))
    assert estimates(report)["right colour"] == pytest.approx(np.mean([q.colour == "red" for q in few[1]]))


@pytest.mark.slow
def test_a_judge_is_measured_on_real_pictures_with_its_false_alarms(drawing, monkeypatch):
    drawing()
    monkeypatch.setattr(evaluation, "finer_hits", lambda *_: {})  # an oracle of notes sees no pixels
    found = estimates(judge_accuracy(ORACLE, seeds=2, limit=LIMIT))
    errors = {name: share for name, share in found.items() if "missing" in name}
    assert len(errors) == 2 and set(errors.values()) == {0.0}
    assert {share for name, share in found.items() if name not in errors} == {1.0}
    assert {f"right class, {style}" for style in STYLES} <= found.keys()


def test_real_pictures_are_composed_to_the_questions(monkeypatch):
    calls = []
    monkeypatch.setattr(
        evaluation,
        "compose",
        lambda objects, scene, *, seed: calls.append((objects, scene, seed)) or (np.zeros((64, 64, 3), "uint8"), None),
    )
    asked = questions(2, seeds=2, limit=2) + questions(1, seeds=2, limit=1, style=True, colour=True)
    assert evaluation._real(asked, ["3d", "cartoon"], 0).shape == (6, 64, 64, 3)
    for index, (question, (objects, scene, _)) in enumerate(zip(asked, calls, strict=True)):
        styles = [question.style or ["3d", "cartoon"][index % 2]] * len(question.objects)
        assert objects == [(name, style, question.colour) for name, style in zip(question.objects, styles, strict=True)]
        assert scene == question.scene
    assert len({seed for *_, seed in calls}) == len(calls)


def test_questions_cover_every_class_in_different_scenes_in_the_worlds_words():
    alone, pairs, fours = (questions(count, seeds=8) for count in (1, 2, 4))
    assert {q.objects[0] for q in alone} == set(CLASSES)
    assert len({(q.objects, q.scene) for q in alone}) == len(alone) == 8 * len(CLASSES)
    for groups, count in ((pairs, 2), (fours, 4)):
        named = [name for q in groups[::8] for name in q.objects]
        assert len(named) == len(set(named)) == len(CLASSES) // count * count
    every = alone + pairs + fours + questions(1, style=True, colour=True)
    assert {word for q in every for word in q.prompt.replace(",", "").split()} <= set(WORDS)
    assert questions(2, limit=3) == questions(2)[:24] != questions(2, seed=1)[:24]
    one = asking.Question(("apple",), "beach")
    assert one.prompt == "an apple on the beach"
    assert asking.Question(("apple",), "beach", "flat", "orange").prompt == "a flat orange apple on the beach"
    four = asking.Question(("cat", "apple", "car", "dog"), "night")
    assert four.prompt == "a cat, an apple, a car and a dog at night"


def test_the_world_asks_only_for_what_its_art_has():
    styled = questions(1, seeds=5, style=True)
    assert all(one.objects[0] in world.classes_of(one.style) for one in styled)
    assert {one.style for one in styled} == set(world.TRAIN_STYLES)
    assert ("teddy", "bold") not in {(one.objects[0], one.style) for one in styled}
    coloured = {one.objects[0] for one in questions(1, colour=True)}
    assert coloured == {name for name, info in world.CLASSES.items() if info.share_blue is None}
    evaluation._real([one for one in questions(4, seeds=1)], world.STYLES, 0)  # nothing is lacking


@dataclass(frozen=True, eq=False)
class Colours(Oracle):
    """Sees the mean colour of a picture, and takes any text for another."""

    def image_features(self, images, *, normalize=True):
        means = np.stack([np.asarray(picture, float).mean((0, 1)) - 128 for picture in as_pictures(images)])
        return torch.from_numpy(means / np.linalg.norm(means, axis=1, keepdims=True)).float()


def test_hues_are_told_by_the_nearest_real_pictures(monkeypatch):
    monkeypatch.setattr(
        subject_truth, "right_class", lambda judge, images, names: (np.ones(len(names), bool), list(names))
    )
    monkeypatch.setattr(subject_truth, "SCENES", {"white": world.SCENES["white"]})
    judge = Colours(None, None)
    own = [wanted(("bramley",), "white", seed=seed)[0] for seed in range(4)]
    assert came_through(judge, own, "bramley").hue_error.max() <= 15
    sticker = truth("bramley").sticker
    turned = [world.compose([replace(sticker, hue=sticker.hue + 120)], "white", seed=seed)[0] for seed in range(4)]
    found = came_through(judge, np.stack(turned), "bramley")
    assert not found.kept_hue.any() and abs(found.hue_error - 120).max() <= 30


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_comes_through_in_its_own_pictures(name, monkeypatch):
    """Also those whose class has one drawing only, and is named without it."""
    monkeypatch.setattr(subject_truth, "SCENES", {"white": world.SCENES["white"]})
    monkeypatch.setattr(
        subject_truth, "right_class", lambda judge, images, names: (np.ones(len(names), bool), list(names))
    )
    found = came_through(Colours(None, None), [wanted((name,), "white", seed=seed)[0] for seed in range(4)], name)
    assert found.kept_drawing.shape == found.kept_hue.shape == (4,) and found.kept_hue.mean() >= 0.5


def test_a_near_subject_is_taken_for_itself_by_drawing_and_hue(monkeypatch):
    drawing, error = [True, True, False, False, True], [0, 45, 0, 45, 30]
    monkeypatch.setattr(subject_truth, "_right_drawing", lambda judge, features, known: np.array(drawing))
    monkeypatch.setattr(subject_truth, "_hue_error", lambda judge, features, known: np.array(error))
    shown = np.zeros((5, 8, 8, 3), np.uint8)
    judge = Colours(None, None)
    assert shows_subject(judge, shown, "bramley").tolist() == [True, False, False, False, True]
    assert shows_subject(judge, shown, "bramley", degrees=29).tolist() == [True, False, False, False, False]


def test_a_far_subject_is_taken_for_itself_by_its_art_set():
    class Sorting(Colours):
        def classify(self, images, labels):
            assert len(labels) == len(world.STYLES) and all("cat" in label for label in labels)
            return torch.arange(len(images))

    found = shows_subject(Sorting(None, None), np.zeros((len(world.STYLES), 8, 8, 3), np.uint8), "cat")
    assert [style for style, own in zip(world.STYLES, found, strict=True) if own] == [truth("cat").sticker.style]


def test_kid_is_near_zero_for_real_pictures_and_not_for_noise():
    real = world.sample(64, seed=5).images
    noise = np.random.default_rng(0).integers(0, 256, real.shape, np.uint8)
    judge = Colours(None, None)
    own, others = (evaluation.kid_to_real(judge, images, seed=6) for images in (real, noise))
    assert abs(own) < 0.3 and others > 1 + own


def test_report_reads_well_and_goes_to_json(drawing):
    drawing()
    report = evaluate_model(Pipe(), ORACLE, seeds=1, limit=2)
    data = json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in data["shares"]] == [row.name for row in report.shares]
    assert data["shares"][0]["bar"] == 0.99 and data["shares"][0]["met"] is True
    text = repr(report)
    assert text.startswith("nothing, judged by Oracle") and all(row.name in text for row in report.shares)
    with pytest.raises(ConeslabError, match="right class"):
        report.share("righteous class")


@pytest.mark.slow
def test_intervals_keep_the_pictures_of_a_prompt_together(drawing):
    drawing(lambda prompt, index: prompt if index // SEEDS % 2 else "a star at night")  # whole prompts fail
    together = evaluate_model(Pipe(), ORACLE, seeds=SEEDS, limit=LIMIT, extras=False).share("right class").interval
    drawing(lambda prompt, index: prompt if index % 2 else "a star at night")  # half of every prompt fails
    spread = evaluate_model(Pipe(), ORACLE, seeds=SEEDS, limit=LIMIT, extras=False).share("right class").interval
    assert together.high - together.low > 1.6 * (spread.high - spread.low)


def test_nearest_wants_one_list_of_options_a_picture():
    assert nearest(ORACLE, [showing("a cat")], [["a dog", "a cat"]]).tolist() == [1]
    with pytest.raises(ConeslabError, match="1 pictures and 2 lists"):
        nearest(ORACLE, [showing("a cat")], [["a dog"], ["a cat"]])


@pytest.mark.slow
def test_command_line_prints_the_table_for_a_saved_pipeline(v_pipe, tmp_path, capsys):
    judge, model, table = tmp_path / "judge", tmp_path / "model", tmp_path / "table.json"
    judge.mkdir()
    save_small_judge(judge)
    v_pipe.save_pretrained(model)
    few = ["--judge", str(judge), "--seeds", "1", "--limit", "2", "--json", str(table)]
    assert cli.main(["evaluate-model", str(model), "--sampler-steps", "2", "--bars-only", "--device", "cpu", *few]) == 0
    assert "all four of four" in capsys.readouterr().out
    saved = json.loads(table.read_text())
    assert saved["settings"]["sampler_steps"] == 2 and saved["settings"]["pictures"] == 2 + 2 + 2 + 2
    assert cli.main(["evaluate-model", "judge", *few]) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main(["evaluate-model", "judge", *few, "--force"]) == 0
    assert "right class, twemoji" in capsys.readouterr().out
    assert cli.main(["evaluate-model", str(tmp_path / "nothing"), *few, "--force"]) == 2
    assert "nothing" in capsys.readouterr().err

"""The command line: every command explains itself and does what it says; errors are one line and an exit code."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_pipeline, make_subject
from PIL import Image
from small_judge import save_small_judge

from coneslab import ConeslabError, cli, generate, load, load_edit
from coneslab.cli import doctor
from coneslab.diffusion import pipelines

COMMANDS = (
    "doctor",
    "tour",
    "find",
    "generate",
    "apply",
    "decompose",
    "ablate",
    "compare",
    "experiment",
    "evaluate-model",
    "compare-samplers",
    "pretrain",
    "build-stickers",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_all_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_errors_are_told_in_one_line_without_a_traceback(tmp_path, capsys):
    assert cli.main(["build-stickers", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("coneslab: ") and "@lobehub/fluent-emoji-3d" in told and "Traceback" not in told


def test_settings_that_are_no_json_are_told(capsys):
    assert cli.main(["compare", "--settings", "steps=50"]) == 1
    assert "steps=50" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "many"])
def test_numbers_that_count_things_must_be_positive(number, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "a cat", "--sampler-steps", number])
    assert stop.value.code == 2 and "--sampler-steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate x --seed -1", "--seed: the value is -1: give a number from 0 to"),
        ("generate x --seed 99999999999999999999", "--seed: the value is 99999999999999999999: give a number"),
        ("generate x --seed 0.5", "--seed: the value is '0.5': give a whole number"),
        ("generate x --guidance-scale nan", "--guidance-scale: the value is nan: give a number in [0, 100]"),
        ("generate x --guidance-scale 1e30", "--guidance-scale: the value is 1e+30: give a number in [0, 100]"),
        ("generate x --dose inf", "--dose: the value is inf: give a number in [-100, 100]"),
        ("generate x --pictures 1000000000", "--pictures: the value is 1000000000: give a positive number, at most"),
        ("find cat --rounds 0", "--rounds: the value is 0: give a positive number"),
        ("find cat --token my=cat", "--token: the value is 'my cat': give one word"),
        ("find cat --class-word =", "--class-word: the value is empty"),
        ("decompose =", "concept: the value is empty"),
        ("decompose x --picture -1", "--picture: the value is -1"),
        ("ablate x =", "anchor: the value is empty"),
        ("ablate x y --template {0}", "--template: the value is '{0}': give a text with {} for the word"),
        ("ablate x y --template {}={}", "--template: the value is '{} {}'"),
        ("evaluate-model tiny --seeds 0", "--seeds: the value is 0"),
        ("evaluate-model tiny --kid -1", "--kid: the value is -1"),
        ("compare-samplers tiny --sampler DDIM,4 --limit 0", "--limit: the value is 0"),
        ("compare --counts 1,x", "--counts: the value is 'x': give a whole number"),
        ("pretrain vae --minutes nan", "--minutes: the value is nan: give a positive number"),
    ],
)
def test_a_value_that_makes_no_sense_is_told_before_anything_is_loaded(command, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([part.replace("=", " ") for part in command.split()])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["DDIM,0", "DDIM,2.5", "DDIM,nan", "DDIM,4,1e30", "DDIM,4,3,0.8,0.2", "magic,4"])
def test_a_sampler_that_makes_no_sense_is_told_in_one_line(sampler, capsys):
    assert cli.main(["compare-samplers", "tiny", "--sampler", sampler]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ": give " in told or ": choose one of DDIM" in told


# --- with a small model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder, tokens=20).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def small_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def coneslab(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    """Run a command on the small model in an empty folder: what it printed as JSON, or the error it told."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: str) -> Any:
        common = ["--model", str(model), "--device", "cpu", "--quiet", "--sampler-steps", "2", "--json"]
        code = cli.main([command, *arguments, *common])
        told = capsys.readouterr()
        return json.loads(told.out, parse_constant=pytest.fail) if code == 0 else told.err

    return run


def save_pictures(folder: Path) -> None:
    folder.mkdir()
    for number, image in enumerate(make_subject(40).images):
        image.save(folder / f"{number}.png")


def picture(file: str) -> np.ndarray:
    return np.asarray(Image.open(file), float)


def test_find_keeps_neurons_in_a_file_and_overwrites_none(coneslab, tmp_path):
    found = coneslab("find", "cat", "--rounds", "2", "--precision", "float32")
    edit = load_edit(tmp_path / "cat.safetensors")
    assert found["subject"] == edit.subject == "cat" and found["neurons"] == edit.n
    assert found["shut"] == len(edit.shut()) == sum(found["shut by layer"].values())
    before = (tmp_path / "cat.safetensors").read_bytes()
    assert "already exists" in coneslab("find", "cat", "--rounds", "1")
    assert (tmp_path / "cat.safetensors").read_bytes() == before
    assert coneslab("find", "cat", "--rounds", "1", "--force")["precision"] == "binary"
    assert "not a subject" in coneslab("find", "unicorn")


def test_find_takes_a_folder_of_pictures(coneslab, tmp_path):
    save_pictures(tmp_path / "mine")
    assert "--class-word" in coneslab("find", "mine", "--rounds", "1")
    found = coneslab(
        "find", "mine", "--class-word", "cat", "--token", "sks", "--rounds", "1", "--out", "a/b.safetensors"
    )
    assert found["file"] == "a/b.safetensors" and load_edit(tmp_path / "a" / "b.safetensors").subject == "mine"


def test_generate_says_in_each_picture_how_it_was_made(coneslab, tmp_path, model):
    coneslab("find", "cat", "--rounds", "3", "--out", "cat.safetensors")
    plain = coneslab("generate", "a cat", "a dog!", "--pictures", "2", "--seed", "5", "--out", "plain")["pictures"]
    assert [row["seed"] for row in plain] == [5, 6, 5, 6] and len({row["file"] for row in plain}) == 4
    written = Image.open(plain[3]["file"])
    assert json.loads(written.text["coneslab"]) == {name: plain[3][name] for name in plain[3] if name != "file"}
    expected = generate(load(model, device="cpu"), "a dog!", seed=6, sampler_steps=2)[0]
    assert np.abs(picture(plain[3]["file"]) - np.asarray(expected, float)).max() <= 1
    edited = coneslab("generate", "a cat", "--seed", "5", "--edit", "cat.safetensors", "--out", "edited")["pictures"]
    assert edited[0]["edits"] == ["cat.safetensors"]
    assert not np.array_equal(picture(edited[0]["file"]), picture(plain[0]["file"]))
    assert "already exists" in coneslab("generate", "a dog!", "a mouse", "--seed", "5", "--out", "plain")
    assert len(list((tmp_path / "plain").iterdir())) == 4  # a mouse was not drawn, either
    assert "given twice" in coneslab("generate", "a cat", "a cat?")
    assert "none.safetensors" in coneslab("generate", "a cat", "--edit", "none.safetensors")


@pytest.mark.slow
def test_apply_draws_both_and_writes_a_pipeline_with_the_edit(coneslab, tmp_path, model):
    coneslab("find", "cat", "--rounds", "3")
    coneslab("ablate", "a dog", "a cat", "--method", "uce", "--out", "dog.safetensors")
    edits = ["cat.safetensors", "dog.safetensors"]
    found = coneslab("apply", *edits, "--pictures", "1", "--save-model", "edited", "--dose", "0.5")
    assert Image.open(found["figure"]).size[0] > 100 and len(found["prompts"]) == 2
    pipe, edited = load(model, device="cpu"), load(tmp_path / "edited", device="cpu")
    first, second = map(load_edit, edits)
    with first.applied(pipe, dose=0.5), second.applied(pipe, dose=0.5):
        expected = generate(pipe, "a dog", sampler_steps=2)[0]
    assert np.array_equal(np.asarray(generate(edited, "a dog", sampler_steps=2)[0]), np.asarray(expected))
    assert "--prompt" in coneslab("apply", "dog.safetensors", "--out", "other.png")
    assert "already exists" in coneslab("apply", "dog.safetensors", "--prompt", "a dog", "--save-model", "edited")
    assert "tiny" not in found["figure"]


LONG = "a cat on the grass in the city and a dog on the beach and a car in the house"


@pytest.mark.parametrize(
    "command",
    [
        ("ablate", LONG, "a dog", "--method", "uce"),
        ("ablate", "a cat", "a dog", "--method", "uce", "--template", LONG + " {}"),
        ("ablate", "a cat", "a dog", "--method", "uce", "--other", LONG),
        ("ablate", "a cat", LONG, "--method", "model"),
        ("ablate", LONG, "a dog", "--method", "esd"),
        ("ablate", LONG, "a dog", "--method", "prune"),
        ("ablate", LONG, "a dog", "--method", "neurons"),
        ("generate", "a cat", "--sampler-steps", "1001"),
        ("find", "mine", "--class-word", "cat", "--token", "cat"),
        ("find", "mine", "--class-word", "cat", "--token", "dog"),
    ],
)
def test_what_the_model_cannot_take_is_told_in_one_line_and_nothing_is_written(
    model, small_judge, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "mine")
    assert cli.main([*command, "--model", str(model), "--device", "cpu", "--quiet"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("coneslab: ") and any(
        end in told for end in ("shorten it", "1,000", "another one", "a rare")
    )
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {f"{number}.png" for number in range(3)}


def test_what_is_left_out_is_told_in_one_line(coneslab, tmp_path, capsys, model):
    save_pictures(tmp_path / "mine")
    (tmp_path / "mine" / "IMG_1.HEIC").write_bytes(b"no picture")
    command = ["find", "mine", "--class-word", "cat", "--rounds", "1", "--model", str(model), "--device", "cpu"]
    assert cli.main([*command, "--quiet", "--sampler-steps", "1"]) == 0
    assert "coneslab: IMG_1.HEIC: left out of mine" in capsys.readouterr().err
    assert cli.main(["generate", LONG, "--model", str(model), "--device", "cpu", "--sampler-steps", "1"]) == 0
    assert "coneslab: the text encoder reads 20 tokens at most, which leaves out" in capsys.readouterr().err


def test_an_edit_of_another_model_is_refused(coneslab, tmp_path, monkeypatch):
    other = make_pipeline(tmp_path, tokens=20, seed=9)
    other.save_pretrained(tmp_path / "other")
    coneslab("find", "cat", "--rounds", "1")
    command = ["generate", "a cat", "--edit", "cat.safetensors", "--model", "other", "--device", "cpu"]
    assert cli.main(command) == 1 and not any(tmp_path.glob("pictures/*.png"))


def test_decompose_names_words_and_those_of_one_picture(coneslab, tmp_path, small_judge):
    few = ["--judge", str(small_judge), "--steps", "2", "--pictures", "3", "--top", "4"]
    found = coneslab("decompose", "a cat", *few, "--picture", "3")
    edit = load_edit(tmp_path / "a-cat.safetensors")
    assert list(found["words"].items()) == [(word, pytest.approx(share)) for word, share in edit.top(4)]
    assert found["prompt"] == edit.prompt and set(found["picture"]["words"]) <= set(edit.words)
    save_pictures(tmp_path / "mine")
    assert coneslab("decompose", "mine", *few)["file"] == "mine.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["model", "noise", "uce", "esd", "neurons", "prune"])
def test_ablate_has_every_method(method, coneslab, tmp_path):
    few = ["--steps", "1", "--pictures", "4", "--method", method]
    found = coneslab("ablate", "a cat", "a dog", *few)
    assert found["bytes"] == (tmp_path / "without-a-cat.safetensors").stat().st_size
    assert type(load_edit(tmp_path / "without-a-cat.safetensors")).__name__ == found["kind"]
    around = coneslab("ablate", "a cat", "a dog", *few, "--template", "{} on the grass", "--out", "other.safetensors")
    assert ("--template is for" in around) == (method in ("esd", "neurons", "prune"))


@pytest.mark.slow
def test_ablate_checks_whether_it_is_gone(coneslab, small_judge):
    check = ["--check", "--check-pictures", "2", "--judge", str(small_judge)]
    found = coneslab("ablate", "a cat", "a dog", "--method", "uce", "--other", "a car", *check)
    assert {row["group"] for row in found["report"]} == {"target", "anchor", "other"}
    assert {"plain prompt", "misspellings", "Textual Inversion"} <= {row["attack"] for row in found["attacks"]}
    assert all(row["low"] is None for row in found["report"] if row["measure"] == "KID")


@pytest.mark.slow
def test_the_tour_leaves_a_figure_and_an_edit(coneslab, tmp_path):
    found = coneslab("tour", "--subject", "dog", "--rounds", "1")
    assert load_edit(tmp_path / "tour" / "dog.safetensors").density == found["density"]
    assert Image.open(tmp_path / "tour" / "tour.png").size[0] > 300


# --- doctor ---------------------------------------------------------------------------------------------


def told(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["doctor", "--no-timing", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_doctor_finds_a_whole_installation_well(capsys, tmp_path):
    code, found = told(capsys)
    assert code == 0 and found["ok"]
    shown = {row["what"]: row["found"] for row in found["findings"]}
    assert f"torch {importlib.metadata.version('torch')}" in shown["libraries"]
    assert all("checksums" in shown[f"model {name!r}"] for name in pipelines.SHIPPED)
    assert cli.main(["doctor", "--no-timing", "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["ok"] and "no problems" in capsys.readouterr().out


def test_doctor_says_what_is_damaged_old_or_missing(capsys, monkeypatch):
    def damaged(folder):
        raise ConeslabError("unet/x.safetensors does not match")

    monkeypatch.setattr(pipelines, "verify", damaged)
    true, old = importlib.metadata.version, {"torch": "1.0", "tqdm": None}

    def version(name):
        if name in old and old[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return old.get(name) or true(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, found = told(capsys)
    problems = [f"{row['found']} {row['hint']}" for row in found["findings"] if row["level"] == "problem"]
    assert code == 1 and not found["ok"] and len(problems) == 4
    assert "torch is 1.0, coneslab needs >=" in problems[0] and "tqdm is not installed" in problems[1]
    assert "unet/x.safetensors" in problems[2]


@pytest.mark.slow
def test_doctor_measures_this_machine():
    shown = {finding.what: finding.found for finding in doctor.examine(device="cpu").findings}
    assert float(shown["eight pictures"].split()[0]) > 0
    assert float(shown[f"search, {doctor.ROUNDS} rounds"].split()[1]) > 0

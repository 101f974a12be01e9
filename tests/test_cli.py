"""The command line: every command explains itself and does what it says; errors are one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from small_judge import save_small_judge
from small_pipelines import make_pipeline, make_subject

from coneslab import ConeslabError, cli, generate, load, load_edit
from coneslab.cli import concepts, doctor, options, reproduce, use
from coneslab.diffusion import pipelines
from coneslab.diffusion.kvspace import KVSpace
from coneslab.edits import Combined, TokenEdit, WeightDelta
from coneslab.edits.tokens import vocabulary_fingerprint
from coneslab.methods.ablation.profile import KINDS, ProbeBudget
from coneslab.neurons import ConceptNeurons, TunedNeurons, concatenate

COMMANDS = (
    "doctor",
    "tour",
    "find",
    "generate",
    "apply",
    "decompose",
    "ablate",
    "export-web",
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_each_default_once(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in told and "(default: False)" not in told
    assert re.search(r"\(default: [^)]*\) \(default", told) is None


def test_all_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_errors_are_told_in_one_line_without_a_traceback(tmp_path, capsys):
    assert cli.main(["build-stickers", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("coneslab: ") and "@lobehub/fluent-emoji-3d" in told and "Traceback" not in told


def test_settings_that_are_no_json_are_told(capsys):
    assert cli.main(["compare", "--settings", "steps=50"]) == 2
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
        ("generate x --guidance-scale nan", "--guidance-scale: the value is nan: give a number in [1, 100]"),
        ("generate x --guidance-scale 1e30", "--guidance-scale: the value is 1e+30: give a number in [1, 100]"),
        ("generate x --guidance-scale 0.5", "--guidance-scale: the value is 0.5: give a number in [1, 100]"),
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


UNUSED = {  # commands with options that have no effect there, and what is told
    "find, a subject that is known": (
        ["find", "cat", "--class-word", "dog"],
        "--class-word has no effect on a subject",
    ),
    "find, its token": (["find", "cat", "--token", "sks"], "--token has no effect"),
    "generate, no edit": (["generate", "a cat", "--dose", "0.5"], "--dose has no effect without --edit"),
    "generate, a dose of nothing": (["generate", "a cat", "--dose", "0"], "--dose has no effect without --edit"),
    "ablate, parameters": (
        ["ablate", "a cat", "a dog", "--method", "uce", "--parameters", "all"],
        "--parameters has no effect on the method uce",
    ),
    "ablate, template": (["ablate", "a cat", "a dog", "--method", "esd", "--template", "a {}"], "--template is for"),
    "ablate, judge": (["ablate", "a cat", "a dog", "--judge", "mine"], "--judge has no effect without --check"),
    "ablate, check": (["ablate", "a cat", "a dog", "--check-pictures", "4"], "--check-pictures has no effect without"),
    "ablate, other": (["ablate", "a cat", "a dog", "--other", "a car"], "--other has no effect on the method model"),
    "judge": (
        ["evaluate-model", "judge", "--bars-only", "--kid", "9"],
        "--bars-only, --kid has no effect on the judge",
    ),
    "judge, steps": (["evaluate-model", "judge", "--sampler-steps", "9"], "--sampler-steps has no effect on the judge"),
    "tune": (["compare", "--tune", "--seeds", "2", "--counts", "1"], "--counts, --seeds has no effect with --tune"),
    "scheduler": (["compare", "--scheduler", "x:1", "--workers", "2"], "--workers has no effect with --scheduler"),
    "threads": (["experiment", "storage", "--threads", "2", "--model", "none"], "--threads has no effect without --w"),
    "subjects": (["compare", "--subjects", "cat", "--counts", "1"], "--counts has no effect with --subjects"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_options_without_effect_are_refused(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments, reason = UNUSED[name]
    assert cli.main(arguments) != 0
    told = capsys.readouterr()
    assert reason in told.err and "Traceback" not in told.err and not list(tmp_path.iterdir())


# --- manners --------------------------------------------------------------------------------------------


def runs(monkeypatch: pytest.MonkeyPatch, what: Callable[[Any], Any]) -> None:
    """Let `coneslab doctor` do something else."""
    monkeypatch.setattr(use, "_doctor", what)


def fails(error: BaseException) -> Callable[[Any], Any]:
    def fail(_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConeslabError("two\nlines: do this"), 2, "coneslab: two lines: do this\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "coneslab: [Errno 2] No such file: 'x'\n"),
        (TypeError("int is not str"), 2, "coneslab: something unforeseen went wrong (TypeError: int is not str)"),
        (RecursionError("deep"), 2, "coneslab: something unforeseen"),
        (KeyboardInterrupt(), 130, "coneslab: interrupted\n"),
        (ConeslabError("\udcff"), 2, "coneslab: \\udcff\n"),
    ],
)
def test_an_error_of_any_kind_is_one_sentence(error, code, said, monkeypatch, capsys):
    runs(monkeypatch, fails(error))
    assert cli.main(["doctor"]) == code
    told = capsys.readouterr().err
    assert told.startswith(said) and told.count("\n") == 1


def test_a_traceback_is_shown_to_who_asks_for_it(monkeypatch):
    runs(monkeypatch, fails(TypeError("int is not str")))
    monkeypatch.setenv("CONESLAB_TRACEBACK", "1")
    with pytest.raises(TypeError, match="int is not str"):
        cli.main(["doctor"])


def test_arguments_that_are_no_text_are_told(capsys):
    for arguments in (["generate", "a \udcff cat"], ["find", "\udcff"], ["doctor", "--json", "\udcff"]):
        assert cli.main(arguments) == 2
        assert "no UTF-8 text" in capsys.readouterr().err


def test_a_terminal_that_knows_ascii_alone_is_no_error(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    runs(monkeypatch, lambda arguments: use.teller(arguments)("“a ½ cat” → \udcff") or {"ok": True})
    assert cli.main(["doctor"]) == 0
    assert raw.getvalue() == b'"a \\xbd cat" -> \\udcff\n'


@pytest.mark.parametrize("json_too", [False, True])
def test_work_goes_on_when_nobody_reads_what_is_printed(json_too, monkeypatch, tmp_path):
    ends = os.pipe()
    os.close(ends[0])
    monkeypatch.setattr(sys, "stdout", os.fdopen(ends[1], "w"))
    done = []

    def work(arguments: Any) -> dict[str, Any]:
        say = use.teller(arguments)
        for number in range(3):
            say(number)
            done.append(number)
        return {"ok": True}

    runs(monkeypatch, work)
    code = cli.main(["doctor", *(["--json"] if json_too else [])])
    assert done == [0, 1, 2] and code == 0
    sys.stdout.close()  # as at the end of the program: no complaint


@pytest.mark.parametrize("full", [True, False])
def test_an_output_that_takes_nothing_is_told_without_a_traceback(full, monkeypatch, capsys):
    runs(monkeypatch, lambda arguments: use.teller(arguments)("x" * 9) or {"ok": True})
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w") if full else None)  # None: `>&-` in a shell
    assert cli.main(["doctor"]) == (2 if full else 0)
    assert ("No space left on device" in capsys.readouterr().err) == full
    if full:
        sys.stdout.close()  # as at the end of the program: no complaint


def test_a_closed_pipe_elsewhere_is_no_traceback(monkeypatch, capsys):
    runs(monkeypatch, fails(BrokenPipeError(32, "Broken pipe")))
    with contextlib.suppress(OSError):
        assert cli.main(["doctor"]) == 141
    assert "Traceback" not in capsys.readouterr().err


def test_a_json_file_is_not_written_over_unless_told_to(monkeypatch, tmp_path, capsys):
    runs(monkeypatch, lambda _: {"ok": True, "name": "new"})
    file = tmp_path / "found.json"
    file.write_text("old")
    assert cli.main(["doctor", "--json", str(file)]) == 2 and file.read_text() == "old"
    assert "already exists" in capsys.readouterr().err
    assert cli.main(["doctor", "--json", str(file), "--force"]) == 0
    assert json.loads(file.read_text()) == {"ok": True, "name": "new"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["doctor", "--json", "~/other.json"]) == 0 and (tmp_path / "other.json").is_file()


WRONG_OUTPUTS = [
    (["find", "cat", "--out", "folder"], "is a folder"),
    (["find", "cat", "--out", "file/x.safetensors"], "is not a folder"),
    (["find", "cat", "--out", "/proc/none/x.safetensors"], "could not be written"),
    (["find", "cat", "--out", "x" * 300 + ".safetensors"], "could not be written"),
    (["find", "cat", "--out", "cat.png"], "does not end in .safetensors"),
    (["find", "cat", "--out", "a.safetensors", "--json", "a.safetensors"], "written twice"),
    (["find", "cat", "--json", "file/x.json"], "is not a folder"),
    (["tour", "--out", "file"], "is not a folder"),
    (["generate", "a cat", "--out", "file"], "is not a folder"),
    (["decompose", "a cat", "--out", "folder"], "is a folder"),
    (["ablate", "a cat", "a dog", "--out", "words.txt"], "does not end in .safetensors"),
    (["apply", "x", "--out", "figure.jpg"], "does not end in .png"),
    (["apply", "x", "--save-model", "file"], "is a file"),
    (["apply", "x", "--save-model", "folder", "--force"], "holds other things, which would be lost"),
    (["experiment", "precision", "--out", "folder"], "is a folder"),
    (["experiment", "precision", "--masks", "file"], "is a file"),
    (["experiment", "precision", "--out", "file"], "has the columns x, cells need subject, seed"),
    (["compare", "--out", "folder"], "is a folder"),
    (["compare", "--kept", "file"], "is a file"),
    (["compare-samplers", "tiny", "--sampler", "DDIM,2", "--out", "table.csv"], "already exists"),
    (["compare-samplers", "tiny", "--sampler", "DDIM,2", "--out", "table.txt"], "does not end in .csv"),
    (["evaluate-model", "tiny", "--json", "file"], "already exists"),
    (["pretrain", "vae", "--runs", "file"], "is a file"),
    (["pretrain", "all", "--models", "file"], "is a file"),
]
WRONG_INPUTS = [
    (["find", "file"], "is a file: give a folder of pictures"),
    (["find", "folder"], "--class-word"),
    (["find", "folder", "--class-word", "cat"], "holds no picture"),
    (["find", "unicorn"], "not a subject"),
    (["tour", "--subject", "file"], "not a subject"),
    (["generate", "a cat", "--edit", "file"], "not a complete safetensors file"),
    (["generate", "a cat", "--edit", "folder"], "is a folder"),
    (["generate", "a cat", "--edit", "none"], "there is no file none"),
    (["generate", "a cat", "--edit", "~/none"], "/none"),
    (["generate", "a cat", "a cat?"], "given twice"),
    (["apply", "file"], "not a complete safetensors file"),
    (["apply", "link"], "link to nothing"),
    (["decompose", "file"], "is a file: give a folder of pictures, or a prompt"),
    (["decompose", "folder"], "holds no picture"),
    (["decompose", "a cat", "--judge", "file"], "as a judge, expected"),
    (["ablate", "a cat", "a dog", "--method", "esd", "--template", "{}"], "--template is for"),
    (["ablate", "a cat", "a dog", "--check", "--judge", "none"], "as a judge, expected"),
    (["experiment", "nothing"], "not an experiment"),
    (["experiment", "precision", "--subjects", "cat,unicorn"], "not a subject"),
    (["compare", "--counts", "7"], "no combinations of 7"),
    (["compare", "--methods", "magic"], "no such method"),
    (["compare", "--subjects", "cat+unicorn"], "not a subject"),
    (["compare", "--settings", "[1]"], "give a JSON object"),
    (
        ["compare", "--methods", "Cones, float", "--settings", '{"steps": 5}'],
        "steps, which 'Cones, float' does not take",
    ),
    (["compare", "--settings", "[" * 100_000], "give JSON"),
    (["compare", "--model", "file"], "there is no model"),
    (["compare", "--judge", "file"], "as a judge, expected"),
    (["evaluate-model", "file"], "there is no model"),
    (["compare-samplers", "tiny", "--sampler", "DDIM,nan"], "give NAME,STEPS"),
    (["compare-samplers", "tiny", "--sampler", "DDIM,2.5"], "give NAME,STEPS"),
    (["compare-samplers", "tiny", "--sampler", "DDIM"], "give NAME,STEPS"),
    (["compare-samplers", "tiny", "--sampler", "magic,2"], "choose one of DDIM"),
    (["compare-samplers", "file", "--sampler", "DDIM,2"], "there is no model"),
    (["build-stickers", "file"], "holds no"),
    (["pretrain", "unet", "--set", "a.b=c"], "the recipe has no value"),
    (["pretrain", "export", "--trial", "x"], "--trial has no effect with pretrain export"),
    (["pretrain", "unet", "--trial", "x", "--judge", "none"], "as a judge, expected"),
]


def _name(given: Any) -> str:
    return " ".join(given)[:60] if isinstance(given, list) else "-"


@pytest.mark.parametrize(("arguments", "said"), WRONG_OUTPUTS + WRONG_INPUTS, ids=_name)
def test_what_can_be_checked_is_checked_before_anything_is_loaded(arguments, said, monkeypatch, tmp_path, capsys):
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model or a cluster was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(use, "load_pipeline", loaded)
    for name in (
        "coneslab.diffusion.load",
        "coneslab.measure.load_judge",
        "coneslab.experiments.dask_client",
        "coneslab.experiments.cluster._loaded",
    ):
        monkeypatch.setattr(name, loaded)
    monkeypatch.setattr("coneslab.pretraining.run.train_vae", loaded)
    monkeypatch.setattr("coneslab.pretraining.run.train_unet", loaded)
    (tmp_path / "file").write_text("x\n")
    (tmp_path / "table.csv").write_text("x\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note.txt").write_text("x")
    (tmp_path / "link").symlink_to("nothing")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith("coneslab: ") and told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "x\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiment", "controls", "--seeds", "0"],
        ["experiment", "controls", "--rounds", "-1"],
        ["experiment", "controls", "--finetune-steps", "0"],
        ["compare", "--seeds", "0"],
        ["compare", "--counts", "1,0"],
        ["compare", "--counts", "two"],
        ["compare", "--threads", "0"],
        ["evaluate-model", "tiny", "--limit", "-1"],
        ["evaluate-model", "tiny", "--batch-size", "0"],
        ["compare-samplers", "tiny", "--sampler", "DDIM,2", "--seeds", "0"],
        ["pretrain", "unet", "--minutes", "0"],
        ["pretrain", "unet", "--minutes", "nan"],
    ],
    ids=" ".join,
)
def test_no_command_counts_to_nothing(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and ("give a positive" in told or "give a whole number" in told)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--counts", "1,,2"],
        ["compare", "--workers", "-1"],
        ["experiment", "precision", "--rounds", "many"],
        ["evaluate-model", "tiny", "--kid", "-1"],
        ["evaluate-model", "tiny", "--guidance-scale", "nan"],
        ["generate", "a cat", "--dose", "inf"],
        ["find", "cat", "--rounds", "9" * 5000],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_numbers_are_read_before_anything_begins(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and arguments[-2] in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:99", "xla", "privateuseone"])
def test_a_device_that_cannot_compute_is_told(device, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["generate", "a cat"], ["evaluate-model", "tiny"], ["experiment", "precision", "--out", "t.csv"]):
        assert cli.main([*arguments, "--device", device]) == 2
        assert f"device {device!r} cannot be used here" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def table_of(*errors: str | None) -> pandas.DataFrame:
    rows = []
    for seed, error in enumerate(errors):
        cell = {"subject": "cat", "condition": "untouched model", "seed": seed}
        for measure in ("text alignment", "image alignment") if error is None else (None,):
            rows.append({**cell, "count": 1, "measure": measure, "value": 0.5} if measure else {**cell, "error": error})
    return pandas.DataFrame(rows)


@pytest.mark.parametrize(
    ("errors", "code", "said"),
    [
        (("ValueError: a", "b"), 2, "all 2 cells failed, the first with “ValueError: a”"),
        ((None, "b"), 2, "1 cells failed, the first with “b”"),
        ((None, None), 0, ""),
    ],
)
def test_a_comparison_says_which_cells_failed(errors, code, said, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("coneslab.experiments.dask_client", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("coneslab.experiments.compare_methods", lambda *_, **__: table_of(*errors))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--out", "t.csv", "--kept", "kept"]) == code
    told = capsys.readouterr()
    assert said in told.err and ("0.500 / 0.500" in told.out) == (None in errors)


def test_titles_may_have_spaces():
    assert reproduce._listed("cat, dog + house") == ["cat", "dog + house"]
    from coneslab.experiments.comparison import require_comparison
    from coneslab.experiments.registry import require_experiment

    assert require_comparison(None, ["DreamBooth"], [1], ["cat + dog"], None)[1] == ["cat+dog"]
    assert list(require_experiment("together", ["cat + dog"])[0]) == ["cat+dog"]


def union_of(pipe: Any, title: str) -> ConceptNeurons:
    space = KVSpace(pipe)
    return ConceptNeurons(space.layout, [0, 1], [0.0, 0.0], space.fingerprint(), subject=title)


@pytest.mark.parametrize(
    "make",
    [
        lambda pipe: union_of(pipe, "cat + dog"),
        lambda pipe: union_of(pipe, "cat+dog"),
        lambda pipe: concatenate(union_of(pipe, "dog"), union_of(pipe, "cat")),
        lambda pipe: TunedNeurons(union_of(pipe, "cat + dog"), np.zeros(2)),
        lambda pipe: Combined((union_of(pipe, "cat"), union_of(pipe, "dog"))),
        lambda pipe: Combined(
            (TokenEdit(("sks",), torch.ones(1, 2), "a"), WeightDelta({"w": torch.ones(1)}, "a", subject="cat, dog"))
        ),
    ],
)
def test_a_union_says_what_to_draw(make, v_pipe, tmp_path):
    edit = load_edit(make(v_pipe).save(tmp_path / "union.safetensors"))
    assert use._prompts_of([edit]) == [
        "a sks cat on the beach",
        "a sks cat in the city",
        "a zwx dog on the beach",
        "a zwx dog in the city",
    ]


def test_a_subject_of_your_own_is_drawn_by_its_own_words_whatever_its_name(v_pipe):
    own = replace(union_of(v_pipe, "cat"), settings={"prompt": "a zwx hamster"})
    told = ["a zwx hamster on the beach", "a zwx hamster in the city"]
    assert use._prompts_of([own]) == use._prompts_of([Combined((own, own))]) == told
    assert use._prompts_of([replace(own, settings={"prompt": "a cat"})]) == ["a cat"]


def test_an_edit_that_does_not_say_what_to_draw_is_told():
    with pytest.raises(ConeslabError, match="--prompt"):
        use._prompts_of([SimpleNamespace(subject="unicorn"), SimpleNamespace()])


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_hint_can_be_typed_as_it_is(coneslab, tmp_path, model, monkeypatch, capsys):
    name = "my $cat's `edit`.safetensors"
    options = ["--model", str(model), "--device", "cpu", "--quiet", "--sampler-steps", "1"]
    assert cli.main(["find", "cat", "--rounds", "1", *options, "--out", name]) == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("try it:")]
    shell = ["bash", "-c", f"printf '%s\\n' {hint.removeprefix('try it:')}"]
    typed = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert typed == ["coneslab", "generate", "a sks cat on the beach", "--edit", name, "--model", str(model)]
    assert cli.main([*typed[1:], *options]) == 0 and len(list((tmp_path / "pictures").iterdir())) == 1


@pytest.mark.slow
def test_what_no_weights_can_hold_is_not_saved_as_a_model(coneslab, tmp_path, model):
    pipe = load(model, device="cpu")
    at_words = union_of(pipe, "cat").at("sks", "cat")
    for edit in (at_words, Combined((union_of(pipe, "dog"), at_words))):
        file = edit.save(tmp_path / "at_words.safetensors")
        assert "acts at some words only" in coneslab("apply", str(file), "--save-model", "edited")
    assert not (tmp_path / "edited").exists() and not (tmp_path / "applied.png").exists()
    vectors = torch.ones(1, pipe.text_encoder.config.hidden_size)
    token = TokenEdit(("<mine>",), vectors, vocabulary_fingerprint(pipe)).save(tmp_path / "token.safetensors")
    found = coneslab("apply", str(token), "--prompt", "a <mine> cat", "--pictures", "1", "--save-model", "edited")
    with load_edit(token).applied(pipe):
        expected = generate(pipe, "a <mine> cat", sampler_steps=2)[0]
    drawn = generate(load(found["model"], device="cpu"), "a <mine> cat", sampler_steps=2)[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


@pytest.mark.slow
def test_an_edit_that_changes_no_picture_is_told(coneslab, tmp_path, model, capsys):
    pipe = load(model, device="cpu")
    union_of(pipe, "cat").at("sks", "cat").save(tmp_path / "cat.safetensors")
    union_of(pipe, "dog").save(tmp_path / "dog.safetensors")
    options = ["--model", str(model), "--device", "cpu", "--quiet", "--sampler-steps", "1", "--force"]
    told = "cat.safetensors changes nothing here: it acts at “sks cat” alone"
    for prompt, edits, idle in (
        ("a dog", ["cat"], True),
        ("a Cat, at night", ["cat"], False),
        ("a dog", ["dog"], False),
        ("a dog", ["dog", "cat"], True),
    ):
        given = [word for name in edits for word in ("--edit", f"{name}.safetensors")]
        assert cli.main(["generate", prompt, *given, *options]) == 0
        assert (told in capsys.readouterr().out) == idle, (prompt, edits)
    assert cli.main(["apply", "cat.safetensors", "--prompt", "a dog", "--pictures", "1", *options]) == 0
    assert told in capsys.readouterr().out


def test_a_part_that_acts_everywhere_keeps_an_edit_from_being_idle(v_pipe):
    at_words, everywhere = union_of(v_pipe, "cat").at("sks", "cat"), union_of(v_pipe, "cat")
    token = TokenEdit(("<mine>",), torch.ones(1, 2), "a")
    assert use._needed(Combined((at_words, Combined((token,))))) == [("sks", "cat"), ("<mine>",)]
    assert use._needed(Combined((at_words, everywhere))) == use._needed(Combined(())) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("find", "./mine"),
        ("find", "~/mine"),
        ("find", "mine/"),
        ("find", "{here}/mine"),
        ("find", "mine", "--class-word", "cat"),
        ("decompose", "./mine"),
        ("decompose", "{here}/mine"),
    ],
)
def test_a_folder_that_is_not_there_is_no_subject_and_no_prompt(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(use, "load_pipeline", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(concepts, "load_pipeline", lambda *_: pytest.fail("loaded"))
    assert cli.main([word.format(here=tmp_path) for word in arguments]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_prompt_may_have_a_slash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not options.is_folder("a cat/dog", "a prompt") and not options.is_folder("a cat on the beach", "a prompt")


def test_long_texts_with_one_beginning_have_file_names_of_their_own():
    start = "a cat on the beach and a dog in the city and a car in the house"
    names = {options.file_name(f"{start} {end}") for end in ("at night", "at noon")}
    assert len(names) == 2 and all(len(name) < 80 for name in names)
    assert options.file_name("a cat!") == "a-cat"


@pytest.mark.slow
def test_find_takes_a_folder_of_pictures(coneslab, tmp_path):
    save_pictures(tmp_path / "mine")
    assert "--class-word" in coneslab("find", "mine", "--rounds", "1")
    found = coneslab(
        "find", "mine", "--class-word", "cat", "--token", "sks", "--rounds", "1", "--out", "a/b.safetensors"
    )
    assert found["file"] == "a/b.safetensors" and load_edit(tmp_path / "a" / "b.safetensors").subject == "mine"


@pytest.mark.slow
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


@pytest.mark.slow
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
        end in told for end in ("shorten it", "1,000", "another one", "a rare", "different ones")
    )
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {f"{number}.png" for number in range(3)}


@pytest.mark.slow
@pytest.mark.filterwarnings("always:the text encoder reads:coneslab.errors.ConeslabWarning")
def test_what_is_left_out_is_told_in_one_line(coneslab, tmp_path, capsys, model):
    save_pictures(tmp_path / "mine")
    (tmp_path / "mine" / "IMG_1.HEIC").write_bytes(b"no picture")
    command = ["find", "mine", "--class-word", "cat", "--rounds", "1", "--model", str(model), "--device", "cpu"]
    assert cli.main([*command, "--quiet", "--sampler-steps", "1"]) == 0
    assert "coneslab: IMG_1.HEIC: left out of mine" in capsys.readouterr().err
    assert cli.main(["generate", LONG, "--model", str(model), "--device", "cpu", "--sampler-steps", "1"]) == 0
    assert "coneslab: the text encoder reads 20 tokens at most, which leaves out" in capsys.readouterr().err


@pytest.mark.slow
def test_an_edit_of_another_model_is_refused(coneslab, tmp_path, monkeypatch):
    other = make_pipeline(tmp_path, tokens=20, seed=9)
    other.save_pretrained(tmp_path / "other")
    coneslab("find", "cat", "--rounds", "1")
    command = ["generate", "a cat", "--edit", "cat.safetensors", "--model", "other", "--device", "cpu"]
    assert cli.main(command) == 2 and not any(tmp_path.glob("pictures/*.png"))


@pytest.mark.slow
def test_decompose_names_words_and_those_of_one_picture(coneslab, tmp_path, small_judge):
    few = ["--judge", str(small_judge), "--steps", "2", "--pictures", "3", "--top", "4"]
    found = coneslab("decompose", "a cat", *few, "--picture", "3")
    edit = load_edit(tmp_path / "a-cat.safetensors")
    assert list(found["words"].items()) == [(word, pytest.approx(share)) for word, share in edit.top(4)]
    assert found["prompt"] == edit.prompt and set(found["picture"]["words"]) <= set(edit.words)
    save_pictures(tmp_path / "mine")
    assert coneslab("decompose", "mine", *few)["file"] == "mine.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("a cat", "A Cat"), ("a cat", "a cat")])
@pytest.mark.parametrize("method", ["model", "noise", "uce", "esd", "neurons", "prune"])
def test_ablate_writes_no_edit_that_does_nothing(method, pair, coneslab, tmp_path):
    told = coneslab("ablate", *pair, "--method", method, "--out", "edit.safetensors")
    assert "the same or empty for this model" in told and not (tmp_path / "edit.safetensors").exists()


@pytest.mark.parametrize("pair", [(" ", "a cat"), ("a cat", "")])
def test_ablate_refuses_a_text_without_words(pair, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ablate", *pair])
    assert stop.value.code == 2 and "error: argument" in capsys.readouterr().err


@pytest.mark.slow
def test_what_has_no_effect_is_told(coneslab, tmp_path, capsys):
    arguments = ["--model", str(tmp_path / "model"), "--device", "cpu", "--quiet"]
    make_pipeline(tmp_path, tokens=20).save_pretrained(tmp_path / "model")
    assert cli.main(["ablate", "a cat", "a dog", "--method", "uce", "--steps", "9", "--pictures", "4", *arguments]) == 0
    assert "--steps, --pictures has no effect on the method uce: nothing is trained" in capsys.readouterr().out
    assert cli.main(["find", "cat", "--rounds", "1", "--sampler-steps", "1", *arguments]) == 0
    assert "no neuron is shut, so the edit does nothing" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", concepts.ABLATIONS)
def test_ablate_has_every_method(method, coneslab, tmp_path):
    few = ["--steps", "1", "--pictures", "4", "--method", method]
    found = coneslab("ablate", "a cat", "a dog", *few)
    assert found["bytes"] == (tmp_path / "without-a-cat.safetensors").stat().st_size
    assert type(load_edit(tmp_path / "without-a-cat.safetensors")).__name__ == found["kind"]
    around = coneslab("ablate", "a cat", "a dog", *few, "--template", "{} on the grass", "--out", "other.safetensors")
    assert ("--template is for" in around) == (method in ("esd", "neurons", "prune"))


@pytest.mark.slow
def test_ablate_checks_whether_it_is_gone(coneslab, small_judge, monkeypatch):
    for name in ("rounds", "inversion_steps", "finetune_steps"):  # what probes search and train
        monkeypatch.setitem(ProbeBudget.__init__.__kwdefaults__, name, 1)
    check = ["--check", "--check-pictures", "2", "--judge", str(small_judge)]
    found = coneslab("ablate", "a cat", "a dog", "--method", "uce", "--other", "a car", *check)
    assert {row["group"] for row in found["report"]} == {"target", "anchor", "other", *KINDS}
    assert {"plain prompt", "misspellings", "Textual Inversion"} <= {row["prompt"] for row in found["report"]}
    assert found["verdict"] in ("never there", "not gone", "avoiding", "removing", "undecided")
    assert all(row["low"] is None for row in found["report"] if row["measure"] == "KID")


@pytest.mark.slow
def test_a_judge_that_cannot_be_loaded_is_told_before_anything_is_trained(coneslab, small_judge, monkeypatch, tmp_path):
    (small_judge / "model.safetensors").rename(tmp_path / "kept")
    (small_judge / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(concepts, "_ablated", lambda *_: pytest.fail("trained"))
    try:
        told = coneslab("ablate", "a cat", "a dog", "--method", "uce", "--check", "--judge", str(small_judge))
    finally:
        (tmp_path / "kept").replace(small_judge / "model.safetensors")
    assert str(small_judge) in told


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
    assert float(shown["eight pictures"].split()[1]) > 0
    assert float(shown[f"search, {doctor.ROUNDS} rounds"].split()[1]) > 0


def test_python_runs_the_package_as_the_command_does():
    command = [sys.executable, "-m", "coneslab", "find", "cat", "--rounds", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "coneslab find: error: argument --rounds: the value is 'none'" in done.stderr

"""Methods behind one interface, and their table: shared parts, your own method, settings by trials, resuming."""

import json
import os
import socket
import warnings
from contextlib import suppress
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from small_judge import save_small_judge
from small_pipelines import weights_of

from coneslab.cli import main
from coneslab.diffusion.sampling import generate
from coneslab.edits.base import Combined
from coneslab.edits.weights import WeightDelta, model_fingerprint
from coneslab.errors import ArgumentError, ConeslabError, WorldError
from coneslab.experiments import cluster, comparison
from coneslab.experiments.methods import METHODS, Method, chosen_settings, make_edit
from coneslab.experiments.setting import neurons, stored_bytes
from coneslab.neurons.search import find_concept_neurons
from coneslab.neurons.union import joint_prompt
from coneslab.world.subjects import TUNING_SUBJECTS, subjects_of

SHORT = {
    "Cones, float": {"rounds": 2, "rate": 0.6, "threshold_quantile": 0.9},
    "Cones, binary": {"rounds": 2, "rate": 0.6, "threshold_quantile": 0.9},
    "Cones + collaborative tuning": {"rounds": 2, "rate": 0.6, "threshold_quantile": 0.9, "tuning_steps": 1},
    "Cones, token-local": {"rounds": 2, "rate": 0.6, "threshold_quantile": 0.9},
    "Textual Inversion": {"steps": 1},
    "DreamBooth": {"steps": 1, "batch_size": 2, "prior_batch_size": 2},
    "LoRA, joint": {"steps": 1, "batch_size": 2, "prior_batch_size": 2},
    "LoRA, merged": {"steps": 1, "batch_size": 2, "prior_batch_size": 2},
    "Custom Diffusion, joint": {"steps": 1, "batch_size": 2, "prior_batch_size": 2},
    "Custom Diffusion, merged": {"steps": 1, "batch_size": 2, "prior_batch_size": 2},
}


def test_the_control_is_the_model_as_it_is(world_pipe):
    before = weights_of(world_pipe)
    edit, _ = make_edit("untouched model", world_pipe, subjects_of("cat+dog"))
    with edit.applied(world_pipe):
        assert all(torch.equal(before[key], now) for key, now in weights_of(world_pipe).items())
    assert stored_bytes(edit) == 0 and METHODS.keys() - {"untouched model"} == SHORT.keys()


@pytest.mark.slow
@pytest.mark.parametrize("title", ["cat", "cat+dog"])
@pytest.mark.parametrize("name", SHORT)
def test_every_method_makes_an_edit_that_goes_on_and_off(name, title, world_pipe, tmp_path):
    subjects, before = subjects_of(title), weights_of(world_pipe)
    edit, seconds = make_edit(name, world_pipe, subjects, folder=tmp_path, **SHORT[name])
    assert seconds > 0 and edit.nbytes > 0
    prompt, plain = joint_prompt(subjects), generate(world_pipe, joint_prompt(subjects), sampler_steps=1)
    with edit.applied(world_pipe):
        assert generate(world_pipe, prompt, sampler_steps=1) != plain
    assert generate(world_pipe, prompt, sampler_steps=1) == plain
    now = weights_of(world_pipe)
    assert before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in before)


CALLS = []  # of the method below: what was made, in order


def single(pipe, about, *, seed, size=1.0):
    CALLS.append((about.name, seed, size))
    name, weight = next(iter(pipe.unet.named_parameters()))
    return WeightDelta({name: torch.full_like(weight, size)}, model_fingerprint(pipe), subject=about.name)


def at_once(pipe, subjects, *, seed, size=1.0):
    return single(pipe, subjects[0], seed=seed, size=size)


def first(pipe, subjects, edits, *, seed, turned=False):
    return edits[-1 if turned else 0]


@pytest.fixture
def calls():
    CALLS.clear()
    return CALLS


def test_single_edits_are_made_once_and_their_seconds_count_every_time(world_pipe, tmp_path, calls):
    own = Method(first, single, ("turned",))
    both, turned = subjects_of("cat+dog"), {"turned": True}
    edit, seconds = make_edit(own, world_pipe, both, folder=tmp_path)
    again, later = make_edit(own, world_pipe, both, folder=tmp_path, **turned)
    assert (edit.subject, again.subject) == ("cat", "dog")
    assert [(name, size) for name, _, size in calls] == [("cat", 1.0), ("dog", 1.0)] and later >= 0.5 * seconds
    make_edit(own, world_pipe, both, folder=tmp_path, seed=1)  # another seed, other settings, no folder: made anew
    make_edit(own, world_pipe, both, folder=tmp_path, size=2.0)
    make_edit(own, world_pipe, both)
    assert len(calls) == 8


def test_edits_of_several_subjects_at_once_are_kept_too_unless_they_are_as_large_as_the_model(
    world_pipe, tmp_path, calls
):
    both, options = subjects_of("cat+dog"), {"folder": tmp_path}
    edit, seconds = make_edit(Method(at_once), world_pipe, both, **options)
    assert make_edit(Method(at_once), world_pipe, both, **options) == (edit, seconds) and len(calls) == 1
    make_edit(Method(at_once), world_pipe, subjects_of("dog+cat"), **options)  # their order is part of the seed
    make_edit(Method(at_once), world_pipe, both[:1], **options)
    make_edit(Method(at_once), world_pipe, both, seed=1, **options)
    make_edit(Method(at_once), world_pipe, both, size=2.0, **options)
    assert len(calls) == 5 and METHODS["LoRA, joint"].keep
    make_edit(Method(at_once, keep=False), world_pipe, both, **options)
    assert len(calls) == 6 and not METHODS["DreamBooth"].keep


def joined(pipe, subjects, edits, *, seed, size=1.0):
    CALLS.append(("+".join(about.name for about in subjects), seed, size))
    return Combined(tuple(edits), size) if len(edits) > 1 else edits[0]


def test_what_is_joined_of_single_edits_is_kept_too(world_pipe, tmp_path, calls):
    own, both, options = Method(joined, single, ("size",)), subjects_of("cat+dog"), {"folder": tmp_path}
    edit, seconds = make_edit(own, world_pipe, both, **options)
    assert make_edit(own, world_pipe, both, **options) == (edit, seconds)
    assert [name for name, _, _ in calls] == ["cat", "dog", "cat+dog"]
    make_edit(own, world_pipe, both, size=0.5, **options)  # of the joining alone: the parts are those from before
    assert [(name, size) for name, _, size in calls[3:]] == [("cat+dog", 0.5)]
    other = Method(joined, at_another_size, ("size",))  # which makes other parts
    assert make_edit(other, world_pipe, both, **options)[0] != edit and len(calls) == 7
    make_edit(own, world_pipe, both[:1], **options)
    assert len(list(tmp_path.glob("cat-0-*.safetensors"))) == 2  # one of each size: what is joined of one is that one


def at_another_size(pipe, about, *, seed):
    return single(pipe, about, seed=seed, size=3.0)


def test_what_a_function_depends_on_must_be_seen_for_its_edit_to_be_kept(world_pipe, tmp_path, calls):
    def of_size(size):
        def made(pipe, subjects, *, seed):
            return single(pipe, subjects[0], seed=seed, size=size)

        return made

    for size in (1.0, 2.0):  # two functions of one name and one text
        make_edit(Method(of_size(size)), world_pipe, subjects_of("cat"), folder=tmp_path)
        make_edit(Method(partial(at_once, size=size)), world_pipe, subjects_of("cat"), folder=tmp_path)
    assert [size for _, _, size in calls] == [1.0, 1.0, 2.0, 2.0] and not list(tmp_path.iterdir())
    for size in (1.0, 2.0):  # one that was changed, as in a notebook
        file = tmp_path / f"size_{size}.py"
        file.write_text(
            f"def made(pipe, subjects, *, seed):\n    return make(pipe, subjects[0], seed=seed, size={size})\n"
        )
        names = {"__name__": "__main__", "make": single}
        exec(compile(file.read_text(), file, "exec"), names)
        make_edit(Method(names["made"]), world_pipe, subjects_of("cat"), folder=tmp_path)
    assert [size for _, _, size in calls[4:]] == [1.0, 2.0] and len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.fixture(scope="module")
def folders(world_pipe, tmp_path_factory):
    model = tmp_path_factory.mktemp("saved")
    world_pipe.save_pretrained(model)
    return {"model": str(model), "judge": str(save_small_judge(tmp_path_factory.mktemp("saved_judge")))}


def broken(pipe, subjects, *, seed):
    raise RuntimeError("no luck")


@pytest.mark.slow
def test_bytes_are_those_of_the_smallest_file(world_pipe, tmp_path):
    mask, _ = make_edit("Cones, binary", world_pipe, subjects_of("cat"), folder=tmp_path, **SHORT["Cones, binary"])
    assert stored_bytes(mask) == len(mask.to_bytes()) < mask.nbytes
    weight = WeightDelta({"a": torch.zeros(3, 4)}, "ab" * 32)
    assert stored_bytes(weight) == 48 and np.isnan(stored_bytes(object()))


@pytest.mark.slow
def test_your_own_method_joins_the_table_and_a_broken_one_does_not_stop_it(folders, tmp_path, calls):
    path = tmp_path / "table.csv"
    methods = {"mine": Method(first, single), "broken": Method(broken)}
    options = {"methods": methods, "subjects": ["cat", "cat+dog"], "seeds": 1, "pictures": 1, "progress": False}
    table = comparison.compare_methods(path, **options, **folders)
    failed = table[table.error.notna()]
    assert list(failed.condition) == ["broken", "broken"] and set(failed.error) == {"RuntimeError: no luck"}
    good = table[table.error.isna()]
    assert set(good.condition) == {"mine"} and (good["bytes"] > 0).all() and np.isfinite(good.value).all()
    assert good.groupby("subject")["count"].first().to_dict() == {"cat": 1, "cat+dog": 2}
    made = len(calls)
    again = comparison.compare_methods(path, **options, **folders)
    assert len(calls) == made and again.error.notna().sum() == 2  # only the broken cells were tried again
    shown = comparison.paper_table(table)
    one = good[good.subject == "cat"].set_index("measure").value
    assert shown.loc["mine", 1] == f"{one['text alignment']:.3f} / {one['image alignment']:.3f}"


@pytest.mark.slow
def test_settings_are_chosen_by_alignments_and_complete_pictures(folders, tmp_path, monkeypatch, calls):
    path = tmp_path / "settings.json"
    own = Method(first, single, choices={"size": (0.1, 0.2, 0.3)})
    monkeypatch.setitem(METHODS, "own", own)
    best = {0.1: 0.5, 0.2: 0.9, 0.3: 0.4}

    def measured(pipe, judge, about, edit, **how):
        size = round(float(next(iter(edit.deltas.values())).flatten()[0]), 3)
        return {"text alignment": best[size], "image alignment": 0.1, "concept loss": -10 * size}

    monkeypatch.setattr(comparison, "measure", measured)
    options = {"methods": ["own", "untouched model"], "subjects": ["cat", "dog"], "progress": False}
    assert comparison.tune_methods(path, **options, **folders) == {"one subject": {"own": {"size": 0.2}}}
    assert json.loads(path.read_text()) == {"one subject": {"own": {"size": 0.2}}}
    trials = pandas.read_csv(path.with_suffix(".csv"))
    assert trials.groupby(["subject", "trial"]).ngroups == 6 and len(calls) == 6
    monkeypatch.setitem(METHODS, "second", own)
    best = {0.1: 0.95, 0.2: 0.9, 0.3: 0.4}
    both = {"one subject": {"own": {"size": 0.2}, "second": {"size": 0.1}}}  # the first one's settings are kept
    assert comparison.tune_methods(path, **options | {"methods": ["second"]}, **folders) == both
    assert json.loads(path.read_text()) == both
    best = {0.1: 0.4, 0.2: 0.5, 0.3: 0.9}  # together the largest does best, which changes nothing alone
    monkeypatch.setattr(comparison, "measure_together", lambda setting, about, edit, seed: measured(0, 0, about, edit))
    both["several subjects"] = {"own": {"size": 0.3}}
    assert comparison.tune_methods(path, **options | {"subjects": ["cat+dog"]}, **folders) == both
    path.with_suffix(".csv").unlink()
    found = {0.1: 0.9, 0.2: 0.6, 0.3: 0.3}  # but with complete pictures it is the smallest: 1.4, then 1.2 and 1.3

    def complete(setting, about, edit, seed):
        values = measured(0, 0, about, edit)
        size = next(size for size in best if best[size] == values["text alignment"])
        return values | {"every subject found": found[size]}

    monkeypatch.setattr(comparison, "measure_together", complete)
    both["several subjects"] = {"own": {"size": 0.1}}
    assert comparison.tune_methods(path, **options | {"subjects": ["cat+dog"]}, **folders) == both
    monkeypatch.setattr("coneslab.experiments.methods.data_folder", lambda: tmp_path)
    (tmp_path / "results").mkdir()
    path.rename(tmp_path / "results" / "settings.json")
    assert comparison.chosen_settings("own") == {"size": 0.2} and comparison.chosen_settings("own", 2) == {"size": 0.1}
    assert comparison.chosen_settings("second", 3) == {}


def test_other_settings_may_be_chosen_for_several_subjects():
    own = Method(
        first, choices={"size": (1, 2)}, for_several={"turned": (True,), "size": (3,)}, own_settings=("turned",)
    )
    assert own.trials(1) == [{"size": 1}, {"size": 2}] and own.trials(3) == [{"turned": True}, {"size": 3}]
    assert Method(first, choices={"size": (1, 2)}).trials(2) == own.trials(1) and not Method(first).trials(2)
    assert own.of_single({"turned": True, "size": 3}) == {"size": 3}
    for one in (1, 2):  # as many trials for all
        assert {len(method.trials(one)) for name, method in METHODS.items() if name != "untouched model"} == {4}


@pytest.mark.slow
def test_masks_at_their_words_are_joined_at_their_dose(world_pipe, tmp_path):
    subjects, short = subjects_of("cat+dog"), SHORT["Cones, token-local"]
    part, _ = make_edit("Cones, token-local", world_pipe, subjects, folder=tmp_path, dose=0.25, **short)
    whole, _ = make_edit("Cones, token-local", world_pipe, subjects, folder=tmp_path, dose=1.0, **short)
    assert (part.edits, part.dose, whole.dose) == (whole.edits, 0.25, 1.0)
    assert stored_bytes(part) == sum(len(mask.to_bytes()) for mask in part.edits)
    alone, _ = make_edit("Cones, token-local", world_pipe, subjects[:1], folder=tmp_path, **short)
    assert alone == whole.edits[0]


@pytest.mark.slow
def test_a_search_draws_the_prior_pictures_that_its_settings_ask_for(world_pipe):
    (cat,) = subjects_of("cat")
    few = {"rounds": 1, "batch_size": 2, "prior_batch_size": 2, "prior_images": 2, "sampler_steps": 2, "seed": 3}
    found = neurons(world_pipe, cat, **few)
    assert found == find_concept_neurons(world_pipe, cat, progress=False, **few)
    assert found != neurons(world_pipe, cat, **few | {"prior_images": 1})


def test_a_kept_edit_is_that_of_all_settings_defaults_included(world_pipe, tmp_path, monkeypatch, calls):
    from coneslab.experiments import setting

    (cat,) = subjects_of("cat")
    for _ in range(2):
        for given in ({}, {"size": 1.0}, {"size": 2.0}):
            setting.kept(single, world_pipe, cat, seed=0, folder=tmp_path, **given)
    assert [size for _, _, size in calls] == [1.0, 2.0]
    monkeypatch.setitem(single.__kwdefaults__, "size", 3.0)  # as a new version would
    edit, _ = setting.kept(single, world_pipe, cat, seed=0, folder=tmp_path)
    assert calls[-1][2] == 3.0 and float(next(iter(edit.deltas.values())).flatten()[0]) == 3.0
    monkeypatch.setattr(setting, "__version__", "9")
    setting.kept(single, world_pipe, cat, seed=0, folder=tmp_path)
    assert len(calls) == 4 and len({seed for _, seed, _ in calls}) == 1
    filled = setting._filled(setting.neurons, {"rounds": 7})
    assert filled["rounds"] == 7 and {"threshold_quantile", "batch_size", "prior_weight"} <= filled.keys()


@pytest.mark.slow
def test_a_table_is_not_continued_with_other_pictures_or_settings(folders, tmp_path):
    path = tmp_path / "table.csv"
    options = {"methods": {"mine": Method(first, single)}, "subjects": ["cat"], "seeds": 1, "progress": False}
    comparison.compare_methods(path, pictures=1, **options, **folders)
    with pytest.raises(ConeslabError, match=r'"pictures": 1.*"pictures": 2'):
        comparison.compare_methods(path, pictures=2, **options, **folders)
    with pytest.raises(ConeslabError, match=r"settings.*size"):
        comparison.compare_methods(path, pictures=1, settings={"size": 2.0}, **options, **folders)
    more = options | {"methods": {"other": METHODS["untouched model"]}}
    assert set(comparison.compare_methods(path, pictures=1, **more, **folders).condition) == {"mine", "other"}


def test_the_table_has_no_tuning_subject_and_all_sizes():
    titles = comparison.table_titles()
    assert {len(title.split("+")) for title in titles} == {1, 2, 3, 4} and len(set(titles)) == len(titles) >= 10
    assert not {name for title in titles for name in title.split("+")} & set(TUNING_SUBJECTS)
    assert {name for title in comparison.TUNING_TITLES for name in title.split("+")} <= set(TUNING_SUBJECTS)


def test_a_method_gets_its_own_settings_unless_told_otherwise(world_pipe, tmp_path, calls):
    own = Method(first, single, settings={"size": 2.0})
    for given in ({}, {"size": 3.0}):
        make_edit(own, world_pipe, subjects_of("cat"), folder=tmp_path, **given)
    assert [size for _, _, size in calls] == [2.0, 3.0]


def test_every_method_takes_what_it_is_tuned_by_and_no_other_name():
    for name, method in METHODS.items():
        for count in (1, 2):
            for trial in [*method.trials(count), method.settings, chosen_settings(name, count)]:
                assert method.unknown(trial) == [], (name, trial)
        assert method.unknown({"seed": 1, "stps": 2}) == ["seed", "stps"]
    assert Method(lambda pipe, subjects, *, seed, **anything: None).unknown({"stps": 2}) == []


def test_unknown_methods_counts_and_subjects_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(ConeslabError, match="no such method"):
        comparison.compare_methods(path, methods=["Cone"])
    with pytest.raises(ArgumentError, match="settings has stps, which 'DreamBooth' does not take"):
        comparison.compare_methods(path, methods=["DreamBooth"], settings={"stps": 5})
    with pytest.raises(ConeslabError, match="combinations of 9"):
        comparison.compare_methods(path, counts=[9])
    with pytest.raises(WorldError, match="unicorn"):
        comparison.compare_methods(path, subjects=["cat+unicorn"])
    with pytest.raises(ConeslabError, match="not a method"):
        make_edit("Cone", None, [])
    assert not path.exists()


@pytest.mark.slow
def test_a_cluster_leaves_the_environment_of_this_process_alone():
    before = dict(os.environ)
    with socket.socket() as other, warnings.catch_warnings():
        with suppress(OSError):  # or another program has it already
            other.bind(("", 8787))
            other.listen()
        warnings.filterwarnings("error", message="Port 8787")  # Dask's own: two tables are made beside each other
        with cluster.dask_client(workers=1, threads=2) as client:
            assert dict(os.environ) == before  # notebooks started from here would run on one thread
            assert list(client.run(torch.get_num_threads).values()) == [2]
    assert dict(os.environ) == before


@pytest.mark.full  # `test_experiments` has a cluster in `make test`
def test_the_command_runs_on_a_cluster_of_processes(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--methods", "Textual Inversion", "--subjects", "cat", "--seeds", "1", "--pictures", "1"]
    arguments += ["--settings", '{"steps": 1}', "--threads", "1", "--out", "table.csv"]
    arguments += ["--model", folders["model"], "--judge", folders["judge"]]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "1 worker(s) with 1 threads each" in told and "Textual Inversion" in told
    table = pandas.read_csv(tmp_path / "table.csv")
    assert set(table.condition) == {"Textual Inversion"} and table.seconds.min() > 0

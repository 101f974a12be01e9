"""Edits leave no trace: weights restored bit for bit under injected faults; files are complete or refused."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupting import interrupted_at
from safetensors.torch import save_file

import coneslab
from coneslab import blocks as all_blocks
from coneslab.blocks import Block, Made
from coneslab.diffusion.kvspace import KVSpace
from coneslab.edits import base
from coneslab.edits.base import Combined, Edit, load_edit
from coneslab.edits.weights import WeightDelta, model_fingerprint, swapped, untouched
from coneslab.errors import ConeslabError, FileFormatError, MismatchError
from coneslab.methods.conceptor.decomposition import Decomposition


def bits(tensor):
    return tensor.data.contiguous().view(-1).view(torch.uint8).clone()


def weights_of(pipe):
    return {name: bits(weight) for name, weight in pipe.unet.named_parameters()}


def assert_untouched(pipe, before):
    assert all(torch.equal(before[name], bits(weight)) for name, weight in pipe.unet.named_parameters())
    assert not all_blocks._ACTIVE


@pytest.fixture
def parameters():
    """Three parameters with values that no arithmetic gives back: NaN, infinities, negative zero, denormals."""
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    with torch.no_grad():
        made[0][0] = torch.tensor([float("nan"), float("inf"), -0.0])
        made[1][0, 0] = 1e-42
    return made


def zeros(parameters):
    return [(parameter, torch.zeros_like(parameter)) for parameter in parameters]


def delta_of(pipe, value=0.25):
    space = KVSpace(pipe)
    return WeightDelta(
        {name: torch.full(weight.shape, value) for name, weight in space.parameters.items()},
        model_fingerprint(pipe),
        subject="cat",
        settings={"steps": 3},
        history={"loss": [0.5, 0.25]},
    )


# --- swapped ---


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_values_change_inside_and_come_back_bit_for_bit(parameters, failure):
    before = [bits(parameter) for parameter in parameters]
    try:
        with swapped(zeros(parameters), "pipe") as value:
            assert value == "pipe"
            assert all((parameter == 0).all() for parameter in parameters)
            if failure is not None:
                raise failure
    except BaseException as error:
        assert failure is not None and isinstance(error, failure)
    assert all(torch.equal(kept, bits(parameter)) for kept, parameter in zip(before, parameters, strict=True))
    assert not all_blocks._ACTIVE


class Faulty(torch.nn.Parameter):
    """A parameter into which the n-th copy fails, after it has written half of the values."""

    failure: type[BaseException] | None = None
    at = 0

    def detach(self):
        return FaultyView(self, super().detach())


class FaultyView:
    def __init__(self, owner, values):
        self.owner, self.values = owner, values

    def clone(self):
        return self.values.clone()

    def copy_(self, source):
        failure = self.owner.failure
        if self.owner.at == 0 and failure is not None:
            self.owner.failure = None
            self.values.view(-1)[:2] = 77.0
            raise failure("injected")
        self.owner.at -= 1
        return self.values.copy_(source)


def faulty(values, failure, at=0):
    parameter = Faulty(values.detach().clone())
    assert isinstance(parameter.detach(), FaultyView)
    parameter.failure, parameter.at = failure, at
    return parameter


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_copy_that_fails_while_entering_leaves_nothing_changed(parameters, failure, position):
    parameters[position] = faulty(parameters[position], failure)
    before = [bits(parameter) for parameter in parameters]
    with pytest.raises(failure, match="injected"):
        with swapped(zeros(parameters)):
            raise AssertionError("the block must not run")
    assert all(torch.equal(kept, bits(parameter)) for kept, parameter in zip(before, parameters, strict=True))
    assert not all_blocks._ACTIVE


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_interruption_while_restoring_waits_until_all_is_restored(parameters, position):
    parameters[position] = faulty(parameters[position], KeyboardInterrupt, at=1)
    before = [bits(parameter) for parameter in parameters]
    with pytest.raises(KeyboardInterrupt, match="injected"):
        with swapped(zeros(parameters)):
            pass
    assert all(torch.equal(kept, bits(parameter)) for kept, parameter in zip(before, parameters, strict=True))
    assert not all_blocks._ACTIVE


def test_a_restoration_that_fails_is_tried_again(parameters):
    parameters[1] = faulty(parameters[1], MemoryError, at=1)
    before = [bits(parameter) for parameter in parameters]
    with pytest.raises(MemoryError, match="injected"):
        with swapped(zeros(parameters)):
            pass
    assert all(torch.equal(kept, bits(parameter)) for kept, parameter in zip(before, parameters, strict=True))
    assert not all_blocks._ACTIVE


def test_an_interruption_at_any_line_while_entering_leaves_nothing_changed(parameters):
    """Ctrl-C is injected at every line that entering runs, one after the other."""
    before = [bits(parameter) for parameter in parameters]
    watched = {swapped.__enter__.__code__, Block.open.__code__, Made.change.__code__, Made.undo.__code__}

    def attempt(stop_at: int) -> bool:
        """Whether the interruption came (False: entering has fewer lines than that)."""
        block = swapped(zeros(parameters))
        if interrupted_at(block.__enter__, stop_at, watched.__contains__):
            return True
        block.__exit__(None, None, None)
        return False

    stop_at = 1
    while attempt(stop_at):
        assert all(torch.equal(kept, bits(parameter)) for kept, parameter in zip(before, parameters, strict=True))
        assert not all_blocks._ACTIVE
        stop_at += 1
    assert stop_at > 15


def test_blocks_nest(parameters):
    first = parameters[0]
    before = bits(first)
    with swapped([(first, torch.ones_like(first))]):
        inside = bits(first)
        with swapped(lambda: [(first, first.detach() * 2)]):
            assert (first == 2).all()
            assert torch.equal(bits(untouched(first)), before)
        assert torch.equal(bits(first), inside)
    assert torch.equal(bits(first), before) and untouched(first) is first


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_left_in_any_order_give_the_first_values_back(data):
    """Property: whatever overlaps, and in whatever order blocks close, the end is the beginning."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3)) for _ in range(3)]
    before = [bits(parameter) for parameter in parameters]
    chosen = data.draw(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(chosen))))  # drawn before a block opens: a draw may abort the example
    blocks = []
    for i, places in enumerate(chosen):
        blocks.append(swapped([(parameters[j], torch.full((3,), float(i))) for j in sorted(places)]))
        blocks[-1].__enter__()
    for i in order:
        blocks[i].__exit__(None, None, None)
    assert all(torch.equal(kept, bits(parameter)) for kept, parameter in zip(before, parameters, strict=True))
    assert not all_blocks._ACTIVE


def test_a_block_is_not_entered_twice(parameters):
    block = swapped(zeros(parameters))
    before = bits(parameters[2])
    with block, pytest.raises(ConeslabError, match="already open"), block:
        pass
    assert torch.equal(before, bits(parameters[2]))


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_touched(parameters):
    before = [bits(parameter) for parameter in parameters]
    with pytest.raises(MismatchError, match=r"\(4, 3\).*\(3, 4\)"):
        with swapped([(parameters[0], torch.zeros(4, 3)), (parameters[1], torch.zeros(3, 4))]):
            pass
    assert all(torch.equal(kept, bits(parameter)) for kept, parameter in zip(before, parameters, strict=True))


# --- weight deltas ---


def test_a_delta_is_added_at_its_dose(v_pipe):
    before, delta = weights_of(v_pipe), delta_of(v_pipe)
    theta = KVSpace(v_pipe).gather()
    for dose in (0.0, 0.5, 1.0, -1.0):
        with delta.applied(v_pipe, dose) as pipe:
            assert pipe is v_pipe
            assert torch.allclose(KVSpace(v_pipe).gather(), theta + dose * 0.25)
    assert_untouched(v_pipe, before)
    assert isinstance(delta, Edit) and delta.nbytes == 4 * KVSpace(v_pipe).n


def test_deltas_nest_and_combine(v_pipe):
    before, theta = weights_of(v_pipe), KVSpace(v_pipe).gather()
    first, second = delta_of(v_pipe, 0.5), delta_of(v_pipe, 2.0)
    with first.applied(v_pipe):
        with second.applied(v_pipe):
            assert torch.allclose(KVSpace(v_pipe).gather(), theta + 2.5)
        assert torch.allclose(KVSpace(v_pipe).gather(), theta + 0.5)
    both = Combined((first, second))
    with both.applied(v_pipe, 0.5):
        assert torch.allclose(KVSpace(v_pipe).gather(), theta + 1.25)
    assert both.nbytes == first.nbytes + second.nbytes
    assert_untouched(v_pipe, before)


def test_a_combination_is_on_at_its_own_dose(v_pipe, tmp_path):
    before, theta = weights_of(v_pipe), KVSpace(v_pipe).gather()
    both = Combined((delta_of(v_pipe, 0.5), delta_of(v_pipe, 2.0)), dose=0.4)
    for edit in (both, load_edit(both.save(tmp_path / "both")), Combined((both,))):
        with edit.applied(v_pipe, 0.5):
            assert torch.allclose(KVSpace(v_pipe).gather(), theta + 0.2 * 2.5)
    assert both == load_edit(tmp_path / "both") != Combined(both.edits)
    assert_untouched(v_pipe, before)
    for wrong in (-0.1, 1.5, "half"):
        with pytest.raises(ConeslabError, match="dose"):
            Combined(both.edits, wrong)


def test_a_combination_with_a_foreign_edit_is_refused(v_pipe, epsilon_pipe):
    before = weights_of(v_pipe)
    with pytest.raises(MismatchError):
        with Combined((delta_of(v_pipe), delta_of(epsilon_pipe))).applied(v_pipe):
            pass
    assert_untouched(v_pipe, before)


def test_another_models_delta_is_refused(v_pipe, epsilon_pipe):
    before = weights_of(v_pipe)
    with pytest.raises(MismatchError, match="belongs to model"):
        with delta_of(epsilon_pipe).applied(v_pipe):
            pass
    with pytest.raises(MismatchError, match="made for another|the delta is"):
        with delta_of(epsilon_pipe).applied(v_pipe, check_model=False):
            pass
    with pytest.raises(ConeslabError, match="dose"):
        delta_of(v_pipe).applied(v_pipe, float("nan"))
    with pytest.raises(ConeslabError, match="NaN"):
        delta_of(v_pipe, float("nan"))
    assert_untouched(v_pipe, before)


# --- files ---


def test_deltas_and_combinations_come_back_from_their_files(v_pipe, tmp_path):
    delta = delta_of(v_pipe)
    again = WeightDelta.load(delta.save(tmp_path / "delta.safetensors"))
    assert again.deltas.keys() == delta.deltas.keys()
    assert all(torch.equal(again.deltas[name], delta.deltas[name]) for name in delta.deltas)
    assert (again.fingerprint, again.subject, again.settings, again.history) == (
        delta.fingerprint,
        "cat",
        {"steps": 3},
        {"loss": [0.5, 0.25]},
    )
    both = load_edit(Combined((delta, delta_of(v_pipe, 1.0))).save(tmp_path / "both.safetensors"))
    assert isinstance(both, Combined) and len(both.edits) == 2
    assert torch.equal(both.edits[1].deltas[KVSpace(v_pipe).names[0]], torch.ones(16, 24))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.safetensors", "delta.safetensors"]
    with pytest.raises(FileFormatError, match="holds a Combined, not a WeightDelta"):
        WeightDelta.load(tmp_path / "both.safetensors")


def small_delta():
    return WeightDelta({"a.weight": torch.arange(6.0).view(2, 3)}, "ab" * 32, subject="cat")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_truncated_file_is_refused_at_any_length(tmp_path, data):
    whole = small_delta().save(tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FileFormatError):
        load_edit(cut)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_refused_or_harmless(tmp_path, data):
    edit = small_delta()
    whole = bytearray(edit.save(tmp_path / "whole").read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "flipped").write_bytes(whole)
    try:
        again = load_edit(tmp_path / "flipped")
    except FileFormatError:
        return
    assert torch.equal(again.deltas["a.weight"], edit.deltas["a.weight"]) and again.fingerprint == edit.fingerprint


def test_foreign_files_are_refused_with_a_reason(tmp_path):
    torch.save({"indices": torch.arange(3)}, tmp_path / "torch.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    for name, reason in {
        "torch.pt": "never loaded",
        "plain.pkl": "never loaded",
        "foreign.safetensors": "not a coneslab edit",
        "empty": "truncated",
    }.items():
        with pytest.raises(FileFormatError, match=reason):
            load_edit(tmp_path / name)
    with pytest.raises(FileFormatError):
        load_edit(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_edit(tmp_path / "nowhere")


# --- kinds ---


class Turned(Edit):
    """A kind of edit that is no part of the package: every number that reads the text, turned up or down."""

    def __init__(self, by):
        self.by = by

    nbytes = 8

    def applied(self, pipe, dose=1.0, *, check_model=True):
        weights = KVSpace(pipe).parameters.values()
        return swapped(lambda: [(weight, weight.detach() * (1 + dose * self.by)) for weight in weights], pipe)

    def _pack(self):
        return {"by": torch.tensor(self.by)}, {}

    @classmethod
    def _unpack(cls, tensors, description):
        return cls(float(tensors["by"]))


def python(code, *arguments):
    """What a fresh process prints: nothing is imported there but what the code imports."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()


def test_a_kind_of_ones_own_is_saved_loaded_and_combined(v_pipe, tmp_path):
    theta = KVSpace(v_pipe).gather()
    assert Turned.load(Turned(0.5).save(tmp_path / "turned")).by == 0.5
    both = load_edit(Combined((Turned(1.0), delta_of(v_pipe))).save(tmp_path / "both"))
    with both.applied(v_pipe):
        assert torch.allclose(KVSpace(v_pipe).gather(), 2 * theta + 0.25)
    with pytest.raises(FileFormatError, match="holds a Turned, not a WeightDelta"):
        WeightDelta.load(tmp_path / "turned")


def test_a_combination_is_tried_on_another_model_when_asked_to(v_pipe):
    foreign = Combined((replace(delta_of(v_pipe), fingerprint="ab" * 32),))
    theta = KVSpace(v_pipe).gather()
    with pytest.raises(MismatchError):
        foreign.applied(v_pipe).__enter__()
    with foreign.applied(v_pipe, check_model=False):
        assert torch.allclose(KVSpace(v_pipe).gather(), theta + 0.25)


def test_a_kind_that_is_not_whole_cannot_be_made():
    class Half(Edit):
        nbytes = 0

    with pytest.raises(TypeError, match="applied"):
        Half()


def test_a_kind_that_is_not_known_is_refused_by_name(tmp_path, monkeypatch):
    files = Turned(1.0).save(tmp_path / "one"), Combined((Turned(1.0),)).save(tmp_path / "two")
    monkeypatch.delitem(base._KINDS, "Turned")
    for path in files:
        with pytest.raises(FileFormatError, match=f"{path.name} cannot be read as .*Turned.*import the module.*update"):
            load_edit(path)


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(ConeslabError, match="elsewhere defines .* WeightDelta, as coneslab.edits.weights does: rename"):
        type("WeightDelta", (Edit,), {"__module__": "elsewhere"})
    assert base._KINDS["WeightDelta"] is WeightDelta


def test_a_class_that_is_defined_again_takes_the_place_of_the_one_before(tmp_path):
    path = Turned(1.0).save(tmp_path / "turned")
    again = dataclass(slots=True)(type("Turned", (Turned,), {"__module__": __name__, "__annotations__": {"by": float}}))
    try:
        assert type(load_edit(path)) is again
    finally:
        base._KINDS["Turned"] = Turned


@pytest.mark.slow
def test_every_kind_of_the_package_is_found_by_a_process_that_imported_none_of_them(tmp_path):
    for module in pkgutil.walk_packages(coneslab.__path__, "coneslab."):
        importlib.import_module(module.name)
    own = {name: kind for name, kind in base._KINDS.items() if kind.__module__.startswith("coneslab.")}
    assert own.keys() >= {"ConceptNeurons", "TunedNeurons", "TokenEdit", "LowRankDelta", "Decomposition"}
    code = """if True:
        import sys
        from coneslab.edits import base, load_edit
        assert not {"coneslab.neurons", "coneslab.methods"} & set(sys.modules)
        for name in sys.argv[1:]:
            try:
                base._unpacked(name, {}, {})
            except (KeyError, TypeError):
                print(base._KINDS[name].__module__)
    """
    assert python(code, *own) == [kind.__module__ for kind in own.values()]


@pytest.mark.slow
def test_a_file_is_read_by_a_process_that_knows_nothing_of_its_kind(tmp_path):
    found = Decomposition("cat", ("cat", "dog"), np.array([0.75, 0.25]), 2, 1.0, "ab" * 32)
    path = Combined((small_delta(), found)).save(tmp_path / "both")
    code = "import sys; from coneslab.edits import load_edit; print(load_edit(sys.argv[1]).edits[1].words[1])"
    assert python(code, path) == ["dog"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = small_delta().save(tmp_path / "delta")
    kept = path.read_bytes()
    monkeypatch.setattr("coneslab.files.os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        WeightDelta({"b": torch.zeros(2)}, "cd").save(path)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]

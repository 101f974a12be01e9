"""What a block changed is put back: interrupts at every bytecode, real signals, failures, any order, threads."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
import torch
from interrupting import interrupted_at, passed

from coneslab import blocks
from coneslab.blocks import Block, Nested, Place, attribute, before_blocks
from coneslab.diffusion.activations import patch, watch
from coneslab.diffusion.kvspace import KVSpace
from coneslab.diffusion.precision import drawing
from coneslab.diffusion.sampling import generate, guided_between
from coneslab.edits.base import Combined
from coneslab.edits.low_rank import compress
from coneslab.edits.tokens import TokenEdit, embedding_of, vocabulary_fingerprint
from coneslab.edits.weights import WeightDelta, model_fingerprint
from coneslab.errors import ConeslabError
from coneslab.measure.recording import record_attention
from coneslab.neurons.mask import ConceptNeurons
from coneslab.neurons.union import TunedNeurons


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """As in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Thing:
    """Something with attributes to change."""

    def __init__(self) -> None:
        self.a, self.b = "a", "b"


def state(pipe) -> dict:
    """Everything of a pipeline that a block may change, by identity or to the last bit."""
    unet, encoder = pipe.unet, pipe.text_encoder
    modules = (module for part in (unet, encoder) for module in part.modules())
    hooks = [module for module in modules if module._forward_hooks or module._forward_pre_hooks]
    return {
        "unet": id(unet),
        "forward": "forward" in unet.__dict__,
        "tokenizer": id(pipe.tokenizer),
        "scheduler": id(pipe.scheduler),
        "embeddings": id(encoder.get_input_embeddings()),
        "processors": [id(processor) for processor in unet.attn_processors.values()],
        "weights": [bytes(weight.detach().numpy().tobytes()) for weight in KVSpace(pipe).parameters.values()],
        "hooks": hooks,
        "open": list(blocks._ACTIVE),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def weight_delta(pipe, layers: int = 2) -> WeightDelta:
    parts = list(KVSpace(pipe).parameters.items())[:layers]
    return WeightDelta({name: torch.full(weight.shape, 0.25) for name, weight in parts}, model_fingerprint(pipe))


def token_edit(pipe, token: str = "<new>") -> TokenEdit:
    width = embedding_of(pipe).weight.shape[1]
    return TokenEdit((token,), torch.full((1, width), 0.5), vocabulary_fingerprint(pipe))


def mask(pipe) -> ConceptNeurons:
    space = KVSpace(pipe)
    return ConceptNeurons(space.layout, [0, 5, space.n - 1], [0.0, 0.5, 0.0], space.fingerprint())


KINDS: dict[str, Callable] = {
    "weights": lambda pipe: weight_delta(pipe).applied(pipe),
    "low rank": lambda pipe: compress(weight_delta(pipe), energy=1.0).applied(pipe),
    "mask": lambda pipe: mask(pipe).applied(pipe),
    "tuned mask": lambda pipe: TunedNeurons(mask(pipe), np.ones(3, np.float32)).applied(pipe),
    "mask at words": lambda pipe: mask(pipe).at("sks", "cat").applied(pipe),
    "tuned mask at words": lambda pipe: TunedNeurons(mask(pipe).at("sks"), np.ones(3, np.float32)).applied(pipe),
    "token": lambda pipe: token_edit(pipe).applied(pipe),
    "combined": lambda pipe: Combined((token_edit(pipe), weight_delta(pipe))).applied(pipe),
    "combined twice": lambda pipe: Combined((Combined((weight_delta(pipe),)), token_edit(pipe))).applied(pipe),
    "timed weights": lambda pipe: weight_delta(pipe).applied(pipe, steps=(0.0, 0.5)),
    "timed token": lambda pipe: token_edit(pipe).applied(pipe, steps=(0.0, 0.5)),
    "timed mask at words": lambda pipe: mask(pipe).at("sks", "cat").applied(pipe, steps=(0.0, 0.5)),
    "recorder": lambda pipe: record_attention(pipe),
    "watch": lambda pipe: watch(pipe, ["mid", "up 0 cross-attention heads"]),
    "patch": lambda pipe: patch(pipe, "mid", torch.zeros_like),
    "drawing": lambda pipe: drawing(pipe, torch.bfloat16),
    "guidance": lambda pipe: guided_between(pipe, 0.0, 0.5),
    "scheduler": lambda pipe: Block([(attribute(pipe, "scheduler"), copy.copy(pipe.scheduler))], pipe=pipe),
}

FEW = ("recorder", "guidance", "scheduler")  # whose changes are few, so that a try takes milliseconds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # injected where nothing is left to do
@pytest.mark.parametrize(
    ("kind", "tries"),
    [
        *((kind, (50, 20)) for kind in FEW),
        *(pytest.param(kind, (10, 5), marks=pytest.mark.slow) for kind in KINDS if kind not in FEW),
        *(pytest.param(kind, (50, 20), marks=pytest.mark.full) for kind in KINDS if kind not in FEW),
    ],
)
def test_an_interrupt_at_any_bytecode_leaves_nothing_changed(kind, tries, v_pipe):
    """At bytecodes of `blocks.py` and of the whole package, so many of each, evenly spread, and at both ends."""
    before, own = state(v_pipe), blocks.__file__

    def enter_and_leave():
        with KINDS[kind](v_pipe):
            pass

    for place, many in zip((own, str(Path(own).parent)), tries, strict=True):
        watched = partial(_is_in, place)
        total, struck = passed(enter_and_leave, watched, "opcode"), 0
        for count in {1, 2, *np.linspace(3, total - 2, many, dtype=int).tolist(), total - 1, total}:
            struck += interrupted_at(enter_and_leave, count, watched, "opcode")
            assert state(v_pipe) == before, count
        assert struck >= many  # runs differ by a few bytecodes


def _is_in(start: str, code: CodeType) -> bool:
    return code.co_filename.startswith(start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_dropped_is_left_at_once(kind, v_pipe):
    """Nothing that a block keeps holds the block, which would stay open until the garbage is collected."""
    before = state(v_pipe)
    gc.disable()
    try:
        block = KINDS[kind](v_pipe)
        block.__enter__()
        assert blocks._ACTIVE
        del block
        assert state(v_pipe) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_was_left_runs_nothing_when_it_is_dropped(kind, v_pipe):
    """An exception there would be swallowed: the Ctrl-C would be lost."""
    kept = [KINDS[kind](v_pipe)]
    with kept[0]:
        pass
    assert not passed(kept.clear, partial(_is_in, blocks.__file__), "opcode")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["combined", "recorder", pytest.param("drawing", marks=pytest.mark.slow)])
def test_real_signals_leave_nothing_changed_and_are_not_lost(kind, v_pipe):
    before = state(v_pipe)
    with KINDS[kind](v_pipe):
        pass
    rng = np.random.default_rng(0)
    for _ in range(60):
        sender = threading.Timer(float(rng.uniform(0, 0.004)), os.kill, [os.getpid(), signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            sender.start()
            late = time.monotonic() + 5
            while time.monotonic() < late:  # ends with the signal
                with KINDS[kind](v_pipe):
                    pass
        sender.join()
        assert state(v_pipe) == before


def test_a_signal_waits_until_a_block_has_been_left(monkeypatch):
    """It comes in the first bytecode of `__exit__`, where no `try` can catch it."""
    thing, order = Thing(), []

    def put(value):
        if value == "a":
            signal.raise_signal(signal.SIGINT)
            order.append("restored")
        thing.a = value

    block = Block([(Place(thing, "a", lambda: thing.a, put), "x")])
    with pytest.raises(KeyboardInterrupt):
        with block:
            assert signal.getsignal(signal.SIGINT) is blocks._wait_or_pass_on
        order.append("left")
        threading.Event().wait(10)  # the signal ends it
    assert order[0] == "restored" and thing.a == "a"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_set_inside_a_block_or_ignored_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Block():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        own = lambda *_: None  # noqa: E731
        with Block():
            signal.signal(signal.SIGINT, own)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("failures", [1, 3])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyboardInterrupt])
def test_what_fails_to_be_put_back_is_tried_again(failures, error):
    thing, left = Thing(), failures

    def put(value):
        nonlocal left
        if value == "a" and left:
            left -= 1
            raise error("injected")
        thing.a = value

    with pytest.raises(error, match="injected"):
        with Block([(attribute(thing, "b"), "y"), (Place(thing, "a", lambda: thing.a, put), "x")]):
            assert (thing.a, thing.b) == ("x", "y")
    assert (thing.a, thing.b) == ("a", "b") and not blocks._ACTIVE


def test_what_fails_for_good_can_be_put_back_later():
    thing, broken = Thing(), True

    def put(value):
        if value == "a" and broken:
            raise MemoryError("injected")
        thing.a = value

    place = Place(thing, "a", lambda: thing.a, put)
    block = Block([(attribute(thing, "b"), "y"), (place, "x")])
    with pytest.raises(MemoryError):
        with block:
            pass
    assert (thing.a, thing.b) == ("x", "b") and before_blocks(place) == "a"
    broken = False
    block.__exit__(None, None, None)
    assert thing.a == "a" and not blocks._ACTIVE


def test_a_block_that_is_dropped_is_left():
    thing = Thing()
    block = Block([(attribute(thing, "a"), "x")])
    block.__enter__()
    assert thing.a == "x"
    del block
    assert thing.a == "a" and not blocks._ACTIVE


def test_an_attribute_that_was_not_there_is_gone_again():
    thing = Thing()
    with Block([(attribute(thing, "c"), 1)]):
        assert thing.c == 1
    assert not hasattr(thing, "c")


class Foreign:
    """A context manager that is no block."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __enter__(self):
        self.log.append(f"in {self.name}")

    def __exit__(self, *exception):
        self.log.append(f"out {self.name}")


def test_managers_are_left_in_turn_even_if_one_cannot_be_entered():
    log, thing = [], Thing()

    def managers():
        yield Foreign(log, "first")
        yield Block([(attribute(thing, "a"), "x")])
        yield Foreign(log, "second")
        raise ValueError("no third")

    with pytest.raises(ValueError, match="no third"):
        with Nested(managers):
            raise AssertionError("the block must not run")
    assert log == ["in first", "in second", "out second", "out first"] and thing.a == "a"


# --- any order ---


def test_token_edits_left_in_another_order_leave_the_pipeline_as_it_was(v_pipe):
    before = state(v_pipe)
    first, second = token_edit(v_pipe, "<one>").applied(v_pipe), token_edit(v_pipe, "<two>").applied(v_pipe)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    ids = v_pipe.tokenizer("<two>", add_special_tokens=False).input_ids
    assert len(ids) == 1 and (embedding_of(v_pipe).weight[ids[0]] == 0.5).all()  # the second is still there
    second.__exit__(None, None, None)
    assert state(v_pipe) == before


def test_recorders_left_in_another_order_stop_and_leave_the_pipeline_as_it_was(v_pipe):
    before = state(v_pipe)
    first, second = record_attention(v_pipe), record_attention(v_pipe)
    one = first.__enter__()
    two = second.__enter__()
    generate(v_pipe, "a cat", sampler_steps=1)
    first.__exit__(None, None, None)
    generate(v_pipe, "a dog", sampler_steps=1)
    second.__exit__(None, None, None)
    assert (one.pictures, two.pictures) == (1, 2) and one.nbytes * 2 == two.nbytes
    assert state(v_pipe) == before


# --- threads ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_thread_cannot_use_a_pipeline_that_is_being_changed(kind, v_pipe):
    before = state(v_pipe)

    def elsewhere(act):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(act).result()

    def enter():
        with KINDS[kind](v_pipe):
            pass

    with token_edit(v_pipe).applied(v_pipe), weight_delta(v_pipe).applied(v_pipe):
        if kind != "guidance":  # always inside `generate`
            with pytest.raises(ConeslabError, match="in use in another thread"):
                elsewhere(enter)
        with pytest.raises(ConeslabError, match="in use in another thread"):
            elsewhere(lambda: generate(v_pipe, "a cat", sampler_steps=1))
    assert state(v_pipe) == before
    elsewhere(enter)
    assert state(v_pipe) == before

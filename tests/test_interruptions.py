"""Training and tables that are stopped anywhere, by an interrupt at any line or by a kill, end where whole runs do.

And a pipeline whose drawing is stopped anywhere is as it was.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType

import pytest
import torch
from interrupting import interrupted_at, passed
from test_blocks import mask, state, token_edit, weight_delta
from test_pretraining import QUICK, fit_small
from tqdm.auto import tqdm

from coneslab import blocks
from coneslab.diffusion import patch, start_noise, watch
from coneslab.edits import Combined
from coneslab.finetuning import checkpoints
from coneslab.finetuning import loop as tuning
from coneslab.measure import record_attention
from coneslab.pretraining import loop as pretraining


def of(*modules: object) -> Callable[[CodeType], bool]:
    """Whether code is in one of the modules."""
    files = {module.__file__ for module in modules}
    return lambda code: code.co_filename in files


@dataclass(frozen=True, kw_only=True)
class Short(tuning.TuningSettings):
    steps: int = 6


def tune_small(path: Path | None) -> tuple[torch.Tensor, dict]:
    """A few steps whose gradient depends on the number of the step and on the weights, with a checkpoint after each."""
    weight = torch.arange(4.0, requires_grad=True)

    def step(number: int) -> dict[str, float]:
        loss = ((weight - number) ** 2).sum()
        loss.backward()
        return {"loss": loss.item()}

    run = {"resume": path, "progress": False, "checkpoint_every": 0.0}
    history = tuning.tune({"w": weight}, step, Short(), title="small", **run)
    return weight.detach(), history


@pytest.mark.slow
def test_tuning_that_is_interrupted_at_any_line_ends_where_a_whole_run_does(tmp_path):
    expected, told = tune_small(None)
    count, path = 1, tmp_path / "state.safetensors"
    while interrupted_at(lambda: tune_small(path), count, of(tuning, checkpoints)):
        weight, history = tune_small(path)
        assert torch.equal(weight, expected) and history == told, count
        path.unlink()
        count += 2
    assert count > 200


@pytest.mark.slow
@pytest.mark.parametrize("every", [13, pytest.param(3, marks=pytest.mark.full)])
def test_pretraining_that_is_interrupted_at_any_line_ends_where_a_whole_run_does(every, tmp_path):
    recipe = replace(QUICK, muon=True, pictures=12)
    options = {"checkpoint_every": 0.0, "preview": lambda step: None, "measure": lambda step: {}, "measure_every": 4}
    whole, log = fit_small(tmp_path / "whole", recipe, **options)
    count = 1

    def attempt() -> object:
        return fit_small(tmp_path / str(count), recipe, **options)

    while interrupted_at(attempt, count, of(pretraining, checkpoints)):
        net, again = attempt()
        for name, value in whole.state_dict().items():
            assert torch.equal(net.state_dict()[name], value), count
        assert [row["loss"] for row in again.rows] == [row["loss"] for row in log.rows]
        assert [row["step"] for row in again.measures] == [row["step"] for row in log.measures], count
        count += every
    assert count > 200


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that starts at once")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["tuning", "pretraining"])
def test_a_run_killed_at_a_hundred_moments_ends_where_a_whole_run_does(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(Short, "steps", 120)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    tqdm.set_lock(threading.RLock())  # its own is shared with children, and stays locked if one is killed
    recipe = replace(QUICK, pictures=480, parts=1)

    def run(where: Path) -> tuple[list[torch.Tensor], list[float]]:
        if kind == "tuning":
            weight, history = tune_small(where)
            return [weight], history["loss"]
        net, log = fit_small(where, recipe, checkpoint_every=0.0)
        return list(net.state_dict().values()), [row["loss"] for row in log.rows]

    begun = time.monotonic()
    expected, losses = run(tmp_path / "whole")
    moment = (time.monotonic() - begun) / 40
    chance = random.Random(0)
    for _ in range(100):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                tqdm.set_lock(threading.RLock())
                run(tmp_path / "parts")
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, moment))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    weights, told = run(tmp_path / "parts")
    assert told == losses and all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))


GRID = """
import sys, time
from distributed import Client
from coneslab.experiments.table import run_cells

def measure(subject, seed):
    time.sleep(0.02)
    return [{"condition": "a", "measure": "m", "value": seed + len(subject) / 7}]

cells = [{"subject": name, "seed": seed} for name in ("cat", "horse") for seed in range(12)]
with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
    print("begun", flush=True)
    run_cells(cells, measure, sys.argv[1], identity={"model": "m"}, client=client, progress=False)
"""


@pytest.mark.full
def test_a_table_made_on_a_cluster_is_the_same_whenever_its_process_was_killed(tmp_path):
    command = [sys.executable, "-c", GRID]
    subprocess.run([*command, tmp_path / "whole.csv"], check=True, stdout=subprocess.DEVNULL)
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([*command, tmp_path / "parts.csv"], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(chance.uniform(0, 0.12))
        process.kill()
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "parts.csv").exists() or len((tmp_path / "parts.csv").read_bytes().splitlines()) < 25
    subprocess.run([*command, tmp_path / "parts.csv"], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    names = [name + end for name in ("parts.csv", "whole.csv") for end in ("", ".sha256")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


DRAWN_IN: dict[str, Callable] = {
    "a timed edit": lambda pipe: Combined((token_edit(pipe), weight_delta(pipe))).applied(pipe, steps=(0.4, 0.9)),
    "a timed mask at words": lambda pipe: mask(pipe).at("sks", "cat").applied(pipe, steps=(0.4, 0.9)),
    "a watch": lambda pipe: watch(pipe, ["mid", "up 0 cross-attention heads"]),
    "a patch": lambda pipe: patch(pipe, "mid", lambda given: 0 * given),
    "a recorder": lambda pipe: record_attention(pipe, words="dog"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DRAWN_IN)
def test_drawing_that_is_interrupted_anywhere_leaves_the_pipeline_as_it_was(kind, v_pipe):
    """Twenty lines, evenly spread over all that the package does while a picture is drawn in a block."""
    before, package = state(v_pipe), str(Path(blocks.__file__).parent)

    def draw() -> None:
        with DRAWN_IN[kind](v_pipe):
            v_pipe("a sks cat", num_inference_steps=1, latents=start_noise(v_pipe, [0]), output_type="latent")

    def watched(code: CodeType) -> bool:
        return code.co_filename.startswith(package) and "checks" not in code.co_filename

    draw()
    total = passed(draw, watched, "line")
    for count in sorted({total * i // 20 for i in range(1, 20)}):
        assert interrupted_at(draw, count, watched)
        assert state(v_pipe) == before, count

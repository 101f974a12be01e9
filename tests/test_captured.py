"""Training steps that a GPU repeats without Python, and the pictures that are ready for them.

There is no GPU where these tests run as a rule: the CUDA graph is then one that calls Python again. What it captured
and how it is fed are the real code.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counting import never, numbers
from torch import nn

from coneslab.errors import ConeslabError
from coneslab.pretraining import captured, loop, unet
from coneslab.pretraining.recipe import Recipe

RECIPE = Recipe(pictures=64 * 8, batch_size=8, learning_rate=0.05, warmup=1, decay=0.5, averages=(0.9,), weight_decay=0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, or a CPU whose "graphs" repeat their Python."""
    if torch.cuda.is_available():
        return torch.device("cuda")

    class Stream:
        def __init__(self, *_: object):
            pass

        def wait_stream(self, other: object) -> None:
            pass

    steps = []

    class Graph:
        def replay(self) -> None:
            steps[-1]._step()

    @contextmanager
    def context(*_: object, **__: object):
        yield

    make = captured.CapturedSteps.__init__

    def noted(self, *arguments, **options):
        make(self, *arguments, **options)
        steps.append(self)

    fakes = {"Stream": Stream, "stream": context, "current_stream": Stream, "CUDAGraph": Graph, "graph": context}
    for name, fake in {**fakes, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(captured.CapturedSteps, "__init__", noted)
    make_all = loop.optimizers
    monkeypatch.setattr(loop, "optimizers", lambda weights, recipe, captured: make_all(weights, recipe))
    return torch.device("cpu")


def line(device: torch.device) -> tuple[nn.Linear, captured.Captured, list[int]]:
    """A line to be fitted to y = 3 x + 1, and the steps whose batches were asked for."""
    torch.manual_seed(0)
    net, asked = nn.Linear(1, 1).to(device), []

    def batch(step: int) -> dict[str, torch.Tensor]:
        asked.append(step)
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step)).to(device)
        return {"x": x, "y": 3 * x + 1}

    return net, captured.Captured(batch, lambda t: {"loss": (net(t["x"]) - t["y"]).square().mean()}), asked


def test_captured_steps_learn_from_every_batch_and_average_the_weights(tmp_path: Path, device: torch.device):
    net, loss, asked = line(device)
    log = loop.fit(tmp_path, modules={"net": net}, loss=loss, recipe=RECIPE, log_every=1)
    assert asked == [0, *range(64)]  # the first also to capture with
    assert log.rows[0]["loss"] > 5 > 0.5 > log.rows[-1]["loss"]
    assert net.weight.item() == pytest.approx(3, abs=1)
    rates = [row["rate"] for row in log.rows]
    assert rates[:32] == [0.05] * 32 and rates[-1] == pytest.approx(0.05 / 32)


def test_capturing_changes_no_weight_and_no_average(device: torch.device):
    net, loss, _ = line(device)
    weights = dict(net.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    steppers = loop.optimizers(weights, RECIPE, captured=True)
    averages = [loop.Average(weights, 0.9)]
    steps = captured.CapturedSteps(loss, weights, steppers, averages, RECIPE)
    with steps:
        steps.prepare(0)
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
        assert all(torch.equal(averages[0].shadow[name], before[name]) for name in weights)
        figures = [steps.take(step, 0.05) for step in (0, 1)]
    assert not torch.equal(net.weight, before["weight"])
    assert not torch.equal(averages[0].shadow["weight"], before["weight"])
    assert float(figures[0]["loss"]) != float(figures[1]["loss"]) and float(figures[0]["norm"]) > 0


def test_a_captured_run_goes_on_where_it_was_interrupted(tmp_path: Path, device: torch.device):
    net, loss, asked = line(device)
    loop.fit(tmp_path, modules={"net": net}, loss=loss, recipe=RECIPE, stop_after=40)
    net, loss, asked = line(device)
    log = loop.fit(tmp_path, modules={"net": net}, loss=loss, recipe=RECIPE)
    assert asked == [40, *range(40, 64)] and log.steps == 64


def test_a_captured_loss_that_is_not_finite_stops_the_run(tmp_path: Path, device: torch.device):
    net, loss, _ = line(device)
    broken = captured.Captured(loss.batch, lambda t: {"loss": (net(t["x"]) / 0 - t["y"]).square().mean()})
    with pytest.raises(ConeslabError, match="no longer finite"):
        loop.fit(tmp_path, modules={"net": net}, loss=broken, recipe=RECIPE)


@pytest.mark.slow
def test_a_stream_gives_each_picture_once_and_in_order():
    recipe = replace(RECIPE, batch_size=4)
    ready = lambda drawn, index: {"x": drawn, "chunk": torch.full((len(drawn),), index)}  # noqa: E731
    with captured.Stream(numbers, ready, size=8, seed=100, recipe=recipe, workers=1) as stream:
        batches = [stream.batch(step) for step in range(4)]
    assert [batch["x"].tolist() for batch in batches] == [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
        [101, 102, 103, 104],
        [105, 106, 107, 108],
    ]
    assert [int(batch["chunk"][0]) for batch in batches] == [0, 0, 1, 1]


def test_a_stream_without_pictures_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captured, "_PATIENCE", 0.2)
    stream = captured.Stream(never, lambda drawn, index: drawn, size=8, seed=0, recipe=RECIPE, workers=1)
    with stream, pytest.raises(ConeslabError, match="no pictures came"):
        stream.batch(0)


@pytest.mark.slow
def test_pictures_drawn_elsewhere_are_those_that_a_cpu_learns_from(tiny):
    """The same latents, labels and tokens as `encode_pictures` and `tokenize` give."""
    drawn = unet.draw_pictures(6, 11, objects=(0.25, 0.25, 0.25, 0.25))
    there = unet.encoded(tiny.vae, drawn)
    here, captions = unet.encode_pictures(tiny.vae, 6, seed=11, objects=(0.25, 0.25, 0.25, 0.25))
    assert torch.allclose(there["latents"], here["latents"].float(), atol=0.05)
    assert torch.equal(there["drawings"], here["drawings"]) and torch.equal(there["styles"], here["styles"])
    assert torch.equal(there["ids"].long(), unet.tokenize(tiny, captions))


def test_noises_are_assigned_within_their_groups():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(6, 2, 3, 3, generator=generator) for _ in range(2))
    parts = [unet.nearest_noise(x[half], noise[half]) for half in (slice(0, 3), slice(3, 6))]
    assert torch.equal(unet.nearest_noise(x, noise, groups=2), torch.cat(parts))

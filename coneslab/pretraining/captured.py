"""Training on a GPU that never waits for Python: a step is one CUDA graph, and its pictures are ready before it.

A step of these small networks is thousands of kernels of a few microseconds each, which Python launches more slowly
than a GPU computes them. Captured once, they run again without it (`torch.cuda.CUDAGraph`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import TimeoutError, get_context
from multiprocessing.pool import AsyncResult
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConeslabError
from .ahead import Ahead
from .optimizers import Average, set_rate
from .recipe import Recipe

_WARM_UP = 3  # steps at rate 0 before the capture: memory, kernels and the optimisers' state are there afterwards
_PATIENCE = 600  # seconds until pictures that do not come are given up


@dataclass(frozen=True)
class Captured:
    """What a captured step consists of.

    batch(step) -> tensors on the GPU, of the same names and shapes in every step. objective(tensors) -> {"loss": scalar
    to minimise, further scalars for the log}, without anything random and without waiting for the GPU.
    """

    batch: Callable[[int], Mapping[str, Tensor]]
    objective: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class CapturedSteps:
    """Training steps as replays of one CUDA graph: forward, backward, optimisers and averages of the weights."""

    def __init__(
        self,
        loss: Captured,
        weights: Mapping[str, nn.Parameter],
        steppers: Sequence[torch.optim.Optimizer],
        averages: Sequence[Average],
        recipe: Recipe,
    ):
        self.loss, self.weights, self.recipe = loss, weights, recipe
        self.steppers, self.averages = steppers, averages
        device = next(iter(weights.values())).device
        self._shares = [torch.zeros((), device=device) for _ in averages]
        self._streams = [torch.cuda.Stream(device) for _ in steppers]
        self._graph: Any = None
        self._inputs: dict[str, Tensor] = {}
        self._figures: dict[str, Tensor] = {}

    def _step(self) -> None:
        weights = list(self.weights.values())
        figures = self.loss.objective(self._inputs)
        gradients = torch.autograd.grad(figures["loss"], weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(weights, self.recipe.clip)
        here = torch.cuda.current_stream()
        for stepper, stream in zip(self.steppers, self._streams, strict=True):  # small kernels: side by side
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                stepper.step()
        for stream in self._streams:
            here.wait_stream(stream)
        for average, share in zip(self.averages, self._shares, strict=True):
            average.update(self.weights, share)
        self._figures = {name: value.detach() for name, value in figures.items()} | {"norm": norm}

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warm up with rate and shares of 0, which changes no weight, and capture a step."""
        set_rate(self.steppers, 0.0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread prepares the next pictures
            self._step()
        return graph

    def prepare(self, step: int) -> None:
        """Compile and capture what a step does, with the batch of the first one."""
        self._inputs = {name: tensor.clone() for name, tensor in self.loss.batch(step).items()}
        self._graph = self._capture()

    def take(self, step: int, rate: float) -> dict[str, Any]:
        """Take a step; return its figures and the gradient's norm as tensors on the GPU, which is not waited for."""
        for name, tensor in self.loss.batch(step).items():
            self._inputs[name].copy_(tensor)
        set_rate(self.steppers, rate)
        for average, share in zip(self.averages, self._shares, strict=True):
            share.fill_(average.share(step))
        self._graph.replay()
        return {name: value.clone() for name, value in self._figures.items()}

    def __enter__(self) -> CapturedSteps:
        self._cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a replay must cast the weights as they are then
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_cache_enabled(self._cached)
        torch.cuda.synchronize()


class Stream:
    """Chunks of fresh training pictures, each seen once: drawn by all cores but one, and made ready on the GPU.

    draw(size, seed) runs in other processes; ready(what it returned, number of the chunk) in a thread beside the
    training, on a CUDA stream of its own, and returns tensors on the GPU. Chunk `i` depends only on `seed` and `i`.
    """

    def __init__(
        self,
        draw: Callable[[int, int], Any],
        ready: Callable[[Any, int], dict[str, Tensor]],
        *,
        size: int,
        seed: int,
        recipe: Recipe,
        workers: int | None = None,
    ):
        self.draw, self.ready, self.size, self.seed, self.recipe = draw, ready, size, seed, recipe
        self.workers = workers or max(1, (os.cpu_count() or 2) - 1)
        self._pool = get_context("spawn").Pool(self.workers)
        self._thread = ThreadPoolExecutor(1)
        self._drawn: Ahead[AsyncResult] = Ahead(
            lambda index: self._pool.apply_async(self.draw, (self.size, self.seed + index)), self.workers + 1
        )
        self._ready: Ahead[Future[dict[str, Tensor]]] = Ahead(
            lambda index: self._thread.submit(self._make_ready, index), 1
        )
        self._current: tuple[int, dict[str, Tensor]] | None = None

    def _make_ready(self, index: int) -> dict[str, Tensor]:
        try:
            drawn = self._drawn.take(index).get(timeout=_PATIENCE)
        except TimeoutError as error:
            raise ConeslabError(
                f"no pictures came from {self.workers} processes in {_PATIENCE} s: one of them may have been ended for "
                "want of memory; the same command goes on from the last checkpoint"
            ) from error
        if not torch.cuda.is_available():
            return self.ready(drawn, index)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            tensors = self.ready(drawn, index)
        stream.synchronize()
        return tensors

    def batch(self, step: int) -> dict[str, Tensor]:
        """The tensors of a step; the next chunk is made ready meanwhile."""
        index, first = self.recipe.place(step, 0, self.size)
        if self._current is None or self._current[0] != index:
            self._current = index, self._ready.take(index).result()
            for tensor in self._current[1].values():
                if tensor.is_cuda:  # made on another stream: its memory must not go back while this one reads it
                    tensor.record_stream(torch.cuda.current_stream())
        own = slice(first.start, first.start + self.recipe.batch_size)
        return {name: tensor[own] for name, tensor in self._current[1].items()}

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        wait([job for job in self._ready.waiting.values() if not job.cancel()])
        self._pool.terminate()  # what is being drawn is not needed
        self._pool.join()
        self._thread.shutdown()

"""The training loop behind `coneslab pretrain`: budgets, checkpoints that resume, a log, a feed of pictures.

There is one loop, `fit`. What is trained (`modules`), what is minimised (`loss`) and for how long (`Recipe`) come
from `coneslab.pretraining.run`. A step's batch is split into parts, which run in parallel on the cores of a CPU: the
small networks of this package use two cores much better that way than by splitting each operation in two. Checkpoints
are safetensors, so resuming never unpickles anything.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import world
from ..diffusion.pipelines import machine_name
from ..diffusion.precision import bfloat16_pays, flushing_denormals
from ..errors import ConeslabError, FileFormatError, MismatchError
from ..files import read_json, require_writable, user_path, write_json
from ..finetuning.checkpoints import load_checkpoint, save_checkpoint, training_state
from .ahead import Ahead
from .captured import Captured, CapturedSteps
from .optimizers import Average, Muon, optimizers, set_rate
from .recipe import Recipe

_REMEDY = "restore it, or train that model again"


@dataclass
class Log:
    """What a training run did.

    facts: what a model card needs; rows: training figures, every few steps; measures: figures on held-out data, now
    and then.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    measures: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.rows[-1]["seconds"] if self.rows else 0.0

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Log:
        """Read a log. Raises ConeslabError if there is none, FileFormatError if it is damaged."""
        if not user_path(path).is_file():
            raise ConeslabError(f"there is no training log {path}: train that model first")
        found = read_json(path, remedy=_REMEDY)  # older logs have no checksum
        if not {"facts", "rows"} <= found.keys() <= {"facts", "rows", "measures"}:
            raise FileFormatError(f"{path} is not a training log: {_REMEDY}")
        return cls(**found)


class Feed:
    """Fresh pictures from the sticker world, drawn in advance by another process.

    Chunk `i` depends only on `seed` and `i`, so a resumed run continues with the pictures it would have seen.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        styles: Sequence[str] = world.TRAIN_STYLES,
        objects: Sequence[float] = tuple(world.SHARES["objects"]),
        everything: bool = False,
        ahead: int = 2,
        workers: int = 1,
    ):
        self.size, self.seed = size, seed
        self.options: dict[str, Any] = {"styles": tuple(styles), "objects": tuple(objects), "everything": everything}
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        self._jobs: Ahead[Future[world.Pictures]] = Ahead(self._draw, ahead)
        self._current: tuple[int, world.Pictures] | None = None
        self._lock = threading.Lock()  # parts of a step run in threads

    def _draw(self, index: int) -> Future[world.Pictures]:
        return self._pool.submit(world.sample, self.size, seed=self.seed * 1_000_003 + index, **self.options)

    def chunk(self, index: int) -> world.Pictures:
        """The pictures of one chunk; the following ones are drawn meanwhile."""
        if self._current is None or self._current[0] != index:
            self._current = index, self._jobs.take(index).result()
        return self._current[1]

    def batch(self, step: int, part: int, recipe: Recipe) -> tuple[world.Pictures, slice]:
        """The chunk and the slice of it that belong to a part of a training step."""
        index, own = recipe.place(step, part, self.size)
        with self._lock:
            return self.chunk(index), own

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _named(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All trainable weights, by module and name."""
    return {
        f"{prefix}.{name}": weight
        for prefix, module in modules.items()
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def _run_facts(recipe: Recipe, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What a model card says about a run: recipe, machine, versions, commit, number of weights."""
    folder = Path(__file__).resolve().parent
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = next(next(iter(modules.values())).parameters()).device
    return {
        "recipe": asdict(recipe),
        "commit": commit,
        "torch": torch.__version__,
        "device": machine_name(device),
        "precision": "bfloat16 autocast" if bfloat16_pays(device) else "float32",
        "weights": sum(w.numel() for w in _named(modules).values()),
    }


Loss = Callable[[int, int, torch.Generator], dict[str, Tensor]]


@contextmanager
def holding_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back SIGINT and SIGTERM for the length of a block; yields a function that says whether one came.

    So a step is never torn: weights, their averages and the step count belong together in every checkpoint. A second
    signal is not held back. Only the main thread receives signals; in any other, nothing is held back.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hold(number: int, _: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {sign: signal.signal(sign, hold) for sign in _SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _one_thread() -> None:
    """Set up a thread that computes parts: one core, no denormals, no autocast cache."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.set_autocast_cache_enabled(False)


class _Parts:
    """Training steps whose parts run in parallel on a CPU with several cores, else one after another."""

    def __init__(
        self,
        loss: Loss,
        weights: Mapping[str, nn.Parameter],
        steppers: Sequence[torch.optim.Optimizer],
        averages: Sequence[Average],
        recipe: Recipe,
    ):
        self.loss, self.by_name, self.weights, self.recipe = loss, weights, list(weights.values()), recipe
        self.steppers, self.averages = steppers, averages
        self.device = self.weights[0].device
        cores = min(recipe.parts, os.cpu_count() or 1) if self.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(cores, initializer=_one_thread) if cores > 1 else None

    def _part(self, step: int, part: int) -> tuple[Sequence[Tensor | None], dict[str, Tensor]]:
        recipe = self.recipe
        seed = (recipe.seed * 1_000_003 + step) * recipe.parts + part
        figures = self.loss(step, part, torch.Generator(self.device).manual_seed(seed))
        gradients = torch.autograd.grad(figures["loss"], self.weights, allow_unused=True)
        return gradients, {name: value.detach() for name, value in figures.items()}

    def prepare(self, step: int) -> None:
        """Nothing has to be prepared."""

    def differentiate(self, step: int) -> dict[str, float]:
        """Write the mean gradient of all parts into the weights' `grad`; return the means of the figures."""
        results = self.beside([partial(self._part, step, part) for part in range(self.recipe.parts)])
        for index, weight in enumerate(self.weights):
            own = [gradient for gradients, _ in results if (gradient := gradients[index]) is not None]
            weight.grad = torch.stack(own).sum(0) / self.recipe.parts if own else None
        first = results[0][1]
        return {name: sum(float(figures[name]) for _, figures in results) / self.recipe.parts for name in first}

    def take(self, step: int, rate: float) -> dict[str, float]:
        """Take a step; return its figures and the gradient's "norm". One that is not finite changes no weight."""
        figures = self.differentiate(step)
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights, self.recipe.clip))
        if math.isfinite(norm):
            set_rate(self.steppers, rate)
            self.beside([stepper.step for stepper in self.steppers])
            for average in self.averages:
                average.update(self.by_name, average.share(step))
        for stepper in self.steppers:
            stepper.zero_grad(set_to_none=True)
        return figures | {"norm": norm}

    def beside(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run tasks in parallel, one core each, or one after another; return their results in order."""
        if self._pool is None:
            return [task() for task in tasks]
        return list(self._pool.map(lambda task: task(), tasks))

    def __enter__(self) -> _Parts:
        self._threads = torch.get_num_threads()
        if self._pool is not None:  # split operations would wait for cores that other parts or programs hold
            torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        torch.set_num_threads(self._threads)


@flushing_denormals()
def fit(
    folder: Path,
    *,
    modules: Mapping[str, nn.Module],
    loss: Loss | Captured,
    recipe: Recipe,
    facts: dict[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    preview: Callable[[int], None] | None = None,
    measure: Callable[[int], dict[str, float]] | None = None,
    measure_every: int = 50_000,
    checkpoint_every: float = 120.0,
    log_every: int = 20,
    stop_after: int | None = None,
) -> Log:
    """Train until the recipe's budget is spent; leave the averaged weights in the modules.

    loss(step, part, generator) -> {"loss": scalar to minimise, further scalars for the log}. The generator is seeded
    from the recipe, the step and the part, so a resumed run sees what an uninterrupted one sees, with any number of
    cores. Resumes from folder/checkpoint.safetensors if it is of the same run, and writes it every `checkpoint_every`
    seconds, at the end, and when interrupted (KeyboardInterrupt, at the end of the step). `preview(step)` runs at
    every checkpoint, `measure(step)` every `measure_every` pictures and at the end, both with averaged weights in
    place; the log's `measures` keep what the latter returns. `stop_after` ends the call (not the budget) at a step.
    identity: what else the checkpoint of this run depends on, as JSON can hold it.
    Raises MismatchError if the checkpoint is of another identity or recipe, budget and batches aside, or has seen more
    pictures than the budget has; ConeslabError if the loss is no longer finite.
    """
    folder = require_writable(folder, folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "checkpoint.safetensors", Log(facts=_run_facts(recipe, modules) | dict(facts or {}))
    weights = _named(modules)
    steppers = optimizers(weights, recipe, captured=isinstance(loss, Captured))
    averages = [Average(weights, decay) for decay in recipe.averages]
    step, seconds = 0, 0.0
    kind = json.loads(json.dumps(_lasting(recipe) | dict(identity or {})))
    if path.is_file():
        tensors, kept = load_checkpoint(path)
        _require_same_run(path, kept, kind, recipe)
        _restore(path, weights, steppers, averages, tensors, kept)
        step, seconds, log.rows, log.measures = kept["step"], kept["seconds"], kept["rows"], kept.get("measures", [])
        log.facts["device"] = _devices(kept.get("device", ""), log.facts["device"])

    def with_average(act: Callable[[int], Any]) -> Any:
        trained = {k: w.detach().clone() for k, w in weights.items()}
        with torch.no_grad():
            for k, w in weights.items():
                w.copy_(averages[0].shadow[k])
            try:
                return act(step)
            finally:
                for k, w in weights.items():
                    w.copy_(trained[k])

    def checkpoint(show: bool = True) -> None:
        tensors = training_state(weights, steppers)
        for average in averages:
            tensors |= {f"average {average.decay}/{name}": weight for name, weight in average.shadow.items()}
        done = {"step": step, "seconds": seconds, "rows": log.rows, "measures": log.measures}
        save_checkpoint(path, tensors, {**done, "device": log.facts["device"], "identity": kind})
        log.save(folder / "log.json")
        if show and preview is not None:
            with_average(preview)

    shape = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=100.0, desc=folder.name, bar_format=shape, mininterval=5)
    sums: dict[str, Any] = {}
    counted, last_seconds, last_save = 0, seconds, time.monotonic()
    steps = (CapturedSteps if isinstance(loss, Captured) else _Parts)(loss, weights, steppers, averages, recipe)  # type: ignore[arg-type]
    with holding_interrupts() as interrupted, steps:
        steps.prepare(step)
        try:
            while recipe.spent(step, seconds) < 1.0 and (stop_after is None or step < stop_after):
                begun = time.monotonic()
                rate = recipe.rate(step, seconds)
                figures = steps.take(step, rate)
                norm = figures.pop("norm")
                if not (isinstance(norm, Tensor) or math.isfinite(norm)):
                    raise _not_finite(step, folder)
                step += 1
                for key, value in figures.items():
                    sums[key] = sums.get(key, 0.0) + value  # of captured steps: tensors, so that nobody waits for them
                counted += 1
                seconds += time.monotonic() - begun
                done = recipe.spent(step, seconds) >= 1.0
                if counted == log_every or done:
                    row = {key: float(total) / counted for key, total in sums.items()}
                    if not all(map(math.isfinite, row.values())):
                        raise _not_finite(step, folder)
                    log.rows.append({"step": step, "seconds": round(seconds, 2), "rate": rate, **row})
                    speed = f"{counted * recipe.batch_size / (seconds - last_seconds):.0f}/s"
                    bar.set_postfix(step=step, speed=speed, **{k: f"{v:.4f}" for k, v in row.items()})
                    bar.update(100 * recipe.spent(step, seconds) - bar.n)
                    sums, counted, last_seconds = {}, 0, seconds
                passed = step * recipe.batch_size // measure_every > (step - 1) * recipe.batch_size // measure_every
                if measure is not None and (done or passed):
                    log.measures.append({"step": step, "seconds": round(seconds, 2), **with_average(measure)})
                if interrupted():
                    checkpoint(show=False)
                    raise KeyboardInterrupt
                if time.monotonic() - last_save > checkpoint_every:
                    checkpoint()
                    last_save = time.monotonic()
        finally:
            bar.close()
        checkpoint()
        if interrupted():
            raise KeyboardInterrupt
    with torch.no_grad():
        for k, w in weights.items():
            w.copy_(averages[0].shadow[k])
    return log


def _devices(earlier: str, now: str) -> str:
    """What a run was computed on: "NVIDIA T4, then 2 CPU cores" if it was continued elsewhere."""
    parts = [part for part in earlier.split(", then ") if part]
    return ", then ".join(parts if parts[-1:] == [now] else [*parts, now])


def _not_finite(step: int, folder: Path) -> ConeslabError:
    return ConeslabError(f"the loss is no longer finite at step {step} of {folder}: lower the learning rate")


def _lasting(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe may not change in the middle of a run: all but the budget, and how it is cut into batches."""
    free = ("pictures", "minutes", "batch_size", "parts")
    return {name: value for name, value in asdict(recipe).items() if name not in free}


def _require_same_run(path: Path, kept: Mapping[str, Any], kind: Mapping[str, Any], recipe: Recipe) -> None:
    was = kept.get("identity", kind)  # older checkpoints do not say
    other = [name for name in sorted(was.keys() | kind.keys()) if was.get(name) != kind.get(name)]
    if other:
        said = ", ".join(f"{name} was {was.get(name)!r}, now {kind.get(name)!r}"[:120] for name in other)
        raise MismatchError(f"{path} belongs to another run ({said}): train in another folder, or delete it")
    if (kept["step"] - 1) * recipe.batch_size >= recipe.pictures > 0:
        raise MismatchError(
            f"{path} holds {kept['step']} steps, more than {recipe.pictures} pictures in batches of "
            f"{recipe.batch_size} take: give a larger budget, or train in another folder"
        )


def _restore(
    path: Path,
    weights: Mapping[str, nn.Parameter],
    steppers: Sequence[torch.optim.Optimizer],
    averages: Sequence[Average],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Restore a checkpoint: weights, their averages, and the optimisers' states."""
    kept = {name.removeprefix("weight/"): tensor.shape for name, tensor in tensors.items() if name[:7] == "weight/"}
    wanted = {name: weight.shape for name, weight in weights.items()}
    missing = [name for name in wanted if name not in kept]
    if kept != wanted or not {"step", "seconds", "rows"} <= facts.keys():
        first = f"lacks {len(missing)} weights, starting with {missing[0]}" if missing else "is of other training"
        raise FileFormatError(
            f"the checkpoint {path} {first}: it belongs to another model; delete it, or train in another folder"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight/{name}"])
            for average in averages:
                average.shadow[name].copy_(tensors.get(f"average {average.decay}/{name}", tensors[f"weight/{name}"]))
            for stepper in steppers:
                if not any(weight is w for group in stepper.param_groups for w in group["params"]):
                    continue
                keys = ("momentum",) if isinstance(stepper, Muon) else ("step", "exp_avg", "exp_avg_sq")
                if f"{keys[-1]}/{name}" in tensors:
                    stepper.state[weight] = {key: tensors[f"{key}/{name}"].to(weight.device) for key in keys}


def batches(n: int, size: int) -> Iterator[slice]:
    """Slices that split n items into parts of at most `size`."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))

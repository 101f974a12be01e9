"""Training loops measured in one process, in alternating blocks of steps, and printed as ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any

Seconds = tuple[float, float]  # by the clock, of the processors; the second holds on a busy machine too
Block = Callable[[int], list[Seconds]]  # takes so many steps, gives what each took


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def spent(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the clock and of the processors, and what came out."""
    start = now()
    result = run()
    return *(after - before for before, after in zip(start, now(), strict=True)), result


def steps_of(train: Callable[..., Any]) -> Block:
    """A block of a training function with `steps` and `callback`: what goes before the first step is left out."""

    def block(steps: int) -> list[Seconds]:
        stamps: list[Seconds] = []
        train(steps=steps + 1, callback=lambda *_: stamps.append(now()))
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(stamps)]

    return block


def in_turn(sides: Mapping[str, Block], *, steps: int, repeats: int) -> None:
    """Print the median step of each side and how many times as fast as the first one it is."""
    times: dict[str, list[Seconds]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):  # the first turn warms up
        for name, block in sides.items():
            taken = block(steps if repeat else 2)
            times[name] += taken if repeat else []
    print(f"{'':34}{'ms a step':>12}{'faster':>9}{'CPU ms':>9}{'faster':>9}")
    medians = {name: [median(part) for part in zip(*values, strict=True)] for name, values in times.items()}
    base = next(iter(medians.values()))
    for name, (clock, busy) in medians.items():
        print(f"{name:34}{1000 * clock:12.0f}{base[0] / clock:9.2f}{1000 * busy:9.0f}{base[1] / busy:9.2f}")
